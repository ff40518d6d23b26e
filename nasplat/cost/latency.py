"""Latency of the network as it is deployed, with the same network in float32 and int8 beside a binary one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from nasplat.checks import is_whole
from nasplat.cost.bench import Bench
from nasplat.cost.meter import Measurement
from nasplat.cost.timing import Schedule, Timing, TimingJob
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.binary import is_binary, set_binarisation
from nasplat.runtimes import Runtime, named

AUTO = "auto"

TWINS: Mapping[str, str] = {"fp32": "onnxruntime", "int8": "onnxruntime_int8"}
"""What a binary network is compared with, and on which runtime: the same network with real weights and activations."""


@dataclass(frozen=True)
class Latency:
    """Time of one pass through the network as it is deployed, in milliseconds.

    Gives ``latency_ms`` (median of undisturbed runs), and with the same beginning ``_mad`` (their median absolute
    deviation), ``_p95`` (the time that 95 % keep), ``_samples`` (their number), ``_block_sd`` (standard deviation of
    the medians of blocks of runs) and ``_suspect`` (1 where the machine was never quiet enough, else 0). All runs go
    with the trial, and so do runtime, versions, threads, processor, load and the hash of the measured file.

    For a binary network it also gives ``_fp32`` and ``_int8``: the same network with real weights and activations, and
    that one quantised, both on ONNX Runtime; ``_speedup_fp32`` and ``_speedup_int8``: how many times faster the binary
    one is; and ``_not_faster``: 1 where it is faster than neither or just one of them.

    Attributes:
        runtime: Where it is deployed: a runtime, or the name of one (``nasplat runtimes`` lists them). ``auto``:
            ``packed`` for a network that multiplies bits by bits, ``cuda`` on a CUDA device, else ``onnxruntime``.
        on: Another machine of the Ray cluster: the name of a resource that its node was started with.
        threads: Threads that compute.
        batch: Examples a pass.
        twins: Whether to measure the twins of a binary network, which takes some seconds.
        label: Distinguishes several latencies of one study: ``latency_ms_<label>``.
        schedule: How much is measured.
    """

    runtime: Runtime | str = AUTO
    on: str | None = None
    threads: int = 1
    batch: int = 1
    twins: bool = True
    label: str = ""
    schedule: Schedule = field(default=Schedule())

    trained = False

    def __post_init__(self) -> None:
        if not is_whole(self.threads) or not is_whole(self.batch):
            raise InvalidInputError(f"threads is {self.threads!r}, batch is {self.batch!r}; legal: integers from 1 up")
        if isinstance(self.runtime, str):
            if self.runtime != AUTO:
                named(self.runtime)
        elif isinstance(self.runtime, type) or not isinstance(self.runtime, Runtime):
            raise InvalidInputError(f"runtime is {self.runtime!r}; legal: the name of a runtime, or a runtime")
        if self.on is not None and not self.on:
            raise InvalidInputError("on is ''; legal: the name of a resource of a Ray node, or None")

    @property
    def metric(self) -> str:
        """``latency_ms``, with the label."""
        return f"latency_ms_{self.label}" if self.label else "latency_ms"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that every network gets."""
        parts = ("", "_mad", "_p95", "_samples", "_block_sd", "_suspect")
        return tuple(self.metric + part for part in parts)

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Export the network as it is deployed, and time the file.

        Raises:
            UnsupportedError: The runtime cannot run the network; the message says what is missing.
        """
        binary = is_binary(model)
        runtime = self.runtime_of(model, example)
        own = copy.deepcopy(model).cpu().eval()
        x = example.cpu().repeat(self.batch, *([1] * (example.ndim - 1)))
        timing = self._time(runtime, own, x, bench)
        name = self.metric
        values = {
            name: timing.median_ms,
            f"{name}_mad": timing.mad_ms,
            f"{name}_p95": timing.p95_ms,
            f"{name}_samples": float(len(timing.samples)),
            f"{name}_block_sd": timing.block_sd_ms,
            f"{name}_suspect": float(bool(timing.suspect)),
        }
        samples = _samples(name, timing)
        facts = {name: _facts(timing)}
        if self.twins and binary and runtime.name == "packed":
            set_binarisation(own, weights=False, activations=False)
            for twin, where in TWINS.items():
                other = self._time(named(where), own, x, bench)
                values[f"{name}_{twin}"] = other.median_ms
                values[f"{name}_speedup_{twin}"] = other.median_ms / timing.median_ms
                samples |= _samples(f"{name}_{twin}", other)
                facts[f"{name}_{twin}"] = _facts(other)
            values[f"{name}_not_faster"] = float(any(values[f"{name}_speedup_{twin}"] <= 1 for twin in TWINS))
        return Measurement(values, samples, facts)

    def runtime_of(self, model: nn.Module, example: Tensor) -> Runtime:
        """The runtime that a network is measured on.

        Raises:
            UnsupportedError: It is that of packed bits, and Numba is not installed.
        """
        if not isinstance(self.runtime, str):
            return self.runtime
        if self.runtime != AUTO:
            return named(self.runtime)
        if example.device.type == "cuda":
            return named("cuda")
        if not is_binary(model):
            return named("onnxruntime")
        if find_spec("numba") is None:
            raise UnsupportedError(
                "a binary network is measured on packed bits, which needs Numba: pip install 'nasplat[packed]'. "
                "Latency('onnxruntime') measures its simulation with floats"
            )
        return named("packed")

    def _time(self, runtime: Runtime, model: nn.Module, x: Tensor, bench: Bench) -> Timing:
        with bench.training(), torch.no_grad():  # heavy work, which another measurement is not to feel
            file = runtime.export(model, x)
        return bench.run(TimingJob(runtime, file, x, self.threads, self.schedule), self.on)


def _samples(name: str, timing: Timing) -> dict[str, list[float]]:
    return {
        name: timing.samples,
        f"{name}_block": [float(index) for index, block in enumerate(timing.blocks) for _ in block],
        f"{name}_disturbed": [sample for block in timing.disturbed for sample in block],
        f"{name}_anchor": [time for pair in timing.anchor_ms for time in pair],
    }


def _facts(timing: Timing) -> dict[str, Any]:
    return {
        **timing.facts,
        "anchor_ms": timing.reference_ms,
        "anchor_drift": timing.anchor_drift,
        **({"suspect": timing.suspect} if timing.suspect else {}),
    }
