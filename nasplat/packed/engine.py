"""What runs a packed program: the interface that the interpreter and the compiled engine share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

making = threading.RLock()
"""Held while an engine is made or its code is compiled.

A fork waits for it: what another thread holds when a process forks, nobody ever releases in the child.
"""

os.register_at_fork(before=making.acquire, after_in_parent=making.release, after_in_child=making.release)


class Step(NamedTuple):
    """One thing that an engine does, for one or several operations of the program.

    Attributes:
        name: Unique among an engine's steps.
        kind: What it does, in a word.
        inputs: Names of the values of the program that it reads, the program's input included.
        output: Name of the value that it makes. None where nothing can be compared (packing of bits).
        operations: Names of the operations that it computes. The last one is ``output``.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str | None
    operations: tuple[str, ...]


class Engine(Protocol):
    """Runs one program. Every method may be called from several threads at once."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """What it does, in order."""
        ...

    def run(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """Run the program on a batch.

        Args:
            x: ``(n, channels, height, width)``, C-contiguous.
            threads: Over the batch, 1 or more.

        Returns:
            The program's output, ``(n, channels, height, width)``.
        """
        ...

    def trace(self, values: Mapping[str, NDArray[Any]]) -> Iterator[tuple[Step, NDArray[Any] | None]]:
        """Run one example step by step, each step on given inputs.

        Args:
            values: Of one example by name: ``(channels, height, width)`` float32, or an integer array of shape ``()``
                for a pick. At least the program's input.

        Yields:
            Each step and what it made, None where it makes nothing that can be compared. A step reads the given value
            of an input where there is one, else what the steps before it made.
        """
        ...
