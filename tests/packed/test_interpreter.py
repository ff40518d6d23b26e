"""The interpreter against PyTorch, operation by operation, and against what a value means by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Build, bits, graph, images, programs, reals, seeds, single, thresholds, window
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nasplat.errors import InvalidInputError
from nasplat.nn import BinaryConv2d
from nasplat.packed import interpreter
from nasplat.packed.graph import (
    INPUT,
    KINDS,
    Add,
    Affine,
    Argmax,
    BinaryConv,
    Concat,
    Conv,
    Linear,
    Mean,
    Operation,
    Pool,
    Program,
    Shuffle,
    Window,
)
from nasplat.packed.interpreter import Interpreter

EXACT = {"binary_conv", "pool", "add", "concat", "shuffle", "argmax"}


def seen(x: Tensor, window: Window) -> Tensor:
    """What a window without padding has to look at: cropped, or with zeros around it."""
    ends = [
        (size - 1) * window.stride + (kernel - 1) * window.dilation + 1 - padding - side
        for side, size, kernel, padding in zip(x.shape[1:], window.size, window.kernel, window.padding, strict=True)
    ]
    margin = 40
    canvas = F.pad(x, (margin,) * 4)
    rows, columns = (
        slice(margin - padding, margin + side + end)
        for padding, side, end in zip(window.padding, x.shape[1:], ends, strict=True)
    )
    return canvas[:, rows, columns]


def column(row: np.ndarray | None, default: float) -> Tensor:
    return torch.full((1, 1, 1), default) if row is None else torch.from_numpy(row)[:, None, None]


def activate(y: Tensor, slope: np.ndarray | None) -> Tensor:
    return y if slope is None else F.prelu(y[None], torch.from_numpy(slope))[0]


def signs(operation: BinaryConv, channels: int, expert: int) -> Tensor:
    """The kernel of one expert as PyTorch has it."""
    row = channels // operation.groups
    flat = np.unpackbits(operation.weight, axis=1, bitorder="little", count=operation.window.taps * row)
    weight = (
        torch.from_numpy(flat).float().reshape(operation.experts, operation.channels, *operation.window.kernel, row)
    )
    return weight[expert].permute(0, 3, 1, 2) * 2 - 1


def expected(operation: Operation, inputs: list[Tensor]) -> Tensor:
    """The operation by PyTorch's own functions."""
    x = inputs[0]
    match operation:
        case BinaryConv(window=w):
            pick = int(inputs[1]) if operation.pick is not None else 0
            bipolar = torch.where(x >= column(operation.threshold, 0), 1.0, -1.0)
            weight = signs(operation, len(x), pick)
            y = F.conv2d(seen(bipolar, w)[None], weight, None, w.stride, 0, w.dilation, operation.groups)[0]
            y = y * column(operation.scale, 1)
            return activate(y * inputs[-1] if operation.factor is not None else y, operation.slope)
        case Conv(window=w):
            weight = torch.from_numpy(operation.weight)
            y = F.conv2d(seen(x, w)[None], weight, None, w.stride, 0, w.dilation, operation.groups)[0]
            return activate(y * column(operation.scale, 1) + column(operation.shift, 0), operation.slope)
        case Linear():
            shift = None if operation.shift is None else torch.from_numpy(operation.shift)
            y = F.linear(x.reshape(1, -1), torch.from_numpy(operation.weight), shift).reshape(-1, 1, 1)
            return {"none": y, "relu": y.relu(), "sigmoid": y.sigmoid()}[operation.activation]
        case Pool(window=w):
            return pooled(operation, x, w)
        case Mean():
            return x.mean(dim=(1, 2), keepdim=True)
        case Affine():
            return activate(x * column(operation.scale, 1) + column(operation.shift, 0), operation.slope)
        case Add():
            return x + inputs[1]
        case Concat():
            return torch.cat(inputs)
        case Shuffle():
            return F.channel_shuffle(x[None], operation.groups)[0] if operation.groups > 1 else x
        case Argmax():
            return x.reshape(-1).argmax()
    raise AssertionError(operation)


