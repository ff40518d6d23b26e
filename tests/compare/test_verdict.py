import numpy as np
import pytest

from nasplat.compare.statistics import compare_arms
from nasplat.compare.verdict import verdict

SEEDS = np.linspace(0.80, 0.84, 10)
WOBBLE = np.array([3, -1, 4, -1.5, 5, -9, 2, -6, 5.5, -3]) / 1000
FAR = 0.05 + np.arange(10) / 10_000


def said(arms: dict[str, np.ndarray], **options: object):
    return verdict(compare_arms(arms, metric="val_accuracy", resamples=500, **options))  # type: ignore[arg-type]


def test_a_winner_over_all() -> None:
    found = said({"random": SEEDS, "good": SEEDS + FAR, "same": SEEDS + WOBBLE})
    assert found.best == "good"
    assert found.overall.startswith("good is better in val_accuracy than each of the 2 other arms (largest corrected p")
    assert found.outcomes == {"good": "better", "same": "not distinguishable"}
    assert "better than random (difference 0.05045, 95% interval [0.05" in found.arms["good"]
    assert "better with 10 of 10 seeds" in found.arms["good"]
    assert found.arms["random"].endswith("; the baseline.")


def test_not_distinguishable_names_what_could_have_been_seen() -> None:
    found = said({"random": SEEDS, "same": SEEDS + WOBBLE})
    assert found.best is None
    assert found.overall == (
        "Not distinguishable: no difference in val_accuracy is shown between the two arms with 10 seeds (1 test, "
        "alpha 0.05)."
    )
    statistics = compare_arms({"random": SEEDS, "same": SEEDS + WOBBLE}, resamples=500)
    detectable = f"{statistics.pairs[0].detectable:.4g}"
    assert f"with 10 seeds a difference of about {detectable} would have been shown 8 times in 10" in found.arms["same"]
    assert "95% interval [-0.0" in found.arms["same"]


def test_two_that_beat_random_but_not_each_other() -> None:
    found = said({"random": SEEDS, "a": SEEDS + FAR, "b": SEEDS + FAR + WOBBLE})
    assert found.best is None
    assert found.overall == (
        "a and b are better in val_accuracy than random. No single best: a and b are not shown to be worse than any "
        "other arm."
    )


def test_worse_than_random_is_said() -> None:
    found = said({"random": SEEDS, "bad": SEEDS - FAR, "same": SEEDS + WOBBLE})
    assert found.best is None
    assert found.overall.startswith("bad is worse in val_accuracy than random.")
    assert found.outcomes["bad"] == "worse"
    assert "worse with 10 of 10 seeds" in found.arms["bad"]


def test_random_may_win() -> None:
    found = said({"random": SEEDS, "bad": SEEDS - FAR})
    assert found.best == "random"
    assert found.overall.startswith("random is better in val_accuracy than bad (p = 0.002, 10 seeds)")


def test_too_few_seeds() -> None:
    found = said({"random": SEEDS[:5], "good": (SEEDS + FAR)[:5]})
    assert found.best is None
    assert found.overall == (
        "Too few seeds to show any difference in val_accuracy: with 5 seeds and 1 test the smallest reachable p is "
        "0.062, above 0.05; at least 6 seeds are needed."
    )
    assert "5 common seeds cannot show any difference" in found.arms["good"]


def test_enough_seeds_for_one_test_but_not_for_three() -> None:
    arms = {"random": SEEDS[:6], "a": (SEEDS + FAR)[:6], "b": (SEEDS + 2 * FAR)[:6]}
    assert "3 tests corrected together" in said(arms).overall
    assert "at least 7 seeds are needed" in said(arms).overall
    # Two tests against the baseline need 7 as well; at a milder alpha 6 do.
    found = said(arms, pairs="baseline", alpha=0.1)
    assert found.outcomes == {"a": "better", "b": "better"}
    assert found.best is None
    assert "tested against the baseline only, so none of them is named the best" in found.overall


def test_one_arm() -> None:
    found = said({"random": SEEDS})
    assert (found.overall, found.best) == ("There is only one arm, random: nothing to compare.", None)
    assert found.outcomes == {}


def test_without_a_random_arm() -> None:
    found = said({"a": SEEDS, "b": SEEDS + FAR}, baseline=None)
    assert found.best == "b"
    assert "No random arm takes part" in found.overall
    assert found.outcomes == {}


def test_missing_and_infeasible_seeds_are_said() -> None:
    some = (SEEDS + FAR).copy()
    some[0], some[1] = np.nan, -np.inf
    found = said({"random": SEEDS, "some": some})
    assert "over 8 seeds; nothing feasible with 1 more; 1 missing" in found.arms["some"]


def test_ranks_and_mean_that_disagree_name_nobody() -> None:
    # Better with nine of ten seeds by a little, worse with one by far.
    odd = SEEDS + np.arange(1, 11) / 1000
    odd[0] = SEEDS[0] - 0.5
    statistics = compare_arms({"random": SEEDS, "odd": odd}, alpha=0.2, resamples=500)
    assert statistics.pair("odd", "random").p_corrected == pytest.approx(statistics.pairs[0].p)
    found = verdict(statistics)
    assert found.outcomes["odd"] == "mixed"
    assert found.best is None
    assert "different from random by ranks" in found.arms["odd"]


def test_text_is_overall_and_a_line_an_arm() -> None:
    lines = str(said({"random": SEEDS, "a": SEEDS + FAR})).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("  random: ")
