import pytest
from scipy.stats import wilcoxon

from nasplat.testing.drive import drive
from nasplat.testing.landscapes import Landscape, Levels, one_max, short_training
from nasplat.testing.strategy_contract import StrategyContract
from strategies import RandomSearch
from strategies.asha import AsyncSuccessiveHalving


class TestAshaContract(StrategyContract):
    evaluations = 10

    @pytest.fixture
    def strategy(self):
        return AsyncSuccessiveHalving(min_budget=1 / 9)


def rungs(run):
    return [trial.proposal.notes["rung"] for trial in run.history.trials]


def test_promotes_as_soon_as_one_in_eta_is_known():
    met = {}
    # The earlier drawn, the better, so that who is promoted stays among the best.
    landscape = Landscape(Levels(10, 4), lambda a: {"value": -met.setdefault(a, len(met))})
    run = drive(AsyncSuccessiveHalving(min_budget=1 / 9), landscape, 14)
    assert rungs(run) == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 2, 0]
    assert [t.proposal.weights_of for t in run.history.trials if t.proposal.notes["rung"]] == [0, 1, 2, 3]


def test_promotions_are_among_the_best_of_their_rung_when_made():
    strategy = AsyncSuccessiveHalving(min_budget=1 / 9)
    run = drive(strategy, short_training(one_max()), 90, in_flight=5)
    for event, number, proposal in run.asked:
        rung = proposal.notes["rung"]
        ended = {what for kind, what, _ in run.events[:event] if kind == "finish"}
        below = [t for t in run.history.trials if t.number in ended and t.proposal.notes["rung"] == rung - 1]
        if rung:
            best = sorted(below, key=lambda t: (-t.metrics["value"], t.number))[: len(below) // 3]
            assert proposal.weights_of in [t.number for t in best], number
        else:
            # A newcomer only where no rung has a promotion.
            for level in (0, 1):
                low = [t for t in run.history.trials if t.number in ended and t.proposal.notes["rung"] == level]
                best = sorted(low, key=lambda t: (-t.metrics["value"], t.number))[: len(low) // 3]
                above = {t.proposal.weights_of for t in run.history.trials[:number]}
                assert all(t.number in above for t in best), number


@pytest.mark.parametrize("in_flight", [1, 16])
def test_never_waits(in_flight):
    run = drive(AsyncSuccessiveHalving(), one_max(), 200, in_flight=in_flight)
    assert all(proposal is not None for _, _, proposal in run.asked)
    assert len(run.history) == 200
    assert run.history.best() is not None


def test_a_failed_trial_counts_as_ended():
    run = drive(AsyncSuccessiveHalving(min_budget=1 / 3), one_max(), 4, fails=lambda n: n in (0, 2))
    assert rungs(run) == [0, 0, 0, 1]
    assert run.history.trials[3].proposal.weights_of == 1


def test_beats_random_search_where_short_trainings_mislead():
    landscape = short_training(one_max())
    ours = [drive(AsyncSuccessiveHalving(min_budget=1 / 9), landscape, 150, seed=seed) for seed in range(12)]
    costs = [
        sum(
            t.proposal.budget - (0 if (s := t.proposal.weights_of) is None else run.history.trials[s].proposal.budget)
            for t in run.history.trials
        )
        for run in ours
    ]
    random = [drive(RandomSearch(), landscape, round(cost), seed=seed).best() for seed, cost in enumerate(costs)]
    assert wilcoxon([run.best() for run in ours], random, alternative="less").pvalue < 1e-2
