"""How far predicted costs can be trusted: predictions held against measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy import stats

from nasplat.errors import InvalidInputError


@dataclass(frozen=True)
class Accuracy:
    """Of predictions, on candidates that nothing was fitted to.

    Attributes:
        n: Candidates.
        kendall_tau: Kendall's tau-b between predicted and measured, -1 to 1; 0 where one of them never changes.
        spearman: Spearman's rank correlation, likewise.
        median_relative_error: Median of ``|predicted - measured| / measured``.
        p90_relative_error: The relative error that 90 % keep.
        calibration: Slope of the least-squares line of measured against predicted: 1 is right, below 1 the predictions
            exaggerate differences, above 1 they play them down. 1 where all predictions are equal.
        bias: Median of ``predicted / measured - 1``.
    """

    n: int
    kendall_tau: float
    spearman: float
    median_relative_error: float
    p90_relative_error: float
    calibration: float
    bias: float

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> Self:
        """Hold predictions against measurements of the same candidates.

        Args:
            predicted: Two or more finite numbers.
            measured: As many, in the same order.

        Raises:
            InvalidInputError: They are fewer, not as many, or not finite.
        """
        p, m = np.asarray(predicted, float), np.asarray(measured, float)
        if p.shape != m.shape or p.ndim != 1 or len(p) < 2 or not (np.isfinite(p).all() and np.isfinite(m).all()):
            raise InvalidInputError(
                f"accuracy needs two or more finite predictions and as many measurements; got {p.shape} and {m.shape}"
            )
        ratio = (p - m) / np.maximum(np.abs(m), 1e-12)
        # What differs by rounding is a tie, not an order.
        ranks = [np.round(x / max(np.abs(x).max(), 1e-300), 10) for x in (p, m)]
        changes = all(np.ptp(rank) > 0 for rank in ranks)
        return cls(
            n=len(p),
            kendall_tau=float(stats.kendalltau(*ranks).statistic) if changes else 0.0,
            spearman=float(stats.spearmanr(*ranks).statistic) if changes else 0.0,
            median_relative_error=float(np.median(np.abs(ratio))),
            p90_relative_error=float(np.quantile(np.abs(ratio), 0.9)),
            calibration=float(np.polyfit(p, m, 1)[0]) if np.ptp(p) > 0 else 1.0,
            bias=float(np.median(ratio)),
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The accuracy of a file.

        Raises:
            KeyError, TypeError: It is none.
            ValueError: A value is no finite number.
        """
        values = {str(name): float(value) for name, value in record.items()}
        if not all(map(math.isfinite, values.values())):
            raise ValueError("an accuracy that is not finite")
        return cls(n=int(values.pop("n")), **values)

    def metrics(self, metric: str) -> dict[str, float]:
        """As metrics of a record: ``prediction/latency_ms/kendall_tau`` and so on."""
        return {f"prediction/{metric}/{name}": float(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        """One line."""
        return (
            f"Spearman {self.spearman:.3f}, Kendall tau {self.kendall_tau:.3f}, relative error "
            f"{self.median_relative_error:.1%} (median) and {self.p90_relative_error:.1%} (90 % keep it), bias "
            f"{self.bias:+.1%}, calibration {self.calibration:.2f}, on {self.n} candidates"
        )
