"""Mobile networks of sandglass and inverted residual blocks (Zhou et al. 2020, arXiv:2007.02269).

A network is a stem, a row of stages and a classifier. A stage is a row of equal blocks; its first block changes the
channels and may halve the image, the others have a shortcut. Searched per stage: which block, its kernel, its reduction
ratio, how many blocks and how many channels. MobileNeXt, the paper's network, is one architecture of the paper-size
preset: ``Sandglass.imagenet().mobilenext()``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.architecture import Architecture
from nasplat.checks import is_number, is_whole, sequence
from nasplat.drawing import Block, Sketch, Stages
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.leading import LeadingBatchNorm2d
from nasplat.nn.mobile import (
    ConvNorm,
    InvertedResidual,
    SandglassBlock,
    identity_channels,
    make_divisible,
    sandglass_width,
)
from nasplat.space import Option, Relaxed, SearchSpace, Supernet

MOBILENEXT = (
    (2, 96, 1, 2),
    (6, 144, 1, 1),
    (6, 192, 3, 2),
    (6, 288, 3, 2),
    (6, 384, 4, 1),
    (6, 576, 4, 2),
    (6, 960, 3, 1),
    (6, 1280, 1, 1),
)
"""MobileNeXt's stages (the authors' code): reduction ratio, channels, blocks, stride of the first block."""

INVERTED_RESIDUAL = "inverted_residual"
"""The option of a stage's block that is not a sandglass."""


def _different(values: Sequence[Any]) -> bool:
    return len(values) > 0 and len(set(values)) == len(values)


@dataclass(frozen=True)
class Stage:
    """What is fixed of a stage, and what is offered.

    Attributes:
        channels: Channels of its output at width 1.
        stride: Of its first block, 1 or 2.
        depths: How many blocks it may have: ``(1,)``, or numbers from 2 up. A stage of one block has no shortcut, so it
            offers no identity multiplier.
        reductions: Reduction ratios of a sandglass block, which are the expansion ratios of an inverted residual;
            from 2 up.
    """

    channels: int
    stride: int
    depths: tuple[int, ...]
    reductions: tuple[int, ...] = (2, 4, 6)

    def __post_init__(self) -> None:
        for name in ("depths", "reductions"):
            object.__setattr__(self, name, sequence("Stage", name, getattr(self, name)))
        if not is_whole(self.channels) or not is_whole(self.stride) or self.stride > 2:
            raise InvalidInputError(
                f"Stage: channels is {self.channels!r}, stride {self.stride!r}; legal: channels an integer from 1 up, "
                "stride 1 or 2"
            )
        least = 1 if len(self.depths) == 1 else 2
        if not all(is_whole(depth, least) for depth in self.depths) or not _different(self.depths):
            raise InvalidInputError(f"Stage: depths is {self.depths}; legal: (1,), or different integers from 2 up")
        if not all(is_whole(reduction, 2) for reduction in self.reductions) or not _different(self.reductions):
            raise InvalidInputError(f"Stage: reductions is {self.reductions}; legal: different integers from 2 up")