def pooled(operation: Pool, x: Tensor, w: Window) -> Tensor:
    """By unfolding. The sum goes tap by tap, as ``avg_pool2d`` does; PyTorch's own refuses most of these windows."""
    empty = -torch.inf if operation.mode == "max" else torch.nan
    canvas = F.pad(x, (20,) * 4, value=empty)
    start = [20 - padding for padding in w.padding]
    taps = [
        canvas[
            :,
            start[0] + i : start[0] + i + (w.size[0] - 1) * w.stride + 1 : w.stride,
            start[1] + j : start[1] + j + (w.size[1] - 1) * w.stride + 1 : w.stride,
        ]
        for i in range(w.kernel[0])
        for j in range(w.kernel[1])
    ]
    if operation.mode == "max":
        return torch.stack(taps).amax(dim=0)
    total, inside = torch.zeros_like(taps[0]), torch.zeros_like(taps[0])
    for tap in taps:
        total = total + tap.nan_to_num(0.0)
        inside = inside + (~tap.isnan()).float()
    return total / (w.taps if operation.count_padding else inside)


def check(program: Program, x: np.ndarray) -> None:
    """Every operation of a run against PyTorch on the same inputs, and the run against the trace."""
    engine = Interpreter(program)
    for example in x:
        values = {INPUT: example}
        for step, value in engine.trace({INPUT: example}):
            values[step.name] = value
        for operation in program.operations:
            inputs = [torch.from_numpy(values[name]) for name in operation.inputs]
            got, wanted = torch.from_numpy(values[operation.name]), expected(operation, inputs)
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            if operation.KIND in EXACT:
                assert torch.equal(got, wanted), operation
            else:
                assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5), operation
    wanted = np.stack([run_by_trace(engine, example) for example in x])
    for threads in (1, 3):
        got = engine.run(x, threads)
        assert got.dtype == np.float32
        assert np.array_equal(got, wanted)


def run_by_trace(engine: Interpreter, example: np.ndarray) -> np.ndarray:
    values = {INPUT: example, **{step.name: value for step, value in engine.trace({INPUT: example})}}
    return values[engine.program.output]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(seed=seeds)
def test_an_operation_equals_pytorch(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = single(rng, kind)
    check(program, images(rng, program.input_shape, 2))


@settings(deadline=None, max_examples=300)
@given(seed=seeds)
def test_a_binary_convolution_equals_pytorch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = single(rng, "binary_conv")
    check(program, images(rng, program.input_shape, 1))


@settings(deadline=None, max_examples=60)
@given(seed=seeds)
def test_a_graph_equals_pytorch_operation_by_operation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = graph(rng)
    check(program, images(rng, program.input_shape, 2))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, mode=st.sampled_from(["max", "average"]), ceil=st.booleans(), count=st.booleans())
