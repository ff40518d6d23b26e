"""Latency of the built network in eager torch, measured so that it can be compared.

One measurement at a time while training pauses (:class:`~nasplat.cost.bench.Bench`), a fixed number of threads, one
processor where there is one thread, warm-up, the median of many runs, and the spread beside it.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasplat.cost.bench import Bench
from nasplat.cost.meter import Measurement
from nasplat.errors import InvalidInputError


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass of the network as built, in milliseconds.

    Gives ``latency_ms`` (median), ``latency_ms_mad`` (median absolute deviation), ``latency_ms_p95`` and
    ``latency_ms_samples`` (their number); the samples themselves go with the trial.

    A binary network computes with floats in eager torch, so this ranks training graphs, not deployed binary
    networks.

    Attributes:
        threads: Threads that compute.
        batch: Examples a pass.
        repeats: Timed passes at least.
        seconds: Time spent on timed passes at least (unless ``repeats`` take longer).
    """

    threads: int = 1
    batch: int = 1
    repeats: int = 50
    seconds: float = 0.2

    trained = False

    def __post_init__(self) -> None:
        if min(self.threads, self.batch, self.repeats) < 1 or not self.seconds >= 0:
            raise InvalidInputError(
                f"threads {self.threads}, batch {self.batch} and repeats {self.repeats} must be at least 1, "
                f"seconds {self.seconds} at least 0"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values."""
        return ("latency_ms", "latency_ms_mad", "latency_ms_p95", "latency_ms_samples")

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Time forward passes in evaluation mode."""
        x = example.repeat(self.batch, *([1] * (example.ndim - 1)))
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        were_training = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with bench.measuring(), _steady(self.threads, x.device) as core, torch.inference_mode():
                samples = self._time(model, x)
        finally:
            for module, was_training in were_training:
                module.training = was_training
        median = statistics.median(samples)
        values = {
            "latency_ms": median,
            "latency_ms_mad": statistics.median(abs(sample - median) for sample in samples),
            "latency_ms_p95": sorted(samples)[int(0.95 * (len(samples) - 1))],
            "latency_ms_samples": float(len(samples)),
        }
        facts: dict[str, Any] = {
            "runtime": f"torch {torch.__version__} eager",
            "threads": self.threads,
            "batch": self.batch,
            "processor": processor() if x.device.type == "cpu" else torch.cuda.get_device_name(x.device),
        }
        if core is not None:
            facts["core"] = core
        return Measurement(values, {"latency_ms": samples}, {"latency": facts})

    def _time(self, model: nn.Module, x: Tensor) -> list[float]:
        def run() -> float:
            begin = time.perf_counter()
            model(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            return (time.perf_counter() - begin) * 1e3

        # Warm-up: until the last five runs are no faster than the five before (allocator, caches, clock), 20 at most.
        warm = [run() for _ in range(5)]
        while len(warm) < 20:
            warm += [run() for _ in range(5)]
            if min(warm[-5:]) >= 0.98 * min(warm[-10:-5]):
                break
        samples: list[float] = []
        spent = 0.0
        while len(samples) < self.repeats or spent < self.seconds * 1e3:
            samples.append(run())
            spent += samples[-1]
        return samples


@contextmanager
def _steady(threads: int, device: torch.device) -> Iterator[int | None]:
    """A fixed number of threads, one processor for one thread, no garbage collection. Gives the processor's number."""
    before = torch.get_num_threads()
    collecting = gc.isenabled()
    affinity: set[int] | None = None
    core: int | None = None
    torch.set_num_threads(threads)
    if threads == 1 and device.type == "cpu" and hasattr(os, "sched_setaffinity"):
        affinity = os.sched_getaffinity(0)
        core = max(affinity)
        os.sched_setaffinity(0, {core})
    gc.disable()
    try:
        yield core
    finally:
        if collecting:
            gc.enable()
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name and widest vector instructions, as far as the system tells."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
