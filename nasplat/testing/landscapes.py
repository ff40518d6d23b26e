"""Search spaces with a known answer, for trying strategies without training anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.objectives import Constraint, Objective, at_most, maximise, minimise
from nasplat.space import Group, Option, Relaxed, SearchSpace, Supernet
from nasplat.strategy import History

Score = Callable[[Architecture], Mapping[str, float]]
"""Metrics of an architecture. May raise, as training may."""

ShortScore = Callable[[Architecture, float], Mapping[str, float]]
"""Metrics of an architecture after a share of the full training, in [0, 1]."""


@dataclass(frozen=True)
class Landscape:
    """A space, what is wanted, and the metrics of every architecture.

    Attributes:
        space: What is searched.
        score: Metrics of an architecture, at once.
        objectives: What is wanted.
        constraints: Hard limits.
        optimum: Best value of the first objective that keeps the limits.
        short: Metrics after less than the full training; None is those of the full training, whatever the budget.
    """

    space: SearchSpace
    score: Score
    objectives: Sequence[Objective] = (maximise("value"),)
    constraints: Sequence[Constraint] = ()
    optimum: float = 1.0
    short: ShortScore | None = None

    def history(self) -> History:
        """An empty history of a search on this landscape."""
        return History(self.space, self.objectives, self.constraints)

    def metrics(self, architecture: Architecture, budget: float = 1.0) -> Mapping[str, float]:
        """Metrics of an architecture after a share of the full training, in [0, 1]."""
        if self.short is None or budget >= 1.0:
            return self.score(architecture)
        return self.short(architecture, budget)


@dataclass(frozen=True)
class Levels(SearchSpace):
    """Independent choices among the integers below ``levels``.

    Attributes:
        length: Number of choices.
        levels: Options of each.
    """

    length: int = 10
    levels: int = 4

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """``x0``, ``x1``, ..."""
        return {f"x{index}": tuple(range(self.levels)) for index in range(self.length)}

    def build(self, architecture: Architecture) -> nn.Module:
        """There is no network behind a landscape."""
        raise UnsupportedError(f"{self.name} is a landscape: its architectures are scored, not built")


@dataclass(frozen=True)
class Edges(SearchSpace):
    """Nodes with four possible incoming edges of which two are on; the edges of a node offer different options.

    Attributes:
        nodes: Number of nodes.
    """

    nodes: int = 4

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """Per node four edges, and the node's activation."""
        table: dict[str, Sequence[Option]] = {}
        for node in range(self.nodes):
            for edge in range(4):
                table[f"node{node}/from{edge}"] = ("zero", "a", "b", "c")[: 4 - edge % 2]
            table[f"node{node}/activation"] = ("relu", "prelu")
        return table

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        """Two edges a node."""
        return {
            f"node{node}": Group(tuple(f"node{node}/from{edge}" for edge in range(4)), 2, "zero")
            for node in range(self.nodes)
        }

    def build(self, architecture: Architecture) -> nn.Module:
        """There is no network behind a landscape."""
        raise UnsupportedError(f"{self.name} is a landscape: its architectures are scored, not built")


def _level_value(architecture: Architecture) -> dict[str, float]:
    levels = [int(level) for level in architecture.genes.values()]
    # Each choice has a right level of its own, so that no strategy gains from always taking the first or the last.
    top = max(max(levels), 3)
    hits = [1 - abs(level - (7 * index + 2) % (top + 1)) / top for index, level in enumerate(levels)]
    return {"value": sum(hits) / len(hits)}


def one_max(length: int = 10) -> Landscape:
    """Separable: each of ``length`` choices of four levels is worth the more, the nearer to its right level."""
    return Landscape(Levels(length, 4), _level_value)


def short_training(landscape: Landscape, noise: float = 0.1) -> Landscape:
    """The landscape with a misleading ``value`` below the full training: lower, and the shorter, the noisier.

    At the budget b the value is multiplied by ``b ** 0.2`` and changed by noise of standard deviation
    ``noise * (1 - b)``, which is the same whenever the same architecture is trained for as long.
    """

    def short(architecture: Architecture, budget: float) -> dict[str, float]:
        metrics = dict(landscape.score(architecture))
        rng = np.random.default_rng([int(architecture.id, 16), round(budget * 1e6)])
        metrics["value"] = metrics["value"] * budget**0.2 + noise * (1 - budget) * float(rng.standard_normal())
        return metrics

    return replace(landscape, short=short)


