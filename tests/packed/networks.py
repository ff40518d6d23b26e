"""Networks with a history: what packing finds in a trained one, and what a fresh one would hide."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasplat import SearchSpace
from search_spaces import Bats, BinaryGrowth


def with_history(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics, scales and slopes of both signs, zeros among them; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def some_zeros(tensor: Tensor, share: float) -> None:
        tensor[torch.rand(tensor.shape, generator=generator) < share] = 0

    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.5, generator=generator)
                layer.running_var.uniform_(0.2, 2, generator=generator)
                if layer.affine:
                    layer.weight.uniform_(-1.5, 1.5, generator=generator)
                    layer.bias.normal_(0, 0.5, generator=generator)
                    some_zeros(layer.weight, 0.1)
            if isinstance(layer, nn.PReLU):
                layer.weight.uniform_(-0.5, 0.5, generator=generator)
            if isinstance(getattr(layer, "scale", None), nn.Parameter):
                layer.scale.uniform_(-0.2, 0.2, generator=generator)
                # A weight of zero is +1.
                some_zeros(layer.weight, 0.05)
    return model.eval()


def images(shape: tuple[int, ...], count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def drawn_bats(rng: np.random.Generator) -> tuple[SearchSpace, tuple[int, int, int]]:
    """A space with random settings, and the shape of its images."""
    groups = int(rng.choice([1, 2, 3]))
    channels = 2 * groups * int(rng.choice([1, 3, 5] if groups < 3 else [1, 3]))
    stem = str(rng.choice(["cifar", "imagenet"], p=[0.7, 0.3]))
    space = Bats.small(
        cells=int(rng.integers(1, 5)),
        groups=groups,
        channels=channels,
        shuffle=int(rng.choice([n for n in range(1, channels + 1) if channels % n == 0])),
        in_channels=int(rng.choice([1, 3])),
        classes=int(rng.integers(2, 12)),
        stem=stem,
        stem_stride=int(rng.integers(1, 3)),
    )
    low, high = (32, 48) if stem == "imagenet" else (12, 22)
    return space, (space.in_channels, int(rng.integers(low, high)), int(rng.integers(low, high)))


def drawn_growth(rng: np.random.Generator) -> tuple[SearchSpace, tuple[int, int, int]]:
    """Likewise."""
    stem = str(rng.choice(["cifar", "imagenet"]))
    settings: dict[str, Any] = {
        "widths": (8, 16) if rng.random() < 0.5 else (12, 24, 36),
        "groups": (1, 2, 4),
        "max_depth": 2,
        "experts": (1, 4) if rng.random() < 0.7 else (3,),
        "in_channels": int(rng.choice([1, 3])),
        "stem": stem,
        "stem_stride": int(rng.integers(1, 3)),
    }
    space = BinaryGrowth.small(**settings)
    return space, (space.in_channels, int(rng.integers(12, 30)), int(rng.integers(12, 30)))


def drawn_network(kind: str, seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with a history of a random space of one kind, and the shape of its images."""
    rng = np.random.default_rng(seed)
    space, shape = {"bats": drawn_bats, "growth": drawn_growth}[kind](rng)
    torch.manual_seed(seed)
    return with_history(space.build(space.sample(rng)), seed), shape
