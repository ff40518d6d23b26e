"""Pictures of architectures: what a space says of one (a sketch), and how it is drawn.

A space describes an architecture as data, cells as :class:`Graph` and rows of stages as :class:`Stages`; everything
about lines and colours is here, so that all spaces look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Graph:
    """A cell: nodes joined by named operations.

    Attributes:
        title: What it is a picture of: ``normal cell``.
        nodes: Names in topological order, inputs first and outputs last.
        edges: ``(from, to, operation)``; an empty operation is a plain line (a concatenation, for instance).
    """

    title: str
    nodes: tuple[str, ...]
    edges: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Block:
    """One stage or layer in a row of them.

    Attributes:
        name: Its heading: ``stage 2``, ``stem``.
        lines: What was chosen for it, one fact a line: ``kernel 5x5``, ``reduction 6``.
        channels: Channels of its output; the picture's block is the taller the more there are. 0 where it has none.
        repeats: How many times it stands in a row.
        stride: Of its first repetition; a block that halves the image is marked.
    """

    name: str
    lines: tuple[str, ...] = ()
    channels: int = 0
    repeats: int = 1
    stride: int = 1


@dataclass(frozen=True)
class Stages:
    """A network as a row of blocks, input on the left.

    Attributes:
        title: What it is a picture of.
        blocks: In the order of the data.
    """

    title: str
    blocks: tuple[Block, ...]


Sketch: TypeAlias = Sequence[Graph | Stages]
"""What a space says of an architecture: its parts, drawn below each other."""


@dataclass(frozen=True)
class Picture:
    """A drawn sketch.

    Attributes:
        sketch: Its parts.
    """

    sketch: tuple[Graph | Stages, ...]
