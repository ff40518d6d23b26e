"""``weights.safetensors`` and the way back: an architecture and its weights become a model again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.errors import FolderError, FolderMismatchError, UnsupportedError
from nasplat.space import SearchSpace

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"

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
        """Write parameters and buffers.

        Raises:
            UnsupportedError: The model's state holds something other than tensors.
        """
        state = model.state_dict()
        odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if odd:
            raise UnsupportedError(f"safetensors holds tensors only; the model's state has others: {', '.join(odd)}")
        # The format takes neither strides nor memory that two tensors share, so tied weights are written twice.
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, path)

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
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read as safetensors: {error}") from error
    with torch.random.fork_rng(devices=[]):
        model = space.build(architecture)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FolderError(f"{path} does not hold the weights of architecture {architecture.id}: {error}") from error
    return model.eval()


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
