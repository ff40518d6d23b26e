"""Runtime ``onnxruntime``: ONNX Runtime on the CPU, in float32."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.export.torch_export import quiet
from nasplat.runtimes.processor_flags import instructions
from nasplat.runtimes.runtime import Session

OPSET = 18

PROVIDER = "CPUExecutionProvider"


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
        """A session.

        Raises:
            UnsupportedError: The ONNX Runtime that is installed cannot run the file.
        """
        return OnnxSession(file, example, threads)

    def facts(self) -> Mapping[str, str | int]:
        """Version of ONNX Runtime, its execution provider, and the widest vector instructions of the processor."""
        return {"onnxruntime": version("onnxruntime"), "providers": PROVIDER, "instructions": instructions()}


def to_onnx(model: nn.Module, example: Tensor) -> bytes:
    """A model in ONNX for one shape of input.

    By tracing in TorchScript: on networks of the search spaces the exporter of ``torch.export`` takes 4 to 26 s, this
    one 0.1 to 1 s, and every candidate of a search is exported (``docs/decisions/0016``). The files that users get
    are written by the other one (:class:`nasplat.export.Onnx`), which also steps in here where tracing fails, or where
    torch has no such exporter any more.

    Raises:
        UnsupportedError: Neither exporter can write the model.
    """
    with quiet(), torch.no_grad():
        try:
            return _traced(model, example)
        except Exception:  # of any kind, as exporters raise
            try:
                return _exported(model, example)
            except Exception as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UnsupportedError(f"{type(model).__name__} cannot be written as ONNX: {first}") from error


def _traced(model: nn.Module, example: Tensor) -> bytes:
    file: Any = io.BytesIO()  # the signature knows paths only
    torch.onnx.export(
        model, (example,), file, dynamo=False, opset_version=OPSET, input_names=["input"], output_names=["output"]
    )
    data: bytes = file.getvalue()
    return data


def _exported(model: nn.Module, example: Tensor) -> bytes:
    program = torch.onnx.export(
        model, (example,), dynamo=True, verbose=False, opset_version=OPSET, input_names=["input"],
        output_names=["output"],
    )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    data: bytes = program.model_proto.SerializeToString()
    return data


def input_names(session: Any) -> list[str]:
    """The name of a network's input: none where what it gives does not depend on it, as without any way through a cell.

    Args:
        session: An ``onnxruntime.InferenceSession``.

    Raises:
        ValueError: There are several.
    """
    names = [one.name for one in session.get_inputs()]
    if len(names) > 1:
        raise ValueError(f"it has the inputs {', '.join(names)}; legal: one")
    return names


class OnnxSession(Session):
    """A session of ONNX Runtime with its input and output in place, so that a run is nothing but a run.

    Args:
        file: A serialised model with one input, or none where its output is constant, and one output.
        example: Input.
        threads: Threads that compute.

    Raises:
        UnsupportedError: ONNX Runtime cannot run the model.
    """

    def __init__(self, file: bytes, example: Tensor, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        x = np.ascontiguousarray(example.detach().numpy())
        try:
            self._session: Any = onnxruntime.InferenceSession(file, options, providers=[PROVIDER])
            given, (made,) = input_names(self._session), self._session.get_outputs()
            (first,) = self._session.run([made.name], dict.fromkeys(given, x))
        except Exception as error:  # its errors have no class of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(f"ONNX Runtime {onnxruntime.__version__} cannot run the file: {reason}") from error
        self._input = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        self._output = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(first))
        self._binding = self._session.io_binding()
        for name in given:
            self._binding.bind_ortvalue_input(name, self._input)
        self._binding.bind_ortvalue_output(made.name, self._output)

    def run(self) -> None:
        """Compute, in the same memory each time."""
        self._session.run_with_iobinding(self._binding)

    def output(self) -> Tensor:
        """The last result."""
        return torch.from_numpy(np.array(self._output.numpy(), dtype=np.float32))
