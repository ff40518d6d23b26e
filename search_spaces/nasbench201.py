"""The search space of NAS-Bench-201 (Dong, Yang 2020, arXiv:2001.00326): one cell of four nodes, 15,625 in all.

A network is a stem, three stages of equal cells with a residual block between two stages that halves the image and
doubles the channels, and a classifier. One cell is searched. Its first node is its input and its last is its output;
each pair of nodes is joined by an edge, and an edge is one of five operations. A node is the sum of its edges.

Every cell was trained by the authors, and the results are public: ``search_spaces.nasbench201_table`` looks them up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.drawing import Graph, Sketch
from nasplat.errors import ArchitectureError, InvalidInputError
from nasplat.space import Option, Relaxed, SearchSpace, Supernet

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""What an edge can be. ``none`` is an edge that is not there."""

NODES = 4
"""Nodes of a cell: 0 is its input, 3 its output."""

EDGES = tuple((source, node) for node in range(1, NODES) for source in range(node))
"""Edges ``(from, to)`` in the paper's order."""

STAGES = 3
"""Stages of cells; the channels double from one to the next."""

Mixture: TypeAlias = Mapping[tuple[int, int], Sequence[tuple[str, Tensor | None]]]
"""Per edge the operations to compute, each with its weight, a scalar tensor; None is 1."""


