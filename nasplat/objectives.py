"""What a study wants: objectives, constraints, dominance and fronts. Pure functions of metrics."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError
from nasplat.quantities import unit_of

Sense: TypeAlias = Literal["at_most", "at_least"]


@dataclass(frozen=True)
class Objective:
    """One metric to make large or small."""

    metric: str
    direction: Literal["maximise", "minimise"]

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise InvalidInputError(f"the metric of an objective is {self.metric!r}; its name is needed")
        if self.direction not in ("maximise", "minimise"):
            raise InvalidInputError(f"direction is {self.direction!r}; legal: 'maximise', 'minimise'")

    def loss(self, metrics: Mapping[str, float]) -> float:
        """The metric with its sign turned so that smaller is better."""
        value = metrics[self.metric]
        return -value if self.direction == "maximise" else value

    def __str__(self) -> str:
        return f"{self.direction} {self.metric}"


@dataclass(frozen=True)
class Constraint:
    """A hard limit on one metric. A candidate that breaks it is infeasible.

    Attributes:
        metric: What is limited.
        bound: In the metric's unit, finite.
        sense: ``at_most`` or ``at_least``.
        share: Where the limit was given as a share of a baseline network: that share, 0.6 for 60 %. Else None.
        of: The baseline's name; "" where the limit was given as a number.
    """

    metric: str
    bound: float
    sense: Sense
    share: float | None = None
    of: str = ""

    def __post_init__(self) -> None:
        _check_sense(self.sense)
        if not math.isfinite(self.bound):
            raise InvalidInputError(f"the bound on {self.metric} is {self.bound}; it must be a finite number")

    def violation(self, metrics: Mapping[str, float]) -> float:
        """How far the metric is past the bound, in the metric's unit; 0 where the limit is kept."""
        excess = metrics[self.metric] - self.bound
        return max(0.0, excess if self.sense == "at_most" else -excess)

    @property
    def wish(self) -> Constraint | RelativeConstraint:
        """The limit as it was asked for: relative to a baseline, or itself."""
        return self if self.share is None else RelativeConstraint(self.metric, self.share, self.sense, self.of)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for :func:`constraint_from_json`."""
        record: dict[str, Any] = {"metric": self.metric, "bound": self.bound, "sense": self.sense}
        return record if self.share is None else {**record, "share": self.share, "of": self.of}

    def __str__(self) -> str:
        if self.share is None:
            return f"{self.metric} {_words(self.sense)} {self.bound:g}"
        return f"{self.wish} ({self.bound:.4g}{(' ' + unit_of(self.metric)).rstrip()})"


@dataclass(frozen=True)
class RelativeConstraint:
    """A hard limit that is a share of what a named baseline network has. Measured, it becomes a :class:`Constraint`.

    Attributes:
        metric: What is limited; one that is known without training.
        share: Positive: 0.6 for 60 %.
        sense: ``at_most`` or ``at_least``.
        of: The baseline's name; "" is the only baseline that the study has.
    """

    metric: str
    share: float
    sense: Sense
    of: str = ""

    def __post_init__(self) -> None:
        _check_sense(self.sense)
        if not is_number(self.share) or not (self.share > 0 and math.isfinite(self.share)):
            raise InvalidInputError(f"the limit on {self.metric} is a share {self.share!r}; it must be positive")
        if not isinstance(self.of, str):
            raise InvalidInputError(f"of is {self.of!r}; the name of a baseline is needed: of='reference'")

    @property
    def wish(self) -> RelativeConstraint:
        """Itself (as :attr:`Constraint.wish`)."""
        return self

    def resolved(self, value: float) -> Constraint:
        """The limit in the metric's own unit.

        Args:
            value: What the baseline has, at least 0.

        Raises:
            InvalidInputError: The value is negative or not finite, so that a share of it says nothing.
        """
        if not (math.isfinite(value) and value >= 0):
            raise InvalidInputError(
                f"the baseline {self.of} has {self.metric} {value:g}, of which no share can be taken; give the limit "
                "as a number"
            )
        return Constraint(self.metric, self.share * value, self.sense, self.share, self.of)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for :func:`constraint_from_json`."""
        return {"metric": self.metric, "share": self.share, "of": self.of, "sense": self.sense}

    def __str__(self) -> str:
        # Twelve digits: 0.6 * 100 is a little more than 60.
        return f"{self.metric} {_words(self.sense)} {100 * self.share:.12g}% of {self.of or 'the baseline'}"