@dataclass(frozen=True)
class Sandglass(SearchSpace):
    """Stages of sandglass or inverted residual blocks: block, kernel, reduction ratio, depth and width of each.

    Attributes:
        stages: The stages in the order of the data.
        kernels: Sides of the depthwise kernels, odd.
        widths: Multiples of a stage's channels.
        identities: Identity tensor multipliers, above 0 up to 1: shares of the channels that get the shortcut.
        variant: Rules of the sandglass block: ``paper``, all four steps always; ``code``, those of the authors' code
            (``nasplat.nn.mobile.SandglassBlock``).
        width_multiplier: Scales stem and stages, but never shrinks the last stage. Channels are rounded to multiples
            of 8.
        stem: Channels of the stem, a 3x3 convolution.
        stem_stride: Stride of the stem, 1 or 2.
        dropout: Probability of dropout before the classifier, in built networks; the supernet has none.
        in_channels: Channels of an image.
        classes: Number of classes.
    """

    stages: tuple[Stage, ...] = (
        Stage(16, 1, (2, 3), (2, 4)),
        Stage(32, 2, (2, 3), (2, 4)),
        Stage(64, 2, (2, 3), (2, 4)),
    )
    kernels: tuple[int, ...] = (3, 5)
    widths: tuple[float, ...] = (0.5, 1.0)
    identities: tuple[float, ...] = (1.0, 0.5)
    variant: Literal["paper", "code"] = "paper"
    width_multiplier: float = 1.0
    stem: int = 16
    stem_stride: int = 2
    dropout: float = 0.0
    in_channels: int = 3
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("stages", "kernels", "widths", "identities"):
            object.__setattr__(self, name, sequence(self.name, name, getattr(self, name)))
        for name in ("kernels", "widths", "identities"):
            options = getattr(self, name)
            if not all(map(is_number, options)) or not _different(options):
                raise InvalidInputError(f"Sandglass: {name} is {options}; legal: one or more numbers, all different")
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise InvalidInputError(f"Sandglass: stages is {self.stages!r}; legal: one or more Stage(...)")
        for name in ("stem", "in_channels", "classes"):
            value = getattr(self, name)
            if not is_whole(value):
                raise InvalidInputError(f"Sandglass: {name} is {value!r}; legal: an integer from 1 up")
        if any(not is_whole(kernel) or kernel % 2 == 0 for kernel in self.kernels):
            raise InvalidInputError(f"Sandglass: kernels is {self.kernels}; legal: odd integers from 1 up")
        if any(not 0 < identity <= 1 for identity in self.identities):
            raise InvalidInputError(f"Sandglass: identities is {self.identities}; legal: above 0 up to 1")
        if self.variant not in ("paper", "code"):
            raise InvalidInputError(f"Sandglass: variant is {self.variant!r}; legal: 'paper', 'code'")
        if not is_whole(self.stem_stride) or self.stem_stride > 2:
            raise InvalidInputError(f"Sandglass: stem_stride is {self.stem_stride!r}; legal: 1, 2")
        numbers = is_number(self.width_multiplier) and is_number(self.dropout)
        if not numbers or self.width_multiplier <= 0 or min(self.widths) <= 0 or not 0 <= self.dropout < 1:
            raise InvalidInputError(
                f"Sandglass: width_multiplier is {self.width_multiplier!r}, widths {self.widths}, dropout "
                f"{self.dropout!r}; legal: widths above 0, dropout from 0 to below 1"
            )
        for index in range(len(self.stages)):
            channels = [self._channels(index, width) for width in self.widths]
            if not _different(channels):
                raise InvalidInputError(
                    f"Sandglass: widths {self.widths} give {_stage(index)} the channels {channels}, rounded to "
                    "multiples of 8; legal: widths further apart, or more channels"
                )

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """Three stages of up to 64 channels on grey images of 8x8 to 28x28: trains on one CPU core.

        The paper's block: the floor of the authors' code would make the middle of every narrow block equally wide.

        Args:
            overrides: Any attribute, e.g. ``Sandglass.small(in_channels=3, classes=100)``.
        """
        return cls(**{"in_channels": 1, **overrides})

    @classmethod
    def imagenet(cls, width: float = 1.0, **overrides: Any) -> Self:
        """Choices around MobileNeXt on ImageNet, images of 224x224, with the block of the authors' code.

        The first stage offers one reduction ratio: the floor of the authors' code leaves 16 channels at any.

        Args:
            width: The width multiplier; published are 1.4, 1, 0.75, 0.5 and 0.35.
            overrides: Any attribute.
        """
        stages = tuple(
            Stage(
                channels,
                stride,
                depths=(1,) if blocks == 1 else (blocks - 1, blocks, blocks + 1),
                reductions=(reduction,) if index == 0 else (2, 4, 6),
            )
            for index, (reduction, channels, blocks, stride) in enumerate(MOBILENEXT)
        )
        values: dict[str, Any] = {
            "stages": stages,
            "kernels": (3, 5, 7),
            "widths": (0.75, 1.0, 1.25),
            "identities": (1.0, 0.5),
            "variant": "code",
            "width_multiplier": float(width),
            "stem": 32,
            "dropout": 0.2,
            "classes": 1000,
        }
        return cls(**{**values, **overrides})

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """Per stage ``stage1/block``, ``/kernel``, ``/reduction``, ``/depth`` and ``/width``.

        What a stage has no choice of is not named. The identity multiplier is part of the block, since only a
        sandglass block has one: ``sandglass`` (1), ``sandglass_id0.5``, ``inverted_residual``.
        """
        return {
            f"{_stage(index)}/{name}": options
            for index in range(len(self.stages))
            for name, options in self._options(index).items()
            if len(options) > 1
        }

    def interactions(self) -> Sequence[tuple[str, ...]]:
        """The choices of a stage make its cost together.

        A table of such costs is an approximation: the first block of a stage also depends on the width of the stage
        before, which a table with one tuple per choice cannot hold.
        """
        grouped = [
            tuple(name for name in self.choices if name.startswith(f"{_stage(index)}/"))
            for index in range(len(self.stages))
        ]
        return [names for names in grouped if names]

    def extremes(self) -> tuple[Architecture, Architecture]:
        """The networks with the fewest and the most operations.

        Kernels, depths and widths are at their least, or at their greatest. Which block and which reduction go with
        them is computed for each stage: it depends on the channels, the kernel and the stride.
        """
        found = []
        for pick in (min, max):
            genes: dict[str, Option] = {}
            channels = self._stem_channels
            for index in range(len(self.stages)):
                options = self._options(index)
                others = {name: pick(options[name]) for name in ("kernel", "depth", "width")}
                tried = [
                    {**others, "block": block, "reduction": reduction}
                    for block, reduction in product(options["block"], options["reduction"])
                ]
                costs = [self._stage_cost(index, chosen, channels) for chosen in tried]
                chosen = tried[costs.index(pick(costs))]
                genes |= {f"{_stage(index)}/{name}": chosen[name] for name, some in options.items() if len(some) > 1}
                channels = self._channels(index, chosen["width"])
            found.append(self.architecture(genes))
        return found[0], found[1]

    def _stage_cost(self, index: int, chosen: Mapping[str, Any], channels: int) -> int:
        """Operations of a stage per pixel of its output, as ``nasplat.cost.count`` counts them."""
        taps, width, total = chosen["kernel"] ** 2, self._channels(index, chosen["width"]), 0
        for position in range(chosen["depth"]):
            stride = 1 if position else self.stages[index].stride
            if chosen["block"] == INVERTED_RESIDUAL:
                hidden = channels * chosen["reduction"]
                before = (channels + 2) * hidden
                after = (taps + 2) * hidden + (hidden + 1) * width + (width if position else 0)
            else:
                hidden = sandglass_width(channels, width, chosen["reduction"], self.variant)
                both = self.variant == "paper" or position > 0 or self._keeps_depthwise(index)
                before = ((taps + 2) * channels if both else 0) + (channels + 1) * hidden + (hidden + 2) * width
                after = (taps + 1) * width if both or stride == 2 else 0
                after += identity_channels(width, _identity(chosen["block"])) if position else 0
            total += stride**2 * before + after
            channels = width
        return total

    def mobilenext(self) -> Architecture:
        """MobileNeXt as an architecture of this space, e.g. ``Sandglass.imagenet(width=1.4).mobilenext()``.

        Raises:
            InvalidInputError: The stages are not those of MobileNeXt, or do not offer its options.
        """
        if [(stage.channels, stage.stride) for stage in self.stages] != [(c, s) for _, c, _, s in MOBILENEXT]:
            raise InvalidInputError("mobilenext() needs the stages of MobileNeXt; legal: Sandglass.imagenet(...)")
        genes: dict[str, Option] = {}
        for index, (reduction, _, blocks, _) in enumerate(MOBILENEXT):
            wanted: dict[str, Option] = {
                "block": _block_option(1.0),
                "kernel": 3,
                "reduction": reduction,
                "depth": blocks,
                "width": 1.0,
            }
            for name, option in wanted.items():
                options = self._options(index)[name]
                if option not in options:
                    raise InvalidInputError(
                        f"MobileNeXt has the {name} {option!r} in {_stage(index)}, this space offers {options}"
                    )
                if len(options) > 1:
                    genes[f"{_stage(index)}/{name}"] = option
        return self.architecture(genes)

    def build(self, architecture: Architecture) -> nn.Module:
        """The network of one architecture.

        The first block of a stage has no shortcut, even where the stage before happens to be as wide.

        Args:
            architecture: One of this space.

        Returns:
            From ``(n, in_channels, h, w)`` to logits ``(n, classes)``.
        """
        genes = self.architecture(architecture.genes).genes
        stages: list[nn.Module] = []
        channels = self._stem_channels
        for index, stage in enumerate(self.stages):
            chosen = self._chosen(genes, index)
            width = self._channels(index, chosen["width"])
            blocks: list[nn.Module] = []
            for position in range(chosen["depth"]):
                first = position == 0
                settings = {
                    "kernel_size": chosen["kernel"],
                    "stride": stage.stride if first else 1,
                    "transition": first,
                }
                if chosen["block"] == INVERTED_RESIDUAL:
                    blocks.append(InvertedResidual(channels, width, expansion=chosen["reduction"], **settings))
                else:
                    blocks.append(
                        SandglassBlock(
                            channels,
                            width,
                            reduction=chosen["reduction"],
                            identity=_identity(chosen["block"]),
                            variant=self.variant,
                            keep_depthwise=self._keeps_depthwise(index),
                            **settings,
                        )
                    )
                channels = width
            # Named by its kind, so that tensors have the names that they have in the supernet.
            stages.append(nn.Sequential(OrderedDict({_kind(chosen["block"]): nn.Sequential(*blocks)})))
        return nn.Sequential(
            OrderedDict(
                stem=ConvNorm(self.in_channels, self._stem_channels, 3, stride=self.stem_stride),
                stages=nn.Sequential(*stages),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(self.dropout),
                classifier=nn.Linear(channels, self.classes),
            )
        )

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """Every option with shared weights, and one feature map for all but the kind of block and the depth.

        A kernel is the centre of the largest, and fewer channels are the first ones of the most: masks mix these. The
        two kinds of block are two paths, summed. A depth is the output of that block of the row; outputs are summed.
        A path computes the part of the weights that its options use, and no more. BatchNorms but the stem's have no
        affine parameters.

        Args:
            keep: Options still alive, per choice; a choice that is not named keeps all. Weights of ``relaxed`` are in
                the order of the choice all the same, and zero for those dropped.
            partial: Only 1.

        Raises:
            InvalidInputError: ``keep`` names an unknown choice or option, or leaves a choice without any.
            UnsupportedError: ``partial`` is not 1.
        """
        if partial != 1:
            raise UnsupportedError(f"{self.name} mixes all channels: partial is {partial}; legal: 1")
        return _SandglassSupernet(self, self.alive(keep))

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights into a built network, in place.

        From the supernet (``source`` None): the first channels and the centres of kernels of its larger tensors. The
        affine parameters of BatchNorms, which it lacks, stay as they are in ``model``.

        Args:
            model: A network of :meth:`build`.
            source: The architecture that ``state`` belongs to; None for the supernet.
            state: Tensors by name.

        Raises:
            InvalidInputError: Any other tensor of the model is missing in ``state``, or larger, or of another shape.
        """
        if source is None:
            own = model.state_dict()
            lacking = {
                f"{prefix}.{name}": parameter.detach()
                for prefix, module in model.named_modules()
                if isinstance(module, nn.BatchNorm2d)
                for name, parameter in module.named_parameters(recurse=False)
            }
            parts = {name: _part(state[name], own[name].shape) for name in own if name in state}
            state = {**lacking, **parts}
        return super().inherit(model, source, state)

    def sketch(self, architecture: Architecture) -> Sketch:
        """A row: the stem, a block per stage with its options, the classifier."""
        blocks = [Block("stem", ("kernel 3x3",), self._stem_channels, stride=self.stem_stride)]
        for index, stage in enumerate(self.stages):
            chosen = self._chosen(architecture.genes, index)
            lines = [f"kernel {chosen['kernel']}x{chosen['kernel']}"]
            if chosen["block"] == INVERTED_RESIDUAL:
                lines = ["inverted residual", *lines, f"expansion {chosen['reduction']}"]
            else:
                lines = ["sandglass", *lines, f"reduction {chosen['reduction']}"]
                if len(self._options(index)["block"]) > 2:
                    lines.append(f"identity {_identity(chosen['block']):g}")
            if len(self._options(index)["width"]) > 1:
                lines.append(f"width {chosen['width']:g}")
            blocks.append(
                Block(
                    f"stage {index + 1}",
                    tuple(lines),
                    self._channels(index, chosen["width"]),
                    repeats=chosen["depth"],
                    stride=stage.stride,
                )
            )
        blocks.append(Block("classifier", (f"{self.classes} classes",)))
        return [Stages(f"Sandglass, width multiplier {self.width_multiplier:g}", tuple(blocks))]

    @property
    def _stem_channels(self) -> int:
        return make_divisible(self.stem * self.width_multiplier)

    def _channels(self, index: int, width: float) -> int:
        multiplier = self.width_multiplier
        if index == len(self.stages) - 1:
            # The classifier's input: the authors' code does not shrink it.
            multiplier = max(1.0, multiplier)
        return make_divisible(self.stages[index].channels * multiplier * width)

    def _keeps_depthwise(self, index: int) -> bool:
        """Where variant ``code`` keeps both depthwise convolutions in a stage's first block."""
        stage = self.stages[index]
        return index == 0 or (stage.depths == (1,) and stage.stride == 1)

    def _options(self, index: int) -> dict[str, tuple[Any, ...]]:
        """What a stage offers, choices of one option included."""
        stage = self.stages[index]
        identities = (1.0,) if stage.depths == (1,) else self.identities
        return {
            "block": (*map(_block_option, identities), INVERTED_RESIDUAL),
            "kernel": self.kernels,
            "reduction": stage.reductions,
            "depth": stage.depths,
            "width": self.widths,
        }

    def _chosen(self, genes: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {name: genes.get(f"{_stage(index)}/{name}", some[0]) for name, some in self._options(index).items()}


def _stage(index: int) -> str:
    return f"stage{index + 1}"


def _block_option(identity: float) -> str:
    return "sandglass" if identity == 1 else f"sandglass_id{identity:g}"


def _kind(block: str) -> str:
    return block.partition("_id")[0]


def _identity(block: str) -> float:
    return float(block.partition("_id")[2] or 1)


def _part(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The first channels and the centre of the kernel of a supernet's tensor, where it is large enough."""
    if tensor.ndim != len(shape) or any(have < want for have, want in zip(tensor.shape, shape, strict=True)):
        return tensor
    tensor = tensor[tuple(slice(size) for size in shape[:2])]
    if len(shape) == 4:
        crop = (tensor.shape[-1] - shape[-1]) // 2
        tensor = tensor[:, :, crop : crop + shape[-1], crop : crop + shape[-1]]
    return tensor


class _Used(NamedTuple):
    """Options of a choice whose weight is not zero, or what they stand for, and their weights ``(options,)``."""

    options: tuple[Any, ...]
    weights: Tensor


class _Masks(NamedTuple):
    """Weights of what a block computes; their lengths say how much of it to compute.

    Attributes:
        inputs: Of the input's channels.
        hidden: Of the channels in the middle.
        outputs: Of the output's channels.
        kernel: Of the depthwise kernel's taps, ``(k, k)``.
    """

    inputs: Tensor
    hidden: Tensor
    outputs: Tensor
    kernel: Tensor


def _mask(used: _Used) -> Tensor:
    """Per channel the summed weights of the numbers of channels that include it, ``(largest number,)``."""
    sizes = torch.tensor(used.options, device=used.weights.device)
    channel = torch.arange(max(used.options), device=sizes.device)
    return used.weights @ (channel < sizes[:, None]).to(used.weights.dtype)


def _kernel_mask(used: _Used) -> Tensor:
    """Per tap the summed weights of the kernels that include it, ``(k, k)`` of the largest."""
    rings = _mask(_Used(tuple(kernel // 2 + 1 for kernel in used.options), used.weights))
    distance = torch.arange(1 - len(rings), len(rings), device=rings.device).abs()
    return rings[torch.maximum(distance[:, None], distance)]


class _SharedConv(nn.Module):
    """A convolution and its BatchNorm at their largest, of which the leading channels and the centre are computed."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        depthwise: bool = False,
        activation: bool = True,
    ) -> None:
        super().__init__()
        groups = in_channels if depthwise else 1
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=False)
        self.norm = LeadingBatchNorm2d(out_channels)
        self.depthwise = depthwise
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor, kernel: Tensor | None = None) -> Tensor:
        """From ``(n, c, h, w)`` to ``(n, len(mask), h', w')``.

        Args:
            x: The input.
            mask: Weight of each output channel. It comes after the BatchNorm, which would undo it.
            kernel: Weight of each tap; None is all ones.
        """
        channels = len(mask)
        weight = self.conv.weight[:channels]
        if not self.depthwise:
            weight = weight[:, : x.shape[1]]
        if kernel is not None:
            crop = (weight.shape[-1] - len(kernel)) // 2
            weight = weight[:, :, crop : crop + len(kernel), crop : crop + len(kernel)] * kernel
        groups = channels if self.depthwise else 1
        y = functional.conv2d(x, weight, None, self.conv.stride, weight.shape[-1] // 2, groups=groups)
        y = self.norm(y)
        if self.activation:
            y = functional.relu6(y)
        return y * mask.view(-1, 1, 1)


class _SharedSandglass(nn.Module):
    """A sandglass block without its shortcut, at its largest."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        *,
        ends: tuple[bool, bool],
    ) -> None:
        super().__init__()
        self.first = _SharedConv(in_channels, in_channels, kernel_size, depthwise=True) if ends[0] else None
        self.reduce = _SharedConv(in_channels, hidden, activation=False)
        self.expand = _SharedConv(hidden, out_channels)
        self.last = (
            _SharedConv(out_channels, out_channels, kernel_size, stride=stride, depthwise=True, activation=False)
            if ends[1]
            else None
        )

    def forward(self, x: Tensor, masks: _Masks) -> Tensor:
        """From ``(n, inputs, h, w)`` to ``(n, outputs, h', w')``."""
        if self.first is not None:
            x = self.first(x, masks.inputs, masks.kernel)
        x = self.expand(self.reduce(x, masks.hidden), masks.outputs)
        return x if self.last is None else self.last(x, masks.outputs, masks.kernel)


class _SharedInvertedResidual(nn.Module):
    """An inverted residual block without its shortcut, at its largest."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.expand = _SharedConv(in_channels, hidden)
        self.depthwise = _SharedConv(hidden, hidden, kernel_size, stride=stride, depthwise=True)
        self.project = _SharedConv(hidden, out_channels, activation=False)

    def forward(self, x: Tensor, masks: _Masks) -> Tensor:
        """From ``(n, inputs, h, w)`` to ``(n, outputs, h', w')``."""
        x = self.depthwise(self.expand(x, masks.hidden), masks.hidden, masks.kernel)
        y: Tensor = self.project(x, masks.outputs)
        return y


class _SharedStage(nn.ModuleDict):
    """A stage of a supernet: per kind of block a row of the largest depth."""

    def __init__(self, space: Sandglass, index: int, alive: Mapping[str, Sequence[Any]], before: Sequence[int]) -> None:
        super().__init__()
        self.variant = space.variant
        self.channels = {width: space._channels(index, width) for width in alive["width"]}
        after = list(self.channels.values())
        kernel, reductions = max(alive["kernel"]), alive["reduction"]
        keeps = space.variant == "paper" or space._keeps_depthwise(index)
        for kind in dict.fromkeys(map(_kind, alive["block"])):
            row = nn.ModuleList()
            for position in range(max(alive["depth"])):
                first = position == 0
                pairs = list(product(before, after)) if first else [(width, width) for width in after]
                hidden = max(self._hidden(kind, *pair, ratio) for pair in pairs for ratio in reductions)
                stride = space.stages[index].stride if first else 1
                sizes = (max(before if first else after), hidden, max(after), kernel, stride)
                if kind == INVERTED_RESIDUAL:
                    row.append(_SharedInvertedResidual(*sizes))
                else:
                    ends = (keeps or not first, keeps or not first or stride == 2)
                    row.append(_SharedSandglass(*sizes, ends=ends))
            self[kind] = row

    def forward(self, x: Tensor, before: _Used, mix: Mapping[str, _Used]) -> tuple[Tensor, _Used]:
        """The mixture of depths ``(n, c, h', w')``, and its channels with their weights.

        Args:
            x: Output of the stage before, ``(n, c, h, w)``.
            before: Its numbers of channels and their weights.
            mix: Per choice of the stage the options in use.
        """
        after = _Used(tuple(self.channels[width] for width in mix["width"].options), mix["width"].weights)
        depths = dict(zip(mix["depth"].options, mix["depth"].weights, strict=True))
        kinds: dict[str, Tensor] = {}
        for block, weight in zip(*mix["block"], strict=True):
            kinds[_kind(block)] = kinds[_kind(block)] + weight if _kind(block) in kinds else weight
        outputs, kernel = _mask(after), _kernel_mask(mix["kernel"])
        masks = {kind: _Masks(_mask(before), self._middle(kind, before, after, mix), outputs, kernel) for kind in kinds}
        shortcut: Tensor | None = None
        total: Tensor | None = None
        for position in range(max(depths)):
            if position == 1:
                # The blocks after the first, which all keep their channels.
                masks = {kind: _Masks(outputs, self._middle(kind, None, after, mix), outputs, kernel) for kind in kinds}
                shortcut = self._shortcut(after, mix["block"], outputs)
            terms = [self._block(kind, position)(x, masks[kind]) * weight for kind, weight in kinds.items()]
            if shortcut is not None:
                terms.append(x * shortcut)
            x = sum(terms[1:], terms[0])
            if position + 1 in depths:
                part = x * depths[position + 1]
                total = part if total is None else total + part
        assert total is not None
        return total, after

    def _block(self, kind: str, position: int) -> nn.Module:
        row = self[kind]
        assert isinstance(row, nn.ModuleList)
        return row[position]

    def _hidden(self, kind: str, before: int, after: int, ratio: int) -> int:
        return before * ratio if kind == INVERTED_RESIDUAL else sandglass_width(before, after, ratio, self.variant)

    def _middle(self, kind: str, before: _Used | None, after: _Used, mix: Mapping[str, _Used]) -> Tensor:
        """Mask of the channels in the middle; without ``before``, of blocks that keep their channels."""
        if before is None:
            pairs, weights = [(width, width) for width in after.options], after.weights
        else:
            pairs = list(product(before.options, after.options))
            weights = torch.outer(before.weights, after.weights).flatten()
        ratios = mix["reduction"]
        sizes = tuple(self._hidden(kind, *pair, ratio) for pair in pairs for ratio in ratios.options)
        return _mask(_Used(sizes, torch.outer(weights, ratios.weights).flatten()))

    def _shortcut(self, after: _Used, blocks: _Used, outputs: Tensor) -> Tensor:
        """Per channel the weight of its shortcut, ``(c, 1, 1)``.

        The input bears the mask of its width already. So this is the weight given that the channel is there: 1 for the
        blocks that add their whole input.
        """
        total = torch.zeros_like(outputs)
        for block, weight in zip(*blocks, strict=True):
            identity = _identity(block)
            if identity < 1:
                covered = _mask(_Used(tuple(identity_channels(c, identity) for c in after.options), after.weights))
                share = functional.pad(covered, (0, len(outputs) - len(covered))) / outputs
                total = total + weight * share
            else:
                total = total + weight
        return total.view(-1, 1, 1)


class _SandglassSupernet(Supernet):
    """Every option of every stage."""

    def __init__(self, space: Sandglass, alive: Mapping[str, Sequence[Any]]) -> None:
        super().__init__()
        self.space = space
        self.alive = alive
        self.stem_channels = space._stem_channels
        self.stem = ConvNorm(space.in_channels, self.stem_channels, 3, stride=space.stem_stride)
        self.stages = nn.ModuleList()
        before = [self.stem_channels]
        for index in range(len(space.stages)):
            held = {name: alive.get(f"{_stage(index)}/{name}", some) for name, some in space._options(index).items()}
            stage = _SharedStage(space, index, held, before)
            before = list(stage.channels.values())
            self.stages.append(stage)
        self.classifier = nn.Linear(max(before), space.classes)

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)``; see :class:`nasplat.space.Supernet`.

        Args:
            x: Images ``(n, in_channels, h, w)``.
            relaxed: Per choice a weight per option, shape ``(options,)``.

        Raises:
            InvalidInputError: A dropped option has a weight other than 0, or a choice has no weights.
        """
        mixes = self._mixes(relaxed, x)
        x = self.stem(x)
        channels = _Used((self.stem_channels,), x.new_ones(1))
        for stage, mix in zip(self.stages, mixes, strict=True):
            x, channels = stage(x, channels, mix)
        features = x.mean((2, 3))
        return functional.linear(features, self.classifier.weight[:, : features.shape[1]], self.classifier.bias)

    def _mixes(self, relaxed: Relaxed, x: Tensor) -> list[dict[str, _Used]]:
        """Per stage and choice the options of weight other than 0; what is no choice has weight 1."""
        used = self.space.used(relaxed, self.alive)
        mixes: list[dict[str, _Used]] = []
        for index in range(len(self.stages)):
            mix: dict[str, _Used] = {}
            for short, options in self.space._options(index).items():
                name = f"{_stage(index)}/{short}"
                if name in used:
                    mix[short] = _Used(tuple(options[at] for at in used[name]), relaxed[name][used[name]])
                else:
                    mix[short] = _Used(options, x.new_ones(1))
            mixes.append(mix)
        return mixes
