from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import wilcoxon

from nasplat.errors import InvalidInputError
from nasplat.objectives import at_most, maximise, minimise
from nasplat.strategy import Evaluate, History, Trial
from nasplat.testing.drive import drive, trial_rng
from nasplat.testing.landscapes import Levels, one_max, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies import RandomSearch
from strategies.nsga2 import Nsga2, _winner


class TestNsga2Contract(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return Nsga2(population=8)


SPACE = Levels(length=6, levels=4)


def trial(history, level, state="complete", **metrics):
    number = len(history)
    genes = {f"x{index}": (level // 4**index) % 4 for index in range(6)}
    history.start(Trial(number, Evaluate(history.space.architecture(genes))))
    history.finish(number, state=state, metrics=metrics)
    return number


def parents(history, population):
    return [member.number for _, member in Nsga2(population)._parents(history)[1]]


def test_generations_are_blocks_of_results_in_the_order_of_ending():
    run = drive(Nsga2(population=6), trade_off(), 60, in_flight=4, fails=lambda number: number % 5 == 0)
    for event, _, proposal in run.asked:
        ended = sum(kind == "finish" and what["state"] == "complete" for kind, _, what in run.events[:event])
        assert proposal.notes["generation"] == ended // 6
    assert all("parents" not in t.proposal.notes for t in run.history.trials if t.proposal.notes["generation"] == 0)
    bred = [t for t in run.history.trials if "parents" in t.proposal.notes]
    assert len(bred) > 30
    for child in bred:
        for number in child.proposal.notes["parents"]:
            assert run.history.trials[number].state == "complete"


def test_survivors_are_the_best_of_parents_and_children():
    history = History(SPACE, [maximise("value")])
    for level, value in enumerate((0.1, 0.9, 0.5)):
        trial(history, level, value=value)
    assert parents(history, 3) == [1, 2, 0]
    for level, value in enumerate((0.2, 0.95, 0.3), 3):
        trial(history, level, value=value)
    assert parents(history, 3) == [4, 1, 2]  # the old 0.9 and 0.5 stay: nothing dies of age


def test_survivors_of_a_rank_that_does_not_fit_are_the_least_crowded():
    history = History(SPACE, [minimise("a"), minimise("b")])
    # A front of four, of which the third is the most crowded, and one behind it.
    for level, (a, b) in enumerate([(0, 10), (4, 4), (5, 3), (10, 0)]):
        trial(history, level, a=float(a), b=float(b))
    assert set(parents(history, 2)) == {0, 3}
    assert set(parents(history, 4)) == {0, 1, 2, 3}
    history = History(SPACE, [minimise("a"), minimise("b")])
    for level, (a, b) in enumerate([(0, 10), (4, 4), (5, 3), (5, 10), (10, 0), (10, 10)]):
        trial(history, level, a=float(a), b=float(b))
    # Distances: (4, 4) 0.5 + 0.7, (5, 3) 0.6 + 0.4; the dominated two are out.
    assert set(parents(history, 3)) == {0, 1, 4}


def test_refused_trials_are_members_by_their_violation():
    history = History(SPACE, [maximise("value")], [at_most("cost", 1.0)])
    trial(history, 0, "infeasible", cost=3.0)
    trial(history, 1, value=0.1, cost=1.0)
    trial(history, 2, "infeasible", cost=2.0)
    trial(history, 3, value=0.9, cost=1.5)
    trial(history, 4, "failed")
    assert parents(history, 4) == [1, 3, 2, 0]


def test_the_better_of_two_wins_the_tournament():
    members = [((0, -float("inf")), "a"), ((0, -1.0), "b"), ((1, -float("inf")), "c")]
    wins = [_winner(members, trial_rng(seed, 0)) for seed in range(300)]
    assert set(wins) == {"a", "b"}  # the worst of three never is the better of two different ones
    assert wins.count("a") == pytest.approx(200, abs=40)
    alike = [((0, 0.0), "a"), ((0, 0.0), "b")]
    assert {_winner(alike, trial_rng(seed, 0)) for seed in range(30)} == {"a", "b"}


def test_children_take_genes_from_two_parents_and_mutate_in_one_choice():
    run = drive(Nsga2(population=10, crossover=1.0), one_max(), 60)
    bred = [t for t in run.history.trials if len(t.proposal.notes.get("parents", ())) == 2]
    assert len(bred) > 40
    for child in bred:
        a, b = (run.history.trials[number].architecture for number in child.proposal.notes["parents"])
        own = [n for n, gene in child.architecture.genes.items() if gene not in (a.genes[n], b.genes[n])]
        assert len(own) <= 1
    run = drive(Nsga2(population=10, crossover=0.0), one_max(), 60)
    assert all(len(t.proposal.notes.get("parents", "1")) == 1 for t in run.history.trials)


def volume(history, worst):
    """Area that the front of two losses dominates, below ``worst``."""
    area, top = 0.0, worst[1]
    for a, b in sorted(history.losses(t) for t in history.front()):
        area += max(0.0, worst[0] - a) * max(0.0, top - b)
        top = min(top, b)
    return area


def test_finds_a_better_front_than_random_search():
    landscape = trade_off(length=12, limit=None)
    ours, random = (
        [volume(drive(strategy, landscape, 150, seed=seed).history, (0.0, 1.0)) for seed in range(12)]
        for strategy in (Nsga2(population=20), RandomSearch())
    )
    assert wilcoxon(ours, random, alternative="greater").pvalue < 1e-2


def test_finds_the_front_of_zdt1_on_a_grid():
    """Zitzler, Deb, Thiele 2000: the front lies where all variables but the first are 0."""

    def score(architecture):
        first, *rest = (level / 10 for level in architecture.genes.values())
        g = 1 + 9 * sum(rest) / len(rest)
        return {"f1": first, "f2": g * (1 - (first / g) ** 0.5)}

    landscape = replace(trade_off(limit=None), space=Levels(4, 11), score=score)
    landscape = replace(landscape, objectives=(minimise("f1"), minimise("f2")))
    # 14,641 architectures, of which 11 are the front; random draws would meet 0.3 of them.
    history = drive(Nsga2(population=20), landscape, 400).history
    found = [t for t in history.front() if sum(list(t.architecture.genes.values())[1:]) == 0]
    assert len(found) >= 6
    losses = np.array([history.losses(t) for t in found])
    assert np.allclose(losses[:, 1], 1 - np.sqrt(losses[:, 0]))


def test_a_cached_generation_is_the_recomputed_one():
    run = drive(Nsga2(population=5), trade_off(), 43, in_flight=3)
    again = History(run.history.space, run.history.objectives, run.history.constraints)
    for kind, what, outcome in run.events:
        again.start(what) if kind == "start" else again.finish(what, **outcome)
    assert parents(again, 5) == parents(run.history, 5)


@pytest.mark.parametrize(
    "arguments", [{"population": 1}, {"crossover": 1.5}, {"mutation": -0.1}, {"crossover": float("nan")}]
)
def test_refuses(arguments):
    with pytest.raises(InvalidInputError):
        Nsga2(**arguments)
