"""The compiled engine against the interpreter and against PyTorch, and what a process may do with it."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from programs import Build, choose, graph, images, reals, single
from torch import Tensor, nn

from nasplat.errors import InvalidInputError
from nasplat.nn import BinaryConv2d
from nasplat.packed import PackedProgram, layout, warm_up
from nasplat.packed.graph import (
    INPUT,
    KINDS,
    Add,
    Affine,
    BinaryConv,
    Concat,
    Operation,
    Pool,
    Program,
    Shuffle,
    Window,
    check_program,
)
from nasplat.packed.interpreter import Interpreter
from nasplat.packed.kernels.isa import ISAS, NEON, isa_of
from nasplat.packed.threshold import threshold

compiled = pytest.importorskip("nasplat.packed.compiled", exc_type=ImportError)
Compiled = compiled.Compiled

EXACT = {"binary_conv", "pool", "add", "concat", "shuffle", "argmax", "affine"}
"""Kinds of operations that both engines compute in the same order."""


# Random programs.


def compare(program: Program, x: NDArray[np.float32]) -> None:
    """Check every step and the result of a run.

    The interpreter computes each operation again from what the compiled steps made of its inputs, so that no rounding
    grows and no sign tips. A run has to give the same bits as the steps one by one.
    """
    engine, interpreter = Compiled(program), Interpreter(program)
    y = engine.run(x)
    assert y.dtype == np.float32 and y.shape == (len(x), *check_program(program)[program.output])
    kinds = {operation.name: operation.KIND for operation in program.operations}
    for image, result in zip(x, y, strict=True):
        own: dict[str, NDArray[Any]] = {INPUT: image}
        computed: dict[str, tuple[set[str], tuple[str, ...]]] = {}
        for step, value in engine.trace({INPUT: image}):
            if step.output is not None:
                own[step.output] = value
                computed[step.output] = {kinds[name] for name in step.operations}, step.inputs
        for operation in program.operations:
            # Made in place by its parts.
            if isinstance(operation, Concat):
                own[operation.name] = np.concatenate([own[name] for name in operation.parts])
        for step, wanted in interpreter.trace(own):
            if step.output not in computed:
                continue
            got, (computes, inputs) = own[step.output], computed[step.output]
            if computes <= EXACT:
                assert np.array_equal(got, wanted, equal_nan=True), step
            else:
                size = 1 + max(float(np.abs(own[name]).max()) for name in inputs)
                np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5 * size, err_msg=str(step))
        assert np.array_equal(result, own[program.output], equal_nan=True)


def tangle(rng: np.random.Generator, operations: int = 14) -> Program:
    """A graph without any pattern: each operation reads whatever earlier values fit, however old and however often."""
    sides = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    build = Build(rng, (choose(rng, 2, 4, 8), *sides))
    while len(build.operations) < operations:
        x = choose(rng, *build.shapes)
        channels = build.shapes[x][0]
        kept = Window((3, 3), sides, 1, 1, (1, 1))
        match int(rng.integers(9)):
            case 0 | 1:
                build.binary_conv(x, choose(rng, 1, 2), choose(rng, 2, 4, 8), kept)
            case 2:
                build.conv(x, 1, choose(rng, 2, 4), choose(rng, kept, Window((1, 1), sides)))
            case 3:
                build.affine(x)
            case 4:
                build.shuffle(x)
            case 5:
                mode = choose(rng, "max", "average")
                build.append(Pool(name=build.name("pool"), x=x, mode=mode, window=kept))  # type: ignore[arg-type]
            case 6 | 7:
                build.add(x, choose(rng, *(name for name, size in build.shapes.items() if size[0] == channels)))
            case 8:
                parts = [choose(rng, *build.shapes) for _ in range(rng.integers(1, 4))]
                if sum(build.shapes[part][0] for part in parts) <= 24:
                    build.concat(*parts)
    return build.program(choose(rng, *build.shapes))


def drawn_program(rng: np.random.Generator) -> Program:
    """Of every sort."""
    kind = rng.random()
    if kind < 0.4:
        return single(rng, choose(rng, "binary_conv", "binary_conv", *KINDS))
    return graph(rng) if kind < 0.7 else tangle(rng)


def check_programs(count: int, seed: int) -> None:
    """A case that fails is told by its seed and number."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        program = drawn_program(rng)
        try:
            compare(program, images(rng, program.input_shape, int(rng.integers(1, 4))))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, number {number}: {error}") from error


