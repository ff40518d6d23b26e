"""What every strategy and every explorer must keep to. Subclass, give a fixture, and pytest does the rest.

::

    class TestMine(StrategyContract):
        @pytest.fixture
        def strategy(self):
            return Mine(population=10)
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from nasplat.architecture import Architecture
from nasplat.identity import canonical, describe
from nasplat.space import SearchSpace
from nasplat.strategy import Evaluate, Explore, Explorer, History, Report, Strategy, proposal_to_json
from nasplat.task import Task
from nasplat.testing.drive import Run, drive, replay, trial_rng
from nasplat.testing.landscapes import Landscape, TinyCell, one_max, one_max_edges, tiny, trade_off

PARALLEL = [1, 4, 16]

SEEDS = range(20)
"""Searches that are compared with random search."""

LEVEL = 0.01
"""Of the one-sided test that a strategy beats random search."""


def _again(strategy: Any) -> Any:
    """The strategy as another process would get it."""
    return pickle.loads(pickle.dumps(strategy))


def _as_json(proposal: Any) -> Any:
    return None if proposal is None else proposal_to_json(proposal)


def _snapshot(history: History) -> Any:
    return (
        history.revision,
        [repr(trial) for trial in history.trials],
        [trial.number for trial in history.running],
        [trial.number for trial in history.finished()],
        [trial.number for trial in history.scored()],
        history.distinct,
    )


def _global_states() -> list[bytes]:
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()  # noqa: NPY002
    return [pickle.dumps(state) for state in states]


class StrategyContract:
    """Tests of a strategy. Give a ``strategy`` fixture.

    Attributes:
        trials: Length of the driven searches; more than the strategy's start-up, so that the search itself is tested.
        random: Whether the strategy draws at random, so that another seed gives another search.
        beats_random: Whether it must find better than random search does. A strategy that need not says so, and why, in
            its docstring.
        evaluations: Full trainings for which it must. A trial of a lower budget counts as its share.
    """

    trials: int = 40
    random: bool = True
    beats_random: bool = True
    evaluations: int = 100

    @pytest.fixture
    def strategy(self) -> Strategy:
        """The strategy under test."""
        raise NotImplementedError("subclass StrategyContract and give a fixture named strategy")

    @pytest.fixture(params=["separable", "groups", "trade-off"])
    def landscape(self, request: pytest.FixtureRequest) -> Landscape:
        """Without groups, with groups, and with two objectives and a limit."""
        return {"separable": one_max, "groups": one_max_edges, "trade-off": trade_off}[request.param]()

    def test_is_plain_data(self, strategy: Strategy) -> None:
        """A frozen dataclass: known by its fields, equal after pickling, readable."""
        assert dataclasses.is_dataclass(strategy)
        assert type(strategy).__dataclass_params__.frozen
        assert isinstance(strategy, Strategy)
        assert _again(strategy) == strategy
        assert canonical(describe(_again(strategy))) == canonical(describe(strategy))
        assert type(strategy).__name__ in repr(strategy)

    @pytest.mark.parametrize("in_flight", [1, 4])
    def test_pure_at_every_prefix(self, strategy: Strategy, landscape: Landscape, in_flight: int) -> None:
        """Each proposal of a search is repeated by a fresh strategy on a fresh history with the same events."""
        run = drive(strategy, landscape, self.trials, in_flight=in_flight)
        assert len(run.asked) >= 1
        for events, number, proposal in run.asked:
            history = replay(landscape, run.events[:events]).history
            fresh = _again(strategy)
            assert _as_json(fresh.propose(history, trial_rng(0, number))) == _as_json(proposal), f"trial {number}"

    def test_asked_twice_answers_the_same(self, strategy: Strategy, landscape: Landscape) -> None:
        """Nothing is kept from one call to the next."""
        history = drive(strategy, landscape, self.trials // 2, in_flight=4).history
        answers = [_as_json(strategy.propose(history, trial_rng(0, len(history)))) for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]

    def test_another_search_in_between_changes_nothing(self, strategy: Strategy, landscape: Landscape) -> None:
        """One object may serve two searches."""
        half = drive(strategy, landscape, self.trials // 2)
        drive(strategy, landscape, 5, seed=7)
        run = drive(strategy, landscape, self.trials, run=half)
        assert run.proposals == drive(_again(strategy), landscape, self.trials).proposals

    def test_seed(self, strategy: Strategy, landscape: Landscape) -> None:
        """The same seed gives the same search; another seed another one."""
        first, second, other = (drive(strategy, landscape, self.trials, seed=seed).proposals for seed in (0, 0, 1))
        assert first == second
        if self.random:
            assert first != other

    @pytest.mark.parametrize("in_flight", [1, 4])
    def test_resumed_is_uninterrupted(self, strategy: Strategy, landscape: Landscape, in_flight: int) -> None:
        """A search that goes on from its events in another process ends as the one that was not interrupted."""
        whole = drive(strategy, landscape, self.trials, in_flight=in_flight)
        resumed = replay(landscape, whole.events[: len(whole.events) // 2])
        drive(_again(strategy), landscape, self.trials, in_flight=in_flight, run=resumed)
        assert resumed.proposals == whole.proposals

    @pytest.mark.parametrize("in_flight", PARALLEL)
    def test_proposals_are_valid(self, strategy: Strategy, landscape: Landscape, in_flight: int) -> None:
        """Each proposal is one that the search can carry out and the journal can keep."""
        run = drive(strategy, landscape, self.trials, in_flight=in_flight)
        assert len(run.history) >= 1
        for trial in run.history.trials:
            proposal = trial.proposal
            json.dumps(proposal_to_json(proposal), allow_nan=False)
            if isinstance(proposal, Evaluate):
                assert landscape.space.owns(proposal.architecture)
                assert landscape.space.architecture(proposal.architecture.genes) == proposal.architecture
                if proposal.weights_of is not None:
                    assert proposal.weights_of < trial.number
            else:
                assert isinstance(proposal, Explore)

    @pytest.mark.parametrize("fails", ["first", "every third", "all"])
    @pytest.mark.parametrize("in_flight", [1, 4])
    def test_survives_failed_trials(self, strategy: Strategy, landscape: Landscape, fails: str, in_flight: int) -> None:
        """A failed trial is no reason to raise."""
        rule = {"first": lambda n: n < 30, "every third": lambda n: n % 3 == 0, "all": lambda n: True}[fails]
        run = drive(strategy, landscape, self.trials, in_flight=in_flight, fails=rule)
        assert 1 <= len(run.history) <= self.trials

    def test_survives_infeasible_trials(self, strategy: Strategy) -> None:
        """Nor is a limit that most, or all, break before training."""
        for limit in (0.4, -1.0):
            run = drive(strategy, trade_off(limit=limit), self.trials, in_flight=2, cheap=("cost",))
            assert 1 <= len(run.history) <= self.trials

    def test_leaves_global_generators_alone(self, strategy: Strategy, landscape: Landscape) -> None:
        """The generator that is handed in is the only source of randomness."""
        before = _global_states()
        drive(strategy, landscape, self.trials)
        assert _global_states() == before

    def test_ignores_global_generators(self, strategy: Strategy, landscape: Landscape) -> None:
        """Seeding the global generators another way changes nothing."""
        proposals = []
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        try:
            for seed in (1, 2):
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                torch.manual_seed(seed)
                proposals.append(drive(_again(strategy), landscape, self.trials).proposals)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])
        assert proposals[0] == proposals[1]

    def test_leaves_the_history_alone(self, strategy: Strategy, landscape: Landscape) -> None:
        """The search alone writes the history."""
        run = drive(strategy, landscape, self.trials // 2, in_flight=4)
        for events in range(len(run.events) + 1):
            history = replay(landscape, run.events[:events]).history
            before = _snapshot(history)
            strategy.propose(history, trial_rng(0, len(history)))
            assert _snapshot(history) == before

    @pytest.mark.parametrize("in_flight", PARALLEL)
    def test_ends_on_an_exhausted_space(self, strategy: Strategy, in_flight: int) -> None:
        """None while nothing runs ends the search; it must come once there is nothing left to propose."""
        run = drive(strategy, tiny(), 300, in_flight=in_flight)
        assert run.asked[-1][2] is None, "still proposing after 300 trials in a space of 16 architectures"

    @pytest.mark.parametrize("known", ["separable", "groups"])
    def test_beats_random_search(self, strategy: Strategy, known: str) -> None:
        """Over 20 seeds, for the same training, it ends better than random search (Wilcoxon's signed-rank test).

        A strategy of slow proposals overrides this with a call of itself under ``@pytest.mark.slow``.
        """
        if not self.beats_random:
            said = " ".join((type(strategy).__doc__ or "").split()).lower()
            assert "random search" in said, "a strategy that need not beat random search must say so in its docstring"
            return
        landscape = {"separable": one_max, "groups": one_max_edges}[known]()
        runs = [_trained_for(strategy, landscape, self.evaluations, seed) for seed in SEEDS]
        if any(isinstance(trial.proposal, Explore) for trial in runs[0].history.trials):
            pytest.skip("its explorer finds, and a landscape has nothing to explore")
        ours = [run.best() for run in runs]
        costs = [max(1, round(_training(run.history))) for run in runs]
        random = [_random_best(known, cost, seed) for cost, seed in zip(costs, SEEDS, strict=True)]
        # Without a result at all: infinitely bad, which the test cannot rank.
        differences = [min(own, 1e9) - other for own, other in zip(ours, random, strict=True)]
        better, worse = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        level = stats.wilcoxon(differences, alternative="less").pvalue if better else 1.0
        assert level < LEVEL, f"better than random search {better} times, worse {worse} times: p = {level:.2g}"


@dataclasses.dataclass(frozen=True)
class _Random:
    """Random search without replacement, to compare with."""

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture)


@cache
def _random_best(known: str, trials: int, seed: int) -> float:
    landscape = {"separable": one_max, "groups": one_max_edges}[known]()
    return drive(_Random(), landscape, trials, seed=seed).best()


def _training(history: History) -> float:
    """Full trainings that a search has cost: a trial that goes on from another costs the difference."""
    total = 0.0
    for trial in history.trials:
        if isinstance(trial.proposal, Evaluate):
            total += trial.proposal.budget
            source = trial.proposal.weights_of
            before = None if source is None else history.trials[source].proposal
            if isinstance(before, Evaluate) and before.architecture == trial.proposal.architecture:
                total -= before.budget
    return total


def _trained_for(strategy: Strategy, landscape: Landscape, evaluations: int, seed: int) -> Run:
    """A search until its trainings amount to so many full ones, or it has nothing more to propose."""
    run = drive(strategy, landscape, evaluations, seed=seed)
    while run.asked[-1][2] is not None and len(run.history) < 50 * evaluations:
        left = int(evaluations - _training(run.history))
        if left < 1:
            break
        drive(strategy, landscape, len(run.history) + left, seed=seed, run=run)
    return run


class RecordingContext:
    """A worker's context for tests: keeps the last state, and can kill the run.

    States go through ``torch.save`` and a load that takes nothing but tensors and plain values.

    Attributes:
        device: The CPU.
        seed: As given.
        steps: Optimisation steps so far.
        stored: The last state, as bytes.
    """

    def __init__(self, seed: int = 0, kill_at: int | None = None, kill_before_saving: bool = False) -> None:
        self.device = torch.device("cpu")
        self.seed = seed
        self.steps = 0
        self.stored: bytes | None = None
        self._kill_at = kill_at
        self._kill_before_saving = kill_before_saving
        self._saves = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count a step."""
        self.steps += 1
        yield

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the state; before or after it be killed, where that was asked for."""
        self._saves += 1
        killed = self._saves == self._kill_at
        if killed and self._kill_before_saving:
            raise KeyboardInterrupt
        stream = io.BytesIO()
        torch.save(dict(state), stream)
        self.stored = stream.getvalue()
        if killed:
            raise KeyboardInterrupt

    def keep(self, weights: Mapping[str, torch.Tensor]) -> None:
        """What was kept last."""
        self.kept = dict(weights)

    def load(self) -> dict[str, Any] | None:
        """The last state."""
        if self.stored is None:
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(self.stored), weights_only=True)
        return state


def explore(
    explorer: Explorer,
    space: SearchSpace,
    task: Task,
    context: RecordingContext,
    reports: list[Report] | None = None,
    stop_after: int | None = None,
) -> list[Architecture]:
    """Run an explorer as a worker does: torch is seeded, then its reports are taken one by one.

    Args:
        explorer: What explores.
        space: Where.
        task: On what.
        context: Seed, steps and states.
        reports: Filled with what it reports, as far as it gets.
        stop_after: Number of reports after which it is told to end.
    """
    reports = [] if reports is None else reports
    torch.manual_seed(context.seed)
    steps = explorer.explore(space, task, trial_rng(context.seed, 0), context)
    try:
        report = next(steps)
        while True:
            reports.append(report)
            report = steps.send(stop_after is None or len(reports) < stop_after)
    except StopIteration as stop:
        return list(stop.value)


class ExplorerContract:
    """Tests of an explorer, on a space and data small enough for seconds. Give an ``explorer`` fixture of 3 epochs.

    Attributes:
        epochs: Epochs of the explorer.
    """

    epochs: int = 3

    @pytest.fixture
    def explorer(self) -> Explorer:
        """The explorer under test."""
        raise NotImplementedError("subclass ExplorerContract and give a fixture named explorer")

    @pytest.fixture
    def space(self) -> SearchSpace:
        """A space with a supernet."""
        return TinyCell()

    @pytest.fixture
    def task(self) -> Task:
        """Few and small images."""
        return Task.digits(limit=64)

    def test_is_plain_data(self, explorer: Explorer) -> None:
        """A frozen dataclass: known by its fields, equal after pickling."""
        assert dataclasses.is_dataclass(explorer)
        assert type(explorer).__dataclass_params__.frozen
        assert isinstance(explorer, Explorer)
        assert _again(explorer) == explorer
        assert canonical(describe(_again(explorer))) == canonical(describe(explorer))

    def test_finds_valid_architectures(self, explorer: Explorer, space: SearchSpace, task: Task) -> None:
        """At least one, all of the space; an epoch is one report, counted from 1, with finite metrics."""
        context, reports = RecordingContext(), list[Report]()
        found = explore(explorer, space, task, context, reports)
        assert len(found) >= 1
        for architecture in found:
            assert space.architecture(architecture.genes) == architecture
        assert [report.step for report in reports] == list(range(1, self.epochs + 1))
        assert all(math.isfinite(value) for report in reports for value in report.metrics.values())
        assert context.steps >= self.epochs

    def test_seed(self, explorer: Explorer, space: SearchSpace, task: Task) -> None:
        """The same seed repeats the run to the last bit; another one does not."""
        runs = []
        for seed in (0, 0, 1):
            reports: list[Report] = []
            runs.append((explore(_again(explorer), space, task, RecordingContext(seed), reports), reports))
        assert runs[0] == runs[1]
        assert runs[0][1] != runs[2][1]

    @pytest.mark.parametrize("kill_before_saving", [False, True])
    def test_resumed_is_uninterrupted(
        self, explorer: Explorer, space: SearchSpace, task: Task, kill_before_saving: bool
    ) -> None:
        """A run killed at every save, and gone on with from its last state, ends the same to the last bit.

        Killed before a save, it does that epoch again; killed after it, the next one.
        """
        whole, reports = RecordingContext(), list[Report]()
        found = explore(explorer, space, task, whole, reports)
        stored: bytes | None = None
        for epoch in range(1, len(reports) + 1):
            for before_saving in (True, False) if kill_before_saving else (False,):
                context, seen = RecordingContext(kill_at=1, kill_before_saving=before_saving), list[Report]()
                context.stored = stored
                with pytest.raises(KeyboardInterrupt):
                    explore(_again(explorer), space, task, context, seen)
                steps = [report.step for report in seen]
                assert steps == [epoch], f"with epochs up to {epoch - 1} saved, it reported {steps} up to the next save"
                assert seen == reports[epoch - 1 : epoch]
            stored = context.stored
        resumed, after = RecordingContext(), list[Report]()
        resumed.stored = stored
        assert explore(_again(explorer), space, task, resumed, after) == found
        assert after == [], "did an epoch after the last one"
        assert_same(resumed.load(), whole.load())

    def test_ends_when_told(self, explorer: Explorer, space: SearchSpace, task: Task) -> None:
        """An explorer that is told to end returns what it found so far."""
        reports: list[Report] = []
        told = RecordingContext()
        found = explore(explorer, space, task, told, reports, stop_after=1)
        assert len(found) >= 1
        assert len(reports) == 1
        # Killed before it could answer, it still ends there.
        again, after = RecordingContext(), list[Report]()
        again.stored = told.stored
        assert explore(_again(explorer), space, task, again, after) == found
        assert after == [], "went on although it had been told to end"

    def test_leaves_global_generators_alone(self, explorer: Explorer, space: SearchSpace, task: Task) -> None:
        """Python's and NumPy's. Torch's is the worker's to seed and the explorer's to use."""
        before = _global_states()[:2]
        explore(explorer, space, task, RecordingContext())
        assert _global_states()[:2] == before


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    """Assert that two nested states are equal, tensors to the last bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, Mapping):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{index}]")
    else:
        assert a == b, path
