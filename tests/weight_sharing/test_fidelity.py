from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from nasplat import Evaluate, maximise, minimise
from nasplat.errors import InvalidInputError
from nasplat.strategy import History, Trial
from nasplat.testing.landscapes import Levels
from nasplat.weight_sharing.fidelity import (
    INHERITED,
    NETWORK,
    OWN,
    RECALIBRATED,
    WEIGHTS,
    _taus,
    agreement,
    ranking_fidelity,
)


def test_tau_of_a_known_order():
    # Of 6 pairs, (1, 2) and (3, 4) are swapped: (4 - 2) / 6.
    found = agreement([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0])
    assert found.tau == pytest.approx(1 / 3) and found.n == 4
    # Differences of ranks are 1 each: 1 - 6 * 4 / (4 * 15).
    assert found.spearman == pytest.approx(0.6)
    assert agreement([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]).tau == -1.0


def test_tau_with_ties_is_tau_b():
    # Pairs: 5 concordant or discordant of which 5 concordant, 1 tied in the first: 5 / sqrt(5 * 6).
    assert agreement([1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]).tau == pytest.approx(5 / 30**0.5)


def test_equal_values_rank_nothing():
    found = agreement([0.1] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.tau, found.spearman, found.interval) == (0.0, 0.0, (0.0, 0.0))
    assert not found.is_clear


def test_the_interval_is_the_bootstraps():
    rng = np.random.default_rng(5)
    x = rng.standard_normal(25)
    y = x + rng.standard_normal(25)
    found = agreement(x, y, confidence=0.9)
    assert found == agreement(x, y, confidence=0.9) != agreement(x, y, confidence=0.9, seed=1)
    scipys = stats.bootstrap(
        (x, y), lambda a, b: stats.kendalltau(a, b).statistic, paired=True, vectorized=False, n_resamples=500,
        confidence_level=0.9, method="percentile", random_state=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.interval == pytest.approx((scipys.low, scipys.high), abs=0.05)
    assert found.interval[0] < found.tau < found.interval[1]
    wider = agreement(x, y, confidence=0.99)
    assert wider.interval[0] < found.interval[0] and wider.interval[1] > found.interval[1]


def test_a_resample_has_scipys_tau():
    rng = np.random.default_rng(2)
    x, y = rng.integers(6, size=(2, 12)).astype(float)  # with ties
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=20)
    for count, tau in zip(counts, _taus(x, y, counts.astype(float)), strict=True):
        rows = np.repeat(np.arange(12), count)
        assert tau == pytest.approx(stats.kendalltau(x[rows], y[rows]).statistic)


def test_the_interval_covers_the_true_tau():
    """Of a normal pair with correlation r, tau is 2 / pi * arcsin(r)."""
    rng, truth, hits = np.random.default_rng(0), 2 / np.pi * np.arcsin(0.6), 0
    for _ in range(60):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=30).T
        low, high = agreement(x, y).interval
        hits += low <= truth <= high
    assert hits >= 51  # 95% of 60 is 57; fewer than 51 has a probability below 0.5%


@dataclass
class Searched:
    history: History


ACCURACY = (maximise("val_accuracy"),)


def searched(rows, objectives=ACCURACY):
    """A history in which network i has the values ``rows[i]``: inherited, recalibrated, own; None is not there."""
    history = History(Levels(4, 4), objectives)
    for number, row in enumerate(rows):
        architecture = history.space.sample(np.random.default_rng(number))
        for weights, value in zip((INHERITED, RECALIBRATED, OWN), row, strict=True):
            if value is not None:
                notes = {NETWORK: number, WEIGHTS: weights}
                history.start(Trial(len(history), Evaluate(architecture, notes=notes)))
                state = "complete" if value >= 0 else "failed"
                metrics = {"val_accuracy": value, "val_loss": 1 - value}
                history.finish(len(history) - 1, state=state, metrics=metrics)
    return Searched(history)


ROWS = [(0.1, 0.31, 0.80), (0.1, 0.33, 0.82), (0.1, 0.35, 0.81), (0.2, 0.37, 0.83), (0.1, 0.39, 0.84)]


def test_the_report_compares_both_with_the_networks_own_weights():
    report = ranking_fidelity(searched(ROWS))
    assert report.metric == "val_accuracy"
    assert list(report.table.columns) == ["architecture", "inherited", "recalibrated", "own"]
    assert report.table[["inherited", "recalibrated", "own"]].to_numpy().tolist() == [list(row) for row in ROWS]
    assert report.recalibrated.tau == pytest.approx(0.8)  # one of ten pairs is swapped
    own = [row[2] for row in ROWS]
    assert report.inherited == agreement([row[0] for row in ROWS], own)
    assert report.recalibrated == agreement([row[1] for row in ROWS], own)


def test_in_words():
    text = str(ranking_fidelity(searched(ROWS)))
    first, plain, warning, recalibrated, *_ = text.splitlines()
    assert first == "val_accuracy of 5 networks, by inherited weights against networks trained by themselves"
    assert "inherited as trained: Kendall tau 0.32, 95% interval" in plain
    assert "includes 0: 5 networks do not show" in warning
    assert "inherited, recalibrated: Kendall tau 0.80" in recalibrated
    clear = [(0.1 * i, 0.1 * i, 0.1 * i) for i in range(9)]
    assert "includes 0" not in str(ranking_fidelity(searched(clear)))
    opposed = [(0.1 * i, 0.1 * i, 1 - 0.1 * i) for i in range(9)]
    assert str(ranking_fidelity(searched(opposed))).count("opposed") == 2


def test_a_metric_to_be_minimised_agrees_as_well():
    loss = searched(ROWS, (minimise("val_loss"),))
    assert ranking_fidelity(loss).metric == "val_loss"
    assert ranking_fidelity(loss).recalibrated.tau == ranking_fidelity(searched(ROWS)).recalibrated.tau
    assert ranking_fidelity(loss, "val_accuracy").metric == "val_accuracy"


def test_networks_that_lack_an_evaluation_are_left_out():
    report = ranking_fidelity(searched([*ROWS, (0.5, 0.5, None), (0.5, -1.0, 0.9)]))
    assert report.inherited.n == 5 and list(report.table.index) == [0, 1, 2, 3, 4]


def test_without_recalibration():
    report = ranking_fidelity(searched([(a, None, c) for a, _, c in ROWS]))
    assert report.recalibrated is None and "recalibrated" not in report.table and "recalibrated" not in str(report)


def test_too_few_networks_are_refused():
    with pytest.raises(InvalidInputError, match="2 networks have val_accuracy"):
        ranking_fidelity(searched(ROWS[:2]))
    with pytest.raises(InvalidInputError, match="confidence"):
        ranking_fidelity(searched(ROWS), confidence=1.0)
