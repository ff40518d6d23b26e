"""Runtime ``torch_export``: the program of ``torch.export``, which torch runs without the model's own code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.export.torch_export import quiet, trace
from nasplat.runtimes.runtime import Session
from nasplat.runtimes.torch_eager import TorchSession


@dataclass(frozen=True)
class TorchExported:
    """A ``torch.export`` program as torch's interpreter runs it, operator by operator.

    The program is that of the ``model.pt2`` which nasplat exports (:class:`nasplat.export.TorchExport`): for any batch
    size, so each call checks its input's shape.
    """

    @property
    def name(self) -> str:
        """``torch_export``."""
        return "torch_export"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """The saved program. It is read by this study's own processes only: loading one can run code.

        Raises:
            UnsupportedError: The model cannot be traced, because its way depends on the values of its input, say.
        """
        # From a batch of 1 the tracer would conclude that there is no other.
        several = example if len(example) > 1 else example.expand(2, *example.shape[1:])
        file = io.BytesIO()
        try:
            with quiet(), torch.no_grad():
                torch.export.save(trace(model, several), file)
        except Exception as error:  # of any kind, as tracing runs the model's code
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(f"torch.export cannot trace {type(model).__name__}: {first}") from error
        return file.getvalue()

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """The program as a module."""
        with quiet():
            model = torch.export.load(io.BytesIO(file)).module()
        return TorchSession(model, example.contiguous(), threads)

    def facts(self) -> Mapping[str, str | int]:
        """Version of torch and the instructions that it uses."""
        return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}
