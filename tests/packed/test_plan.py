"""Plans: what is fused and shared, and that no row reads what another one has written over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from programs import Build, graph, single
from test_compiled import tangle

pytest.importorskip("llvmlite")

from nasplat.errors import InvalidInputError
from nasplat.packed import layout, plan
from nasplat.packed.engine import Step
from nasplat.packed.graph import (
    INPUT,
    KINDS,
    PICK,
    Affine,
    BinaryConv,
    Concat,
    Conv,
    Operation,
    Pool,
    Program,
    Window,
    check_program,
)
from nasplat.packed.kernels import fields as f
from nasplat.packed.kernels.isa import AVX2, ISAS, PORTABLE, Isa
from nasplat.packed.plan import Plan, make_plan

KEPT = Window((3, 3), (6, 6), 1, 1, (1, 1))
"""Of a convolution that keeps the size of 6x6 pixels."""


def built(channels: int = 8) -> Build:
    return Build(np.random.default_rng(0), (channels, 6, 6))


def computed(made: Plan) -> list[tuple[str, ...]]:
    """What each row computes, packing left out."""
    return [step.operations for step in made.steps if step.kind != "pack"]


def packings(made: Plan) -> list[Step]:
    return [step for step in made.steps if step.kind == "pack"]


# Memory.


class Memory:
    """An arena of which each byte knows what was written there last."""

    def __init__(self, program: Program, made: Plan) -> None:
        self.program, self.plan = program, made
        self.operations = {operation.name: operation for operation in program.operations}
        self.owner = np.full(made.arena_bytes, -1, np.int32)
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def size(self, name: str) -> int:
        shape = self.plan.values[name].shape
        return 4 * (1 if shape == PICK else int(np.prod(shape)))

    def expected(self, name: str) -> np.ndarray:
        """Who has to have written each byte of a value; those of a concatenation are its parts' or of copies."""
        operation = self.operations.get(name)
        if not isinstance(operation, Concat):
            return np.full(self.size(name), self.number(name), np.int32)
        pieces, at = [], self.plan.values[name].at
        for index, part in enumerate(operation.parts):
            in_place = part in self.plan.values and self.plan.values[part].at == at
            own = in_place and not isinstance(self.operations.get(part), Concat) and part != INPUT
            piece = np.full(self.size(part), self.number(part if own else f"{name}[{index}]"), np.int32)
            pieces.append(piece)
            at += len(piece)
        return np.concatenate(pieces)

    def check(self, name: str) -> tuple[int, int]:
        """A value is there whole."""
        at = self.plan.values[name].at
        wanted = self.expected(name)
        assert np.array_equal(self.owner[at : at + len(wanted)], wanted), name
        return at, at + len(wanted)

    def write(self, name: str, at: int, size: int) -> tuple[int, int]:
        assert at >= 0 and at + size <= len(self.owner)
        self.owner[at : at + size] = self.number(name)
        return at, at + size


