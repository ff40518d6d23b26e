"""The user's end of the runtime: a packed program that is called, saved and loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError, NasplatWarning, UnsupportedError
from nasplat.nn.binary import BinaryConv2d
from nasplat.packed import file
from nasplat.packed.capture import capture
from nasplat.packed.engine import Engine, making
from nasplat.packed.graph import Program, check_program


class PackedProgram:
    """A network as a program that computes its binary convolutions on packed bits, one example at a time.

    It runs on the CPU, in compiled code where Numba is installed (``pip install 'nasplat[packed]'``), else in NumPy
    with the same results, slowly. It may be called from several threads, and after a fork.

    Attributes:
        program: The operations.
    """

    def __init__(self, program: Program) -> None:
        """Check the program. It is laid out for this processor at the first call.

        Raises:
            InvalidInputError: The program is not legal.
        """
        shapes = check_program(program)
        self.program = program
        self._output_shape = shapes[program.output]
        self._engine: Engine | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one example."""
        return self.program.input_shape

    @property
    def engine(self) -> Engine:
        """What runs it."""
        if self._engine is None:
            with making:
                if self._engine is None:
                    self._engine = _engine(self.program)
        return self._engine

    def __call__(self, x: Tensor, threads: int = 1) -> Tensor:
        """Run it.

        Args:
            x: ``(n, channels, height, width)``, float32, on the CPU, of the shape that it was packed for; n may be 0.
            threads: Examples that are computed at the same time.

        Returns:
            Logits ``(n, classes)``; for a network that ends in a feature map, ``(n, channels, height, width)``.

        Raises:
            InvalidInputError: ``x`` has another type, shape or device, or threads is less than 1.
        """
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or not x.is_cpu or x.layout is not torch.strided:
            got = f"{x.dtype}, {x.layout}, on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInputError(f"a packed program takes a dense float32 tensor on the CPU; got {got}")
        if x.ndim != 4 or x.shape[1:] != self.input_shape:
            raise InvalidInputError(
                f"this program was packed for images {self.input_shape}; got a tensor of shape {tuple(x.shape)}; "
                f"legal: (n, {', '.join(map(str, self.input_shape))}). For another size, pack the network again"
            )
        if not is_whole(threads):
            raise InvalidInputError(f"threads is {threads!r}; legal: an integer from 1 up")
        y = self.engine.run(x.detach().resolve_neg().numpy(), threads)
        return torch.from_numpy(y.reshape(y.shape[:2]) if self.program.flat else y)

    def save(self, path: str | Path) -> None:
        """Write it as one file: safetensors with the operations as JSON in the header.

        It holds neither code nor anything of a particular processor. An existing file is replaced as a whole.
        """
        file.write(self.program, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of :meth:`save`. It may come from anyone: all of it is checked, and nothing in it is run.

        Raises:
            FileFormatError: It is no such file, of a later version, or damaged.
            FileNotFoundError: There is no such file.
        """
        return cls(file.read(Path(path)))

    def to_bytes(self) -> bytes:
        """What :meth:`save` writes."""
        return file.to_bytes(self.program)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The program of a file's content, checked as :meth:`load` does.

        Raises:
            FileFormatError: It is not the content of such a file.
        """
        return cls(file.from_bytes(data))

    @property
    def bit_macs(self) -> int:
        """Multiply-accumulates of single bits for one example."""
        shapes = check_program(self.program)
        return sum(
            operation.macs(tuple(shapes[name] for name in operation.inputs))
            for operation in self.program.operations
            if operation.KIND == "binary_conv"
        )

    def __repr__(self) -> str:
        kinds = [operation.KIND for operation in self.program.operations]
        return (
            f"PackedProgram({self.input_shape} -> {self._output_shape[: 1 if self.program.flat else 3]}, "
            f"{len(kinds)} operations, {kinds.count('binary_conv')} of them binary convolutions)"
        )

    def __getstate__(self) -> dict[str, Program]:
        return {"program": self.program}

    def __setstate__(self, state: dict[str, Program]) -> None:
        self.__init__(state["program"])  # type: ignore[misc]


def pack(model: nn.Module, example: Tensor) -> PackedProgram:
    """Translate a trained network into a packed program.

    Args:
        model: In evaluation mode, with binary weights and activations: any network of the binary spaces, or one of the
            same layers. It is left as it is.
        example: ``(n, channels, height, width)``, float32; for its shape. The program takes images of this shape only.

    Raises:
        UnsupportedError: The network has an operation that the program cannot have, which the message names, or is in
            training mode.
        InvalidInputError: The example is not as above.
    """
    try:
        return PackedProgram(capture(model, example))
    except UnsupportedError as error:
        if any(isinstance(layer, BinaryConv2d) for layer in model.modules()):
            raise
        raise UnsupportedError(
            f"{type(model).__name__} has no binary layer, so there are no bits to pack; {error}"
        ) from error


def warm_up() -> str | None:
    """Compile the kernels, or load them from the cache: what the first call of any program would otherwise do.

    A worker that measures calls it before. Processes of one machine and user share the compiled code: one compiles, the
    others wait for it.

    Returns:
        The instruction set that the kernels are for, e.g. ``"avx2"``; None without Numba, where nothing is compiled.
    """
    try:
        from nasplat.packed.compiling import execute, kernels_for
    except ImportError:
        return None
    execute()
    return kernels_for()


def _engine(program: Program) -> Engine:
    try:
        from nasplat.packed.compiled import Compiled
    except ImportError as error:
        from nasplat.packed.interpreter import Interpreter

        warnings.warn(
            f"Numba cannot be imported ({error}), so packed programs run in NumPy: the same results, some hundred "
            "times slower. To compile them: pip install 'nasplat[packed]'",
            NasplatWarning,
            stacklevel=4,
        )
        return Interpreter(program)
    return Compiled(program)
