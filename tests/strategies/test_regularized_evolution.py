import numpy as np
import pytest

from nasplat.errors import InvalidInputError
from nasplat.objectives import at_most, maximise, minimise
from nasplat.strategy import Evaluate, History, Trial
from nasplat.testing.drive import drive, trial_rng
from nasplat.testing.landscapes import Levels, one_max, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies import RandomSearch, RegularizedEvolution


class TestRegularizedEvolutionContract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return RegularizedEvolution(population=8, sample=3)


class TestWithCrossoverContract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return RegularizedEvolution(population=8, sample=3, crossover=0.5)


def distance(a, b):
    return sum(a.genes[name] != b.genes[name] for name in a.genes)


def scored(history, genes, **metrics):
    number = len(history)
    history.start(Trial(number, Evaluate(history.space.architecture(dict(genes)))))
    history.finish(number, state="complete", metrics=metrics)
    return number


def parents(strategy, history, draws=200):
    """Which trials become parents, over many generators."""
    found = [strategy.propose(history, trial_rng(seed, 0)).notes["parents"][0] for seed in range(draws)]
    return {number: found.count(number) for number in set(found)}


SPACE = Levels(length=6, levels=4)


def genes(*levels):
    return {f"x{index}": level for index, level in enumerate((*levels, *[0] * 6)[:6])}


def test_starts_at_random_then_mutates_a_recent_trial_by_one_gene():
    run = drive(RegularizedEvolution(population=10, sample=3), one_max(), 40)
    trials = run.history.trials
    assert all("parents" not in trial.proposal.notes for trial in trials[:10])
    mutants = [trial for trial in trials[10:] if "parents" in trial.proposal.notes]
    assert len(mutants) > 25
    for trial in mutants:
        (parent,) = trial.proposal.notes["parents"]
        assert distance(trial.architecture, trials[parent].architecture) == 1
        assert trial.number - 10 <= parent < trial.number


def test_the_best_of_the_sample_wins():
    history = History(SPACE, [maximise("value")])
    for level, value in enumerate((0.1, 0.9, 0.5)):
        scored(history, genes(level), value=value)
    # All three are in nearly every sample of 30 with replacement.
    assert set(parents(RegularizedEvolution(population=3, sample=30), history)) == {1}
    # A sample of one is no selection.
    assert set(parents(RegularizedEvolution(population=3, sample=1), history)) == {0, 1, 2}


def test_sample_is_drawn_with_replacement():
    history = History(SPACE, [maximise("value")])
    scored(history, genes(0), value=0.0)
    scored(history, genes(1), value=1.0)
    counts = parents(RegularizedEvolution(population=2, sample=2), history, draws=400)
    # Without replacement the worse would never win; with it, it is both draws in a quarter of the samples.
    assert 50 < counts[0] < 150


def test_the_oldest_dies_however_good():
    history = History(SPACE, [maximise("value")])
    scored(history, genes(0), value=1.0)
    for level in (1, 2, 3):
        scored(history, genes(level), value=0.1 * level)
    assert 0 not in parents(RegularizedEvolution(population=3, sample=30), history)


def test_minimised_objective():
    history = History(SPACE, [minimise("cost")])
    for level, cost in enumerate((3.0, 1.0, 2.0)):
        scored(history, genes(level), cost=cost)
    assert set(parents(RegularizedEvolution(population=3, sample=30), history)) == {1}


def test_feasible_beats_infeasible_then_the_smaller_violation():
    history = History(SPACE, [maximise("value")], [at_most("cost", 1.0)])
    scored(history, genes(0), value=0.9, cost=3.0)
    scored(history, genes(1), value=0.5, cost=2.0)
    strategy = RegularizedEvolution(population=2, sample=30)
    assert set(parents(strategy, history)) == {1}
    scored(history, genes(2), value=0.1, cost=1.0)
    assert set(parents(RegularizedEvolution(population=3, sample=30), history)) == {2}


def test_non_dominated_win_with_several_objectives_ties_at_random():
    history = History(SPACE, [maximise("value"), minimise("cost")])
    for level, (value, cost) in enumerate([(0.9, 3.0), (0.5, 1.0), (0.4, 2.0)]):
        scored(history, genes(level), value=value, cost=cost)
    counts = parents(RegularizedEvolution(population=3, sample=60), history)
    assert set(counts) == {0, 1}
    assert min(counts.values()) > 60


def test_failed_trials_are_in_no_tournament():
    run = drive(RegularizedEvolution(population=5, sample=2), one_max(), 60, fails=lambda n: n % 2 == 0, in_flight=4)
    for trial in run.history.trials:
        for parent in trial.proposal.notes.get("parents", ()):
            assert run.history.trials[parent].state == "complete"


def test_climbs_towards_limits_that_everything_breaks():
    landscape = trade_off(length=12, limit=0.2)
    run = drive(RegularizedEvolution(population=10, sample=5), landscape, 80, cheap=("cost",))
    violations = [run.history.violation(trial) for trial in run.history.trials]
    assert np.mean(violations[60:]) < 0.5 * np.mean(violations[:10])
    random = drive(RandomSearch(), landscape, 80, cheap=("cost",)).history
    assert min(violations) < min(random.violation(trial) for trial in random.trials)


def test_crossover_has_two_parents():
    run = drive(RegularizedEvolution(population=10, sample=3, crossover=1.0), one_max(), 40)
    crossed = [t for t in run.history.trials if len(t.proposal.notes.get("parents", ())) == 2]
    assert len(crossed) > 20
    for trial in crossed:
        a, b = (run.history.trials[number].architecture for number in trial.proposal.notes["parents"])
        other = [n for n, gene in trial.architecture.genes.items() if gene not in (a.genes[n], b.genes[n])]
        assert len(other) <= 1


def test_looks_at_the_latest_trials_only():
    """The proposal must not slow down with the history: nothing but the last ``population`` is asked for."""

    class Counting(History):
        looked_at = 0

        def scored(self, last=None):
            assert last is not None
            trials = super().scored(last)
            self.looked_at += len(trials)
            return trials

        @property
        def trials(self):
            raise AssertionError("went through all trials")

    run = drive(RegularizedEvolution(), one_max(), 100)
    history = Counting(run.history.space, run.history.objectives)
    for kind, what, outcome in run.events:
        history.start(what) if kind == "start" else history.finish(what, **outcome)
    RegularizedEvolution().propose(history, trial_rng(0, 100))
    assert history.looked_at == 20


@pytest.mark.parametrize(
    "arguments", [{"population": 0}, {"sample": 0}, {"crossover": 1.5}, {"crossover": float("nan")}]
)
def test_refuses(arguments):
    with pytest.raises(InvalidInputError):
        RegularizedEvolution(**arguments)
