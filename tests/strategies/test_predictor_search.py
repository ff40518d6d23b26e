import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import norm, rankdata

from nasplat.errors import InvalidInputError
from nasplat.objectives import at_least, at_most, maximise, minimise
from nasplat.ranges import Float, Int
from nasplat.space import space_from
from nasplat.strategy import Evaluate, Explore, History, Trial
from nasplat.testing.drive import drive, replay, trial_rng
from nasplat.testing.landscapes import Landscape, Levels, one_max, one_max_edges, tiny, trade_off
from nasplat.testing.strategy_contract import StrategyContract
from strategies.predictor_search import MAX_RESULTS, PredictorSearch, _first, _fit, _Predictor, normal_scores
from strategies.random_search import RandomSearch

SMALL = PredictorSearch(initial=6, parents=4, mutants=12, draws=8)
"""Proposes as the default does, in a fraction of the time."""


class TestPredictorSearchContract(StrategyContract):
    trials = 14
    evaluations = 35

    @pytest.fixture
    def strategy(self):
        return SMALL


@pytest.mark.slow
class TestDefaultsContract(StrategyContract):
    trials = 30
    evaluations = 60

    @pytest.fixture
    def strategy(self):
        return PredictorSearch()


def told(history, genes, state="complete", budget=1.0, **metrics):
    number = len(history)
    history.start(Trial(number, Evaluate(history.space.architecture(dict(genes)), budget=budget)))
    history.finish(number, state=state, metrics=metrics)
    return number


# What it is fitted to.


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0], [1.0, 1.0, 5.0, 5.0, 5.0], [2.0], [7.0, 7.0], [0.1, -4e9, 3.0]])
def test_normal_scores_are_those_of_ranks(losses):
    expected = norm.ppf((rankdata([-loss for loss in losses]) - 0.5) / len(losses))
    np.testing.assert_allclose(normal_scores(np.array(losses)), expected, atol=1e-12)


def test_normal_scores_by_hand():
    scores = normal_scores(np.array([30.0, 10.0, 20.0]))
    quantile = NormalDist().inv_cdf
    np.testing.assert_allclose(scores, [quantile(1 / 6), quantile(5 / 6), 0.0], atol=1e-12)


def test_its_own_parameters_are_fitted_to_a_growing_part_of_the_first_results():
    assert [_first(count) for count in (0, 1, 5, 8, 11, 12, 17, 18, 27, 100, 10_000)] == [
        0, 1, 5, 8, 8, 12, 12, 18, 27, 93, 140,
    ]  # fmt: skip


def test_the_predictor_finds_what_matters():
    rng = np.random.default_rng(0)
    codes = rng.integers(2, size=(60, 8)).astype(float)
    truth = codes @ np.array([2.0, -2.0, 1.0, 0, 0, 0, 0, 0])
    predictor = _Predictor(codes[:40], truth[:40], truth[:40], *_fit(codes[:40], truth[:40]))
    drawn = np.mean([predictor.draw(codes[40:], np.random.default_rng(seed)) for seed in range(30)], axis=0)
    assert np.corrcoef(drawn, truth[40:])[0, 1] > 0.9


def test_a_draw_varies_where_nothing_is_known_and_not_where_it_is():
    codes = np.eye(12)
    targets = np.linspace(-1, 1, 6)
    predictor = _Predictor(codes[:6], targets, targets, *_fit(codes[:6], targets))
    predictor.noise = 1e-4
    spread = np.std([predictor.draw(codes, np.random.default_rng(seed)) for seed in range(200)], axis=0)
    assert spread[:6].max() < 0.1 < spread[6:].min()


def test_equal_results_tell_nothing_and_break_nothing():
    landscape = Landscape(Levels(6, 4), lambda architecture: {"value": 0.5})
    assert len(drive(SMALL, landscape, 20).history) == 20


