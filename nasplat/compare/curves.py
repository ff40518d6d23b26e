"""Anytime curves on plain arrays: best so far, over seeds, with bootstrap bands; and how soon an arm gets there.

Arrays are ``(seeds, steps)`` of best-so-far values; step ``i`` (from 0) is the state after ``i + 1`` evaluations, or at
``x[i]`` of whatever the curve is drawn against. NaN stands for "nothing feasible yet".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nasplat.compare.statistics import Centre, Direction, Floats, Interval
from nasplat.errors import InvalidInputError


@dataclass(frozen=True)
class Band:
    """A curve over seeds.

    Attributes:
        x: ``(steps,)``, what the curve is drawn against.
        centre: ``(steps,)``, mean or median; NaN where some seed has nothing yet, so that a curve never jumps because
            another seed joins it.
        low: ``(steps,)``, lower end of the bootstrap interval of the centre, point by point.
        high: ``(steps,)``, upper end.
        seeds: Number of seeds.
    """

    x: Floats
    centre: Floats
    low: Floats
    high: Floats
    seeds: int


@dataclass(frozen=True)
class SpeedUp:
    """How soon an arm reaches what the baseline reaches at the end.

    Attributes:
        target: The value that is reached: the baseline's centre at its last step.
        baseline_at: Where the baseline itself first reaches it.
        at: Where the arm's centre first does; infinite where it does not.
        at_interval: Bootstrap interval of ``at``, arms and target drawn anew together; ends may be infinite.
        factor: ``baseline_at / at``; 0 where it is not reached, so that all that is known is "below 1".
        factor_interval: Bootstrap interval of the factor.
    """

    target: float
    baseline_at: float
    at: float
    at_interval: Interval
    factor: float
    factor_interval: Interval


def best_so_far(values: ArrayLike, *, direction: Direction = "maximise") -> Floats:
    """The best value up to each step.

    Args:
        values: ``(..., steps)`` in the order of ending. NaN: failed, infeasible, or not evaluated in full.
        direction: ``"maximise"`` or ``"minimise"``.

    Returns:
        ``(..., steps)``; NaN before the first value.
    """
    _check_direction(direction)
    array = np.asarray(values, dtype=np.float64)
    best: Floats = (np.fmax if direction == "maximise" else np.fmin).accumulate(array, axis=-1)
    return best


def stack(curves: Sequence[ArrayLike], steps: int | None = None) -> Floats:
    """Curves of unequal lengths as one array, each carried on with its last value.

    Args:
        curves: ``(steps_i,)`` each; one that is empty becomes NaN.
        steps: Length of the result; the longest where None. Longer curves are cut.

    Returns:
        ``(seeds, steps)``.
    """
    arrays = [np.asarray(curve, dtype=np.float64) for curve in curves]
    if not arrays or any(array.ndim != 1 for array in arrays):
        raise InvalidInputError("curves must be at least one array of shape (steps,) each")
    length = max(len(array) for array in arrays) if steps is None else steps
    table = np.full((len(arrays), length), np.nan)
    for row, array in zip(table, arrays, strict=True):
        cut = array[:length]
        if len(cut):
            row[: len(cut)] = cut
            row[len(cut) :] = cut[-1]
    return table


def on_grid(x: ArrayLike, y: ArrayLike, grid: ArrayLike) -> Floats:
    """A step function at other places: the last ``y`` whose ``x`` is at most the grid's point, NaN before the first.

    Args:
        x: ``(n,)``, not falling: seconds charged when each evaluation ended.
        y: ``(n,)``, the best so far at each.
        grid: ``(m,)``.

    Returns:
        ``(m,)``.
    """
    places, values, points = (np.asarray(array, dtype=np.float64) for array in (x, y, grid))
    if places.shape != values.shape or places.ndim != 1:
        raise InvalidInputError(f"x and y have shapes {places.shape} and {values.shape}; equal (n,) are needed")
    if (np.diff(places) < 0).any():
        raise InvalidInputError("x falls somewhere; it must not")
    index = np.searchsorted(places, points, side="right") - 1
    found = np.full(points.shape, np.nan)
    found[index >= 0] = values[index[index >= 0]]
    return found


def band(
    curves: ArrayLike,
    x: ArrayLike | None = None,
    *,
    centre: Centre = "mean",
    level: float = 0.95,
    resamples: int = 2000,
) -> Band:
    """Mean or median over seeds at each step, with a pointwise percentile bootstrap interval over seeds.

    Args:
        curves: ``(seeds, steps)``; NaN where a seed has nothing yet. A row of NaN alone makes the whole band NaN: leave
            seeds that were not run out.
        x: ``(steps,)``; 1, 2, ... where None.
        centre: ``"mean"`` or ``"median"``.
        level: In (0, 1).
        resamples: Of the bootstrap, seeded by a constant. Whole curves are drawn, so the steps stay together.

    Raises:
        InvalidInputError: Shapes do not fit.
    """
    table, places = _checked(curves, x)
    draws = np.random.default_rng(0).integers(len(table), size=(resamples, len(table)))
    tails = 50 * (1 - level), 100 - 50 * (1 - level)
    middle, low, high = (np.full(table.shape[1], np.nan) for _ in range(3))
    known = ~np.isnan(table).any(axis=0)
    if known.any():
        middle[known] = _centre(table[:, known], centre)
        if len(table) > 1:
            low[known], high[known] = np.percentile(_drawn(table[:, known], draws, centre), tails, axis=0)
    return Band(places, middle, low, high, len(table))


def speed_up(
    curves: ArrayLike,
    baseline: ArrayLike,
    x: ArrayLike | None = None,
    *,
    direction: Direction = "maximise",
    centre: Centre = "mean",
    level: float = 0.95,
    resamples: int = 2000,
) -> SpeedUp:
    """After how many evaluations (or seconds) an arm reaches what the baseline reaches at its last step.

    Args:
        curves: ``(seeds, steps)`` of the arm.
        baseline: ``(seeds, steps)`` of the baseline, the same seeds at the same places: both are drawn together.
        x: ``(steps,)``; 1, 2, ... where None.
        direction: ``"maximise"`` or ``"minimise"``.
        centre: Of which curve over seeds, ``"mean"`` or ``"median"``.
        level: In (0, 1).
        resamples: Of the bootstrap, seeded by a constant.

    Raises:
        InvalidInputError: Shapes do not fit.
    """
    _check_direction(direction)
    sign = 1.0 if direction == "maximise" else -1.0
    own, places = _checked(curves, x)
    other, _ = _checked(baseline, x)
    if own.shape != other.shape:
        raise InvalidInputError(f"curves have shape {own.shape} and the baseline {other.shape}; equal ones are needed")
    draws = np.random.default_rng(0).integers(len(own), size=(resamples, len(own)))
    # A seed without anything yet keeps the centre unknown, so the target is not reached there.
    middle, reference = sign * _centre(own, centre)[None], sign * _centre(other, centre)[None]
    at, baseline_at = (float(values[0]) for values in _reach(middle, reference, places))
    drawn_at, drawn_baseline = _reach(sign * _drawn(own, draws, centre), sign * _drawn(other, draws, centre), places)
    tails = (0.5 * (1 - level), 0.5 * (1 + level))
    nothing = Interval(float("nan"), float("nan"))
    intervals = [nothing, nothing]
    if len(own) > 1 and not np.isnan(drawn_at).any():
        # Infinite ones are ordinary ranks here: no interpolation towards them.
        factors = _ratio(drawn_baseline, drawn_at)
        intervals = [
            Interval(*(float(value) for value in np.quantile(sample, tails, method="nearest")))
            for sample in (drawn_at, factors)
        ]
    return SpeedUp(
        target=float(_centre(other, centre)[-1]),
        baseline_at=baseline_at,
        at=at,
        at_interval=intervals[0],
        factor=float(_ratio(np.array([baseline_at]), np.array([at]))[0]),
        factor_interval=intervals[1],
    )


def _reach(own: Floats, baseline: Floats, places: Floats) -> tuple[Floats, Floats]:
    """Where centres ``(n, steps)``, larger better, first reach the baseline's last value; NaN without such a value."""
    target = baseline[:, -1:]
    # A mean of many equal numbers may miss the number by its last bits.
    enough = target - 1e-12 * np.abs(target)
    found = []
    for curves in (own, baseline):
        there = curves >= enough
        first = np.where(there.any(axis=1), places[there.argmax(axis=1)], np.inf)
        found.append(np.where(np.isnan(target[:, 0]), np.nan, first))
    return found[0], found[1]


