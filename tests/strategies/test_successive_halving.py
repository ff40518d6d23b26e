import pytest

from nasplat.errors import InvalidInputError
from nasplat.testing.drive import drive
from nasplat.testing.landscapes import one_max, short_training
from nasplat.testing.strategy_contract import StrategyContract
from strategies.successive_halving import SuccessiveHalving


class TestSuccessiveHalvingContract(StrategyContract):
    evaluations = 12

    @pytest.fixture
    def strategy(self):
        return SuccessiveHalving(min_budget=1 / 9, candidates=9)


def marks(run):
    return [(t.proposal.notes["bracket"], t.proposal.notes["rung"]) for t in run.history.trials]


def test_a_bracket_keeps_one_in_eta_on_each_rung():
    run = drive(SuccessiveHalving(), short_training(one_max()), 40)
    assert marks(run) == [(0, 0)] * 27 + [(0, 1)] * 9 + [(0, 2)] * 3 + [(0, 3)]
    for rung, count in enumerate((9, 3, 1)):
        low, high = ([t for t in run.history.trials if t.proposal.notes["rung"] == r] for r in (rung, rung + 1))
        best = sorted(low, key=lambda t: (-t.metrics["value"], t.number))[:count]
        assert [t.proposal.weights_of for t in high] == [t.number for t in best]


def test_costs_what_its_docstring_says():
    run = drive(SuccessiveHalving(), one_max(), 40)
    budgets = [t.proposal.budget for t in run.history.trials]
    assert sum(budgets) == pytest.approx(4)
    before = [0 if (s := t.proposal.weights_of) is None else budgets[s] for t in run.history.trials]
    assert sum(budgets) - sum(before) == pytest.approx(3)


def test_the_next_bracket_begins_when_one_is_done_or_waits():
    run = drive(SuccessiveHalving(min_budget=1 / 3, candidates=3), one_max(), 12)
    assert marks(run) == [(b, r) for b in range(3) for r in (0, 0, 0, 1)]
    run = drive(SuccessiveHalving(min_budget=1 / 3, candidates=3), one_max(), 5, in_flight=5)
    assert marks(run) == [(0, 0)] * 3 + [(1, 0)] * 2


def test_ends_after_so_many_brackets():
    run = drive(SuccessiveHalving(min_budget=1 / 3, candidates=3, brackets=2), one_max(), 100, in_flight=2)
    assert len(run.history) == 8 and run.asked[-1][2] is None


def test_where_few_were_scored_fewer_climb():
    run = drive(SuccessiveHalving(min_budget=1 / 3, candidates=9, brackets=1), one_max(), 30, fails=lambda n: n < 8)
    assert marks(run) == [(0, 0)] * 9 + [(0, 1)]
    run = drive(SuccessiveHalving(min_budget=1 / 3, candidates=9, brackets=1), one_max(), 30, fails=lambda n: n < 9)
    assert marks(run) == [(0, 0)] * 9


def test_fewer_candidates_than_eta_still_give_a_result():
    run = drive(SuccessiveHalving(min_budget=1 / 9, candidates=2, brackets=1), one_max(), 30)
    assert [t.proposal.budget for t in run.history.trials] == pytest.approx([1 / 9, 1 / 9, 1 / 3, 1])


@pytest.mark.parametrize("arguments", [{"candidates": 0}, {"brackets": 0}, {"brackets": 1.5}])
def test_refuses(arguments):
    with pytest.raises(InvalidInputError):
        SuccessiveHalving(**arguments)
