"""What ``packed.py`` compares with: torch, torch.compile and ONNX Runtime, in float32 and int8.

Of a layer, all of these compute the convolution and nothing else, but for ``ORT int8 QDQ``, which goes from float32 to
float32. Quantised are activations to 8 bits without sign, for the whole tensor, and weights to 8 bits with sign, for
each channel, both from the smallest and largest value seen on random normal inputs. Weights use 7 of their 8 bits:
without VNNI, sums of products would saturate otherwise. It costs no time.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch._inductor.config
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from nasplat.export import Onnx

Call = Callable[[], object]
"""One run of a subject on its input. It returns the result: a tensor, or something that :func:`result` reads."""

CALIBRATION = 4
"""Random inputs that quantisation sees."""


class Session:
    """A model in ONNX Runtime with its input and output in place, so that a call is just a run.

    Args:
        model: A serialised ONNX model with one input and one output.
        x: The input.
        threads: Threads that compute.
    """

    def __init__(self, model: bytes, x: np.ndarray, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (given,), (made,) = session.get_inputs(), session.get_outputs()
        (first,) = session.run([made.name], {given.name: x})
        self._output = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(first))
        self._input = onnxruntime.OrtValue.ortvalue_from_numpy(x)
        self._session, self._binding = session, session.io_binding()
        self._binding.bind_ortvalue_input(given.name, self._input)
        self._binding.bind_ortvalue_output(made.name, self._output)

    def __call__(self) -> np.ndarray:
        """Run. The same memory each time."""
        self._session.run_with_iobinding(self._binding)
        output: np.ndarray = self._output.numpy()
        return output


def eager(model: nn.Module, x: Tensor, *, channels_last: bool) -> Call:
    """The model as it is, in evaluation mode, with its kernels laid out as its input. Changes the model."""
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters():
            if parameter.ndim >= 4:
                # The last three dimensions are channels and the kernel's sides; several kernels have one more in front.
                parameter.data = parameter.data.movedim(-3, -1).contiguous().movedim(-1, -3)

    def call() -> Tensor:
        with torch.inference_mode():
            y: Tensor = model(x)
        return y

    return call


def compiled(model: nn.Module, x: Tensor) -> Call:
    """The model through torch.compile for this very shape, weights frozen, so that they are packed and folded once."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True), torch.no_grad(), _quiet():
        run = torch.compile(model, dynamic=False)
        run(x)

    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = run(x)
        return y

    return call


class LayerBaselines:
    """Everything that computes one convolution without bias.

    Args:
        conv: The convolution, square and of stride 1.
        side: Height and width of its input, in pixels.
        seed: Of the inputs that quantisation sees.
    """

    def __init__(self, conv: nn.Conv2d, side: int, seed: int) -> None:
        self.conv, self.side = conv, side
        self._float = convolution(conv)
        shape = (1, conv.in_channels, side, side)
        self._qdq = quantised(self._float, shape, seed, QuantFormat.QDQ)
        self._linear = _Quantised(quantised(self._float, shape, seed, QuantFormat.QOperator))

    def float32(self, x: Tensor, threads: int, *, compile: bool) -> dict[str, Call]:
        """By name, on an input ``(n, in_channels, side, side)``. Called in the state that will be measured in."""
        calls: dict[str, Call] = {
            "torch": eager(_copy(self.conv), x, channels_last=False),
            "torch cl": eager(_copy(self.conv), x, channels_last=True),
        }
        if compile:
            calls["compile"] = compiled(_copy(self.conv), x)
        calls["ORT"] = Session(self._float, x.numpy(), threads)
        return calls

    def int8(self, x: Tensor, threads: int) -> dict[str, Call]:
        """Likewise. All but the first start from 8 bits and end there."""
        linear = self._linear
        held = linear.quantise(x.numpy())
        nhwc = np.ascontiguousarray(held.transpose(0, 2, 3, 1))
        return {
            "QDQ": Session(self._qdq, x.numpy(), threads),
            "QLinear": Session(linear.alone(self.conv, channels_last=False), held, threads),
            "QLinear cl": Session(linear.alone(self.conv, channels_last=True), nhwc, threads),
            "torch": linear.in_torch(self.conv, held),
        }

    def real(self, name: str, result: Any) -> Tensor:
        """The result of an int8 call as real numbers ``(n, out_channels, side, side)``."""
        if isinstance(result, Tensor):
            return result.dequantize()
        if name == "QDQ":
            return torch.from_numpy(result.copy())
        if name == "QLinear cl":
            result = result.transpose(0, 3, 1, 2)
        return torch.from_numpy(self._linear.dequantise(result))


