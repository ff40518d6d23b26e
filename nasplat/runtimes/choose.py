"""Which runtime a network is measured on, where its user named none."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor, nn

from nasplat import runtimes
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.binary import is_binary
from nasplat.runtimes.runtime import Runtime

AUTO = "auto"


def check_runtime(runtime: Runtime | str) -> None:
    """Refuse what names no runtime and is none.

    Raises:
        InvalidInputError: It is neither a name, nor ``auto``, nor a runtime; or what is installed there is none.
        UnknownPluginError: None is installed under that name.
    """
    if isinstance(runtime, str):
        if runtime != AUTO:
            runtimes.named(runtime)
    elif isinstance(runtime, type) or not isinstance(runtime, Runtime):
        raise InvalidInputError(f"runtime is {runtime!r}; legal: the name of a runtime, or a runtime")


def choose(runtime: Runtime | str, model: nn.Module, example: Tensor) -> Runtime:
    """The runtime that a network is measured on.

    Args:
        runtime: A runtime, the name of one, or ``auto``: ``packed`` for a network that multiplies bits by bits,
            ``cuda`` for an example on a CUDA device, else ``onnxruntime``.
        model: The network.
        example: Its input.

    Raises:
        UnsupportedError: It is that of packed bits, and Numba is not installed.
    """
    if not isinstance(runtime, str):
        return runtime
    if runtime != AUTO:
        return runtimes.named(runtime)
    if example.device.type == "cuda":
        return runtimes.named("cuda")
    if not is_binary(model):
        return runtimes.named("onnxruntime")
    if find_spec("numba") is None:
        raise UnsupportedError(
            "a binary network is measured on packed bits, which needs Numba: pip install 'nasplat[packed]'. "
            "Latency('onnxruntime') measures its simulation with floats"
        )
    return runtimes.named("packed")
