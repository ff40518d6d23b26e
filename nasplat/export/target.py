"""What an export format owes the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn


class Target(Protocol):
    """One format that a trained model is written in: one file, and a way to load it again.

    Whatever :meth:`write`, :meth:`load` or the loaded function raises is recorded as this format's failure; the other
    formats go on.
    """

    @property
    def name(self) -> str:
        """Short and unique in a bundle: its key in the report."""
        ...

    @property
    def file(self) -> str:
        """The file's name inside the bundle."""
        ...

    @property
    def usage(self) -> str:
        """Markdown for the bundle's README: what the file is, and the lines of code that run it."""
        ...

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write the model.

        Args:
            model: On the CPU, in evaluation mode, not to be changed.
            example: Two real inputs ``(2, ...)``, float32, for their shape. The file must take any number of them.
            path: Where the file goes; its folder exists.
        """
        ...

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """The file just written, as a function from a batch ``(n, ...)``, float32, to logits ``(n, classes)``.

        Only for files of this process's own making: a format may run code of the file while loading it.
        """
        ...

    def facts(self) -> Mapping[str, str | int]:
        """Versions and settings that the file and its comparison depend on."""
        ...
