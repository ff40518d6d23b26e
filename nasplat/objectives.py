"""What a study wants: objectives, constraints, dominance and fronts. Pure functions of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import InvalidInputError


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
    """A hard limit on one metric. A candidate that breaks it is infeasible."""

    metric: str
    bound: float
    sense: Literal["at_most", "at_least"]

    def __post_init__(self) -> None:
        if self.sense not in ("at_most", "at_least"):
            raise InvalidInputError(f"sense is {self.sense!r}; legal: 'at_most', 'at_least'")
        if not math.isfinite(self.bound):
            raise InvalidInputError(f"the bound on {self.metric} is {self.bound}; it must be a finite number")

    def violation(self, metrics: Mapping[str, float]) -> float:
        """How far the metric is past the bound, in the metric's unit; 0 where the limit is kept."""
        excess = metrics[self.metric] - self.bound
        return max(0.0, excess if self.sense == "at_most" else -excess)

    def __str__(self) -> str:
        return f"{self.metric} {self.sense.replace('_', ' ')} {self.bound:g}"


def maximise(metric: str) -> Objective:
    """Objective: the larger the better."""
    return Objective(metric, "maximise")


def minimise(metric: str) -> Objective:
    """Objective: the smaller the better."""
    return Objective(metric, "minimise")


def at_most(metric: str, bound: float) -> Constraint:
    """Hard limit: ``metric <= bound``."""
    return Constraint(metric, float(bound), "at_most")


def at_least(metric: str, bound: float) -> Constraint:
    """Hard limit: ``metric >= bound``."""
    return Constraint(metric, float(bound), "at_least")


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
