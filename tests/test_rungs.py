"""What holds for each strategy that trains in rungs."""

import json
from dataclasses import dataclass, replace

import pytest

from nasplat.errors import InvalidInputError
from nasplat.objectives import at_most, maximise
from nasplat.rungs import Rungs
from nasplat.strategy import Evaluate, Explore
from nasplat.study import Study
from nasplat.task import Task
from nasplat.testing.drive import drive, replay, trial_rng
from nasplat.testing.landscapes import TinyCell, one_max, short_training, tiny, trade_off
from strategies import OptunaSearch, RandomSearch, RegularizedEvolution
from strategies.asha import AsyncSuccessiveHalving
from strategies.hyperband import Hyperband
from strategies.successive_halving import SuccessiveHalving

KINDS = [SuccessiveHalving, Hyperband, AsyncSuccessiveHalving]


def on(run, rung, bracket=0):
    marks = {"rung": rung, "bracket": bracket}
    return [t for t in run.history.trials if {name: t.proposal.notes[name] for name in marks} == marks]


@pytest.mark.parametrize(
    ("min_budget", "eta", "budgets"),
    [
        (1.0, 3, (1.0,)),
        (1 / 3, 3, (1 / 3, 1.0)),
        (1 / 27, 3, (1 / 27, 1 / 9, 1 / 3, 1.0)),
        (1 / 81, 3, (1 / 81, 1 / 27, 1 / 9, 1 / 3, 1.0)),
        (0.1, 2, (1 / 8, 1 / 4, 1 / 2, 1.0)),
        (0.3, 4, (1.0,)),
        (1 / 1000, 10, (0.001, 0.01, 0.1, 1.0)),
    ],
)
def test_budgets_are_powers_of_eta_down_to_min_budget(min_budget, eta, budgets):
    assert Rungs(min_budget, eta).budgets == pytest.approx(budgets, rel=1e-12)
    assert Rungs(min_budget, eta).budgets[-1] == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_flight", [1, 4])
def test_who_climbs_goes_on_from_the_rung_below(kind, in_flight):
    run = drive(kind(min_budget=1 / 9), short_training(one_max()), 80, in_flight=in_flight)
    climbed = 0
    for trial in run.history.trials:
        rung, source = trial.proposal.notes["rung"], trial.proposal.weights_of
        first = run.history.of(trial.architecture)[0]
        if first is trial:
            assert source is None
            continue
        below = run.history.trials[source]
        assert below.architecture == trial.architecture
        assert below.state == "complete" and below.proposal.notes["rung"] == rung - 1
        assert trial.proposal.budget == pytest.approx(3 * below.proposal.budget)
        assert trial.copy_of is None
        climbed += 1
    assert climbed > 10
    assert run.history.best().proposal.budget == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_without_carry_each_rung_trains_anew(kind):
    runs = [drive(kind(min_budget=1 / 9, carry=carry), short_training(one_max()), 60) for carry in (True, False)]
    assert all(trial.proposal.weights_of is None for trial in runs[1].history.trials)
    assert [replace(t.proposal, weights_of=None) for t in runs[0].history.trials] == [
        t.proposal for t in runs[1].history.trials
    ]
    # Another budget is another training: nothing is a copy.
    assert all(trial.copy_of is None for trial in runs[1].history.trials)


@pytest.mark.parametrize("kind", KINDS)
def test_failed_trials_do_not_climb_and_refused_ones_take_no_place(kind):
    landscape = trade_off(limit=0.45)
    strategy = kind(min_budget=1 / 9)
    run = drive(strategy, landscape, 120, in_flight=3, fails=lambda n: n % 4 == 0, cheap=("cost",))
    sources = {t.proposal.weights_of for t in run.history.trials if t.proposal.weights_of is not None}
    assert sources and all(run.history.trials[number].state == "complete" for number in sources)
    assert any(trial.state == "infeasible" for trial in run.history.trials)
    # Each newcomer that a limit refused has been replaced.
    trained = [t for t in on(run, 0) if t.state != "infeasible"]
    if kind is not AsyncSuccessiveHalving:
        assert len(trained) == {SuccessiveHalving: 27, Hyperband: 9}[kind]


