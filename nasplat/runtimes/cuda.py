"""Runtime ``cuda``: the network as torch runs it on an NVIDIA or AMD GPU, timed by the GPU's own clock."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasplat.errors import UnsupportedError
from nasplat.runtimes.runtime import Session
from nasplat.runtimes.torch_eager import pickled

WARM_UP = 3
"""Runs before a capture: libraries choose their kernels and take their memory in the first ones."""


@dataclass(frozen=True)
class Cuda:
    """Eager torch on the current GPU, captured as a CUDA graph where that can be done, images with channels last.

    The input lies in the GPU's memory before the clock starts and the output stays there: copies between host and GPU
    are not measured. A run is timed by two events on the GPU's stream. Without a graph, small networks take as long as
    the host needs to launch their kernels; a graph is launched at once. Threads are the host's and have no part in it.

    A network that waits for the GPU in between (``.item()``, a branch on a value) cannot be captured and runs without
    a graph. :meth:`Session.facts` says which it was, and why.

    Written against the interface of torch 2.13. nasplat's tests have no GPU: there, only the refusal and what needs no
    GPU were run.

    Attributes:
        graphs: Whether to capture the network as a CUDA graph.
    """

    graphs: bool = True

    device = "cuda"

    @property
    def name(self) -> str:
        """``cuda``."""
        return "cuda"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        """The module, pickled. It is read by this study's own processes only, never from a folder.

        Raises:
            UnsupportedError: The module cannot be pickled.
        """
        return pickled(model)

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        """The module on the GPU, warmed up and captured.

        Raises:
            UnsupportedError: Torch sees no GPU.
        """
        if not torch.cuda.is_available():
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
            raise UnsupportedError(
                f"the runtime cuda needs a GPU, and torch {torch.__version__} (built with {built}) sees none; runtimes "
                "for the CPU are onnxruntime, torch, torch_compile, torch_export and packed"
            )
        return _OnGpu(pickle.loads(file), example, self.graphs)

    def facts(self) -> Mapping[str, str | int]:
        """Versions of torch, CUDA and cuDNN, the GPU, and how float32 is multiplied."""
        here = torch.cuda.is_available()
        return {
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip or "none",
            "cudnn": (torch.backends.cudnn.version() or "none") if here else "none",  # type: ignore[no-untyped-call]
            "gpu": torch.cuda.get_device_name() if here else "none",
            "matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": int(torch.backends.cudnn.benchmark),
        }


class _OnGpu(Session):
    def __init__(self, model: nn.Module, example: Tensor, graphs: bool) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        layout = torch.channels_last if example.ndim == 4 else torch.contiguous_format
        self._model = model.eval().to(device)
        self._x = example.to(device).contiguous(memory_format=layout)
        self._y: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._facts: dict[str, str | int] = {"graph": 0}
        # A capture needs a stream that is not the default one; everything is on this one.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # for the copies above
        for _ in range(WARM_UP):
            self._launch()
        self._stream.synchronize()
        if graphs:
            self._capture()

    def run(self) -> None:
        self._launch()
        self._stream.synchronize()

    def seconds(self) -> float:
        """Run once. Seconds between two events on the stream, to about half a microsecond."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(self._stream)
        self._launch()
        end.record(self._stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3  # it counts milliseconds

    def output(self) -> Tensor:
        assert self._y is not None
        return self._y.to("cpu", torch.float32, copy=True).contiguous()

    def facts(self) -> Mapping[str, str | int]:
        """``graph``: 1 where a run is one CUDA graph, else 0, and then ``no_graph``: why not, where one was wanted."""
        return self._facts

    def _launch(self) -> None:
        with torch.cuda.stream(self._stream), torch.inference_mode():
            if self._graph is not None:
                self._graph.replay()
            else:
                self._y = self._model(self._x)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # The outer context puts the stream back that was current: that of a capture that fails does not.
        with torch.cuda.stream(torch.cuda.current_stream()):
            try:
                # A failed capture can leave torch's random generator unusable, so what would fail is looked for first.
                with _no_waiting():
                    self._launch()
                self._stream.synchronize()
                with torch.cuda.graph(graph, stream=self._stream), torch.inference_mode():
                    y = self._model(self._x)
            except RuntimeError as error:
                torch.cuda.synchronize()
                self._facts["no_graph"] = (str(error).strip() or type(error).__name__).splitlines()[0]
                return
        self._graph, self._y = graph, y
        self._facts["graph"] = 1
        self.run()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Operations that make the host wait for the GPU raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
