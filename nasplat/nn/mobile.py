"""Blocks of mobile networks: the sandglass block (MobileNeXt) and the inverted residual block (MobileNetV2).

Both are a shortcut around two pointwise and some depthwise convolutions. An inverted residual joins narrow ends and
widens in between, with its depthwise convolution in the wide middle; a sandglass block joins wide ends and narrows in
between, with a depthwise convolution at either end (Zhou et al. 2020, arXiv:2007.02269).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from nasplat.errors import InvalidInputError


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, but at least 90% of ``channels`` and at least ``divisor``.

    How MobileNets round scaled widths; half-way goes up.

    Args:
        channels: A positive number of channels, not necessarily whole.
        divisor: What the result is a multiple of.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def sandglass_width(
    in_channels: int, out_channels: int, reduction: int, variant: Literal["paper", "code"] = "paper"
) -> int:
    """Channels in the middle of a :class:`SandglassBlock`.

    ``in_channels / reduction`` rounded down, at least 1 (arXiv:2007.02269). The authors' code does not go below a sixth
    of the output: a block that would gets that sixth, rounded up and then to a multiple of 16.

    Args:
        in_channels: Channels of the block's input.
        out_channels: Channels of its output.
        reduction: How many times narrower the middle is than the input.
        variant: ``paper``, or ``code`` for the floor of the authors' code.
    """
    width = in_channels // reduction
    if variant == "code" and width < out_channels / 6:
        width = make_divisible(math.ceil(out_channels / 6), 16)
    return max(1, width)


def identity_channels(channels: int, identity: float) -> int:
    """Channels that the shortcut of a :class:`SandglassBlock` covers: the share ``identity``, rounded."""
    return round(identity * channels)


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm and, where asked for, ReLU6: ``conv``, ``norm``, ``activation``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the kernel; padding keeps the size at stride 1.
        stride: 1 or 2.
        groups: Groups of the convolution; ``in_channels`` of them make it depthwise.
        activation: Whether a ReLU6 follows.
        affine: Whether the BatchNorm has a learned scale and bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
        affine: bool = True,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.add_module("conv", conv)
        self.add_module("norm", nn.BatchNorm2d(out_channels, affine=affine))
        if activation:
            self.add_module("activation", nn.ReLU6())


class SandglassBlock(nn.Module):
    """Depthwise, reduce, expand, depthwise, and a shortcut between the wide ends (arXiv:2007.02269, section 3).

    ========== ========================= =============== ============================
    step       convolution               then            output
    ========== ========================= =============== ============================
    ``first``  k x k depthwise           BN, ReLU6       ``in_channels``
    ``reduce`` 1 x 1                     BN              ``in_channels / reduction``
    ``expand`` 1 x 1                     BN, ReLU6       ``out_channels``
    ``last``   k x k depthwise, strided  BN              ``out_channels``
    ========== ========================= =============== ============================

    The shortcut is there where the block keeps its channels and its stride is 1.

    Variant ``code`` differs from the paper's formula in two ways, which are those of the authors' code: the middle has
    a floor (:func:`sandglass_width`), and a block that changes its channels drops the first depthwise convolution, at
    stride 1 the last as well. ``keep_depthwise`` is that code's exception for the first block of a network and for a
    stage that is one block of stride 1.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the depthwise kernels.
        reduction: How many times narrower the middle is than the input, from 1 up.
        stride: Of the last depthwise convolution, 1 or 2.
        identity: The identity tensor multiplier, 0 to 1: the share of the channels that get the shortcut, counted from
            the first. The other channels leave the block as ``last`` made them.
        variant: ``paper`` or ``code``.
        transition: Whether the block counts as one that changes its channels, and so has no shortcut. None: if it
            does. True is for the first block of a stage that happens to be as wide as the stage before.
        keep_depthwise: In variant ``code``, keep both depthwise convolutions in a transition.
        affine: Whether the BatchNorms have a learned scale and bias.

    Raises:
        InvalidInputError: An argument is out of its range, or ``transition`` is False where the channels change.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        reduction: int = 6,
        stride: int = 1,
        identity: float = 1.0,
        variant: Literal["paper", "code"] = "paper",
        transition: bool | None = None,
        keep_depthwise: bool = False,
        affine: bool = True,
    ) -> None:
        super().__init__()
        changes = _changes("SandglassBlock", in_channels, out_channels, kernel_size, stride, transition)
        if reduction < 1:
            raise InvalidInputError(f"SandglassBlock: reduction is {reduction}; legal: from 1 up")
        if not 0 <= identity <= 1:
            raise InvalidInputError(f"SandglassBlock: identity is {identity}; legal: from 0 to 1")
        if variant not in ("paper", "code"):
            raise InvalidInputError(f"SandglassBlock: variant is {variant!r}; legal: 'paper', 'code'")
        width = sandglass_width(in_channels, out_channels, reduction, variant)
        both = variant == "paper" or keep_depthwise or not changes
        self.first: nn.Module = (
            ConvNorm(in_channels, in_channels, kernel_size, groups=in_channels, affine=affine)
            if both
            else nn.Identity()
        )
        self.reduce = ConvNorm(in_channels, width, 1, activation=False, affine=affine)
        self.expand = ConvNorm(width, out_channels, 1, affine=affine)
        self.last: nn.Module = (
            ConvNorm(
                out_channels,
                out_channels,
                kernel_size,
                stride=stride,
                groups=out_channels,
                activation=False,
                affine=affine,
            )
            if both or stride == 2
            else nn.Identity()
        )
        self.shortcut_channels = 0 if changes or stride != 1 else identity_channels(out_channels, identity)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, ceil(h / stride), ceil(w / stride))``."""
        y: Tensor = self.last(self.expand(self.reduce(self.first(x))))
        shared = self.shortcut_channels
        if shared == 0:
            return y
        if shared == y.shape[1]:
            return y + x
        return torch.cat([y[:, :shared] + x[:, :shared], y[:, shared:]], dim=1)

    def extra_repr(self) -> str:
        """What ``print`` shows besides the layers: how many channels the shortcut covers."""
        return f"shortcut_channels={self.shortcut_channels}"


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, and a shortcut between the narrow ends (Sandler et al. 2018, arXiv:1801.04381).

    ============= ========================= =============== ============================
    step          convolution               then            output
    ============= ========================= =============== ============================
    ``expand``    1 x 1                     BN, ReLU6       ``in_channels * expansion``
    ``depthwise`` k x k depthwise, strided  BN, ReLU6       ``in_channels * expansion``
    ``project``   1 x 1                     BN              ``out_channels``
    ============= ========================= =============== ============================

    An expansion of 1 has no ``expand``. The shortcut is there where the block keeps its channels and its stride is 1.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the depthwise kernel.
        expansion: How many times wider the middle is than the input, from 1 up.
        stride: Of the depthwise convolution, 1 or 2.
        transition: Whether the block counts as one that changes its channels, and so has no shortcut; None: if it does.
        affine: Whether the BatchNorms have a learned scale and bias.

    Raises:
        InvalidInputError: An argument is out of its range, or ``transition`` is False where the channels change.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        expansion: int = 6,
        stride: int = 1,
        transition: bool | None = None,
        affine: bool = True,
    ) -> None:
        super().__init__()
        changes = _changes("InvertedResidual", in_channels, out_channels, kernel_size, stride, transition)
        if expansion < 1:
            raise InvalidInputError(f"InvertedResidual: expansion is {expansion}; legal: from 1 up")
        width = in_channels * expansion
        self.expand: nn.Module = ConvNorm(in_channels, width, 1, affine=affine) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel_size, stride=stride, groups=width, affine=affine)
        self.project = ConvNorm(width, out_channels, 1, activation=False, affine=affine)
        self.shortcut = not changes and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, ceil(h / stride), ceil(w / stride))``."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.shortcut else y


def _changes(
    block: str, in_channels: int, out_channels: int, kernel_size: int, stride: int, transition: bool | None
) -> bool:
    """Whether a block counts as one that changes its channels, after a check of what both blocks share."""
    if in_channels < 1 or out_channels < 1:
        raise InvalidInputError(f"{block}: {in_channels} channels in, {out_channels} out; legal: from 1 up")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InvalidInputError(f"{block}: kernel_size is {kernel_size}; legal: an odd number from 1 up")
    if stride not in (1, 2):
        raise InvalidInputError(f"{block}: stride is {stride}; legal: 1, 2")
    if transition is False and in_channels != out_channels:
        raise InvalidInputError(
            f"{block}: transition is False with {in_channels} channels in and {out_channels} out; "
            "legal: True or None, or as many channels out as in"
        )
    return in_channels != out_channels if transition is None else transition
