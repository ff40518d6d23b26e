"""Ranges: a choice among the values of a fine ordered grid.

A choice of a search space lists its options. Where they are numbers between two ends, a range stands for the list:
``{"lr": Float(1e-4, 1e-1, log=True), "depth": Int(2, 12)}``. It is a sequence like any other list of options, so that
architectures stay countable, repeats are found, and a gene is a plain JSON number; but its values have an order, which
encodings, mutations and the samplers of Optuna make use of.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cached_property
from typing import Any, overload

import numpy as np

from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError

MAX_VALUES = 10_000
"""Values of one range at most: each is an option, and is listed where a space is listed."""

_PRECISION = 40
"""Decimal digits of the calculation, so that the last digit of a value does not depend on a machine's libraries."""


class Range(Sequence[Any]):
    """The values of an ordered grid, as a sequence. Made as :class:`Float` or :class:`Int`.

    Attributes:
        low: The first value.
        high: The last value that the grid may have.
        log: Whether equal ratios, and not equal differences, are equal distances.
    """

    low: float
    high: float
    log: bool

    @property
    @abstractmethod
    def values(self) -> Sequence[float]:
        """All values, in ascending order."""

    @cached_property
    def _index(self) -> dict[Any, int]:
        return {value: index for index, value in enumerate(self.values)}

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """A value; a tuple of values for a slice."""
        return tuple(self.values)[index] if isinstance(index, slice) else self.values[index]

    def __contains__(self, value: object) -> bool:
        """Whether a value is on the grid, and of its type: 3.0 is not in ``Int(1, 5)``."""
        return type(value) is type(self.values[0]) and value in self._index

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Where a value stands.

        Raises:
            ValueError: It is not on the grid (between ``start`` and ``stop``).
        """
        if value in self:
            at = self._index[value]
            if at in range(len(self))[start:stop]:
                return at
        raise ValueError(f"{value!r} is not among the values of {self!r}")

    def count(self, value: Any) -> int:
        """1 for a value of the grid, else 0."""
        return int(value in self)

    def position(self, value: float) -> float:
        """Where a number lies between the ends, in [0, 1], on the linear or the logarithmic scale.

        A number outside of the ends has the position of the nearer one. A range of one value has its value at 0.
        """
        first, last = self.values[0], self.values[-1]
        if first == last or value <= first:
            return 0.0
        if value >= last:
            return 1.0
        if self.log:
            # Differences, since a quotient of the ends may overflow.
            return min(max((math.log(value) - math.log(first)) / (math.log(last) - math.log(first)), 0.0), 1.0)
        return (value - first) / (last - first)

    def nearest(self, value: float) -> Any:
        """The value of the grid next to a number, on the linear or the logarithmic scale; of two, the smaller."""
        at = self.position(value)
        below = self._below(value)
        pair = self.values[below : below + 2]
        return min(pair, key=lambda candidate: (abs(self.position(candidate) - at), candidate))

    def draw(self, rng: np.random.Generator) -> Any:
        """A value drawn evenly; on a logarithmic scale evenly there, so that a whole number is likelier the smaller.

        Args:
            rng: The only source of randomness.
        """
        return self.values[int(rng.integers(len(self)))]

    def _below(self, value: float) -> int:
        """Index of the greatest value that is not above a number; 0 where all are."""
        low, high = 0, len(self) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.values[middle] <= value else (low, middle - 1)
        return low

    def beside(self, value: Any) -> list[Any]:
        """The values that one mutation leads to: 1, 2, 4, 8, ... places above and below, as far as there are any.

        Each doubling of the distance has one value on each side, so a mutation drawn evenly among them mostly makes a
        small step and sometimes a far one, however fine the grid is (step sizes are evenly spread on a logarithmic
        scale).

        Raises:
            ValueError: The value is not on the grid.
        """
        at, found = self.index(value), []
        distance = 1
        while distance < len(self):
            found += [self.values[i] for i in (at - distance, at + distance) if 0 <= i < len(self)]
            distance *= 2
        return found


@dataclass(frozen=True)
class Float(Range):
    """Real numbers from ``low`` to ``high``, both included, at equal distances.

    Values are rounded, by at most a twentieth of their distance, so that they print short (``0.00251`` and not
    ``0.0025118864315095794``), and are the same on every machine.

    Attributes:
        low: The first value.
        high: The last value, above ``low``.
        log: Whether equal ratios, and not equal differences, are equal distances; ``low`` must be above 0 then.
        steps: Number of values, from 2 to 10,000.

    Raises:
        InvalidInputError: A parameter is out of its range, or the ends are too near each other for so many values.
    """

    low: float
    high: float
    log: bool = False
    steps: int = 101

    def __post_init__(self) -> None:
        _check_ends(self)
        if not is_whole(self.steps, 2) or self.steps > MAX_VALUES:
            raise InvalidInputError(f"Float: steps is {self.steps!r}; a whole number from 2 to {MAX_VALUES}")
        if not self.low < self.high:
            raise InvalidInputError(f"Float: low is {self.low!r}, high is {self.high!r}; low must be the smaller one")
        # -0.0 and 1 are 0.0 and 1.0, so that equal ranges are described by equal texts.
        object.__setattr__(self, "low", float(self.low) + 0.0)
        object.__setattr__(self, "high", float(self.high) + 0.0)
        if any(a >= b for a, b in zip(self.values, self.values[1:], strict=False)):
            raise InvalidInputError(f"{self!r}: floating point has not {self.steps} values between these ends")

    @cached_property
    def values(self) -> tuple[float, ...]:
        """All values, in ascending order, the ends exactly as given."""
        context = Context(prec=_PRECISION)
        low, high, parts = Decimal(repr(self.low)), Decimal(repr(self.high)), Decimal(self.steps - 1)
        exact: list[Decimal] = []
        if self.log:
            ratio = context.exp(context.divide(context.ln(context.divide(high, low)), parts))
            value = low
            for _ in range(self.steps):
                exact.append(value)
                value = context.multiply(value, ratio)
            gap = context.subtract(Decimal(1), context.divide(Decimal(1), ratio))  # to the value below, by the value
        else:
            difference = context.subtract(high, low)
            for index in range(self.steps):
                exact.append(context.add(low, context.divide(context.multiply(difference, Decimal(index)), parts)))
            gap = context.divide(difference, parts)
        # On a logarithmic scale the distance grows with the value.
        inner = [_round(value, context.multiply(gap, value) if self.log else gap) for value in exact[1:-1]]
        return (self.low, *inner, self.high)


@dataclass(frozen=True)
class Int(Range):
    """Whole numbers ``low``, ``low + step``, ... up to ``high``, which is among them where a step leads to it.

    Attributes:
        low: The first value.
        high: No value is above it; not below ``low``.
        log: Whether equal ratios, and not equal differences, are equal distances; ``low`` must be above 0 then. The
            values are the same.
        step: Distance of two values, at least 1.

    Raises:
        InvalidInputError: A parameter is out of its range, or there are more than 10,000 values.
    """

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidInputError(f"Int: {name} is {value!r}; a whole number is needed")
        _check_ends(self)
        if not is_whole(self.step):
            raise InvalidInputError(f"Int: step is {self.step!r}; a whole number from 1 up is needed")
        if self.low > self.high:
            raise InvalidInputError(f"Int: low is {self.low}, high is {self.high}; low must not be the greater one")
        if len(self.values) > MAX_VALUES:
            raise InvalidInputError(
                f"{self!r} has {len(self.values)} values; legal: up to {MAX_VALUES}. A larger step makes fewer"
            )

    @property
    def values(self) -> range:
        """All values, in ascending order."""
        return range(self.low, self.high + 1, self.step)

    def draw(self, rng: np.random.Generator) -> int:
        """As any range does; whole numbers lie closer together on a logarithmic scale the greater they are."""
        if not self.log:
            return int(super().draw(rng))
        # Each value has the part of the scale that reaches half a step to both sides of it.
        half = min(self.step / 2, self.low / 2)
        bottom, top = math.log(self.low - half), math.log(self.values[-1] + self.step / 2)
        drawn = math.exp(bottom + (top - bottom) * rng.random())
        return self.values[min(max(round((drawn - self.low) / self.step), 0), len(self) - 1)]


def _check_ends(range_: Range) -> None:
    kind = type(range_).__name__
    for name in ("low", "high"):
        if not is_number(getattr(range_, name)):
            raise InvalidInputError(f"{kind}: {name} is {getattr(range_, name)!r}; a finite number is needed")
    if not isinstance(range_.log, bool):
        raise InvalidInputError(f"{kind}: log is {range_.log!r}; legal: True, False")
    if range_.log and not range_.low > 0:
        raise InvalidInputError(f"{kind}: low is {range_.low!r}; a logarithmic scale needs one above 0")


def _round(value: Decimal, gap: Decimal) -> float:
    """A value to the power of ten that is between a tenth and a hundredth of the distance to the next one."""
    unit = Decimal(1).scaleb(gap.adjusted() - 1)
    return float(value.quantize(unit, context=Context(prec=_PRECISION))) + 0.0
