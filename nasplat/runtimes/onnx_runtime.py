"""Runtime ``onnxruntime``: ONNX Runtime on the CPU, in float32."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.export.torch_export import quiet
from nasplat.runtimes.runtime import Session

OPSET = 18


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime with all its graph optimisations, input and output in place."""

    @property
    def name(self) -> str:
        """``onnxruntime``."""
        return "onnxruntime"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """An ONNX model for the example's shape.

        Raises:
            UnsupportedError: The exporter does not know an operator of the model.
        """
        return to_onnx(model, example)

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """A session."""
        return OnnxSession(file, example, threads)

    def facts(self) -> Mapping[str, str | int]:
        """Version of ONNX Runtime."""
        return {"onnxruntime": version("onnxruntime")}


def to_onnx(model: nn.Module, example: Tensor) -> bytes:
    """A model in ONNX for one shape of input.

    By tracing in TorchScript: on networks of the search spaces the exporter of ``torch.export`` takes 4 to 26 s, this
    one 0.1 to 1 s, and every candidate of a search is exported (``docs/decisions/0016``). The files that users get
    are written by the other one (:class:`nasplat.export.Onnx`).

    Raises:
        UnsupportedError: An operator is not known.
    """
    file: Any = io.BytesIO()  # the signature knows paths only
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (example,), file, dynamo=False, opset_version=OPSET, input_names=["input"],
                output_names=["output"],
            )  # fmt: skip
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"{type(model).__name__} cannot be written as ONNX: {first}") from error
    data: bytes = file.getvalue()
    return data


class OnnxSession(Session):
    """A session of ONNX Runtime with its input and output in place, so that a run is nothing but a run.

    Args:
        file: A serialised model with one input and one output.
        example: Input.
        threads: Threads that compute.
    """

    def __init__(self, file: bytes, example: Tensor, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        self._session: Any = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (given,), (made,) = self._session.get_inputs(), self._session.get_outputs()
        x = np.ascontiguousarray(example.numpy())
        (first,) = self._session.run([made.name], {given.name: x})
        self._input = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        self._output = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(first))
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(given.name, self._input)
        self._binding.bind_ortvalue_output(made.name, self._output)

    def run(self) -> None:
        """Compute, in the same memory each time."""
        self._session.run_with_iobinding(self._binding)

    def output(self) -> Tensor:
        """The last result."""
        return torch.from_numpy(np.array(self._output.numpy(), dtype=np.float32))
