"""A path of a trained supernet as a network of its own: what is scored when weights are inherited."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nasplat import seeding
from nasplat.architecture import Architecture
from nasplat.errors import InvalidInputError
from nasplat.space import SearchSpace, Supernet
from nasplat.train import lay_out

_Key: TypeAlias = tuple[str, str, int, int, str]

_LAST: list[tuple[_Key, Supernet]] = []
"""The supernet that was loaded last: a search scores hundreds of paths of one."""


class SupernetPath(nn.Module):
    """One architecture of a supernet: all other options have weight 0 and are not computed."""

    def __init__(self, supernet: Supernet, space: SearchSpace, architecture: Architecture) -> None:
        """Share the supernet's weights.

        Args:
            supernet: Of ``space``.
            space: Says what the architecture's one-hot weights are.
            architecture: One of ``space``.
        """
        super().__init__()
        self.supernet = supernet
        self.relaxed = on_device(space, architecture, next(supernet.parameters()).device)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of a batch ``(n, ...)``."""
        logits: Tensor = self.supernet(x, self.relaxed)
        return logits


def on_device(space: SearchSpace, architecture: Architecture, device: torch.device) -> dict[str, Tensor]:
    """The one-hot weights of an architecture, copied to a device at once."""
    relaxed = space.relax(architecture)
    if not relaxed or device.type == "cpu":
        return relaxed
    parts = torch.split(torch.cat(list(relaxed.values())).to(device), [len(weights) for weights in relaxed.values()])
    return dict(zip(relaxed, parts, strict=True))


def kept_supernet(space: SearchSpace, weights: Path, device: torch.device) -> Supernet:
    """The whole supernet of a space with the weights that an exploration kept, in evaluation mode.

    The last one stays in memory. Whoever changes it must change it back.

    Args:
        space: Makes the supernet.
        weights: A safetensors file.
        device: Where to put it.

    Raises:
        UnsupportedError: The space has no supernet.
        InvalidInputError: The weights are not those of the whole supernet.
    """
    status = weights.stat()
    key = (space.identity, str(weights.resolve()), status.st_mtime_ns, status.st_size, str(device))
    if not _LAST or _LAST[0][0] != key:
        _LAST.clear()
        _LAST.append((key, _load(space, weights, device)))
    return _LAST[0][1]


def _load(space: SearchSpace, weights: Path, device: torch.device) -> Supernet:
    with seeding.seeded(0):  # its first weights are replaced: they must not move the trial's generators
        supernet = space.supernet()
    own, kept = supernet.state_dict(), load_file(weights)
    wrong = [f"{name} is missing" for name in own if name not in kept]
    wrong += [f"{name} is too many" for name in kept if name not in own]
    wrong += [
        f"{name} has shape {tuple(kept[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in kept and kept[name].shape != tensor.shape
    ]
    if wrong:
        raise InvalidInputError(
            f"{weights} does not fit the whole supernet of {space.name}: {len(wrong)} tensors differ, first: "
            f"{'; '.join(wrong[:3])}. A path can be scored as it is only where the exploration ended with every option "
            "at the space's own depth, and with all channels mixed; an exploration in stages, or with a part of the "
            "channels, is followed by training what it found from scratch"
        )
    supernet.load_state_dict(kept)
    supernet.eval()
    lay_out(supernet.to(device))
    return supernet
