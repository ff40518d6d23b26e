"""What a meta kernel can mix (arXiv:1912.04749), and how a candidate's kernel is written into a larger one.

A candidate is embedded centred, with zeros around and between its taps. Only a linear map with "same" padding by zeros
can be; :func:`parse`, :func:`candidate_of` and :meth:`LayerShape.candidate` refuse anything else with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasplat.errors import InvalidInputError, UnsupportedError

_LEGAL = "conv_HxW, dil_conv_HxW_dN, gconv_HxW_gN, dil_gconv_HxW_dN_gN, identity, avg_pool_KxK, zero"


@dataclass(frozen=True)
class Kernel:
    """A convolution: square or not, dilated or not, grouped or not.

    Attributes:
        size: Height and width, odd, so that the kernel has a centre.
        dilation: Distance of its taps, from 1 up.
        groups: Groups of its channels; 1 takes the groups of the layer. Otherwise a multiple of those.
    """

    size: tuple[int, int]
    dilation: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(side < 1 or side % 2 == 0 for side in self.size):
            raise UnsupportedError(f"a kernel of size {self.size} has no centre to embed it by; legal: two odd numbers")
        if self.dilation < 1 or self.groups < 1:
            raise InvalidInputError(f"dilation is {self.dilation}, groups is {self.groups}; legal: from 1 up")

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the kernel that it is embedded into."""
        return (self.size[0] - 1) * self.dilation + 1, (self.size[1] - 1) * self.dilation + 1


@dataclass(frozen=True)
class Identity:
    """The input itself, for layers of stride 1 that keep the channels."""

    extent = (1, 1)


@dataclass(frozen=True)
class AveragePool:
    """An average over a window in which the zeros of the padding count (``count_include_pad=True``).

    Without counting, the divisor changes along the border, which no convolution can do.

    Attributes:
        size: Side of the window, odd.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 == 0:
            raise UnsupportedError(f"an average over {self.size}x{self.size} has no centre; legal: an odd side")

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the window."""
        return self.size, self.size


@dataclass(frozen=True)
class Zero:
    """Nothing."""

    extent = (1, 1)


Candidate: TypeAlias = Kernel | Identity | AveragePool | Zero
"""What a meta kernel can mix."""


def parse(option: str) -> Candidate:
    """The candidate that an option's name means.

    Names are ``conv_3x3``, ``conv_1x5``, ``dil_conv_3x3_d2``, ``gconv_3x3_g4``, ``identity``, ``avg_pool_3x3``,
    ``zero`` and their like.

    Raises:
        UnsupportedError: It is a known operation that cannot be embedded; the message has the reason.
        InvalidInputError: The name is unknown.
    """
    if option in ("identity", "zero"):
        return Identity() if option == "identity" else Zero()
    if pool := re.fullmatch(r"avg_pool_(\d+)x(\d+)", option):
        if pool[1] != pool[2]:
            raise UnsupportedError(f"{option!r}: only square windows are averaged; legal: avg_pool_KxK")
        return AveragePool(int(pool[1]))
    if "max_pool" in option:
        raise UnsupportedError(f"{option!r} cannot be embedded: a maximum is not linear, so it is no kernel")
    if re.match(r"(\w+_)?sep_conv", option) or any(part in option for part in ("relu", "norm", "_bn")):
        raise UnsupportedError(
            f"{option!r} cannot be embedded: it has a normalisation or nonlinearity of its own, and only one linear "
            f"convolution can be summed with others; legal: {_LEGAL}"
        )
    conv = re.fullmatch(r"(dil_)?(g)?conv_(\d+)x(\d+)(?:_d(\d+))?(?:_g(\d+))?", option)
    if conv is None or bool(conv[1]) != bool(conv[5]) or bool(conv[2]) != bool(conv[6]):
        raise InvalidInputError(f"unknown candidate {option!r}; legal: {_LEGAL}")
    return Kernel((int(conv[3]), int(conv[4])), int(conv[5] or 1), int(conv[6] or 1))


