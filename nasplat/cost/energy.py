"""Energy of one example through the network as it is deployed, where the machine counts it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

from nasplat.checks import is_number
from nasplat.cost import power
from nasplat.cost.bench import Bench, owned_cores
from nasplat.cost.deployed import check_deployment, deployed
from nasplat.cost.machine import governor, processor, steady
from nasplat.cost.meter import Measurement
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.runtimes import Runtime, named
from nasplat.runtimes.choose import AUTO
from nasplat.runtimes.runtime import device_of

WARM_UP_SECONDS = 0.2


@dataclass(frozen=True)
class Energy:
    """Energy of one example, in millijoules.

    Gives ``energy_mj``: all that the processor packages (RAPL) or the CUDA device (NVML) used while the network ran
    over and over, divided by the examples; median of blocks. It includes what the machine uses when idle, which is
    measured just before, and given in the facts as power and as a share. Training pauses meanwhile, on all cores.

    Where no counter can be read there is no value, and the facts say why. A study that has ``energy_mj`` for an
    objective or a constraint is refused there.

    Attributes:
        runtime: As of :class:`~nasplat.cost.latency.Latency`.
        on: Another machine of the Ray cluster: the name of a resource that its node was started with.
        threads: Threads that compute.
        batch: Examples a pass.
        label: Distinguishes several of one study: ``energy_mj_<label>``.
        blocks: Measurements.
        seconds: Length of each, from 0.05 up: the counters of some processors go on once a millisecond.
        idle_s: Seconds of idleness that are measured before.
    """

    runtime: Runtime | str = AUTO
    on: str | None = None
    threads: int = 1
    batch: int = 1
    label: str = ""
    blocks: int = 5
    seconds: float = 0.25
    idle_s: float = 0.5

    trained = False

    def __post_init__(self) -> None:
        check_deployment(self, whole=("batch", "blocks"))
        for name in ("seconds", "idle_s"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0.05:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; legal: seconds, from 0.05 up")

    @property
    def metric(self) -> str:
        """``energy_mj``, with the label."""
        return f"energy_mj_{self.label}" if self.label else "energy_mj"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The value's name."""
        return (self.metric,)

    def unavailable(self, device: str = "cpu") -> str:
        """Why this machine cannot tell energy; empty where it can, or where another machine measures.

        Args:
            device: Where the study's networks are.
        """
        if self.on is not None:
            return ""
        if self.runtime == AUTO:
            return power.unreadable(device)
        return power.unreadable(device_of(named(self.runtime) if isinstance(self.runtime, str) else self.runtime))

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Export the network as it is deployed, run the file, and read the counter. No value where there is none.

        Raises:
            UnsupportedError: The runtime cannot run the network.
        """
        runtime, file, x = deployed(self.runtime, model, example, self.batch, bench)
        job = EnergyJob(runtime, file, x, self.threads, self.blocks, self.seconds, self.idle_s)
        found = bench.run(job, self.on)
        if found.absent:
            return Measurement({}, facts={self.metric: {"absent": found.absent}})
        return Measurement(
            {self.metric: statistics.median(found.millijoules)},
            {self.metric: list(found.millijoules)},
            {self.metric: dict(found.facts)},
        )


@dataclass(frozen=True)
class Used:
    """What was found.

    Attributes:
        millijoules: Of one example, block by block.
        facts: How it was measured.
        absent: Why there is no value; empty where there is one.
    """

    millijoules: tuple[float, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    absent: str = ""


@dataclass(frozen=True)
class EnergyJob:
    """Measures the energy of an exported network, on the machine that the job is done on.

    Attributes:
        runtime: Runs it.
        file: What ``runtime.export`` gave.
        example: Input ``(n, ...)``, float32, on the CPU.
        threads: Threads that compute.
        blocks: Measurements.
        seconds: Length of each.
        idle_s: Seconds of idleness that are measured before.
    """

    runtime: Runtime
    file: bytes
    example: Tensor
    threads: int
    blocks: int
    seconds: float
    idle_s: float

    def __call__(self, bench: Bench) -> Used:
        """Measure."""
        # More threads than the bench owns processors for: nothing else of nasplat's computes meanwhile.
        everything = max(self.threads, len(owned_cores()) + 1)
        with bench.measuring(everything) as held:
            processors = held[-self.threads :]
            with steady(self.threads, processors):
                session = self.runtime.load(self.file, self.example, self.threads)
                try:
                    counter = power.counter_of(device_of(self.runtime))
                except UnsupportedError as error:
                    return Used(absent=str(error))
                _run_for(session, WARM_UP_SECONDS)
                began, start = time.perf_counter(), counter.joules()
                time.sleep(self.idle_s)
                idle_w = (counter.joules() - start) / (time.perf_counter() - began)
                each, watts = [], []
                for _ in range(self.blocks):
                    start = counter.joules()
                    runs, seconds = _run_for(session, self.seconds)
                    joules = counter.joules() - start
                    each.append(1e3 * joules / runs / len(self.example))
                    watts.append(joules / seconds)
        if statistics.median(each) <= 0:
            return Used(absent=f"the counter {counter.name} of {', '.join(counter.domains)} stood still")
        watt = statistics.median(watts)
        return Used(
            tuple(each),
            {
                "counter": counter.name,
                "domains": list(counter.domains),
                "watts": watt,
                "idle_watts": idle_w,
                "idle_share": idle_w / watt,
                "seconds": self.seconds,
                "runtime": self.runtime.name,
                **self.runtime.facts(),
                "threads": self.threads,
                "batch": len(self.example),
                "processors": list(processors),
                "processor": processor(),
                "governor": governor(processors),
                "file_bytes": len(self.file),
                "file_sha256": sha256(self.file).hexdigest(),
            },
        )


def _run_for(session: Any, seconds: float) -> tuple[int, float]:
    """Run over and over: the number of runs, and the seconds that they took."""
    begin, runs = time.perf_counter(), 0
    while True:
        session.run()
        runs += 1
        taken = time.perf_counter() - begin
        if taken >= seconds:
            return runs, taken
