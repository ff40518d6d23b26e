"""Runtime ``torch``: the network as torch runs it while it trains, operator by operator."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import cloudpickle
import torch
from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.runtimes.runtime import Session


@dataclass(frozen=True)
class TorchEager:
    """Eager torch on the CPU, images with their channels last.

    A binary network computes with floats here, so that this is the time of its training graph.
    """

    @property
    def name(self) -> str:
        """``torch``."""
        return "torch"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """The module, pickled. It is read by this study's own processes only, never from a folder.

        Raises:
            UnsupportedError: The module cannot be pickled.
        """
        return pickled(model)

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """The module in evaluation mode."""
        layout = torch.channels_last if example.ndim == 4 else torch.contiguous_format
        return TorchSession(pickle.loads(file).eval(), example.contiguous(memory_format=layout), threads)

    def facts(self) -> Mapping[str, str | int]:
        """Version of torch and the instructions that it uses."""
        return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}


def pickled(model: nn.Module) -> bytes:
    """A module as this study's own processes send it to each other. Code that is not installed goes with it.

    Raises:
        UnsupportedError: It cannot be pickled.
    """
    try:
        file: bytes = cloudpickle.dumps(model)
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} cannot be pickled, so not be sent: {error}") from error
    return file


class TorchSession(Session):
    """A module of torch with its input in place.

    Args:
        model: In evaluation mode.
        x: Input, laid out as the module likes it.
        threads: Threads that compute, from now on in the whole process.
    """

    def __init__(self, model: nn.Module, x: Tensor, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model, self._x = model, x
        self._y: Tensor | None = None

    def run(self) -> None:
        """Compute without gradients."""
        with torch.inference_mode():
            self._y = self._model(self._x)

    def output(self) -> Tensor:
        """The last result."""
        assert self._y is not None
        return self._y.clone()
