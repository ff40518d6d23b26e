"""Runtime ``torch_compile``: the network through ``torch.compile``, its weights frozen, for one shape."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.export.torch_export import quiet
from nasplat.runtimes.runtime import Session
from nasplat.runtimes.torch_eager import pickled

LOGGERS = ("torch._dynamo", "torch._inductor", "torch._functorch")
"""Of the compiler, which gives advice."""


@dataclass(frozen=True)
class TorchCompiled:
    """``torch.compile`` on the CPU: TorchInductor writes C++, which the machine's compiler compiles.

    The weights are frozen: packed, and normalisations folded into convolutions, once. It is compiled where it is
    loaded, for that machine's instructions. That takes tens of seconds a network, so this is a runtime for the networks
    that a search has found rather than for the search. A C++ compiler is needed, the one that the environment variable
    ``CXX`` names, or g++ (clang++ on macOS).
    """

    @property
    def name(self) -> str:
        """``torch_compile``."""
        return "torch_compile"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """The module, pickled. It is read by this study's own processes only, never from a folder.

        Raises:
            UnsupportedError: The module cannot be pickled.
        """
        return pickled(model)

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """Compile the module.

        Raises:
            UnsupportedError: There is no C++ compiler, or the module cannot be compiled as a whole.
        """
        if _compiler() is None:
            raise UnsupportedError(
                f"torch.compile needs a C++ compiler, and there is no {_wanted()} on PATH. Install one, or set CXX; "
                "the runtimes torch, torch_export and onnxruntime need none"
            )
        return _Compiled(pickle.loads(file), example, threads)

    def facts(self) -> Mapping[str, str | int]:
        """Version of torch, the instructions that it uses, and the compiler."""
        found = _compiler()
        return {
            "torch": torch.__version__,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "compiler": _version(found) if found else "none",
        }


class _Compiled(Session):
    def __init__(self, model: nn.Module, example: Tensor, threads: int) -> None:
        torch.set_num_threads(threads)
        own = model.eval().requires_grad_(False)

        def forward(x: Tensor) -> Tensor:
            y: Tensor = own(x)
            return y

        # Dynamo keeps what it compiled beside the code object, up to a limit (8), and then runs networks as they are.
        # With a code object of its own, each network has a limit of its own, and what was compiled goes with it.
        code = forward.__code__.replace()
        function = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
        self._x = example.contiguous()
        try:
            with quiet(*LOGGERS):  # importing the compiler changes the filters of warnings
                from torch._inductor import config

                self._forward: Callable[[Tensor], Tensor] = torch.compile(function, dynamic=False, fullgraph=True)
                # In this process: a pool of compiling processes would outlive the measurement.
                with config.patch(freezing=True, compile_threads=1):
                    self.run()
        except Exception as error:  # of any kind, as tracing runs the model's code
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(f"torch.compile cannot compile {type(model).__name__}: {first}") from error

    def run(self) -> None:
        with torch.no_grad():  # inference mode does without freezing
            self._y = self._forward(self._x)

    def output(self) -> Tensor:
        return self._y.clone()


def _wanted() -> str:
    return os.environ.get("CXX", "clang++" if os.uname().sysname == "Darwin" else "g++")


def _compiler() -> str | None:
    return shutil.which(_wanted())


@lru_cache(maxsize=4)
def _version(compiler: str) -> str:
    """The first line that it says about itself."""
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return told.partition("\n")[0].strip() or compiler
