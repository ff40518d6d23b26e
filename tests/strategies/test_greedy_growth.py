from dataclasses import dataclass, replace

import pytest

from nasplat.errors import CandidateError, InvalidInputError
from nasplat.objectives import at_most, maximise, minimise
from nasplat.space import SearchSpace
from nasplat.strategy import Trial
from nasplat.testing.drive import drive
from nasplat.testing.landscapes import Landscape, Levels, one_max, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies.greedy_growth import GreedyGrowth


class TestGreedyGrowthContract(StrategyContract):
    beats_random = False

    @pytest.fixture
    def strategy(self):
        return GreedyGrowth(budget=0.5, cost=None)


class TestGainPerCostContract(StrategyContract):
    beats_random = False

    @pytest.fixture
    def strategy(self):
        return GreedyGrowth(cost="cost", budget=1.0, rounds=4)

    @pytest.fixture(params=["limit", "no limit"])
    def landscape(self, request):
        return trade_off() if request.param == "limit" else trade_off(limit=None)

    @pytest.mark.parametrize("in_flight", [1, 4, 16])
    def test_ends_on_an_exhausted_space(self, strategy, in_flight):
        """As in the contract, on a landscape that has a cost."""
        run = drive(strategy, trade_off(length=2), 300, in_flight=in_flight)
        assert run.asked[-1][2] is None


@dataclass(frozen=True)
class Growing(SearchSpace):
    """Levels that growth moves one up at a time, from all zero."""

    length: int = 3
    levels: int = 4

    @property
    def choices(self):
        return {f"x{index}": tuple(range(self.levels)) for index in range(self.length)}

    def build(self, architecture):
        raise NotImplementedError

    def start(self):
        return self.at()

    def at(self, *levels):
        return self.architecture(dict(zip(self.choices, (*levels, *[0] * self.length), strict=False)))

    def growth(self, architecture):
        genes = architecture.genes
        return [
            self.architecture({**genes, name: level + 1}) for name, level in genes.items() if level + 1 < self.levels
        ]


SPACE = Growing()


def landscape(score, *objectives, constraints=()):
    """Scored by a function of the three levels."""
    return Landscape(SPACE, lambda a: score(*a.genes.values()), objectives or (maximise("value"),), tuple(constraints))


def levels(trial):
    return tuple(trial.architecture.genes.values())


def ends(run):
    """The networks that were trained in full at the end of growth."""
    return [levels(trial) for trial in run.history.trials if trial.proposal.notes.get("final")]


def by_hand(score, cost):
    """The rule, written down a second time: the networks that growth passes through."""
    passed = [SPACE.start()]
    while True:
        here = score(*passed[-1].genes.values())
        ratios = []
        for move in SPACE.growth(passed[-1]):
            there = score(*move.genes.values())
            gain, more = there["value"] - here["value"], there[cost] - here[cost]
            ratios.append((gain / more if more > 0 else float("inf")) if gain > 0 else -1.0)
        if not ratios or max(ratios) < 0:
            return [tuple(a.genes.values()) for a in passed]
        passed.append(SPACE.growth(passed[-1])[ratios.index(max(ratios))])


def bumpy(a, b, c):
    value = (2 * a - 0.5 * a**2) + 3 * min(b, 1) + (1.2 * c if b else -0.1 * c)
    return {"value": value, "ops": 1.0 + a + 5 * b + 2 * c}


@pytest.mark.parametrize("in_flight", [1, 4, 16])
def test_takes_the_best_gain_per_cost_until_none_gains(in_flight):
    passed = by_hand(bumpy, "ops")
    assert len(passed) > 5
    run = drive(GreedyGrowth(budget=0.5), landscape(bumpy), 200, in_flight=in_flight)
    trials = run.history.trials
    # Each network that growth passed through, and all its moves, once; then the last in full.
    wanted = {SPACE.at(*at).id for at in passed}
    wanted |= {move.id for at in passed for move in SPACE.growth(SPACE.at(*at))}
    assert [trial.architecture.id for trial in trials[:-1]] == list(
        dict.fromkeys(trial.architecture.id for trial in trials[:-1])
    )
    assert {trial.architecture.id for trial in trials[:-1]} == wanted
    assert {trial.proposal.budget for trial in trials[:-1]} == {0.5}
    assert levels(trials[-1]) == passed[-1]
    assert trials[-1].proposal.budget == 1.0
    assert trials[-1].proposal.notes["final"]
    assert trials[-1].full


def test_cost_decides_between_gains():
    def score(a, b, c):
        return {"value": 1.0 * a + 2.0 * b, "ops": 1 + a + 4 * b}

    # a gains half of what b gains, for a quarter of the cost.
    one = GreedyGrowth(budget=0.5, rounds=1)
    assert ends(drive(one, landscape(score), 50)) == [(1, 0, 0)]
    assert ends(drive(replace(one, cost=None), landscape(score), 50)) == [(0, 1, 0)]


def test_a_gain_that_costs_nothing_beats_all_others_and_the_greatest_of_those_wins():
    def score(a, b, c):
        return {"value": 5 * a + 0.1 * b + 0.2 * c, "ops": 10 + a - b - 0 * c}

    assert ends(drive(GreedyGrowth(budget=0.5, rounds=1), landscape(score), 50)) == [(0, 0, 1)]