def constraint_from_json(record: Mapping[str, Any]) -> Constraint | RelativeConstraint:
    """The limit that :meth:`Constraint.to_json` or :meth:`RelativeConstraint.to_json` wrote."""
    return Constraint(**record) if "bound" in record else RelativeConstraint(**record)


def _check_sense(sense: object) -> None:
    if sense not in ("at_most", "at_least"):
        raise InvalidInputError(f"sense is {sense!r}; legal: 'at_most', 'at_least'")


def _words(sense: str) -> str:
    return sense.replace("_", " ")


def maximise(metric: str) -> Objective:
    """Objective: the larger the better."""
    return Objective(metric, "maximise")


def minimise(metric: str) -> Objective:
    """Objective: the smaller the better."""
    return Objective(metric, "minimise")


@overload
def at_most(metric: str, bound: float) -> Constraint: ...
@overload
def at_most(metric: str, bound: str, of: str = "") -> RelativeConstraint: ...
def at_most(metric: str, bound: float | str, of: str = "") -> Constraint | RelativeConstraint:
    """Hard limit: ``metric <= bound``.

    Args:
        metric: What is limited.
        bound: A number in the metric's unit, or a percentage of a baseline network: ``at_most("latency_ms", "60%")``.
        of: Name of the baseline (``Study(baselines={"reference": ...})``); may be left out where there is one only.
    """
    return _limit(metric, bound, "at_most", of)


@overload
def at_least(metric: str, bound: float) -> Constraint: ...
@overload
def at_least(metric: str, bound: str, of: str = "") -> RelativeConstraint: ...
def at_least(metric: str, bound: float | str, of: str = "") -> Constraint | RelativeConstraint:
    """Hard limit: ``metric >= bound``. Arguments as of :func:`at_most`."""
    return _limit(metric, bound, "at_least", of)


def _limit(metric: str, bound: float | str, sense: Sense, of: str) -> Constraint | RelativeConstraint:
    if isinstance(bound, str):
        return RelativeConstraint(metric, _share(metric, bound), sense, of)
    if of:
        raise InvalidInputError(
            f"the limit on {metric} is {bound!r} of {of!r}; a percentage of a baseline is written as text: '60%'"
        )
    return Constraint(metric, float(bound), sense)


def _share(metric: str, text: str) -> float:
    """The share that a percentage stands for: 0.6 for ``60%``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", text)
    if match is None or not float(match[1]) > 0:
        raise InvalidInputError(
            f"the bound on {metric} is {text!r}; legal: a number in the metric's unit (2.5), or a positive percentage "
            "of a baseline network as text ('60%')"
        )
    return float(match[1]) / 100


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether losses ``a`` are nowhere worse and somewhere better than losses ``b`` (smaller is better)."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(losses: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the rows that no other row dominates, in the order given.

    Args:
        losses: ``(n, objectives)``, smaller is better. Equal rows do not dominate each other, so all stay.
    """
    if not losses:
        return []
    table: NDArray[np.float64] = np.asarray(losses, dtype=np.float64)
    kept = []
    for index, row in enumerate(table):
        no_worse = (table <= row).all(axis=1)
        better = (table < row).any(axis=1)
        if not (no_worse & better).any():
            kept.append(index)
    return kept


def constrained_dominates(
    a: Sequence[float], b: Sequence[float], violation_a: float = 0.0, violation_b: float = 0.0
) -> bool:
    """Whether ``a`` beats ``b`` where there are hard limits (Deb et al. 2002, definition 1).

    What keeps all limits beats what breaks one; of two that break some, the smaller violation beats the larger,
    whatever the losses; of two that keep all, the one that dominates beats the other.

    Args:
        a: Losses, smaller is better. Not looked at where a limit is broken.
        b: As ``a``.
        violation_a: At least 0; 0 is feasible.
        violation_b: As ``violation_a``.
    """
    if violation_a > 0 or violation_b > 0:
        return violation_a < violation_b
    return dominates(a, b)


