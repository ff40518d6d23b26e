"""``model.packed``: a binary network for the runtime that computes with packed bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from nasplat.packed import PackedProgram, pack
from nasplat.packed.file import VERSION

_USAGE = """\
`model.packed` runs the binary convolutions on packed bits: a fraction of the time and of the memory that a simulation
with floats takes. It needs nasplat, and Numba to be quick:

```python
from nasplat.packed import PackedProgram

program = PackedProgram.load("model.packed")
logits = program(x)
```

`x` is a float32 tensor of the size that the network was exported for. The file holds no code, and loading checks all of
it.
"""


@dataclass(frozen=True)
class Packed:
    """A packed program (see :mod:`nasplat.packed`), for images of the size of the example.

    The binary part computes what the model computes, bit by bit. Sums of floats in stem and classifier have another
    order than in torch, so that the last bits of the logits differ, and an activation that is as good as on a threshold
    can tip a bit.
    """

    @property
    def name(self) -> str:
        """``packed``."""
        return "packed"

    @property
    def file(self) -> str:
        """``model.packed``."""
        return "model.packed"

    @property
    def usage(self) -> str:
        """How to run it with nasplat."""
        return _USAGE

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Translate the model.

        Raises:
            UnsupportedError: It has an operation that the runtime does not know.
        """
        pack(model, example).save(path)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """The program. Files of any origin are safe to load."""
        return PackedProgram.load(path)

    def facts(self) -> Mapping[str, str | int]:
        """The version of the format."""
        return {"format_version": VERSION}
