import pytest

from nasplat.space import space_from
from nasplat.testing.drive import drive, trial_rng
from nasplat.testing.landscapes import Landscape, one_max, one_max_edges, tiny
from nasplat.testing.strategy_contract import StrategyContract
from strategies import RandomSearch


class TestRandomSearchContract(StrategyContract):
    beats_random = False

    @pytest.fixture
    def strategy(self):
        return RandomSearch()


@pytest.mark.parametrize("in_flight", [1, 4])
def test_proposes_every_architecture_of_a_small_space_once(in_flight):
    run = drive(RandomSearch(), tiny(), 1000, in_flight=in_flight)
    assert len(run.history) == run.history.distinct == tiny().space.size()


def test_groups_are_exhausted_too():
    landscape = one_max_edges(nodes=1)
    run = drive(RandomSearch(), landscape, 1000)
    assert {trial.architecture for trial in run.history.trials} == set(landscape.space.enumerate())


def test_ends_where_is_valid_makes_the_size_an_upper_bound():
    class OnlyEven(type(tiny().space)):
        def is_valid(self, genes):
            return sum(genes.values()) % 2 == 0

    run = drive(RandomSearch(), Landscape(OnlyEven(2, 4), tiny().score), 1000)
    assert len(run.history) == 8


def test_draws_evenly():
    landscape = Landscape(space_from(lambda genes: None, {"a": (0, 1, 2, 3)}), lambda architecture: {"value": 0.0})
    first = [RandomSearch().propose(landscape.history(), trial_rng(seed, 0)).architecture for seed in range(400)]
    counts = [sum(architecture.genes["a"] == option for architecture in first) for option in range(4)]
    # Binomial(400, 1/4): five standard deviations either side.
    assert all(57 < count < 143 for count in counts)


def test_nothing_in_a_large_space_is_drawn_twice():
    run = drive(RandomSearch(), one_max(), 300)
    assert run.history.distinct == 300
