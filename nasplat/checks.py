"""Checks of plain hyper-parameters, so that a wrong one is refused where it is given and not where it is used."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from nasplat.errors import InvalidInputError


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an integer from ``least`` up. Neither a bool nor a float such as 3.0 is."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether it is a finite real number. A bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def sequence(owner: str, name: str, value: Any) -> tuple[Any, ...]:
    """A tuple of a tuple or list.

    Args:
        owner: Whose hyper-parameter it is, for the message.
        name: Of the hyper-parameter.
        value: What was given.

    Raises:
        InvalidInputError: It is neither. A string is none: it would fall into letters.
    """
    if not isinstance(value, (tuple, list)):
        raise InvalidInputError(f"{owner}: {name} is {value!r}; legal: a tuple or list")
    return tuple(value)
