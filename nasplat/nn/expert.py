"""Expert binary convolution: several binary kernels, of which a gate picks one for each example.

The expert binary convolution of Bulat, Martinez, Tzimiropoulos 2021, arXiv:2010.03558. The gate costs one small real
matrix product per example, and the convolution itself costs as much as that of one kernel.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasplat.nn.binary import BinaryConv2d, sign


def hard_gate(logits: Tensor) -> Tensor:
    """One-hot of the largest logit going forward, softmax going backward.

    The Jacobian is that of softmax, ``p_k (delta_kl - p_l)``, so that the logits of experts that were not picked get a
    gradient as well (arXiv:2010.03558).

    Args:
        logits: Shape ``(n, experts)``.

    Returns:
        Shape ``(n, experts)``, each row exactly one 1 (the first of the largest) and zeros.
    """
    picked = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return picked
    soft = torch.softmax(logits, dim=1)
    # The difference is exactly zero, and carries the gradient.
    return picked + (soft - soft.detach())


def _conv_of_picked(x: Tensor, weight: Tensor, picks: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """Convolution of each example with the kernel that it picked, and nothing else.

    Args:
        x: Shape ``(n, in_channels, h, w)``.
        weight: Shape ``(experts, out_channels, in_channels / groups, k, k)``.
        picks: Index of an expert for each example, shape ``(n,)``.
        stride: Step in pixels.
        padding: Zeros put on each side.
        groups: Groups of the convolution.
    """
    if torch.compiler.is_exporting():
        return _conv_as_product(x, weight[picks], stride, padding, groups)
    if len(x) == 1:
        return F.conv2d(x, weight[picks][0], None, stride, padding, 1, groups)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # For this batch size only, but for any picks: each example is a group of channels of one image.
        kernels = weight[picks].reshape(-1, *weight.shape[2:])
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, None, stride, padding, 1, len(x) * groups)
        return y.reshape(len(x), -1, *y.shape[2:])
    # The examples of each expert together: as quick as a convolution with one kernel.
    order = picks.argsort()
    parts = torch.split(x[order], torch.bincount(picks, minlength=len(weight)).tolist())
    found = [
        F.conv2d(part, kernel, None, stride, padding, 1, groups)
        for part, kernel in zip(parts, weight.unbind(), strict=True)
        if len(part)
    ]
    return torch.cat(found)[order.argsort()]


def _conv_as_product(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """The same with a kernel per example, ``(n, out_channels, in_channels / groups, k, k)``, as a matrix product.

    An exported program cannot sort its batch by expert: that is of any size, and shapes may not depend on data.
    """
    channels, out_channels, taps = x.shape[1], weight.shape[1], weight.shape[-1] ** 2
    # A convolution that copies each tap of each channel's window: exporters lack a better word for it.
    copies = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *weight.shape[3:]).repeat(channels, 1, 1, 1)
    windows = F.conv2d(x, copies, None, stride, padding, 1, channels)
    y = weight.reshape(-1, groups, out_channels // groups, channels // groups * taps) @ windows.reshape(
        -1, groups, channels // groups * taps, windows.shape[2] * windows.shape[3]
    )
    return y.reshape(-1, out_channels, *windows.shape[2:])


class ExpertBinaryConv2d(BinaryConv2d):
    """Binary convolution with several kernels (experts), of which each example uses one.

    The gate is a linear map of the input's channel means, taken before the sign. In training its decision multiplies
    all experts, one-hot going forward and softmax going backward (:func:`hard_gate`): the gate learns from what each
    expert would have done to each example, and every kernel learns from every example, in proportion to its softmax.
    In evaluation the decision is an index into the experts. Mixing kernels instead of picking one would have to
    binarise a sum of signs, which is no longer one of them.

    With real activations, with one expert, or while ``single`` is on, the first expert alone is used and the gate is
    not computed: a real teacher of the same structure, and the pre-training of one expert, are such networks.

    Attributes:
        weight: Latent real kernels, shape ``(experts, out_channels, in_channels / groups, k, k)``.
        scale: Shape ``(out_channels,)``, shared by the experts.
        experts: Number of kernels.
        single: Whether only the first expert is used and trained. Plain attribute; :func:`set_experts` switches it.
        learning: Which kernels learn from an example: ``"all"``, in proportion to the gate's softmax (the paper);
            or ``"picked"``, only the one that it picked, as the authors' code does, which takes less time. Plain
            attribute, can be switched at any time.
        gate: From ``(n, in_channels)`` to ``(n, experts)``, without bias; None where there is one expert.
        excite: Squeeze and excitation: from the channel means of the input, through an eighth of the output's channels,
            to a factor in (0, 1) per channel of the output, after the scale; None without.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        experts: int = 4,
        squeeze_excite: bool = False,
        stride: int = 1,
        padding: int = 0,
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
            groups=groups,
            binary_activations=binary_activations,
            binary_weights=binary_weights,
        )
        self.experts = experts
        self.single = False
        self.learning: Literal["all", "picked"] = "all"
        kernels = torch.empty(experts, *self.weight.shape)
        for kernel in kernels:
            # As nn.Conv2d, each expert from its own fan-in.
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        self.weight = nn.Parameter(kernels)
        self.gate = nn.Linear(in_channels, experts, bias=False) if experts > 1 else None
        hidden = max(1, out_channels // 8)
        self.excite = (
            nn.Sequential(
                nn.Linear(in_channels, hidden, bias=False),
                nn.ReLU(),
                nn.Linear(hidden, out_channels, bias=False),
                nn.Sigmoid(),
            )
            if squeeze_excite
            else None
        )

    def forward(self, input: Tensor) -> Tensor:
        """From ``(n, in_channels, h, w)`` to ``(n, out_channels, h', w')``."""
        gate = self.gate if self.binary_activations and not self.single else None
        means = input.mean(dim=(2, 3)) if gate is not None or self.excite is not None else None
        x, stride, padding = self.squash(input), self.stride[0], int(self.padding[0])
        if gate is None:
            y = F.conv2d(x, self._binarised(self.weight[0]), None, stride, padding, 1, self.groups)
        else:
            logits = gate(means)
            weight, picks = self._binarised(self.weight), logits.argmax(dim=1)
            if self.training and torch.is_grad_enabled():
                all_learn = self.learning == "all"
                y = _conv_of_picked(x, weight.detach() if all_learn else weight, picks, stride, padding, self.groups)
                y = y + self._gradient_of_all(logits, x.detach(), weight if all_learn else weight.detach())
            else:
                y = _conv_of_picked(x, weight, picks, stride, padding, self.groups)
        y = y * self.scale.view(-1, 1, 1)
        return y if self.excite is None else y * self.excite(means)[:, :, None, None]

    def _gradient_of_all(self, logits: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Zeros that carry the gradients of ``sum_k gate_k * conv(x, weight_k)`` to the gates and to the kernels.

        The sum is linear in both: a gate's gradient is that expert's output, a kernel's is weighted by the softmax of
        the gates. What is detached gets none.
        """
        stride, padding = self.stride[0], int(self.padding[0])
        kernels = weight.reshape(self.experts, self.groups, -1, *weight.shape[2:]).transpose(0, 1).flatten(0, 2)
        y = F.conv2d(x, kernels, None, stride, padding, 1, self.groups)
        y = y.view(len(x), self.groups, self.experts, -1, *y.shape[2:])
        gates = hard_gate(logits)
        carried = torch.einsum("ngkchw,nk->ngchw", y.detach(), gates - gates.detach())
        if weight.requires_grad:
            mixed = torch.einsum("ngkchw,nk->ngchw", y, torch.softmax(logits.detach(), dim=1))
            carried = carried + (mixed - mixed.detach())
        return carried.flatten(1, 2)

    def _binarised(self, weight: Tensor) -> Tensor:
        return sign(weight) if self.binary_weights else weight

    def extra_repr(self) -> str:
        """What ``print`` shows: the binary convolution's parameters and the number of experts."""
        return f"{super().extra_repr()}, experts={self.experts}, single={self.single}"


def set_experts(model: nn.Module, single: bool) -> None:
    """Train one expert first, then all: switch every :class:`ExpertBinaryConv2d` of a model, in place.

    The policy of arXiv:2010.03558: experts that start as copies of a trained one do better than experts
    that start at random. Going from ``single=True`` to ``single=False`` copies the first expert into all others; the
    gate then drives them apart. Where ``single`` does not change, nothing happens.

    Args:
        model: Any module; without such layers nothing happens.
        single: The new value of the layers' attribute.
    """
    for layer in model.modules():
        if isinstance(layer, ExpertBinaryConv2d) and layer.single != single:
            layer.single = single
            if not single:
                with torch.no_grad():
                    layer.weight.copy_(layer.weight[:1].expand_as(layer.weight).clone())
