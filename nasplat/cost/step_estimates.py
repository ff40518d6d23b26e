"""What a step takes that was never timed, from those of its kind: a power law of its sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nasplat.packed.steps import step_kind, step_sizes

RIDGE = 0.1
"""Penalty on an exponent, in squared errors of the logarithm: what few steps say little about stays near 0."""


class StepEstimates:
    """Estimates of steps by their keys.

    Per kind, ``log time = a + sum of b[size] * log(1 + size)`` is fitted by ridge regression to the steps that were
    timed. It is meant for a step here and there among many known ones.

    Args:
        times: Milliseconds of steps by their keys, at least 0.
    """

    def __init__(self, times: Mapping[str, float]) -> None:
        kinds: dict[str, dict[str, float]] = {}
        for key, milliseconds in times.items():
            kinds.setdefault(step_kind(key), {})[key] = milliseconds
        self._laws = {kind: _PowerLaw(members) for kind, members in kinds.items()}
        self._greatest = max(times.values(), default=0.0)

    def __call__(self, key: str) -> float:
        """Milliseconds of a step; of a kind that was never timed, the dearest step's: it is never the cheapest."""
        law = self._laws.get(step_kind(key))
        return self._greatest if law is None else law(key)


class _PowerLaw:
    """Of the steps of one kind."""

    def __init__(self, times: Mapping[str, float]) -> None:
        sizes = [step_sizes(key) for key in times]
        self._names = sorted({name for found in sizes for name in found})
        rows = np.array([self._row(found) for found in sizes])
        least = min((value for value in times.values() if value > 0), default=1e-9)
        logs = np.log([max(value, least) for value in times.values()])
        self._centre, self._mean = rows.mean(0), float(logs.mean())
        self._range = float(logs.min()), float(logs.max())
        centred = rows - self._centre
        penalty = RIDGE * np.eye(len(self._names))
        self._slopes = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (logs - self._mean))

    def _row(self, sizes: Mapping[str, int]) -> NDArray[np.float64]:
        return np.array([math.log1p(sizes.get(name, 0)) for name in self._names])

    def __call__(self, key: str) -> float:
        value = self._mean + float((self._row(step_sizes(key)) - self._centre) @ self._slopes)
        # Far from what was timed, a power law can give anything.
        low, high = self._range
        return math.exp(min(max(value, low - math.log(2)), high + math.log(2)))
