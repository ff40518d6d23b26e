"""The meter that counts instead of timing: parameters, operations, model bytes. Every built candidate has it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nasplat.cost.bench import Bench
from nasplat.cost.count import count
from nasplat.cost.meter import Measurement


@dataclass(frozen=True)
class Count:
    """Gives ``params``, ``macs``, ``bops``, ``flops``, ``ops`` and ``model_bytes`` of one example (``cost.count``).

    Attributes:
        elementwise: FLOPs of an element-wise operation per element; papers count 0, 1 or 2.
    """

    elementwise: int = 1

    trained = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values."""
        return ("params", "macs", "bops", "flops", "ops", "model_bytes")

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Count one example. What is not known how to count is named in the facts, never left out silently."""
        counts = count(model, example, elementwise=self.elementwise)
        values = {name: float(getattr(counts, name)) for name in self.metrics}
        return Measurement(values, facts={"uncounted": list(counts.uncounted)} if counts.uncounted else {})
