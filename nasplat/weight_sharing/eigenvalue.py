"""Early stopping of a differentiable search by the sharpness of its landscape.

Where DARTS collapses, the dominant eigenvalue of the Hessian of the validation loss in the architecture parameters
rises first (Zela et al. 2020, arXiv:1909.09656). The rule is that of the authors' code (RobustDARTS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from nasplat import seeding
from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError

STEP = 1e-2
"""L2 length of the step of the finite differences."""

TOLERANCE = 1e-2
"""Relative accuracy of the eigenvalue: it is averaged over a window, and compared with a factor of 1.3."""


@dataclass(frozen=True)
class EigenvalueStop:
    """When to stop, and to which record to go back.

    Every ``every`` epochs the dominant eigenvalue is recorded. The search stops when the mean of the last ``window``
    records exceeds ``factor`` times the mean ``lag`` records earlier, and goes back to the architecture parameters of
    that earlier record.

    Attributes:
        every: Epochs between two records, at least 1.
        window: Records that are averaged, at least 1. At the beginning there are fewer.
        lag: Records between the two means, at least 1.
        factor: Ratio of the means at which the search stops, above 1.
        not_before: First epoch at which it may stop.
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
        if not is_number(self.factor) or self.factor <= 1:
            raise InvalidInputError(f"factor is {self.factor!r}; legal: a number above 1")
        if self.batch_size is not None and not is_whole(self.batch_size, 2):
            raise InvalidInputError(f"batch_size is {self.batch_size!r}; None, or an integer from 2 up")

    def due(self, epoch: int) -> bool:
        """Whether the eigenvalue is recorded after this epoch, counted from 1."""
        return epoch % self.every == 0

    def go_back(self, eigenvalues: Sequence[float], epoch: int) -> int | None:
        """Index of the record to go back to; None where the search goes on.

        Args:
            eigenvalues: All records so far.
            epoch: Epochs so far.
        """
        now, then = len(eigenvalues) - 1, len(eigenvalues) - 1 - self.lag
        if epoch < self.not_before or then < 0:
            return None
        return then if self._mean(eigenvalues, now) > self.factor * self._mean(eigenvalues, then) else None

    def _mean(self, eigenvalues: Sequence[float], last: int) -> float:
        return float(np.mean(eigenvalues[max(0, last + 1 - self.window) : last + 1]))


def dominant_eigenvalue(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], step: Callable[[], AbstractContextManager[None]]
) -> float:
    """The largest eigenvalue of the Hessian of a loss in some parameters, by Lanczos' method.

    Hessian-vector products are central differences of gradients, so layers need no second derivative. Every gradient
    sees the same random numbers, and the parameters are left as they were; buffers of the network (the running
    statistics of batch norms) are not.

    Args:
        loss: Gives the scalar loss at the parameters' current values.
        parameters: Leaves with a gradient. Those that the loss does not depend on have a Hessian of 0.
        step: Wraps each gradient: waits while a measurement runs.
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
        flat = vector.reshape(-1)
        length = float(np.linalg.norm(flat))
        if length == 0.0:
            return np.zeros(total)
        direction = torch.from_numpy(flat / length).to(at[0])
        difference = gradient(direction, STEP) - gradient(direction, -STEP)
        return difference.double().cpu().numpy() * (length / (2 * STEP))

    try:
        if total < 3:  # Lanczos needs more dimensions than eigenvalues
            hessian = np.stack([product(row) for row in np.eye(total)])
            return float(np.linalg.eigvalsh((hessian + hessian.T) / 2)[-1])
        operator = LinearOperator((total, total), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(total)
        return float(eigsh(operator, k=1, which="LA", tol=TOLERANCE, v0=start, return_eigenvectors=False)[0])
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, at, strict=True):
                parameter.copy_(value)
