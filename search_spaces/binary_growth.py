"""Binary network growth: wide, grouped expert binary networks (Bulat, Martinez, Tzimiropoulos 2021, arXiv:2010.03558).

A network is a real stem, four stages of pre-activation blocks and a classifier. A block is two binary 3x3 convolutions
and, where they are grouped, an ungrouped binary 1x1 convolution that lets the groups exchange what they found. Each
convolution has a shortcut of its own. Searched are the blocks and groups of each stage and, for the whole network, the
width, that 1x1 convolution, the experts and squeeze-and-excitation, all under a budget of operations. Stem,
downsampling shortcuts, gates, normalisations, activations and classifier are real.

The paper grows ResNet-18 a step at a time; those steps are this space's :meth:`BinaryGrowth.growth`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nasplat.architecture import Architecture
from nasplat.checks import is_number, is_whole, sequence
from nasplat.cost.count import BOPS_PER_OP
from nasplat.drawing import Block, Sketch, Stages
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.expert import ExpertBinaryConv2d, hard_gate
from nasplat.nn.leading import LeadingBatchNorm2d, LeadingPReLU
from nasplat.nn.prelu import PReLU
from nasplat.space import Option, Relaxed, SearchSpace, Supernet

Genes: TypeAlias = Mapping[str, Any]
"""One option per choice."""

PUBLISHED = (
    "1242-2-4:4:16:32",
    "1262-2-4:4:16:32",
    "1282-2-4:4:16:32",
    "1242-2-4:4:8:16",
    "1262-2-4:4:8:16",
    "1282-2-4:4:8:16",
    "1262-2-4:8:8:16",
)
"""The topologies of the paper's last table, by their notation: blocks of each stage, expansion, groups of each stage.

