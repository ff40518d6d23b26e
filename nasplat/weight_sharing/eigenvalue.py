"""Early stopping of a differentiable search by the sharpness of its landscape.

Where DARTS collapses, the dominant eigenvalue of the Hessian of the validation loss in the architecture parameters
rises first (Zela et al. 2020, arXiv:1909.09656). The rule is that of the authors' code (RobustDARTS), epochs counted
from 1 instead of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from nasplat import seeding
from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError, NonFiniteError

STEP = 1e-2
"""L2 length of the step of the finite differences."""

TOLERANCE = 1e-2
"""Accuracy of the eigenvalue, relative to the one of largest magnitude: a factor of 1.3 is looked for."""

LEAST = 12
"""Products with the Hessian at least: with fewer, an eigenvalue near the largest can pass for it."""


@dataclass(frozen=True)
class EigenvalueStop:
    """When to stop, and to which record to go back.

    Every ``every`` epochs the dominant eigenvalue is recorded, and smoothed: the mean of the ``window`` records around
    each. The search stops when the smoothed value of the latest record that has one exceeds ``factor`` times that of
    ``lag`` records earlier, and goes back to the architecture parameters of that earlier record. With the defaults,
    the epochs after which it looks at records 2, 4, ..., n compare the means of the last five records and of the five
    before the last four, and it goes back to the record of epoch n - 12.

    Attributes:
        every: Epochs between two records, at least 1.
        window: Records that are averaged, an odd number. There are fewer before the first ones.
        lag: Records between the two means, at least 1.
        factor: Ratio of the means above which the search stops, above 1. There is no ratio to a mean that is not
            positive, and the search goes on.
        not_before: First epoch that it may go back to.
        batch_size: Examples, of the architecture parameters' data, that the loss is taken on; None is that of a step.
    """

    every: int = 2
    window: int = 5
    lag: int = 4
    factor: float = 1.3
    not_before: int = 10
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "window", "lag", "not_before"):
            if not is_whole(getattr(self, name)):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; legal: an integer from 1 up")
        if self.window % 2 == 0:
            raise InvalidInputError(f"window is {self.window}; legal: an odd number, as many records on each side")
        if not is_number(self.factor) or self.factor <= 1:
            raise InvalidInputError(f"factor is {self.factor!r}; legal: a number above 1")
        if self.batch_size is not None and not is_whole(self.batch_size, 2):
            raise InvalidInputError(f"batch_size is {self.batch_size!r}; None, or an integer from 2 up")

    def due(self, epoch: int) -> bool:
        """Whether the eigenvalue is recorded after this epoch, counted from 1."""
        return epoch % self.every == 0

    def go_back(self, eigenvalues: Sequence[float], epochs: Sequence[int]) -> int | None:
        """Index of the record to go back to; None where the search goes on.

        Args:
            eigenvalues: All records so far.
            epochs: After which each was made, counted from 1.
        """
        now = len(eigenvalues) - 1 - self.window // 2
        then = now - self.lag
        if then < 0 or epochs[then] < self.not_before:
            return None
        before = self._smoothed(eigenvalues, then)
        return then if before > 0 and self._smoothed(eigenvalues, now) > self.factor * before else None

    def _smoothed(self, eigenvalues: Sequence[float], index: int) -> float:
        side = self.window // 2
        return float(np.mean(eigenvalues[max(0, index - side) : index + side + 1]))


def dominant_eigenvalue(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], step: Callable[[], AbstractContextManager[None]]
) -> float:
    """The largest eigenvalue of the Hessian of a loss in some parameters.

    By Lanczos' method, from Hessian-vector products that are central differences of gradients, so layers need no second
    derivative. Every gradient sees the same random numbers, and the parameters are left as they were; buffers of the
    network (the running statistics of batch norms) are not.

    Args:
        loss: Gives the scalar loss at the parameters' current values.
        parameters: Leaves with a gradient. Those that the loss does not depend on have a Hessian of 0.
        step: Wraps each gradient: waits while a measurement runs.

    Raises:
        NonFiniteError: A gradient is NaN or infinite.
    """
    at = [parameter.detach().clone() for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]
    total = sum(sizes)

    def gradient(vector: Tensor, scale: float) -> Tensor:
        with torch.no_grad():
            for parameter, value, part in zip(parameters, at, torch.split(vector, sizes), strict=True):
                parameter.copy_(value + scale * part.view_as(parameter))
        with step(), seeding.seeded(0):
            found = torch.autograd.grad(loss(), list(parameters), allow_unused=True)
        parts = [
            torch.zeros_like(parameter) if part is None else part
            for part, parameter in zip(found, parameters, strict=True)
        ]
        return torch.cat([part.flatten() for part in parts])

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        direction = torch.from_numpy(vector).to(at[0])
        difference = (gradient(direction, STEP) - gradient(direction, -STEP)).double().cpu().numpy()
        if not np.isfinite(difference).all():
            raise NonFiniteError("a gradient of the architecture parameters around their values is not finite")
        found: NDArray[np.float64] = difference / (2 * STEP)
        return found

    try:
        return _largest(product, total)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, at, strict=True):
                parameter.copy_(value)


def _largest(product: Callable[[NDArray[np.float64]], NDArray[np.float64]], size: int) -> float:
    """The largest eigenvalue of a symmetric matrix of ``size`` rows that is known by its products with vectors.

    Lanczos' method, every vector made orthogonal to all before. SciPy's takes a multiple of the products here: each of
    its rounds fills its basis, and it asks for accuracy relative to the eigenvalue itself, which may be 0.
    """
    vector = np.random.default_rng(0).standard_normal(size)
    basis = np.empty((0, size))
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        vector = vector / np.linalg.norm(vector)
        basis = np.vstack([basis, vector])
        vector = product(vector)
        diagonal.append(float(basis[-1] @ vector))
        for _ in range(2):  # once leaves what rounding brings back
            vector = vector - basis.T @ (basis @ vector)
        rest = float(np.linalg.norm(vector))
        values, vectors = eigh_tridiagonal(diagonal, beside)
        # What the matrix makes of the eigenvector found, beside the eigenvalue times it.
        residual = rest * abs(float(vectors[-1, -1]))
        converged = len(diagonal) >= LEAST and residual <= TOLERANCE * float(np.abs(values).max())
        if converged or len(diagonal) == size or rest == 0.0:
            return float(values[-1])
        beside.append(rest)
