"""The contract must catch strategies that break it, and pass one that does not."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from nasplat.architecture import Architecture
from nasplat.strategy import Evaluate, Explore, Report, Trial
from nasplat.task import Task
from nasplat.testing.drive import drive, replay
from nasplat.testing.landscapes import Edges, Levels, TinyCell, one_max, one_max_edges, short_training, tiny, trade_off
from nasplat.testing.strategy_contract import (
    ExplorerContract,
    RecordingContext,
    StrategyContract,
    _trained_for,
    _training,
    explore,
)

LANDSCAPE = one_max()


@dataclass(frozen=True)
class Good:
    """Draws what is new, and ends. This is random search."""

    def propose(self, history, rng):
        if history.distinct >= history.space.size():
            return None
        while True:
            architecture = history.space.sample(rng)
            if not history.of(architecture):
                return Evaluate(architecture)


class TestGood(StrategyContract):
    trials = 15
    beats_random = False

    @pytest.fixture
    def strategy(self):
        return Good()


@dataclass(frozen=True)
class GlobalNumpy(Good):
    def propose(self, history, rng):
        return super().propose(history, np.random.default_rng(np.random.randint(2**31)))  # noqa: NPY002


@dataclass(frozen=True)
class GlobalPython(Good):
    def propose(self, history, rng):
        return super().propose(history, np.random.default_rng(random.getrandbits(31)))


@dataclass(frozen=True)
class GlobalTorch(Good):
    def propose(self, history, rng):
        return super().propose(history, np.random.default_rng(int(torch.randint(2**31, ()))))


@dataclass(frozen=True)
class HiddenCounter(Good):
    calls: list[int] = field(default_factory=list, compare=False)

    def propose(self, history, rng):
        self.calls.append(0)
        return super().propose(history, np.random.default_rng([len(self.calls), int(rng.integers(2**31))]))


@dataclass(frozen=True)
class WritesHistory(Good):
    def propose(self, history, rng):
        history.revision += 1
        return super().propose(history, rng)


@dataclass(frozen=True)
class WritesMetrics(Good):
    def propose(self, history, rng):
        for trial in history.scored():
            trial.metrics["value"] += 1
        return super().propose(history, rng)


@dataclass(frozen=True)
class IgnoresSeed(Good):
    def propose(self, history, rng):
        return super().propose(history, np.random.default_rng(len(history)))


@dataclass(frozen=True)
class NeverEnds:
    def propose(self, history, rng):
        return Evaluate(history.space.sample(rng))


@dataclass(frozen=True)
class NeedsSuccess(Good):
    def propose(self, history, rng):
        if history.finished():
            max(history.losses(trial) for trial in history.scored())
        return super().propose(history, rng)


@dataclass(frozen=True)
class ForgetsGroups:
    def propose(self, history, rng):
        if history.distinct >= history.space.size():
            return None
        choices = history.space.choices
        genes = {name: options[int(rng.integers(len(options)))] for name, options in choices.items()}
        return Evaluate(Architecture(history.space.identity, genes))


@dataclass(frozen=True)
class NotesNotJson(Good):
    def propose(self, history, rng):
        proposal = super().propose(history, rng)
        return proposal and Evaluate(proposal.architecture, notes={"parent": proposal.architecture})


@dataclass
class NotFrozen:
    def propose(self, history, rng):
        return Good().propose(history, rng)


@dataclass(frozen=True)
class NotPicklable(Good):
    rule: Callable[[], Any] = lambda: None


def separable(test, *arguments):
    return lambda strategy: test(StrategyContract(), strategy, LANDSCAPE, *arguments)


def grouped(test, *arguments):
    return lambda strategy: test(StrategyContract(), strategy, one_max_edges(), *arguments)


def bare(test, *arguments):
    return lambda strategy: test(StrategyContract(), strategy, *arguments)


CASES = [
    (GlobalNumpy(), separable(StrategyContract.test_leaves_global_generators_alone)),
    (GlobalNumpy(), separable(StrategyContract.test_ignores_global_generators)),
    (GlobalNumpy(), separable(StrategyContract.test_pure_at_every_prefix, 1)),
    (GlobalPython(), separable(StrategyContract.test_leaves_global_generators_alone)),
    (GlobalPython(), separable(StrategyContract.test_ignores_global_generators)),
    (GlobalTorch(), separable(StrategyContract.test_leaves_global_generators_alone)),
    (GlobalTorch(), separable(StrategyContract.test_ignores_global_generators)),
    (HiddenCounter(), separable(StrategyContract.test_pure_at_every_prefix, 1)),
    (HiddenCounter(), separable(StrategyContract.test_asked_twice_answers_the_same)),
    (HiddenCounter(), separable(StrategyContract.test_another_search_in_between_changes_nothing)),
    (HiddenCounter(), separable(StrategyContract.test_seed)),
    (WritesHistory(), separable(StrategyContract.test_leaves_the_history_alone)),
    (WritesMetrics(), separable(StrategyContract.test_leaves_the_history_alone)),
    (IgnoresSeed(), separable(StrategyContract.test_seed)),
    (NeverEnds(), bare(StrategyContract.test_ends_on_an_exhausted_space, 1)),
    (NeedsSuccess(), separable(StrategyContract.test_survives_failed_trials, "first", 1)),
    (ForgetsGroups(), grouped(StrategyContract.test_proposals_are_valid, 1)),
    (NotesNotJson(), separable(StrategyContract.test_proposals_are_valid, 1)),
    (NotFrozen(), bare(StrategyContract.test_is_plain_data)),
    (NotPicklable(lambda: None), bare(StrategyContract.test_is_plain_data)),
]


@pytest.mark.parametrize(("strategy", "test"), CASES, ids=lambda value: type(value).__name__)
def test_catches(strategy, test):
    test(Good())
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        with pytest.raises(Exception) as caught:
            test(strategy)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
    assert not isinstance(caught.value, NotImplementedError)


@dataclass(frozen=True)
class Climbs(Good):
    """Mutates the best so far."""

    def propose(self, history, rng):
        best = history.best()
        for _ in range(20 if best and rng.random() < 0.8 else 0):
            child = history.space.mutate(best.architecture, rng)
            if not history.of(child):
                return Evaluate(child)
        return super().propose(history, rng)


@dataclass(frozen=True)
class Descends(Good):
    """Mutates the worst so far."""

    def propose(self, history, rng):
        worst = max(history.scored(), key=history.losses, default=None)
        for _ in range(20 if worst else 0):
            child = history.space.mutate(worst.architecture, rng)
            if not history.of(child):
                return Evaluate(child)
        return super().propose(history, rng)


@dataclass(frozen=True)
class Short(Good):
    """Never trains anything in full."""

    def propose(self, history, rng):
        proposal = super().propose(history, rng)
        return proposal and Evaluate(proposal.architecture, 0.5)


class Few(StrategyContract):
    evaluations = 40


class Excused(StrategyContract):
    beats_random = False


class TestBeatsRandomSearch:
    @pytest.mark.parametrize("known", ["separable", "groups"])
    def test_passes_a_strategy_that_climbs(self, known):
        Few().test_beats_random_search(Climbs(), known)

    @pytest.mark.parametrize("strategy", [Good(), Descends(), Short()], ids=lambda s: type(s).__name__)
    def test_catches(self, strategy):
        with pytest.raises(AssertionError, match="random search"):
            Few().test_beats_random_search(strategy, "separable")

    def test_who_need_not_says_so_in_its_docstring(self):
        Excused().test_beats_random_search(Good(), "separable")
        with pytest.raises(AssertionError, match="must say so"):
            Excused().test_beats_random_search(Descends(), "separable")

    def test_counts_training_and_not_trials(self):
        """Half a training each: twice the trials, and random search gets as many full ones as they amount to."""
        history = _trained_for(Short(), one_max(), 20, seed=0).history
        assert len(history) == pytest.approx(40, abs=1)
        assert _training(history) == pytest.approx(20, abs=0.5)
        history.start(Trial(len(history), Evaluate(history.trials[0].architecture, 1.0, weights_of=0)))
        assert _training(history) == pytest.approx(20.5, abs=0.5)

    def test_explorers_are_judged_elsewhere(self):
        @dataclass(frozen=True)
        class Explores:
            def propose(self, history, rng):
                return None if len(history) else Explore(GoodExplorer())

        with pytest.raises(pytest.skip.Exception):
            Few().test_beats_random_search(Explores(), "separable")


class TestDrive:
    @pytest.mark.parametrize("in_flight", [1, 4, 16])
    def test_keeps_so_many_in_flight(self, in_flight):
        most = 0

        @dataclass(frozen=True)
        class Watching(Good):
            def propose(self, history, rng):
                nonlocal most
                most = max(most, len(history.running) + 1)
                return super().propose(history, rng)

        run = drive(Watching(), one_max(), 40, in_flight=in_flight)
        assert most == in_flight
        assert len(run.history) == len(run.history.finished()) == 40

    def test_ends_out_of_order_and_the_same_each_time(self):
        runs = [drive(Good(), one_max(), 30, in_flight=4) for _ in range(2)]
        orders = [[trial.number for trial in run.history.finished()] for run in runs]
        assert orders[0] == orders[1] != sorted(orders[0])

    def test_replay(self):
        run = drive(Good(), one_max(), 10, in_flight=3)
        again = replay(one_max(), run.events)
        assert again.history.trials == run.history.trials
        assert again.history.trials is not run.history.trials

    def test_budgets_and_reports(self):
        landscape = short_training(one_max(), noise=0.0)

        @dataclass(frozen=True)
        class TwoRungs(Good):
            def propose(self, history, rng):
                last = history.trials[-1] if history.trials else None
                if last is not None and last.proposal.budget < 1:
                    return Evaluate(last.architecture, 1.0, last.number)
                return Evaluate(super().propose(history, rng).architecture, 0.25)

            def keep(self, trial, history):
                return trial.number != 3 or len(trial.reports) < 2

        run = drive(TwoRungs(), landscape, 4, epochs=8)
        low, high, _, stopped = run.history.trials
        full = landscape.score(low.architecture)["value"]
        assert [report["value"] for report in (*low.reports, *high.reports)] == pytest.approx(
            [full * (epoch / 8) ** 0.2 for epoch in range(1, 9)]
        )
        assert (len(low.reports), len(high.reports)) == (2, 6)
        assert (low.metrics["value"], high.metrics["value"]) == (low.reports[-1]["value"], full)
        assert (stopped.state, len(stopped.reports)) == ("stopped", 2)
        assert stopped.metrics == stopped.reports[-1]
        assert replay(landscape, run.events).history.trials == run.history.trials
        assert all(trial.copy_of is None for trial in run.history.trials)

    def test_outcomes(self):
        run = drive(Good(), trade_off(limit=0.4), 40, fails=lambda n: n == 1, cheap=("cost",))
        states = [trial.state for trial in run.history.trials]
        assert states[1] == "failed"
        assert set(states) == {"failed", "complete", "infeasible"}
        for trial in run.history.trials:
            assert ("value" in trial.metrics) == (trial.state == "complete")

    def test_a_repeated_architecture_is_a_copy(self):
        run = drive(NeverEnds(), tiny(), 40)
        for trial in run.history.trials:
            earlier = run.history.of(trial.architecture)[0]
            assert trial.copy_of == (None if earlier is trial else earlier.number)


class TestLandscapes:
    def test_short_trainings_mislead_and_full_ones_do_not(self):
        landscape = short_training(one_max(length=4))
        architectures = list(landscape.space.enumerate())
        full = [landscape.score(a)["value"] for a in architectures]
        assert [landscape.metrics(a)["value"] for a in architectures] == full
        likeness = []
        for budget in (1 / 27, 1 / 3):
            short = [landscape.metrics(a, budget)["value"] for a in architectures]
            assert short == [landscape.metrics(a, budget)["value"] for a in architectures]
            assert np.mean(short) < np.mean(full)
            likeness.append(np.corrcoef(short, full)[0, 1])
        assert 0.3 < likeness[0] < likeness[1] < 0.99

    @pytest.mark.parametrize("landscape", [one_max(length=4), one_max_edges(nodes=1), tiny()])
    def test_optimum_is_the_best_there_is(self, landscape):
        values = [landscape.score(architecture)["value"] for architecture in landscape.space.enumerate()]
        assert max(values) == pytest.approx(landscape.optimum)
        assert np.mean(values) < 0.8 * landscape.optimum

    def test_trade_off_pulls_apart(self):
        landscape = trade_off(length=3, limit=None)
        history = drive(Good(), landscape, 64).history
        assert len(history.front()) >= 8

    @pytest.mark.parametrize("space", [Levels(), Edges(), TinyCell()])
    def test_samples_are_legal(self, space):
        for seed in range(20):
            architecture = space.sample(np.random.default_rng(seed))
            assert space.architecture(architecture.genes) == architecture

    def test_tiny_cell_builds_what_its_supernet_computes(self):
        space = TinyCell()
        architecture = space.sample(np.random.default_rng(0))
        supernet, network = space.supernet().eval(), space.build(architecture).eval()
        network.net.load_state_dict(supernet.state_dict())
        x = torch.randn(3, 1, 8, 8)
        assert torch.equal(network(x), supernet(x, space.relax(architecture)))


@dataclass(frozen=True)
class GoodExplorer:
    """A random walk that does what an explorer must, without training."""

    epochs: int = 3

    def explore(self, space, task, rng, context):
        state = context.load() or {"epoch": 0, "total": torch.zeros(()), "ended": False}
        seed = int(rng.integers(2**31))
        for epoch in range(state["epoch"] + 1, 0 if state["ended"] else self.epochs + 1):
            with context.step():
                state["total"] = state["total"] + np.random.default_rng([seed, epoch]).random()
            go_on = yield Report(epoch, {"total": float(state["total"])})
            state = {"epoch": epoch, "total": state["total"], "ended": not go_on}
            context.save(state)
            if not go_on:
                break
        return [space.sample(np.random.default_rng(int(1e6 * float(state["total"]))))]


class TestGoodExplorer(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return GoodExplorer()


@dataclass(frozen=True)
class BeginsAgain(GoodExplorer):
    def explore(self, space, task, rng, context):
        context.load = lambda: None
        return (yield from super().explore(space, task, rng, context))


@dataclass(frozen=True)
class ForgetsTotal(GoodExplorer):
    def explore(self, space, task, rng, context):
        load = context.load
        context.load = lambda: (state := load()) and {**state, "total": torch.zeros(())}
        return (yield from super().explore(space, task, rng, context))


@dataclass(frozen=True)
class SavesObjects(GoodExplorer):
    def explore(self, space, task, rng, context):
        save = context.save
        context.save = lambda state: save({**state, "rng": rng})
        return (yield from super().explore(space, task, rng, context))


@dataclass(frozen=True)
class DoesNotStop(GoodExplorer):
    def explore(self, space, task, rng, context):
        inner = super().explore(space, task, rng, context)
        report = next(inner)
        while True:
            yield report
            try:
                report = inner.send(True)
            except StopIteration as stop:
                return stop.value


@dataclass(frozen=True)
class ForgetsTheEnd(GoodExplorer):
    def explore(self, space, task, rng, context):
        save = context.save
        context.save = lambda state: save({**state, "ended": False})
        return (yield from super().explore(space, task, rng, context))


@dataclass(frozen=True)
class FindsNothing(GoodExplorer):
    def explore(self, space, task, rng, context):
        yield from super().explore(space, task, rng, context)
        return []


@dataclass(frozen=True)
class UsesGlobal(GoodExplorer):
    def explore(self, space, task, rng, context):
        return (yield from super().explore(space, task, np.random.default_rng(np.random.randint(9)), context))  # noqa: NPY002


EXPLORER_CASES = [
    (BeginsAgain(), ExplorerContract.test_resumed_is_uninterrupted, (False,)),
    (ForgetsTotal(), ExplorerContract.test_resumed_is_uninterrupted, (False,)),
    (SavesObjects(), ExplorerContract.test_resumed_is_uninterrupted, (False,)),
    (DoesNotStop(), ExplorerContract.test_ends_when_told, ()),
    (ForgetsTheEnd(), ExplorerContract.test_ends_when_told, ()),
    (FindsNothing(), ExplorerContract.test_finds_valid_architectures, ()),
    (UsesGlobal(), ExplorerContract.test_leaves_global_generators_alone, ()),
]


@pytest.mark.parametrize(
    ("explorer", "test", "arguments"), EXPLORER_CASES, ids=[type(case[0]).__name__ for case in EXPLORER_CASES]
)
def test_catches_explorers(explorer, test, arguments):
    test(ExplorerContract(), GoodExplorer(), TinyCell(), Task.digits(limit=32), *arguments)
    with pytest.raises(Exception):  # noqa: B017
        test(ExplorerContract(), explorer, TinyCell(), Task.digits(limit=32), *arguments)


def test_explore_stops_after_the_reports_asked_for():
    reports = []
    explore(GoodExplorer(9), TinyCell(), Task.digits(limit=32), RecordingContext(), reports, stop_after=4)
    assert [report.step for report in reports] == [1, 2, 3, 4]
