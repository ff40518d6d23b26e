"""``weights.safetensors`` and the way back: an architecture and its weights become a model again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.errors import FolderError, FolderMismatchError, UnsupportedError
from nasplat.nn import BinaryConv2d
from nasplat.space import SearchSpace

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"

_SWITCHES = ("binary_activations", "tanh_activations", "binary_weights", "single")
"""Attributes of binary layers that no tensor tells: what is binary, and whether one expert is used alone."""

_USAGE = """\
`architecture.json` says which network it is and `weights.safetensors` holds its tensors; neither can hold code. With
nasplat and the search space installed, they are the model again, to train on or to export anew:

```python
from nasplat.export import load_bundle

model = load_bundle(".", space)
logits = model(x)
```

`x` is a float32 tensor. `space` must equal the one that the architecture comes from:
`{identity}`
"""


@dataclass(frozen=True)
class Weights:
    """The tensors of the model as safetensors, loaded by building the architecture of the same folder anew.

    Attributes:
        space: Builds the network.
    """

    space: SearchSpace

    @property
    def name(self) -> str:
        """``weights``."""
        return "weights"

    @property
    def file(self) -> str:
        """``weights.safetensors``."""
        return WEIGHTS_FILE

    @property
    def usage(self) -> str:
        """How to build the model again."""
        return _USAGE.format(identity=self.space.identity)

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write parameters and buffers, and how the switches of binary layers stand.

        Raises:
            UnsupportedError: The model's state holds something other than tensors.
        """
        state = model.state_dict()
        odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if odd:
            raise UnsupportedError(f"safetensors holds tensors only; the model's state has others: {', '.join(odd)}")
        # The format takes neither strides nor memory that two tensors share, so tied weights are written twice.
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        switches = {
            name: {switch: bool(getattr(layer, switch)) for switch in _SWITCHES if hasattr(layer, switch)}
            for name, layer in model.named_modules()
            if isinstance(layer, BinaryConv2d)
        }
        save_file(tensors, path, {"switches": json.dumps(switches)} if switches else None)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Build the model of the file's folder."""
        return load_bundle(path.parent, self.space)

    def facts(self) -> Mapping[str, str | int]:
        """The version of safetensors."""
        return {"safetensors": version("safetensors")}


def load_bundle(folder: str | Path, space: SearchSpace) -> nn.Module:
    """The model of an exported folder, from its architecture and weights. Nothing in the folder is unpickled.

    Args:
        folder: Where :func:`nasplat.export.export` wrote.
        space: Equal to the space that the architecture was exported from.

    Returns:
        The model on the CPU in evaluation mode. torch's global generator is left as it was.

    Raises:
        FolderError: A file is missing or damaged, or the weights are not of this architecture.
        FolderMismatchError: The architecture comes from another space.
        ArchitectureError: The genes are not legal in the space.
    """
    folder = Path(folder)
    architecture = read_architecture(folder, space)
    path = folder / WEIGHTS_FILE
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read as safetensors: {error}") from error
    with torch.random.fork_rng(devices=[]):
        model = space.build(architecture)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FolderError(f"{path} does not hold the weights of architecture {architecture.id}: {error}") from error
    _set_switches(model, metadata.get("switches", "{}"), path)
    return model.eval()


def _set_switches(model: nn.Module, text: str, path: Path) -> None:
    try:
        found = {
            (name, switch): value for name, switches in json.loads(text).items() for switch, value in switches.items()
        }
    except (ValueError, AttributeError) as error:
        raise FolderError(f"{path} has switches of binary layers that cannot be read: {error}") from error
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryConv2d)}
    for (name, switch), value in found.items():
        if (
            name not in layers
            or switch not in _SWITCHES
            or not hasattr(layers[name], switch)
            or type(value) is not bool
        ):
            raise FolderError(f"{path} switches {switch} of {name} to {value!r}; its network has no such switch")
        setattr(layers[name], switch, value)


def read_architecture(folder: Path, space: SearchSpace) -> Architecture:
    """The architecture of an exported folder, checked against the space. Raises as :func:`load_bundle` does."""
    path = folder / ARCHITECTURE_FILE
    try:
        architecture = Architecture.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FolderError(f"{folder} is no exported folder: {path.name} cannot be read ({error})") from error
    if not space.owns(architecture):
        raise FolderMismatchError(
            f"{path} was exported from the space {architecture.space}; asked to rebuild it in {space.identity}. "
            "Pass a space with the same parameters"
        )
    return space.architecture(architecture.genes)
