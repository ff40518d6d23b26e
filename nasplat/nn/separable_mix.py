"""The edges that leave one state of a DARTS supernet's cell, computed together.

The same function as :func:`nasplat.nn.cell.mix` on the operations of :mod:`nasplat.nn.separable`, in less time. The
ReLU of a state and its pools, with their normalisation, are computed once for all edges. Skips and pools reach the
nodes by one matrix product with their weights, and the weight of any other operation is the scale of the BatchNorm that
ends it. Convolutions are where the time goes, and take one of two ways:

* Large images (:class:`_LargeImages`): channels last. A 1x1 convolution is a linear layer. Taps two pixels apart do not
  mix even with odd pixels: the image is taken apart into its four phases, which an ordinary convolution reads as four
  images. PyTorch's gradients of a dilated depthwise convolution are many times slower on a CPU.
* Small images (:class:`_SmallImages`): a depthwise convolution is a matrix per channel, pixels by pixels, whatever its
  kernel, stride and dilation. So the same operation of all edges is one batched matrix product. PyTorch's gradient of a
  depthwise kernel pays per image, which is most of the time where an image is a few pixels.

Nothing here is a derivative written by hand, so derivatives of any order exist.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.nn.cell import Use
from nasplat.nn.mobile import SandglassBlock
from nasplat.nn.separable import DilatedConv, NormedPool, SeparableConv, SeparableStage

SMALL_PIXELS = 64
"""Most pixels of an image whose depthwise convolutions are matrices (measured on a CPU).

