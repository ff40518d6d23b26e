"""PReLU that trains fast on a CPU, and weighted sums of PReLUs.

PyTorch's own backward pass of a PReLU with a slope per channel is one scalar loop on a CPU, 10 to 20 times slower than
its forward pass, and it makes a tensor of the size of the input for the slopes' gradient. Here it is a few vectorised
passes, most of them in place, and values and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_PER_CHANNEL = (0, 2, 3)
"""The dimensions that a sum per channel runs over."""


class PReLU(nn.PReLU):
    """``nn.PReLU`` with a faster backward pass. It has no second derivative for input ``(n, c, h, w)``."""

    def forward(self, input: Tensor) -> Tensor:
        """From any shape with the channels second to the same shape."""
        return prelu(input, self.weight)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """``functional.prelu`` with a faster backward pass.

    Args:
        x: Any shape with the channels second.
        slope: Per channel, or one for all.
    """
    if x.ndim != 4 or x.dtype != slope.dtype or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        # Of two types under autocast, which PyTorch's own function sorts out.
        return functional.prelu(x, slope)
    y: Tensor = _PReLU.apply(x, slope)  # type: ignore[no-untyped-call]
    return y


def prelu_sums(inputs: Sequence[Tensor], slopes: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """``sum over k of weights[k, t] * prelu(inputs[k] of t, slopes[k, :, t])``, for each t.

    Nothing is saved for the backward pass but the inputs and the two small tensors.

    Args:
        inputs: K feature maps ``(n, c * T, h, w)``, each of T parts whose channels alternate: channel ``c`` of part
            ``t`` is at ``c * T + t``. A grouped convolution can make all parts at once in this order.
        slopes: ``(K, c, T)``.
        weights: ``(K, T)``, of any sign.

    Returns:
        T sums ``(n, c, h, w)``.
    """
    sums: tuple[Tensor, ...] = _PReLUSums.apply(slopes, weights, *inputs)  # type: ignore[no-untyped-call]
    return sums


def _channels(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


def _parts(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Views of the parts of ``(n, c * parts, h, w)`` whose channels alternate."""
    split: Tensor = x.unflatten(1, (-1, parts))  # type: ignore[no-untyped-call]
    return split.unbind(2)


def _negative_sum(gradient: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    """``(c,)``: the sum of ``gradient * x`` where ``x`` is negative."""
    return torch.clamp_max(x, 0, out=scratch).mul_(gradient).sum(_PER_CHANNEL)


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return functional.prelu(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        (gradient,) = gradients
        scratch = torch.empty_like(x)
        by_slope = _negative_sum(gradient, x, scratch)
        positive = torch.ops.aten.threshold_backward(gradient, x, 0)
        # slope * gradient where x <= 0, and gradient elsewhere.
        by_x = positive.lerp_(gradient, _channels(slope))
        return by_x, by_slope if slope.numel() > 1 else by_slope.sum().view(1)


class _PReLUSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slopes: Tensor, weights: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(slopes, weights, *inputs)
        parts = weights.shape[1]
        total: Tensor | None = None
        for x, slope, weight in zip(inputs, slopes, weights, strict=True):
            y = torch.prelu(x, slope.reshape(-1))
            factor = _channels(weight.expand_as(slope))
            total = y.mul_(factor) if total is None else total.addcmul_(y, factor)
        assert total is not None
        if parts == 1:
            return (total,)
        # Clones are dense, in the order of strides that they come in.
        return tuple(part.clone() for part in _parts(total, parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes, weights, *inputs = ctx.saved_tensors
        parts = weights.shape[1]
        gradient = torch.empty_like(inputs[0])
        for part, of_part in zip(_parts(gradient, parts), gradients, strict=True):
            part.copy_(of_part)
        scratch = torch.empty_like(gradient)
        by_slopes, by_weights, by_inputs = torch.empty_like(slopes), torch.empty_like(weights), []
        for k, (x, slope, weight) in enumerate(zip(inputs, slopes, weights, strict=True)):
            negative = _negative_sum(gradient, x, scratch).view_as(slope)
            torch.mul(negative, weight, out=by_slopes[k])
            if ctx.needs_input_grad[1]:
                positive = torch.clamp_min(x, 0, out=scratch).mul_(gradient).sum(_PER_CHANNEL).view_as(slope)
                torch.sum(positive.addcmul_(negative, slope), 0, out=by_weights[k])
            # weight * slope * gradient where x <= 0, and weight * gradient elsewhere.
            by_x = torch.ops.aten.threshold_backward(gradient, x, 0)
            by_x.mul_(_channels(weight * (1 - slope))).addcmul_(gradient, _channels(weight * slope))
            by_inputs.append(by_x)
        return by_slopes, by_weights if ctx.needs_input_grad[1] else None, *by_inputs