def test_pools_equal_those_of_pytorch(seed: int, mode: str, ceil: bool, count: bool) -> None:
    """With ``count_include_pad``, PyTorch counts of a window of ``ceil_mode`` only what lies in the padded image.

    A program's pool counts all taps, so the two agree where windows end within the padding.
    """
    rng = np.random.default_rng(seed)
    kernel = (int(rng.integers(1, 6)), int(rng.integers(1, 6)))
    padding = (int(rng.integers(0, kernel[0] // 2 + 1)), int(rng.integers(0, kernel[1] // 2 + 1)))
    stride, side = int(rng.integers(1, 4)), int(rng.integers(5, 12))
    x = torch.from_numpy(images(rng, (5, side, side), 1))
    count = count and mode == "average" and not ceil
    if mode == "max":
        wanted = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    else:
        wanted = F.avg_pool2d(x, kernel, stride, padding, ceil_mode=ceil, count_include_pad=count)
    size = (wanted.shape[2], wanted.shape[3])
    pool = Pool(name="y", x=INPUT, mode=mode, window=Window(kernel, size, stride, 1, padding), count_padding=count)  # type: ignore[arg-type]
    got = Interpreter(Program((5, side, side), (pool,), "y", flat=False)).run(x.numpy())
    assert torch.equal(torch.from_numpy(got), wanted)


def test_a_binary_layer_and_its_weights() -> None:
    """The layer that is trained: signs of its input, signs of its weights, zero padding."""
    torch.manual_seed(0)
    layer = BinaryConv2d(6, 4, 3, stride=2, padding=1, groups=2)
    nn.init.normal_(layer.scale)
    x = torch.randn(3, 6, 9, 9)
    x[:, :, ::2] = 0.0
    with torch.no_grad():
        wanted = layer(x)
    rows = (layer.weight.detach() >= 0).permute(0, 2, 3, 1).reshape(4, -1).numpy()
    conv = BinaryConv(
        name="y",
        x=INPUT,
        channels=4,
        groups=2,
        window=Window((3, 3), (5, 5), 2, 1, (1, 1)),
        threshold=np.zeros(6, np.float32),
        weight=np.packbits(rows, axis=1, bitorder="little"),
        scale=layer.scale.detach().numpy(),
    )
    got = Interpreter(Program((6, 9, 9), (conv,), "y", flat=False)).run(x.numpy())
    assert torch.equal(torch.from_numpy(got), wanted)


def test_thresholds_at_infinity_and_at_the_value_itself() -> None:
    tiny = np.float32(1e-45)
    x = np.float32([0, 0, -0.0, tiny, np.inf, -np.inf, np.nan]).reshape(7, 1, 1)
    threshold = np.float32([np.inf, -np.inf, 0, tiny, np.inf, -np.inf, -np.inf])
    conv = BinaryConv(
        name="y",
        x=INPUT,
        channels=7,
        groups=7,
        window=Window((1, 1), (1, 1)),
        threshold=threshold,
        weight=np.ones((7, 1), np.uint8),
        scale=np.full(7, 2, np.float32),
    )
    got = Interpreter(Program((7, 1, 1), (conv,), "y")).run(x[None])
    assert got.reshape(-1).tolist() == [-2, 2, 2, 2, 2, 2, -2]


def test_order_of_scale_factor_and_slope() -> None:
    """All taps outside but one: the sum is 1 or -1, times the scale, times the factor, and then the slope."""
    build = Build(np.random.default_rng(0), (1, 1, 1))
    factor = build.linear(INPUT, 1, "sigmoid")
    build.operations[0] = replace(build.operations[0], weight=np.zeros((1, 1), np.float32), shift=None)
    conv = BinaryConv(
        name="y",
        x=INPUT,
        channels=1,
        groups=1,
        window=Window((3, 3), (1, 1), 1, 1, (1, 1)),
        factor=factor,
        threshold=np.zeros(1, np.float32),
        weight=np.array([[255, 1]], np.uint8),
        scale=np.full(1, -3, np.float32),
        slope=np.full(1, 0.25, np.float32),
    )
    engine = Interpreter(Program((1, 1, 1), (build.operations[0], conv), "y"))
    assert engine.run(np.full((1, 1, 1, 1), 5, np.float32)).item() == -3 * 0.5 * 0.25
    assert engine.run(np.full((1, 1, 1, 1), -5, np.float32)).item() == 3 * 0.5


def test_an_output_that_sees_nothing_is_zero() -> None:
    build = Build(np.random.default_rng(0), (3, 2, 2))
    build.binary_conv(INPUT, 1, 4, Window((1, 1), (3, 3), 1, 1, (-2, 0)))
    x = images(np.random.default_rng(1), (3, 2, 2), 1)
    y = Interpreter(build.program()).run(x)[0]
    assert not y.any()


@pytest.mark.parametrize("block", [1, 50, 10_000])
def test_the_size_of_blocks_does_not_change_a_bit(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    build = Build(rng, (70, 13, 11))
    x = build.binary_conv(INPUT, 2, 20, Window((3, 5), (13, 11), 1, 2, (2, 4)))
    build.conv(x, 4, 8, window(rng, (13, 11)))
    program, batch = build.program(), images(rng, (70, 13, 11), 2)
    wanted = Interpreter(program).run(batch)
    monkeypatch.setattr(interpreter, "_BLOCK", block)
    got = Interpreter(program).run(batch)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    first = Program(program.input_shape, program.operations[:1], x, flat=False)
    blocks = Interpreter(first).run(batch)
    monkeypatch.undo()
    assert np.array_equal(blocks, Interpreter(first).run(batch))


@settings(deadline=None, max_examples=30)
@given(program=programs, seed=seeds)
def test_a_trace_reads_given_values(program: Program, seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine = Interpreter(program)
    x = images(rng, program.input_shape, 1)[0]
    made = {step.name: value for step, value in engine.trace({INPUT: x})}
    given_values = {
        name: value if value.ndim == 0 else images(rng, value.shape, 1)[0]
        for name, value in ({INPUT: x} | made).items()
    }
    for (step, value), operation in zip(engine.trace(given_values), program.operations, strict=True):
        assert step.operations == (operation.name,)
        assert (step.kind, step.inputs, step.output) == (operation.KIND, operation.inputs, operation.name)
        wanted = expected(operation, [torch.from_numpy(given_values[name]) for name in step.inputs])
        assert torch.allclose(torch.from_numpy(value), wanted, rtol=1e-4, atol=1e-5)


def test_a_program_without_operations_is_the_input() -> None:
    x = images(np.random.default_rng(0), (2, 3, 4), 3)
    assert np.array_equal(Interpreter(Program((2, 3, 4), (), INPUT, flat=False)).run(x), x)


def test_sizes_of_the_batch() -> None:
    rng = np.random.default_rng(3)
    program = graph(rng)
    engine = Interpreter(program)
    x = images(rng, program.input_shape, 7)
    alone = np.concatenate([engine.run(one[None]) for one in x])
    for n in (0, 1, 7):
        assert np.array_equal(engine.run(x[:n]), alone[:n])
        assert np.array_equal(engine.run(x[:n], threads=4), alone[:n])


def test_threads_share_an_engine() -> None:
    rng = np.random.default_rng(4)
    program = graph(rng, blocks=10)
    engine = Interpreter(program)
    batches = [images(rng, program.input_shape, 3) for _ in range(8)]
    wanted = [engine.run(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(engine.run, batches), wanted, strict=True):
                assert np.array_equal(got, want)


def test_numbers_that_are_not_finite_raise_and_warn_of_nothing() -> None:
    rng = np.random.default_rng(5)
    for seed in range(20):
        program = graph(np.random.default_rng(seed))
        x = images(rng, program.input_shape, 1)
        x.reshape(-1)[::3] = rng.choice(np.float32([np.inf, -np.inf, np.nan, 3e38]), x.reshape(-1)[::3].shape)
        with np.errstate(all="raise"):
            Interpreter(program).run(x, threads=1)


@pytest.mark.parametrize(
    ("x", "threads", "match"),
    [
        (np.zeros((1, 3, 4, 5), np.float32), 1, r"shape \(1, 3, 4, 5\)"),
        (np.zeros((3, 4, 4), np.float32), 1, r"shape \(3, 4, 4\)"),
        (np.zeros((1, 3, 4, 4), np.float64), 1, "float64"),
        (np.zeros((1, 3, 4, 4), np.float32), 0, "threads is 0"),
    ],
)
def test_what_cannot_be_run_is_refused(x: np.ndarray, threads: int, match: str) -> None:
    build = Build(np.random.default_rng(0), (3, 4, 4))
    build.affine(INPUT)
    with pytest.raises(InvalidInputError, match=match):
        Interpreter(build.program()).run(x, threads)


def test_an_illegal_program_is_refused() -> None:
    rng = np.random.default_rng(0)
    conv = BinaryConv(
        name="y",
        x=INPUT,
        channels=4,
        groups=1,
        window=Window((3, 3), (2, 2)),
        threshold=thresholds(rng, 3),
        weight=bits(rng, 4, 27) | np.uint8(128) * (np.arange(4) == 3).astype(np.uint8),
        scale=reals(rng, 4),
    )
    with pytest.raises(InvalidInputError, match="after a row's last bit"):
        Interpreter(Program((3, 4, 4), (conv,), "y", flat=False))
    with pytest.raises(InvalidInputError, match=INPUT):
        next(Interpreter(Program((3, 4, 4), (), INPUT, flat=False)).trace({}))
