"""Where networks are deployed and measured: packed bits, ONNX Runtime, torch in several forms, GPUs."""

from __future__ import annotations

from nasplat import plugins
from nasplat.errors import InvalidInputError
from nasplat.runtimes.cuda import Cuda
from nasplat.runtimes.onnx_runtime import OnnxRuntime
from nasplat.runtimes.onnx_runtime_int8 import OnnxRuntimeInt8
from nasplat.runtimes.packed_bits import PackedBits
from nasplat.runtimes.runtime import Runtime, Session
from nasplat.runtimes.torch_compiled import TorchCompiled
from nasplat.runtimes.torch_eager import TorchEager
from nasplat.runtimes.torch_exported import TorchExported

__all__ = [
    "Cuda",
    "OnnxRuntime",
    "OnnxRuntimeInt8",
    "PackedBits",
    "Runtime",
    "Session",
    "TorchCompiled",
    "TorchEager",
    "TorchExported",
    "named",
]


def named(name: str) -> Runtime:
    """The runtime of an entry point, with its defaults.

    Raises:
        UnknownPluginError: None is installed under that name.
        InvalidInputError: What is installed there is no runtime.
    """
    runtime = plugins.load(plugins.RUNTIMES, name)()
    if not isinstance(runtime, Runtime):
        raise InvalidInputError(f"the plug-in {name!r} of {plugins.RUNTIMES} is {runtime!r}; a Runtime is needed")
    return runtime
