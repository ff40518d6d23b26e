"""A meter that predicts: costs from a table instead of from measurements, checked against some that are measured."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.checks import is_number
from nasplat.cost.accuracy import Accuracy
from nasplat.cost.bench import Bench
from nasplat.cost.machine import processor
from nasplat.cost.meter import CostMeter, Measurement
from nasplat.cost.steps import StepTable
from nasplat.cost.table import CostTable
from nasplat.errors import InvalidInputError, NasplatWarning
from nasplat.space import SearchSpace

Table: TypeAlias = CostTable | StepTable
"""What predicts."""


def load_table(path: str | Path) -> Table:
    """Read a file of :meth:`CostTable.save` or :meth:`StepTable.save`.

    Raises:
        InvalidInputError: There is no such file, or it is neither.
    """
    try:
        record = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InvalidInputError(f"no table of costs at {path}; `nasplat profile-space` makes one") from error
    except (ValueError, OSError) as error:
        raise InvalidInputError(f"{path} is not a table of costs: {type(error).__name__}: {error}") from error
    kind = StepTable if isinstance(record, dict) and "nasplat_step_table" in record else CostTable
    return kind.load(path)


POOR_TAU = 0.5
"""Kendall's tau of a table below which its ranking is worth a warning."""


@dataclass(frozen=True)
class Predicted:
    """Predicts what a meter would measure, and measures instead where the prediction cannot be trusted.

    With a table of ``latency_ms`` every network gets ``latency_ms``, and ``latency_ms_mad``, the median absolute
    deviation of predictions from measurements (or, where it was measured, that of its readings). Networks that a
    prediction was made for get ``latency_ms_predicted``; those that were measured as well get
    ``latency_ms_prediction_error``, ``predicted / measured - 1``, and all that the meter gives. The facts of each
    network say which of the two its ``latency_ms`` is.

    A network is measured where the table's recorded error is above ``tolerance``, where the table lacks too much of it,
    and where it is among those that are ``checked``. :func:`prediction_quality` sums the checks of a study up.

    Attributes:
        meter: Measures: ``Latency("packed")``.
        table: Predicts; or the path of its file, which is read at once. What it holds is what the meter is known by.
        tolerance: Median relative error that is accepted, as the table records it.
        checked: Share of the networks that are measured as well, 0 to 1. Which ones follows from the architecture
            alone, so it is the same ones in each run.
    """

    meter: CostMeter
    table: Table | str | Path
    tolerance: float = 0.05
    checked: float = 0.05

    trained = False

    def __post_init__(self) -> None:
        if isinstance(self.table, str | Path):
            object.__setattr__(self, "table", load_table(self.table))
        if isinstance(self.table, type) or not isinstance(self.table, CostTable | StepTable):
            raise InvalidInputError(f"table is {self.table!r}; legal: a CostTable, a StepTable, or the path of a file")
        if isinstance(self.meter, type) or not isinstance(self.meter, CostMeter) or self.meter.trained:
            raise InvalidInputError(f"meter is {self.meter!r}; legal: one that measures untrained networks: Latency()")
        if self.metric not in self.meter.metrics:
            raise InvalidInputError(
                f"the table is of {self.metric!r}, which {self.meter!r} does not give; it gives "
                f"{', '.join(self.meter.metrics)}"
            )
        for name, most in (("tolerance", float("inf")), ("checked", 1.0)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= most:
                raise InvalidInputError(f"{name} is {value!r}; legal: a number from 0 up to {most:g}")
        wrong = [
            f"{name} {self._table.facts[name]} (the meter's: {mine})"
            for name, mine in self._settings().items()
            if name in self._table.facts and self._table.facts[name] != mine
        ]
        if wrong:
            raise InvalidInputError(f"the table of {self.metric} was measured with {', '.join(wrong)}; make one anew")

    @property
    def _table(self) -> Table:
        assert isinstance(self.table, CostTable | StepTable)
        return self.table

    def _settings(self) -> Mapping[str, object]:
        """What of the meter makes its numbers another quantity, by the names that the facts have."""
        found = {name: getattr(self.meter, name) for name in ("threads", "batch") if hasattr(self.meter, name)}
        runtime = getattr(self.meter, "runtime", "auto")
        if runtime != "auto":
            found["runtime"] = runtime if isinstance(runtime, str) else getattr(runtime, "name", runtime)
        return found

    # Where and with what it measures is its meter's.

    @property
    def on(self) -> str | None:
        """The machine that measures."""
        return getattr(self.meter, "on", None)

    @property
    def runtime(self) -> Any:
        """The runtime that is measured."""
        return getattr(self.meter, "runtime", None)

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return int(getattr(self.meter, "threads", 1))

    @property
    def metric(self) -> str:
        """What is predicted."""
        return self._table.metric

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that every network gets."""
        return (self.metric, f"{self.metric}_mad")

    @property
    def error(self) -> float:
        """The relative error that the table records; for a file that has no accuracy, the greatest that was seen."""
        table = self._table
        if table.accuracy is not None:
            return table.accuracy.median_relative_error
        assert isinstance(table, CostTable)
        return table.error

    def check_space(self, space: SearchSpace) -> None:
        """Refuse a table of another space, and warn of one that cannot be used as it is.

        Raises:
            InvalidInputError: The table is of another space.
        """
        table = self._table
        if table.space != space.identity:
            raise InvalidInputError(f"the table of {table.metric} is of {table.space}; the study's is {space.identity}")
        if self.error > self.tolerance:
            _warn(
                f"the table of {table.metric} has a median relative error of {self.error:.1%}, above the tolerance of "
                f"{self.tolerance:.1%}: every network is measured"
            )
        if table.accuracy is not None and table.accuracy.kendall_tau < POOR_TAU:
            _warn(
                f"the table of {table.metric} hardly ranks networks: Kendall tau {table.accuracy.kendall_tau:.2f} (1: "
                "perfect, 0: chance)"
            )
        made_on = table.facts.get("processor")
        if made_on is not None and made_on != processor() and getattr(self.meter, "on", None) is None:
            _warn(
                f"the table of {table.metric} was measured on {made_on}; this is {processor()}. Predictions are of "
                "that machine, measurements of this one"
            )

    def measure_architecture(
        self, architecture: Architecture | None, model: nn.Module, example: Tensor, bench: Bench
    ) -> Measurement:
        """Predict, and measure where that is not enough.

        Raises:
            InvalidInputError: The table is of another space or input.
        """
        table, metric = self._table, self.metric
        predicted = None
        if architecture is not None:
            with bench.training():
                predicted = table.predict(architecture, model, example)
        values = {} if predicted is None else {f"{metric}_predicted": predicted}
        doubtful = self.error > self.tolerance
        wanted = architecture is not None and self.is_checked(architecture)
        if predicted is not None and not doubtful and not wanted:
            values |= {metric: predicted, f"{metric}_mad": self.error * predicted}
            made = {name: value for name, value in table.facts.items() if name in ("runtime", "processor", "date")}
            return Measurement(values, facts={metric: {**made, "predicted": True, "expected_error": self.error}})
        measurement = self.meter.measure(model, example, bench)
        if predicted is not None:
            values[f"{metric}_prediction_error"] = predicted / measurement.values[metric] - 1
        values = {f"{metric}_mad": self.error * measurement.values[metric], **values, **measurement.values}
        facts = dict(measurement.facts)
        why = "unknown" if predicted is None else "error above tolerance" if doubtful else "checked"
        facts[metric] = {**facts.get(metric, {}), "predicted": False, "measured_because": why}
        return Measurement(values, measurement.samples, facts)

    def is_checked(self, architecture: Architecture) -> bool:
        """Whether a network is measured as well, by a hash of its architecture."""
        digest = hashlib.sha256(f"checked {architecture.id}".encode()).digest()
        return int.from_bytes(digest[:6], "big") < self.checked * 2**48


class _Measured(Protocol):
    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def copy_of(self) -> int | None: ...


def prediction_quality(trials: Iterable[_Measured], metric: str = "latency_ms") -> Accuracy | None:
    """How well predictions did in a study, over the networks that were measured as well.

    Args:
        trials: Of a study: ``result.trials``.
        metric: What was predicted.

    Returns:
        None where fewer than two networks were both predicted and measured.
    """
    pairs = [
        (trial.metrics[f"{metric}_predicted"], trial.metrics[metric])
        for trial in trials
        if f"{metric}_prediction_error" in trial.metrics and metric in trial.metrics and trial.copy_of is None
    ]
    return Accuracy.of([p for p, _ in pairs], [m for _, m in pairs]) if len(pairs) > 1 else None


@lru_cache(maxsize=64)
def _said(message: str) -> None:
    warnings.warn(message, NasplatWarning, stacklevel=4)


def _warn(message: str) -> None:
    """Say it once in a process."""
    _said(message)