def test_a_long_history_is_cut_to_the_telling_and_the_latest():
    count = MAX_RESULTS + 300
    codes = np.random.default_rng(0).random((count, 3))
    targets = normal_scores(-codes[:, 0])
    predictor = _Predictor(codes, targets, targets, *_fit(codes[:50], targets[:50]))
    predictor.draw(codes[:5], np.random.default_rng(0))
    kept = predictor._process.X_train_
    assert len(kept) == MAX_RESULTS
    for row in (*codes[np.argsort(-targets)[: MAX_RESULTS // 2]], *codes[-MAX_RESULTS // 2 :]):
        assert (kept == row).all(axis=1).any()


# What it proposes.


def test_begins_at_random_then_mutates_the_best():
    run = drive(PredictorSearch(), one_max(), 40)
    trials = run.history.trials
    random = drive(RandomSearch(), one_max(), 10)
    assert run.proposals[:10] == random.proposals[:10]
    mutants = [trial for trial in trials if "parents" in trial.proposal.notes]
    assert len(mutants) > 15
    for trial in mutants:
        (number,) = trial.proposal.notes["parents"]
        before = sorted((t.metrics["value"] for t in trials[: trial.number]), reverse=True)
        assert trials[number].metrics["value"] >= before[min(9, len(before) - 1)]
        changed = sum(a != trials[number].architecture.genes[n] for n, a in trial.architecture.genes.items())
        assert 1 <= changed <= 4


def test_the_scale_of_a_metric_does_not_matter():
    landscape = one_max()
    odd = replace(landscape, score=lambda a: {"value": -math.exp(-20 * landscape.score(a)["value"])})
    genes = [[t.architecture.genes for t in drive(SMALL, some, 30).history.trials] for some in (landscape, odd)]
    assert genes[0] == genes[1]


def test_minimised_and_maximised_are_mirror_images():
    landscape = one_max()
    mirrored = replace(
        landscape, score=lambda a: {"value": -landscape.score(a)["value"]}, objectives=(minimise("value"),)
    )
    genes = [[t.architecture.genes for t in drive(SMALL, some, 30).history.trials] for some in (landscape, mirrored)]
    assert genes[0] == genes[1]


@pytest.mark.parametrize("in_flight", [4, 16])
def test_nothing_is_proposed_twice(in_flight):
    history = drive(SMALL, one_max_edges(), 60, in_flight=in_flight).history
    assert history.distinct == len(history) == 60


def test_waiting_proposals_differ_by_more_than_being_new():
    history = drive(PredictorSearch(), one_max(), 40).history
    rows = []
    for number in range(40, 56):
        proposal = PredictorSearch().propose(history, trial_rng(0, number))
        history.start(Trial(number, proposal))
        rows.append(history.space.encode(proposal.architecture))
    distances = [np.abs(a - b).sum() / 2 for i, a in enumerate(rows) for b in rows[:i]]
    assert min(distances) >= 1
    assert np.mean(distances) > 1.5


def test_small_spaces_are_predicted_whole_and_exhausted():
    run = drive(PredictorSearch(), tiny(), 40)
    assert run.history.distinct == len(run.history) == 16
    assert run.asked[-1][2] is None


def test_ends_where_is_valid_makes_the_size_an_upper_bound():
    class OnlyEven(Levels):
        def is_valid(self, genes):
            return sum(genes.values()) % 2 == 0

    run = drive(SMALL, Landscape(OnlyEven(3, 4), tiny().score), 100, in_flight=3)
    assert run.history.distinct == 32
    assert run.asked[-1][2] is None


def test_failed_and_partly_trained_trials_and_copies_teach_nothing():
    def history():
        made = one_max().history()
        rng = trial_rng(5, 0)
        for _ in range(8):
            architecture = made.space.sample(rng)
            told(made, architecture.genes, **one_max().score(architecture))
        return made

    plain, mixed = history(), history()
    other = [plain.space.sample(trial_rng(6, n)).genes for n in range(4)]
    told(mixed, other[0], state="failed")
    told(mixed, other[1], budget=0.5, value=99.0)
    told(mixed, other[2], state="stopped", value=99.0)
    mixed.start(Trial(len(mixed), Explore(None)))
    mixed.finish(len(mixed) - 1, state="complete", found=(mixed.space.architecture(other[3]),))
    for seed in range(5):
        assert SMALL.propose(mixed, trial_rng(seed, 0)) == SMALL.propose(plain, trial_rng(seed, 0))


def test_a_history_is_let_go():
    import gc
    import weakref

    run = drive(SMALL, one_max(), 10)
    history = weakref.ref(run.history)
    del run
    gc.collect()
    assert history() is None


def test_fits_only_when_there_are_enough_more_results(monkeypatch):
    from strategies import predictor_search

    fits = []
    original = predictor_search._fit
    monkeypatch.setattr(
        predictor_search, "_fit", lambda codes, targets: fits.append(len(targets)) or original(codes, targets)
    )
    drive(SMALL, one_max(), 30, in_flight=3)
    assert [n for n in fits if n >= 8] == [8, 12, 18, 27]


# Limits and several objectives.


def test_heeds_a_limit_known_only_after_training():
    landscape = replace(trade_off(limit=0.3), objectives=(maximise("value"),))
    free = replace(landscape, constraints=())
    kept = [
        np.mean([trial.metrics["cost"] <= 0.3 for trial in drive(PredictorSearch(), some, 60).history.trials[30:]])
        for some in (landscape, free)
    ]
    assert kept[0] > 0.5 > 0.1 > kept[1]


def test_learns_from_trials_that_a_cheap_limit_refused():
    """Nothing keeps the limit at first: the predictor of the cost alone leads there."""
    landscape = trade_off(length=12, limit=0.2)
    run = drive(PredictorSearch(), landscape, 60, cheap=("cost",))
    random = drive(RandomSearch(), landscape, 60, cheap=("cost",)).history
    assert not any(trial.state == "complete" for trial in run.history.trials[:10])
    assert sum(trial.state == "complete" for trial in run.history.trials) > 10
    assert not any(trial.state == "complete" for trial in random.trials)


def test_a_lower_limit_is_the_other_way_round():
    landscape = Landscape(
        Levels(8, 4), trade_off().score, objectives=(minimise("cost"),), constraints=(at_least("value", 0.8),)
    )
    history = drive(PredictorSearch(), landscape, 60).history
    late = history.trials[30:]
    assert np.mean([trial.metrics["value"] >= 0.8 for trial in late]) > 0.5
    assert history.best().metrics["cost"] < 0.72


def test_a_limit_on_something_never_measured_is_no_reason_to_raise():
    landscape = replace(one_max(), constraints=(at_most("latency_ms", 1.0),))
    assert len(drive(SMALL, landscape, 15).history) == 15


def volume(history, reference=(0.0, 1.0)):
    """Area between a front of (value up, cost down) and a point that all of it dominates."""
    points = sorted((t.metrics["cost"], t.metrics["value"]) for t in history.front())
    area, best = 0.0, reference[0]
    for index, (cost, value) in enumerate(points):
        best = max(best, value)
        right = points[index + 1][0] if index + 1 < len(points) else reference[1]
        area += (right - cost) * best
    return area


def test_several_objectives_spread_over_the_front():
    landscape = trade_off(length=8, limit=None)
    ours = [drive(PredictorSearch(), landscape, 60, seed=seed).history for seed in range(3)]
    random = [drive(RandomSearch(), landscape, 60, seed=seed).history for seed in range(3)]
    assert min(map(volume, ours)) > max(map(volume, random))
    costs = [trial.metrics["cost"] for trial in ours[0].front()]
    assert min(costs) < 0.2
    assert max(costs) > 0.8


def test_ranges_are_searched_by_their_order():
    space = space_from(dict, {"lr": Float(1e-4, 1e-1, log=True), "depth": Int(1, 60), "kind": ("a", "b", "c")})

    def score(architecture):
        genes = architecture.genes
        miss = abs(math.log10(genes["lr"] / 3e-3)) + abs(genes["depth"] - 20) / 30 + (genes["kind"] != "b")
        return {"value": -miss}

    landscape = Landscape(space, score)
    ours = [-drive(PredictorSearch(), landscape, 40, seed=seed).best() for seed in range(3)]
    assert min(ours) > -0.15


@pytest.mark.parametrize(
    "arguments",
    [{"initial": 1}, {"initial": 2.0}, {"parents": 0}, {"mutants": -1}, {"draws": True}, {"mutants": 0, "draws": 0}],
)
def test_refuses(arguments):
    with pytest.raises(InvalidInputError, match=next(iter(arguments))):
        PredictorSearch(**arguments)


def test_resumed_with_an_empty_cache_goes_on_alike():
    whole = drive(SMALL, trade_off(), 30, in_flight=4)
    resumed = replay(trade_off(), whole.events[:25])
    drive(SMALL, trade_off(), 30, in_flight=4, run=resumed)
    assert resumed.proposals == whole.proposals


def test_an_empty_history_is_answered_at_random():
    history = History(Levels(3, 4), [maximise("value")])
    assert SMALL.propose(history, trial_rng(0, 0)) == RandomSearch().propose(history, trial_rng(0, 0))
