"""BATS: cells of binary grouped convolutions (Bulat, Martinez, Tzimiropoulos 2020, arXiv:2003.01711).

A network is a stem, a row of cells and a classifier. Two cells are searched: a normal one, and a reduction one that
halves the image and doubles the channels. A cell has two inputs (the outputs of the two cells before it), four nodes,
and the concatenated nodes as its output. A node is the sum of two edges; an edge is one of seven operations on an
earlier node or input. Stem, classifier, normalisations, activations, pools and sums are real; every convolution inside
the cells, 1x1 ones included, is binary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.cell_space import CellSpace
from nasplat.errors import InvalidInputError
from nasplat.nn import BinaryBlock, BinaryFactorisedReduce
from nasplat.nn.binary_mix import mix_binary
from nasplat.nn.cell import Use

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


@dataclass(frozen=True)
class Bats(CellSpace):
    """The BATS search space: 28 edges of 8 operations, two edges on per node.

    Attributes:
        groups: Groups of the 3x3 and 5x5 convolutions, the same in the whole network.
        shuffle: Groups of a channel shuffle after each grouped convolution; 1 is none (the paper saw no gain).
        supernet_form: How the supernet mixes an edge's grouped convolutions. ``"paper"``: each has its PReLU, and the
            results are summed. ``"merged"``: their kernels are summed, each times its scale and mixture weight, and one
            PReLU follows, which they share; so an edge holds one feature map, not four. On one operation per edge the
            two agree, and with the built network.

    The other attributes are those of :class:`nasplat.cell_space.CellSpace`.
    """

    groups: int = 12
    shuffle: int = 1
    supernet_form: Literal["paper", "merged"] = "paper"

    TEMPERATURES: ClassVar[Mapping[str, float]] = MappingProxyType({"normal": 0.2, "reduction": 0.15})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("groups", "shuffle"):
            self._check_count(name)
            if self.channels % getattr(self, name):
                divisors = ", ".join(str(n) for n in range(1, self.channels + 1) if self.channels % n == 0)
                raise InvalidInputError(
                    f"Bats: {name} is {getattr(self, name)}, which does not divide channels={self.channels}; "
                    f"legal: {divisors}"
                )
        if self.supernet_form not in ("paper", "merged"):
            raise InvalidInputError(f"Bats: supernet_form is {self.supernet_form!r}; legal: 'paper', 'merged'")

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

    @property
    def operations(self) -> tuple[str, ...]:
        """What an edge can be; the first is an edge that is not there."""
        return OPERATIONS

    def paper_genes(self) -> Architecture:
        """The published cells as an architecture of this space."""
        return self.published(PAPER_GENES)

    def temperatures(self) -> Mapping[str, float]:
        """The temperature that the paper divides each choice's logits by before the softmax.

        Below 1, so that a mixture is close to one operation: 0.2 in the normal cell, 0.15 in the reduction cell. It
        belongs to a search, not to an architecture, so an explorer applies it, and may take another.
        """
        return {name: self.TEMPERATURES[name.partition("/")[0]] for name in self.choices}

    def stem_groups(self, channels: int) -> int:
        """20 channels a group at both published widths (the authors' code)."""
        return math.gcd(channels // 2, max(1, channels // 20))

    def stem_activation(self) -> nn.Module:
        """The CIFAR stem ends in a ReLU."""
        return nn.ReLU()

    def partials(self) -> tuple[int, ...]:
        """Divisors of the channels that leave a multiple of the groups, and of the shuffle's."""
        share = math.lcm(self.groups, self.shuffle)
        return tuple(n for n in super().partials() if self.channels // n % share == 0)

    def mix(self, x: Tensor, uses: Mapping[int, Sequence[Use]]) -> Mapping[int, Tensor]:
        """All operations on one state together; see :func:`nasplat.nn.binary_mix.mix_binary`."""
        return mix_binary(x, uses, merged=self.supernet_form == "merged")

    def tie(self, operations: Sequence[nn.Module]) -> None:
        """All binary operations on one state share their BatchNorm, which has no parameters in search."""
        binary = [block for block in operations if isinstance(block, BinaryBlock | BinaryFactorisedReduce)]
        for block in binary[1:]:
            block.norm = binary[0].norm

    def tie_edge(self, operations: Sequence[nn.Module]) -> None:
        """In the merged form, the grouped convolutions of an edge share their PReLU."""
        blocks = [block for block in operations if isinstance(block, BinaryBlock)]
        if self.supernet_form == "merged":
            for block in blocks[1:]:
                block.activation = blocks[0].activation

    def preprocess(self, in_channels: int, channels: int, *, halve: bool, search: bool) -> nn.Module:
        """A binary 1x1 convolution, or a binary factorised reduce."""
        settings = {"affine": not search, "binary_weights": not search}
        if halve:
            return BinaryFactorisedReduce(in_channels, channels, **settings)
        return BinaryBlock(in_channels, channels, 1, **settings)

    def operation(self, name: str, channels: int, stride: int, *, search: bool) -> nn.Module:
        """One operation of an edge. ``nasplat.nn.set_binarisation`` makes the weights of a built network real."""
        match name:
            case "max_pool_3x3":
                return nn.MaxPool2d(3, stride, padding=1)
            case "avg_pool_3x3":
                return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
            case "identity" if stride == 1:
                return nn.Identity()
            case "identity":
                return BinaryFactorisedReduce(channels, channels, affine=not search, binary_weights=not search)
        return BinaryBlock(
            channels,
            channels,
            int(name[-1]),
            stride=stride,
            dilation=2 if name.startswith("dil_") else 1,
            groups=self.groups,
            shuffle=self.shuffle,
            affine=not search,
            binary_weights=not search,
        )