@dataclass(frozen=True)
class NasBench201(SearchSpace):
    """The NAS-Bench-201 space: 6 edges of 5 operations.

    Several cells compute the same (an edge from a node that nothing leads to, say, might as well not be there); they
    are different architectures here, as they are in the benchmark. A cell may even join its input with its output by
    no path at all; see :meth:`connected`.

    Attributes:
        cells: Cells in each of the three stages.
        channels: Channels of the first stage.
        in_channels: Channels of an image.
        classes: Number of classes.
    """

    cells: int = 5
    channels: int = 16
    in_channels: int = 3
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("cells", "channels", "in_channels", "classes"):
            if not is_whole(getattr(self, name)):
                raise InvalidInputError(f"NasBench201: {name} is {getattr(self, name)!r}; legal: an integer from 1 up")

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """A cell of 8 channels per stage, on grey images of about 8x8 to 28x28: trains on one CPU core.

        Args:
            overrides: Any attribute, e.g. ``NasBench201.small(in_channels=3, classes=100)``.
        """
        return cls(**{"cells": 1, "channels": 8, "in_channels": 1, **overrides})

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """An operation per edge: ``0-1``, ``0-2``, ``1-2``, ``0-3``, ``1-3``, ``2-3``."""
        return {edge_name(source, node): OPERATIONS for source, node in EDGES}

    # The notation of the paper.

    def to_string(self, architecture: Architecture) -> str:
        """A cell as the paper and the benchmark's own tools write it.

        Args:
            architecture: One with the edges of this space.

        Returns:
            Per node but the first its edges: ``|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...|``.
        """
        genes = self.architecture(architecture.genes).genes
        return "+".join(
            "|" + "".join(f"{genes[edge_name(source, node)]}~{source}|" for source in range(node))
            for node in range(1, NODES)
        )

    def from_string(self, text: str) -> Architecture:
        """The cell that :meth:`to_string` wrote, or that a paper prints.

        Args:
            text: Edges of one node in any order.

        Raises:
            ArchitectureError: The text is not of that form, lacks an edge, names one twice or an unknown operation.
        """
        genes: dict[str, str] = {}
        nodes = text.strip().split("+")
        for node, part in enumerate(nodes, 1):
            edges = part.strip().removeprefix("|").removesuffix("|").split("|")
            for edge in edges:
                found = re.fullmatch(r"\s*(\w+)~(\d+)\s*", edge)
                name = edge_name(int(found[2]), node) if found else ""
                if found is None or name not in self.choices or name in genes:
                    raise ArchitectureError(
                        f"NasBench201: {text!r} is no cell, because of {edge!r} at node {node}; legal: "
                        "|op~0|+|op~0|op~1|+|op~0|op~1|op~2| with an operation and a node before it for each edge"
                    )
                genes[name] = found[1]
        return self.architecture(genes)

    def connected(self, architecture: Architecture) -> bool:
        """Whether a path leads from the cell's input to its output. 341 of the 15,625 cells have none.

        The output of a network of such cells does not depend on its input.
        """
        reached = {0}
        for source, node in EDGES:
            if source in reached and architecture.genes[edge_name(source, node)] != "none":
                reached.add(node)
        return NODES - 1 in reached

    # Networks.

    def build(self, architecture: Architecture) -> nn.Module:
        """The network of one architecture.

        Args:
            architecture: One of this space.

        Returns:
            From ``(n, in_channels, h, w)`` to logits ``(n, classes)``. It holds the parameters of all of its edges, as
            the authors' does; what does not lead to the cell's output is not computed. State dict: a part of the
            supernet's, with equal names, besides the affine parameters of the BatchNorms in cells.
        """
        self.architecture(architecture.genes)
        return CellNetwork(self, {name: (str(option),) for name, option in architecture.genes.items()})

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """Every operation on every edge, BatchNorms of the cells without affine parameters.

        Args:
            keep: Operations still alive, per edge; an edge that is not named keeps all. Weights of ``relaxed`` are in
                the order of the choice all the same, and zero for those dropped.
            partial: One in so many channels of a node goes through the operations of an edge, the others pass by
                (PC-DARTS, arXiv:1907.05737). Built networks cannot inherit such weights.

        Raises:
            InvalidInputError: ``keep`` names an unknown edge or operation, or leaves an edge without any; or
                ``channels`` is not divisible by ``partial``.
        """
        legal = [n for n in range(1, self.channels + 1) if self.channels % n == 0]
        if partial not in legal:
            raise InvalidInputError(
                f"NasBench201: partial is {partial}; legal: {', '.join(map(str, legal))} (channels={self.channels})"
            )
        alive = {name: tuple(map(str, options)) for name, options in self.alive(keep).items()}
        return CellSupernet(self, alive, partial)

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights into a built network, in place: those of equal name and shape.

        From the supernet (``source`` None), the affine parameters of the cells' BatchNorms, which it lacks, stay as
        they are in ``model``.

        Args:
            model: A network of :meth:`build`.
            source: The architecture that ``state`` belongs to; None for the supernet.
            state: Tensors by name.

        Raises:
            InvalidInputError: Any other tensor of the model is missing in ``state`` or has another shape.
        """
        if source is None:
            own = model.state_dict()
            lacking = {
                f"{prefix}.{name}"
                for prefix, module in model.named_modules()
                if isinstance(module, nn.BatchNorm2d)
                for name, _ in module.named_parameters(recurse=False)
            }
            state = {**{name: own[name] for name in lacking}, **state}
        return super().inherit(model, source, state)

    def sketch(self, architecture: Architecture) -> Sketch:
        """The cell as a graph, its input on the left and its output on the right."""
        names = ("input", *(str(node) for node in range(1, NODES - 1)), "output")
        edges = tuple(
            (names[source], names[node], str(architecture.genes[edge_name(source, node)]))
            for source, node in EDGES
            if architecture.genes[edge_name(source, node)] != "none"
        )
        return [Graph("cell", names, edges)]


def edge_name(source: int, node: int) -> str:
    """The choice of an edge: ``0-2``."""
    return f"{source}-{node}"


class ReluConvNorm(nn.Module):
    """ReLU, convolution, BatchNorm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd; padding keeps the size at stride 1.
        stride: 1 or 2.
        affine: Whether the BatchNorm has a learned scale and bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, ceil(h / stride), ceil(w / stride))``."""
        y: Tensor = self.norm(self.conv(functional.relu(x)))
        return y


class ResidualReduction(nn.Module):
    """Halves the image: two 3x3 convolutions beside an average pool and a 1x1 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_a = ReluConvNorm(in_channels, out_channels, 3, stride=2)
        self.conv_b = ReluConvNorm(out_channels, out_channels, 3)
        # ceil_mode: as the convolution does, so that odd sizes work; even ones are as published.
        self.pool = nn.AvgPool2d(2, ceil_mode=True)
        self.project = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, ceil(h / 2), ceil(w / 2))``."""
        y: Tensor = self.project(self.pool(x)) + self.conv_b(self.conv_a(x))
        return y


def make_operation(name: str, channels: int, *, affine: bool) -> nn.Module:
    """One operation of an edge, from ``(n, channels, h, w)`` to the same shape.

    Args:
        name: One of :data:`OPERATIONS` but ``none``.
        channels: In and out.
        affine: Whether the BatchNorm of a convolution has a learned scale and bias.
    """
    match name:
        case "skip_connect":
            return nn.Identity()
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        case _:
            return ReluConvNorm(channels, channels, int(name[-1]), affine=affine)


class Cell(nn.Module):
    """The searched cell, of a built network (an operation per edge) or of a supernet (all that are alive).

    Args:
        operations: Names by edge; ``none`` holds nothing.
        channels: In and out.
        affine: Whether BatchNorms have a learned scale and bias.
        partial: One in so many channels goes through the operations (:meth:`NasBench201.supernet`).
    """

    def __init__(
        self, operations: Mapping[str, Sequence[str]], channels: int, *, affine: bool, partial: int = 1
    ) -> None:
        super().__init__()
        self.partial = partial
        self.edges = nn.ModuleDict(
            {
                name: nn.ModuleDict(
                    {
                        operation: make_operation(operation, channels // partial, affine=affine)
                        for operation in held
                        if operation != "none"
                    }
                )
                for name, held in operations.items()
            }
        )

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        """From ``(n, channels, h, w)`` to the same shape.

        Args:
            x: The cell's input.
            mixture: What to compute. An edge without operations is not there; a node without edges is 0.
        """
        needed = {NODES - 1}
        for source, node in reversed(EDGES):
            if node in needed and mixture[source, node]:
                needed.add(source)
        nodes = [x]
        for node in range(1, NODES):
            terms = [
                self._edge(source, node, nodes[source], mixture[source, node])
                for source in range(node)
                if node in needed and mixture[source, node]
            ]
            nodes.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(x))
        return nodes[-1]

    def _edge(self, source: int, node: int, x: Tensor, uses: Sequence[tuple[str, Tensor | None]]) -> Tensor:
        held = cast("nn.ModuleDict", self.edges[edge_name(source, node)])
        share = x if self.partial == 1 else x[:, : x.shape[1] // self.partial]
        terms = [held[name](share) if weight is None else held[name](share) * weight for name, weight in uses]
        mixed: Tensor = sum(terms[1:], terms[0])
        if self.partial == 1:
            return mixed
        weights = [torch.ones((), device=x.device) if weight is None else weight for _, weight in uses]
        passed = x[:, share.shape[1] :] * torch.stack(weights).sum()
        return functional.channel_shuffle(torch.cat([mixed, passed], dim=1), self.partial)


class _Trunk(nn.Module):
    """Stem, cells, residual blocks and classifier: what a built network and the supernet share, with equal names."""

    def __init__(
        self, space: NasBench201, operations: Mapping[str, Sequence[str]], *, affine: bool, partial: int = 1
    ) -> None:
        super().__init__()
        channels = space.channels
        self.stem = nn.Sequential(
            nn.Conv2d(space.in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.layers = nn.ModuleList()
        for stage in range(STAGES):
            if stage:
                self.layers.append(ResidualReduction(channels, 2 * channels))
                channels *= 2
            for _ in range(space.cells):
                self.layers.append(Cell(operations, channels, affine=affine, partial=partial))
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, space.classes)

    def logits(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, in_channels, h, w)``."""
        for layer in (self.stem, *self.layers):
            x = layer(x, mixture) if isinstance(layer, Cell) else layer(x)
        logits: Tensor = self.classifier(self.pool(functional.relu(self.norm(x))).flatten(1))
        return logits


