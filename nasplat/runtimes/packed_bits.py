"""Runtime ``packed``: binary networks on packed bits, nasplat's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

from torch import Tensor, nn

from nasplat.errors import NasplatError, UnsupportedError
from nasplat.packed import PackedProgram, pack
from nasplat.runtimes.runtime import Session


@dataclass(frozen=True)
class PackedBits:
    """Packed bits (:mod:`nasplat.packed`), for networks that multiply bits by bits."""

    spares_memory = True

    @property
    def name(self) -> str:
        """``packed``."""
        return "packed"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """The packed program.

        Raises:
            UnsupportedError: The model has no binary layer, or an operation that the runtime does not know.
        """
        try:
            return pack(model, example[:1]).to_bytes()
        except NasplatError:
            raise
        except Exception as error:  # of any kind, as tracing copies the model and runs its code
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(f"{type(model).__name__} cannot be packed: {first}") from error

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """The program, laid out for this processor.

        Raises:
            UnsupportedError: Numba, which compiles it, is not installed: NumPy would tell nothing about its speed.
        """
        if find_spec("numba") is None:
            raise UnsupportedError("the packed runtime needs Numba to be measured: pip install 'nasplat[packed]'")
        return _Packed(PackedProgram.from_bytes(file), example, threads)

    def facts(self) -> Mapping[str, str | int]:
        """Instruction set that the kernels are compiled for, and the version of Numba."""
        from nasplat.packed.kernels.intrinsics import ISA

        return {"instructions": ISA.name, "numba": version("numba")}


class _Packed(Session):
    def __init__(self, program: PackedProgram, example: Tensor, threads: int) -> None:
        self._program, self._x, self._threads = program, example, threads
        self._y: Tensor | None = None

    def run(self) -> None:
        self._y = self._program(self._x, threads=self._threads)

    def output(self) -> Tensor:
        assert self._y is not None
        return self._y.clone()
