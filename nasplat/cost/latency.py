"""Latency of the network as it is deployed, with the same network in float32 and int8 beside a binary one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from nasplat.cost.bench import Bench
from nasplat.cost.deployed import check_deployment, deployed
from nasplat.cost.meter import Measurement
from nasplat.cost.timing import Schedule, Timing, TimingJob
from nasplat.errors import UnsupportedError
from nasplat.nn.binary import is_binary, set_binarisation
from nasplat.runtimes import Runtime
from nasplat.runtimes.choose import AUTO

TWINS: Mapping[str, str] = {"fp32": "onnxruntime", "int8": "onnxruntime_int8"}
"""What a binary network is compared with, and on which runtime: the same network with real weights and activations."""

TWIN_PATIENCE = 0.2
"""Share of the schedule's patience that is spent on each twin."""

PARTS = (
    "mad", "p95", "samples", "block", "block_sd", "suspect", "slow", "disturbed", "anchor", "predicted", "checked",
    "fp32", "int8", "fp32_suspect", "int8_suspect", "speedup_fp32", "speedup_int8", "not_faster",
)  # fmt: skip
"""What follows the name of the metric in names of its own: no labels."""


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
        check_deployment(self, taken=PARTS, whole=("batch",))

    @property
    def metric(self) -> str:
        """``latency_ms``, with the label."""
        return f"latency_ms_{self.label}" if self.label else "latency_ms"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that every network gets."""
        own = ("", "_mad", "_p95", "_samples", "_block_sd", "_suspect")
        return tuple(self.metric + part for part in own)

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Export the network as it is deployed, and time the file.

        Raises:
            UnsupportedError: The runtime cannot run the network; the message says what is missing.
        """
        timing, runtime = self._time(self.runtime, model, example, bench, self.schedule)
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
        if self.twins and runtime.name == "packed" and is_binary(model):
            real = copy.deepcopy(model)
            set_binarisation(real, weights=False, activations=False)
            # A comparison, no objective: less of it, and little waiting for the machine to be quiet.
            blocks, patience_s = max(1, self.schedule.blocks // 2), TWIN_PATIENCE * self.schedule.patience_s
            brief = replace(self.schedule, blocks=blocks, patience_s=patience_s)
            for twin, where in TWINS.items():
                try:
                    other, _ = self._time(where, real, example, bench, brief)
                except UnsupportedError as error:  # what is wanted is there; only a comparison is missing
                    facts[f"{name}_{twin}"] = {"absent": str(error)}
                    continue
                values[f"{name}_{twin}"] = other.median_ms
                values[f"{name}_{twin}_suspect"] = float(bool(other.suspect))
                values[f"{name}_speedup_{twin}"] = other.median_ms / timing.median_ms
                samples |= _samples(f"{name}_{twin}", other)
                facts[f"{name}_{twin}"] = _facts(other)
            speedups = [values[key] for twin in TWINS if (key := f"{name}_speedup_{twin}") in values]
            if speedups:
                values[f"{name}_not_faster"] = float(min(speedups) <= 1)
        return Measurement(values, samples, facts)

    def _time(
        self, runtime: Runtime | str, model: nn.Module, example: Tensor, bench: Bench, schedule: Schedule
    ) -> tuple[Timing, Runtime]:
        chosen, file, x = deployed(runtime, model, example, self.batch, bench)
        return bench.run(TimingJob(chosen, file, x, self.threads, schedule), self.on), chosen


def _samples(name: str, timing: Timing) -> dict[str, list[float]]:
    return {
        name: timing.samples,
        f"{name}_block": [float(index) for index, block in enumerate(timing.counted) for _ in block],
        f"{name}_slow": timing.slow,
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