def ranks(losses: Sequence[Sequence[float]], violations: Sequence[float] | None = None) -> list[int]:
    """Non-dominated rank of each row, in the order given: 0 is the front, 1 the front of what is left, and so on.

    With violations, dominance is that of :func:`constrained_dominates`: all feasible rows come before all others, and
    those are ranked by their violation.

    The fronts are those of the fast non-dominated sort (Deb et al. 2002, section III-A), found by binary search for
    the first front that does not dominate a row, rows taken in lexicographic order (Zhang et al. 2015, ENS-BS).

    Args:
        losses: ``(n, objectives)``, smaller is better. Equal rows have the same rank. Rows that break a limit are not
            looked at and may be of any length.
        violations: ``(n,)``, 0 is feasible; None is all feasible.

    Raises:
        InvalidInputError: There is not one violation for each row.
    """
    broken = [0.0] * len(losses) if violations is None else list(violations)
    if len(broken) != len(losses):
        raise InvalidInputError(f"there are {len(broken)} violations for {len(losses)} rows of losses")
    found = [0] * len(losses)
    feasible = [index for index, violation in enumerate(broken) if not violation > 0]
    number = 0
    if feasible:
        table: NDArray[np.float64] = np.asarray([losses[index] for index in feasible], dtype=np.float64)
        numbers = _feasible_ranks(table)
        number = max(numbers) + 1
        for index, rank in zip(feasible, numbers, strict=True):
            found[index] = rank
    levels = sorted({violation for violation in broken if violation > 0})
    for index, violation in enumerate(broken):
        if violation > 0:
            found[index] = number + bisect_left(levels, violation)
    return found


def _feasible_ranks(table: NDArray[np.float64]) -> list[int]:
    if table.shape[1] == 1:
        inverse: list[int] = np.unique(table[:, 0], return_inverse=True)[1].tolist()
        return inverse
    fronts: list[list[int]] = []
    found = [0] * len(table)
    # In this order no row dominates an earlier one, and a front that dominates a row lies behind others that do.
    for index in np.lexsort(table.T[::-1]).tolist():
        row = table[index]

        def free(members: list[int], row: NDArray[np.float64] = row) -> bool:
            others = table[members]
            return not ((others <= row).all(axis=1) & (others < row).any(axis=1)).any()

        rank = bisect_left(fronts, True, key=free)
        if rank == len(fronts):
            fronts.append([])
        fronts[rank].append(index)
        found[index] = rank
    return found


def crowding(losses: Sequence[Sequence[float]]) -> list[float]:
    """Crowding distance of each row among these, in the order given (Deb et al. 2002, section III-B).

    Per objective the gap between a row's two neighbours, as a share of the objective's range, summed over the
    objectives; infinite for the first and the last row of any objective. An objective in which all are equal tells
    nothing and adds nothing, except where all rows are equal: those are at the boundary. Equal rows count as one and
    share its distance (Fortin and Parizeau 2013), so that the result does not depend on the order of the rows.

    Args:
        losses: ``(n, objectives)``, finite; rows of one front.
    """
    if len(losses) < 3:
        return [math.inf] * len(losses)
    rows, inverse = np.unique(np.asarray(losses, dtype=np.float64), axis=0, return_inverse=True)
    distance: NDArray[np.float64] = np.zeros(len(rows))
    for column in rows.T:
        # The rows are in lexicographic order, which settles ties in this objective.
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        if len(rows) > 1 and span == 0:
            continue
        distance[order[[0, -1]]] = np.inf
        if len(rows) > 2:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    shared: list[float] = distance[inverse.reshape(-1)].tolist()
    return shared


def hypervolume(losses: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume that losses dominate, up to a reference point: larger is better.

    Exact, by slices along the last objective (While et al., IEEE Trans. Evol. Comput. 10, 2006). Meant for fronts of
    up to some hundred points and a handful of objectives.

    Args:
        losses: ``(n, objectives)``, smaller is better. A point that is not below the reference in every objective
            dominates nothing of it and adds nothing.
        reference: ``(objectives,)``, the worst that still counts.

    Returns:
        At least 0, in the product of the objectives' units.

    Raises:
        InvalidInputError: Points and reference have different lengths, or the reference is not finite.
    """
    corner = np.asarray(reference, dtype=np.float64)
    if corner.ndim != 1 or not corner.size or not np.isfinite(corner).all():
        raise InvalidInputError(f"the reference is {reference!r}; one finite number an objective is needed")
    if not len(losses):
        return 0.0
    table = np.asarray(losses, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(corner):
        raise InvalidInputError(f"losses have shape {table.shape}; (n, {len(corner)}) is needed, as the reference has")
    return _volume(table[(table < corner).all(axis=1)], corner)


def _volume(table: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    if not len(table):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - table.min())
    table = table[np.lexsort(table.T)]  # by the last objective
    depths = np.diff(np.append(table[:, -1], corner[-1]))
    if len(corner) == 2:
        widths = corner[0] - np.minimum.accumulate(table[:, 0])
        return float(widths @ depths)
    total = 0.0
    for index, depth in enumerate(depths):
        if depth > 0:
            slab = table[: index + 1, :-1]
            total += float(depth) * _volume(slab[front(slab.tolist())], corner[:-1])
    return total
