"""What every arm of a comparison may spend on each seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError

COST = ("train_seconds", "measure_seconds")
"""What seconds are charged where a budget does not say."""


UNLIMITED = 10**9
"""So many trials or candidates that another limit ends the search."""

PROPOSED = 100
"""Candidates that may be proposed for each evaluation of a budget, and ten times as many to begin with."""

PROPOSED_CHARGED = 100_000
"""Candidates that may be proposed where a metric is charged, since refused ones and copies cost nothing of it."""


@dataclass(frozen=True)
class Budget:
    """So much of one thing for each study. Made by ``evaluations``, ``hours`` or ``charged``.

    What ended within the budget counts; what was still running when it was used up does not, even if it ended later.

    Attributes:
        kind: What is limited.
        amount: How much of it: a count, hours, or the unit of the metrics.
        metrics: What is charged, summed over trials.
    """

    kind: Literal["evaluations", "hours", "charged"]
    amount: float
    metrics: tuple[str, ...] = COST

    def __post_init__(self) -> None:
        if self.kind not in ("evaluations", "hours", "charged"):
            raise InvalidInputError(f"kind is {self.kind!r}; legal: 'evaluations', 'hours', 'charged'")
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.metrics or not all(isinstance(name, str) and name for name in self.metrics):
            raise InvalidInputError(f"metrics is {self.metrics!r}; names of metrics are needed")

    @property
    def proposals(self) -> int:
        """Candidates that a study may propose, those refused for a cheap cost and copies included.

        Only a study that gets nothing evaluated any more should end by it: one that repeats itself, or that does not
        meet the constraints. The clock of a budget of hours ends such a study anyway.
        """
        if self.kind == "evaluations":
            return int(PROPOSED * (self.amount + 10))
        return PROPOSED_CHARGED if self.kind == "charged" else UNLIMITED

    def __str__(self) -> str:
        if self.kind == "evaluations":
            return f"{self.amount:g} evaluations"
        if self.kind == "hours":
            return f"{self.amount:g} hours of wall-clock"
        return f"{self.amount:g} of {' + '.join(self.metrics)}"


def evaluations(number: int) -> Budget:
    """So many trials for each study.

    Candidates that were refused for a cheap cost before training, and copies of what had been evaluated, are none. A
    training in part counts like one in full: compare strategies that train in part by ``charged``.

    Raises:
        InvalidInputError: Not a whole number of at least 1.
    """
    if not is_whole(number):
        raise InvalidInputError(f"evaluations is {number!r}; a whole number of at least 1 is needed")
    return Budget("evaluations", float(number))


def hours(amount: float) -> Budget:
    """So many hours of searching for each study, by the clock: training, measuring, scheduling and waiting."""
    return Budget("hours", _positive("hours", amount))


def charged(amount: float, *metrics: str) -> Budget:
    """So much of one or more metrics for each study, summed over all its trials.

    ``charged(3600, "train_seconds")`` is an hour of training, whatever the machine did besides; a task that looks
    results up in a table can return the seconds that a training took as ``train_seconds``. A failed trial that has
    none of the metrics is charged the seconds that it ran.

    Args:
        amount: In the metrics' unit.
        metrics: Names; ``train_seconds`` and ``measure_seconds`` where none is given.
    """
    return Budget("charged", _positive("the amount charged", amount), metrics or COST)


def budget_of(value: Any) -> Budget:
    """A budget, or a whole number as evaluations.

    Raises:
        InvalidInputError: Neither.
    """
    if isinstance(value, Budget):
        return value
    if is_whole(value):
        return evaluations(value)
    raise InvalidInputError(
        f"budget is {value!r}; evaluations(200), hours(2), charged(3600, 'train_seconds') or a number of evaluations"
    )


def _positive(name: str, amount: float) -> float:
    if not is_number(amount) or not amount > 0 or not math.isfinite(amount):
        raise InvalidInputError(f"{name} is {amount!r}; a number above 0 is needed")
    return float(amount)
