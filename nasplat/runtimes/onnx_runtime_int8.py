"""Runtime ``onnxruntime_int8``: ONNX Runtime on the CPU with 8-bit weights and activations."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.runtimes.onnx_runtime import PROVIDER, OnnxSession, to_onnx
from nasplat.runtimes.processor_flags import dot_product, instructions
from nasplat.runtimes.runtime import Session

INPUT = "input"

FLOAT_ONLY = (
    "BatchNormalization",
    "ConvTranspose",
    "CumSum",
    "EmbedLayerNormalization",
    "InstanceNormalization",
    "LayerNormalization",
)
"""Operators that ONNX Runtime quantises though its CPU provider computes them in float only. Rounding their input to 8
bits and back costs time (2 to 10 % of a network) and precision, and gains nothing."""


@dataclass(frozen=True)
class OnnxRuntimeInt8:
    """ONNX Runtime, statically quantised after training.

    Activations are 8 bits without sign, one scale a tensor, from the smallest and largest value that the example gives
    (calibration). Weights are 7 bits with sign, one scale a channel: with 8, the 16-bit sums of processors without
    VNNI saturate, and a file may run on another machine than wrote it. It costs no time. Quantised are all operators
    that have 8-bit kernels. Before each of the others, such as PReLU and a batch normalisation that follows no
    convolution, the numbers go back to float32. Networks with many of these, and most networks on processors without
    VNNI, are slower than in float32: that is the runtime, not the measurement.

    The rounding is that of training in float32, without quantisation-aware training. Latency does not depend on it,
    accuracy does.
    """

    @property
    def name(self) -> str:
        """``onnxruntime_int8``."""
        return "onnxruntime_int8"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """A quantised ONNX model for the example's shape, calibrated on the example.

        Raises:
            UnsupportedError: The model cannot be written as ONNX, or not be quantised.
        """
        return quantised(to_onnx(model, example), example)

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """A session.

        Raises:
            UnsupportedError: The ONNX Runtime that is installed cannot run the file.
        """
        return OnnxSession(file, example, threads)

    def facts(self) -> Mapping[str, str | int]:
        """Version of ONNX Runtime, instructions of the processor, and the 8-bit dot product that it has or has not."""
        return {
            "onnxruntime": version("onnxruntime"),
            "providers": PROVIDER,
            "instructions": instructions(),
            "dot_product": dot_product(),
            "weight_bits": 7,
            "activation_bits": 8,
        }


def quantised(file: bytes, example: Tensor) -> bytes:
    """A float32 ONNX model with one input, in int8.

    Args:
        file: What :func:`nasplat.runtimes.onnx_runtime.to_onnx` gave.
        example: Inputs that calibrate, ``(n, ...)``.

    Raises:
        UnsupportedError: ONNX Runtime cannot quantise it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Example(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter([{INPUT: example.detach().numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    try:
        with tempfile.TemporaryDirectory() as folder, _silent():
            prepared, target = Path(folder) / "prepared.onnx", Path(folder) / "target.onnx"
            # Folds scales and normalisations into convolutions where they follow one.
            quant_pre_process(onnx.load_from_string(file), prepared, skip_symbolic_shape=True)
            if not onnx.load(prepared).graph.input:
                raise ValueError("its output does not depend on its input, so there is nothing to quantise")
            quantize_static(
                onnx.load(prepared),
                target,
                Example(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry} - {*FLOAT_ONLY}),
            )
            return target.read_bytes()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"ONNX Runtime cannot quantise the model: {first}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """No advice on the screen from quantisation, which speaks through the root logger and gives it a handler."""
    root = logging.getLogger()
    handler = logging.NullHandler()

    def of_others(record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname

    root.addHandler(handler)
    root.addFilter(of_others)
    try:
        yield
    finally:
        root.removeFilter(of_others)
        root.removeHandler(handler)
