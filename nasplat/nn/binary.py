"""Binary convolution: signs of activations and weights, and a learned scale per output channel.

Weights and activations are binarised as in XNOR-Net++ (arXiv:1909.13863), which BATS (arXiv:2003.01711)
builds on: ``y = conv(sign(x), sign(W)) * scale``, with no scale derived from the weights and none from the input.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from nasplat.errors import InvalidInputError
from nasplat.nn.prelu import PReLU


class _StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _fast_sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        # In one pass: the gradient, and zero wherever x is not strictly between -1 and 1.
        return torch.ops.aten.hardtanh_backward(grads[0], x, -1.0, 1.0)


def _fast_sign(x: Tensor) -> Tensor:
    # torch.sign maps zero to zero; half more, and a second sign, make that +1. On a CPU this takes about a tenth of
    # the time of torch.where.
    return torch.sign(x).add_(0.5).sign_()


def sign(x: Tensor) -> Tensor:
    """Sign with just two values: +1 where ``x >= 0`` (zero included), -1 elsewhere.

    ``torch.sign`` has a third value at zero, which one bit cannot hold. The gradient passes straight through and is
    zero where ``|x| >= 1`` (the clipped straight-through estimator of BATS' authors).

    Args:
        x: Any shape, floating point.

    Returns:
        Same shape and dtype as ``x``.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # One plain operator, which every exporter knows.
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _fast_sign(x)
    y: Tensor = _StraightThroughSign.apply(x)  # type: ignore[no-untyped-call]
    return y


class BinaryConv2d(nn.Conv2d):
    """Convolution of signs, times a learned scale: ``conv(sign(x), sign(W)) * scale``.

    The scale comes after the convolution, so that the convolution itself is a sum of +-1 and exact in integers. Padding
    is with zeros, put in after the sign. There is no bias: the normalisation before the sign has one, and there it is
    a learned threshold.

    Attributes:
        weight: Latent real weights, shape ``(out_channels, in_channels / groups, k, k)``.
        scale: Shape ``(out_channels,)``, ones at first.
        binary_activations: Whether the input is replaced by its sign. Plain attribute, can be switched at any time.
        binary_weights: Whether the weights are replaced by their signs. Likewise.
        tanh_activations: Whether an input that is not replaced by its sign is replaced by its hyperbolic tangent: the
            real network that teaches a binary one has it in place of the sign (arXiv:2003.11535). Likewise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        binary_activations: bool = True,
        binary_weights: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.scale = nn.Parameter(torch.ones(out_channels))
        self.binary_activations = binary_activations
        self.binary_weights = binary_weights
        self.tanh_activations = False

    @property
    def is_binary(self) -> bool:
        """Whether it multiplies bits by bits, at present: both operands are binarised."""
        return self.binary_activations and self.binary_weights

    def squash(self, input: Tensor) -> Tensor:
        """The input as the convolution sees it: its sign, its hyperbolic tangent, or itself; of the same shape."""
        if self.binary_activations:
            return sign(input)
        return torch.tanh(input) if self.tanh_activations else input

    def forward(self, input: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, h', w')``."""
        x = self.squash(input)
        weight = sign(self.weight) if self.binary_weights else self.weight
        y: Tensor = self._conv_forward(x, weight, None) * self.scale.view(-1, 1, 1)
        return y

    def extra_repr(self) -> str:
        """What ``print`` shows: the convolution's parameters and what is binary."""
        shapes = super().extra_repr()  # type: ignore[no-untyped-call]
        tanh = ", tanh_activations=True" if self.tanh_activations else ""
        return f"{shapes}, binary_activations={self.binary_activations}, binary_weights={self.binary_weights}{tanh}"


def set_binarisation(
    model: nn.Module, *, weights: bool | None = None, activations: bool | Literal["tanh"] | None = None
) -> None:
    """Switch what is binary in every :class:`BinaryConv2d` of a model, in place.

    The recipe of two steps (arXiv:2003.11535) trains with ``weights=False`` first, then with
    ``weights=True`` from the weights of the first step.

    Args:
        model: Any module; without binary layers nothing happens.
        weights: The new ``binary_weights``; None leaves it.
        activations: The new ``binary_activations``; ``"tanh"``: not binary, with the hyperbolic tangent in place of
            the sign; None leaves it.

    Raises:
        InvalidInputError: A value is none of these.
    """
    if weights not in (None, True, False) or activations not in (None, True, False, "tanh"):
        raise InvalidInputError(
            f"weights is {weights!r}, activations is {activations!r}; legal: True, False or None, for activations also "
            "'tanh'"
        )
    for layer in model.modules():
        if isinstance(layer, BinaryConv2d):
            if weights is not None:
                layer.binary_weights = weights
            if activations is not None:
                layer.binary_activations = activations != "tanh" and activations
                layer.tanh_activations = activations == "tanh"


class BinaryBlock(nn.Module):
    """BatchNorm, sign, convolution, scale, PReLU, then the input added: the order of arXiv:2003.11535.

    The shortcut keeps a real-valued path through the network. It exists where the block keeps the shape: stride 1 and
    as many channels out as in.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the kernel; padding keeps the size at stride 1.
        stride: 1 or 2.
        dilation: Distance between the taps, in pixels.
        groups: Groups of the convolution.
        shuffle: Groups of a channel shuffle after the activation; 1 is none.
        affine: Whether the BatchNorm has a learned scale and bias.
        binary_weights: See :class:`BinaryConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        shuffle: int = 1,
        affine: bool = True,
        binary_weights: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels, affine=affine)
        self.conv = BinaryConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            groups=groups,
            binary_weights=binary_weights,
        )
        self.activation = PReLU(out_channels)
        self.shuffle = nn.ChannelShuffle(shuffle) if shuffle > 1 else nn.Identity()
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, ceil(h / stride), ceil(w / stride))``."""
        y: Tensor = self.shuffle(self.activation(self.conv(self.norm(x))))
        return y + x if self.shortcut else y


class BinaryFactorisedReduce(nn.Module):
    """Halves height and width with two binary 1x1 convolutions of stride 2, and sees every other pixel twice over.

    One convolution reads the even pixels, the other the odd ones (the input shifted by one), and each makes half of
    the channels (DARTS, arXiv:1806.09055, reference code; binary as in BATS, arXiv:2003.01711). Of an odd height or
    width, the shifted half has one row or column less, and gets a zero there: zero padding after the sign.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least 2.
        affine: Whether the BatchNorm has a learned scale and bias.
        binary_weights: See :class:`BinaryConv2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, affine: bool = True, binary_weights: bool = True
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.norm = nn.BatchNorm2d(in_channels, affine=affine)
        self.conv_even = BinaryConv2d(in_channels, half, 1, stride=2, binary_weights=binary_weights)
        self.conv_odd = BinaryConv2d(in_channels, out_channels - half, 1, stride=2, binary_weights=binary_weights)
        self.activation = PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)``, ``h, w >= 2``, to ``(n, out_channels, ceil(h / 2), ceil(w / 2))``."""
        x = self.norm(x)
        even = self.conv_even(x)
        odd = self.conv_odd(x[:, :, 1:, 1:])
        height, width = x.shape[2] % 2, x.shape[3] % 2
        if height or width:
            odd = nn.functional.pad(odd, (0, width, 0, height))
        y: Tensor = self.activation(torch.cat([even, odd], dim=1))
        return y


def is_binary(model: nn.Module) -> bool:
    """Whether a model multiplies bits by bits anywhere, so that packing it means something."""
    return any(isinstance(layer, BinaryConv2d) and layer.is_binary for layer in model.modules())
