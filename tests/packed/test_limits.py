"""What no program may ask for, however small its file."""

from __future__ import annotations

import numpy as np
import pytest

from nasplat.errors import InvalidInputError
from nasplat.packed.graph import (
    INPUT,
    MAX_OPERATIONS,
    Add,
    Affine,
    BinaryConv,
    Concat,
    Mean,
    Pool,
    Program,
    Window,
    check_program,
)
from nasplat.packed.interpreter import Interpreter


def pool(kernel: int, size: int, channels: int = 1, stride: int = 1) -> Program:
    window = Window((kernel, kernel), (size, size), stride, padding=(kernel - 1, kernel - 1))
    return Program((channels, size, size), (Pool(name="y", x=INPUT, mode="max", window=window),), "y", False)


def test_work_is_bounded():
    check_program(pool(128, 2048))
    with pytest.raises(InvalidInputError, match=r"does \d+ operations for one example"):
        check_program(pool(128, 2048, channels=32))


def test_taps_are_bounded():
    with pytest.raises(InvalidInputError, match="its kernel has 4194304 taps; legal: up to 16384"):
        check_program(pool(2048, 16))


def test_operations_and_parts_are_bounded():
    many = tuple(Mean(name=f"m{i}", x=INPUT) for i in range(MAX_OPERATIONS + 1))
    with pytest.raises(InvalidInputError, match="10001 operations"):
        check_program(Program((1, 1, 1), many, "m0"))
    with pytest.raises(InvalidInputError, match="10001 parts"):
        check_program(Program((1, 1, 1), (Concat(name="y", parts=(INPUT,) * (MAX_OPERATIONS + 1)),), "y"))


def test_planning_many_values_that_live_at_once_ends():
    plan = pytest.importorskip("nasplat.packed.plan")
    from nasplat.packed.kernels.isa import AVX2

    maps = [Affine(name=f"v{i}", x=INPUT) for i in range(700)]
    sums = [Add(name=f"s{i}", x=f"v{i}", y=f"s{i - 1}" if i else INPUT) for i in range(700)]
    made = plan.make_plan(Program((2, 3, 3), (*maps, *sums), "s699", False), AVX2)
    assert len(made.table) >= 700


def test_tables_for_borders_are_bounded():
    layout = pytest.importorskip("nasplat.packed.layout")
    conv = BinaryConv(
        name="y",
        x=INPUT,
        channels=4096,
        groups=1,
        window=Window((3, 3), (600, 600), padding=(299, 299)),
        threshold=np.zeros(1, np.float32),
        weight=np.zeros((4096, 2), np.uint8),
        scale=np.ones(4096, np.float32),
    )
    assert layout.popcount_bases(conv, 4, 4, 1) is not None
    with pytest.raises(InvalidInputError, match="its tables for borders take"):
        layout.popcount_bases(
            BinaryConv(
                name="y",
                x=INPUT,
                channels=1 << 20,
                groups=1,
                window=Window((3, 3), (600, 600), padding=(299, 299)),
                threshold=np.zeros(1, np.float32),
                weight=np.zeros((1 << 20, 2), np.uint8),
                scale=np.ones(1 << 20, np.float32),
            ),
            4,
            4,
            1,
        )


@pytest.mark.parametrize("engine", ["compiled", "interpreter"])
def test_an_input_of_another_shape_is_refused_by_the_engine_itself(engine):
    made = Interpreter
    if engine == "compiled":
        made = pytest.importorskip("nasplat.packed.compiled").Compiled
    runs = made(pool(3, 4))
    assert runs.run(np.zeros((0, 1, 4, 4), np.float32)).shape == (0, 1, 4, 4)
    with pytest.raises(InvalidInputError, match="shape"):
        runs.run(np.zeros((1, 1, 1, 1), np.float32))


def test_a_scale_near_the_largest_float_gives_what_the_interpreter_gives():
    compiled = pytest.importorskip("nasplat.packed.compiled")
    rng = np.random.default_rng(0)
    conv = BinaryConv(
        name="y",
        x=INPUT,
        channels=3,
        groups=1,
        window=Window((1, 1), (5, 5)),
        threshold=np.zeros(4, np.float32),
        weight=rng.integers(0, 16, (3, 1), np.uint8),
        scale=np.float32([3e38, -3e38, 1.0]),
    )
    program = Program((4, 5, 5), (conv,), "y", False)
    x = rng.standard_normal((4, 4, 5, 5), np.float32)
    with np.errstate(over="ignore"):
        assert np.array_equal(compiled.Compiled(program).run(x), Interpreter(program).run(x))
