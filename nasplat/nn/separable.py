"""Operations of the DARTS cell (Liu, Simonyan, Yang 2019, arXiv:1806.09055): ReLU, convolution, BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ReluConvNorm(nn.Module):
    """ReLU, 1x1 convolution, BatchNorm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        affine: Whether the BatchNorm has a learned scale and bias.
    """

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, h, w)``."""
        y: Tensor = self.norm(self.conv(functional.relu(x)))
        return y


class FactorisedReduce(nn.Module):
    """Halves height and width with two 1x1 convolutions of stride 2, and sees every other pixel twice over.

    ReLU; one convolution reads the even pixels, the other the odd ones (the input shifted by one), and each makes half
    of the channels; BatchNorm. Of an odd height or width, the shifted half has one row or column less, and gets a zero
    there: the published code takes even sizes only.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least 2.
        affine: Whether the BatchNorm has a learned scale and bias.
    """

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool = True) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv_even = nn.Conv2d(in_channels, half, 1, stride=2, bias=False)
        self.conv_odd = nn.Conv2d(in_channels, out_channels - half, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)``, ``h, w >= 2``, to ``(n, out_channels, ceil(h / 2), ceil(w / 2))``."""
        x = functional.relu(x)
        even = self.conv_even(x)
        odd = self.conv_odd(x[:, :, 1:, 1:])
        height, width = x.shape[2] % 2, x.shape[3] % 2
        if height or width:
            odd = functional.pad(odd, (0, width, 0, height))
        y: Tensor = self.norm(torch.cat([even, odd], dim=1))
        return y


class SeparableStage(nn.Module):
    """ReLU, depthwise convolution, 1x1 convolution, BatchNorm; no channels are gained or lost.

    Args:
        channels: In and out.
        kernel_size: Odd side of the depthwise kernel; padding keeps the size at stride 1.
        stride: Of the depthwise convolution, 1 or 2.
        dilation: Distance between its taps, in pixels.
        affine: Whether the BatchNorm has a learned scale and bias.
    """

    def __init__(
        self, channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=channels,
            bias=False,
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, channels, h, w)`` to ``(n, channels, ceil(h / stride), ceil(w / stride))``."""
        y: Tensor = self.norm(self.pointwise(self.depthwise(functional.relu(x))))
        return y


class SeparableConv(nn.Sequential):
    """Two :class:`SeparableStage` in a row, the first one with the stride."""

    def __init__(self, channels: int, kernel_size: int, *, stride: int = 1, affine: bool = True) -> None:
        super().__init__(
            SeparableStage(channels, kernel_size, stride=stride, affine=affine),
            SeparableStage(channels, kernel_size, affine=affine),
        )


class DilatedConv(SeparableStage):
    """One :class:`SeparableStage` whose taps are two pixels apart."""

    def __init__(self, channels: int, kernel_size: int, *, stride: int = 1, affine: bool = True) -> None:
        super().__init__(channels, kernel_size, stride=stride, dilation=2, affine=affine)


class NormedPool(nn.Module):
    """A pool, then a BatchNorm without affine parameters: a pool of a supernet.

    Args:
        pool: Keeps the channels.
        channels: In and out.
    """

    def __init__(self, pool: nn.Module, channels: int) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, channels, h, w)`` to the pool's shape."""
        y: Tensor = self.norm(self.pool(x))
        return y
