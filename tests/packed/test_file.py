"""Files of programs: what is written is read again, and what is not a file of a program is refused, whatever it is."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from programs import Build, choose, graph, images, programs, single, small
from safetensors import safe_open

from nasplat.errors import FileFormatError, InvalidInputError
from nasplat.packed import file
from nasplat.packed.engine import Engine
from nasplat.packed.graph import INPUT, KINDS, MAX_OPERATIONS, Program, array_fields, attributes, check_program
from nasplat.packed.interpreter import Interpreter

ENGINES: list[Callable[[Program], Engine]] = [Interpreter]
"""Each has to run whatever a file can hold."""

with suppress(ImportError):
    from nasplat.packed.compiled import Compiled

    def small_compiled(program: Program) -> Engine:
        """The compiled engine, but for what takes more memory than a test may: a border of thousands of pixels."""
        try:
            engine = Compiled(program)
        except InvalidInputError as error:
            assert "bytes for one example" in str(error) or "over 2 GiB" in str(error)
            return Interpreter(program)
        return engine if engine.plan.arena_bytes < 1 << 27 else Interpreter(program)

    ENGINES.append(small_compiled)


def same(one: Program, other: Program) -> bool:
    """Whether they are equal, their arrays included."""
    if one._replace(operations=()) != other._replace(operations=()) or len(one.operations) != len(other.operations):
        return False
    for a, b in zip(one.operations, other.operations, strict=True):
        if type(a) is not type(b) or attributes(a) != attributes(b):
            return False
        for x, y in zip(array_fields(a).values(), array_fields(b).values(), strict=True):
            if (x is None) != (y is None):
                return False
            if x is not None and (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
                return False
    return True


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | str, body: bytes) -> bytes:
    head = (header if isinstance(header, str) else json.dumps(header)).encode(errors="surrogatepass")
    return len(head).to_bytes(8, "little") + head + body


def tree_of(header: dict[str, Any]) -> dict[str, Any]:
    tree = json.loads(header["__metadata__"]["program"])
    assert isinstance(tree, dict)
    return tree


def with_tree(data: bytes, tree: object) -> bytes:
    """The file with other operations, and the same tensors."""
    header, body = split(data)
    header["__metadata__"]["program"] = tree if isinstance(tree, str) else json.dumps(tree)
    return joined(header, body)


def chain() -> Program:
    """A convolution, its factor and its sum with the input."""
    build = Build(np.random.default_rng(0), (4, 5, 5))
    factor = build.squeeze(INPUT, 4)
    y = build.binary_conv(INPUT, 2, 4, file.Window((3, 3), (5, 5), 1, 1, (1, 1)), factor=factor)
    build.add(build.shuffle(y, 2), INPUT)
    return build.program()


@settings(deadline=None, max_examples=100)
@given(program=programs)
def test_what_is_written_is_read_again(program: Program) -> None:
    data = file.to_bytes(program)
    again = file.from_bytes(data)
    assert same(again, program)
    assert file.to_bytes(again) == data
    check_program(again)
    assert not any(
        array.flags.writeable for op in again.operations for array in array_fields(op).values() if array is not None
    )


def test_every_kind_and_attribute_is_written() -> None:
    """With each attribute at another value than its default, and each optional array there and absent."""
    seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for seed in range(30):
        for kind in KINDS:
            program = single(np.random.default_rng(seed), kind)
            assert same(file.from_bytes(file.to_bytes(program)), program)
            for operation in program.operations:
                entry = tree_of(split(file.to_bytes(program))[0])["operations"][program.operations.index(operation)]
                seen[operation.KIND] |= entry.keys() - {"kind"}
    for kind, operation_type in KINDS.items():
        names = {item.name for item in fields(operation_type)} - set(operation_type.ARRAYS) | operation_type.OPTIONAL
        assert seen[kind] == names


def test_safetensors_reads_it_and_writes_it(tmp_path: Path) -> None:
    program = graph(np.random.default_rng(1))
    path = tmp_path / "net.packed"
    file.write(program, path)
    arrays = [array for op in program.operations for array in array_fields(op).values() if array is not None]
    with safe_open(path, framework="np") as tensors:
        metadata = tensors.metadata()
        assert set(tensors.keys()) == {"bits", "reals"}
        for name, kind in (("bits", np.uint8), ("reals", np.float32)):
            wanted = [array.reshape(-1) for array in arrays if array.dtype == kind]
            assert np.array_equal(tensors.get_tensor(name), np.concatenate(wanted))
    assert (metadata["format"], metadata["version"]) == ("nasplat.packed", "1")
    written = safetensors.numpy.save(safetensors.numpy.load(path.read_bytes()), metadata)
    assert same(file.from_bytes(written), program)


def test_an_operation_takes_little_beside_its_name_and_arrays() -> None:
    build = Build(np.random.default_rng(0), (36, 32, 32))
    x = INPUT
    for _ in range(100):
        y = build.binary_conv(x, 12, 36, file.Window((5, 5), (32, 32), 1, 2, (4, 4)))
        x = build.add(build.shuffle(y, 4), x)
    program = build.program()
    header, _ = split(file.to_bytes(program))
    names = sum(len(operation.name) for operation in program.operations)
    assert len(json.dumps(header["__metadata__"]["program"])) - names < 100 * len(program.operations)


def test_a_program_without_operations() -> None:
    program = Program((3, 4, 5), (), INPUT, flat=False)
    data = file.to_bytes(program)
    assert file.from_bytes(data) == program
    assert safetensors.numpy.load(data)["bits"].shape == (0,)


# What a file may not be. Each case is a change of the file of `chain`: 4 channels, 5 x 5 pixels; mean, linear, linear,
# binary convolution, shuffle, add.


def tree(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A change of the operations' JSON, in place."""

    def mutate(data: bytes) -> bytes:
        program = tree_of(split(data)[0])
        change(program)
        return with_tree(data, program)

    return mutate


