"""What a runtime owes: to write a network as it is deployed, and to run what was written."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class Session(ABC):
    """A deployed network with one input in place, ready to run.

    Made by :meth:`Runtime.load` on the processors and in the process that will run it. It ends with its last
    reference.
    """

    @abstractmethod
    def run(self) -> None:
        """Compute once. Comes back when the result is there."""

    @abstractmethod
    def output(self) -> Tensor:
        """What the last run computed: ``(n, ...)``, float32, on the CPU."""

    def seconds(self) -> float:
        """Run once and give the seconds that it took.

        The clock of this process. A runtime with a clock of its own, a GPU say, has its own.
        """
        begin = time.perf_counter()
        self.run()
        return time.perf_counter() - begin

    def facts(self) -> Mapping[str, str | int]:
        """What its speed depends on beyond :meth:`Runtime.facts`: what only loading this network has shown."""
        return {}


def device_of(runtime: Runtime) -> str:
    """What a runtime computes on: its attribute ``device``, ``cuda`` say; ``cpu`` for one that has none."""
    return str(getattr(runtime, "device", "cpu"))


def needs_memory(runtime: Runtime) -> bool:
    """Whether what others do to the caches and the memory that cores share slows large networks."""
    return device_of(runtime) == "cpu" and not getattr(runtime, "spares_memory", False)


@runtime_checkable
class Runtime(Protocol):
    """Where networks are deployed. A frozen dataclass of plain parameters, found by its entry point.

    A network is written once, where it was built, and may be sent to another machine to be run there. So
    :meth:`load` must need nothing but the file, the input and what is installed.

    One that computes elsewhere than on the CPU says so by an attribute ``device``, ``"cuda"`` say: trainings then pause
    while it measures, whatever cores there are, and its energy is that of the device. One that hardly needs memory
    beside what it computes says so by ``spares_memory = True``: its times are not suspect where others use the memory.
    """

    @property
    def name(self) -> str:
        """Short: the name of its entry point in ``nasplat.runtimes``."""
        ...

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """Write a model as it is deployed.

        Args:
            model: On the CPU, in evaluation mode, not to be changed.
            example: Real inputs ``(n, ...)``, float32, on the CPU, of the very shape that the file will be run on. A
                runtime that needs to see activations, to quantise them say, sees those of the example.

        Returns:
            The content of a file. Only for :meth:`load` of the same runtime: it may hold code.

        Raises:
            UnsupportedError: The model has something that this runtime has not; the message names it.
        """
        ...

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """Make a deployed network ready to run.

        Torch has one number of threads a process: runtimes in torch set it here, and it stays. All else is left alone.

        Args:
            file: What :meth:`export` gave, here or on another machine of the study's own.
            example: Input ``(n, ...)``, float32, on the CPU.
            threads: Threads that compute, at least 1.

        Raises:
            UnsupportedError: It cannot run here; the message says what is missing.
        """
        ...

    def facts(self) -> Mapping[str, str | int]:
        """What its speed depends on, where it runs: versions, instruction set, settings."""
        ...
