r"""A program as a file: safetensors with the operations as JSON in the metadata. No code, no address, no offset.

The file has two tensors of one dimension: ``reals`` (float32) and ``bits`` (uint8). The arrays of the operations follow
each other in them, in the order of the operations and of :attr:`~nasplat.packed.graph.Operation.ARRAYS`; their shapes
follow from the operations. The metadata is ``format``, ``version`` and ``program``::

    {
        "input": [3, 32, 32],
        "output": 1,
        "flat": false,
        "operations": [
            {
                "kind": "binary_conv",
                "name": "stem.conv",
                "x": 0,
                "channels": 36,
                "groups": 3,
                "window": [3, 3, 32, 32, 1, 1, 1, 1],
                "slope": true
            }
        ]
    }

A value is meant by its number: 0 is the input, ``i`` is what operation ``i`` makes. A window is kernel, size, stride,
dilation and padding; what an operation leaves out has its default, from a window's end as well. An optional array that
is there is ``true``.

A file is untrusted input. Whatever its bytes, reading it makes a program that has passed every check of
:mod:`~nasplat.packed.graph`, or raises :class:`~nasplat.errors.FileFormatError`, and takes memory in proportion to the
file's length. The header is parsed here and not by the safetensors package, which hands metadata out of files alone,
takes a key that is there twice, and writes metadata in an order that changes.
"""

from __future__ import annotations

import json
import operator
import os
import reprlib
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import MISSING, fields, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nasplat.errors import FileFormatError, InvalidInputError
from nasplat.packed.graph import (
    INPUT,
    KINDS,
    Operation,
    Program,
    Shape,
    Window,
    array_fields,
    attributes,
    check_arrays,
    check_count,
    check_input,
    check_output,
    check_picks,
    check_program,
    check_step,
    check_total,
)

T = TypeVar("T")

FORMAT = "nasplat.packed"
"""What ``format`` says in the metadata."""

VERSION = 1
"""Of the format. A reader reads its own version and those before."""

MAX_BYTES = 1 << 31
"""Longest file."""

MAX_HEADER = 1 << 25
"""Longest header of a file."""

MAX_NAME = 1_000
"""Longest name of a value, in characters."""

_STREAMS = {"reals": ("F32", "float32", 4), "bits": ("U8", "uint8", 1)}
"""The tensors in their order: type in the file, type of the arrays, bytes of a number."""