def operation(number: int, **entries: Any) -> Callable[[bytes], bytes]:
    return tree(lambda program: program["operations"][number].update(entries))


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def mutate(data: bytes) -> bytes:
        head, body = split(data)
        change(head)
        return joined(head, body)

    return mutate


def text(old: str, new: str) -> Callable[[bytes], bytes]:
    """A change of the operations' JSON as text."""

    def mutate(data: bytes) -> bytes:
        program = json.dumps(tree_of(split(data)[0]))
        assert old in program
        return with_tree(data, program.replace(old, new, 1))

    return mutate


def resized(number: int) -> Callable[[bytes], bytes]:
    """As many reals as said, and the tensors where they have to be."""

    def mutate(data: bytes) -> bytes:
        head, body = split(data)
        reals, bits = (head[name]["shape"][0] for name in ("reals", "bits"))
        count = reals + number
        head["reals"] = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
        head["bits"]["data_offsets"] = [4 * count, 4 * count + bits]
        return joined(head, (body[: 4 * reals] + bytes(4 * max(0, number)))[: 4 * count] + body[4 * reals :])

    return mutate


def nan(data: bytes) -> bytes:
    head, body = split(data)
    return joined(head, np.float32(np.nan).tobytes() + body[4:])


def dirty(data: bytes) -> bytes:
    """The bits after the 18 of the last row."""
    return data[:-1] + bytes([data[-1] | 4])


REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "has 0 bytes"),
    "a pickle": (lambda data: b"\x80\x04\x95" + bytes(100), "does not begin as a safetensors file does"),
    "cut in the header": (lambda data: data[:50], "does not begin as a safetensors file does"),
    "cut in the tensors": (lambda data: data[:-1], "ends at byte"),
    "longer": (lambda data: data + b"x", "1 bytes after its tensors"),
    "header length": (lambda data: b"\xff" * 8 + data[8:], "does not begin as a safetensors file does"),
    "no text": (lambda data: joined("\ud800", b""), "no text"),
    "no object": (lambda data: joined("[]", b""), "start with"),
    "no JSON": (lambda data: joined("{,}", b""), "no JSON"),
    "tensors alone": (lambda data: safetensors.numpy.save({"reals": np.zeros(3, np.float32)}), "metadata"),
    "another format": (header(lambda h: h["__metadata__"].update(format="pt")), "'pt'; legal: 'nasplat.packed'"),
    "a later version": (
        header(lambda h: h["__metadata__"].update(version="2")),
        "newer nasplat; this one reads up to 1",
    ),
    "no version": (header(lambda h: h["__metadata__"].pop("version")), "version is None"),
    "odd version": (header(lambda h: h["__metadata__"].update(version="1.0")), "version is '1.0'; legal: '1'"),
    "version of digits": (header(lambda h: h["__metadata__"].update(version="٢")), "version is"),
    "version as a number": (header(lambda h: h["__metadata__"].update(version=1)), "version is 1; legal: '1'"),
    "more metadata": (header(lambda h: h["__metadata__"].update(code="import os")), "code"),
    "no program": (header(lambda h: h["__metadata__"].pop("program")), "lacks .'program'"),
    "a tensor more": (header(lambda h: h.update(more=h["bits"])), "more"),
    "a tensor less": (header(lambda h: h.pop("bits")), "lacks .'bits'"),
    "another type": (header(lambda h: h["reals"].update(dtype="F64")), "'F64'; legal: 'F32'"),
    "two dimensions": (header(lambda h: h["bits"].update(shape=[1, 12])), "one dimension"),
    "a shape of floats": (header(lambda h: h["bits"].update(shape=[12.0])), "12.0"),
    "a negative shape": (header(lambda h: h["bits"].update(shape=[-1])), "one dimension"),
    "a hole": (header(lambda h: h["bits"].update(data_offsets=[0, 12])), "data_offsets|is at"),
    "a huge shape": (
        header(lambda h: h["reals"].update(shape=[1 << 59], data_offsets=[0, 1 << 61])),
        "no JSON|digits|ends",
    ),
    "a key more in a tensor": (header(lambda h: h["bits"].update(x=1)), "'x'"),
    "program no object": (lambda data: with_tree(data, []), "legal: an object"),
    "NaN": (text('"flat": ', '"flat": NaN, "flat": '), "NaN"),
    "infinity": (text("[4, 5, 5]", "[4, 5, -Infinity]"), "Infinity"),
    "a fraction": (text("[4, 5, 5]", "[4, 5, 5.0]"), "5.0"),
    "an exponent": (text("[4, 5, 5]", "[4, 5, 5e0]"), "5e0"),
    "many digits": (text("[4, 5, 5]", "[4, 5, " + "9" * 5_000 + "]"), "18 digits"),
    "a key twice": (text('"flat": ', '"flat": true, "flat": '), "'flat' twice"),
    "nested": (text("[4, 5, 5]", "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "nested objects": (text("[4, 5, 5]", '{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
    "nested but legal JSON": (text("[4, 5, 5]", "[" * 400 + "]" * 400), "whole number"),
    "two sides": (tree(lambda t: t.update(input=[4, 5])), "2 numbers"),
    "true for 1": (tree(lambda t: t.update(input=[True, 5, 5])), "True"),
    "a negative side": (tree(lambda t: t.update(input=[4, 5, -5])), "input has shape"),
    "a huge input": (tree(lambda t: t.update(input=[1 << 20, 16384, 16384])), "input has shape"),
    "no such output": (tree(lambda t: t.update(output=7)), "output is value 7; legal: .* 0 to 6"),
    "a negative output": (tree(lambda t: t.update(output=-1)), "output is value -1"),
    "output by name": (tree(lambda t: t.update(output="input")), "whole number"),
    "flat as a number": (tree(lambda t: t.update(flat=0)), "true, false"),
    "flat of an image": (tree(lambda t: t.update(flat=True)), "where it is flat"),
    "no operations": (tree(lambda t: t.pop("operations")), "lacks .'operations'"),
    "more than operations": (tree(lambda t: t.update(code="1")), "'code'"),
    "operations no list": (tree(lambda t: t.update(operations={})), "legal: a list"),
    "too many operations": (tree(lambda t: t.update(operations=[0] * (MAX_OPERATIONS + 1))), "10001 operations"),
    "an operation no object": (tree(lambda t: t["operations"].append(3)), "operation 7 is 3"),
    "no kind": (tree(lambda t: t["operations"][0].pop("kind")), "kind of operation 1 is None"),
    "unknown kind": (operation(0, kind="eval"), "'eval'; legal: binary_conv"),
    "kind no text": (operation(0, kind=["mean"]), "kind of operation 1"),
    "no name": (tree(lambda t: t["operations"][0].pop("name")), "lacks .'name'"),
    "an empty name": (operation(0, name=""), "printable"),
    "a long name": (operation(0, name="x" * 1_001), "printable"),
    "half a pair": (operation(0, name="\ud800"), "printable"),
    "a name that moves the cursor": (operation(0, name="\x1b[2J"), "printable"),
    "the input's name": (operation(0, name="input"), "its name is empty, or that of an earlier value"),
    "a name no text": (operation(0, name=3), "legal: a text"),
    "unknown key": (operation(0, eval="1"), "'eval'"),
    "an attribute of another kind": (operation(0, groups=1), "'groups'"),
    "an array's name as a key": (operation(3, weight=True), "'weight'"),
    "an array that is null": (operation(3, slope=None), "true, false"),
    "itself": (operation(0, x=1), "value 1; legal: one made before it, 0 to 0"),
    "a later value": (operation(1, x=5), "value 5"),
    "a negative value": (operation(1, x=-1), "value -1"),
    "a value by name": (operation(1, x="input"), "whole number"),
    "null": (operation(3, pick=None), "None"),
    "a map for a pick": (operation(3, pick=1, experts=2), "feature map"),
    "an image for a factor": (operation(3, factor=0), "factor has shape"),
    "groups 0": (operation(3, groups=0), "groups is 0"),
    "groups 3": (operation(3, groups=3), "groups is 3"),
    "channels 0": (operation(3, channels=0), "channels is 0"),
    "channels of a string": (operation(3, channels="4"), "'4'"),
    "more channels than weights": (operation(1, channels=1_000), "has 4000 numbers; the tensor 'reals' has"),
    "a window of three": (operation(3, window=[3, 3, 5]), "3 numbers"),
    "a window of zeros": (operation(3, window=[0, 3, 5, 5]), "kernel is"),
    "a window of floats": (operation(3, window=[3, 3, 5, 5.0]), "5.0"),
    "a window no list": (operation(3, window="3355"), "list of whole numbers"),
    "a huge window": (operation(3, window=[16384, 16384, 5, 5]), "taps; legal"),
    "a huge value": (operation(3, window=[3, 3, 16384, 16384]), "numbers in all"),
    "another activation": (operation(1, activation="exec"), "'exec'"),
    "an array less": (resized(-1), "the tensor 'reals' has"),
    "an array more": (resized(1), "1 numbers that nothing uses"),
    "not a number": (nan, "not finite"),
    "bits after a row": (dirty, "after a row's last bit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_one_is_refused(case: str, tmp_path: Path) -> None:
    mutate, match = REFUSED[case]
    data = file.to_bytes(chain())
    assert same(file.from_bytes(data), chain())
    path = tmp_path / "best.packed"
    path.write_bytes(mutate(data))
    with pytest.raises(FileFormatError, match=match) as caught:
        file.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1_000 + len(str(path))


def test_a_pick_is_among_the_experts() -> None:
    """Else it would be an address outside the weights."""
    build = Build(np.random.default_rng(0), (4, 5, 5))
    build.experts_conv(INPUT, 3)
    data = file.to_bytes(build.program())
    program = tree_of(split(data)[0])
    assert [entry["kind"] for entry in program["operations"]] == ["mean", "linear", "argmax", "binary_conv"]
    program["operations"][2]["x"] = 1
    with pytest.raises(FileFormatError, match="picks from 4; legal: its 3 experts"):
        file.from_bytes(with_tree(data, program))


def test_values_have_a_bound_together() -> None:
    data = file.to_bytes(Program((1, 16384, 16384), (), INPUT, flat=False))
    for count, legal in ((3, True), (4, False)):
        program = tree_of(split(data)[0])
        program["operations"] = [{"kind": "add", "name": f"{i}", "x": 0, "y": i} for i in range(count)]
        if legal:
            assert len(file.from_bytes(with_tree(data, program)).operations) == count
        else:
            with pytest.raises(FileFormatError, match="1342177280 numbers in all"):
                file.from_bytes(with_tree(data, program))


@pytest.mark.parametrize(
    "case", ["a huge shape", "a huge window", "a huge value", "a huge input", "more channels than weights"]
)
def test_a_small_file_cannot_ask_for_much_memory(case: str) -> None:
    data = REFUSED[case][0](file.to_bytes(chain()))
    tracemalloc.start()
    with pytest.raises(FileFormatError):
        file.from_bytes(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.packed"
    with path.open("wb") as sparse:
        sparse.truncate(file.MAX_BYTES + 1)
    with pytest.raises(FileFormatError, match=f"long.packed has {file.MAX_BYTES + 1} bytes"):
        file.read(path)


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file.read(tmp_path / "none.packed")
    with pytest.raises(IsADirectoryError):
        file.read(tmp_path)
    with pytest.raises(FileFormatError, match="regular file"):
        file.read(os.devnull)


def test_an_illegal_program_is_not_written(tmp_path: Path) -> None:
    program = chain()
    path = tmp_path / "best.packed"
    with pytest.raises(InvalidInputError, match="no feature map"):
        file.write(program._replace(output="none"), path)
    renamed = replace(program.operations[-1], name="a\nb")
    with pytest.raises(InvalidInputError, match=r"'a\\nb'"):
        file.write(program._replace(operations=(*program.operations[:-1], renamed), output="a\nb"), path)
    assert list(tmp_path.iterdir()) == []


def test_a_program_too_long_for_a_file_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "MAX_HEADER", 500)
    with pytest.raises(InvalidInputError, match="legal: up to 500"):
        file.to_bytes(chain())
    monkeypatch.undo()
    monkeypatch.setattr(file, "MAX_BYTES", 900)
    with pytest.raises(InvalidInputError, match="legal: up to 900"):
        file.to_bytes(chain())


def test_a_write_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.packed"
    first, second = small(np.random.default_rng(0)), chain()
    file.write(first, path)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        file.write(second, path)
    monkeypatch.undo()
    assert same(file.read(path), first)
    assert list(tmp_path.iterdir()) == [path]
    file.write(second, str(path))
    assert same(file.read(str(path)), second)


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "best.packed"
    options = [small(np.random.default_rng(seed)) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda program: file.write(program, path), options))
    assert any(same(file.read(path), program) for program in options)
    assert list(tmp_path.iterdir()) == [path]


# Files that are broken at random.

INTEGERS = (-1, 0, 1, 2, 3, 5, 7, 8, 64, 255, 16384, 16385, 1 << 20, 1 << 28, 1 << 31, 1 << 32, 1 << 63, -(1 << 31), -3)
ODD = (None, True, False, 1.5, -0.0, "", "x", "\ud800", [], {}, [1], [[]], {"kind": "add"}, 10**19, 10**4000)


def broken_bytes(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Changed without a thought of what it means."""
    head = 8 + int.from_bytes(data[:8], "little")
    raw = bytearray(data)
    end = choose(rng, 8, head, len(raw), len(raw))
    start = head if end == len(raw) and rng.random() < 0.5 and head < len(raw) else 0
    at, to = sorted(rng.integers(start, end, 2).tolist())
    match int(rng.integers(9)):
        case 0 | 1:
            for place in rng.integers(start, end, rng.integers(1, 5)):
                raw[place] ^= 1 << int(rng.integers(8))
        case 2:
            raw[at], raw[to] = raw[to], raw[at]
        case 3:
            raw[at] = int(rng.integers(256))
        case 4:
            del raw[at:]
        case 5:
            raw[at:at] = rng.bytes(int(rng.integers(1, 20)))
        case 6:
            del raw[at : min(to, at + 20) + 1]
        case 7:
            raw[at:at] = raw[at : min(to, at + 20) + 1]
        case 8:
            cut = int(rng.integers(len(other)))
            raw = raw[:at] + other[cut:]
    return bytes(raw)


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree: a container and a key of it."""
    keys = value if isinstance(value, dict) else range(len(value))
    inner = [place for key in keys if isinstance(value[key], dict | list) for place in nodes(value[key])]
    return [(value, key) for key in keys] + inner


def broken_tree(rng: np.random.Generator, value: dict[str, Any]) -> dict[str, Any]:
    """Changed where the JSON has its joints, once or more."""
    while True:
        places = nodes(value)
        container, key = places[int(rng.integers(len(places)))]
        old = container[key]
        match int(rng.integers(8)):
            case 0 | 1 | 2 if type(old) is int:
                container[key] = choose(rng, old + 1, old - 1, choose(rng, *INTEGERS))
            case 3:
                container[key] = (
                    json.loads(json.dumps(choose(rng, *ODD))) if rng.random() < 0.3 else choose(rng, *INTEGERS)
                )
            case 4:
                del container[key]
            case 5:
                place = choose(rng, *(place for other, place in places if other is container))
                container[key], container[place] = container[place], old
            case 6 if isinstance(container, list):
                container.insert(key, json.loads(json.dumps(old)))
            case 7 if isinstance(container, dict) and container.get("kind"):
                container["kind"] = choose(rng, *KINDS)
            case _:
                continue
        if rng.random() < 0.7:
            return value


def broken(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A mutation of ``data``, some with parts of ``other``."""
    head, body = split(data)
    kind = rng.random()
    if kind < 0.35:
        return broken_bytes(rng, data, other)
    if kind < 0.4:
        return joined(head, split(other)[1])
    if kind < 0.5:
        return joined(broken_tree(rng, head), body)
    if kind < 0.55:
        words = json.dumps(tree_of(head))
        cut = int(rng.integers(len(words)))
        return with_tree(data, words[:cut] + choose(rng, "", "0", "[", '"', "}", "9" * 5_000) + words[cut + 1 :])
    return with_tree(data, broken_tree(rng, tree_of(head)))


def cost(program: Program) -> int:
    """Roughly the numbers that a run touches."""
    shapes = check_program(program)
    total = sum(int(np.prod(size)) for size in shapes.values())
    for op in program.operations:
        total += op.macs(tuple(shapes[name] for name in op.inputs))
        total += int(np.prod(shapes[op.name])) * (op.window.taps if hasattr(op, "window") else 1)
    return total


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """Reads broken files and runs what is legal.

    Returns:
        How many were legal, and how many of them ran.
    """
    sources = np.random.default_rng(0)
    files = [file.to_bytes(small(sources)) for _ in range(20)] + [file.to_bytes(chain())]
    legal = ran = 0
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        data = broken(rng, choose(rng, *files), choose(rng, *files))
        try:
            program = file.from_bytes(data)
        except FileFormatError:
            continue
        legal += 1
        assert same(file.from_bytes(file.to_bytes(program)), program)
        if cost(program) < 300_000:
            ran += 1
            x = images(rng, program.input_shape, 1)
            shape = check_program(program)[program.output]
            for engine in ENGINES:
                assert engine(program).run(x).shape == (1, *shape), number
    return legal, ran


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_broken_file_is_refused_or_runs(seed: int) -> None:
    """A case that fails is told by its seed and number."""
    legal, ran = fuzz(2_500, seed)
    assert 250 < legal < 1_500
    assert ran > 0.9 * legal


@pytest.mark.slow
def test_many_broken_files_are_refused_or_run() -> None:
    legal, ran = fuzz(50_000, 4)
    assert ran > 0.9 * legal
