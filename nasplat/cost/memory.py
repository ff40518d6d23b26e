"""Peak memory of the network as it is deployed, measured in a process of its own."""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from nasplat.checks import is_number
from nasplat.cost.anchor import anchor_network
from nasplat.cost.bench import Bench
from nasplat.cost.deployed import check_deployment, deployed
from nasplat.cost.machine import processor
from nasplat.cost.meter import Measurement
from nasplat.errors import CandidateError, InvalidInputError, TimeLimitError, UnsupportedError
from nasplat.runtimes import Runtime
from nasplat.runtimes.choose import AUTO

ENVIRONMENT: Mapping[str, str] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""Of the fresh process, for glibc: what is freed goes back to the system, so that what counts is what is in use."""


@dataclass(frozen=True)
class PeakMemory:
    """Memory that a network needs while it runs, in bytes: weights as its runtime holds them, and activations.

    Gives ``peak_memory_bytes``, and ``peak_memory_load_bytes``: the most while the file is read and run for the first
    time, with the content of the file itself. Both are what a fresh process needs beyond what it held before, with
    the runtime loaded and warmed up on another network: the runtime's own code does not count. Resident memory is
    counted by the kernel in pages, so values are multiples of the page size, give or take some pages. On a CUDA runtime
    both are memory of the device.

    Each repeat is a process of its own, which takes seconds to start. The repeats go with the trial.

    Attributes:
        runtime: As of :class:`~nasplat.cost.latency.Latency`.
        on: Another machine of the Ray cluster: the name of a resource that its node was started with.
        threads: Threads that compute.
        batch: Examples a pass.
        repeats: Fresh processes; the median counts.
        label: Distinguishes several of one study: ``peak_memory_bytes_<label>``.
        timeout_s: Seconds after which a process is ended.
    """

    runtime: Runtime | str = AUTO
    on: str | None = None
    threads: int = 1
    batch: int = 1
    repeats: int = 1
    label: str = ""
    timeout_s: float = 120.0

    trained = False

    def __post_init__(self) -> None:
        check_deployment(self, whole=("batch", "repeats"))
        if not is_number(self.timeout_s) or self.timeout_s <= 0:
            raise InvalidInputError(f"timeout_s is {self.timeout_s!r}; legal: positive seconds")

    @property
    def metrics(self) -> tuple[str, ...]:
        """``peak_memory_bytes`` and ``peak_memory_load_bytes``, with the label."""
        end = f"_{self.label}" if self.label else ""
        return (f"peak_memory_bytes{end}", f"peak_memory_load_bytes{end}")

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Export the network as it is deployed, and run the file in fresh processes.

        Raises:
            UnsupportedError: The runtime cannot run the network.
            TimeLimitError: A process took longer than ``timeout_s``.
            CandidateError: A process failed or was killed; the message says how.
        """
        runtime, file, x = deployed(self.runtime, model, example, self.batch, bench)
        job = MemoryJob(runtime, file, x, self.threads, self.repeats, self.timeout_s)
        found = bench.run(job, self.on)
        peak, load = self.metrics
        samples = {peak: [one.peak for one in found], load: [one.load for one in found]}
        facts = {
            **found[0].facts,
            "threads": self.threads,
            "batch": self.batch,
            "file_bytes": len(file),
            "spread_bytes": max(samples[peak]) - min(samples[peak]),
        }
        return Measurement(
            {name: float(statistics.median(values)) for name, values in samples.items()},
            {name: [float(value) for value in values] for name, values in samples.items()},
            {peak: facts},
        )


@dataclass(frozen=True)
class Peak:
    """What one fresh process found, in bytes beyond what it held before.

    Attributes:
        peak: The most while the network ran.
        load: The most while it was loaded and run for the first time.
        facts: How it was measured.
    """

    peak: int
    load: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryJob:
    """Runs an exported network in fresh processes, on the machine that the job is done on.

    Attributes:
        runtime: Runs it.
        file: What ``runtime.export`` gave.
        example: Input ``(n, ...)``, float32, on the CPU.
        threads: Threads that compute.
        repeats: Processes.
        timeout_s: Seconds that one may take.
    """

    runtime: Runtime
    file: bytes
    example: Tensor
    threads: int = 1
    repeats: int = 1
    timeout_s: float = 120.0

    def __call__(self, bench: Bench) -> tuple[Peak, ...]:
        """Measure. Other work does not disturb it, but it would disturb a measurement of time, so it waits for those.

        Raises:
            UnsupportedError: The runtime cannot run the network here.
            TimeLimitError: A process took too long.
            CandidateError: It failed or was killed.
        """
        found = []
        for _ in range(self.repeats):
            with bench.training():
                found.append(self._once())
        return tuple(found)

    def _once(self) -> Peak:
        answer = self._answer(self._question())
        what, text = answer.get("error"), answer.get("text")
        if what == "UnsupportedError":
            raise UnsupportedError(text)
        if what is not None:
            raise CandidateError(f"peak memory on {self.runtime.name} could not be measured: {text}")
        return Peak(
            peak=answer["peak"],
            load=answer["load"],
            facts={
                "runtime": self.runtime.name,
                **answer["facts"],
                "processor": processor(),
                "machine": platform.node(),
                "file_sha256": sha256(self.file).hexdigest(),
                "memory": answer["memory"],
                "method": answer["method"],
                "resident_before_bytes": answer["before"],
                "resident_loaded_bytes": answer["loaded"],
            },
        )

    def _question(self) -> bytes:
        stream = io.BytesIO()
        warm_up, warm_up_example = _warm_up(self.runtime)  # type: ignore[arg-type]
        # Replaying a CUDA graph takes no memory that could be seen: it was taken when the graph was made.
        plain = {"graphs": False} if hasattr(self.runtime, "graphs") else {}
        header = {
            "runtime": replace(self.runtime, **plain) if plain else self.runtime,  # type: ignore[type-var]
            "threads": self.threads,
            "example": self.example.numpy(),
            "warm_up_example": warm_up_example.numpy(),
        }
        cloudpickle.dump(header, stream)
        pickle.dump(warm_up, stream)
        pickle.dump(self.file, stream)
        return stream.getvalue()

    def _answer(self, question: bytes) -> dict[str, Any]:
        # The modules of the user's own script are found there as here.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(self.threads)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "nasplat.cost.resident"],
                input=question,
                capture_output=True,
                env=environment,
                timeout=self.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeLimitError(
                f"the fresh process that measures memory on {self.runtime.name} took more than {self.timeout_s:g} s; "
                "PeakMemory(timeout_s=...) allows it more"
            ) from error
        if done.returncode:
            raise CandidateError(f"the process that measures memory on {self.runtime.name} {_end(done)}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def _end(done: subprocess.CompletedProcess[bytes]) -> str:
    """How a process ended, in words."""
    if done.returncode == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out"
    if done.returncode < 0:
        name = str(-done.returncode)
        with suppress(ValueError):
            name = signal.Signals(-done.returncode).name
        return f"was ended by {name}"
    last = done.stderr.decode(errors="replace").strip().splitlines()
    return f"ended with code {done.returncode}" + (f": {last[-1]}" if last else "")


@lru_cache(maxsize=32)
def _warm_up(runtime: Runtime) -> tuple[bytes, Tensor]:
    """Another network on the runtime, so that what the runtime does once is done before memory is counted."""
    model, example = anchor_network()
    with torch.no_grad():
        return runtime.export(model, example), example