def test_several_objectives_climb_by_rank_then_crowding():
    strategy = SuccessiveHalving(min_budget=1 / 3, candidates=12)
    run = drive(strategy, trade_off(limit=None), 16)
    low = on(run, 0)
    assert len(low) == 12
    standing = run.history.standing(low)
    best = sorted(range(12), key=lambda index: (standing[index], index))[:4]
    assert [trial.architecture for trial in on(run, 1)] == [low[index].architecture for index in best]
    assert len({standing[index][0] for index in range(12)}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_exhausted_space_ends_with_a_full_training(kind):
    run = drive(kind(min_budget=1 / 27), tiny(), 300, in_flight=2)
    assert run.asked[-1][2] is None
    assert run.history.distinct == 16
    assert run.history.best() is not None


@dataclass(frozen=True)
class Watching:
    """Random search that checks what it is shown."""

    choices: int = 10

    def propose(self, history, rng):
        assert all(trial.full for trial in history.trials)
        assert [trial.number for trial in history.trials] == list(range(len(history)))
        assert not any("rung" in trial.proposal.notes for trial in history.trials)
        return RandomSearch().propose(history, rng)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [Watching(), RegularizedEvolution(population=5, sample=2)])
def test_newcomers_are_drawn_by_another_strategy(kind, inner):
    run = drive(kind(min_budget=1 / 9, newcomers=inner), short_training(one_max()), 70, in_flight=3)
    assert sum("by" in trial.proposal.notes for trial in on(run, 0)) >= 9
    firsts = [trial for trial in run.history.trials if trial.proposal.weights_of is None]
    assert len({trial.architecture for trial in firsts}) == len(firsts)


def test_newcomers_learn_from_the_highest_budget_with_results_enough():
    """Falkner et al. 2018, section 3.2: the model is of the largest budget that has more results than dimensions."""
    strategy = AsyncSuccessiveHalving(min_budget=1 / 9, newcomers=RegularizedEvolution(population=5, sample=2))
    run = drive(strategy, short_training(one_max(length=4)), 120)
    shown = [t.proposal.notes.get("by") for t in run.history.trials if t.proposal.notes["rung"] == 0]
    assert [name for name in dict.fromkeys(shown) if name] == ["budget 0.111111", "budget 0.333333", "budget 1"]
    for event, number, proposal in run.asked:
        if proposal.notes["rung"] == 0 and "by" in proposal.notes:
            scored = replay(short_training(one_max(length=4)), run.events[:event]).history.scored()
            counts = {b: sum(t.proposal.budget == b for t in scored) for b in strategy.budgets}
            enough = [budget for budget, count in counts.items() if count >= 5]
            assert proposal.notes["by"] == f"budget {max(enough, default=1 / 9):.6g}", number


def test_newcomers_must_evaluate():
    @dataclass(frozen=True)
    class Explores:
        def propose(self, history, rng):
            return Explore(None)

    with pytest.raises(InvalidInputError, match="must evaluate"):
        Hyperband(newcomers=Explores()).propose(one_max().history(), trial_rng(0, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"min_budget": 0.0},
        {"min_budget": 1.1},
        {"eta": 1},
        {"eta": 2.5},
        {"carry": 1},
        {"newcomers": "optuna"},
        {"newcomers": RandomSearch},
    ],
)
def test_refuses(kind, arguments):
    with pytest.raises(InvalidInputError):
        kind(**arguments)


def study(folder, strategy, **changes):
    return Study(
        space=TinyCell(),
        strategy=strategy,
        task=Task.digits(epochs=4, limit=80),
        objectives=changes.pop("objectives", None) or [maximise("val_accuracy")],
        folder=folder,
        tracker=None,
        progress=False,
        **changes,
    )