A matrix has as many entries as pixels squared and serves all images of a batch, so a batch should also have half as
many images as an image has pixels.
"""


def mix_separable(x: Tensor, uses: Mapping[int, Sequence[Use]]) -> dict[int, Tensor]:
    """Per later node, the weighted sum of its edge's operations on ``x`` (``nasplat.nn.cell.Mix``).

    Args:
        x: The state, ``(n, c, h, w)``.
        uses: Per node the operations of its edge from this state. Their BatchNorms have no affine parameters, and share
            one momentum.
    """
    n, _, height, width = x.shape
    way = _SmallImages if height * width <= min(SMALL_PIXELS, 2 * n) else _LargeImages
    return way(x).mix(uses)


class _State(ABC):
    """One state while the edges that leave it are computed.

    Tensors are four-dimensional, height and width in the middle, and contiguous in memory: see :attr:`FROM_IMAGES`.
    Those of several operations side by side have a dimension for them in front.
    """

    FROM_IMAGES: ClassVar[tuple[int, int, int, int]]
    TO_IMAGES: ClassVar[tuple[int, int, int, int]]
    TOGETHER: ClassVar[bool]
    """Whether the same operation of several edges is computed in one go."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.x = self.arrange(images)
        # What passed a BatchNorm in training: the norm, the mean and the variance of the batch.
        self.statistics: list[tuple[nn.BatchNorm2d, Tensor, Tensor]] = []

    def arrange(self, images: Tensor) -> Tensor:
        return images.permute(self.FROM_IMAGES).contiguous()

    @cached_property
    def rectified(self) -> Tensor:
        return functional.relu(self.x)

    @abstractmethod
    def depthwise(self, x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
        """Depthwise convolutions of one shape: of the state, or each of its own part of ``x``.

        A dilated one reads the rectified state.
        """

    @abstractmethod
    def pointwise(self, x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
        """1x1 convolutions of one shape, each of its own part of ``x``."""

    @abstractmethod
    def batch_norm(
        self, x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None, training: bool, eps: float
    ) -> Tensor:
        """BatchNorms side by side, statistics and scales concatenated; in training it leaves the batch's in them."""

    def mix(self, uses: Mapping[int, Sequence[Use]]) -> dict[int, Tensor]:
        alike: dict[str, dict[int, Use]] = defaultdict(dict)
        for node, listed in uses.items():
            for use in listed:
                alike[use.name][node] = use
        # What several nodes take up with weights of their own, and what each node just adds.
        shared: list[tuple[Tensor, dict[int, Tensor]]] = []
        added: dict[int, list[Tensor]] = {node: [] for node in uses}
        for found in alike.values():
            operation = next(iter(found.values())).operation
            weights = {node: use.weight for node, use in found.items()}
            if isinstance(operation, nn.Identity):
                shared.append((self.x, weights))
            elif isinstance(operation, NormedPool):
                shared += self._pools(found)
            elif isinstance(operation, SeparableConv | DilatedConv | SandglassBlock):
                if isinstance(operation, SandglassBlock) and operation.shortcut_channels:
                    shared.append((self.x, weights))
                groups = [list(found)] if self.TOGETHER else [[node] for node in found]
                for nodes in groups:
                    outputs = self._convolutions([found[node] for node in nodes])
                    parts = outputs.unbind() if len(nodes) > 1 else (outputs.squeeze(0),)
                    for node, y in zip(nodes, parts, strict=True):
                        added[node].append(y)
            else:
                for node, use in found.items():
                    added[node].append(self.arrange(use.operation(self.images)) * use.weight)
        for node, y in _spread(shared).items():
            added[node].append(y)
        self._record()
        sums = {node: sum(terms[1:], terms[0]) for node, terms in added.items()}
        for y in sums.values():
            if y.requires_grad:
                # The gradient of a node can be a slice of its cell's: copied once here, and not in every BatchNorm.
                y.register_hook(_contiguous)  # type: ignore[no-untyped-call]
        return {node: y.permute(self.TO_IMAGES) for node, y in sums.items()}

    def _pools(self, found: Mapping[int, Use]) -> list[tuple[Tensor, dict[int, Tensor]]]:
        """The pool, normalised, and the nodes that take it: with one statistic for all in training."""
        pools = {node: cast("NormedPool", use.operation) for node, use in found.items()}
        first = next(iter(pools.values()))
        # Height and width are in the middle; which of the others is the batch makes no difference to a pool.
        pooled = first.pool(self.x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unsqueeze(0)
        if not first.norm.training:
            return [
                (self._normalise(pooled, [pool.norm]).squeeze(0), {node: found[node].weight})
                for node, pool in pools.items()
            ]
        y = self._normalise(pooled, [first.norm]).squeeze(0)
        _, mean, variance = self.statistics[-1]
        self.statistics += [(pool.norm, mean, variance) for pool in pools.values() if pool is not first]
        return [(y, {node: use.weight for node, use in found.items()})]

    def _convolutions(self, found: Sequence[Use]) -> Tensor:
        """Operations of one kind side by side, times their weights."""
        weights = [use.weight for use in found]
        first = found[0].operation
        if isinstance(first, DilatedConv):
            return self._stage(self.rectified, [cast("DilatedConv", use.operation) for use in found], weights)
        if isinstance(first, SeparableConv):
            stages = [cast("list[SeparableStage]", list(cast("SeparableConv", use.operation))) for use in found]
            y = self._stage(self.rectified, [stage for stage, _ in stages])
            return self._stage(functional.relu_(y), [stage for _, stage in stages], weights)
        y = self.x
        for part in ("first", "reduce", "expand", "last"):
            parts = [getattr(use.operation, part) for use in found]
            convolve = self.depthwise if part in ("first", "last") else self.pointwise
            y = convolve(y, [part.conv for part in parts])
            y = self._normalise(y, [part.norm for part in parts], weights if part == "last" else None)
            if hasattr(parts[0], "activation"):
                y = functional.relu6(y, inplace=True)
        return y

    def _stage(self, x: Tensor, stages: Sequence[SeparableStage], weights: Sequence[Tensor] | None = None) -> Tensor:
        """Stages after their ReLU."""
        y = self.depthwise(x, [stage.depthwise for stage in stages])
        y = self.pointwise(y, [stage.pointwise for stage in stages])
        return self._normalise(y, [stage.norm for stage in stages], weights)

    def _normalise(self, x: Tensor, norms: Sequence[nn.BatchNorm2d], weights: Sequence[Tensor] | None = None) -> Tensor:
        """A BatchNorm of each part of ``x``, times its weight."""
        channels, training = norms[0].num_features, norms[0].training
        scale = None if weights is None else torch.stack(list(weights)).repeat_interleave(channels)
        if training:
            mean, variance = x.new_zeros(2, channels * len(norms))
            self.statistics += zip(norms, mean.split(channels), variance.split(channels), strict=True)
        else:
            mean = torch.cat([cast("Tensor", norm.running_mean) for norm in norms])
            variance = torch.cat([cast("Tensor", norm.running_var) for norm in norms])
        return self.batch_norm(x, mean, variance, scale, training, norms[0].eps)

    @torch.no_grad()
    def _record(self) -> None:
        """Update the running statistics of all BatchNorms, in a few calls."""
        if not self.statistics:
            return
        norms, means, variances = zip(*self.statistics, strict=True)
        momentum = norms[0].momentum
        torch._foreach_lerp_([norm.running_mean for norm in norms], list(means), momentum)
        torch._foreach_lerp_([norm.running_var for norm in norms], list(variances), momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


class _LargeImages(_State):
    """Tensors are ``(n, h, w, c)``; operations are computed one by one."""

    FROM_IMAGES = (0, 2, 3, 1)
    TO_IMAGES = (0, 3, 1, 2)
    TOGETHER = False

    # Views that are no views in the backward pass (a slice, an index) are left out where they would change nothing:
    # each costs a tensor of zeros and a copy.

    @cached_property
    def phases(self) -> Tensor:
        return to_phases(self.rectified)

    @cached_property
    def even(self) -> Tensor:
        return self.rectified[:, ::2, ::2].contiguous()

    def depthwise(self, x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
        (conv,) = convs
        if conv.dilation[0] == 1:
            y = _conv(x if x.ndim == 4 else x.squeeze(0), conv, conv.stride[0])
        elif conv.stride[0] == 2:
            y = _conv(self.even, conv, 1)
        else:
            y = from_phases(_conv(self.phases, conv, 1))
            height, width = x.shape[1:3]
            if height % 2 or width % 2:
                y = y[:, :height, :width]
        return y.unsqueeze(0)

    def pointwise(self, x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
        return functional.linear(x, convs[0].weight.flatten(1))

    def batch_norm(
        self, x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None, training: bool, eps: float
    ) -> Tensor:
        images = x.squeeze(0).permute(0, 3, 1, 2)
        y = functional.batch_norm(images, mean, variance, scale, training=training, momentum=1.0, eps=eps)
        return y.permute(0, 2, 3, 1).unsqueeze(0)


class _SmallImages(_State):
    """Tensors are ``(c, h, w, n)``; the same operation of several edges is computed in one go."""

    FROM_IMAGES = (1, 2, 3, 0)
    TO_IMAGES = (3, 0, 1, 2)
    TOGETHER = True

    def depthwise(self, x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
        conv, count = convs[0], len(convs)
        channels, height, width, n = x.shape[-4:]
        stride, kernel_size = conv.stride[0], conv.kernel_size[0]
        taps = _taps(height, width, kernel_size, stride, conv.dilation[0]).to(x)
        state = x.ndim == 4
        # All that read a state have one operand, so its rows for all of them are one matrix per channel.
        weights = torch.stack([conv.weight.flatten(1) for conv in convs], dim=1 if state else 0)
        matrices = (weights.flatten(0, 1) @ taps).view(channels if state else count * channels, -1, height * width)
        y = torch.bmm(matrices, x.reshape(len(matrices), height * width, n))
        out = (-(-height // stride), -(-width // stride), n)
        return y.view(channels, count, *out).transpose(0, 1) if state else y.view(count, channels, *out)

    def pointwise(self, x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
        weights = torch.stack([conv.weight.flatten(1) for conv in convs])
        return torch.bmm(weights, x.flatten(2)).view(len(convs), -1, *x.shape[2:])

    def batch_norm(
        self, x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None, training: bool, eps: float
    ) -> Tensor:
        rows = x.reshape(1, len(mean), -1)
        y = functional.batch_norm(rows, mean, variance, scale, training=training, momentum=1.0, eps=eps)
        return y.view(x.shape)


def to_phases(x: Tensor) -> Tensor:
    """Even and odd rows, even and odd columns as images of their own.

    Args:
        x: ``(n, h, w, c)``. Of an odd side, the odd phases get a zero at the end.

    Returns:
        ``(4 * n, ceil(h / 2), ceil(w / 2), c)``. A 3x3 convolution of it is a convolution of ``x`` whose taps are two
        pixels apart.
    """
    if x.shape[1] % 2 or x.shape[2] % 2:
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5).reshape(4 * n, h // 2, w // 2, c)


def from_phases(x: Tensor) -> Tensor:
    """Undoes :func:`to_phases` of even sides: from ``(4 * n, h, w, c)`` to ``(n, 2 * h, 2 * w, c)``."""
    n, h, w, c = x.shape
    return x.reshape(2, 2, n // 4, h, w, c).permute(2, 3, 0, 4, 1, 5).reshape(n // 4, 2 * h, 2 * w, c)


def _conv(x: Tensor, conv: nn.Conv2d, stride: int) -> Tensor:
    """A depthwise convolution of ``(n, h, w, c)`` with taps side by side."""
    images = x.permute(0, 3, 1, 2)
    y = functional.conv2d(images, conv.weight, None, stride, conv.kernel_size[0] // 2, groups=conv.groups)
    return y.permute(0, 2, 3, 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # An inference tensor that is kept could not serve a training pass.
def _taps(height: int, width: int, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """Which tap of a kernel joins which output pixel with which input pixel.

    Returns:
        Zeros and ones, ``(taps, outputs * inputs)``: flattened kernels ``(c, taps)`` times this are the matrices of the
        convolutions, ``(c, outputs * inputs)``.
    """
    image = torch.eye(height * width, device="cpu").view(-1, 1, height, width)
    padding = dilation * (kernel_size // 2)
    columns = functional.unfold(image, kernel_size, dilation=dilation, padding=padding, stride=stride)
    return columns.permute(1, 2, 0).flatten(1)


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


def _spread(shared: Sequence[tuple[Tensor, Mapping[int, Tensor]]]) -> dict[int, Tensor]:
    """Per node the sum of what is shared, each times the node's weight for it."""
    if not shared:
        return {}
    nodes = sorted({node for _, weights in shared for node in weights})
    shape = shared[0][0].shape
    zero = shared[0][0].new_zeros(())
    matrix = torch.stack([torch.stack([weights.get(node, zero) for _, weights in shared]) for node in nodes])
    rows = torch.stack([x.reshape(-1) for x, _ in shared])
    return dict(zip(nodes, (matrix @ rows).view(-1, *shape).unbind(), strict=True))