def disjoint(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[1] <= other[0] or other[1] <= one[0]


def check_memory(program: Program, isa: Isa) -> Plan:
    """Go through the rows: each finds what it reads where it reads, and writes beside it."""
    made = make_plan(program, isa)
    memory = Memory(program, made)
    memory.write(INPUT, made.values[INPUT].at, memory.size(INPUT))
    packed: dict[int, tuple[str, np.ndarray, int]] = {}
    for row, step in zip(made.table, made.steps, strict=True):
        op = f.Opcode(row[f.OP])
        reads = [memory.check(name) for name in step.inputs if op is not f.Opcode.CONV or name != step.inputs[0]]
        for column, name in zip((f.RESIDUAL1_AT, f.RESIDUAL2_AT), step.inputs[-row[f.RESIDUALS] :], strict=False):
            assert row[f.RESIDUALS] == 0 or row[column] == made.values[name].at
        if op is f.Opcode.PACK:
            size = int(row[f.GROUPS] * row[f.PLANES] * row[f.PLANE_BYTES])
            # A vector behind the last row may belong to nobody.
            out = memory.write(step.name, int(row[f.OUT_AT]), size + 64)
            memory.owner[out[1] - 64 : out[1]] = -2
            assert all(disjoint(out, read) for read in reads)
            packed[int(row[f.OUT_AT])] = step.name, row, size
            continue
        writes = []
        if op is f.Opcode.CONV:
            operation = next(memory.operations[name] for name in step.operations)
            assert isinstance(operation, BinaryConv | Conv)
            at = int(row[f.X_AT])
            if isinstance(operation, Conv) and layout.reads_in_place(
                operation.window, *made.values[operation.x].shape[1:]
            ):
                assert at == made.values[operation.x].at
                reads.append(memory.check(operation.x))
            else:
                name, packing, size = packed[at]
                assert (memory.owner[at : at + size] == memory.number(name)).all(), step
                reads.append((at, at + size))
                check_packing(made, operation, packing)
            size = int(layout.TILE_CHANNELS * row[f.SUMS_STRIDE])
            writes.append(memory.write("sums", int(row[f.SUMS_AT]), size))
        elif op is f.Opcode.POOL:
            writes.append(memory.write("sums", int(row[f.SUMS_AT]), int(row[f.PADDED_HEIGHT] * row[f.PITCH] * 4)))
        if op is not f.Opcode.CONV:
            assert row[f.X_AT] == made.values[step.inputs[0]].at
        assert row[f.OUT_AT] == made.values[step.name].at
        writes.append(memory.write(step.name, int(row[f.OUT_AT]), memory.size(step.name)))
        for index, write in enumerate(writes):
            assert all(disjoint(write, other) for other in (*reads, *writes[:index])), step
    assert memory.check(program.output)[1] <= made.arena_bytes
    return made


def check_packing(made: Plan, operation: BinaryConv | Conv, row: np.ndarray) -> None:
    """The packed input is of the right kind, by the right thresholds."""
    channels = made.values[operation.x].shape[0]
    assert row[f.CHANNELS] == channels and row[f.STRIDE] == operation.window.stride
    if isinstance(operation, BinaryConv):
        assert row[f.GROUPS] == operation.groups
        at = int(row[f.THRESHOLD_AT])
        assert made.consts[at : at + 4 * channels].tobytes() == operation.threshold.tobytes()


def check_steps(program: Program, made: Plan) -> None:
    """Each operation is computed once, and each value is there when it is read."""
    names = [step.name for step in made.steps]
    assert len(set(names)) == len(names) == len(made.table)
    done = [name for step in made.steps for name in step.operations]
    concats = [one.name for one in program.operations if isinstance(one, Concat)]
    assert sorted(done + concats) == sorted(one.name for one in program.operations)
    shapes = check_program(program)
    for step in made.steps:
        assert all(name in shapes for name in step.inputs)
        if step.output is not None:
            assert step.operations[-1] == step.output == step.name
            assert made.values[step.output].shape == shapes[step.output]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_no_row_reads_what_another_has_written_over(isa: Isa) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        program = single(rng, [*KINDS][seed % len(KINDS)]) if seed % 3 == 0 else (tangle, graph)[seed % 2](rng)
        check_steps(program, check_memory(program, isa))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_no_row_of_many_programs_reads_what_another_has_written_over(isa: Isa) -> None:
    for seed in range(60, 800):
        rng = np.random.default_rng(seed)
        program = tangle(rng, 25) if seed % 2 else graph(rng)
        check_steps(program, check_memory(program, isa))


def test_memory_is_used_again() -> None:
    build = built()
    x = INPUT
    for _ in range(40):
        x = build.affine(x)
    made = make_plan(build.program(), AVX2)
    size = 4 * 8 * 6 * 6
    assert made.arena_bytes <= 2 * size + plan._SLACK + plan._ALIGNMENT
    kept = built()
    x, values = INPUT, []
    for _ in range(10):
        x = kept.affine(x)
        values.append(x)
    kept.concat(*values[::-1])
    assert make_plan(kept.program(), AVX2).arena_bytes >= 10 * size


def test_equal_constants_are_held_once() -> None:
    build = built()
    first = build.binary_conv(INPUT, 1, 8, KEPT)
    one = make_plan(build.program(), AVX2)
    (operation,) = build.operations
    assert isinstance(operation, BinaryConv)
    build.append(replace(operation, name="again", x=first))
    two = make_plan(build.program(), AVX2)
    assert len(two.consts) == len(one.consts)


# What is fused.


def test_shuffle_and_two_sums_become_one_row() -> None:
    build = built()
    a = build.affine(INPUT)
    conv = build.binary_conv(INPUT, 2, 8, KEPT)
    shuffled = build.shuffle(conv, 4)
    one = build.add(shuffled, INPUT)
    two = build.add(a, one)
    made = check_memory(build.program(), AVX2)
    assert computed(made) == [(a,), (conv, shuffled, one, two)]
    (step,) = [step for step in made.steps if step.name == two]
    assert step.inputs == (INPUT, INPUT, a)
    assert step.kind == "binary_conv"
    assert made.table[-1][f.RESIDUALS] == 2
    at = int(made.table[-1][f.CHANNEL_TO_AT])
    # Channel g * 2 + i of four groups goes to i * 4 + g.
    assert made.consts[at : at + 32].view(np.int32).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("kind", ["conv", "in place", "affine", "pool"])
def test_sums_are_fused_into_other_rows(kind: str) -> None:
    build = built()
    x = {
        "conv": lambda: build.conv(INPUT, 1, 8, KEPT),
        "in place": lambda: build.conv(INPUT, 1, 8, Window((1, 1), (6, 6))),
        "affine": lambda: build.affine(INPUT),
        "pool": lambda: build.append(Pool(name="pool", x=INPUT, mode="max", window=KEPT)),
    }[kind]()
    total = build.add(INPUT, x)
    assert computed(check_memory(build.program(), AVX2)) == [(x, total)]


def test_the_later_term_takes_the_sum() -> None:
    build = built()
    a, b = (build.binary_conv(INPUT, 1, 8, KEPT) for _ in range(2))
    total = build.add(a, b)
    assert computed(check_memory(build.program(), AVX2)) == [(a,), (b, total)]
    build = built()
    a, b = (build.binary_conv(INPUT, 1, 8, KEPT) for _ in range(2))
    total = build.add(b, a)
    assert computed(check_memory(build.program(), AVX2)) == [(a,), (b, total)]


def test_a_sum_with_a_concatenation_waits_for_its_parts() -> None:
    """The other term was made before them, and nothing else reads it."""
    build = built()
    early = build.binary_conv(INPUT, 1, 8, KEPT)
    parts = [build.binary_conv(INPUT, 1, 4, KEPT) for _ in range(2)]
    total = build.add(early, build.concat(*parts))
    made = check_memory(build.program(), AVX2)
    assert computed(made) == [(early,), *((part,) for part in parts), (total,)]


def test_what_is_not_fused() -> None:
    def rows(*names: str) -> None:
        """Each name is of a row of its own."""
        made = check_memory(build.program(), AVX2)
        assert {one for one in computed(made) if len(one) == 1} >= {(name,) for name in names}

    build = built()  # a shuffle behind a sum: the other term would have to be shuffled too
    total = build.add(build.binary_conv(INPUT, 1, 8, KEPT), INPUT)
    rows(build.shuffle(total, 2))
    build = built()  # a second shuffle
    shuffled = build.shuffle(build.binary_conv(INPUT, 1, 8, KEPT), 2)
    rows(build.shuffle(shuffled, 2))
    build = built()  # a third sum
    x = build.binary_conv(INPUT, 1, 8, KEPT)
    for _ in range(3):
        x = build.add(x, INPUT)
    rows(x)
    build = built()  # what is read again
    conv = build.binary_conv(INPUT, 1, 8, KEPT)
    total = build.add(conv, INPUT)
    build.binary_conv(conv, 1, 8, KEPT)
    rows(conv, total)
    build = built()  # a value and itself
    conv = build.binary_conv(INPUT, 1, 8, KEPT)
    rows(conv, build.add(conv, conv))
    build = built()  # two inputs
    rows(build.add(INPUT, INPUT))
    build = built()  # a mean
    mean = build.mean(INPUT)
    rows(mean, build.add(mean, build.mean(build.affine(INPUT))))


def test_the_output_is_not_fused_away() -> None:
    build = built()
    conv = build.binary_conv(INPUT, 1, 8, KEPT)
    total = build.add(conv, INPUT)
    made = check_memory(build.program(conv), AVX2)
    assert computed(made) == [(conv,), (total,)]


def test_parts_of_a_concatenation_are_written_in_their_place() -> None:
    build = built()
    a, b = build.binary_conv(INPUT, 1, 8, KEPT), build.affine(INPUT)
    total = build.add(b, a)
    c = build.binary_conv(total, 1, 4, KEPT)
    whole = build.concat(c, total)
    made = check_memory(build.program(), AVX2)
    assert len(computed(made)) == 3
    pixels = 4 * 6 * 6
    at = made.values[whole].at
    assert (made.values[c].at, made.values[total].at) == (at, at + 4 * pixels)


def test_what_cannot_be_in_two_places_is_copied() -> None:
    build = built()
    a = build.affine(INPUT)
    whole = build.concat(a, INPUT, a)
    other = build.concat(whole, a)
    made = check_memory(build.program(), AVX2)
    names = [step.name for step in made.steps]
    assert names == [a, f"{whole}[1]", f"{whole}[2]", f"{other}[0]", f"{other}[1]"]
    assert [step.output for step in made.steps] == [a, None, None, None, None]


# What is shared.


def test_both_halves_of_a_factorised_reduce_read_the_same_bits() -> None:
    build = built()
    halves = []
    for shift in (0, 1):
        halves.append(build.binary_conv(INPUT, 1, 8, Window((1, 1), (3, 3), 2, 1, (-shift, -shift))))
    same = build.operations[0]
    assert isinstance(same, BinaryConv)
    build.operations[1] = replace(build.operations[1], threshold=same.threshold)
    build.concat(*halves)
    made = check_memory(build.program(), AVX2)
    assert len(packings(made)) == 1
    assert [step.kind for step in made.steps] == ["pack", "binary_conv", "binary_conv"]


@pytest.mark.parametrize("difference", ["threshold", "stride", "groups", "value"])
def test_bits_that_differ_are_packed_apart(difference: str) -> None:
    build = built()
    conv = build.binary_conv(INPUT, 1, 8, KEPT)
    first = build.operations[0]
    assert isinstance(first, BinaryConv)
    stride = Window((3, 3), (3, 3), 2, 1, (1, 1))
    build.binary_conv(
        conv if difference == "value" else INPUT,
        2 if difference == "groups" else 1,
        8,
        stride if difference == "stride" else KEPT,
    )
    if difference != "threshold":
        build.operations[1] = replace(build.operations[1], threshold=first.threshold)
    assert len(packings(check_memory(build.program(), AVX2))) == 2
    build.operations[1] = replace(first, name="same", x=INPUT)
    assert len(packings(check_memory(Program((8, 6, 6), tuple(build.operations), "same", False), AVX2))) == 1


def test_windows_of_other_sizes_share_bits_too() -> None:
    build = built()
    for window in (KEPT, Window((5, 5), (6, 6), 1, 2, (4, 4)), Window((1, 1), (6, 6))):
        build.binary_conv(INPUT, 1, 8, window)
    first = build.operations[0]
    assert isinstance(first, BinaryConv)
    build.operations = [replace(one, threshold=first.threshold) for one in build.operations]
    made = check_memory(build.program(build.concat(*(one.name for one in build.operations))), AVX2)
    assert len(packings(made)) == 1


def test_a_real_convolution_of_single_pixels_packs_nothing() -> None:
    build = built()
    build.conv(INPUT, 2, 8, Window((1, 1), (6, 6)))
    assert not packings(check_memory(build.program(), AVX2))
    build.conv(INPUT, 2, 8, KEPT)
    assert len(packings(check_memory(build.program(), AVX2))) == 1


# Names.


def renamed(program: Program, names: dict[str, str]) -> Program:
    """The program with other names of some values."""

    def name(old: str) -> str:
        return names.get(old, old)

    def change(operation: Operation) -> Operation:
        changes: dict[str, object] = {"name": name(operation.name)}
        for reads in ("x", "y", "pick", "factor"):
            value = getattr(operation, reads, None)
            if isinstance(value, str):
                changes[reads] = name(value)
        if isinstance(operation, Concat):
            changes["parts"] = tuple(map(name, operation.parts))
        return replace(operation, **changes)  # type: ignore[arg-type]

    return program._replace(operations=tuple(map(change, program.operations)), output=name(program.output))


def test_names_of_values_mean_nothing() -> None:
    """A file may give values the names that a plan gives to copies, packed inputs and sums."""
    build = built()
    a = build.affine(INPUT)
    conv = build.binary_conv(a, 1, 4, KEPT)
    whole = build.concat(INPUT, conv)
    program = build.program(build.add(build.binary_conv(whole, 1, 12, KEPT), whole))
    plain = make_plan(program, AVX2)
    assert {step.name for step in packings(plain)} == {f"packed 0 {a}", f"packed 1 {whole}"}
    for taken in ({a: f"{whole}[0]"}, {conv: f"packed 1 {whole}"}, {a: "sums 2", conv: "sums 5"}):
        made = make_plan(renamed(program, taken), AVX2)
        assert len({step.name for step in made.steps}) == len(made.steps)
        assert made.arena_bytes == plain.arena_bytes
        assert len(made.table) == len(plain.table)
        # Buffers of one size may be placed in another order.
        columns = [column for column in range(f.COLUMNS) if column not in PLACES]
        assert np.array_equal(made.table[:, columns], plain.table[:, columns])


PLACES = (f.X_AT, f.OUT_AT, f.RESIDUAL1_AT, f.RESIDUAL2_AT, f.SUMS_AT, f.PICK_AT, f.FACTOR_AT)
"""Columns that hold places in the arena."""


# Limits.


def wide(channels: int, groups: int, size: int, name: str = "y", limit: float = 0) -> BinaryConv:
    """A convolution of 2x2 taps that are as far apart as can be."""
    return BinaryConv(
        name=name,
        x=INPUT,
        channels=channels,
        groups=groups,
        window=Window((2, 2), (size, size), 1, 16_384),
        threshold=np.full(channels, limit, np.float32),
        weight=np.zeros((channels, -(-4 * channels // groups // 8)), np.uint8),
        scale=np.ones(channels, np.float32),
    )


PLANE = (16_384 + 100) ** 2
"""Bytes of one group's plane of :func:`wide` with an output of 100x100 pixels."""


def test_a_packed_input_that_is_too_large() -> None:
    count = plan.MAX_BYTES // PLANE
    make_plan(Program((count, 1, 1), (wide(count, count, 100),), "y", False), AVX2)
    count += 1
    with pytest.raises(InvalidInputError, match=rf"'packed 0 input' takes \d+ bytes .* legal: up to {plan.MAX_BYTES}"):
        make_plan(Program((count, 1, 1), (wide(count, count, 100),), "y", False), AVX2)


def test_a_program_that_is_too_large_though_each_part_is_not() -> None:
    """Two packed inputs, each of which is read before and after the other."""
    count = plan.MAX_BYTES * 3 // 4 // PLANE
    convs = [wide(count, count, 100, f"y{number}", number % 2) for number in range(4)]
    make_plan(Program((count, 1, 1), tuple(convs[:2]), "y1", False), AVX2)
    with pytest.raises(InvalidInputError, match=rf"the program takes \d+ bytes .* legal: up to {plan.MAX_BYTES}"):
        make_plan(Program((count, 1, 1), tuple(convs), "y3", False), AVX2)


def test_a_group_whose_planes_are_too_large() -> None:
    """Two planes of 1.8 GB each: offsets have 32 bits."""
    conv = Conv(
        name="y",
        x=INPUT,
        channels=1,
        groups=1,
        window=Window((2, 2), (5_000, 5_000), 1, 16_384),
        weight=np.ones((1, 2, 2, 2), np.float32),
    )
    with pytest.raises(InvalidInputError, match=r"'y' \(conv\).* over 2 GiB"):
        make_plan(Program((2, 1, 1), (conv,), "y", False), AVX2)


def test_a_program_that_is_not_legal() -> None:
    with pytest.raises(InvalidInputError, match="nothing before it makes"):
        make_plan(Program((1, 1, 1), (Affine(name="y", x="z"),), "y"), PORTABLE)


def test_a_program_of_nothing() -> None:
    made = make_plan(Program((3, 2, 2), (), INPUT, False), AVX2)
    assert made.table.shape == (0, f.COLUMNS) and made.steps == ()
    assert made.values[INPUT].at == 0