def test_ties_go_to_the_first():
    run = drive(
        GreedyGrowth(budget=0.5, rounds=1), landscape(lambda *x: {"value": sum(x), "ops": 1 + sum(x)}), 50, in_flight=4
    )
    assert ends(run) == [(1, 0, 0)]


def test_minimised_objective():
    hills = landscape(lambda a, b, c: {"loss": (a - 2) ** 2 + b}, minimise("loss"))
    run = drive(GreedyGrowth(cost=None, budget=0.5), hills, 50)
    assert ends(run) == [(2, 0, 0)]


def test_waits_for_the_round_to_end():
    history = landscape(bumpy).history()
    strategy = GreedyGrowth(budget=0.5)
    started = []
    while (proposal := strategy.propose(history, None)) is not None:
        started.append(proposal)
        history.start(_trial(history, proposal))
    # The start and its three moves, none of which is known yet.
    assert [tuple(p.architecture.genes.values()) for p in started] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for trial in history.running[:3]:
        history.finish(trial.number, state="complete", metrics=bumpy(*levels(trial)))
        assert strategy.propose(history, None) is None
    history.finish(3, state="failed", reason="as asked")
    assert tuple(strategy.propose(history, None).architecture.genes.values()) == (2, 0, 0)


def _trial(history, proposal):
    return Trial(len(history), proposal)


def test_moves_known_from_an_earlier_round_are_not_proposed_again():
    run = drive(GreedyGrowth(budget=1.0), landscape(bumpy), 200)
    proposed = [levels(trial) for trial in run.history.trials]
    assert len(set(proposed)) == len(proposed)
    # With the whole budget for each move, the last network needs no further training.
    assert not ends(run)


def test_another_training_of_a_network_judges_nothing():
    full = GreedyGrowth(budget=1.0, rounds=1)
    run = drive(full, landscape(bumpy), 200)
    before = len(run.history)
    drive(GreedyGrowth(budget=0.5, rounds=1), landscape(bumpy), 200, run=run)
    assert [t.proposal.budget for t in run.history.trials[before:]] == [0.5] * 4


@pytest.mark.parametrize("constraint", [at_most("ops", 4.0), at_most("late", 4.0)])
def test_a_network_that_breaks_a_limit_is_never_kept(constraint):
    def score(a, b, c):
        return {"value": a + b + c, "ops": 1 + a + b + c, "late": 1 + a + b + c}

    run = drive(GreedyGrowth(budget=0.5), landscape(score, constraints=[constraint]), 200, cheap=("ops",))
    assert ends(run) == [(3, 0, 0)]


def test_failed_moves_are_never_kept_and_a_failed_start_is_grown_out_of():
    def score(a, b, c):
        if a == b == c == 0 or c == 1:
            raise CandidateError("as asked")
        return {"value": a + b + 10 * c, "ops": 1 + a + b}

    run = drive(GreedyGrowth(budget=0.5, rounds=2), landscape(score), 200)
    assert ends(run) == [(2, 0, 0)]
    # Where nothing works there is nothing to train in full.
    run = drive(GreedyGrowth(budget=0.5), landscape(bumpy), 200, fails=lambda number: True)
    assert len(run.history) == 4


def test_start():
    given = SPACE.at(1, 1, 1)
    run = drive(GreedyGrowth(budget=0.5, start=given, rounds=0), landscape(bumpy), 10)
    assert [(levels(trial), trial.proposal.budget) for trial in run.history.trials] == [((1, 1, 1), 1.0)]
    with pytest.raises(InvalidInputError, match="start is an architecture of Levels"):
        drive(GreedyGrowth(budget=0.5, start=Levels(2, 2).architecture({"x0": 0, "x1": 0})), landscape(bumpy), 10)
    # Levels has no start of its own: one is drawn, once.
    run = drive(GreedyGrowth(budget=0.5, cost=None), one_max(length=5), 300)
    assert [trial.number for trial in run.history.trials if trial.proposal.notes.get("start")] == [0]
    assert run.history.trials[-1].metrics == {"value": 1.0}


def test_says_which_metrics_can_be_a_cost():
    with pytest.raises(InvalidInputError, match=r"cost is 'params', which trial 0 does not have; legal: None, ops"):
        drive(GreedyGrowth(budget=0.5, cost="params"), landscape(bumpy), 10)


def test_says_so_before_a_round_is_trained():
    history = landscape(bumpy).history()
    strategy = GreedyGrowth(budget=0.5, cost="params")
    history.start(_trial(history, strategy.propose(history, None)))
    history.finish(0, state="complete", metrics=bumpy(0, 0, 0))
    with pytest.raises(InvalidInputError, match="trial 0 does not have"):
        strategy.propose(history, None)


def test_an_attribute_start_that_is_no_method_is_left_alone():
    class Numbered(Levels):
        start = 3

    run = drive(
        GreedyGrowth(budget=0.5, cost=None), Landscape(Numbered(3, 2), lambda a: {"value": sum(a.genes.values())}), 50
    )
    assert run.history.trials[0].proposal.notes["start"]
    assert run.history.trials[-1].metrics == {"value": 3}


@pytest.mark.parametrize(
    "arguments",
    [
        {"budget": -0.1},
        {"budget": 1.5},
        {"budget": float("nan")},
        {"budget": "a"},
        {"rounds": -1},
        {"rounds": 1.5},
        {"start": 5},
        {"cost": 5},
    ],
)
def test_refuses(arguments):
    with pytest.raises(InvalidInputError):
        GreedyGrowth(**arguments)
