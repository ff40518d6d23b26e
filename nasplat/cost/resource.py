"""A resource in the loss of a differentiable search: architectures are pulled towards a target cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nasplat.cost.table import CostTable
from nasplat.errors import InvalidInputError
from nasplat.space import Relaxed


@dataclass(frozen=True)
class Resource:
    """A term that is added to the loss of the architecture weights, from the expected cost F of a table.

    Attributes:
        table: Gives F. Counted (``CostTable.counted(space, example, "ops")``) or measured.
        target: The cost wished for, in the table's unit, positive.
        weight: Factor lambda, at least 0.
        form: ``log``: ``lambda * log(F / target)``, which always pulls downwards. ``hinge``:
            ``lambda * max(0, F / target - 1)``, which is silent below the target.
    """

    table: CostTable
    target: float
    weight: float = 0.1
    form: Literal["log", "hinge"] = "log"

    def __post_init__(self) -> None:
        if not isinstance(self.table, CostTable):
            hint = "; its method table(space, example) makes one" if hasattr(self.table, "table") else ""
            got = type(self.table).__name__
            raise InvalidInputError(f"table is a {got}; legal: a CostTable, which adds up choices{hint}")
        if not (self.target > 0 and math.isfinite(self.target)) or not self.weight >= 0:
            raise InvalidInputError(
                f"target is {self.target}, weight {self.weight}; a positive cost in {self.table.metric}, and at least 0"
            )
        if self.form not in ("log", "hinge"):
            raise InvalidInputError(f"form is {self.form!r}; legal: 'log', 'hinge'")

    def loss(self, relaxed: Relaxed) -> Tensor:
        """The term, a scalar with a gradient for the weights in ``relaxed``.

        Args:
            relaxed: Per choice a weight per option.
        """
        ratio = self.table.expected(relaxed) / self.target
        if self.form == "log":
            # Least squares can leave rounding below zero where a cost is nearly nothing.
            return self.weight * torch.log(ratio.clamp_min(1e-12))
        return self.weight * torch.clamp_min(ratio - 1, 0)
