"""Batch normalisation and sign as one comparison per channel, exact for every float32.

A normalisation in evaluation is ``x * a + b`` in floating point, and rounding keeps it monotone. So there is one number
per channel at which the sign turns. Computed as ``-b / a`` it would be off by some ulps, and for a few inputs the bit
would be another than the one that was trained with. Here it is found by bisection over all float32 numbers, through
PyTorch's own normalisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasplat.errors import InvalidInputError, UnsupportedError

_LARGEST = 0x7F7FFFFF
"""Bit pattern of the largest finite float32."""

_PARTS = 16
"""Parts that an interval is cut into in one step of the bisection: eight steps for 32 bits."""

_BAND = 64
"""Neighbours to each side of a threshold at which the result is checked."""

_SPREAD = 512
"""Further numbers at which it is checked, evenly spaced in the order of all float32: a few in every decade."""


def threshold(norm: nn.Module | None, channels: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The comparison that a normalisation followed by a sign makes.

    For every finite float32 ``x``, ``(x >= t) != flip`` where and only where ``norm(x) >= 0``.

    Args:
        norm: A BatchNorm2d in evaluation mode; None for the sign of ``x`` itself.
        channels: Of the input.

    Returns:
        Thresholds ``t``, ``(channels,)``: the smallest number at which the sign turns, -inf or +inf where it never
        does. And ``flip``, ``(channels,)``: whether it turns from + to -, that is, where the factor is negative.

    Raises:
        InvalidInputError: The normalisation is of another number of channels.
        UnsupportedError: It is no BatchNorm2d in float32 and in evaluation, it has no running statistics or numbers
            that are not finite, or what it computes here is not one comparison per channel.
    """
    if norm is None:
        return np.zeros(channels, np.float32), np.zeros(channels, np.bool_)
    check_norm(norm)
    if norm.num_features != channels:
        raise InvalidInputError(f"the normalisation is of {norm.num_features} channels; legal: {channels}")
    with torch.no_grad():
        low = torch.full((channels,), -_LARGEST)
        high = torch.full_like(low, _LARGEST)
        at_low, at_high = _positive(norm, torch.stack([low, high]))
        turns = at_low != at_high
        # The sign at low is that of the lowest number, the sign at high the other one.
        parts = torch.arange(_PARTS + 1)[:, None]
        while bool((high - low > 1).any()):
            cuts = low + (high - low) * parts // _PARTS
            same = _positive(norm, cuts[1:-1]) == at_low
            part = same.sum(dim=0, keepdim=True)
            low, high = cuts.gather(0, part)[0], cuts.gather(0, part + 1)[0]
        never = torch.where(at_low, -torch.inf, torch.inf).to(torch.float32)
        thresholds = torch.where(turns, _number(high), never)
        flip = turns & at_low
        _verify(norm, torch.where(turns, high, 0), thresholds, flip)
    return thresholds.numpy(), flip.numpy()


def check_norm(norm: nn.Module) -> None:
    """Refuse what does not normalise by constants.

    Raises:
        UnsupportedError: It is no BatchNorm2d in float32 and in evaluation, or it has no running statistics or numbers
            that are not finite.
    """
    if type(norm) is not nn.BatchNorm2d:
        raise UnsupportedError(f"a normalisation is a {type(norm).__qualname__}; legal: torch.nn.BatchNorm2d")
    if norm.training:
        raise UnsupportedError("a BatchNorm2d is in training mode; legal: evaluation, by model.eval()")
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedError(
            "a BatchNorm2d has no running statistics, so that it normalises by those of each batch; legal: "
            "track_running_stats=True"
        )
    for name, values in (*norm.named_parameters(), *norm.named_buffers()):
        if not values.is_floating_point():
            continue
        if values.dtype != torch.float32:
            raise UnsupportedError(f"{name} of a BatchNorm2d is {values.dtype}; legal: torch.float32")
        if not bool(values.isfinite().all()):
            raise UnsupportedError(f"{name} of a BatchNorm2d holds numbers that are not finite")
    with torch.no_grad():
        # Finite numbers can make an infinite factor or shift; at zero, both of them show.
        if not bool(norm(norm.running_mean.new_zeros(1, norm.num_features, 1, 1)).isfinite().all()):
            raise UnsupportedError(
                "the factor or the shift of a BatchNorm2d is not finite: its variance and eps are too small, or its "
                "numbers too large"
            )


def _number(key: Tensor) -> Tensor:
    """The float32 number with this place in the order of all of them; 0 is at 0, and -0 is the same number."""
    bits = torch.where(key >= 0, key, -key - 2**31)
    return bits.to(torch.int32).view(torch.float32)


def _positive(norm: nn.Module, key: Tensor) -> Tensor:
    """Whether the normalised value is >= 0, of numbers ``(k, channels)``."""
    y: Tensor = norm(_number(key)[:, :, None, None])[:, :, 0, 0]
    return y >= 0


def _verify(norm: nn.Module, key: Tensor, thresholds: Tensor, flip: Tensor) -> None:
    """Compare with the module next to the thresholds and over all decades, as its vectorised loops and tails see it."""
    near = key[None, :] + torch.arange(-_BAND, _BAND + 1)[:, None]
    spread = torch.linspace(-_LARGEST, _LARGEST, _SPREAD, dtype=torch.float64).to(torch.int64)
    keys = torch.cat([near.clamp(-_LARGEST, _LARGEST), spread[:, None].expand(-1, len(key))])
    x = _number(keys)
    expected = (x >= thresholds) != flip
    layouts: dict[str, Any] = {
        "one pixel": x[:, :, None, None].contiguous(),
        "channels first": x.T[None, :, :, None].contiguous(),
        "channels last": x.T[None, :, :, None].contiguous(memory_format=torch.channels_last),
    }
    for layout, images in layouts.items():
        y: Tensor = norm(images)
        found = (y[:, :, 0, 0] if layout == "one pixel" else y[0, :, :, 0].T) >= 0
        wrong = (found != expected).nonzero()
        if len(wrong):
            row, channel = wrong[0].tolist()
            raise UnsupportedError(
                f"a BatchNorm2d followed by a sign is no comparison with one number in channel {channel}: at "
                f"{float(x[row, channel])!r} ({layout}) it computes {'+' if found[row, channel] else '-'}, and the "
                f"threshold is {float(thresholds[channel])!r}"
            )