The last is the one that the paper trains with distillation.
"""

DOWNSAMPLE_RATIO = 4
"""By how much a downsampling shortcut narrows between its two 1x1 convolutions."""


@dataclass(frozen=True)
class BinaryGrowth(SearchSpace):
    """Depth and groups of each stage, width, 1x1 aggregation, experts and squeeze-and-excitation, under a budget.

    Attributes:
        classes: Number of classes.
        in_channels: Channels of an image.
        widths: Channels of each stage, and so the number of stages, before they are multiplied by the expansion. The
            first is also the width of the stem's output, which is never multiplied.
        stem: ``"imagenet"``: divides height and width by 4, with two branches. ``"cifar"``: one 3x3 convolution.
        stem_stride: Stride of the CIFAR stem, 1 or 2.
        max_depth: Blocks of a stage, at most; 1 to 9. Each stage has a number of its own, from 1 up.
        expansion: Offered factors of the width, ascending.
        groups: Offered groups of a stage's 3x3 convolutions, ascending; each divides all widths.
        aggregation: Offered answers to whether the blocks of grouped stages have an ungrouped 1x1 convolution.
        experts: Offered numbers of kernels of each binary convolution, ascending.
        squeeze_excite: Offered answers to whether each binary convolution has squeeze-and-excitation.
        max_ops: Operations of one example at most, as :meth:`ops` counts them; None is no limit.
        image_size: Height and width of the images that ``max_ops`` is meant for, in pixels. Networks take any.
    """

    classes: int = 10
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    stem_stride: int = 1
    max_depth: int = 8
    expansion: tuple[int, ...] = (1, 2, 4)
    groups: tuple[int, ...] = (1, 4, 8, 16, 32)
    aggregation: tuple[bool, ...] = (False, True)
    experts: tuple[int, ...] = (1, 4, 8)
    squeeze_excite: tuple[bool, ...] = (False, True)
    max_ops: float | None = None
    image_size: int = 224

    def __post_init__(self) -> None:
        for name in ("widths", "expansion", "groups", "aggregation", "experts", "squeeze_excite"):
            object.__setattr__(self, name, sequence(self.name, name, getattr(self, name)))
        for name in ("classes", "in_channels", "image_size"):
            value = getattr(self, name)
            if not is_whole(value):
                raise InvalidInputError(f"BinaryGrowth: {name} is {value!r}; legal: an integer from 1 up")
        if not is_whole(self.max_depth) or self.max_depth > 9:
            raise InvalidInputError(f"BinaryGrowth: max_depth is {self.max_depth!r}; legal: an integer from 1 to 9")
        if not self.widths or any(not is_whole(width) or width % 4 for width in self.widths):
            # A quarter of a width is the inner width of stem and downsample.
            raise InvalidInputError(f"BinaryGrowth: widths is {self.widths!r}; legal: one or more multiples of 4")
        for name in ("expansion", "groups", "experts"):
            values = getattr(self, name)
            if not values or any(not is_whole(value) for value in values) or list(values) != sorted(set(values)):
                raise InvalidInputError(f"BinaryGrowth: {name} is {values!r}; legal: ascending integers from 1 up")
        for name in ("aggregation", "squeeze_excite"):
            values = getattr(self, name)
            if values not in ((False,), (True,), (False, True)) or not all(isinstance(value, bool) for value in values):
                raise InvalidInputError(
                    f"BinaryGrowth: {name} is {values!r}; legal: (False,), (True,) or (False, True)"
                )
        wrong = [count for count in self.groups if any(width % count for width in self.widths)]
        if wrong:
            common = math.gcd(*self.widths)
            raise InvalidInputError(
                f"BinaryGrowth: groups offers {wrong}, which do not divide all widths {self.widths}; "
                f"legal: {', '.join(str(count) for count in range(1, common + 1) if common % count == 0)}"
            )
        if self.stem not in ("imagenet", "cifar"):
            raise InvalidInputError(f"BinaryGrowth: stem is {self.stem!r}; legal: 'imagenet', 'cifar'")
        if not is_whole(self.stem_stride) or self.stem_stride > 2:
            raise InvalidInputError(f"BinaryGrowth: stem_stride is {self.stem_stride!r}; legal: 1, 2")
        if self.max_ops is not None:
            least = self._ops(self._smallest())
            if not is_number(self.max_ops) or self.max_ops < least:
                raise InvalidInputError(
                    f"BinaryGrowth: max_ops is {self.max_ops!r}; legal: None, or at least {least:.0f}, "
                    f"what the smallest network takes on images of {self.image_size}x{self.image_size}"
                )

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """Up to 3 blocks of 8 to 64 channels, doubled at most, on grey images of 8x8 to 28x28: trains on one CPU core.

        Args:
            overrides: Any attribute, e.g. ``BinaryGrowth.small(classes=100)``.
        """
        small = {
            "in_channels": 1,
            "widths": (8, 16, 32, 64),
            "stem": "cifar",
            "stem_stride": 2,
            "max_depth": 3,
            "expansion": (1, 2),
            "groups": (1, 2, 4, 8),
            "experts": (1, 4),
            "image_size": 16,
        }
        return cls(**{**small, **overrides})

    @classmethod
    def imagenet(cls, **overrides: Any) -> Self:
        """The paper's space for ImageNet, with a budget that all published topologies keep to with 4 experts.

        Args:
            overrides: Any attribute, e.g. ``BinaryGrowth.imagenet(max_ops=1.35e8)``.
        """
        return cls(**{"classes": 1000, "max_ops": 1.6e8, **overrides})

    # Choices, and which of their combinations are networks.

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """``stage0/depth``, ``stage0/groups`` and so on, then what holds for the whole network."""
        stages = range(len(self.widths))
        return {
            **{_depth(stage): tuple(range(1, self.max_depth + 1)) for stage in stages},
            "expansion": self.expansion,
            **{_groups(stage): self.groups for stage in stages},
            "aggregation": self.aggregation,
            "experts": self.experts,
            "squeeze_excite": self.squeeze_excite,
        }

    def is_valid(self, genes: Mapping[str, Option]) -> bool:
        """Whether the network keeps to ``max_ops``, and has a grouped stage if it has aggregation.

        Aggregation without groups is the network without aggregation, so it is refused where False is offered.
        """
        return self._says_something(genes) and (self.max_ops is None or self._ops(genes) <= self.max_ops)

    def interactions(self) -> Sequence[tuple[str, ...]]:
        """Depth and groups of a stage make up its cost together; the other choices scale all stages."""
        stages = [(_depth(stage), _groups(stage)) for stage in range(len(self.widths))]
        return [*stages, ("expansion",), ("aggregation",), ("experts",), ("squeeze_excite",)]

    def _says_something(self, genes: Genes) -> bool:
        return not genes["aggregation"] or False not in self.aggregation or self._grouped(genes)

    def _grouped(self, genes: Genes) -> bool:
        return any(genes[_groups(stage)] > 1 for stage in range(len(self.widths)))

    def _uniform(self, depth: int, expansion: int, groups: int) -> dict[str, Option]:
        # The same in each stage, and what adds operations off where that is offered.
        stages = range(len(self.widths))
        return {
            **{_depth(stage): depth for stage in stages},
            "expansion": expansion,
            **{_groups(stage): groups for stage in stages},
            "aggregation": self.aggregation[0],
            "experts": self.experts[0],
            "squeeze_excite": self.squeeze_excite[0],
        }

    def _smallest(self) -> dict[str, Option]:
        """The genes with the fewest operations. Each stage has its own best groups: aggregation may outweigh them."""
        genes = self._uniform(1, self.expansion[0], self.groups[0])
        for stage in range(len(self.widths)):
            genes = min(({**genes, _groups(stage): count} for count in self.groups), key=self._ops)
        return genes

    def extremes(self) -> tuple[Architecture, Architecture]:
        """The networks with the fewest and the most operations.

        More groups are fewer operations, so the largest network has the fewest groups.

        Raises:
            UnsupportedError: ``max_ops`` refuses the largest.
        """
        largest = self._uniform(self.max_depth, self.expansion[-1], self.groups[0])
        largest |= {"experts": self.experts[-1], "squeeze_excite": self.squeeze_excite[-1]}
        if self._grouped(largest):
            largest["aggregation"] = self.aggregation[-1]
        if not self.is_valid(largest):
            raise UnsupportedError(
                f"{self.name}: max_ops is {self.max_ops:g}, and the largest network takes {self._ops(largest):.0f}; "
                "only without that limit (None) is it part of the space"
            )
        return self.architecture(self._smallest()), self.architecture(largest)

    # Notation.

    def start(self) -> Architecture:
        """Where growth starts: ``2222-1-1:1:1:1``, ResNet-18, or as near to it as options and budget allow.

        Over the budget, one block a stage; then with more groups; then the network with the fewest operations.
        """
        expansion, fewest = self.expansion[0], self.groups[0]
        tried = [self._uniform(min(2, self.max_depth), expansion, fewest)]
        tried += [self._uniform(1, expansion, count) for count in self.groups]
        return self.architecture(next(filter(self.is_valid, tried), self._smallest()))

    def topology(
        self,
        text: str,
        *,
        aggregation: bool | None = None,
        experts: int | None = None,
        squeeze_excite: bool | None = None,
    ) -> Architecture:
        """The architecture of the paper's notation: ``1262-2-4:8:8:16``.

        Args:
            text: A digit per stage, its blocks; the expansion; the groups of each stage.
            aggregation: Of grouped stages; None is on, as in the published ones, where the space offers it.
            experts: Kernels of each binary convolution; None is the first number that the space offers.
            squeeze_excite: None is the first that the space offers.

        Raises:
            InvalidInputError: The text is not of that form.
            ArchitectureError: It names what this space does not offer.
        """
        stages = len(self.widths)
        parts = text.split("-")
        numbers = [[*parts[0]], parts[1:2], parts[2].split(":")] if len(parts) == 3 else []
        if [len(group) for group in numbers] != [stages, 1, stages] or not all(
            number.isdecimal() and number.isascii() for group in numbers for number in group
        ):
            example = f"{stages * '2'}-1-{':'.join(stages * '1')}"
            raise InvalidInputError(
                f"{self.name}: {text!r} is no topology; legal: {stages} digits for blocks, the expansion and {stages} "
                f"numbers of groups, as in {example!r}"
            )
        depths, (expansion,), groups = ([int(number) for number in group] for group in numbers)
        genes: dict[str, Option] = {
            **{_depth(stage): depth for stage, depth in enumerate(depths)},
            "expansion": expansion,
            **{_groups(stage): count for stage, count in enumerate(groups)},
        }
        if aggregation is None:
            aggregation = self.aggregation[-1] if self._grouped(genes) else self.aggregation[0]
        genes["aggregation"] = aggregation
        genes["experts"] = self.experts[0] if experts is None else experts
        genes["squeeze_excite"] = self.squeeze_excite[0] if squeeze_excite is None else squeeze_excite
        return self.architecture(genes)

    def notation(self, architecture: Architecture) -> str:
        """The paper's notation of an architecture; it leaves out aggregation, experts and squeeze-and-excitation."""
        genes, stages = architecture.genes, range(len(self.widths))
        depths = "".join(str(genes[_depth(stage)]) for stage in stages)
        return f"{depths}-{genes['expansion']}-{':'.join(str(genes[_groups(stage)]) for stage in stages)}"

    def sketch(self, architecture: Architecture) -> Sketch:
        """A row of stages, under the topology's notation."""
        genes = architecture.genes
        extras = [f"{genes['experts']} experts"] if genes["experts"] > 1 else []
        extras += ["squeeze-excite"] if genes["squeeze_excite"] else []
        blocks = [Block("stem", (), self.widths[0], stride=4 if self.stem == "imagenet" else self.stem_stride)]
        for stage, width in enumerate(self.widths):
            groups = genes[_groups(stage)]
            lines = [f"{groups} groups" if groups > 1 else "1 group"]
            lines += ["1x1 aggregation"] if genes["aggregation"] and groups > 1 else []
            blocks.append(
                Block(
                    f"stage {stage}",
                    (*lines, *extras),
                    channels=genes["expansion"] * width,
                    repeats=genes[_depth(stage)],
                    stride=_stride(stage),
                )
            )
        blocks.append(Block("classifier", (f"{self.classes} classes",)))
        return [Stages(self.notation(architecture), tuple(blocks))]

    # Cost.

    def ops(self, architecture: Architecture, image_size: int | None = None) -> float:
        """Operations of one example: real ones, and a sixty-fourth of the binary multiply-accumulates.

        A closed form of what ``nasplat.cost.count`` counts, and equal to it.

        Args:
            architecture: One of this space.
            image_size: Height and width of the image, in pixels; None is the space's own.
        """
        return self._ops(architecture.genes, image_size)

    def _ops(self, genes: Genes, image_size: int | None = None) -> float:
        side, width = image_size or self.image_size, self.widths[0]
        if self.stem == "imagenet":
            half, quarter = width // 2, width // 4
            side = _half(side)
            flops = side**2 * (_macs(self.in_channels, half, 3) + 2 * half + _macs(half, quarter, 1) + 2 * quarter)
            side = _half(side)
            # Besides the convolutions of both branches: the second branch's pool, whose window is 9.
            flops += side**2 * (_macs(quarter, half, 3) + 2 * half + 9 * half + _macs(2 * half, width, 1) + 2 * width)
        else:
            side = -(-side // self.stem_stride)
            flops = side**2 * (_macs(self.in_channels, width, 3) + 2 * width)
        units = BOPS_PER_OP * flops
        expansion, experts, excite = genes["expansion"], genes["experts"], genes["squeeze_excite"]
        for stage, own in enumerate(self.widths):
            groups, channels = genes[_groups(stage)], expansion * own
            after = _half(side) if _stride(stage) > 1 else side
            units += _layer_cost(width, channels, 3, groups, side, after, experts, excite)
            if _stride(stage) > 1 or width != channels:
                inner = width // DOWNSAMPLE_RATIO
                pool = 4 * width if _stride(stage) > 1 else 0
                convs = _macs(width, inner, 1) + _macs(inner, channels, 1)
                units += BOPS_PER_OP * after**2 * (pool + convs + 2 * inner + 2 * channels)
            inside = _layer_cost(channels, channels, 3, groups, after, after, experts, excite)
            units += (2 * genes[_depth(stage)] - 1) * inside
            if genes["aggregation"] and groups > 1:
                units += genes[_depth(stage)] * _layer_cost(channels, channels, 1, 1, after, after, experts, excite)
            side, width = after, channels
        units += BOPS_PER_OP * (side**2 * width + width * self.classes)
        return float(units / BOPS_PER_OP)

    # Growth and its inverse.

    def _steps(self, genes: Genes) -> Iterator[tuple[str, bool, dict[str, Option]]]:
        """Changes of one step: kind, whether it grows the network, and the new genes."""
        stages = range(len(self.widths))
        for direction in (+1, -1):
            for kind, names in (
                ("depth", [_depth(stage) for stage in stages]),
                ("expansion", ["expansion"]),
                ("groups", [_groups(stage) for stage in stages]),
                ("aggregation", ["aggregation"]),
            ):
                for name in names:
                    for change in self._beside(genes, name, direction):
                        yield kind, direction > 0, change
            for change in self._beside(genes, "expansion", direction):
                # Twice the width with four times the groups costs as many binary operations.
                new, old = int(change["expansion"]) ** 2, genes["expansion"] ** 2
                scaled = {_groups(stage): divmod(genes[_groups(stage)] * new, old) for stage in stages}
                if all(rest == 0 and count in self.groups for count, rest in scaled.values()):
                    groups = {name: count for name, (count, _) in scaled.items()}
                    yield "expansion", direction > 0, {**change, **groups}
        for donor in stages:
            for taker in stages:
                if donor != taker and genes[_depth(donor)] > 1 and genes[_depth(taker)] < self.max_depth:
                    moved = {_depth(donor): genes[_depth(donor)] - 1, _depth(taker): genes[_depth(taker)] + 1}
                    yield "arrangement", True, moved
        for name in ("experts", "squeeze_excite"):
            for direction in (+1, -1):
                for change in self._beside(genes, name, direction):
                    yield name, False, change

    def _beside(self, genes: Genes, name: str, direction: int) -> list[dict[str, Option]]:
        options = self._choices[name]
        index = options.index(genes[name]) + direction
        return [{name: options[index]}] if 0 <= index < len(options) else []

    def _changed(self, architecture: Architecture) -> Iterator[tuple[str, bool, Architecture]]:
        for kind, grows, change in self._steps(architecture.genes):
            genes = {**architecture.genes, **change}
            if self.is_valid(genes):
                yield kind, grows, Architecture(self.identity, genes)

    def growth(self, architecture: Architecture) -> list[Architecture]:
        """One step of growth: those that keep to the budget, in a fixed order.

        A block more; the next width, by itself or with groups that keep the binary operations as they are; the next
        number of groups of a stage; aggregation; a block moved to another stage.
        """
        return [child for _, grows, child in self._changed(architecture) if grows]

    def neighbours(self, architecture: Architecture) -> list[Architecture]:
        """The steps of :meth:`growth`, their inverses, and the next number of experts and squeeze-excite on or off.

        If ``b`` is a neighbour of ``a``, ``a`` is one of ``b``.
        """
        return [child for _, _, child in self._changed(architecture)]

    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        """A neighbour of ``parent``: a kind of step is drawn first, then one of that kind.

        Raises:
            InvalidInputError: ``parent`` has no neighbour.
        """
        kinds: dict[str, list[Architecture]] = {}
        for kind, _, child in self._changed(parent):
            kinds.setdefault(kind, []).append(child)
        if not kinds:
            raise InvalidInputError(f"{self.name}: no step from {self.notation(parent)} stays within the space")
        drawn = list(kinds.values())[int(rng.integers(len(kinds)))]
        return drawn[int(rng.integers(len(drawn)))]

    def discretise(self, relaxed: Relaxed) -> Architecture:
        """The strongest option of each choice; over the budget, what is lost least is given up until it is kept.

        That is, of all changes of one choice that save operations, the one with the smallest drop in weight.

        Raises:
            ArchitectureError: A choice has no weights, or no such change is left and the budget is still exceeded.
        """
        missing = [name for name in self._choices if name not in relaxed]
        if missing:
            return super().discretise(relaxed)
        weights = {name: relaxed[name].tolist() for name in self._choices}
        genes = {name: options[int(np.argmax(weights[name]))] for name, options in self._choices.items()}
        if not self._says_something(genes):
            genes["aggregation"] = self.aggregation[0]
        while self.max_ops is not None and (ops := self._ops(genes)) > self.max_ops:
            changes: list[tuple[float, int, dict[str, Option]]] = []
            for name, options in self._choices.items():
                held = weights[name][options.index(genes[name])]
                for option, weight in zip(options, weights[name], strict=True):
                    child = {**genes, name: option}
                    if self._says_something(child) and self._ops(child) < ops:
                        changes.append((held - weight, len(changes), child))
            if not changes:
                break
            genes = min(changes)[2]
        return self.architecture(genes)

    # Networks.

    def build(self, architecture: Architecture) -> nn.Module:
        """The network of one architecture, binary but for stem, shortcuts, gates and classifier.

        Its ``transfer_points`` names the modules whose outputs ``(n, c, h, w)`` a teacher's are compared with in
        attention matching: all stages but the first.

        Args:
            architecture: One of this space.

        Returns:
            From ``(n, in_channels, h, w)`` to logits ``(n, classes)``.
        """
        self.architecture(architecture.genes)
        return _GrowthNetwork(self, architecture.genes)

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """One network of the greatest depth and width with dense kernels: binary activations, real weights.

        A narrower network is its leading channels, a grouped one the blocks on the diagonal of its kernels, fewer
        experts the first ones. A convolution of signs is linear in its kernel, so expansions and groups are mixed
        inside the kernel, and there is one feature map.

        Args:
            keep: Options still alive, per choice; a choice that is not named keeps all.
            partial: Only 1.

        Raises:
            InvalidInputError: ``keep`` names an unknown choice or option, or leaves a choice without any.
            UnsupportedError: ``partial`` is not 1.
        """
        if partial != 1:
            raise UnsupportedError(f"{self.name} mixes all channels: partial is {partial}; legal: 1")
        return _GrowthSupernet(self, self.alive(keep))

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights into a built network, in place.

        From the supernet (``source`` None): leading channels and experts, and of its dense kernels the blocks of the
        network's groups. The affine parameters of the stages' BatchNorms, which it lacks, stay as they are in
        ``model``.

        Args:
            model: A network of :meth:`build`.
            source: The architecture that ``state`` belongs to; None for the supernet.
            state: Tensors by name.

        Raises:
            InvalidInputError: A tensor of the model is missing in ``state``, or too small there.
        """
        if source is not None:
            return super().inherit(model, source, state)
        own, modules = model.state_dict(), dict(model.named_modules())
        found: dict[str, Tensor] = {}
        for name, tensor in own.items():
            module = modules[name.rpartition(".")[0]]
            held = state.get(name)
            if held is None:
                if isinstance(module, nn.BatchNorm2d) and name.startswith("stages."):
                    found[name] = tensor
            elif isinstance(module, ExpertBinaryConv2d) and name.endswith(".weight"):
                experts, channels = tensor.shape[:2]
                found[name] = _diagonal(held[:experts, :channels, : module.in_channels], module.groups)
            else:
                found[name] = held[tuple(slice(0, size) for size in tensor.shape)]
        return super().inherit(model, None, found)


def _depth(stage: int) -> str:
    return f"stage{stage}/depth"


def _groups(stage: int) -> str:
    return f"stage{stage}/groups"


def _stride(stage: int) -> int:
    return 1 if stage == 0 else 2


def _half(side: int) -> int:
    return -(-side // 2)


def _macs(in_channels: int, channels: int, kernel_size: int) -> int:
    """Multiply-accumulates of a convolution per pixel of its output."""
    return in_channels * channels * kernel_size**2


def _layer_cost(
    in_channels: int, channels: int, kernel_size: int, groups: int, before: int, after: int, experts: int, excite: bool
) -> int:
    """A :class:`_Layer` without its downsampling, in sixty-fourths of an operation.

    ``before`` and ``after`` are the height and width of input and output, in pixels.
    """
    # Normalisation of the input; scale, activation and shortcut of the output.
    flops = before**2 * in_channels + after**2 * 3 * channels
    if experts > 1 or excite:
        flops += before**2 * in_channels
    if experts > 1:
        flops += in_channels * experts
    if excite:
        hidden = max(1, channels // 8)
        flops += hidden * (in_channels + 1 + channels) + channels + after**2 * channels
    return BOPS_PER_OP * flops + after**2 * _macs(in_channels, channels, kernel_size) // groups


def _diagonal(weight: Tensor, groups: int) -> Tensor:
    """The kernel of a grouped convolution, cut out of a dense one ``(experts, channels, in_channels, k, k)``.

    Returns:
        Shape ``(experts, channels, in_channels / groups, k, k)``: the blocks on the diagonal, below each other.
    """
    rows, columns = weight.shape[1] // groups, weight.shape[2] // groups
    blocks = [
        weight[:, index * rows : (index + 1) * rows, index * columns : (index + 1) * columns] for index in range(groups)
    ]
    return torch.cat(blocks, dim=1)


# Built networks. The supernet's modules have the same names.


class _Downsample(nn.Module):
    """A real shortcut to another size: average pool, then two 1x1 convolutions with a narrow middle.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: 1 or 2; at 1 there is no pool.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        inner = in_channels // DOWNSAMPLE_RATIO
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        self.squeeze = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.squeeze_norm = nn.BatchNorm2d(inner)
        self.squeeze_activation = PReLU(inner)
        self.expand = nn.Conv2d(inner, channels, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(channels)
        self.expand_activation = PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, channels, ceil(h / stride), ceil(w / stride))``."""
        x = self.squeeze_activation(self.squeeze_norm(self.squeeze(self.pool(x))))
        x = self.expand_activation(self.expand_norm(self.expand(x)))
        return x


class _Layer(nn.Module):
    """BatchNorm, expert binary convolution, PReLU, plus the input: one shortcut per convolution."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, *, stride: int, groups: int, genes: Genes
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = ExpertBinaryConv2d(
            in_channels,
            channels,
            kernel_size,
            experts=genes["experts"],
            squeeze_excite=genes["squeeze_excite"],
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
        )
        self.activation = PReLU(channels)
        keeps = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if keeps else _Downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, channels, ceil(h / stride), ceil(w / stride))``."""
        y: Tensor = self.activation(self.conv(self.norm(x))) + self.shortcut(x)
        return y


class _ImagenetStem(nn.Module):
    """A quarter of height and width: a convolution, then a pool beside two convolutions, then a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.entry = nn.Sequential(*_conv_norm(in_channels, half, 3, stride=2))
        self.branch = nn.Sequential(*_conv_norm(half, quarter, 1), *_conv_norm(quarter, half, 3, stride=2))
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.exit = nn.Sequential(*_conv_norm(2 * half, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, channels, ceil(h / 4), ceil(w / 4))``."""
        x = self.entry(x)
        x = self.exit(torch.cat([self.branch(x), self.pool(x)], dim=1))
        return x


def _conv_norm(in_channels: int, channels: int, kernel_size: int, *, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]


def _stem(space: BinaryGrowth) -> nn.Module:
    if space.stem == "imagenet":
        return _ImagenetStem(space.in_channels, space.widths[0])
    return nn.Sequential(*_conv_norm(space.in_channels, space.widths[0], 3, stride=space.stem_stride))


class _GrowthNetwork(nn.Module):
    """A built network.

    Attributes:
        transfer_points: Names of the modules that attention matching looks at.
    """

    def __init__(self, space: BinaryGrowth, genes: Genes) -> None:
        super().__init__()
        self.transfer_points = tuple(f"stages.{stage}" for stage in range(1, len(space.widths)))
        self.stem = _stem(space)
        self.stages = nn.ModuleList()
        in_channels = space.widths[0]
        for stage, width in enumerate(space.widths):
            channels, groups = genes["expansion"] * width, genes[_groups(stage)]
            blocks = []
            for block in range(genes[_depth(stage)]):
                layers = {
                    "first": _Layer(
                        in_channels,
                        channels,
                        3,
                        stride=_stride(stage) if block == 0 else 1,
                        groups=groups,
                        genes=genes,
                    ),
                    "second": _Layer(channels, channels, 3, stride=1, groups=groups, genes=genes),
                }
                if genes["aggregation"] and groups > 1:
                    layers["aggregate"] = _Layer(channels, channels, 1, stride=1, groups=1, genes=genes)
                blocks.append(nn.Sequential(OrderedDict(layers)))
                in_channels = channels
            self.stages.append(nn.Sequential(*blocks))
        self.classifier = nn.Linear(in_channels, space.classes)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to logits ``(n, classes)``."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


# The supernet: the same modules at their greatest size, used in part.

Weighted: TypeAlias = Sequence[tuple[Any, Tensor]]
"""Options of a choice that are in use, each with its weight, a scalar."""


def _total(weighted: Weighted) -> Tensor:
    return torch.stack([weight for _, weight in weighted]).sum()


def _shares(weighted: Weighted) -> Tensor:
    """What each channel counts for, ``(c, 1, 1)``: the sum of the weights of the widths that have it."""
    channels = torch.arange(max(width for width, _ in weighted), device=weighted[0][1].device)
    return torch.stack([weight * (channels < width) for width, weight in weighted]).sum(dim=0)[:, None, None]


class _Pattern:
    """How the widths and groups in use share one dense kernel: each pair is a block-diagonal leading part of it.

    Args:
        parts: ``(in_channels, channels, groups, weight)`` of each pair.

    Attributes:
        groups: Groups of the convolution: a single part is computed as what it is, several as one dense kernel.
        channels: Channels of its output, those of the widest part.
    """

    def __init__(self, parts: Sequence[tuple[int, int, int, Tensor]]) -> None:
        self.parts = parts
        self.groups = parts[0][2] if len(parts) == 1 else 1
        self.in_channels = max(in_channels for in_channels, _, _, _ in parts)
        self.channels = max(channels for _, channels, _, _ in parts)

    @cached_property
    def mask(self) -> Tensor:
        """Sum of the weighted parts, ``(channels, in_channels)``."""
        device, dtype = self.parts[0][3].device, self.parts[0][3].dtype
        rows = torch.arange(self.channels, device=device)[:, None]
        columns = torch.arange(self.in_channels, device=device)
        mask = torch.zeros(self.channels, self.in_channels, device=device, dtype=dtype)
        for in_channels, channels, groups, weight in self.parts:
            same_group = rows // (channels // groups) == columns // (in_channels // groups)
            mask = mask + weight * (same_group & (rows < channels) & (columns < in_channels))
        return mask

    def cut(self, weight: Tensor) -> Tensor:
        """The kernels ``(experts, channels, in_channels / groups, k, k)`` out of dense ones of the greatest size."""
        weight = weight[:, : self.channels, : self.in_channels]
        if len(self.parts) == 1:
            return _diagonal(weight, self.groups) * self.parts[0][3]
        return weight * self.mask[:, :, None, None]


class _Mixture:
    """What is mixed in one stage.

    Attributes:
        widths: ``(in_channels, channels, weight)`` of each expansion, of the stage's first convolution.
        depth: Weighted numbers of blocks.
        groups: Weighted numbers of groups.
        aggregation: Weighted answers.
        experts: Weighted numbers of kernels.
        squeeze_excite: Weighted answers.
        first: Pattern of the stage's first convolution.
        inner: Pattern of its other 3x3 convolutions.
        outer: Pattern of its 1x1 convolutions.
    """

    def __init__(self, widths: Sequence[int], stage: int, used: Mapping[str, Weighted]) -> None:
        self.depth, self.groups = used[_depth(stage)], used[_groups(stage)]
        self.aggregation, self.experts = used["aggregation"], used["experts"]
        self.squeeze_excite = used["squeeze_excite"]
        self.widths = [
            (factor * widths[stage - 1] if stage else widths[0], factor * widths[stage], weight)
            for factor, weight in used["expansion"]
        ]
        pairs = [(*width, count, share) for width in self.widths for count, share in self.groups]
        self.first = _Pattern([(before, after, count, weight * share) for before, after, weight, count, share in pairs])
        self.inner = _Pattern([(after, after, count, weight * share) for _, after, weight, count, share in pairs])
        self.outer = _Pattern([(after, after, 1, weight) for _, after, weight in self.widths])


class _MixedConv(ExpertBinaryConv2d):
    """An expert binary convolution at its greatest size, of which parts are mixed."""

    def mixed(self, input: Tensor, pattern: _Pattern, mixture: _Mixture) -> Tensor:
        """From ``(n, i, h, w)``, the leading channels in use, to ``(n, c, h', w')``."""
        x, means = self.squash(input), input.mean(dim=(2, 3))
        used = max(count for count, _ in mixture.experts) if self.binary_activations else 1
        kernels = pattern.cut(self._binarised(self.weight[:used]))
        groups, channels = pattern.groups, pattern.channels
        # All experts side by side in each group. A convolution is linear in its kernel: their outputs can be mixed.
        kernels = kernels.reshape(used, groups, channels // groups, *kernels.shape[2:]).transpose(0, 1)
        y = F.conv2d(x, kernels.flatten(0, 2), None, self.stride, int(self.padding[0]), 1, groups)
        if used == 1:
            y = y * _total(mixture.experts)
        else:
            y = y.view(len(x), groups, used, channels // groups, *y.shape[2:])
            y = torch.einsum("ngkchw,nk->ngchw", y, self._picks(means, mixture.experts)).flatten(1, 2)
        y = y * self.scale[:channels, None, None]
        return y * self._factors(means, channels, mixture.squeeze_excite)[:, :, None, None]

    def _picks(self, means: Tensor, experts: Weighted) -> Tensor:
        """What each expert counts for each example, ``(n, used)``: the decisions of the gates, mixed."""
        assert self.gate is not None
        used = max(count for count, _ in experts)
        logits = F.linear(means, self.gate.weight[:used, : means.shape[1]])
        picks = [F.pad(hard_gate(logits[:, :count]), (0, used - count)) * weight for count, weight in experts]
        return torch.stack(picks).sum(dim=0)

    def _factors(self, means: Tensor, channels: int, answers: Weighted) -> Tensor:
        """Squeeze-and-excitation mixed with a factor of one, ``(n, channels)`` or ``(1, 1)``."""
        total = torch.zeros(1, 1, device=means.device, dtype=means.dtype)
        for answer, weight in answers:
            if answer:
                assert self.excite is not None
                shrink, grow = cast("nn.Linear", self.excite[0]), cast("nn.Linear", self.excite[2])
                hidden = F.relu(F.linear(means, shrink.weight[: max(1, channels // 8), : means.shape[1]]))
                total = total + weight * torch.sigmoid(F.linear(hidden, grow.weight[:channels, : hidden.shape[1]]))
            else:
                total = total + weight
        return total


class _MixedDownsample(_Downsample):
    """A stage's first shortcut, of which widths are mixed."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        inner = in_channels // DOWNSAMPLE_RATIO
        self.squeeze_norm, self.squeeze_activation = LeadingBatchNorm2d(inner), LeadingPReLU(inner)
        self.expand_norm, self.expand_activation = LeadingBatchNorm2d(channels), LeadingPReLU(channels)
        self.stride = stride

    def mixed(self, x: Tensor, mixture: _Mixture) -> Tensor:
        """From ``(n, i, h, w)`` to ``(n, c, h', w')``. A width that the input already has takes it as it is."""
        terms: list[Tensor] = []
        resized = [width for width in mixture.widths if self.stride > 1 or width[0] != width[1]]
        if resized:
            # The normalisations would bring channels of little weight to full size, so they are weighted after them.
            inner = _shares([(before // DOWNSAMPLE_RATIO, weight) for before, _, weight in resized])
            outer = _shares([(after, weight) for _, after, weight in resized])
            y = F.conv2d(self.pool(x), self.squeeze.weight[: len(inner), : x.shape[1]])
            y = self.squeeze_activation(self.squeeze_norm(y)) * inner
            y = F.conv2d(y, self.expand.weight[: len(outer), : len(inner)])
            y = self.expand_activation(self.expand_norm(y)) * outer
            terms.append(y)
        kept = [(before, weight) for before, after, weight in mixture.widths if self.stride == 1 and before == after]
        if kept:
            terms.append(F.pad(x * _total(kept), (0, 0, 0, 0, 0, mixture.first.channels - x.shape[1])))
        return sum(terms[1:], terms[0])


class _MixedLayer(nn.Module):
    """A layer at its greatest width, with dense kernels."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int, kept: Mapping[str, Sequence[Any]]
    ) -> None:
        super().__init__()
        self.norm = LeadingBatchNorm2d(in_channels)
        self.conv = _MixedConv(
            in_channels,
            channels,
            kernel_size,
            experts=max(kept["experts"]),
            squeeze_excite=True in kept["squeeze_excite"],
            stride=stride,
            padding=kernel_size // 2,
            binary_weights=False,
        )
        self.activation = LeadingPReLU(channels)
        keeps = stride == 1 and in_channels == channels
        self.shortcut = None if keeps else _MixedDownsample(in_channels, channels, stride)

    def branch(self, x: Tensor, pattern: _Pattern, mixture: _Mixture) -> Tensor:
        """Without the shortcut, from ``(n, i, h, w)`` to ``(n, c, h', w')``."""
        y: Tensor = self.activation(self.conv.mixed(self.norm(x), pattern, mixture))
        return y

    def forward(self, x: Tensor, pattern: _Pattern, mixture: _Mixture) -> Tensor:
        """With the shortcut, from ``(n, i, h, w)`` to ``(n, c, h', w')``."""
        y = self.branch(x, pattern, mixture)
        return y + (x if self.shortcut is None else self.shortcut.mixed(x, mixture))


class _MixedBlock(nn.Module):
    """A block of a stage; ``stride`` is None for all but the first."""

    def __init__(
        self, in_channels: int, channels: int, stride: int | None, kept: Mapping[str, Sequence[Any]], *, grouped: bool
    ) -> None:
        super().__init__()
        self.is_first = stride is not None
        self.first = _MixedLayer(in_channels, channels, 3, stride or 1, kept)
        self.second = _MixedLayer(channels, channels, 3, 1, kept)
        aggregates = grouped and True in kept["aggregation"]
        self.aggregate = _MixedLayer(channels, channels, 1, 1, kept) if aggregates else None

    def forward(self, x: Tensor, mixture: _Mixture) -> Tensor:
        """From ``(n, i, h, w)`` to ``(n, c, h', w')``."""
        x = self.first(x, mixture.first if self.is_first else mixture.inner, mixture)
        x = self.second(x, mixture.inner, mixture)
        y = x * _total(mixture.aggregation)
        asked = [weight for answer, weight in mixture.aggregation if answer]
        grouped = [(count, weight) for count, weight in mixture.groups if count > 1]
        if asked and grouped:
            # The 1x1 convolution belongs to the grouped ones among the stage's options.
            assert self.aggregate is not None
            y = y + self.aggregate.branch(x, mixture.outer, mixture) * (asked[0] * _total(grouped))
        return y


class _GrowthSupernet(Supernet):
    """All depths, widths, groups and extras in one network."""

    def __init__(self, space: BinaryGrowth, kept: Mapping[str, Sequence[Any]]) -> None:
        super().__init__()
        self.space = space
        self.kept = kept
        self.stem = _stem(space)
        self.stages = nn.ModuleList()
        in_channels = space.widths[0]
        for stage, width in enumerate(space.widths):
            blocks = nn.ModuleList()
            for block in range(max(kept[_depth(stage)])):
                channels, stride = max(kept["expansion"]) * width, None if block else _stride(stage)
                grouped = max(kept[_groups(stage)]) > 1
                blocks.append(_MixedBlock(in_channels, channels, stride, kept, grouped=grouped))
                in_channels = channels
            self.stages.append(blocks)
        self.classifier = nn.Linear(in_channels, space.classes)

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)``; see :class:`nasplat.space.Supernet`.

        Args:
            x: Images ``(n, in_channels, h, w)``.
            relaxed: Per choice a weight per option.

        Raises:
            InvalidInputError: A dropped option has a weight other than 0, or a choice has no weights or only zeros.
        """
        used = {
            name: [(self.space.choices[name][index], relaxed[name][index]) for index in indices]
            for name, indices in self.space.used(relaxed, self.kept).items()
        }
        x = self.stem(x)
        for stage, blocks in enumerate(self.stages):
            mixture = _Mixture(self.space.widths, stage, used)
            after = dict(mixture.depth)
            outputs = []
            for depth, block in enumerate(list(cast("nn.ModuleList", blocks))[: max(after)], start=1):
                x = block(x, mixture)
                if depth in after:
                    outputs.append(x * after[depth])
            x = sum(outputs[1:], outputs[0])
        return F.linear(x.mean(dim=(2, 3)), self.classifier.weight[:, : x.shape[1]], self.classifier.bias)
