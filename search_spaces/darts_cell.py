"""The DARTS cell (Liu, Simonyan, Yang 2019, arXiv:1806.09055), and with sandglass operations (Zhou et al. 2020).

A network is a stem, a row of cells and a classifier. Two cells are searched: a normal one, and a reduction one that
halves the image and doubles the channels. A cell has two inputs (the outputs of the two cells before it), four nodes,
and the concatenated nodes as its output. A node is the sum of two edges; an edge is one of seven operations on an
earlier node or input. MobileNeXt (arXiv:2007.02269) puts its sandglass block into this space, as an operation of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.cell_space import CellSpace
from nasplat.errors import InvalidInputError
from nasplat.nn.cell import Use
from nasplat.nn.mobile import SandglassBlock
from nasplat.nn.separable import DilatedConv, FactorisedReduce, NormedPool, ReluConvNorm, SeparableConv
from nasplat.nn.separable_mix import mix_separable

OPERATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        sandglass: (
            "none",
            "max_pool_3x3",
            "avg_pool_3x3",
            "skip_connect",
            *(("sandglass_3x3", "sandglass_5x5") if sandglass == "replaced" else ("sep_conv_3x3", "sep_conv_5x5")),
            "dil_conv_3x3",
            "dil_conv_5x5",
            *(("sandglass_3x3", "sandglass_5x5") if sandglass == "added" else ()),
        )
        for sandglass in ("none", "added", "replaced")
    }
)
"""What an edge can be, by ``DartsCell.sandglass``. ``none`` is an edge that is not there."""

FIRST_ORDER_GENES: Mapping[str, str] = MappingProxyType(
    {
        "normal/node2/from0": "sep_conv_3x3",
        "normal/node2/from1": "sep_conv_3x3",
        "normal/node3/from0": "skip_connect",
        "normal/node3/from1": "sep_conv_3x3",
        "normal/node4/from0": "skip_connect",
        "normal/node4/from1": "sep_conv_3x3",
        "normal/node5/from0": "sep_conv_3x3",
        "normal/node5/from2": "skip_connect",
        "reduction/node2/from0": "max_pool_3x3",
        "reduction/node2/from1": "max_pool_3x3",
        "reduction/node3/from0": "max_pool_3x3",
        "reduction/node3/from2": "skip_connect",
        "reduction/node4/from0": "max_pool_3x3",
        "reduction/node4/from2": "skip_connect",
        "reduction/node5/from0": "avg_pool_3x3",
        "reduction/node5/from2": "skip_connect",
    }
)
"""The cells that the first-order search found (the authors' code). Edges that are not named are ``none``."""

SECOND_ORDER_GENES: Mapping[str, str] = MappingProxyType(
    {
        "normal/node2/from0": "sep_conv_3x3",
        "normal/node2/from1": "sep_conv_3x3",
        "normal/node3/from0": "sep_conv_3x3",
        "normal/node3/from1": "sep_conv_3x3",
        "normal/node4/from0": "skip_connect",
        "normal/node4/from1": "sep_conv_3x3",
        "normal/node5/from0": "skip_connect",
        "normal/node5/from2": "dil_conv_3x3",
        "reduction/node2/from0": "max_pool_3x3",
        "reduction/node2/from1": "max_pool_3x3",
        "reduction/node3/from1": "max_pool_3x3",
        "reduction/node3/from2": "skip_connect",
        "reduction/node4/from0": "max_pool_3x3",
        "reduction/node4/from2": "skip_connect",
        "reduction/node5/from1": "max_pool_3x3",
        "reduction/node5/from2": "skip_connect",
    }
)
"""The cells that the second-order search found (the authors' code). Edges that are not named are ``none``."""


@dataclass(frozen=True)
class DartsCell(CellSpace):
    """The DARTS search space: 28 edges of 8 operations, two edges on per node.

    In the supernet a BatchNorm follows each pool, in a built network none does, as in the authors' code. So a built
    network with pools does not compute what the supernet computes for it, even with its weights inherited.

    Attributes:
        sandglass: Sandglass blocks of 3x3 and 5x5 kernels: ``none``; ``added`` to the eight operations;
            or ``replaced``: in place of the two separable convolutions.

    The other attributes are those of :class:`nasplat.cell_space.CellSpace`.
    """

    sandglass: Literal["none", "added", "replaced"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sandglass, str) or self.sandglass not in OPERATIONS:
            raise InvalidInputError(
                f"DartsCell: sandglass is {self.sandglass!r}; legal: {', '.join(map(repr, OPERATIONS))}"
            )

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """3 cells of 8 channels on grey images of about 16x16 or 28x28: trains on one CPU core.

        Args:
            overrides: Any attribute, e.g. ``DartsCell.small(in_channels=3, classes=100)``.
        """
        return cls(**{"cells": 3, "channels": 8, "in_channels": 1, "stem_stride": 2, **overrides})

    @classmethod
    def search(cls, **overrides: Any) -> Self:
        """The paper's network to search with, on images of 32x32: 8 cells of 16 channels.

        Args:
            overrides: Any attribute.
        """
        return cls(**{"cells": 8, "channels": 16, **overrides})

    @classmethod
    def cifar(cls, **overrides: Any) -> Self:
        """The paper's network for CIFAR-10: 20 cells of 36 channels, images of 32x32.

        Args:
            overrides: Any attribute, e.g. ``DartsCell.cifar(classes=100)``.
        """
        return cls(**{"cells": 20, "channels": 36, **overrides})

    @classmethod
    def imagenet(cls, **overrides: Any) -> Self:
        """The paper's network for ImageNet: 14 cells of 48 channels, images of 224x224.

        Args:
            overrides: Any attribute.
        """
        return cls(**{"cells": 14, "channels": 48, "classes": 1000, "stem": "imagenet", **overrides})

    @property
    def operations(self) -> tuple[str, ...]:
        """What an edge can be; the first is an edge that is not there."""
        return OPERATIONS[self.sandglass]

    def first_order_genes(self) -> Architecture:
        """The cells of the paper's first-order search as an architecture of this space."""
        return self.published(FIRST_ORDER_GENES)

    def second_order_genes(self) -> Architecture:
        """The cells of the paper's second-order search, its best, as an architecture of this space."""
        return self.published(SECOND_ORDER_GENES)

    def mix(self, x: Tensor, uses: Mapping[int, Sequence[Use]]) -> Mapping[int, Tensor]:
        """The edges that leave one state, together: :func:`nasplat.nn.separable_mix.mix_separable`."""
        return mix_separable(x, uses)

    def preprocess(self, in_channels: int, channels: int, *, halve: bool, search: bool) -> nn.Module:
        """ReLU, 1x1 convolution and BatchNorm, or a factorised reduce."""
        make = FactorisedReduce if halve else ReluConvNorm
        return make(in_channels, channels, affine=not search)

    def operation(self, name: str, channels: int, stride: int, *, search: bool) -> nn.Module:
        """One operation of an edge. A BatchNorm follows the pools of a supernet, and not those of a built network."""
        affine = not search
        match name:
            case "max_pool_3x3" | "avg_pool_3x3":
                pool: nn.Module = (
                    nn.MaxPool2d(3, stride, padding=1)
                    if name.startswith("max")
                    else nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
                )
                return NormedPool(pool, channels) if search else pool
            case "skip_connect":
                return nn.Identity() if stride == 1 else FactorisedReduce(channels, channels, affine=affine)
        kernel_size = int(name[-1])
        if name.startswith("sandglass_"):
            # A sixth, as in MobileNeXt; of few channels a quarter, so that the search network's 16 keep 4 and not 2.
            reduction = 6 if channels >= 24 else 4
            return SandglassBlock(
                channels, channels, kernel_size=kernel_size, reduction=reduction, stride=stride, affine=affine
            )
        make = SeparableConv if name.startswith("sep_") else DilatedConv
        return make(channels, kernel_size, stride=stride, affine=affine)