@pytest.mark.parametrize("seed", range(2))
def test_random_programs(seed: int) -> None:
    check_programs(100, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_random_operations_of_each_kind(kind: str) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        program = single(rng, kind)
        compare(program, images(rng, program.input_shape, 2))


def test_random_programs_with_population_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no table lookup; this is where the taps outside the input need bases of their own."""
    monkeypatch.setattr(layout, "binary_kind", lambda isa, per_group, taps: "popcount")
    check_programs(120, 7)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        program = single(rng, "binary_conv")
        compare(program, images(rng, program.input_shape, 1))


@pytest.mark.slow
def test_many_random_programs() -> None:
    check_programs(6_000, 2)


@pytest.mark.slow
def test_many_random_programs_with_population_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "binary_kind", lambda isa, per_group, taps: "popcount")
    check_programs(2_000, 3)


def test_names_that_a_plan_would_choose() -> None:
    """A file may name its values as it likes: like the copy of a part, a packed input, the sums of a row."""
    kept = Window((3, 3), (5, 5), 1, 1, (1, 1))
    for name in ("whole[0]", "packed 0 input", "packed 0 first", "packed 1 whole", *(f"sums {n}" for n in range(8))):
        rng = np.random.default_rng(0)
        build = Build(rng, (2, 5, 5))
        build.append(Affine(name="first", x=INPUT, shift=reals(rng, 2)))
        build.append(Affine(name=name, x="first", scale=reals(rng, 2)))
        conv = build.binary_conv(name, 1, 40, kept)
        build.append(Concat(name="whole", parts=(INPUT, conv, name)))
        again = build.binary_conv("whole", 1, 2, kept)
        program = build.program(build.add(again, name))
        x = images(rng, (2, 5, 5), 2)
        assert np.array_equal(Compiled(program).run(x), Interpreter(program).run(x)), name
        compare(program, x)


def test_a_sum_with_a_concatenation_that_comes_later() -> None:
    """The skip of a block is made before the parts that are put together."""
    kept = Window((3, 3), (6, 6), 1, 1, (1, 1))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        build = Build(rng, (8, 6, 6))
        early = build.binary_conv(INPUT, 1, 8, kept)
        parts = [build.binary_conv(INPUT, 1, 4, kept) for _ in range(2)]
        whole = build.concat(*parts)
        program = build.program(build.add(*choose(rng, (early, whole), (whole, early))))
        x = images(rng, (8, 6, 6), 2)
        assert np.array_equal(Compiled(program).run(x), Interpreter(program).run(x))


# Against PyTorch.


def history(norm: nn.BatchNorm2d, rng: np.random.Generator) -> None:
    """Statistics, and factors of both signs, some of them and of the shifts zero."""
    channels = norm.num_features
    with torch.no_grad():
        norm.running_mean.copy_(torch.from_numpy(reals(rng, channels, size=0.5)))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.from_numpy(rng.uniform(0.1, 2, channels)))  # type: ignore[union-attr]
        norm.weight.copy_(torch.from_numpy(reals(rng, channels, zeros=0.2)))
        norm.bias.copy_(torch.from_numpy(reals(rng, channels, zeros=0.3, size=0.5)))


class Branches(nn.Module):
    """The sum of some branches of normalisation, binary convolution, activation and shuffle, and of the input."""

    def __init__(self, branches: list[nn.Module], shortcut: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y + x if self.shortcut else y


@cache
def drawn_norm(channels: int, number: int) -> tuple[nn.BatchNorm2d, NDArray[np.float32], NDArray[np.bool_]]:
    """A normalisation and its thresholds, which take longer to find than all the rest."""
    norm = nn.BatchNorm2d(channels).eval()
    history(norm, np.random.default_rng([channels, number]))
    return norm, *threshold(norm, channels)


def drawn_branch(
    rng: np.random.Generator, groups: int, channels: tuple[int, int], window: Window, shuffled: bool
) -> tuple[nn.Module, list[Operation]]:
    """A branch, and the operations that it has to become, the last one with its value."""
    (inside, outside), name = channels, f"conv{rng.integers(1 << 60)}"
    norm, limits, flip = drawn_norm(inside, int(rng.integers(4)))
    conv = BinaryConv2d(
        inside,
        outside,
        window.kernel[0],
        stride=window.stride,
        padding=window.padding[0],
        dilation=window.dilation,
        groups=groups,
    )
    activation = nn.PReLU(outside)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(reals(rng, *conv.weight.shape)))
        conv.scale.copy_(torch.from_numpy(reals(rng, outside)))
        activation.weight.copy_(torch.from_numpy(reals(rng, outside)))
    flips = np.repeat(flip.reshape(groups, -1), outside // groups, axis=0)[:, :, None, None]
    ones = (conv.weight.detach().numpy() >= 0) ^ flips
    operations: list[Operation] = [
        BinaryConv(
            name=name,
            x=INPUT,
            channels=outside,
            groups=groups,
            window=window,
            threshold=limits,
            weight=np.packbits(ones.transpose(0, 2, 3, 1).reshape(outside, -1), axis=1, bitorder="little"),
            scale=conv.scale.detach().numpy(),
            slope=activation.weight.detach().numpy(),
        )
    ]
    layers: list[nn.Module] = [norm, conv, activation]
    if shuffled:
        shuffles = choose(rng, *(n for n in range(1, outside + 1) if outside % n == 0))
        layers.append(nn.ChannelShuffle(shuffles))
        operations.append(Shuffle(name=f"{name}.shuffle", x=name, groups=shuffles))
    return nn.Sequential(*layers).eval(), operations


def drawn_network(rng: np.random.Generator) -> tuple[nn.Module, Program]:
    """A network of one level, and the program that it is."""
    size = choose(rng, 1, 1, 2, 3, 4, 5, 8, 12, 16, 31, 32, 33, 48, 65)
    groups = choose(rng, *(g for g in (1, 2, 3, 12, 12, 37) if g * size <= 150))
    channels = (groups * size, groups * choose(rng, size, size, 1, 2, 3, 5))
    sides = (choose(rng, 1, *range(1, 14)), choose(rng, 1, *range(1, 14), 40))
    count, stride = choose(rng, 1, 1, 2, 3), choose(rng, 1, 1, 2, 3)
    same = count > 1 or rng.random() < 0.6
    shortcut = channels[0] == channels[1] and stride == 1 and same and rng.random() < 0.6
    branches, operations, terms = [], [], []
    while len(branches) < count:
        kernel, dilation = choose(rng, 1, 3, 5), choose(rng, 1, 2, 3)
        span = dilation * (kernel - 1)
        padding = span // 2 if same else int(rng.integers(0, span + 1))
        if min(sides) + 2 * padding <= span:
            continue
        width, height = ((side + 2 * padding - span - 1) // stride + 1 for side in sides)
        window = Window((kernel, kernel), (width, height), stride, dilation, (padding, padding))
        branch, made = drawn_branch(rng, groups, channels, window, rng.random() < 0.4)
        branches.append(branch)
        operations += made
        terms.append(made[-1].name)
    total = terms[0]
    for number, term in enumerate([*terms[1:], *[INPUT] * shortcut]):
        operations.append(Add(name=f"sum{number}", x=total, y=term))
        total = f"sum{number}"
    return Branches(branches, shortcut), Program((channels[0], *sides), tuple(operations), total, False)


def check_networks(count: int, seed: int) -> None:
    """A case that fails is told by its seed and number."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        model, program = drawn_network(rng)
        x = images(rng, program.input_shape, int(rng.integers(1, 4)))
        with torch.inference_mode():
            wanted = model(torch.from_numpy(x))
        got = torch.from_numpy(Compiled(program).run(x))
        assert torch.equal(got, wanted), f"seed {seed}, number {number}"


def test_layers_equal_pytorch() -> None:
    check_networks(600, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_layers_equal_pytorch(seed: int) -> None:
    check_networks(2_500, seed)


@pytest.mark.parametrize("channels", [3_641, 3_642, 8_200])
def test_sums_that_two_bytes_do_not_hold(channels: int) -> None:
    """All bits equal, so that each sum is as large as it can be: 32,767 and more."""
    window = Window((3, 3), (3, 3), 1, 1, (1, 1))
    for sign in (0, 255):
        weight = np.full((2, -(-9 * channels // 8)), sign, np.uint8)
        weight[:, -1] &= (1 << (9 * channels % 8 or 8)) - 1
        conv = BinaryConv(
            name="y",
            x=INPUT,
            channels=2,
            groups=1,
            window=window,
            threshold=np.zeros(channels, np.float32),
            weight=weight,
            scale=np.ones(2, np.float32),
        )
        y = Compiled(Program((channels, 3, 3), (conv,), "y", False)).run(np.ones((1, channels, 3, 3), np.float32))
        taps = np.array([[4, 6, 4], [6, 9, 6], [4, 6, 4]])
        assert np.array_equal(y[0], np.broadcast_to(taps * channels * (1 if sign else -1), (2, 3, 3)))


@pytest.mark.parametrize("per_group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13])
@pytest.mark.parametrize("kernel", [1, 5, 6, 8, 12])
def test_sums_at_their_limits(per_group: int, kernel: int) -> None:
    """All bits equal or all different: eight-bit sums of a lookup are as large as they get before they are added."""
    groups, side = 3, kernel
    window = Window((kernel, kernel), (1, 1))
    for sign in (0, 255):
        reduction = kernel * kernel * per_group
        weight = np.full((groups * 2, -(-reduction // 8)), sign, np.uint8)
        weight[:, -1] &= (1 << (reduction % 8 or 8)) - 1
        conv = BinaryConv(
            name="y",
            x=INPUT,
            channels=groups * 2,
            groups=groups,
            window=window,
            threshold=np.zeros(groups * per_group, np.float32),
            weight=weight,
            scale=np.ones(groups * 2, np.float32),
        )
        shape = (groups * per_group, side, side)
        y = Compiled(Program(shape, (conv,), "y", False)).run(np.ones((1, *shape), np.float32))
        assert (y == (reduction if sign else -reduction)).all()


def test_a_scale_of_which_twice_is_too_large() -> None:
    """Sums of an even number of channels are halves, and so the scale is doubled, where that is possible."""
    for largest in (1e38, 3e38):
        conv = BinaryConv(
            name="y",
            x=INPUT,
            channels=1,
            groups=1,
            window=Window((1, 1), (1, 3)),
            threshold=np.zeros(2, np.float32),
            weight=np.full((1, 1), 3, np.uint8),
            scale=np.full(1, largest, np.float32),
        )
        program = Program((2, 1, 3), (conv,), "y", False)
        x = np.float32([[1, 1, -1], [1, -1, -1]]).reshape(1, 2, 1, 3)
        with np.errstate(over="ignore"):
            wanted = np.float32(largest) * np.float32([2, 0, -2])
        assert np.array_equal(Compiled(program).run(x).reshape(-1), wanted)


def test_infinite_and_missing_numbers_reach_the_threshold_as_in_pytorch() -> None:
    x = np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45]).reshape(1, 7, 1, 1)
    limits = np.float32([np.inf, -np.inf, -np.inf, -0.0, 0.0, 1e-45, 0.0])
    conv = BinaryConv(
        name="y",
        x=INPUT,
        channels=7,
        groups=7,
        window=Window((1, 1), (1, 1)),
        threshold=limits,
        weight=np.ones((7, 1), np.uint8),
        scale=np.ones(7, np.float32),
    )
    program = Program((7, 1, 1), (conv,), "y")
    assert Compiled(program).run(x).reshape(-1).tolist() == [1, 1, -1, 1, 1, 1, -1]


@pytest.mark.parametrize("mode", ["max", "average"])
def test_pools_and_rectifiers_of_infinite_numbers(mode: Any) -> None:
    values = np.float32([1, -1, np.inf, -np.inf, 0, -0.0, 2])
    rng = np.random.default_rng(0)
    x = rng.choice(values, (4, 6, 7, 7), p=[0.2, 0.2, 0.05, 0.15, 0.1, 0.1, 0.2])
    x[:, 0] = -np.inf
    for stride in (1, 2, 3):
        size = -(-7 // stride)
        pool = Pool(name="y", x=INPUT, mode=mode, window=Window((3, 3), (size, size), stride, 1, (1, 1)))
        slope = Affine(name="z", x="y", slope=np.float32([0.5, 0, -1, 1, 2, 0.25]))
        program = Program((6, 7, 7), (pool, slope), "z", False)
        # Infinity less infinity, or times zero, is missing.
        assert np.array_equal(Compiled(program).run(x), Interpreter(program).run(x), equal_nan=True)


# Batches, threads, processes.


@pytest.fixture(scope="module")
def program() -> Program:
    rng = np.random.default_rng(5)
    build = Build(rng, (24, 9, 11))
    kept = Window((3, 3), (9, 11), 1, 1, (1, 1))
    x = build.conv(INPUT, 1, 24, kept)
    for _ in range(4):
        x = build.add(build.shuffle(build.experts_conv(x, 3, groups=4, channels=24, window_=kept), 4), x)
    return build.program(build.linear(build.mean(x), 10, "none"))


def in_child(check: Callable[[], bool], seconds: int = 60) -> int:
    """The number of a child process that ends with 0 where the check holds, and ends in any case."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(seconds)
            code = 0 if check() else 3
        finally:
            os._exit(code)
    return pid


def succeeded(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("n", [0, 1, 5, 16, 50])
def test_threads_share_a_batch(n: int, program: Program) -> None:
    x = images(np.random.default_rng(n), program.input_shape, n)
    engine = Compiled(program)
    alone = [engine.run(x[i : i + 1]) for i in range(n)]
    for threads in (1, 2, 3, 4):
        got = engine.run(x, threads)
        assert got.shape == (n, 10, 1, 1)
        assert n == 0 or np.array_equal(got, np.concatenate(alone))


def test_many_threads_call_one_program(program: Program) -> None:
    packed = PackedProgram(program)
    x = torch.from_numpy(images(np.random.default_rng(1), program.input_shape, 24))
    wanted = [PackedProgram(program)(x[i : i + 1]) for i in range(len(x))]
    start = threading.Barrier(8)

    def calls(thread: int) -> bool:
        # The first of them make the engine, all at the same time.
        start.wait()
        order = np.random.default_rng(thread).permutation(np.repeat(np.arange(len(x)), 20))
        return all(torch.equal(packed(x[i : i + 1], threads=1 + int(i) % 2), wanted[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8)))


def test_children_of_a_fork_run_it(program: Program) -> None:
    engine = Compiled(program)
    x = images(np.random.default_rng(2), program.input_shape, 6)
    wanted = engine.run(x)

    def check() -> bool:
        engines = engine, Compiled(program)
        return all(np.array_equal(one.run(x, threads), wanted) for one in engines for threads in (1, 2))

    children = [in_child(check) for _ in range(3)]
    assert check()
    assert all(map(succeeded, children))
    # A grandchild, and a child of a process that has used threads.
    assert succeeded(in_child(lambda: check() and succeeded(in_child(check))))


def test_forks_while_other_threads_are_inside_a_run(program: Program) -> None:
    engine = Compiled(program)
    x = images(np.random.default_rng(3), program.input_shape, 40)
    wanted = engine.run(x)
    done = threading.Event()

    def keep_running() -> bool:
        right = True
        while not done.is_set():
            right &= np.array_equal(engine.run(x), wanted)
        return right

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(keep_running) for _ in range(2)]
        try:
            for turn in range(10):
                time.sleep(0.003 * turn)
                assert succeeded(in_child(lambda: all(np.array_equal(engine.run(x, n), wanted) for n in (1, 2))))
        finally:
            done.set()
        assert all(run.result() for run in runs)


def test_forks_while_another_thread_makes_the_engine() -> None:
    """The child finds nothing that a thread holds which it does not have."""
    build = Build(np.random.default_rng(0), (4, 3, 3))
    x = INPUT
    for _ in range(60):
        x = build.binary_conv(x, 1, 4, Window((3, 3), (3, 3), 1, 1, (1, 1)))
    program = build.program()
    image = torch.from_numpy(images(np.random.default_rng(1), (4, 3, 3), 1))
    wanted = PackedProgram(program)(image)
    for turn in range(8):
        packed = PackedProgram(program)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(packed, image)
            time.sleep(0.002 * turn)
            assert succeeded(in_child(lambda one=packed: torch.equal(one(image), wanted), 20))  # type: ignore[misc]
            assert torch.equal(first.result(), wanted)


def memory() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")


def check_leak(calls: int) -> None:
    rng = np.random.default_rng(0)
    build = Build(rng, (4, 3, 3))
    build.binary_conv(INPUT, 1, 4, Window((3, 3), (3, 3), 1, 1, (1, 1)))
    packed = PackedProgram(build.program(build.mean(build.operations[-1].name)))
    x, wrong = torch.randn(3, 4, 3, 3), torch.randn(3, 4, 3, 4)
    wanted = packed(x)

    def some(count: int) -> None:
        for number in range(count):
            if number % 5 == 0:
                with pytest.raises(InvalidInputError):
                    packed(wrong)
            if number % 50 == 0:
                packed(x, threads=2)
            assert torch.equal(packed(x), wanted)

    some(2_000)
    before = memory()
    some(calls)
    assert memory() - before < 2_000_000


@linux
def test_calls_do_not_leak() -> None:
    check_leak(20_000)


@linux
@pytest.mark.slow
def test_a_hundred_thousand_calls_do_not_leak() -> None:
    check_leak(100_000)


@linux
def test_engines_do_not_leak(program: Program) -> None:
    x = images(np.random.default_rng(0), program.input_shape, 2)

    def some(count: int) -> None:
        for _ in range(count):
            engine = Compiled(program)
            engine.run(x)
            list(engine.trace({INPUT: x[0]}))

    some(30)
    before = memory()
    some(120)
    size = engine_size(program)
    assert size > 50_000
    assert memory() - before < 12 * size


def engine_size(program: Program) -> int:
    """Bytes of an engine's weights and of its memory for one example."""
    plan = Compiled(program).plan
    return len(plan.consts) + plan.arena_bytes


# Memory.


def test_any_array_of_the_right_shape_is_read_and_none_is_changed(program: Program, tmp_path: Path) -> None:
    engine = Compiled(program)
    x = images(np.random.default_rng(4), program.input_shape, 4)
    wanted = engine.run(x)
    n, channels, height, width = x.shape
    wide = np.full((2 * n, channels + 1, height, 3 * width), np.nan, np.float32)
    wide[::2, 1:, ::-1, ::3] = x
    for view in (
        wide[::2, 1:, ::-1, ::3],
        np.asfortranarray(x),
        np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    ):
        assert not view.flags.c_contiguous
        before = view.copy()
        assert np.array_equal(engine.run(view), wanted)
        assert np.array_equal(engine.run(view, 2), wanted)
        assert np.array_equal(view, before)
    one = np.broadcast_to(x[:1], x.shape)
    assert np.array_equal(engine.run(one), np.broadcast_to(wanted[:1], wanted.shape))
    fixed = x.copy()
    fixed.setflags(write=False)
    assert np.array_equal(engine.run(fixed), wanted)
    odd = np.frombuffer(bytearray(b"..." + x.tobytes()), np.uint8)[3:].view(np.float32).reshape(x.shape)
    assert odd.flags.writeable and not odd.flags.aligned
    assert np.array_equal(engine.run(odd), wanted)
    x.tofile(tmp_path / "x")
    for mode in ("r", "r+", "c"):
        assert np.array_equal(engine.run(np.memmap(tmp_path / "x", np.float32, mode, shape=x.shape), 2), wanted)


class Fences:
    """Stands for :func:`compiled._aligned`: memory full of a pattern, between fences of it, at any address."""

    SIZE = 8_192
    PATTERN = 0xFF
    """Of floats: not a number. Of a pick: -1. Of codes of a lookup: outside."""

    def __init__(self) -> None:
        self.all: list[tuple[NDArray[np.uint8], int, int]] = []

    def __call__(self, size: int) -> Any:
        begin = self.SIZE + len(self.all) % 3
        memory = np.full(size + 2 * self.SIZE, self.PATTERN, np.uint8)
        self.all.append((memory, begin, begin + size))
        return compiled._Memory(memory, memory.ctypes.data + begin)

    def intact(self) -> bool:
        return all(
            (memory[:begin] == self.PATTERN).all() and (memory[end:] == self.PATTERN).all()
            for memory, begin, end in self.all
        )


@pytest.mark.parametrize("kind", [None, "popcount"])
def test_nothing_is_written_outside_and_nothing_unwritten_is_used(
    kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is not None:
        monkeypatch.setattr(layout, "binary_kind", lambda isa, per_group, taps: kind)
    for number in range(100):
        rng = np.random.default_rng([11, number])
        program = drawn_program(rng)
        x = images(rng, program.input_shape, 2)
        wanted = Compiled(program).run(x)
        with monkeypatch.context() as patch:
            fences = Fences()
            patch.setattr(compiled, "_aligned", fences)
            engine = Compiled(program)
            consts = engine.plan.consts.copy()
            assert np.array_equal(engine.run(x, 1 + number % 2), wanted, equal_nan=True), number
            list(engine.trace({INPUT: x[0]}))
            assert len(fences.all) >= 3
            assert fences.intact(), number
            memory, begin, end = fences.all[0]
            assert np.array_equal(memory[begin:end], consts), number


def before_a_wall(size: int) -> Any:
    """Memory that ends where a page begins that cannot be read."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    whole = -(-size // page) * page
    area = mmap.mmap(-1, whole + 2 * page)
    memory = np.frombuffer(area, np.uint8)
    for at in (0, page + whole):
        assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + at), ctypes.c_size_t(page), 0) == 0
    return compiled._Memory(memory, memory.ctypes.data + page + whole - size)


def run_before_walls(count: int, seed: int) -> bool:
    """Run programs whose constants, arena and input end at a page that cannot be read.

    In a child: reading there ends a process.
    """
    last = mmap.mmap(-1, 8)

    def check() -> bool:
        faulthandler.disable()
        compiled._aligned = before_a_wall
        for number in range(count):
            last[:] = number.to_bytes(8, "little")
            rng = np.random.default_rng([seed, number])
            program = drawn_program(rng)
            x = images(rng, program.input_shape, 2)
            memory, address = before_a_wall(x.nbytes)
            begin = address - memory.ctypes.data
            close = memory[begin : begin + x.nbytes].view(np.float32).reshape(x.shape)
            close[...] = x
            Compiled(program).run(close)
        return True

    right = succeeded(in_child(check, 550))
    assert right, f"seed {seed}, number {int.from_bytes(last[:], 'little')}"
    return right


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another process that can import these tests."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=550,
    )


def test_the_wall_is_one() -> None:
    """What the next test relies on."""

    def reads(size: int) -> int:
        def check() -> bool:
            faulthandler.disable()
            _memory, address = before_a_wall(100)
            return len(ctypes.string_at(address, size)) == size

        return os.waitpid(in_child(check), 0)[1]

    assert reads(100) == 0
    assert os.WTERMSIG(reads(101)) in (signal.SIGSEGV, signal.SIGBUS)


@pytest.mark.parametrize("kind", [None, "popcount"])
def test_nothing_outside_is_read(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is not None:
        monkeypatch.setattr(layout, "binary_kind", lambda isa, per_group, taps: kind)
    assert run_before_walls(150, 21)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "popcount"])
def test_nothing_outside_is_read_by_many_programs(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is not None:
        monkeypatch.setattr(layout, "binary_kind", lambda isa, per_group, taps: kind)
    assert run_before_walls(5_000, 22)


# Other processors.


def report_programs(count: int) -> None:
    """Prints the instruction set, and how many programs were right."""
    isa = warm_up()
    check_programs(count, 31)
    check_networks(count, 32)
    print(isa, count)


TARGETS = {
    "portable": ("x86-64", ""),
    "ssse3": ("nehalem", "+ssse3"),
    "avx2": ("haswell", "+avx,+avx2,+fma"),
}
"""Processor and features for Numba, by what the kernels are then for."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_lesser_processors(name: str, tmp_path: Path) -> None:
    """The kernels for other instruction sets that this processor has too."""
    host = pytest.importorskip("llvmlite.binding")
    own = isa_of(host.get_process_triple(), host.get_host_cpu_features().flatten())
    if own is NEON or ISAS.index(own) > [isa.name for isa in ISAS].index(name):
        pytest.skip(f"this processor is {own.name}")
    cpu, features = TARGETS[name]
    result = python(
        "import test_compiled; test_compiled.report_programs(300)",
        NUMBA_CPU_NAME=cpu,
        NUMBA_CPU_FEATURES=features,
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert result.stdout == f"{name} 300\n", result.stderr


# Steps.


def test_an_input_of_another_shape_is_refused(program: Program) -> None:
    """By the engine too: it would read what lies behind."""
    engine = Compiled(program)
    for shape in ((1, 24, 9, 10), (1, 24, 9, 12), (2, 1, 1, 1), (24, 9, 11)):
        with pytest.raises(InvalidInputError, match=r"legal: \(n, 24, 9, 11\)"):
            engine.run(np.zeros(shape, np.float32))


def test_a_trace_takes_the_given_values(program: Program) -> None:
    engine = Compiled(program)
    x = images(np.random.default_rng(6), program.input_shape, 1)[0]
    own = {step.output: value for step, value in engine.trace({INPUT: x}) if step.output is not None}
    pick = next(name for name in own if name.endswith("argmax"))
    for forced in range(3):
        given = {INPUT: x, pick: np.array(forced)}
        made = {step.output: value for step, value in engine.trace(given) if step.output is not None}
        reader = next(step.output for step in engine.steps if pick in step.inputs)
        assert np.array_equal(made[reader], own[reader]) == (forced == int(own[pick]))
        assert np.array_equal(made[pick], own[pick])
    for illegal in (-1, 3):
        with pytest.raises(InvalidInputError, match="legal: from 0 to 2"):
            list(engine.trace({INPUT: x, pick: np.array(illegal)}))


def test_a_trace_leaves_alone_what_has_taken_the_place_of_an_input() -> None:
    """Two convolutions read bits that were packed once. At the second one, the input itself is gone."""
    build = Build(np.random.default_rng(0), (32, 6, 6))
    kept = Window((3, 3), (6, 6), 1, 1, (1, 1))
    first = build.binary_conv(INPUT, 1, 32, kept)
    second = replace(build.operations[0], name="second")
    build.append(second)
    program = build.program(build.add(build.affine(first), "second"))
    image = images(np.random.default_rng(1), (32, 6, 6), 1)[0]
    engine = Compiled(program)
    assert engine.plan.values[first].at == engine.plan.values[INPUT].at
    made = {step.output: value for step, value in engine.trace({INPUT: image})}
    for step, value in Interpreter(program).trace({INPUT: image}):
        if step.output in made:
            assert np.array_equal(made[step.output], value), step
    given = {INPUT: image, first: np.zeros((32, 6, 6), np.float32)}
    forced = {step.output: value for step, value in engine.trace(given)}
    assert np.array_equal(forced[first], made[first])
    assert not np.array_equal(forced[program.output], made[program.output])


def test_a_trace_gives_values_that_stay(program: Program) -> None:
    """Memory is used again, but not that of a value that was handed out."""
    engine = Compiled(program)
    x = images(np.random.default_rng(7), program.input_shape, 1)[0]
    kept = [value for _, value in engine.trace({INPUT: x}) if value is not None]
    copies = [value.copy() for _, value in engine.trace({INPUT: x}) if value is not None]
    assert len(kept) > 4
    assert all(np.array_equal(one, other) for one, other in zip(kept, copies, strict=True))


def traced_then_fenced(
    engine: Compiled, x: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, NDArray[Any]], Fences]:
    """The values of a run by name; memory that is taken from then on lies between fences."""
    wanted = {step.name: value for step, value in engine.trace({INPUT: x[0]}) if value is not None}
    fences = Fences()
    monkeypatch.setattr(compiled, "_aligned", fences)
    return wanted, fences


def test_rows_run_again_and_again_with_one_result(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is what a run computes, however often it is repeated."""
    engine = Compiled(program)
    x = images(np.random.default_rng(8), program.input_shape, 1)
    wanted, fences = traced_then_fenced(engine, x, monkeypatch)
    steps = []
    for step, call in engine.rows(x):
        call(3)
        steps.append(step)
        if step.name in wanted:
            ((memory, begin, _),) = fences.all
            at, value = begin + engine.plan.values[step.name].at, wanted[step.name]
            assert memory[at : at + value.nbytes].tobytes() == value.tobytes(), step
    assert tuple(steps) == engine.steps
    assert fences.intact()


def test_what_is_timed_is_what_a_run_computes(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Compiled(program)
    x = images(np.random.default_rng(9), program.input_shape, 1)
    wanted, fences = traced_then_fenced(engine, x, monkeypatch)
    seconds = engine.timed(x, 3)
    assert seconds.shape == (3, len(engine.steps)) and (seconds >= 0).all() and seconds.sum() > 0
    ((memory, begin, _),) = fences.all
    last = engine.steps[-1].name
    at, value = begin + engine.plan.values[last].at, wanted[last]
    assert memory[at : at + value.nbytes].tobytes() == value.tobytes()
    assert fences.intact()
