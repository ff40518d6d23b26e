"""What measures a network: the protocols, and what a measurement holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.cost.bench import Bench
from nasplat.space import SearchSpace

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
"""``loss(outputs, targets)``, a scalar."""


@dataclass(frozen=True)
class Measurement:
    """What one meter found out about one network.

    Attributes:
        values: Finite numbers by metric name, the unit in the name (``latency_ms``, ``model_bytes``).
        samples: Single readings by metric name, in the unit of the metric, where there were several.
        facts: What describes the measurement, JSON values: runtime and version, threads, processor.
    """

    values: Mapping[str, float]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class CostMeter(Protocol):
    """Measures a built network. A frozen dataclass of plain parameters.

    Attributes:
        metrics: Names of the values that it gives.
        trained: Whether it needs trained weights. One that does not is asked before training, so that a candidate
            that breaks a hard limit never costs an epoch.
    """

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that it gives."""
        ...

    @property
    def trained(self) -> bool:
        """Whether it needs trained weights."""
        ...

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Measure, and leave the model as it was.

        Args:
            model: The built network, never a path through a supernet.
            example: One input ``(1, ...)`` on the model's device.
            bench: Where measuring is exclusive: time in ``with bench.measuring():``.
        """
        ...


@runtime_checkable
class BatchMeter(Protocol):
    """Measures a built network with a batch of training data and the task's loss. A frozen dataclass.

    Every candidate of a study, and of every other study on the same data, is measured with the same examples, so that
    what differs is the candidate.

    Attributes:
        metrics: Names of the values that it gives.
        trained: As of :class:`CostMeter`.
        examples: Examples that it needs.
    """

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that it gives."""
        ...

    @property
    def trained(self) -> bool:
        """Whether it needs trained weights."""
        ...

    @property
    def examples(self) -> int:
        """Examples that it needs. It gets fewer where the training data has fewer."""
        ...

    def measure_batch(self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss, bench: Bench) -> Measurement:
        """Measure, and leave the model as it was.

        Args:
            model: The built network, never a path through a supernet.
            x: Inputs ``(n, ...)`` on the model's device.
            y: Targets ``(n, ...)`` on the model's device.
            loss: The task's: ``loss(outputs, y)``.
            bench: Where measuring is exclusive. What measures no time computes in ``with bench.training():``, which
                waits while a measurement runs.
        """
        ...


@runtime_checkable
class ArchitectureMeter(Protocol):
    """Judges a built network by its architecture as well. A frozen dataclass of plain parameters.

    Attributes:
        metrics: Names of the values that it gives.
        trained: As of :class:`CostMeter`.
    """

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that it gives."""
        ...

    @property
    def trained(self) -> bool:
        """Whether it needs trained weights."""
        ...

    def check_space(self, space: SearchSpace) -> None:
        """Asked once, when a study is made.

        Raises:
            InvalidInputError: It has nothing to say of the architectures of this space.
        """
        ...

    def measure_architecture(
        self, architecture: Architecture | None, model: nn.Module, example: Tensor, bench: Bench
    ) -> Measurement:
        """Measure, and leave the model as it was.

        Args:
            architecture: Of the network; None for one that is of no space, a baseline for example.
            model: The built network, never a path through a supernet.
            example: One input ``(1, ...)`` on the model's device.
            bench: Where measuring is exclusive. What measures no time computes in ``with bench.training():``.
        """
        ...


Meter: TypeAlias = CostMeter | BatchMeter | ArchitectureMeter
"""What a study takes as a meter."""
