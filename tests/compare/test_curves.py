import math

import numpy as np
import pytest

from nasplat.compare.curves import band, best_so_far, on_grid, speed_up, stack
from nasplat.errors import InvalidInputError

NAN = float("nan")


def test_best_so_far() -> None:
    values = [[NAN, 1.0, NAN, 0.5, 2.0], [3.0, 1.0, 4.0, NAN, 0.0]]
    np.testing.assert_equal(best_so_far(values), [[NAN, 1, 1, 1, 2], [3, 3, 4, 4, 4]])
    np.testing.assert_equal(best_so_far(values, direction="minimise"), [[NAN, 1, 1, 0.5, 0.5], [3, 1, 1, 1, 0]])


def test_unequal_lengths_are_carried_on_or_cut() -> None:
    curves = [[1.0, 2.0], [3.0, 4.0, 5.0], []]
    np.testing.assert_equal(stack(curves), [[1, 2, 2], [3, 4, 5], [NAN, NAN, NAN]])
    np.testing.assert_equal(stack(curves[:2], steps=1), [[1], [3]])
    np.testing.assert_equal(stack(curves[:2], steps=4), [[1, 2, 2, 2], [3, 4, 5, 5]])


def test_on_grid_takes_the_last_before() -> None:
    np.testing.assert_equal(on_grid([1.0, 2.0, 2.0, 5.0], [10, 20, 30, 40], [0.5, 1, 2, 4.9, 9]), [NAN, 10, 30, 30, 40])
    np.testing.assert_equal(on_grid([], [], [1.0]), [NAN])
    with pytest.raises(InvalidInputError, match="x falls"):
        on_grid([2.0, 1.0], [1, 2], [1.0])


def test_band_begins_where_every_seed_has_something() -> None:
    found = band([[NAN, 1.0, 2.0], [4.0, 3.0, 4.0]])
    np.testing.assert_equal(found.centre, [NAN, 2.0, 3.0])
    # With two seeds each end is one of them.
    np.testing.assert_equal(found.low[1:], [1.0, 2.0])
    np.testing.assert_equal(found.high[1:], [3.0, 4.0])
    np.testing.assert_equal(found.x, [1.0, 2.0, 3.0])
    assert found.seeds == 2


@pytest.mark.parametrize("centre", ["mean", "median"])
def test_band_against_drawing_seed_by_seed(centre: str) -> None:
    curves = best_so_far(np.random.default_rng(0).normal(size=(7, 5)))
    function = np.mean if centre == "mean" else np.median
    draws = np.random.default_rng(0).integers(7, size=(300, 7))
    expected = np.percentile([function(curves[draw], axis=0) for draw in draws], (5, 95), axis=0)
    found = band(curves, centre=centre, level=0.9, resamples=300)  # type: ignore[arg-type]
    np.testing.assert_allclose([found.low, found.high], expected)
    np.testing.assert_allclose(found.centre, function(curves, axis=0))


def test_one_seed_has_no_interval() -> None:
    assert np.isnan(band([[1.0, 2.0]]).low).all()


def test_speed_up_of_curves_without_spread() -> None:
    slow = np.tile(np.arange(1.0, 11.0), (5, 1))  # reaches 10 at step 10
    fast = np.minimum(2 * slow, 12)  # 10 at step 5
    found = speed_up(fast, slow)
    assert (found.target, found.baseline_at, found.at, found.factor) == (10.0, 10.0, 5.0, 2.0)
    assert found.factor_interval == (2.0, 2.0)
    back = speed_up(slow, fast)
    assert (back.at, back.factor) == (math.inf, 0.0)
    assert back.at_interval == (math.inf, math.inf)
    assert speed_up(-fast, -slow, direction="minimise").factor == 2.0


def test_speed_up_against_itself_is_one() -> None:
    curves = best_so_far(np.random.default_rng(1).normal(size=(6, 40)))
    found = speed_up(curves, curves)
    assert found.factor == 1.0
    assert found.factor_interval == (1.0, 1.0)


def test_speed_up_in_other_units_and_with_a_spread() -> None:
    rng = np.random.default_rng(2)
    slow = best_so_far(rng.normal(size=(10, 100)))
    fast = best_so_far(rng.normal(size=(10, 100)) + 1)
    found = speed_up(fast, slow, np.arange(100) * 60.0 + 60)
    assert found.at % 60 == 0
    assert found.factor == pytest.approx(found.baseline_at / found.at)
    assert found.factor_interval.low <= found.factor <= found.factor_interval.high
    assert found.factor > 2


def test_speed_up_where_the_baseline_found_nothing() -> None:
    found = speed_up([[1.0, 2.0]], [[NAN, NAN]])
    assert math.isnan(found.target)
    assert math.isnan(found.at)
    assert math.isnan(found.factor)


def test_wrong_shapes() -> None:
    for call in (
        lambda: band([1.0, 2.0]),
        lambda: band([[1.0, 2.0]], [1.0]),
        lambda: speed_up([[1.0, 2.0]], [[1.0]]),
        lambda: stack([]),
        lambda: on_grid([1.0], [1.0, 2.0], [1.0]),
        lambda: best_so_far([1.0], direction="up"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidInputError):
            call()
