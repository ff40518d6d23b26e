"""A network as its file, ready for a job of measuring."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from nasplat.cost.bench import Bench
from nasplat.errors import InvalidInputError
from nasplat.runtimes.choose import choose
from nasplat.runtimes.runtime import Runtime


def check_label(label: str, taken: Collection[str] = ()) -> None:
    """Refuse a label that cannot be part of a metric's name.

    Args:
        label: Empty, or letters, digits, ``_``, ``-`` and ``.``.
        taken: Endings that have a meaning of their own.

    Raises:
        InvalidInputError: It is something else.
    """
    if not isinstance(label, str) or not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_.\-]*)?", label) or label in taken:
        raise InvalidInputError(
            f"label is {label!r}; legal: letters, digits, '_', '-' and '.', beginning with a letter or digit"
            + (f"; not {', '.join(taken)}" if taken else "")
        )


def check_machine(on: str | None) -> None:
    """Refuse what names no machine.

    Raises:
        InvalidInputError: It is neither None nor a name.
    """
    if on is not None and (not isinstance(on, str) or not on):
        raise InvalidInputError(f"on is {on!r}; legal: the name of a resource of a Ray node, or None")


def deployed(
    runtime: Runtime | str, model: nn.Module, example: Tensor, batch: int, bench: Bench
) -> tuple[Runtime, bytes, Tensor]:
    """Export a network as it is deployed.

    Args:
        runtime: A runtime, the name of one, or ``auto``.
        model: Stays as it was.
        example: Shape ``(1, ...)``, on the model's device.
        batch: Examples a pass.
        bench: Exporting is heavy work, which waits while it measures.

    Returns:
        The runtime, the file, and the input ``(batch, ...)`` on the CPU.

    Raises:
        UnsupportedError: The runtime has not what the model needs; the message names it.
    """
    chosen = choose(runtime, model, example)
    own = copy.deepcopy(model).cpu().eval()
    x = example.detach().cpu().repeat(batch, *([1] * (example.ndim - 1)))
    with bench.training(), torch.no_grad():
        return chosen, chosen.export(own, x), x
