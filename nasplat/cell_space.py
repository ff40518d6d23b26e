"""Search spaces of two cells: a normal one, and a reduction one that halves the image and doubles the channels.

The macro network is that of NASNet and DARTS (arXiv:1806.09055): a stem, a row of cells, each fed by the two before it,
and a classifier. In a cell, two edges lead into each node, and an edge is one of the space's operations. A space of
this kind states its operations and how it brings a cell's inputs to equal channels; see :class:`CellSpace`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.drawing import Graph, Sketch
from nasplat.errors import InvalidInputError
from nasplat.nn.cell import KINDS, NODES, AuxiliaryHead, Cell, MixedCell, Mixture, Use, mix
from nasplat.space import Group, Option, Relaxed, SearchSpace, Supernet

MakeCell: TypeAlias = Callable[[str, nn.Module, nn.Module, dict[tuple[int, int], dict[str, nn.Module]]], nn.Module]
"""Makes a cell of its kind, its two preprocessings and its edges."""


@dataclass(frozen=True)
class CellSpace(SearchSpace):
    """A search space of a normal and a reduction cell of four nodes, two edges on per node.

    A subclass defines :attr:`operations`, :meth:`operation` and :meth:`preprocess`.

    Attributes:
        cells: Number of cells. The ones at a third and two thirds are reduction cells; see :meth:`reductions`.
        channels: Channels of a node before the first reduction; doubled by each.
        in_channels: Channels of an image.
        classes: Number of classes.
        stem: ``"cifar"``: a 3x3 convolution to ``3 * channels``. ``"imagenet"``: three 3x3 convolutions of stride 2.
        stem_stride: Stride of the CIFAR stem, 1 or 2. The ImageNet stem divides height and width by 8 whatever it is.
        auxiliary: Whether to attach a second classifier after the second reduction cell, in training only. In
            training mode ``forward`` still returns the logits alone; those of the second classifier are then in
            ``model.auxiliary``, a tuple of tensors ``(n, classes)``, and a trainer adds ``model.auxiliary_weight``
            times the loss of each. In evaluation mode it is not computed.
    """

    cells: int = 20
    channels: int = 36
    in_channels: int = 3
    classes: int = 10
    stem: Literal["cifar", "imagenet"] = "cifar"
    stem_stride: int = 1
    auxiliary: bool = False

    def __post_init__(self) -> None:
        for name in ("cells", "channels", "in_channels", "classes", "stem_stride"):
            self._check_count(name)
        if self.channels % 2:
            # A factorised reduce makes its channels in two halves, the ImageNet stem starts with half of them.
            raise InvalidInputError(f"{self.name}: channels is {self.channels}; legal: an even number")
        if self.stem not in ("cifar", "imagenet"):
            raise InvalidInputError(f"{self.name}: stem is {self.stem!r}; legal: 'cifar', 'imagenet'")
        if self.stem_stride not in (1, 2):
            raise InvalidInputError(f"{self.name}: stem_stride is {self.stem_stride}; legal: 1, 2")
        if not isinstance(self.auxiliary, bool):
            raise InvalidInputError(f"{self.name}: auxiliary is {self.auxiliary!r}; legal: False, True")
        if self.auxiliary and len(self.reductions()) < 2:
            raise InvalidInputError(
                f"{self.name}: auxiliary=True needs two reduction cells; cells={self.cells} has "
                f"{len(self.reductions())}; legal: cells from 3 up, or auxiliary=False"
            )

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not is_whole(value):
            raise InvalidInputError(f"{self.name}: {name} is {value!r}; legal: an integer from 1 up")

    # What a subclass owes.

    @property
    @abstractmethod
    def operations(self) -> tuple[str, ...]:
        """What an edge can be. The first is an edge that is not there."""

    @abstractmethod
    def operation(self, name: str, channels: int, stride: int, *, search: bool) -> nn.Module:
        """One operation of an edge, from ``(n, channels, h, w)`` to ``(n, channels, ceil(h / stride), ...)``.

        Args:
            name: One of :attr:`operations` but the first.
            channels: In and out.
            stride: 1 or 2.
            search: Whether it is for the supernet: BatchNorms without affine parameters, real weights.
        """

    @abstractmethod
    def preprocess(self, in_channels: int, channels: int, *, halve: bool, search: bool) -> nn.Module:
        """Brings an input of a cell to ``channels`` channels, and to half of its height and width where told so."""

    # What a subclass may override.

    def stem_groups(self, channels: int) -> int:
        """Groups of the ImageNet stem's second and third convolution. Default: 1."""
        return 1

    def stem_activation(self) -> nn.Module:
        """What ends the CIFAR stem, after its BatchNorm. Default: nothing."""
        return nn.Identity()

    def mix(self, x: Tensor, uses: Mapping[int, Sequence[Use]]) -> Mapping[int, Tensor]:
        """How a supernet computes the edges that leave one state (``nasplat.nn.cell.Mix``).

        Default: each operation by itself. Faster ways that compute the same are welcome.
        """
        return mix(x, uses)

    def tie(self, operations: Sequence[nn.Module]) -> None:
        """Share what is the same in all operations that read one state of a supernet's cell. Default: nothing."""

    def tie_edge(self, operations: Sequence[nn.Module]) -> None:
        """Share what is the same in all operations of one edge of a supernet's cell. Default: nothing."""

    def partials(self) -> tuple[int, ...]:
        """Legal ``partial`` of :meth:`supernet`. Default: the divisors of the channels."""
        return tuple(n for n in range(1, self.channels + 1) if self.channels % n == 0)

    # Given once, for every space of this kind.

    def reductions(self) -> tuple[int, ...]:
        """Indices of the reduction cells: ``cells // 3`` and ``2 * cells // 3``.

        The first cell is never one. So a network of two cells has one reduction, and a network of one cell has none,
        and then nothing but the normal cell to search.
        """
        return tuple(sorted({self.cells // 3, 2 * self.cells // 3} - {0}))

    @property
    def _kinds(self) -> tuple[str, ...]:
        return KINDS if self.reductions() else KINDS[:1]

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """An operation per edge: ``normal/node2/from0`` and so on, 14 edges per kind of cell."""
        return dict.fromkeys(
            (edge_name(kind, node, source) for kind in self._kinds for node in NODES for source in range(node)),
            self.operations,
        )

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        """Two edges of each node are on."""
        return {
            f"{kind}/node{node}": Group(
                tuple(edge_name(kind, node, source) for source in range(node)), 2, self.operations[0]
            )
            for kind in self._kinds
            for node in NODES
        }

    def published(self, genes: Mapping[str, str]) -> Architecture:
        """The architecture of these edges, all others off: cells as a paper prints them.

        Args:
            genes: Operation by edge. Edges of a reduction cell are left out where the network has none.
        """
        return self.architecture({name: genes.get(name, self.operations[0]) for name in self.choices})

    def build(self, architecture: Architecture) -> nn.Module:
        """The network of one architecture.

        Args:
            architecture: One of this space.

        Returns:
            From ``(n, in_channels, h, w)`` to logits ``(n, classes)``. State dict: a part of the supernet's, with equal
            names, besides the affine parameters of the cells' BatchNorms and the auxiliary classifier.
        """
        self.architecture(architecture.genes)
        return CellNetwork(self, {name: (str(option),) for name, option in architecture.genes.items()})

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """Every operation on every edge, BatchNorms of the cells without affine parameters.

        Args:
            keep: Operations still alive, per edge; an edge that is not named keeps all. Weights of ``relaxed`` are in
                the order of the choice all the same, and zero for those dropped.
            partial: One in so many channels of a node's edges goes through the operations, the others pass by
                (PC-DARTS, arXiv:1907.05737). Built networks cannot inherit such weights.

        Raises:
            InvalidInputError: ``keep`` names an unknown edge or operation, or leaves an edge without any; or
                ``partial`` is not among :meth:`partials`.
        """
        if partial not in self.partials():
            raise InvalidInputError(
                f"{self.name}: partial is {partial}; legal: {', '.join(map(str, self.partials()))} "
                f"(channels={self.channels})"
            )
        alive = {name: tuple(map(str, options)) for name, options in self.alive(keep).items()}
        return CellSupernet(self, alive, partial)

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights into a built network, in place: those of equal name and shape.

        From the supernet (``source`` None), the affine parameters of the cells' BatchNorms and the auxiliary
        classifier, which it lacks, stay as they are in ``model``.

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

    def sketch(self, architecture: Architecture) -> Sketch:
        """The cells as graphs, inputs ``c_{k-2}`` and ``c_{k-1}`` on the left, nodes numbered from 0 as in DARTS."""
        names = ("c_{k-2}", "c_{k-1}", *(str(index) for index in range(len(NODES))), "c_{k}")
        graphs = []
        for kind in self._kinds:
            edges = [
                (names[source], names[node], str(architecture.genes[edge_name(kind, node, source)]))
                for node in NODES
                for source in range(node)
                if architecture.genes[edge_name(kind, node, source)] != self.operations[0]
            ]
            edges += [(names[node], names[-1], "") for node in NODES]
            graphs.append(Graph(f"{kind} cell", names, tuple(edges)))
        return graphs


def edge_name(kind: str, node: int, source: int) -> str:
    """The choice of an edge: ``normal/node2/from0``."""
    return f"{kind}/node{node}/from{source}"


def _conv_norm(in_channels: int, out_channels: int, *, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class _Trunk(nn.Module):
    """Stem, cells and classifier: what a built network and the supernet share, with equal names."""

    def __init__(
        self,
        space: CellSpace,
        operations: Mapping[str, Sequence[str]],
        make: MakeCell,
        *,
        search: bool,
        partial: int = 1,
    ) -> None:
        super().__init__()
        channels = space.channels
        if space.stem == "cifar":
            width = 3 * channels
            self.stem0 = nn.Sequential(
                *_conv_norm(space.in_channels, width, stride=space.stem_stride), space.stem_activation()
            )
            self.stem1: nn.Module | None = None
        else:
            width, groups = channels, space.stem_groups(channels)
            self.stem0 = nn.Sequential(
                *_conv_norm(space.in_channels, channels // 2, stride=2),
                nn.ReLU(),
                *_conv_norm(channels // 2, channels, stride=2, groups=groups),
            )
            self.stem1 = nn.Sequential(nn.ReLU(), *_conv_norm(channels, channels, stride=2, groups=groups))
        self.cells = nn.ModuleList()
        inputs, halve = (width, width), self.stem1 is not None
        self.auxiliary_at, self.auxiliary_width = -1, 0
        reductions = space.reductions()
        for index in range(space.cells):
            kind = "reduction" if index in reductions else "normal"
            channels *= 2 if kind == "reduction" else 1
            edges = {
                (node, source): {
                    name: space.operation(
                        name, channels // partial, 2 if kind == "reduction" and source < 2 else 1, search=search
                    )
                    for name in operations[edge_name(kind, node, source)]
                    if name != space.operations[0]
                }
                for node in NODES
                for source in range(node)
            }
            before = (
                space.preprocess(inputs[0], channels, halve=halve, search=search),
                space.preprocess(inputs[1], channels, halve=False, search=search),
            )
            self.cells.append(make(kind, *before, edges))
            inputs, halve = (inputs[1], len(NODES) * channels), kind == "reduction"
            if len(reductions) == 2 and index == reductions[1]:
                self.auxiliary_at, self.auxiliary_width = index, inputs[1]
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs[1], space.classes)

    def outputs(self, x: Tensor, mixtures: Mapping[str, Mixture] | None) -> Iterator[Tensor]:
        """The output of each cell in turn; ``mixtures`` has one per kind of cell, for a supernet."""
        older = self.stem0(x)
        newer = older if self.stem1 is None else self.stem1(older)
        for cell in self.cells:
            output = cell(older, newer) if mixtures is None else cell(older, newer, mixtures[str(cell.kind)])
            older, newer = newer, output
            yield output

    def classify(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of the last cell's output ``(n, c, h, w)``."""
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits


class CellNetwork(_Trunk):
    """A built network: each edge holds its own operation, edges that are off hold nothing.

    Attributes:
        transfer_points: Names of the modules whose outputs a teacher's are compared with: the last cell of each size.
        auxiliary: Logits of the auxiliary classifier in the last training pass.
    """

    auxiliary_weight = 0.4
    """Weight of the auxiliary classifier's loss (arXiv:1806.09055)."""

    def __init__(self, space: CellSpace, operations: Mapping[str, Sequence[str]]) -> None:
        super().__init__(space, operations, Cell, search=False)
        last = [*(index - 1 for index in space.reductions()), space.cells - 1]
        self.transfer_points = tuple(f"cells.{index}" for index in last)
        self.auxiliary: tuple[Tensor, ...] = ()
        self.auxiliary_head = AuxiliaryHead(self.auxiliary_width, space.classes) if space.auxiliary else None

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, classes)``."""
        for index, output in enumerate(self.outputs(x, None)):
            if self.training and self.auxiliary_head is not None and index == self.auxiliary_at:
                self.auxiliary = (self.auxiliary_head(output),)
        return self.classify(output)

    def __getstate__(self) -> dict[str, Any]:
        # Logits hold the graph of their forward pass, which can be neither copied nor pickled.
        return {**self.__dict__, "auxiliary": ()}


class CellSupernet(_Trunk, Supernet):
    """Every operation of every edge."""

    def __init__(self, space: CellSpace, operations: Mapping[str, Sequence[str]], partial: int) -> None:
        def make(
            kind: str, before0: nn.Module, before1: nn.Module, edges: dict[Any, dict[str, nn.Module]]
        ) -> MixedCell:
            for operations in edges.values():
                space.tie_edge(list(operations.values()))
            for source in range(NODES[-1]):
                held = [edges[node, source] for node in NODES if node > source]
                space.tie([operation for operations in held for operation in operations.values()])
            return MixedCell(kind, before0, before1, edges, mix=space.mix, partial=partial)

        super().__init__(space, operations, make, search=True, partial=partial)
        self.space = space
        self.operations = operations

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)``; see :class:`nasplat.space.Supernet`.

        Args:
            x: Images ``(n, in_channels, h, w)``.
            relaxed: Per edge a weight per operation, shape ``(operations,)``.

        Raises:
            InvalidInputError: A dropped operation has a weight other than 0, or an edge has no weights.
        """
        *_, output = self.outputs(x, self._mixtures(relaxed))
        return self.classify(output)

    def _mixtures(self, relaxed: Relaxed) -> dict[str, Mixture]:
        used = self.space.used(relaxed, self.operations)
        names = self.space.operations
        mixtures: dict[str, Mixture] = {}
        for kind in dict.fromkeys(name.partition("/")[0] for name in self.operations):
            mixture: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
            for node in NODES:
                for source in range(node):
                    edge = edge_name(kind, node, source)
                    weights = relaxed[edge].unbind()
                    # The first operation is an edge that is not there.
                    mixture[node, source] = [(names[index], weights[index]) for index in used[edge] if index]
            mixtures[kind] = mixture
        return mixtures