def to_bytes(program: Program) -> bytes:
    """The file of a program. Equal programs have equal files.

    Raises:
        InvalidInputError: The program is not legal, or too long for a file.
    """
    check_program(program)
    numbers = {name: i for i, name in enumerate((INPUT, *(op.name for op in program.operations)))}
    for name in numbers:
        _require(_is_name(name), f"the name {name!r} cannot be in a file; {_LEGAL_NAMES}")
    streams: dict[str, list[bytes]] = {name: [] for name in _STREAMS}
    stream = {dtype: streams[name] for name, (_, dtype, _) in _STREAMS.items()}
    for operation in program.operations:
        for array in array_fields(operation).values():
            if array is not None:
                stream[str(array.dtype)].append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    body = {name: b"".join(parts) for name, parts in streams.items()}
    text = _json(
        {
            "input": [operator.index(side) for side in program.input_shape],
            "output": numbers[program.output],
            "flat": bool(program.flat),
            "operations": [_written(operation, numbers) for operation in program.operations],
        }
    )
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "program": text}}
    begin = 0
    for name, (dtype, _, size) in _STREAMS.items():
        end = begin + len(body[name])
        header[name] = {"dtype": dtype, "shape": [len(body[name]) // size], "data_offsets": [begin, end]}
        begin = end
    head = _json(header).encode()
    head += b" " * (-len(head) % 8)
    _require(len(head) <= MAX_HEADER, f"the operations take {len(head)} bytes; legal: up to {MAX_HEADER}")
    data = b"".join((len(head).to_bytes(8, "little"), head, *body.values()))
    _require(len(data) <= MAX_BYTES, f"the file would have {len(data)} bytes; legal: up to {MAX_BYTES}")
    return data


def from_bytes(data: bytes, *, source: str = "the packed program") -> Program:
    """The program of a file. Its arrays cannot be written to.

    Args:
        data: All of the file.
        source: What the data is, for messages.

    Raises:
        FileFormatError: It is not the file of a legal program.
    """
    try:
        return _program(data)
    except FileFormatError as error:
        raise FileFormatError(f"{source}: {error}") from None
    except InvalidInputError as error:
        raise FileFormatError(f"{source} is not a packed program, or is damaged: {error}") from error


def write(program: Program, path: str | Path) -> None:
    """Write a program to a file, which is there whole or not at all.

    Raises:
        InvalidInputError: The program is not legal, or too long for a file, or the path is something else than a file.
        OSError: The folder is missing, or cannot be written to.
    """
    data, path = to_bytes(program), Path(path).resolve()
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{path} is there and is no file; legal: a new file, or one to replace")
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.partial")
    try:
        try:
            file = partial.open("xb")
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from None
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> Program:
    """Read the program of a file.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: It is not the file of a legal program.
    """
    # Without waiting for the other end, should it be a pipe.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise FileFormatError(f"{path} has {status.st_size} bytes; legal: a regular file of up to {MAX_BYTES}")
        return from_bytes(file.read(), source=str(path))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidInputError(what)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


_LEGAL_NAMES = f"legal: 1 to {MAX_NAME} printable characters"


def _is_name(value: object) -> bool:
    # Half a surrogate pair is not printable either.
    return isinstance(value, str) and 1 <= len(value) <= MAX_NAME and value.isprintable()


def _shown(value: object) -> str:
    """For a message: short however long and deep the value is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _of(kind: type[T], value: object, what: str, legal: str) -> T:
    # Of that very type: True is no number here, nor is 3.0.
    if type(value) is not kind:
        raise InvalidInputError(f"{what} is {_shown(value)}; legal: {legal}")
    return value


def _keys(tree: Mapping[str, Any], what: str, needed: Set[str], optional: Set[str] = frozenset()) -> None:
    missing, unknown = needed - tree.keys(), tree.keys() - needed - optional
    if missing or unknown:
        raise InvalidInputError(
            f"{what} lacks {_shown(sorted(missing))} and has {_shown(sorted(unknown))}; legal: {sorted(needed)}"
            + (f", and if wanted {sorted(optional)}" if optional else "")
        )


# What is not an array: how each attribute is written, and how it is read.


def _whole(value: object, what: str) -> int:
    return _of(int, value, what, "a whole number")


def _wholes(value: object, what: str) -> list[int]:
    return [_whole(item, what) for item in _of(list, value, what, "a list of whole numbers")]


def _flag(value: object, what: str) -> bool:
    return _of(bool, value, what, "true, false")


def _word(value: object, what: str) -> str:
    word = _of(str, value, what, "a text")
    _require(_is_name(word), f"{what} is {_shown(word)}; {_LEGAL_NAMES}")
    return word


def _value(number: int, names: Sequence[str], what: str) -> str:
    _require(0 <= number < len(names), f"{what} is value {number}; legal: one made before it, 0 to {len(names) - 1}")
    return names[number]


_TAIL = (1, 1, 0, 0)
"""A window's defaults: stride, dilation and padding. A window is written up to the last number that differs."""

_LENGTHS = (4, 5, 6, 8)


def _window_written(window: Window) -> list[int]:
    numbers = [*window.kernel, *window.size, window.stride, window.dilation, *window.padding]
    length = next(n for n in _LENGTHS if tuple(numbers[n:]) == _TAIL[n - 4 :])
    return [operator.index(number) for number in numbers[:length]]


def _window(value: object, what: str) -> Window:
    numbers = _wholes(value, what)
    _require(len(numbers) in _LENGTHS, f"{what} has {len(numbers)} numbers; legal: 4, 5, 6, 8")
    rows, columns, height, width, stride, dilation, top, left = (*numbers, *_TAIL[len(numbers) - 4 :])
    return Window((rows, columns), (height, width), stride, dilation, (top, left))


class _Attribute(NamedTuple):
    write: Callable[[Any, Mapping[str, int]], Any]
    read: Callable[[object, Sequence[str], str], Any]


_NUMBER = _Attribute(lambda value, _: operator.index(value), lambda value, _, what: _whole(value, what))
_WORD = _Attribute(lambda value, _: value, lambda value, _, what: _word(value, what))
_REFERENCE = _Attribute(
    lambda value, numbers: numbers[value], lambda value, names, what: _value(_whole(value, what), names, what)
)

_ATTRIBUTES = {
    "name": _WORD,
    "x": _REFERENCE,
    "y": _REFERENCE,
    "pick": _REFERENCE,
    "factor": _REFERENCE,
    "parts": _Attribute(
        lambda value, numbers: [numbers[part] for part in value],
        lambda value, names, what: tuple(_value(number, names, what) for number in _wholes(value, what)),
    ),
    "channels": _NUMBER,
    "groups": _NUMBER,
    "experts": _NUMBER,
    "window": _Attribute(lambda value, _: _window_written(value), lambda value, _, what: _window(value, what)),
    "activation": _WORD,
    "mode": _WORD,
    "count_padding": _Attribute(lambda value, _: bool(value), lambda value, _, what: _flag(value, what)),
}
"""By name: an attribute means the same in every kind of operation."""


def _defaults(kind: type[Operation]) -> dict[str, Any]:
    return {item.name: item.default for item in fields(kind) if item.default is not MISSING}


def _written(operation: Operation, numbers: Mapping[str, int]) -> dict[str, Any]:
    defaults = _defaults(type(operation))
    entry: dict[str, Any] = {"kind": operation.KIND}
    for name, value in attributes(operation).items():
        if name not in defaults or value != defaults[name]:
            entry[name] = _ATTRIBUTES[name].write(value, numbers)
    for name, array in array_fields(operation).items():
        if name in operation.OPTIONAL and array is not None:
            entry[name] = True
    return entry


# Reading. Whatever is wrong raises InvalidInputError, which says what it is; the file is named where that is caught.


class _Stream:
    """What is left of one of the tensors."""

    def __init__(self, name: str, numbers: NDArray[Any]) -> None:
        self.name = name
        self.left = numbers

    def cut(self, shape: tuple[int, ...], what: str) -> NDArray[Any]:
        count = prod(shape)
        _require(
            count <= len(self.left), f"{what} has {count} numbers; the tensor {self.name!r} has {len(self.left)} left"
        )
        array, self.left = self.left[:count].reshape(shape), self.left[count:]
        return array


def _program(data: bytes) -> Program:
    text, streams = _parts(data)
    tree = _parsed(text, "its program")
    _keys(tree, "its program", {"input", "output", "flat", "operations"})
    sides = _wholes(tree["input"], "input")
    _require(len(sides) == 3, f"input has {len(sides)} numbers; legal: channels, height and width")
    shape = (sides[0], sides[1], sides[2])
    shapes = check_input(shape)
    entries = _of(list, tree["operations"], "operations", "a list")
    check_count(len(entries))
    names = [INPUT]
    operations = []
    for entry in entries:
        operation = _operation(entry, names, shapes, streams)
        operations.append(operation)
        names.append(operation.name)
    for stream in streams.values():
        _require(not len(stream.left), f"the tensor {stream.name!r} has {len(stream.left)} numbers that nothing uses")
    output, flat = _value(_whole(tree["output"], "output"), names, "output"), _flag(tree["flat"], "flat")
    check_output(output, flat, shapes)
    check_picks(operations, shapes)
    check_total(operations, shapes)
    return Program(shape, tuple(operations), output, flat)


def _operation(
    entry: object, names: Sequence[str], shapes: dict[str, Shape], streams: Mapping[str, _Stream]
) -> Operation:
    """The next operation, checked; its shape is added to ``shapes``."""
    where = f"operation {len(names)}"
    entry = _of(dict, entry, where, "an object")
    word = _of(str, entry.get("kind"), f"kind of {where}", ", ".join(KINDS))
    _require(word in KINDS, f"kind of {where} is {_shown(word)}; legal: {', '.join(KINDS)}")
    kind = KINDS[word]
    named = {item.name for item in fields(kind)} - set(kind.ARRAYS)
    optional = {*_defaults(kind), *kind.OPTIONAL}
    _keys(entry, where, {"kind", *named} - optional, optional)
    given: dict[str, Any] = dict.fromkeys(kind.ARRAYS)
    given |= {
        name: _ATTRIBUTES[name].read(value, names, f"{name} of {where}")
        for name, value in entry.items()
        if name in named
    }
    absent = {name for name in kind.OPTIONAL if not _flag(entry.get(name, False), f"{name} of {where}")}
    operation = kind(**given)
    shape = check_step(operation, shapes)
    specs = operation.specs(tuple(shapes[name] for name in operation.inputs))
    arrays: dict[str, Any] = {
        name: streams[spec.dtype].cut(spec.shape, f"{name} of {where}")
        for name, spec in ((name, specs[name]) for name in kind.ARRAYS if name not in absent)
    }
    operation = replace(operation, **arrays)
    check_arrays(operation, shapes)
    shapes[operation.name] = shape
    return operation


def _parts(data: bytes) -> tuple[str, dict[str, _Stream]]:
    """The JSON of the program, and the tensors by the type of their numbers."""
    _require(len(data) <= MAX_BYTES, f"it is longer than {MAX_BYTES} bytes")
    _require(len(data) >= 8, f"it has {len(data)} bytes; legal: a safetensors file")
    length = int.from_bytes(data[:8], "little")
    legal = min(MAX_HEADER, len(data) - 8)
    _require(length <= legal, "it does not begin as a safetensors file does, or it is cut off")
    try:
        header = data[8 : 8 + length].decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"its header is no text: {error}") from error
    _require(header.startswith("{"), "its header does not start with '{'; legal: a safetensors file")
    tree = _parsed(header, "its header")
    metadata = _of(dict, tree.get("__metadata__"), "its metadata", f"that of a file of format {FORMAT!r}")
    found = metadata.get("format")
    _require(found == FORMAT, f"its format is {_shown(found)}; legal: {FORMAT!r}")
    _check_version(_of(str, metadata.get("version"), "its version", repr(str(VERSION))))
    _keys(metadata, "its metadata", {"format", "version", "program"})
    _keys(tree, "its header", {"__metadata__", *_STREAMS})
    text = _of(str, metadata["program"], "its program", "text")
    body = memoryview(data)[8 + length :]
    streams, begin = {}, 0
    for name, (dtype, kind, size) in _STREAMS.items():
        entry = _of(dict, tree[name], f"tensor {name!r}", "an object")
        _keys(entry, f"tensor {name!r}", {"dtype", "shape", "data_offsets"})
        found = entry["dtype"]
        _require(found == dtype, f"tensor {name!r} has type {_shown(found)}; legal: {dtype!r}")
        shape = _wholes(entry["shape"], f"shape of tensor {name!r}")
        _require(len(shape) == 1 and shape[0] >= 0, f"tensor {name!r} has shape {_shown(shape)}; legal: one dimension")
        end = begin + size * shape[0]
        found = _wholes(entry["data_offsets"], f"data_offsets of tensor {name!r}")
        _require(found == [begin, end], f"tensor {name!r} is at {_shown(found)}; legal: {[begin, end]}")
        _require(end <= len(body), f"tensor {name!r} ends at byte {end}; the file has {len(body)} bytes of tensors")
        array = np.frombuffer(body, np.dtype(kind).newbyteorder("<"), shape[0], begin).astype(kind)
        array.flags.writeable = False
        streams[kind] = _Stream(name, array)
        begin = end
    _require(begin == len(body), f"it has {len(body) - begin} bytes after its tensors")
    return text, streams


def _check_version(version: str) -> None:
    if version.isascii() and version.isdecimal() and len(version) < 10 and int(version) > VERSION:
        raise FileFormatError(
            f"it is of version {version}, made by a newer nasplat; this one reads up to {VERSION}. Update nasplat"
        )
    _require(version == str(VERSION), f"its version is {_shown(version)}; legal: {str(VERSION)!r}")


def _parsed(text: str, what: str) -> dict[str, Any]:
    """A JSON object without fractions, and without a key that is there twice."""

    def whole(digits: str) -> int:
        _require(len(digits) <= 18, f"{what} has the number {digits[:20]}...; legal: up to 18 digits")
        return int(digits)

    def refused(number: str) -> Any:
        raise InvalidInputError(f"{what} has the number {_shown(number)}; legal: whole ones")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise InvalidInputError(f"{what} has the key {_shown(twice)} twice")
        return tree

    try:
        tree = json.loads(text, object_pairs_hook=unique, parse_int=whole, parse_float=refused, parse_constant=refused)
    except InvalidInputError:
        raise
    except RecursionError as error:
        raise InvalidInputError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise InvalidInputError(f"{what} is no JSON: {error}") from error
    return _of(dict, tree, what, "an object")
