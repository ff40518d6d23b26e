"""BATS: cells of binary grouped convolutions (Bulat, Martinez, Tzimiropoulos 2020, arXiv:2003.01711).

A network is a stem, a row of cells and a classifier. Two cells are searched: a normal one, and a reduction one that
halves the image and doubles the channels. A cell has two inputs (the outputs of the two cells before it), four nodes,
and the concatenated nodes as its output. A node is the sum of two edges; an edge is one of seven operations on an
earlier node or input. Stem, classifier, normalisations, activations, pools and sums are real; every convolution inside
the cells, 1x1 ones included, is binary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn import BinaryBlock, BinaryFactorisedReduce
from nasplat.space import Group, Option, Relaxed, SearchSpace, Supernet

OPERATIONS = (
    "zero",
    "max_pool_3x3",
    "avg_pool_3x3",
    "identity",
    "gconv_3x3",
    "gconv_5x5",
    "dil_gconv_3x3",
    "dil_gconv_5x5",
)
"""What an edge can be (arXiv:2003.01711). ``zero`` is an edge that is not there."""

KINDS = ("normal", "reduction")
"""The two cells that are searched."""

NODES = (2, 3, 4, 5)
"""Nodes of a cell. 0 is the output of the cell before the last, 1 that of the last."""

PAPER_GENES: Mapping[str, str] = MappingProxyType(
    {
        "normal/node2/from0": "gconv_5x5",
        "normal/node2/from1": "dil_gconv_5x5",
        "normal/node3/from0": "max_pool_3x3",
        "normal/node3/from2": "max_pool_3x3",
        "normal/node4/from0": "gconv_5x5",
        "normal/node4/from2": "dil_gconv_5x5",
        "normal/node5/from0": "gconv_3x3",
        "normal/node5/from1": "dil_gconv_5x5",
        "reduction/node2/from0": "max_pool_3x3",
        "reduction/node2/from1": "gconv_3x3",
        "reduction/node3/from0": "gconv_5x5",
        "reduction/node3/from1": "avg_pool_3x3",
        "reduction/node4/from3": "max_pool_3x3",
        "reduction/node4/from1": "gconv_5x5",
        "reduction/node5/from0": "gconv_5x5",
        "reduction/node5/from1": "gconv_5x5",
    }
)
"""The published cells, read from the paper's figure. Edges that are not named are ``zero``."""

Mixture: TypeAlias = Mapping[str, Sequence[tuple[str, Tensor]]]
"""Per edge the operations to compute, each with its weight, a scalar."""


