import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from nasplat.compare.curves import best_so_far
from nasplat.compare.statistics import (
    Statistics,
    a12,
    centre_interval,
    compare_arms,
    holm,
    seeds_needed,
    smallest_p,
)
from nasplat.compare.verdict import verdict
from nasplat.errors import InvalidInputError

DARWIN = (6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75)
"""Differences in height of 15 pairs of plants, cross- less self-fertilised: the example of SciPy's documentation."""


def two(differences: object, **options: object) -> Statistics:
    d = np.asarray(differences, dtype=float)
    arms = {"random": np.zeros(len(d)), "new": d}
    return compare_arms(arms, **{"resamples": 200, **options})  # type: ignore[arg-type]


# The signed-rank test.


def test_signed_rank_of_a_known_sample() -> None:
    pair = two(DARWIN).pair("new", "random")
    assert pair.p == pytest.approx(0.041259765625)
    assert pair.p_corrected == pair.p
    assert (pair.wins, pair.ties, pair.losses, pair.seeds) == (13, 0, 2, 15)
    # The negative ranks are those of 48 and 67: 10 and 14; 120 in all.
    assert pair.rank_biserial == pytest.approx((96 - 24) / 120)
    assert pair.outcome == "better"
    assert pair.difference == pytest.approx(np.mean(DARWIN))


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ((1, 2, 3, 4, 5, 6), 2 / 64),
        ((-1, -2, -3, -4, -5, -6), 2 / 64),
        # Six equal sizes have rank 3.5 each: five of six on one side, or more, 7 of 64 ways on either side.
        ((1, 1, 1, 1, 1, -1), 14 / 64),
        # A zero takes part in the ranking, and its sign says nothing: 6 others on one side.
        ((0, 1, 2, 3, 4, 5, 6), 2 / 64),
        ((0, 0, 0, 0, 0, 0), 1.0),
        # The same differences of decimals, whose last bits differ, are ties.
        ((0.91 - 0.90, 0.81 - 0.80, 0.71 - 0.70, 0.61 - 0.60, 0.51 - 0.50, 0.40 - 0.41), 14 / 64),
    ],
)
def test_signed_rank_by_hand(differences: tuple[float, ...], p: float) -> None:
    assert two(differences).pairs[0].p == pytest.approx(p)


def test_differences_equal_but_for_rounding_are_ties() -> None:
    base = np.array([0.90, 0.80, 0.70, 0.60, 0.50, 0.41])
    step = np.array([0.91, 0.81, 0.71, 0.61, 0.51, 0.40])
    assert len(set(np.abs(step - base).tolist())) > 1
    pair = compare_arms({"random": base, "new": step}, resamples=200).pairs[0]
    assert pair.p == pytest.approx(14 / 64)


@pytest.mark.parametrize("n", [6, 14, 30, 50])
def test_without_ties_the_p_is_scipy_s_exact_one(n: int) -> None:
    d = np.random.default_rng(n).normal(0.3, 1.0, size=n)
    assert two(d, resamples=0).pairs[0].p == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-12)


@pytest.mark.parametrize("zeros", [0, 3, 16])
def test_with_ties_and_zeros_the_p_is_that_of_all_sign_flips(zeros: int) -> None:
    d = np.array([3.0, 1.0, 2.0, -1.0, 2.0, 2.0, -3.0, 5.0, 5.0, 1.0, 1.0, -2.0, 4.0, 3.0] + [0.0] * zeros)
    ranks = stats.rankdata(np.abs(d))[d != 0]
    flips = np.array(list(product((0, 1), repeat=len(ranks)))) @ ranks
    observed = ranks[d[d != 0] > 0].sum()
    expected = 2 * min((flips >= observed).mean(), (flips <= observed).mean())
    assert two(d, resamples=0).pairs[0].p == pytest.approx(expected, rel=1e-12)


def test_few_differences_among_many_zeros_show_nothing() -> None:
    # Four of one sign among 20: 2 / 2**4, where the normal approximation has 0.049.
    pair = two([1.0, 2.0, 3.0, 4.0] + [0.0] * 16, resamples=0).pairs[0]
    assert pair.p == pytest.approx(0.125)
    assert pair.outcome == "not distinguishable"


def test_very_many_differences_use_the_normal_approximation_of_scipy() -> None:
    d = np.tile([3.0, 1.0, 2.0, -1.0, -2.0, 0.0], 50)
    expected = stats.wilcoxon(d, zero_method="pratt", correction=True, method="asymptotic").pvalue
    assert two(d, resamples=0).pairs[0].p == pytest.approx(expected)


def test_ties_give_the_p_of_scipy_s_own_permutation_test() -> None:
    d = np.array([3.0, 1.0, 2.0, -1.0, 0.0, 2.0, 2.0])
    expected = stats.wilcoxon(d, zero_method="pratt", method=stats.PermutationMethod()).pvalue
    assert two(d).pairs[0].p == pytest.approx(expected)


def test_minimise_turns_better_round_and_keeps_the_metric_s_sign() -> None:
    lower = compare_arms(
        {"random": np.arange(8.0) + 10, "new": np.arange(8.0) * 0.99}, direction="minimise", resamples=200
    )
    pair = lower.pair("new", "random")
    assert pair.outcome == "better"
    assert pair.difference == pytest.approx(-10.035)
    assert pair.interval.low <= pair.difference <= pair.interval.high < 0
    assert pair.a12 == 1.0
    turned = lower.pair("random", "new")
    assert (turned.outcome, turned.a12, turned.wins) == ("worse", 0.0, 0)
    assert turned.interval == (-pair.interval.high, -pair.interval.low)


# Correction.


def test_holm_by_hand() -> None:
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1 raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_test_that_could_not_be_made_counts() -> None:
    first, second = holm([0.02, float("nan")])
    assert first == pytest.approx(0.04)
    assert math.isnan(second)


def test_all_pairs_are_corrected_together() -> None:
    rng = np.random.default_rng(0)
    arms = {name: rng.normal(size=9) for name in ("random", "b", "c", "d")}
    statistics = compare_arms(arms, resamples=200)
    assert len(statistics.pairs) == 6
    assert [pair.p_corrected for pair in statistics.pairs] == holm([pair.p for pair in statistics.pairs])
    with_baseline = compare_arms(arms, pairs="baseline", resamples=200)
    assert {(pair.a, pair.b) for pair in with_baseline.pairs} == {(name, "random") for name in ("b", "c", "d")}
    with pytest.raises(InvalidInputError, match="not tested against each other"):
        with_baseline.pair("b", "c")


# Effects.


def test_a12_by_hand() -> None:
    # 1 beats one of three; 2 beats one and ties with two; 3 beats three.
    assert a12([1, 2, 3], [2, 2, 0]) == pytest.approx(6 / 9)
    assert a12([1.0], [1.0]) == 0.5
    assert math.isnan(a12([], [1.0]))


def test_bootstrap_interval() -> None:
    assert centre_interval([2.0, 2.0, 2.0]) == (2.0, (2.0, 2.0))
    assert math.isnan(centre_interval([1.0])[1].low)
    assert math.isnan(centre_interval([])[0])
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, interval = centre_interval(rng.normal(size=20), resamples=300)
        covered += interval.low <= 0 <= interval.high
    assert stats.binom.ppf(0.001, 200, 0.9) <= covered < 200


def test_median_interval_exists_where_bca_does_not() -> None:
    middle, interval = centre_interval([1.0, 1.0, 1.0, 1.0, 1.0, 5.0], centre="median", resamples=500)
    assert middle == 1.0
    assert math.isfinite(interval.low)
    assert interval.low <= 1.0 <= interval.high


@pytest.mark.parametrize(("seeds", "arms"), [(6, 2), (9, 5), (20, 2), (120, 2)])
def test_a_detectable_difference_is_detected_four_times_in_five(seeds: int, arms: int) -> None:
    rng = np.random.default_rng(2)
    tests = arms * (arms - 1) // 2
    d = rng.normal(size=seeds)
    others = {f"other{k}": rng.normal(size=seeds) for k in range(arms - 2)}
    pair = compare_arms({"random": np.zeros(seeds), "new": d, **others}, resamples=0).pair("new", "random")
    shift = pair.detectable / d.std(ddof=1)  # of differences whose true deviation is 1
    found = sum(two(rng.normal(size=seeds) + shift, alpha=0.05 / tests, resamples=0).pairs[0].outcome == "better"
                for _ in range(400))  # fmt: skip
    low, high = stats.binom.ppf([0.001, 0.999], 400, 0.8)
    assert low <= found <= high


# Friedman.


def test_friedman_by_hand() -> None:
    # Ranks 1, 2, 3 with each of 4 seeds: 12 / (4 * 3 * 4) * (4^2 + 8^2 + 12^2) - 3 * 4 * 4 = 8, with 2 degrees.
    seeds = np.arange(4.0)
    found = compare_arms({"random": seeds, "b": seeds + 10, "c": seeds + 20}, resamples=200).friedman
    assert found is not None
    assert found.statistic == pytest.approx(8.0)
    assert found.p == pytest.approx(math.exp(-4.0))
    assert found.ranks == {"random": 3.0, "b": 2.0, "c": 1.0}


def test_friedman_of_equal_arms_and_of_two() -> None:
    same = compare_arms(dict.fromkeys(("random", "b", "c"), np.ones(5)), resamples=200)
    assert same.friedman is not None
    assert same.friedman.p == 1.0
    assert two((1, 2, 3)).friedman is None


# Too few, missing, nothing found.


def test_seeds_needed() -> None:
    assert smallest_p(6) == 2 / 64
    assert [seeds_needed(tests) for tests in (1, 3, 10)] == [6, 7, 9]


def test_too_few_seeds_show_nothing_however_large_the_difference() -> None:
    statistics = two((100, 101, 102, 103, 104))
    pair = statistics.pairs[0]
    assert pair.outcome == "too few seeds"
    assert pair.reachable == 2 / 32
    assert pair.detectable == math.inf
    assert two((100, 101, 102, 103, 104, 105)).pairs[0].outcome == "better"