def _edge_value(architecture: Architecture) -> dict[str, float]:
    worth = {"zero": 0.0, "a": 1.0, "b": 2.0, "c": 3.0, "relu": 0.0, "prelu": 1.0}
    total = sum(worth[str(option)] for option in architecture.genes.values())
    # At best two edges at "c" and the right activation.
    nodes = sum(name.endswith("activation") for name in architecture.genes)
    return {"value": total / (7 * nodes)}


def one_max_edges(nodes: int = 4) -> Landscape:
    """Separable, with groups: two of a node's four edges are on, and only two of them offer the best option."""
    return Landscape(Edges(nodes), _edge_value)


def _trade_off(architecture: Architecture) -> dict[str, float]:
    levels = [int(level) / 3 for level in architecture.genes.values()]
    value = sum(level**0.5 for level in levels) / len(levels)
    return {"value": value, "cost": sum(levels) / len(levels)}


def trade_off(length: int = 8, limit: float | None = 0.6) -> Landscape:
    """Two objectives that pull apart: ``value`` up, ``cost`` down, and no more ``cost`` than ``limit``.

    At a given cost, the value is greatest where all levels are near each other.
    """
    constraints = () if limit is None else (at_most("cost", limit),)
    return Landscape(Levels(length, 4), _trade_off, (maximise("value"), minimise("cost")), constraints)


def tiny() -> Landscape:
    """Sixteen architectures: to be exhausted."""
    return Landscape(Levels(2, 4), _level_value)


@dataclass(frozen=True)
class TinyCell(SearchSpace):
    """A convolutional cell for images of any size, with a supernet that trains in milliseconds a step.

    Two of three parallel edges are on, and an activation is chosen.

    Attributes:
        channels: Channels of the cell.
        in_channels: Channels of an image.
        classes: Number of classes.
    """

    channels: int = 4
    in_channels: int = 1
    classes: int = 10
    operations: tuple[str, ...] = field(default=("zero", "identity", "conv", "pool"), repr=False)

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """Three edges and an activation."""
        return {**{f"edge{index}": self.operations for index in range(3)}, "activation": ("relu", "tanh")}

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        """Two of the three edges."""
        return {"edges": Group(("edge0", "edge1", "edge2"), 2, "zero")}

    def build(self, architecture: Architecture) -> nn.Module:
        """The supernet's layers with the weights of one architecture."""
        return _TinyNetwork(self, self.relax(architecture))

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """All edges with all operations. ``keep`` and ``partial`` are not supported."""
        if keep is not None or partial != 1:
            raise UnsupportedError(f"{self.name} has a whole supernet only, got keep={keep}, partial={partial}")
        return _TinySupernet(self)


class _TinySupernet(Supernet):
    def __init__(self, space: TinyCell) -> None:
        super().__init__()
        self.names = [name for name in space.choices if name.startswith("edge")]
        self.stem = nn.Conv2d(space.in_channels, space.channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(space.channels)
        self.convs = nn.ModuleList(nn.Conv2d(space.channels, space.channels, 3, padding=1) for _ in self.names)
        self.drop = nn.Dropout(0.1)  # randomness in training, which a resumed run must repeat
        self.head = nn.Linear(space.channels, space.classes)

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, in_channels, h, w)``."""
        missing = [name for name in (*self.names, "activation") if name not in relaxed]
        if missing:
            raise InvalidInputError(f"relaxed lacks weights for {', '.join(missing)}")
        x = self.norm(self.stem(x))
        total = torch.zeros_like(x)
        for name, conv in zip(self.names, self.convs, strict=True):
            _, identity, convolution, pool = relaxed[name]
            total = total + identity * x + convolution * conv(x)
            total = total + pool * nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
        relu, tanh = relaxed["activation"]
        total = relu * torch.relu(total) + tanh * torch.tanh(total)
        logits: Tensor = self.head(self.drop(total.mean(dim=(2, 3))))
        return logits


class _TinyNetwork(nn.Module):
    def __init__(self, space: TinyCell, relaxed: Relaxed) -> None:
        super().__init__()
        self.net = _TinySupernet(space)
        self.relaxed = dict(relaxed)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x, self.relaxed)
        return logits
