"""The meter that counts instead of timing: parameters, operations, model bytes. Every built candidate has it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from nasplat.cost.bench import Bench
from nasplat.cost.count import count
from nasplat.cost.meter import Measurement
from nasplat.errors import NasplatWarning

COUNTED = ("params", "macs", "bops", "flops", "ops", "model_bytes")
"""Fields of :class:`~nasplat.cost.count.Counts` that are metrics."""


@dataclass(frozen=True)
class Count:
    """Gives ``params``, ``macs``, ``bops``, ``flops``, ``ops`` and ``model_bytes`` of one example (``cost.count``).

    ``uncounted_ops`` is the number of operators that there is no rule for, each in each module once; 0: nothing was
    left out. Where it is not 0, a warning and the facts name them, and ``at_most("uncounted_ops", 0)`` keeps such
    networks out of a search.

    Attributes:
        elementwise: FLOPs of an element-wise operation per element; papers count 0, 1 or 2.
    """

    elementwise: int = 1

    trained = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values."""
        return (*COUNTED, "uncounted_ops")

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Count one example. What is not known how to count is named in the facts, never left out silently."""
        counts = count(model, example, elementwise=self.elementwise)
        values = {name: float(getattr(counts, name)) for name in COUNTED}
        values["uncounted_ops"] = float(len(counts.uncounted))
        if not counts.uncounted:
            return Measurement(values)
        operators = sorted({one.partition(": ")[2] for one in counts.uncounted})
        warnings.warn(
            f"flops and ops leave out {', '.join(operators)}, which there is no rule to count by; count_modules shows "
            "where they are",
            NasplatWarning,
            stacklevel=2,
        )
        return Measurement(values, facts={"uncounted": list(counts.uncounted)})
