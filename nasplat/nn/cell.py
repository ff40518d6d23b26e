"""The cell of NASNet, DARTS and their kin: two inputs, four nodes, and the concatenated nodes as the output.

A built network holds the edges that are on, each with its operation (:class:`Cell`); a supernet holds every operation
of every edge (:class:`MixedCell`). What the operations are is the search space's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

KINDS = ("normal", "reduction")
"""The two cells of a network; a reduction cell halves the image and doubles the channels."""

NODES = (2, 3, 4, 5)
"""Nodes of a cell. 0 is the output of the cell before the last, 1 that of the last."""

Edges: TypeAlias = Mapping[tuple[int, int], Mapping[str, nn.Module]]
"""Per edge ``(node, source)`` its operations by name."""

Mixture: TypeAlias = Mapping[tuple[int, int], Sequence[tuple[str, Tensor]]]
"""Per edge ``(node, source)`` the operations to compute, each with its weight, a scalar tensor."""


class Use(NamedTuple):
    """One operation of one edge, and its weight in the mixture, a scalar tensor that is not 0."""

    name: str
    operation: nn.Module
    weight: Tensor


class Mix(Protocol):
    """Computes the edges that leave one state."""

    def __call__(self, x: Tensor, uses: Mapping[int, Sequence[Use]]) -> Mapping[int, Tensor]:
        """Per later node, the weighted sum of its edge's operations on ``x``.

        Args:
            x: The state, ``(n, c, h, w)``.
            uses: Per node the operations of its edge from this state. At least one node, and one operation for each.
        """
        ...


def mix(x: Tensor, uses: Mapping[int, Sequence[Use]]) -> dict[int, Tensor]:
    """The plain way to mix (see :class:`Mix`): each operation by itself."""
    mixed: dict[int, Tensor] = {}
    for node, listed in uses.items():
        terms = [use.operation(x) * use.weight for use in listed]
        mixed[node] = sum(terms[1:], terms[0])
    return mixed


def _modules(edges: Edges) -> nn.ModuleDict:
    return nn.ModuleDict(
        {f"node{node}_from{source}": nn.ModuleDict(dict(held)) for (node, source), held in edges.items() if held}
    )


def _edge(edges: nn.ModuleDict, node: int, source: int) -> nn.ModuleDict:
    return cast("nn.ModuleDict", edges[f"node{node}_from{source}"])


class Cell(nn.Module):
    """A cell of a built network: each edge that is on holds its one operation.

    Args:
        kind: One of :data:`KINDS`.
        preprocess0: Brings the older input to the cell's channels, and to the newer one's height and width.
        preprocess1: Brings the newer input to the cell's channels.
        edges: The operations; an edge that is off has none, or is not there. Those of a reduction cell that leave an
            input have stride 2.
    """

    def __init__(self, kind: str, preprocess0: nn.Module, preprocess1: nn.Module, edges: Edges) -> None:
        super().__init__()
        self.kind = kind
        self.preprocess0 = preprocess0
        self.preprocess1 = preprocess1
        self.edges = _modules(edges)

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        """From ``(n, c0, h0, w0)`` and ``(n, c1, h, w)`` to ``(n, 4 * c, h', w')``; h' is half of h in a reduction."""
        states = [self.preprocess0(older), self.preprocess1(newer)]
        for node in NODES:
            terms = [
                operation(states[source])
                for source in range(node)
                if f"node{node}_from{source}" in self.edges
                for operation in _edge(self.edges, node, source).values()
            ]
            states.append(sum(terms[1:], terms[0]))
        return torch.cat(states[2:], dim=1)


class MixedCell(nn.Module):
    """A cell of a supernet: every operation of every edge, under the names that a built cell has for its own.

    All edges that leave a state are computed together, so that what they have in common can be computed once: that is
    what ``mix`` is for.

    Args:
        kind: See :class:`Cell`.
        preprocess0: Likewise.
        preprocess1: Likewise.
        edges: The operations, for ``channels / partial`` channels.
        mix: Computes the edges that leave one state.
        partial: One in ``partial`` channels goes through the mixture; the others pass by it (at stride 2 through a
            2x2 max pool), times the sum of the edge's weights, and all are shuffled (PC-DARTS, arXiv:1907.05737).
    """

    def __init__(
        self,
        kind: str,
        preprocess0: nn.Module,
        preprocess1: nn.Module,
        edges: Edges,
        *,
        mix: Mix = mix,
        partial: int = 1,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.preprocess0 = preprocess0
        self.preprocess1 = preprocess1
        self.edges = _modules(edges)
        self.stride = 2 if kind == "reduction" else 1
        self.partial = partial
        self._mix = mix

    def forward(self, older: Tensor, newer: Tensor, mixture: Mixture) -> Tensor:
        """From ``(n, c0, h0, w0)`` and ``(n, c1, h, w)`` to ``(n, 4 * c, h', w')``; h' is half of h in a reduction."""
        inputs = (self.preprocess0(older), self.preprocess1(newer))
        nodes: dict[int, Tensor] = {}
        for source in range(NODES[-1]):
            state = inputs[source] if source < 2 else nodes.get(source)
            if state is None:
                state = nodes[source] = self._nothing(inputs[1])
            uses = {
                node: [
                    Use(name, _edge(self.edges, node, source)[name], weight) for name, weight in mixture[node, source]
                ]
                for node in NODES
                if node > source and mixture[node, source]
            }
            if not uses:
                continue
            for node, y in self._edges_from(state, self.stride if source < 2 else 1, uses).items():
                nodes[node] = nodes[node] + y if node in nodes else y
        return torch.cat([nodes[node] if node in nodes else self._nothing(inputs[1]) for node in NODES], dim=1)

    def _edges_from(self, x: Tensor, stride: int, uses: Mapping[int, Sequence[Use]]) -> Mapping[int, Tensor]:
        if self.partial == 1:
            return self._mix(x, uses)
        share = x.shape[1] // self.partial
        mixed = self._mix(x[:, :share], uses)
        passed = x[:, share:] if stride == 1 else functional.max_pool2d(x[:, share:], 2, ceil_mode=True)
        nodes: dict[int, Tensor] = {}
        for node, y in mixed.items():
            weight = torch.stack([use.weight for use in uses[node]]).sum()
            nodes[node] = functional.channel_shuffle(torch.cat([y, passed * weight], dim=1), self.partial)
        return nodes

    def _nothing(self, x: Tensor) -> Tensor:
        # A node of a supernet can have all of its edges at zero; an architecture has two that are on.
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class AuxiliaryHead(nn.Module):
    """A second classifier for training, on 2x2 averages so that any image size will do (after DARTS' own).

    Args:
        channels: Of its input.
        classes: Number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, channels, h, w)`` to logits ``(n, classes)``."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits
