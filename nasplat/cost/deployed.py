"""A network as its file, ready for a job of measuring."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from nasplat.checks import is_whole
from nasplat.cost.bench import Bench
from nasplat.errors import InvalidInputError
from nasplat.runtimes.choose import check_runtime, choose
from nasplat.runtimes.runtime import Runtime


def _check_label(label: str, taken: Collection[str] = ()) -> None:
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


def check_deployment(meter: Any, *, taken: Collection[str] = ("suspect",), whole: Collection[str] = ()) -> None:
    """Refuse a meter of deployed networks whose fields make no sense.

    Args:
        meter: Has a ``runtime``, a ``label``, ``threads``, and ``on``: the machine.
        taken: Labels that have a meaning of their own.
        whole: Its other fields that are integers from 1 up.

    Raises:
        InvalidInputError: One of the fields is something else.
    """
    check_runtime(meter.runtime)
    _check_label(meter.label, taken)
    if meter.on is not None and (not isinstance(meter.on, str) or not meter.on):
        raise InvalidInputError(f"on is {meter.on!r}; legal: the name of a resource of a Ray node, or None")
    for name in ("threads", *whole):
        if not is_whole(getattr(meter, name)):
            raise InvalidInputError(f"{name} is {getattr(meter, name)!r}; legal: an integer from 1 up")


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
    own = in_evaluation(model)
    x = example.detach().cpu().repeat(batch, *([1] * (example.ndim - 1)))
    with bench.training(), torch.no_grad():
        return chosen, chosen.export(own, x), x


def in_evaluation(model: nn.Module) -> nn.Module:
    """The model on the CPU and in evaluation mode: itself if it is, for whoever does not change it; else a copy."""
    tensors = (*model.parameters(), *model.buffers())
    if not any(module.training for module in model.modules()) and all(tensor.is_cpu for tensor in tensors):
        return model
    return copy.deepcopy(model).cpu().eval()
