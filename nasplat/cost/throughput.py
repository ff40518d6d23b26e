"""Examples a second of the network as it is deployed, at several batch sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from nasplat.checks import is_whole, sequence
from nasplat.cost.bench import Bench
from nasplat.cost.deployed import check_deployment, deployed
from nasplat.cost.meter import Measurement
from nasplat.cost.timing import Schedule, TimingJob
from nasplat.errors import InvalidInputError
from nasplat.runtimes import Runtime
from nasplat.runtimes.choose import AUTO


@dataclass(frozen=True)
class Throughput:
    """Examples a second, by batch size.

    Gives for each batch size, 8 say, ``throughput_b8_per_s``: 8 by the median time of an undisturbed pass of 8
    examples; and ``throughput_b8_per_s_suspect``: 1 where the machine was never quiet enough, else 0. The samples are
    those of all undisturbed passes, in the unit of the metric.

    Attributes:
        runtime: As of :class:`~nasplat.cost.latency.Latency`.
        batches: Batch sizes, each its own file where the runtime makes one for a shape.
        on: Another machine of the Ray cluster: the name of a resource that its node was started with.
        threads: Threads that compute.
        label: Distinguishes several of one study: ``throughput_b8_per_s_<label>``.
        schedule: How much is measured, for each batch size.
    """

    runtime: Runtime | str = AUTO
    batches: tuple[int, ...] = (1, 8, 32)
    on: str | None = None
    threads: int = 1
    label: str = ""
    schedule: Schedule = field(default=Schedule())

    trained = False

    def __post_init__(self) -> None:
        check_deployment(self)
        batches = sequence("Throughput", "batches", self.batches)
        if not batches or not all(map(is_whole, batches)) or len(set(batches)) < len(batches):
            raise InvalidInputError(f"batches is {self.batches!r}; legal: different integers from 1 up, at least one")
        object.__setattr__(self, "batches", batches)

    def metric(self, batch: int) -> str:
        """The value's name for a batch size."""
        return f"throughput_b{batch}_per_s" + (f"_{self.label}" if self.label else "")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values."""
        return tuple(self.metric(batch) + part for batch in self.batches for part in ("", "_suspect"))

    def measure(self, model: nn.Module, example: Tensor, bench: Bench) -> Measurement:
        """Export the network for each batch size, and time the files.

        Raises:
            UnsupportedError: The runtime cannot run the network; the message says what is missing.
        """
        values, samples, facts = {}, {}, {}
        for batch in self.batches:
            runtime, file, x = deployed(self.runtime, model, example, batch, bench)
            timing = bench.run(TimingJob(runtime, file, x, self.threads, self.schedule), self.on)
            name = self.metric(batch)
            values[name] = batch / timing.median_ms * 1e3
            values[f"{name}_suspect"] = float(bool(timing.suspect))
            samples[name] = [batch / sample * 1e3 for sample in timing.samples]
            facts[name] = {**timing.facts, **({"suspect": timing.suspect} if timing.suspect else {})}
        return Measurement(values, samples, facts)