def test_a_missing_seed_is_left_out_of_its_pairs_only() -> None:
    base = np.arange(8.0)
    gap = base + 1 + np.arange(8) / 10
    gap[3] = np.nan
    statistics = compare_arms({"random": base, "gap": gap, "full": base + 5}, resamples=200)
    assert statistics.arms["gap"].missing == 1
    assert statistics.arms["gap"].centre == pytest.approx(np.nanmean(gap))
    assert statistics.pair("gap", "random").seeds == 7
    assert statistics.pair("full", "random").seeds == 8
    assert statistics.friedman is not None
    assert statistics.friedman.seeds == 7


def test_nothing_feasible_ranks_below_every_number() -> None:
    base = np.arange(8.0)
    none = np.where(np.arange(8) < 7, -np.inf, 100.0)
    statistics = compare_arms({"random": base, "none": none}, resamples=200)
    pair = statistics.pair("none", "random")
    assert (pair.wins, pair.losses) == (1, 7)
    assert pair.seeds == 8
    # The one win of 93 has rank 1: what is beyond every number ranks above.
    assert pair.rank_biserial == pytest.approx((1 - 35) / 36)
    assert statistics.arms["none"].found_nothing == 7
    assert pair.difference == pytest.approx(93.0)
    # Ranks say worse, the mean of the one seed that found something says better: no arm is named.
    assert pair.p_corrected == pytest.approx(4 / 256)
    assert pair.outcome == "mixed"
    both = compare_arms({"random": none, "none": none}, resamples=200).pairs[0]
    assert (both.ties, both.p) == (8, 1.0)


def test_no_common_seed() -> None:
    statistics = compare_arms({"random": [1.0, np.nan], "b": [np.nan, 2.0]}, resamples=200)
    assert statistics.pairs[0].outcome == "nothing paired"
    assert "no two arms have a seed in common" in verdict(statistics).overall


@pytest.mark.parametrize(
    ("finals", "options", "said"),
    [
        ({}, {}, "at least one arm"),
        ({"random": [1.0], "b": [1.0, 2.0]}, {}, "give NaN where a seed is missing"),
        ({"random": [[1.0]]}, {}, "one number a seed"),
        ({"random": [np.inf]}, {}, "would be perfect"),
        ({"random": [-np.inf]}, {"direction": "minimise"}, "would be perfect"),
        ({"a": [1.0]}, {}, "baseline is 'random'; there are a"),
        ({"a": [1.0]}, {"baseline": None, "pairs": "baseline"}, "needs a baseline"),
        ({"random": [1.0]}, {"alpha": 1.0}, r"alpha is 1.0"),
        ({"random": [1.0]}, {"centre": "mode"}, "legal: 'mean', 'median'"),
        ({"random": [1.0]}, {"direction": "up"}, "legal: 'maximise', 'minimise'"),
        ({"random": [1.0]}, {"pairs": "some"}, "legal: 'all', 'baseline'"),
        ({"random": [1.0]}, {"resamples": 10}, "at least 100"),
    ],
)
def test_wrong_arguments(finals: dict[str, object], options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        compare_arms(finals, **options)  # type: ignore[arg-type]


def test_same_input_same_output() -> None:
    rng = np.random.default_rng(3)
    arms = {name: rng.normal(size=10) for name in ("random", "b", "c")}
    assert compare_arms(arms) == compare_arms(arms)


def test_tables() -> None:
    statistics = two(DARWIN)
    table = statistics.table()
    assert table.loc["new", "p_corrected"] == pytest.approx(0.041259765625)
    assert table.loc["random", "outcome"] == "baseline"
    assert math.isnan(table.loc["random", "p"])
    pairs = statistics.pairs_table()
    assert pairs.loc[0, ["a", "b", "wins"]].tolist() == ["new", "random", 13]


# What the whole is for: no difference is found where there is none, and one that is there is found.


@pytest.mark.parametrize("levels", [None, 5], ids=["continuous", "with ties"])
def test_arms_that_are_the_same_are_seldom_told_apart(levels: int | None) -> None:
    """Searches of one kind, the best of 20 draws each, three times over, paired by a part in common."""
    rng = np.random.default_rng(4)
    repetitions, alpha, false = 150, 0.05, 0
    for _ in range(repetitions):
        draws = rng.normal(size=(3, 8, 20)) + rng.normal(size=(8, 1))
        if levels is not None:
            draws = np.round(draws * levels / 4) / levels
        arms = dict(zip(("random", "b", "c"), best_so_far(draws)[:, :, -1], strict=True))
        statistics = compare_arms(arms, alpha=alpha, resamples=0)
        words = verdict(statistics)
        told_apart = any(pair.outcome != "not distinguishable" for pair in statistics.pairs)
        assert told_apart or words.best is None
        false += told_apart
    assert false <= stats.binom.ppf(0.999, repetitions, alpha)


def test_a_better_arm_is_found() -> None:
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(100):
        seeds = rng.normal(size=10)
        arms = {name: seeds + rng.normal(scale=0.5, size=10) for name in ("random", "same", "better")}
        arms["better"] += 1.5
        found += verdict(compare_arms(arms, resamples=0)).best == "better"
    assert found >= 90