@dataclass(frozen=True)
class Bats(SearchSpace):
    """The BATS search space: 28 edges of 8 operations, two edges on per node.

    Attributes:
        cells: Number of cells. The ones at a third and two thirds are reduction cells; see :meth:`reductions`.
        channels: Channels of a node before the first reduction; doubled by each.
        groups: Groups of the 3x3 and 5x5 convolutions, the same in the whole network.
        in_channels: Channels of an image.
        classes: Number of classes.
        stem: ``"cifar"``: a 3x3 convolution to ``3 * channels``. ``"imagenet"``: three 3x3 convolutions of stride 2.
        stem_stride: Stride of the CIFAR stem, 1 or 2. The ImageNet stem divides height and width by 8 whatever it is.
        shuffle: Groups of a channel shuffle after each grouped convolution; 1 is none (the paper saw no gain).
        auxiliary: Whether to attach a second classifier after the second reduction cell, in training only. In
            training mode ``forward`` still returns the logits alone; those of the second classifier are then in
            ``model.auxiliary``, a tuple of tensors ``(n, classes)``, and a trainer adds ``model.auxiliary_weight``
            times the loss of each. In evaluation mode it is not computed.
    """

    cells: int = 20
    channels: int = 36
    groups: int = 12
    in_channels: int = 3
    classes: int = 10
    stem: Literal["cifar", "imagenet"] = "cifar"
    stem_stride: int = 1
    shuffle: int = 1
    auxiliary: bool = False

    TEMPERATURES: ClassVar[Mapping[str, float]] = MappingProxyType({"normal": 0.2, "reduction": 0.15})

    def __post_init__(self) -> None:
        for name in ("cells", "channels", "groups", "in_channels", "classes", "stem_stride", "shuffle"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"Bats: {name} is {value!r}; legal: an integer from 1 up")
        for name in ("groups", "shuffle"):
            if self.channels % getattr(self, name):
                divisors = ", ".join(str(n) for n in range(1, self.channels + 1) if self.channels % n == 0)
                raise InvalidInputError(
                    f"Bats: {name} is {getattr(self, name)}, which does not divide channels={self.channels}; "
                    f"legal: {divisors}"
                )
        if self.channels % 2:
            # A factorised reduce makes its channels in two halves, the ImageNet stem starts with half of them.
            raise InvalidInputError(f"Bats: channels is {self.channels}; legal: an even number")
        if self.stem not in ("cifar", "imagenet"):
            raise InvalidInputError(f"Bats: stem is {self.stem!r}; legal: 'cifar', 'imagenet'")
        if self.stem_stride not in (1, 2):
            raise InvalidInputError(f"Bats: stem_stride is {self.stem_stride}; legal: 1, 2")
        if not isinstance(self.auxiliary, bool):
            raise InvalidInputError(f"Bats: auxiliary is {self.auxiliary!r}; legal: False, True")
        if self.auxiliary and len(self.reductions()) < 2:
            raise InvalidInputError(
                f"Bats: auxiliary=True needs two reduction cells; cells={self.cells} has {len(self.reductions())}; "
                "legal: cells from 3 up, or auxiliary=False"
            )

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """3 cells of 8 channels in 2 groups on grey images of about 16x16 or 28x28: trains on one CPU core.

        Args:
            overrides: Any attribute, e.g. ``Bats.small(in_channels=3, classes=100)``.
        """
        return cls(**{"cells": 3, "channels": 8, "groups": 2, "in_channels": 1, "stem_stride": 2, **overrides})

    @classmethod
    def cifar(cls, **overrides: Any) -> Self:
        """The paper's network for CIFAR-10: 20 cells of 36 channels in 12 groups, images of 32x32.

        Args:
            overrides: Any attribute, e.g. ``Bats.cifar(classes=100)``.
        """
        return cls(**{"cells": 20, "channels": 36, "groups": 12, **overrides})

    @classmethod
    def imagenet(cls, wide: bool = False, **overrides: Any) -> Self:
        """The paper's network for ImageNet: 14 cells of 80 channels in 16 groups, images of 224x224.

        Args:
            wide: 120 channels in 24 groups instead: the paper's "2x-wider".
            overrides: Any other attribute.
        """
        width = {"channels": 120, "groups": 24} if wide else {"channels": 80, "groups": 16}
        return cls(**{"cells": 14, **width, "classes": 1000, "stem": "imagenet", **overrides})

    def reductions(self) -> tuple[int, ...]:
        """Indices of the reduction cells: ``cells // 3`` and ``2 * cells // 3``.

        The first cell is never one. So a network of two cells has one reduction, and a network of one cell has none,
        and then nothing but the normal cell to search.
        """
        return tuple(sorted({self.cells // 3, 2 * self.cells // 3} - {0}))

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """An operation per edge: ``normal/node2/from0`` and so on, 14 edges per kind of cell."""
        return dict.fromkeys(
            (_edge(kind, node, source) for kind in self._kinds for node in NODES for source in range(node)), OPERATIONS
        )

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        """Two edges of each node are on."""
        return {
            f"{kind}/node{node}": Group(tuple(_edge(kind, node, source) for source in range(node)), 2, "zero")
            for kind in self._kinds
            for node in NODES
        }

    @property
    def _kinds(self) -> tuple[str, ...]:
        return KINDS if self.reductions() else KINDS[:1]

    def paper_genes(self) -> Architecture:
        """The published cells as an architecture of this space."""
        return self.architecture({name: PAPER_GENES.get(name, "zero") for name in self.choices})

    def temperatures(self) -> Mapping[str, float]:
        """The temperature that the paper divides each choice's logits by before the softmax.

        Below 1, so that a mixture is close to one operation: 0.2 in the normal cell, 0.15 in the reduction cell. It
        belongs to a search, not to an architecture, so an explorer applies it, and may take another.
        """
        return {name: self.TEMPERATURES[name.partition("/")[0]] for name in self.choices}

    def build(self, architecture: Architecture) -> nn.Module:
        """The network of one architecture, all its cells binary; ``nasplat.nn.set_binarisation`` makes weights real.

        Args:
            architecture: One of this space.

        Returns:
            From ``(n, in_channels, h, w)`` to logits ``(n, classes)``. State dict: a part of the supernet's, with equal
            names, besides the affine parameters of the BatchNorms and the auxiliary classifier.
        """
        self.architecture(architecture.genes)
        operations = {name: (option,) for name, option in architecture.genes.items()}
        return _BatsNetwork(self, operations)

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """Every operation on every edge: binary activations and real weights, BatchNorms of the cells without affine.

        Args:
            keep: Operations still alive, per edge; an edge that is not named keeps all. Weights of ``relaxed`` are in
                the order of the choice all the same, and zero for those dropped.
            partial: Only 1.

        Raises:
            InvalidInputError: ``keep`` names an unknown edge or operation, or leaves an edge without any.
            UnsupportedError: ``partial`` is not 1.
        """
        if partial != 1:
            raise UnsupportedError(f"{self.name} mixes all channels: partial is {partial}; legal: 1")
        choices = self.choices
        keep = keep or {}
        for name, options in keep.items():
            if name not in choices:
                raise InvalidInputError(f"{self.name}: keep names {name!r}; legal: {', '.join(choices)}")
            if not options or any(option not in OPERATIONS for option in options):
                raise InvalidInputError(
                    f"{self.name}: keep[{name!r}] is {options!r}; legal: one or more of {', '.join(OPERATIONS)}"
                )
        operations = {name: [o for o in OPERATIONS if o in keep.get(name, OPERATIONS)] for name in choices}
        return _BatsSupernet(self, operations)

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights into a built network, in place: those of equal name and shape.

        From the supernet (``source`` None), the affine parameters of the BatchNorms and the auxiliary classifier,
        which it lacks, stay as they are in ``model``.

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
                for name, _ in module.named_parameters(recurse=False)
                if isinstance(module, nn.BatchNorm2d)
            } | {name for name in own if name.startswith("auxiliary_head.")}
            state = {**{name: own[name] for name in lacking}, **state}
        return super().inherit(model, source, state)


def _edge(kind: str, node: int, source: int) -> str:
    return f"{kind}/node{node}/from{source}"


def _operation(name: str, channels: int, stride: int, space: Bats, *, search: bool) -> nn.Module:
    match name:
        case "max_pool_3x3":
            return nn.MaxPool2d(3, stride, padding=1)
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        case "identity" if stride == 1:
            return nn.Identity()
        case "identity":
            return BinaryFactorisedReduce(channels, channels, affine=not search, binary_weights=not search)
    kernel_size = int(name[-1])
    return BinaryBlock(
        channels,
        channels,
        kernel_size,
        stride=stride,
        dilation=2 if name.startswith("dil_") else 1,
        groups=space.groups,
        shuffle=space.shuffle,
        affine=not search,
        binary_weights=not search,
    )


class _Cell(nn.Module):
    """One cell: two inputs brought to ``channels``, four nodes, their concatenation."""

    def __init__(
        self,
        space: Bats,
        operations: Mapping[str, Sequence[Any]],
        inputs: tuple[int, int],
        channels: int,
        *,
        kind: str,
        after_reduction: bool,
        search: bool,
    ) -> None:
        super().__init__()
        self.kind = kind
        settings = {"affine": not search, "binary_weights": not search}
        self.preprocess0: nn.Module = (
            BinaryFactorisedReduce(inputs[0], channels, **settings)
            if after_reduction
            else BinaryBlock(inputs[0], channels, 1, **settings)
        )
        self.preprocess1 = BinaryBlock(inputs[1], channels, 1, **settings)
        self.edges = nn.ModuleDict()
        for node in NODES:
            for source in range(node):
                stride = 2 if kind == "reduction" and source < 2 else 1
                held = [name for name in operations[_edge(kind, node, source)] if name != "zero"]
                if held:
                    self.edges[f"node{node}_from{source}"] = nn.ModuleDict(
                        {name: _operation(name, channels, stride, space, search=search) for name in held}
                    )

    def forward(self, older: Tensor, newer: Tensor, mixture: Mixture | None) -> Tensor:
        """From ``(n, c0, h, w)`` and ``(n, c1, h, w)`` to ``(n, 4 * channels, h', w')``; h' is half in a reduction."""
        states = [self.preprocess0(older), self.preprocess1(newer)]
        for node in NODES:
            terms: list[Tensor] = []
            for source in range(node):
                if f"node{node}_from{source}" not in self.edges:
                    continue
                edge = self.edges[f"node{node}_from{source}"]
                assert isinstance(edge, nn.ModuleDict)
                if mixture is None:
                    terms += [operation(states[source]) for operation in edge.values()]
                else:
                    terms += [
                        edge[name](states[source]) * weight
                        for name, weight in mixture[_edge(self.kind, node, source)]
                        if name != "zero"
                    ]
            states.append(sum(terms[1:], terms[0]) if terms else self._nothing(states[0]))
        return torch.cat(states[2:], dim=1)

    def _nothing(self, x: Tensor) -> Tensor:
        # A node of a supernet can have all of its edges at zero; an architecture has two that are on.
        step = 2 if self.kind == "reduction" else 1
        return torch.zeros_like(x[:, :, ::step, ::step])


def _conv_norm(in_channels: int, out_channels: int, *, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class _Trunk(nn.Module):
    """Stem, cells and classifier: what a built network and the supernet share, with equal names."""

    def __init__(self, space: Bats, operations: Mapping[str, Sequence[Any]], *, search: bool) -> None:
        super().__init__()
        channels = space.channels
        if space.stem == "cifar":
            width = 3 * channels
            self.stem0 = nn.Sequential(*_conv_norm(space.in_channels, width, stride=space.stem_stride), nn.ReLU())
            self.stem1: nn.Module | None = None
        else:
            # 20 channels a group at both published widths (the authors' code).
            width, groups = channels, math.gcd(channels // 2, max(1, channels // 20))
            self.stem0 = nn.Sequential(
                *_conv_norm(space.in_channels, channels // 2, stride=2),
                nn.ReLU(),
                *_conv_norm(channels // 2, channels, stride=2, groups=groups),
            )
            self.stem1 = nn.Sequential(nn.ReLU(), *_conv_norm(channels, channels, stride=2, groups=groups))
        self.cells = nn.ModuleList()
        inputs, after_reduction = (width, width), self.stem1 is not None
        self.auxiliary_at, self.auxiliary_width = -1, 0
        reductions = space.reductions()
        for index in range(space.cells):
            kind = "reduction" if index in reductions else "normal"
            channels *= 2 if kind == "reduction" else 1
            self.cells.append(
                _Cell(space, operations, inputs, channels, kind=kind, after_reduction=after_reduction, search=search)
            )
            inputs, after_reduction = (inputs[1], len(NODES) * channels), kind == "reduction"
            if len(reductions) == 2 and index == reductions[1]:
                self.auxiliary_at, self.auxiliary_width = index, inputs[1]
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs[1], space.classes)

    def outputs(self, x: Tensor, mixture: Mixture | None) -> Iterable[Tensor]:
        """The output of each cell in turn."""
        older = self.stem0(x)
        newer = older if self.stem1 is None else self.stem1(older)
        for cell in self.cells:
            older, newer = newer, cell(older, newer, mixture)
            yield newer

    def classify(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of the last cell's output ``(n, c, h, w)``."""
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits


class _AuxiliaryHead(nn.Module):
    """A second classifier for training, on 2x2 averages so that any image size will do (after DARTS' own)."""

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


class _BatsNetwork(_Trunk):
    """A built network: each edge holds its own operation, edges that are off hold nothing."""

    auxiliary_weight = 0.4
    """Weight of the auxiliary classifier's loss (arXiv:2003.01711)."""

    def __init__(self, space: Bats, operations: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(space, operations, search=False)
        self.auxiliary: tuple[Tensor, ...] = ()
        self.auxiliary_head = _AuxiliaryHead(self.auxiliary_width, space.classes) if space.auxiliary else None

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to logits ``(n, classes)``."""
        for index, output in enumerate(self.outputs(x, None)):
            if self.training and self.auxiliary_head is not None and index == self.auxiliary_at:
                self.auxiliary = (self.auxiliary_head(output),)
        return self.classify(output)

    def __getstate__(self) -> dict[str, Any]:
        # Logits hold the graph of their forward pass, which can be neither copied nor pickled.
        return {**self.__dict__, "auxiliary": ()}


class _BatsSupernet(_Trunk, Supernet):
    """Every operation of every edge."""

    def __init__(self, space: Bats, operations: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(space, operations, search=True)
        self.operations = operations

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)``; see :class:`nasplat.space.Supernet`.

        Args:
            x: Images ``(n, in_channels, h, w)``.
            relaxed: Per edge a weight per operation, shape ``(8,)``.

        Raises:
            InvalidInputError: A dropped operation has a weight other than 0, or an edge has no weights.
        """
        return self.classify(list(self.outputs(x, self._mixture(relaxed)))[-1])

    def _mixture(self, relaxed: Relaxed) -> Mixture:
        missing = [name for name in self.operations if name not in relaxed]
        if missing:
            raise InvalidInputError(f"Bats: relaxed lacks weights for {', '.join(missing)}")
        weights = {name: relaxed[name] for name in self.operations}
        # One copy to the host for all edges, to see which weights are exactly zero.
        values = torch.stack([weight.detach() for weight in weights.values()]).tolist()
        mixture: dict[str, list[tuple[str, Tensor]]] = {}
        for (name, weight), row in zip(weights.items(), values, strict=True):
            used = [index for index, value in enumerate(row) if value != 0.0]
            mixture[name] = [(OPERATIONS[index], weight[index]) for index in used]
            dropped = [option for option, _ in mixture[name] if option not in self.operations[name]]
            if dropped:
                raise InvalidInputError(
                    f"Bats: {name} gives weight to {', '.join(dropped)}; "
                    f"this supernet keeps {', '.join(self.operations[name])}"
                )
        return mixture