class _Quantised:
    """The one QLinearConv of a quantised model, and its constants."""

    def __init__(self, model: bytes) -> None:
        graph = onnx.load_from_string(model).graph
        (node,) = (node for node in graph.node if node.op_type == "QLinearConv")
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._names = list(node.input)
        names = ("x_scale", "x_zero", "weight", "weight_scale", "weight_zero", "y_scale", "y_zero")
        self.values = {
            name: numpy_helper.to_array(self._tensors[held]) for name, held in zip(names, self._names[1:], strict=True)
        }

    def quantise(self, x: np.ndarray) -> np.ndarray:
        """The input as the convolution reads it."""
        held: np.ndarray = (np.rint(x / self.values["x_scale"]) + self.values["x_zero"]).clip(0, 255).astype(np.uint8)
        return held

    def dequantise(self, y: np.ndarray) -> np.ndarray:
        """The output as real numbers."""
        real: np.ndarray = (y.astype(np.float32) - self.values["y_zero"]) * self.values["y_scale"]
        return real.astype(np.float32)

    def alone(self, conv: nn.Conv2d, *, channels_last: bool) -> bytes:
        """A model of the convolution alone, from 8 bits to 8 bits."""
        # ONNX Runtime's own operator with the channels last is what its optimiser uses inside larger graphs.
        own = {"domain": "com.microsoft", "channels_last": 1} if channels_last else {}
        node = helper.make_node("QLinearConv", ["x", *self._names[1:]], ["y"], **_attributes(conv), **own)
        tensors = [self._tensors[name] for name in dict.fromkeys(self._names[1:])]
        return _model(node, tensors, TensorProto.UINT8)

    def in_torch(self, conv: nn.Conv2d, held: np.ndarray) -> Call:
        """The quantised convolution of torch with the same constants, channels last, the only layout it has."""
        v = self.values
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(
                torch.from_numpy(v["weight"].copy()),
                torch.from_numpy(v["weight_scale"].astype(np.float64)),
                torch.zeros(conv.out_channels, dtype=torch.long),
                0,
            )
            packed = torch.ops.quantized.conv2d_prepack(
                weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
            )
            x = torch._make_per_tensor_quantized_tensor(
                torch.from_numpy(held), float(v["x_scale"]), int(v["x_zero"])
            ).contiguous(memory_format=torch.channels_last)
        scale, zero = float(v["y_scale"]), int(v["y_zero"])

        def call() -> Tensor:
            with torch.inference_mode():
                y: Tensor = torch.ops.quantized.conv2d(x, packed, scale, zero)
            return y

        return call


def convolution(conv: nn.Conv2d) -> bytes:
    """The convolution, without bias, in ONNX, for any batch size, height and width."""
    node = helper.make_node("Conv", ["x", "weight"], ["y"], **_attributes(conv))
    weight = numpy_helper.from_array(conv.weight.detach().numpy(), "weight")
    return _model(node, [weight], TensorProto.FLOAT)


def exported(model: nn.Module, example: Tensor) -> bytes:
    """A model in ONNX, for any batch size, written as the platform writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        Onnx().write(model, example.expand(2, *example.shape[1:]), path)
        return path.read_bytes()


def quantised(model: bytes, shape: Sequence[int], seed: int, form: QuantFormat) -> bytes:
    """The model in int8, static, calibrated on random normal inputs.

    Args:
        model: In ONNX, float32, one input.
        shape: Of the input.
        seed: Of the random inputs.
        form: With QLinear operators, or with pairs of quantise and dequantise around float operators, which ONNX
            Runtime turns into such operators where it has them.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, prepared, target = (Path(folder) / name for name in ("source.onnx", "prepared.onnx", "target.onnx"))
        source.write_bytes(model)
        # Folds scales and normalisations into convolutions where they follow one.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            _Random(onnx.load_from_string(model).graph.input[0].name, shape, seed),
            quant_format=form,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


class _Random(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, shape: Sequence[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._inputs = iter([{name: rng.standard_normal(shape, dtype=np.float32)} for _ in range(CALIBRATION)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input."""
        return next(self._inputs, None)


def _copy(conv: nn.Conv2d) -> nn.Conv2d:
    kernel, padding, dilation = conv.kernel_size[0], int(conv.padding[0]), conv.dilation[0]
    same = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, padding=padding, dilation=dilation, groups=conv.groups, bias=False
    )
    same.load_state_dict({"weight": conv.weight.detach().clone()})
    return same.eval().requires_grad_(False)


def _attributes(conv: nn.Conv2d) -> Mapping[str, Any]:
    return {
        "kernel_shape": list(conv.kernel_size),
        "strides": list(conv.stride),
        "pads": [*conv.padding, *conv.padding],
        "dilations": list(conv.dilation),
        "group": conv.groups,
    }


def _model(node: onnx.NodeProto, tensors: Sequence[TensorProto], dtype: int) -> bytes:
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", dtype, ["n", None, None, None])],
        [helper.make_tensor_value_info("y", dtype, ["n", None, None, None])],
        tensors,
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    serialised: bytes = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    return serialised


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice from quantisation and compilation on the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
