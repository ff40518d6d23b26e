"""What a training step of a supernet costs, beside the supernet that it replaces.

    python benchmarks/supernet.py                          # all parts
    python benchmarks/supernet.py --part mobile --repeats 9

Parts:
    kernels    a meta kernel of K = 1, 2, 4, 6, 8 candidates up to 7x7, beside the K convolutions one by one.
    mobile     a mobile block with expansions {3, 6} and kernels {3, 5, 7}, beside its six paths.
    depthwise  its depthwise layer alone: kernels {3, 5, 7}, in one and in four parts, beside the three convolutions.
    cells      a search step of BATS and of the DARTS cell, beside a plain loop over operations.
    paper      the same of the DARTS cell at its paper's size; takes minutes.
    bridge     a search step of BATS in its merged form, beside the paper's form.

Time, memory and multiply-accumulates of the first three are those of ``steps.py``; ``supernet_cells.py`` says what the
others measure. One thread, channels-last, as the platform trains.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence

import torch
from steps import measure, show
from supernet_cells import bridge, cells, paper
from torch import Tensor, nn

from nasplat.cost.machine import processor
from nasplat.nn.meta_kernel import MetaConv2d, MetaInvertedResidual, WeightSharing, plain
from nasplat.nn.mobile import InvertedResidual
from nasplat.train import lay_out, place

CANDIDATES = (
    "conv_7x7",
    "conv_3x3",
    "conv_5x5",
    "dil_conv_3x3_d2",
    "conv_1x7",
    "conv_7x1",
    "dil_conv_3x3_d3",
    "conv_1x1",
)
"""The first K of these: the largest kernel is the same for every K."""

DEPTHWISE = ("conv_3x3", "conv_5x5", "conv_7x7")
EXPANSIONS = (3, 6)


class Meta(nn.Module):
    """A meta kernel and its normalisation, with the mixture's logits."""

    def __init__(
        self, channels: int, options: Sequence[str], *, groups: int = 1, parts: int = 1, sharing: WeightSharing
    ) -> None:
        super().__init__()
        self.alphas = nn.Parameter(torch.zeros(parts, len(options)))
        self.conv = MetaConv2d(channels, channels, options, groups=groups, weight_sharing=sharing)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, channels, h, w)`` to the same."""
        y: Tensor = self.norm(self.conv(x, torch.softmax(self.alphas, dim=1)))
        return y


class MultiPath(nn.Module):
    """Each candidate computes a feature map; those are mixed, and normalised once, as the meta kernel is."""

    def __init__(self, channels: int, options: Sequence[str], *, groups: int = 1) -> None:
        super().__init__()
        self.alphas = nn.Parameter(torch.zeros(len(options)))
        self.paths = nn.ModuleList(plain((option,), channels, channels, groups=groups) for option in options)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, channels, h, w)`` to the same."""
        weights = torch.softmax(self.alphas, dim=0)
        y: Tensor = self.norm(sum(weight * path(x) for weight, path in zip(weights, self.paths, strict=True)))
        return y


class MetaMobile(nn.Module):
    """A mobile block as one meta block."""

    def __init__(self, channels: int, sharing: WeightSharing) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.zeros(len(DEPTHWISE)))
        self.expansions = nn.Parameter(torch.zeros(len(EXPANSIONS)))
        self.block = MetaInvertedResidual(channels, channels, DEPTHWISE, EXPANSIONS, weight_sharing=sharing)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, channels, h, w)`` to the same."""
        y: Tensor = self.block(x, torch.softmax(self.kernels, 0), torch.softmax(self.expansions, 0))
        return y


class MultiPathMobile(nn.Module):
    """Six inverted residual blocks with normalisations of their own; their outputs are mixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alphas = nn.Parameter(torch.zeros(len(EXPANSIONS) * len(DEPTHWISE)))
        self.paths = nn.ModuleList(
            InvertedResidual(channels, channels, kernel_size=size, expansion=e, transition=True, affine=False)
            for e in EXPANSIONS
            for size in (3, 5, 7)
        )
        for module in self.modules():
            if isinstance(module, nn.ReLU6):
                # As in the meta block: one feature map less for each activation.
                module.inplace = True

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, channels, h, w)`` to the same."""
        weights = torch.softmax(self.alphas, dim=0)
        y: Tensor = x + sum(weight * path(x) for weight, path in zip(weights, self.paths, strict=True))
        return y


def batch(channels: int, size: int = 28, examples: int = 32) -> Tensor:
    """A batch ``(examples, channels, size, size)``, laid out as the platform lays it out."""
    return place(torch.randn(examples, channels, size, size), torch.device("cpu"))


def kernels(repeats: int) -> None:
    """Flat in the number of candidates, beside a supernet that is not."""
    channels = 32
    counts = (1, 2, 4, 6, 8)
    sharings: tuple[WeightSharing, ...] = ("separate", "shared")
    modules: dict[str, nn.Module] = {}
    for sharing in sharings:
        for k in counts:
            modules[f"meta kernel, {sharing}, K={k}"] = Meta(channels, CANDIDATES[:k], sharing=sharing)
    for k in counts:
        modules[f"multi-path, K={k}"] = MultiPath(channels, CANDIDATES[:k])
    costs = measure({name: lay_out(module) for name, module in modules.items()}, batch(channels), repeats)
    show(f"kernels: dense, {channels} channels, 28x28, batch 32, largest 7x7", costs, "meta kernel, separate, K=1")


def mobile(repeats: int) -> None:
    """One meta block against six paths."""
    for channels, size in ((32, 28), (96, 14)):
        modules: dict[str, nn.Module] = {
            "multi-path, 6 paths": MultiPathMobile(channels),
            "meta block, separate": MetaMobile(channels, "separate"),
            "meta block, shared": MetaMobile(channels, "shared"),
        }
        costs = measure({name: lay_out(module) for name, module in modules.items()}, batch(channels, size), repeats)
        show(f"mobile: {channels} channels, {size}x{size}, batch 32", costs, "multi-path, 6 paths")


def depthwise(repeats: int) -> None:
    """The depthwise layer of the mobile block, alone."""
    for channels, size in ((192, 28), (576, 14)):
        modules: dict[str, nn.Module] = {
            "multi-path, 3 kernels": MultiPath(channels, DEPTHWISE, groups=channels),
            "meta kernel, separate": Meta(channels, DEPTHWISE, groups=channels, sharing="separate"),
            "meta kernel, shared": Meta(channels, DEPTHWISE, groups=channels, sharing="shared"),
            "meta kernel, 4 parts": Meta(channels, DEPTHWISE, groups=channels, parts=4, sharing="separate"),
        }
        costs = measure({name: lay_out(module) for name, module in modules.items()}, batch(channels, size), repeats)
        show(f"depthwise: {channels} channels, {size}x{size}, batch 32", costs, "multi-path, 3 kernels")


PARTS: dict[str, Callable[[int], None]] = {
    "kernels": kernels,
    "mobile": mobile,
    "depthwise": depthwise,
    "cells": cells,
    "paper": paper,
    "bridge": bridge,
}
"""Name of a part and the function that measures and prints it, given the number of repetitions."""


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="may be given several times; default: all")
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each subject (default: 7)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor()}, 1 thread, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"medians of {arguments.repeats} interleaved steps")
    for name in arguments.part or PARTS:
        PARTS[name](arguments.repeats)


if __name__ == "__main__":
    main()
