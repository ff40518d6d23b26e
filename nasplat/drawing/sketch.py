"""What a space says of an architecture: cells as graphs, networks as rows of stages. Data, no lines or colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nasplat.errors import InvalidInputError


@dataclass(frozen=True)
class Graph:
    """A cell: nodes joined by named operations.

    Attributes:
        title: What it is a picture of: ``normal cell``.
        nodes: Names in topological order, inputs first and outputs last. ``c_{k-1}`` is shown with a subscript.
        edges: ``(from, to, operation)``; an empty operation is a plain line (a concatenation, for instance). Two nodes
            may be joined by several.

    Raises:
        InvalidInputError: Two nodes have one name, or an edge names no node or goes against their order.
    """

    title: str
    nodes: tuple[str, ...]
    edges: tuple[tuple[str, str, str], ...]

    def __post_init__(self) -> None:
        order = {node: index for index, node in enumerate(self.nodes)}
        if len(order) != len(self.nodes):
            raise InvalidInputError(f"the graph {self.title!r} needs nodes of different names, got {self.nodes}")
        for source, target, operation in self.edges:
            if source not in order or target not in order or order[source] >= order[target]:
                raise InvalidInputError(
                    f"the graph {self.title!r} has an edge {operation!r} from {source!r} to {target!r}; "
                    f"legal: from an earlier to a later one of {', '.join(self.nodes)}"
                )


@dataclass(frozen=True)
class Block:
    """One stage or layer in a row of them.

    Attributes:
        name: Its heading: ``stage 2``, ``stem``.
        lines: What was chosen for it, one fact a line: ``kernel 5x5``, ``reduction 6``.
        channels: Channels of its output; the picture's block is the taller the more there are. 0 where it has none.
        repeats: How many times it stands in a row.
        stride: Of its first repetition; a block that halves the image is marked.

    Raises:
        InvalidInputError: A number is out of range.
    """

    name: str
    lines: tuple[str, ...] = ()
    channels: int = 0
    repeats: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        for field, least in (("channels", 0), ("repeats", 1), ("stride", 1)):
            if getattr(self, field) < least:
                raise InvalidInputError(
                    f"the block {self.name!r} has {field} {getattr(self, field)}; legal: from {least} up"
                )


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