def _ratio(baseline_at: Floats, at: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = np.where(np.isinf(at), 0.0, baseline_at / at)
    return ratio


def _centre(table: Floats, centre: Centre) -> Floats:
    found: Floats = (np.mean if centre == "mean" else np.median)(table, axis=0)
    return found


def _drawn(table: Floats, draws: Any, centre: Centre) -> Floats:
    """``(resamples, steps)``: the centre over each draw of seeds."""
    seeds = len(table)
    if centre == "mean":
        # How often each seed was drawn, as a matrix: one product instead of a (resamples, seeds, steps) array.
        weights = np.stack([(draws == seed).sum(axis=1) for seed in range(seeds)], axis=1) / seeds
        unknown = np.isnan(table)
        mixed = weights @ np.where(unknown, 0.0, table)
        mixed[(weights @ unknown) > 0] = np.nan
        result: Floats = mixed
        return result
    return np.stack([np.median(table[draw], axis=0) for draw in draws])


def _checked(curves: ArrayLike, x: ArrayLike | None) -> tuple[Floats, Floats]:
    table = np.asarray(curves, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise InvalidInputError(f"curves have shape {table.shape}; (seeds, steps) with at least one of each is needed")
    places = np.arange(1.0, table.shape[1] + 1) if x is None else np.asarray(x, dtype=np.float64)
    if places.shape != table.shape[1:]:
        raise InvalidInputError(f"x has shape {places.shape} and the curves have {table.shape[1]} steps")
    return table, places


def _check_direction(direction: Any) -> None:
    if direction not in ("maximise", "minimise"):
        raise InvalidInputError(f"direction is {direction!r}; legal: 'maximise', 'minimise'")