def trials_of(result):
    left_out = ("train_seconds", "measure_seconds")
    return [
        (t.proposal, t.state, {n: v for n, v in t.metrics.items() if n not in left_out}, len(t.reports))
        for t in result.history.trials
    ]


class TestInAStudy:
    def test_trained_from_rung_to_rung_is_trained_in_one_go(self, tmp_path):
        """The same epochs and the same metrics, to the last bit."""
        strategy = SuccessiveHalving(min_budget=1 / 4, eta=2, candidates=1)
        rungs = study(tmp_path / "rungs", strategy).run(max_trials=3).history.trials
        assert [trial.proposal.budget for trial in rungs] == [0.25, 0.5, 1.0]
        assert [trial.proposal.weights_of for trial in rungs] == [None, 0, 1]
        assert [trial.full for trial in rungs] == [False, False, True]
        (whole,) = study(tmp_path / "whole", RandomSearch()).run(max_trials=1).history.trials
        assert whole.architecture == rungs[0].architecture
        assert [report for trial in rungs for report in trial.reports] == list(whole.reports)
        assert rungs[-1].metrics["val_accuracy"] == whole.metrics["val_accuracy"]

    def test_resumed_is_uninterrupted(self, tmp_path):
        strategy = Hyperband(min_budget=1 / 4, eta=2, newcomers=RegularizedEvolution(population=3, sample=2))
        whole = study(tmp_path / "whole", strategy).run(max_trials=9)
        study(tmp_path / "parts", strategy).run(max_trials=5)
        parts = study(tmp_path / "parts", strategy).run(max_trials=9)
        assert trials_of(parts) == trials_of(whole)

    def test_a_low_rung_and_a_full_training_are_no_twins(self, tmp_path):
        """An enqueued full training is not copied into a rung, nor a rung into it."""
        strategy = SuccessiveHalving(min_budget=1 / 2, eta=2, candidates=2, brackets=1, carry=False)
        made = study(tmp_path, strategy)
        first = made.run(max_trials=1).history.trials[0]
        made.enqueue(first.architecture)
        history = made.run(max_trials=5).history
        same = history.of(first.architecture)
        assert [trial.proposal.budget for trial in same[:2]] == [0.5, 1.0]
        assert [trial.copy_of for trial in same[:2]] == [None, None]
        if len(same) == 3:  # it climbed: its full training has been done already
            assert same[2].copy_of == same[1].number

    def test_tables_are_asked_for_each_budget(self, tmp_path):
        asked = []

        def look_up(architecture, budget, seed):
            asked.append(budget)
            return {"value": budget + int(architecture.id, 16) % 7, "cost": 1.0}

        made = Study(
            space=TinyCell(),
            strategy=AsyncSuccessiveHalving(min_budget=1 / 9, carry=False),
            task=Task.from_function(look_up),
            objectives=[maximise("value")],
            constraints=[at_most("cost", 2.0)],
            folder=tmp_path,
            tracker=None,
            progress=False,
        )
        made.run(max_trials=40)
        assert sorted(set(asked)) == pytest.approx([1 / 9, 1 / 3, 1.0])


def test_a_strategy_in_a_strategy_is_described_by_its_fields():
    from nasplat.identity import canonical, describe

    bohb = Hyperband(newcomers=OptunaSearch("tpe", {"n_startup_trials": 4}))
    other = Hyperband(newcomers=OptunaSearch("tpe", {"n_startup_trials": 5}))
    assert canonical(describe(bohb)) != canonical(describe(other))
    assert json.loads(canonical(describe(bohb)))["fields"]["newcomers"]["fields"]["sampler"] == "tpe"
    assert isinstance(bohb.propose(one_max().history(), trial_rng(0, 0)), Evaluate)
