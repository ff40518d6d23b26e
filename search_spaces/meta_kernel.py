"""Meta kernels: a mobile network whose kernels and widths are searched in one path (arXiv:1912.04749).

The network is a row of inverted residual blocks. Each layer chooses the kernel of its depthwise convolution, for all
of its hidden channels or for each part of them, and its expansion. In the supernet the candidate kernels are summed
before one convolution, and the expansions are a mask on the hidden channels, so a layer holds one feature map where a
supernet of paths holds one for each candidate. Of the paper, the abstract and the introduction were read: the macro
network and the mask are this project's design.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.checks import is_whole, sequence
from nasplat.drawing import Block, Sketch, Stages
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.embedding import AveragePool, Kernel, LayerShape, parse
from nasplat.nn.meta_kernel import MetaInvertedResidual, WeightSharing, plain
from nasplat.nn.mobile import ConvNorm, InvertedResidual
from nasplat.space import Option, Relaxed, SearchSpace, Supernet


@dataclass(frozen=True)
class _Layer:
    """One searched layer: its place in the network and the names of its choices."""

    name: str
    in_channels: int
    out_channels: int
    stride: int
    kernel_names: tuple[str, ...]
    kernels: tuple[str, ...]
    expansions: tuple[int, ...]

    @property
    def expansion_name(self) -> str:
        return f"{self.name}/expansion"


@dataclass(frozen=True)
class MetaKernel(SearchSpace):
    """Kernel and expansion of each layer of a mobile network, optionally kernels per part of a layer, and depth.

    Attributes:
        stages: ``(channels, layers, stride of the first layer)`` of each stage.
        stem_channels: Of the first convolution, 3x3.
        stem_stride: Of that, 1 or 2.
        first_channels: Of the block after it, which is not searched: expansion 1, kernel 3x3.
        head_channels: Of the last pointwise convolution.
        kernels: Candidates of every depthwise convolution, by the names that ``nasplat.nn.embedding.parse`` reads:
            ``conv_3x3``, ``dil_conv_3x3_d2``, ``conv_1x5``, ``avg_pool_3x3``, ``identity``, ``zero`` and their like.
            Layers of stride 2 do not offer ``identity``.
        expansions: Candidates of every layer, rising, from 2 up.
        skip: Whether layers that keep channels and size offer expansion 0, which leaves the layer out. The kernels of
            such a layer are chosen all the same and mean nothing, so one network has several genes, and a search may
            train it more than once.
        parts: Parts of a layer's hidden channels that choose their kernels each by itself; 1 is the whole layer.
        weight_sharing: Of the supernet: ``separate`` kernels, or ``shared``, where candidates are masks on one kernel.
        in_channels: Channels of an image.
        classes: Number of classes.
    """

    stages: tuple[tuple[int, int, int], ...] = (
        (24, 4, 2),
        (40, 4, 2),
        (80, 4, 2),
        (112, 4, 1),
        (192, 4, 2),
        (320, 1, 1),
    )
    stem_channels: int = 32
    stem_stride: int = 2
    first_channels: int = 16
    head_channels: int = 1280
    kernels: tuple[str, ...] = ("conv_3x3", "conv_5x5", "conv_7x7")
    expansions: tuple[int, ...] = (3, 6)
    skip: bool = False
    parts: int = 1
    weight_sharing: WeightSharing = "separate"
    in_channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        for name in ("stages", "kernels", "expansions"):
            object.__setattr__(self, name, sequence(self.name, name, getattr(self, name)))
        object.__setattr__(self, "stages", tuple(sequence(self.name, "a stage", stage) for stage in self.stages))
        for name in ("stem_channels", "first_channels", "head_channels", "parts", "in_channels", "classes"):
            value = getattr(self, name)
            if not is_whole(value):
                raise InvalidInputError(f"MetaKernel: {name} is {value!r}; legal: an integer from 1 up")
        if not is_whole(self.stem_stride) or self.stem_stride > 2:
            raise InvalidInputError(f"MetaKernel: stem_stride is {self.stem_stride!r}; legal: 1, 2")
        if not isinstance(self.skip, bool):
            raise InvalidInputError(f"MetaKernel: skip is {self.skip!r}; legal: True, False")
        if self.weight_sharing not in ("separate", "shared"):
            raise InvalidInputError(
                f"MetaKernel: weight_sharing is {self.weight_sharing!r}; legal: 'separate', 'shared'"
            )
        for stage in self.stages:
            if len(stage) != 3 or not all(map(is_whole, stage)) or stage[2] > 2:
                raise InvalidInputError(
                    f"MetaKernel: stages has {stage}; legal: (channels, layers, stride), integers from 1 up, "
                    "stride 1 or 2"
                )
        whole = all(is_whole(expansion, 2) for expansion in self.expansions)
        if not self.stages or not self.expansions or not whole or list(self.expansions) != sorted(set(self.expansions)):
            raise InvalidInputError(
                f"MetaKernel: stages is {self.stages}, expansions is {self.expansions}; legal: one or more of each, "
                "expansions integers rising from 2 up"
            )
        named = all(isinstance(kernel, str) for kernel in self.kernels)
        if not self.kernels or not named or len(set(self.kernels)) != len(self.kernels):
            raise InvalidInputError(f"MetaKernel: kernels is {self.kernels}; legal: one or more different names")
        for layer in self._layers:
            if not layer.kernels:
                raise InvalidInputError(f"MetaKernel: {layer.name} has stride {layer.stride}, and no kernel is left")
            if layer.in_channels % self.parts:
                raise InvalidInputError(
                    f"MetaKernel: parts is {self.parts}, which does not divide the {layer.in_channels} channels that "
                    f"{layer.name} gets"
                )
            for option in layer.kernels:
                # Raises, with the reason, what cannot be embedded here.
                hidden = layer.in_channels * self.expansions[0]
                LayerShape(hidden, hidden, layer.stride, hidden).candidate(option)

    @classmethod
    def imagenet(cls, **overrides: Any) -> Self:
        """Images of 224x224: 21 searched layers, 16 to 320 channels, in the manner of MobileNetV2.

        Args:
            overrides: Any attribute, e.g. ``MetaKernel.imagenet(parts=4, skip=True)``.
        """
        return cls(**overrides)

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """4 searched layers of 8 and 16 channels for grey images of 8x8 to 28x28: trains on one CPU core.

        Args:
            overrides: Any attribute, e.g. ``MetaKernel.small(in_channels=3, classes=100)``.
        """
        values: dict[str, Any] = {
            "stages": ((8, 2, 1), (16, 2, 2)),
            "stem_channels": 8,
            "stem_stride": 1,
            "first_channels": 8,
            "head_channels": 64,
            "in_channels": 1,
            "classes": 10,
        }
        return cls(**{**values, **overrides})

    @cached_property
    def _layers(self) -> tuple[_Layer, ...]:
        layers: list[_Layer] = []
        width = self.first_channels
        for channels, repeats, first_stride in self.stages:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                name = f"layer{len(layers):02d}"
                parts = tuple(f"{name}/kernel/part{part}" for part in range(self.parts))
                layers.append(
                    _Layer(
                        name,
                        width,
                        channels,
                        stride,
                        parts if self.parts > 1 else (f"{name}/kernel",),
                        tuple(option for option in self.kernels if stride == 1 or option != "identity"),
                        (0, *self.expansions) if self.skip and stride == 1 and width == channels else self.expansions,
                    )
                )
                width = channels
        return tuple(layers)

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """Per layer its kernels and its expansion: ``layer03/kernel`` (``/part0`` and so on), ``layer03/expansion``."""
        choices: dict[str, Sequence[Option]] = {}
        for layer in self._layers:
            choices.update(dict.fromkeys(layer.kernel_names, layer.kernels))
            choices[layer.expansion_name] = layer.expansions
        return choices

    def interactions(self) -> Sequence[tuple[str, ...]]:
        """Each kernel of a layer with the layer's expansion: parts add up, and each costs in proportion to it."""
        return [(kernel, layer.expansion_name) for layer in self._layers for kernel in layer.kernel_names]

    def extremes(self) -> tuple[Architecture, Architecture]:
        """Kernels of the fewest taps at the least expansions, and of the most at the greatest.

        Taps are what a kernel multiplies a pixel with: none for ``identity`` and ``zero``, and those of an average are
        counted. Of kernels with equally many, the first.
        """
        found = []
        for pick in (min, max):
            genes: dict[str, Option] = {}
            for layer in self._layers:
                genes.update(dict.fromkeys(layer.kernel_names, pick(layer.kernels, key=_taps)))
                genes[layer.expansion_name] = pick(layer.expansions)
            found.append(self.architecture(genes))
        return found[0], found[1]

    def build(self, architecture: Architecture) -> nn.Module:
        """The network of one architecture: plain layers, which hold no other candidate.

        Args:
            architecture: One of this space.

        Returns:
            From ``(n, in_channels, h, w)`` to logits ``(n, classes)``. A layer of parts with different kernels has a
            ``nasplat.nn.meta_kernel.SplitConv2d``; one that is left out is an ``nn.Identity``.
        """
        genes = self.architecture(architecture.genes).genes
        paths: list[tuple[tuple[str, ...], int]] = []
        for layer in self._layers:
            expansion = genes[layer.expansion_name]
            assert isinstance(expansion, int)
            paths.append((tuple(str(genes[name]) for name in layer.kernel_names), expansion))
        return _MetaKernelNetwork(self, paths)

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """Every candidate of every layer, in one path. BatchNorms of the searched layers have no affine part.

        Args:
            keep: Options still alive, per choice; a choice that is not named keeps all. Separate kernels, and hidden
                channels, that no live option needs are not made. Weights of ``relaxed`` are in the order of the choice
                all the same, and zero for those dropped.
            partial: Only 1.

        Raises:
            InvalidInputError: ``keep`` names an unknown choice or option, or leaves a choice without any.
            UnsupportedError: ``partial`` is not 1.
        """
        if partial != 1:
            raise UnsupportedError(f"{self.name} mixes all channels: partial is {partial}; legal: 1")
        return _MetaKernelSupernet(self, self.alive(keep))

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights into a built network, in place.

        From the supernet (``source`` None) the path's part of each tensor is copied. The affine parameters of the
        searched layers' BatchNorms, which it lacks, stay as they are in ``model``.

        Args:
            model: A network of :meth:`build`.
            source: The architecture that ``state`` belongs to, which must be the model's own; None for the supernet,
                whole or of fewer options.
            state: Tensors by name.

        Raises:
            InvalidInputError: ``model`` or ``state`` is not of this space, or ``state`` lacks what the model chose.
        """
        if source is not None:
            return super().inherit(model, source, state)
        if not isinstance(model, _MetaKernelNetwork) or len(model.paths) != len(self._layers):
            raise InvalidInputError(f"{self.name} cannot inherit into {type(model).__name__}; legal: what build made")
        # On no device: only the structure is needed, to hold the tensors of the state.
        with torch.device("meta"):
            supernet = self.supernet(self._held(state))
        try:
            supernet.load_state_dict(dict(state), assign=True)
        except RuntimeError as error:
            raise InvalidInputError(f"{self.name}: the state is not that of its supernet: {error}") from error
        assert isinstance(supernet, _MetaKernelSupernet)
        for own, held in ((model.stem, supernet.stem), (model.first, supernet.first), (model.head, supernet.head)):
            own.load_state_dict(held.state_dict())
        model.classifier.load_state_dict(supernet.classifier.state_dict())
        for layer, block, meta, (kernels, expansion) in zip(
            self._layers, model.layers, supernet.layers, model.paths, strict=True
        ):
            if expansion == 0:
                continue
            if not isinstance(meta, MetaInvertedResidual) or expansion * layer.in_channels > meta.expand.out_channels:
                raise InvalidInputError(f"{self.name}: the supernet dropped expansion {expansion} of {layer.name}")
            assert isinstance(block, InvertedResidual)
            meta.load_into(block, kernels, expansion)
        return model

    def _held(self, state: Mapping[str, Tensor]) -> dict[str, tuple[Option, ...]]:
        """The options of a supernet, as its tensors tell: those without weights of their own are always there."""
        held: dict[str, tuple[Option, ...]] = {}
        for index, layer in enumerate(self._layers):
            expand = state.get(f"layers.{index}.expand.weight")
            width = 0 if expand is None else expand.shape[0]
            expansions = tuple(e for e in layer.expansions if e * layer.in_channels <= width)
            held[layer.expansion_name] = expansions or layer.expansions
            prefix = f"layers.{index}.depthwise.kernels."
            own = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
            kernels = tuple(
                option for option in layer.kernels if option in own or not isinstance(parse(option), Kernel)
            )
            if self.weight_sharing == "separate" and kernels:
                held.update(dict.fromkeys(layer.kernel_names, kernels))
        return held

    def sketch(self, architecture: Architecture) -> Sketch:
        """The network as a row of layers. Those that are left out are not there."""
        genes = self.architecture(architecture.genes).genes
        blocks = [
            Block("stem", ("3x3 convolution",), self.stem_channels, stride=self.stem_stride),
            Block("first", ("conv_3x3", "expansion 1"), self.first_channels),
        ]
        for layer in self._layers:
            expansion = genes[layer.expansion_name]
            if expansion != 0:
                kernels = dict.fromkeys(str(genes[name]) for name in layer.kernel_names)
                lines = (" | ".join(kernels), f"expansion {expansion}")
                blocks.append(Block(layer.name, lines, layer.out_channels, stride=layer.stride))
        blocks.append(Block("head", ("1x1 convolution",), self.head_channels))
        return [Stages(self.name, tuple(blocks))]


def _taps(option: str) -> int:
    """Multiplications of a depthwise kernel per pixel and channel."""
    candidate = parse(option)
    if isinstance(candidate, Kernel):
        return math.prod(candidate.size)
    return candidate.size**2 if isinstance(candidate, AveragePool) else 0


class _Trunk(nn.Module):
    """Stem, first block, head and classifier: what a built network and the supernet share, with equal names."""

    def __init__(self, space: MetaKernel) -> None:
        super().__init__()
        self.stem = ConvNorm(space.in_channels, space.stem_channels, 3, stride=space.stem_stride)
        self.first = InvertedResidual(space.stem_channels, space.first_channels, expansion=1)
        self.layers = nn.ModuleList()
        self.head = ConvNorm(space.stages[-1][0], space.head_channels, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(space.head_channels, space.classes)

    def classify(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of the last layer's output ``(n, c, h, w)``."""
        logits: Tensor = self.classifier(self.pool(self.head(x)).flatten(1))
        return logits