class CellNetwork(_Trunk):
    """A built network: each edge holds its own operation.

    Attributes:
        transfer_points: Names of the modules whose outputs a teacher's are compared with: the last cell of each stage.
    """

    def __init__(self, space: NasBench201, operations: Mapping[str, Sequence[str]]) -> None:
        super().__init__(space, operations, affine=True)
        self._mixture = {
            (source, node): [(name, None) for name in operations[edge_name(source, node)] if name != "none"]
            for source, node in EDGES
        }
        self.transfer_points = tuple(f"layers.{stage * (space.cells + 1) + space.cells - 1}" for stage in range(STAGES))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, classes)``."""
        return self.logits(x, self._mixture)


class CellSupernet(_Trunk, Supernet):
    """Every operation of every edge."""

    def __init__(self, space: NasBench201, operations: Mapping[str, Sequence[str]], partial: int) -> None:
        super().__init__(space, operations, affine=False, partial=partial)
        self.space = space
        self.operations = operations

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)``; see :class:`nasplat.space.Supernet`.

        Args:
            x: Images ``(n, in_channels, h, w)``.
            relaxed: Per edge a weight per operation, shape ``(5,)``.

        Raises:
            InvalidInputError: A dropped operation has a weight other than 0, or an edge has no weights.
        """
        return self.logits(x, dict(self._mixtures(relaxed)))

    def _mixtures(self, relaxed: Relaxed) -> Iterator[tuple[tuple[int, int], list[tuple[str, Tensor | None]]]]:
        used = self.space.used(relaxed, self.operations)
        for source, node in EDGES:
            name = edge_name(source, node)
            weights = relaxed[name].unbind()
            # The first operation is an edge that is not there.
            yield (source, node), [(OPERATIONS[index], weights[index]) for index in used[name] if index]
