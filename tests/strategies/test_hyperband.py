import pytest

from nasplat.testing.drive import drive
from nasplat.testing.landscapes import one_max, short_training
from nasplat.testing.strategy_contract import StrategyContract
from strategies import OptunaSearch, RegularizedEvolution
from strategies.hyperband import Hyperband


class TestHyperbandContract(StrategyContract):
    evaluations = 15

    @pytest.fixture
    def strategy(self):
        return Hyperband(min_budget=1 / 9)


@pytest.mark.slow
class TestWithEvolutionContract(StrategyContract):
    evaluations = 30

    @pytest.fixture
    def strategy(self):
        return Hyperband(min_budget=1 / 9, newcomers=RegularizedEvolution(population=8, sample=3))


@pytest.mark.slow
class TestBohbContract(StrategyContract):
    evaluations = 30

    @pytest.fixture
    def strategy(self):
        return Hyperband(min_budget=1 / 9, newcomers=OptunaSearch("tpe", {"n_startup_trials": 6}))


def test_the_brackets_are_those_of_the_paper():
    """Li et al. 2018, table 1: R = 81, eta = 3."""
    table = [(81, 1), (34, 3), (15, 9), (8, 27), (5, 81)]
    assert [(size, round(81 * budgets[0])) for size, budgets in Hyperband(min_budget=1 / 81).plan] == table


def test_each_bracket_of_a_round_in_turn():
    run = drive(Hyperband(min_budget=1 / 9), short_training(one_max()), 2 * 22)
    per_bracket = [
        [t.proposal.budget for t in run.history.trials if t.proposal.notes["bracket"] == bracket]
        for bracket in range(6)
    ]
    one_round = [[1 / 9] * 9 + [1 / 3] * 3 + [1.0], [1 / 3] * 5 + [1.0], [1.0] * 3]
    assert per_bracket == [pytest.approx(budgets) for budgets in one_round * 2]


def test_hyperband_with_tpe_ends_better_than_hyperband():
    """BOHB's claim, on a landscape whose short trainings mislead."""
    landscape = short_training(one_max(length=12))
    newcomers = OptunaSearch("tpe", {"n_startup_trials": 8})
    better = 0
    for seed in range(4):
        plain, guided = (
            drive(Hyperband(min_budget=1 / 9, newcomers=inner), landscape, 100, seed=seed).best()
            for inner in (None, newcomers)
        )
        better += guided < plain
    assert better >= 3