class _MetaKernelNetwork(_Trunk):
    """A built network: inverted residual blocks."""

    def __init__(self, space: MetaKernel, paths: Sequence[tuple[tuple[str, ...], int]]) -> None:
        super().__init__(space)
        self.paths = tuple(paths)
        for layer, (kernels, expansion) in zip(space._layers, self.paths, strict=True):
            if expansion == 0:
                self.layers.append(nn.Identity())
                continue
            block = InvertedResidual(layer.in_channels, layer.out_channels, expansion=expansion, stride=layer.stride)
            hidden = layer.in_channels * expansion
            block.depthwise.conv = plain(kernels, hidden, hidden, stride=layer.stride, groups=hidden)
            self.layers.append(block)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to logits ``(n, classes)``."""
        x = self.first(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return self.classify(x)


class _MetaKernelSupernet(_Trunk, Supernet):
    """Every candidate of every layer, in one path."""

    def __init__(self, space: MetaKernel, options: Mapping[str, Sequence[Option]]) -> None:
        super().__init__(space)
        self.space = space
        self.options = options
        self.columns: list[list[int]] = []
        for layer in space._layers:
            largest = max(int(e) for e in options[layer.expansion_name])
            alive = [option for option in layer.kernels if any(option in options[n] for n in layer.kernel_names)]
            if space.weight_sharing == "shared":
                # Masks on one kernel, the size of which does not change: there is nothing to save.
                alive = list(layer.kernels)
            self.columns.append([layer.kernels.index(option) for option in alive])
            if largest == 0:
                self.layers.append(nn.Identity())
                continue
            self.layers.append(
                MetaInvertedResidual(
                    layer.in_channels,
                    layer.out_channels,
                    alive,
                    layer.expansions,
                    stride=layer.stride,
                    parts=space.parts,
                    weight_sharing=space.weight_sharing,
                    largest=largest,
                )
            )

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)``; see :class:`nasplat.space.Supernet`.

        Args:
            x: Images ``(n, in_channels, h, w)``.
            relaxed: Per choice a weight per option.

        Raises:
            InvalidInputError: A dropped option has a weight other than 0, or a choice has no weights.
        """
        used = self.space.used(relaxed, self.options)
        x = self.first(self.stem(x))
        for layer, columns, module in zip(self.space._layers, self.columns, self.layers, strict=True):
            if not isinstance(module, MetaInvertedResidual):
                continue
            names = layer.kernel_names
            kernels = torch.stack([relaxed[name] for name in names]) if len(names) > 1 else relaxed[names[0]]
            if len(columns) < len(layer.kernels):
                kernels = kernels[..., columns]
            live = {index for name in names for index in used[name]}
            candidates = [position for position, column in enumerate(columns) if column in live]
            x = module(x, kernels, relaxed[layer.expansion_name], (candidates, used[layer.expansion_name]))
        return self.classify(x)
