"""What a step takes that was never timed, learnt from those of its kind by their sizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

from nasplat.packed.steps import step_kind, step_sizes

LEAST = 4
"""Steps of a kind that something can be learnt from."""

BEYOND = 2.0
"""Factor by which an estimate may lie outside the times of its kind."""


class StepEstimates:
    """Estimates of steps by their keys.

    Per kind, a Gaussian process of the logarithms of the sizes gives the logarithm of the time: a power law, and smooth
    deviations from it.

    Args:
        times: Milliseconds of steps by their keys, at least 0.
    """

    def __init__(self, times: Mapping[str, float]) -> None:
        kinds: dict[str, dict[str, float]] = {}
        for key, milliseconds in times.items():
            if milliseconds > 0:
                kinds.setdefault(step_kind(key), {})[key] = milliseconds
        self._dearest = {kind: max(members.values()) for kind, members in kinds.items()}
        self._laws = {kind: _Law(members) for kind, members in kinds.items() if len(members) >= LEAST}

    def __call__(self, key: str) -> float:
        """Milliseconds of a step. Where nothing can be learnt, those of the dearest of its kind, or of all kinds."""
        kind = step_kind(key)
        if kind in self._laws:
            return self._laws[kind](key)
        return self._dearest.get(kind, max(self._dearest.values(), default=0.0))


class _Law:
    """Of the steps of one kind."""

    def __init__(self, times: Mapping[str, float]) -> None:
        sizes = [step_sizes(key) for key in times]
        self._names = sorted({name for found in sizes for name in found})
        rows, logs = np.array([self._row(found) for found in sizes]), np.log(list(times.values()))
        self._centre, self._low, self._high = rows.mean(0), float(logs.min()), float(logs.max())
        kernel = ConstantKernel() * DotProduct() + ConstantKernel(0.1) * RBF(2.0) + WhiteKernel(0.01)
        self._process = GaussianProcessRegressor(kernel, normalize_y=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound does no harm
            self._process.fit(rows - self._centre, logs)

    def _row(self, sizes: Mapping[str, int]) -> NDArray[np.float64]:
        return np.array([math.log1p(sizes.get(name, 0)) for name in self._names])

    def __call__(self, key: str) -> float:
        value = float(self._process.predict((self._row(step_sizes(key)) - self._centre)[None])[0])
        return math.exp(min(max(value, self._low - math.log(BEYOND)), self._high + math.log(BEYOND)))
