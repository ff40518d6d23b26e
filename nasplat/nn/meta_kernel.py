"""Meta kernels: candidate kernels are summed, then convolved once (arXiv:1912.04749).

Convolution is linear in its kernel. A mixture of K convolutions of one input, ``sum_k p_k (W_k * x)``, therefore equals
one convolution with the kernel ``sum_k p_k embed_k(W_k)``, where ``embed_k`` writes a kernel into a larger one, centred
and with zeros around it. One feature map exists between two nodes, however many candidates there are.

What can be embedded is in ``nasplat.nn.embedding``. Of the paper, the abstract and the introduction were read; the rest
is design.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.embedding import AveragePool, Candidate, Identity, Kernel, LayerShape, Zero, centre, sum_centred
from nasplat.nn.leading import LeadingBatchNorm2d
from nasplat.nn.mobile import InvertedResidual

WeightSharing: TypeAlias = Literal["separate", "shared"]
"""``separate``: each candidate has a kernel of its own. ``shared``: all are masks on one kernel."""


class MetaConv2d(nn.Module):
    """A mixture of candidates as one convolution, without bias, "same" padding by zeros.

    With ``separate`` weights a candidate's kernel is ``kernels[option]``; with ``shared`` ones the candidates are masks
    on ``kernel``, which has the largest extent among them.

    Attributes:
        options: Names of the candidates, in the order of the mixture's weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        candidates: Sequence[str],
        *,
        stride: int = 1,
        groups: int = 1,
        weight_sharing: WeightSharing = "separate",
    ) -> None:
        """Make the kernels, each initialised as ``nn.Conv2d`` initialises its own.

        Args:
            in_channels: Of the input.
            out_channels: Of the output.
            candidates: Different names, as ``nasplat.nn.embedding.parse`` reads them.
            stride: Of the convolution, in both directions.
            groups: Of the convolution; ``in_channels`` of a depthwise one.
            weight_sharing: Whether each candidate has a kernel of its own.

        Raises:
            UnsupportedError: A candidate cannot be embedded; the message has the reason.
            InvalidInputError: Another argument is wrong.
        """
        super().__init__()
        if not candidates or len(set(candidates)) != len(candidates):
            raise InvalidInputError(f"candidates is {candidates!r}; legal: one or more different names")
        if weight_sharing not in ("separate", "shared"):
            raise InvalidInputError(f"weight_sharing is {weight_sharing!r}; legal: 'separate', 'shared'")
        if stride < 1 or groups < 1 or in_channels % groups or out_channels % groups:
            raise InvalidInputError(
                f"stride is {stride}, groups is {groups} for {in_channels} -> {out_channels} channels; "
                "legal: a stride from 1 up, groups that divide both"
            )
        self.options = tuple(candidates)
        self._layer = LayerShape(in_channels, out_channels, stride, groups)
        self.candidates = tuple(self._layer.candidate(option) for option in candidates)
        convs = {o: c for o, c in zip(self.options, self.candidates, strict=True) if isinstance(c, Kernel)}
        self.kernels = nn.ParameterDict()
        self.kernel: nn.Parameter | None = None
        if weight_sharing == "separate":
            for option, candidate in convs.items():
                self.kernels[option] = _initialised(self._layer.weight_shape(candidate))
        elif convs:
            extents = [candidate.extent for candidate in convs.values()]
            side = max(height for height, _ in extents), max(width for _, width in extents)
            self.kernel = _initialised((out_channels, in_channels // groups, *side))

    def extra_repr(self) -> str:
        """Channels, candidates, stride and groups, for ``print``."""
        layer = self._layer
        return (
            f"{layer.in_channels}, {layer.out_channels}, {', '.join(self.options)}, "
            f"stride={layer.stride}, groups={layer.groups}"
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """``sum_k weights_k * candidate_k(x)``, in one convolution.

        Args:
            x: ``(n, in_channels, h, w)``.
            weights: ``(K,)``, or ``(parts, K)``: one row for each of equally many consecutive output channels.

        Returns:
            ``(n, out_channels, ceil(h / stride), ceil(w / stride))``.

        Raises:
            InvalidInputError: ``weights`` has another shape.
        """
        return self.convolve(x, self.meta_kernel(weights))

    def convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Convolve with a kernel of :meth:`meta_kernel`, or with its first channels if the layer is depthwise."""
        padding = (kernel.shape[-2] - 1) // 2, (kernel.shape[-1] - 1) // 2
        return F.conv2d(x, kernel, stride=self._layer.stride, padding=padding, groups=x.shape[1] // kernel.shape[1])

    def meta_kernel(self, weights: Tensor, used: Sequence[int] | None = None) -> Tensor:
        """The summed kernel ``(out_channels, in_channels / groups, kh, kw)``.

        It is as large as the largest candidate in use. A candidate of weight 0 in all rows is not used.

        Args:
            weights: ``(K,)`` or ``(parts, K)``, as for :meth:`forward`.
            used: Indices of the candidates with a weight other than 0; None looks, which copies the weights to the
                host.

        Raises:
            InvalidInputError: ``weights`` has another shape.
        """
        layer, count = self._layer, len(self.options)
        parts = weights.shape[0] if weights.ndim == 2 else 1
        if weights.ndim not in (1, 2) or weights.shape[-1] != count or not parts or layer.out_channels % parts:
            raise InvalidInputError(
                f"weights have shape {tuple(weights.shape)}; legal: ({count},), or (parts, {count}) with parts that "
                f"divide {layer.out_channels} channels"
            )
        if used is None:
            used = _not_zero(weights)
        scales = weights.reshape(parts, count).T.reshape(count, parts, 1, 1, 1)
        if parts > 1:
            scales = scales.repeat_interleave(layer.out_channels // parts, dim=1)
        mixed: list[Tensor] = []
        masks: list[Tensor] = []
        for index in used:
            option, candidate, scale = self.options[index], self.candidates[index], scales[index]
            if isinstance(candidate, Zero):
                continue
            if not isinstance(candidate, Kernel):
                mixed.append(layer.embed(candidate, scale, None))
            elif self.kernel is None:
                mixed.append(layer.embed(candidate, scale, self.kernels[option]))
            else:
                masks.append(layer.embed(candidate, scale, scale.new_ones(1, 1, 1, 1).expand(1, 1, *candidate.size)))
        if masks:
            assert self.kernel is not None
            mask = sum_centred(masks)
            mixed.append(centre(self.kernel, (mask.shape[-2], mask.shape[-1])) * mask)
        if not mixed:
            # Nothing is in use but zero, which still has a size.
            return weights.new_zeros(layer.out_channels, layer.in_channels // layer.groups, 1, 1)
        return sum_centred(mixed)

    def kernel_of(self, option: str) -> Tensor | None:
        """The weight of one candidate as ``nn.Conv2d`` holds it: ``(out_channels, in_channels / groups, kh, kw)``.

        None where the candidate has none. A view on the parameters.

        Raises:
            InvalidInputError: The layer has no such candidate.
        """
        if option not in self.options:
            raise InvalidInputError(f"the layer has no candidate {option!r}; legal: {', '.join(self.options)}")
        candidate, layer = self.candidates[self.options.index(option)], self._layer
        if not isinstance(candidate, Kernel):
            return None
        if self.kernel is None:
            own: Tensor = self.kernels[option]
            return own
        return layer.extract(candidate, self.kernel)

    def derive(self, options: str | Sequence[str]) -> nn.Module:
        """A plain layer of the chosen candidates with copies of their weights; it holds no other candidate.

        Args:
            options: One name; or one for each part, of equally many consecutive output channels.

        Returns:
            What :func:`plain` makes.

        Raises:
            InvalidInputError: The layer has no such candidate, or the parts do not divide its channels.
            UnsupportedError: See :func:`plain`.
        """
        options = (options,) if isinstance(options, str) else tuple(options)
        kernels = [self.kernel_of(option) for option in options]
        layer = self._layer
        module = plain(options, layer.in_channels, layer.out_channels, stride=layer.stride, groups=layer.groups)
        width = layer.out_channels // len(options)
        parts = [kernel if kernel is None else kernel[i * width : (i + 1) * width] for i, kernel in enumerate(kernels)]
        load_plain(module, parts)
        return module


class MetaInvertedResidual(nn.Module):
    """An inverted residual block in which kernel and expansion are mixtures, with one feature map at each step.

    The depthwise convolution is a :class:`MetaConv2d`. An expansion of ``e`` uses the first ``e * in_channels`` hidden
    channels, so a mixture of expansions is a mask ``m_c = sum_e q_e [c < e * in_channels]`` on the hidden channels. It
    multiplies the columns of the last convolution, which is the same as to multiply its input and keeps no feature map.
    The BatchNorms have no affine part.

    Parts of the hidden channels can mix kernels with weights of their own. Each expansion uses the same share of each
    part: the channels that an expansion adds to the one before are parted evenly.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        candidates: Sequence[str],
        expansions: Sequence[int],
        *,
        stride: int = 1,
        parts: int = 1,
        weight_sharing: WeightSharing = "separate",
        largest: int | None = None,
    ) -> None:
        """Make the weights.

        Args:
            in_channels: Of the input.
            out_channels: Of the output. The block has a shortcut where it keeps channels and size.
            candidates: Of the depthwise convolution, see :class:`MetaConv2d`.
            expansions: Different integers from 2 up; and 0, which leaves the block out, where it has a shortcut.
            stride: Of the depthwise convolution.
            parts: Parts of the hidden channels, a divisor of the channels that each expansion adds.
            weight_sharing: See :class:`MetaConv2d`.
            largest: The largest expansion that is held; None holds all.

        Raises:
            InvalidInputError: An argument is wrong.
            UnsupportedError: A candidate cannot be embedded; the message has the reason.
        """
        super().__init__()
        self.expansions = tuple(expansions)
        self.shortcut = stride == 1 and in_channels == out_channels
        steps = sorted({0, *self.expansions})
        if len(set(self.expansions)) != len(self.expansions) or steps[-1] < 2 or steps[0] < 0 or 1 in steps:
            raise InvalidInputError(f"expansions is {expansions!r}; legal: different integers from 2 up, and 0")
        if 0 in self.expansions and not self.shortcut:
            raise InvalidInputError("expansion 0 leaves the block out, and this one changes channels or size")
        added = [(b - a) * in_channels for a, b in pairwise(steps)]
        if parts < 1 or any(channels % parts for channels in added):
            raise InvalidInputError(
                f"parts is {parts}; legal: a divisor of the hidden channels that each expansion adds, {added}"
            )
        self.parts, self._in_channels = parts, in_channels
        width = in_channels * (steps[-1] if largest is None else largest)
        self._part_of = [part for channels in added for part in range(parts) for _ in range(channels // parts)][:width]
        self.expand = nn.Conv2d(in_channels, width, 1, bias=False)
        self.expand_norm = LeadingBatchNorm2d(width)
        self.depthwise = MetaConv2d(
            width, width, candidates, stride=stride, groups=width, weight_sharing=weight_sharing
        )
        self.depthwise_norm = LeadingBatchNorm2d(width)
        self.project = nn.Conv2d(width, out_channels, 1, bias=False)
        self.project_norm = LeadingBatchNorm2d(out_channels)
        masks = [[float(channel < e * in_channels) for channel in range(width)] for e in self.expansions]
        self._masks: Tensor
        self._rows: Tensor
        self.register_buffer("_masks", torch.tensor(masks), persistent=False)
        self.register_buffer("_rows", torch.tensor(self._part_of), persistent=False)

    def forward(
        self,
        x: Tensor,
        kernels: Tensor,
        expansions: Tensor,
        used: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> Tensor:
        """The block's output, with its shortcut where it has one.

        With a weight ``q_0`` of expansion 0 the output is ``x + (1 - q_0) * block(x)``. Hidden channels that only
        expansions of weight 0 have are not computed.

        Args:
            x: ``(n, in_channels, h, w)``.
            kernels: ``(K,)``, or ``(parts, K)`` if there are several.
            expansions: ``(E,)``.
            used: Indices of the candidates, and of the expansions, with a weight other than 0; None looks, which copies
                the weights to the host.

        Returns:
            ``(n, out_channels, ceil(h / stride), ceil(w / stride))``.

        Raises:
            InvalidInputError: All expansions have the weight 0, or a shape is wrong.
        """
        if used is None:
            used = _not_zero(kernels), _not_zero(expansions)
        if not used[1]:
            raise InvalidInputError(f"all of the expansions {self.expansions} have weight 0")
        if kernels.ndim == 2 and kernels.shape[0] != self.parts:
            raise InvalidInputError(f"kernels has weights for {kernels.shape[0]} parts; legal: {self.parts}")
        hidden = self._in_channels * max(self.expansions[index] for index in used[1])
        if hidden == 0:
            return x
        weights = kernels.index_select(0, self._rows) if kernels.ndim == 2 else kernels
        kernel = self.depthwise.meta_kernel(weights, used[0])
        mask = expansions @ self._masks[:, :hidden]
        # In place, because autograd keeps the output of a ReLU6 anyway: it is the input of the next convolution.
        z = F.relu6(self.expand_norm(F.conv2d(x, self.expand.weight[:hidden])), inplace=True)
        z = F.relu6(self.depthwise_norm(self.depthwise.convolve(z, kernel[:hidden])), inplace=True)
        y: Tensor = self.project_norm(F.conv2d(z, self.project.weight[:, :hidden] * mask[:, None, None]))
        if 0 in self.expansions and (index := self.expansions.index(0)) in used[1]:
            y = y * (1 - expansions[index])
        return x + y if self.shortcut else y

    def load_into(self, block: InvertedResidual, options: Sequence[str], expansion: int) -> None:
        """Copy the weights and running statistics of one path into a plain block, in place.

        Its hidden channels are those of the first part, then the second and so on.

        Args:
            block: Its depthwise convolution is what :func:`plain` makes of ``options``.
            options: One candidate for each part; one where all are the same.
            expansion: Other than 0.

        Raises:
            InvalidInputError: There is no such candidate, or a shape does not agree.
        """
        hidden = self._in_channels * expansion
        order = torch.tensor(sorted(range(hidden), key=self._part_of.__getitem__))
        width = hidden // len(options)
        kernels: list[Tensor | None] = []
        for index, option in enumerate(options):
            kernel = self.depthwise.kernel_of(option)
            kernels.append(None if kernel is None else kernel[order[index * width : (index + 1) * width]])
        load_plain(block.get_submodule("depthwise.conv"), kernels)
        weights = {
            "expand.conv.weight": self.expand.weight[order],
            "project.conv.weight": self.project.weight[:, order],
        }
        for step, norm, rows in (
            ("expand", self.expand_norm, order),
            ("depthwise", self.depthwise_norm, order),
            ("project", self.project_norm, slice(None)),
        ):
            for name, value in norm.named_buffers():
                weights[f"{step}.norm.{name}"] = value[rows] if value.ndim else value
        own = block.state_dict()
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)


class Nothing(nn.Module):
    """Zeros ``(n, out_channels, ceil(h / stride), ceil(w / stride))``: what a derived layer has for ``zero``."""

    def __init__(self, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.out_channels, self.stride = out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Zeros for a batch ``(n, c, h, w)``."""
        height, width = (-(-side // self.stride) for side in x.shape[-2:])
        return x.new_zeros(x.shape[0], self.out_channels, height, width)


class SplitConv2d(nn.Module):
    """Layers side by side, each for a part of the output channels (mixed depthwise convolution, arXiv:1907.09595).

    Attributes:
        branches: The layers, in the order of the output channels.
        ranges: For each, the input channels ``[start, stop)`` that it sees.
    """

    def __init__(self, branches: Sequence[nn.Module], ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.ranges = tuple(ranges)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, h', w')``."""
        pairs = zip(self.branches, self.ranges, strict=True)
        return torch.cat([branch(x[:, start:stop]) for branch, (start, stop) in pairs], dim=1)


def plain(
    options: Sequence[str], in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1
) -> nn.Module:
    """The layer of chosen candidates, freshly initialised.

    Args:
        options: One name for each part of equally many consecutive output channels; one is the whole layer.
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the layer.
        groups: Of the layer.

    Returns:
        ``nn.Conv2d``, ``nn.Identity``, ``nn.AvgPool2d`` or :class:`Nothing`; where the parts differ, a
        :class:`SplitConv2d` of those.

    Raises:
        InvalidInputError: The parts do not divide the channels.
        UnsupportedError: A candidate does not fit the layer, or a part would cut one of its groups.
    """
    if not options or out_channels % len(options) or in_channels % len(options):
        raise InvalidInputError(
            f"{len(options)} parts of {in_channels} -> {out_channels} channels; legal: a divisor of both"
        )
    layer = LayerShape(in_channels, out_channels, stride, groups)
    candidates = [layer.candidate(option) for option in options]
    if len(set(candidates)) == 1:
        return _plain(candidates[0], in_channels, out_channels, stride, layer.groups_of(candidates[0]))
    branches: list[nn.Module] = []
    ranges: list[tuple[int, int]] = []
    parts, share = len(options), in_channels // len(options)
    for part, candidate in enumerate(candidates):
        own = layer.groups_of(candidate)
        start, stop = part * share, (part + 1) * share
        if isinstance(candidate, Kernel):
            if own == 1:
                # Every output channel of a dense convolution sees all of the input.
                start, stop = 0, in_channels
            elif own % parts:
                raise UnsupportedError(
                    f"{parts} parts cut the {own} groups of {options[part]}; legal: a divisor of the groups"
                )
            else:
                own //= parts
        branches.append(_plain(candidate, stop - start, out_channels // parts, stride, own))
        ranges.append((start, stop))
    return SplitConv2d(branches, ranges)


def load_plain(module: nn.Module, kernels: Sequence[Tensor | None]) -> None:
    """Copy kernels into a layer of :func:`plain`, in place.

    Args:
        module: The layer.
        kernels: Per part what ``nn.Conv2d`` holds for its output channels, None for a part without weights.

    Raises:
        InvalidInputError: A shape does not agree.
    """
    if isinstance(module, SplitConv2d):
        for branch, kernel in zip(module.branches, kernels, strict=True):
            load_plain(branch, [kernel])
        return
    if isinstance(module, nn.Conv2d):
        whole = torch.cat([kernel for kernel in kernels if kernel is not None])
        if whole.shape != module.weight.shape:
            raise InvalidInputError(
                f"kernels of shape {tuple(whole.shape)} for a layer of {tuple(module.weight.shape)}"
            )
        with torch.no_grad():
            module.weight.copy_(whole)


def _plain(candidate: Candidate, in_channels: int, out_channels: int, stride: int, groups: int) -> nn.Module:
    match candidate:
        case Identity():
            return nn.Identity()
        case AveragePool(size):
            return nn.AvgPool2d(size, stride, padding=size // 2, count_include_pad=True)
        case Zero():
            return Nothing(out_channels, stride)
        case Kernel(size, dilation):
            padding = (candidate.extent[0] - 1) // 2, (candidate.extent[1] - 1) // 2
            return nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, groups, bias=False)


def _initialised(shape: tuple[int, int, int, int]) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(shape))
    nn.init.kaiming_uniform_(weight, a=5**0.5)
    return weight


def _not_zero(weights: Tensor) -> list[int]:
    rows = weights.detach().reshape(-1, weights.shape[-1]).ne(0).any(0).tolist()
    return [index for index, used in enumerate(rows) if used]