def candidate_of(module: nn.Module, stride: int = 1) -> Candidate:
    """The candidate that computes the same as a module, in a layer of this stride.

    Args:
        module: ``nn.Conv2d`` without bias, ``nn.AvgPool2d`` or ``nn.Identity``.
        stride: Of the layer.

    Raises:
        UnsupportedError: It cannot be embedded; the message has the reason.
    """

    def refuse(reason: str) -> UnsupportedError:
        return UnsupportedError(f"{module} cannot be embedded: {reason}")

    def pair(value: object) -> tuple[object, ...]:
        return value if isinstance(value, tuple) else (value, value)

    match module:
        case nn.Identity():
            if stride != 1:
                raise refuse(f"its stride is 1, the layer's is {stride}")
            return Identity()
        case nn.MaxPool2d() | nn.AdaptiveMaxPool2d():
            raise refuse("a maximum is not linear, so it is no kernel")
        case nn.AvgPool2d() | nn.Conv2d() if pair(module.stride) != (stride, stride):
            raise refuse(f"its stride is {module.stride}, the layer's is {stride}; one convolution has one stride")
        case nn.AvgPool2d():
            side = pair(module.kernel_size)[0]
            assert isinstance(side, int)
            if pair(module.kernel_size) != (side, side) or pair(module.padding) != (side // 2, side // 2):
                raise refuse(f"legal: a square window with padding {side // 2}")
            if not module.count_include_pad or module.ceil_mode or module.divisor_override is not None:
                raise refuse("only an average that counts the padding, over a full window, is the same everywhere")
            return AveragePool(side)
        case nn.Conv2d():
            if type(module) is not nn.Conv2d:
                raise refuse(
                    "it does more than a plain convolution; the sign of a sum of kernels, for instance, is none"
                )
            height, width = module.kernel_size
            if len(set(module.dilation)) != 1:
                raise refuse(f"its dilation is {module.dilation}; legal: the same in both directions")
            kernel = Kernel((height, width), module.dilation[0], module.groups)
            padding = tuple((side - 1) // 2 for side in kernel.extent)
            if module.bias is not None or module.padding_mode != "zeros" or module.padding not in (padding, "same"):
                raise refuse(f"legal: bias=False, zeros as padding, padding={padding}")
            return kernel
    raise refuse(
        "it is not one linear convolution; a normalisation or nonlinearity of its own stands between it and a sum"
    )


@dataclass(frozen=True)
class LayerShape:
    """What the candidates of one layer have in common, and how one becomes a part of the layer's kernel.

    Attributes:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: In both directions.
        groups: Of the layer's convolution.
    """

    in_channels: int
    out_channels: int
    stride: int
    groups: int

    def candidate(self, option: str) -> Candidate:
        """The candidate that an option's name means, if it can be embedded in this layer.

        Raises:
            UnsupportedError: It cannot; the message has the reason.
            InvalidInputError: The name is unknown.
        """
        candidate = parse(option)
        match candidate:
            case Identity() if self.stride != 1:
                raise UnsupportedError(f"identity has stride 1, the layer has {self.stride}: it cannot be embedded")
            case Identity() | AveragePool() if self.in_channels != self.out_channels:
                raise UnsupportedError(
                    f"{option} keeps the channels, and the layer makes {self.out_channels} of {self.in_channels}: "
                    "it cannot be embedded"
                )
            case Kernel(groups=groups) if groups != 1:
                if groups % self.groups or self.in_channels % groups or self.out_channels % groups:
                    raise UnsupportedError(
                        f"{option} cannot be embedded: its groups must be a multiple of the layer's {self.groups}, and "
                        f"divide its {self.in_channels} and {self.out_channels} channels"
                    )
        return candidate

    def groups_of(self, candidate: Candidate) -> int:
        """Groups of a candidate's own convolution."""
        return max(candidate.groups, self.groups) if isinstance(candidate, Kernel) else self.groups

    def weight_shape(self, kernel: Kernel) -> tuple[int, int, int, int]:
        """Shape of a candidate's weight as ``nn.Conv2d`` holds it."""
        return self.out_channels, self.in_channels // self.groups_of(kernel), *kernel.size

    def embed(self, candidate: Candidate, scale: Tensor, weight: Tensor | None) -> Tensor:
        """``scale * candidate`` as a kernel of the candidate's extent.

        The scale comes first, so that autograd keeps nothing but the weight itself.

        Args:
            candidate: Any but zero.
            scale: ``(1, 1, 1, 1)``, or ``(out_channels, 1, 1, 1)``.
            weight: ``(out_channels, in_channels / its groups, *size)``, or ``(1, 1, *size)``, which is spread over the
                channels where the groups are the layer's. None where the candidate has none.

        Returns:
            ``(out_channels, in_channels / groups, *extent)``; channels of size 1 where ``scale`` and ``weight`` have.
        """
        if weight is None:
            # A delta per channel, or a constant window.
            side = self.out_channels // self.groups
            diagonal = torch.diag_embed(scale.expand(self.out_channels, 1, 1, 1).reshape(self.groups, side))
            area = candidate.extent[0] * candidate.extent[1]
            return (diagonal.reshape(self.out_channels, side, 1, 1) / area).expand(-1, -1, *candidate.extent)
        assert isinstance(candidate, Kernel)
        kernel = scale * weight
        if candidate.dilation > 1:
            # Zeros after each tap, then without those after the last.
            gap = candidate.dilation - 1
            kernel = F.pad(kernel[..., :, None, :, None], (0, gap, 0, 0, 0, gap)).flatten(-4, -3).flatten(-2)
            kernel = kernel[..., : candidate.extent[0], : candidate.extent[1]]
        blocks = self.groups_of(candidate) // self.groups
        if blocks > 1:
            rows, columns = self._block(blocks)
            kernel = kernel.expand(self.out_channels, columns, -1, -1)
            kernel = kernel.reshape(self.groups, blocks, rows, columns, *candidate.extent).movedim(1, -1)
            kernel = torch.diag_embed(kernel).movedim((-2, -1), (1, 3))
            kernel = kernel.reshape(self.out_channels, self.in_channels // self.groups, *candidate.extent)
        return kernel

    def extract(self, candidate: Kernel, kernel: Tensor) -> Tensor:
        """The weight that a candidate has as a mask on a kernel: the inverse of :meth:`embed`.

        Args:
            candidate: A convolution.
            kernel: ``(out_channels, in_channels / groups, kh, kw)``, at least as large as the candidate's extent.

        Returns:
            A view, or a copy if the candidate has more groups than the layer, of :meth:`weight_shape`.
        """
        taps = centre(kernel, candidate.extent)[..., :: candidate.dilation, :: candidate.dilation]
        blocks = self.groups_of(candidate) // self.groups
        if blocks == 1:
            return taps
        rows, columns = self._block(blocks)
        taps = taps.reshape(self.groups, blocks, rows, blocks, columns, *candidate.size)
        return taps.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(self.weight_shape(candidate))

    def _block(self, blocks: int) -> tuple[int, int]:
        return self.out_channels // (self.groups * blocks), self.in_channels // (self.groups * blocks)


def centre(kernel: Tensor, extent: tuple[int, int]) -> Tensor:
    """The middle ``(..., *extent)`` of a kernel ``(..., kh, kw)``. A view."""
    top, left = (kernel.shape[-2] - extent[0]) // 2, (kernel.shape[-1] - extent[1]) // 2
    return kernel[..., top : top + extent[0], left : left + extent[1]]


def sum_centred(kernels: Sequence[Tensor]) -> Tensor:
    """The sum of one or more kernels ``(..., kh, kw)`` of odd sizes, each in the middle of the largest size."""
    height = max(kernel.shape[-2] for kernel in kernels)
    width = max(kernel.shape[-1] for kernel in kernels)
    total: Tensor | None = None
    for kernel in kernels:
        above, beside = (height - kernel.shape[-2]) // 2, (width - kernel.shape[-1]) // 2
        padded = F.pad(kernel, (beside, beside, above, above)) if above or beside else kernel
        total = padded if total is None else total + padded
    assert total is not None
    return total
