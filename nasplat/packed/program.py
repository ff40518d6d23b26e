"""The user's end of the runtime: a packed program that is called, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from torch import Tensor

from nasplat.packed.graph import Program


class PackedProgram:
    """A binary network as a program on packed bits."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, x: Tensor, threads: int = 1) -> Tensor:
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> Self:
        raise NotImplementedError
