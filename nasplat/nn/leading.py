"""Layers at their greatest width that compute as many leading channels as their input has.

Supernets use them where a narrower network is the first channels of a wider one.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from nasplat.nn.prelu import PReLU, prelu


class LeadingBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm without affine parameters, for the leading channels.

    Args:
        channels: The most that there are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """From ``(n, c, h, w)``, ``c`` at most ``num_features``, to the same shape."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        channels = input.shape[1]
        mean, variance = self.running_mean[:channels], self.running_var[:channels]
        return functional.batch_norm(input, mean, variance, None, None, self.training, self.momentum, self.eps)


class LeadingPReLU(PReLU):
    """A PReLU with a slope per channel, for the leading channels."""

    def forward(self, input: Tensor) -> Tensor:
        """From ``(n, c, h, w)``, ``c`` at most ``num_parameters``, to the same shape."""
        return prelu(input, self.weight[: input.shape[1]])
