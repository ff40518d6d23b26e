"""Times a deployed network so that the number can be trusted: a job for the bench.

Warm-up until stable; blocks of runs with an anchor network between them; blocks in which the anchor shows that the
machine was disturbed are left out and made up for; what stays doubtful is flagged.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

from torch import Tensor

from nasplat.checks import is_number, is_whole
from nasplat.cost.anchor import READ_BYTES, AnchorRecord, anchor_session, read_seconds
from nasplat.cost.bench import Bench, patience
from nasplat.cost.machine import governor, own_cache_bytes, processor, steady
from nasplat.errors import InvalidInputError
from nasplat.identity import canonical, describe
from nasplat.runtimes.runtime import Runtime, Session, device_of, needs_memory

BLOCK_SECONDS = 0.003
"""Length of a block, which is one run of a network that takes longer.

What disturbs comes and goes: on a machine whose physical cores are shared with strangers, every 20 to 100 ms.
"""

ANCHOR_RUNS = 3
"""Runs of the anchor between two blocks."""

COLD_SECONDS = 0.01
"""A run shorter than this is done once without counting at the start of a block: the anchor had the caches."""

WARM_UP_SECONDS = 0.3
"""Warm-up at most, after the first run."""

STABLE = 0.02
"""Warm-up is over when the last runs are no quicker than those before by more than this share."""

CALIBRATION_SECONDS = 0.5
"""How long the anchor alone is watched on a machine where nothing is on record."""

QUICKEST = 0.02
"""The share of a measurement's anchors that is taken for undisturbed, as far as the measurement alone can tell.

Small, because a machine may be quiet for a small share of the time, and nothing makes the anchor quicker than it is.
"""

QUICKEST_BLOCKS = 0.1
"""The share of the blocks, among those between quick anchors, that is taken for undisturbed."""

QUICKEST_RUNS = 0.03
"""The share of the runs, among those of undisturbed blocks, that nothing at all disturbed."""

SPREAD = 0.03
"""Share by which runs that count may be slower than those: interrupts, and neighbours in the caches, take more."""

QUIET = 0.8
"""Share of the looks at the anchor that were quiet from which on all runs of the blocks count.

How they vary is then the network's own.
"""

FEW = 0.05
"""Share of the runs of undisturbed blocks that has to count: with less, the network may vary by itself."""

FEW_SHARED = 0.25
"""The same for a network that does not fit the cache that a core has to itself.

What strangers do to shared caches comes in all degrees, so that the quickest of widely spread runs need not be
undisturbed. What they do to the core itself is there or not.
"""

QUICKEST_READS = 0.1
"""The share of a measurement's looks at the memory that is taken for what the shared caches allowed at the time."""

PRESSURE = 0.05
"""Share by which reading memory may be slower than undisturbed, for a network that needs the shared caches."""

LEAST_BLOCKS = 4
"""Blocks of a network that runs long, at least."""


@dataclass(frozen=True)
class Schedule:
    """How much is measured, and how long to wait for the machine to be quiet.

    Attributes:
        blocks: Undisturbed blocks that are wanted, at least 1.
        seconds: Time of undisturbed runs that is enough with fewer blocks, 4 at least: for networks that run long.
        patience_s: Seconds after which the search for undisturbed blocks is given up; more for a network of which one
            run takes long.
        tolerance: Share by which the anchor may be slower around a block than it is undisturbed.
    """

    blocks: int = 16
    seconds: float = 0.1
    patience_s: float = 5.0
    tolerance: float = 0.12

    def __post_init__(self) -> None:
        if not is_whole(self.blocks):
            raise InvalidInputError(f"blocks is {self.blocks!r}; legal: an integer from 1 up")
        for name, value in (("seconds", self.seconds), ("patience_s", self.patience_s)):
            if not is_number(value) or value < 0:
                raise InvalidInputError(f"{name} is {value!r}; legal: seconds, finite, from 0 up")
        if not is_number(self.tolerance) or not self.tolerance > 0:
            raise InvalidInputError(f"tolerance is {self.tolerance!r}; legal: a finite share above 0")


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        blocks: Milliseconds of each run, undisturbed block by block.
        disturbed: Those of the blocks that were left out.
        anchor_ms: The anchor around each block: median before, median after.
        reference_ms: The anchor undisturbed, as far as is known.
        suspect: Why the number is not to be trusted; empty where it is.
        facts: Runtime, threads, processor, load.
        trimmed: Whether runs that are slower than the quickest ones are put down to the machine, and do not count.
    """

    blocks: tuple[tuple[float, ...], ...]
    disturbed: tuple[tuple[float, ...], ...]
    anchor_ms: tuple[tuple[float, float], ...]
    reference_ms: float
    suspect: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    trimmed: bool = True

    @cached_property
    def counted(self) -> tuple[tuple[float, ...], ...]:
        """The runs that count, block by block: those of the blocks, but for runs that something short disturbed."""
        highest = self._highest
        return tuple(tuple(run for run in block if run <= highest) for block in self.blocks)

    @property
    def slow(self) -> list[float]:
        """The other runs of the blocks."""
        highest = self._highest
        return [run for block in self.blocks for run in block if run > highest]

    @cached_property
    def _highest(self) -> float:
        if not self.trimmed:
            return math.inf
        runs = sorted(run for block in self.blocks for run in block)
        return (1 + SPREAD) * runs[int(QUICKEST_RUNS * len(runs))]

    @property
    def samples(self) -> list[float]:
        """The runs that count, in ms."""
        return [run for block in self.counted for run in block]

    @property
    def median_ms(self) -> float:
        """The latency."""
        return statistics.median(self.samples)

    @property
    def mad_ms(self) -> float:
        """Median absolute deviation of the runs."""
        median = self.median_ms
        return statistics.median(abs(sample - median) for sample in self.samples)

    @property
    def p95_ms(self) -> float:
        """The time that 95 % of the blocks' runs keep, those that do not count included."""
        ordered = sorted(run for block in self.blocks for run in block)
        return ordered[round(0.95 * (len(ordered) - 1))]

    @property
    def block_sd_ms(self) -> float:
        """Standard deviation of the blocks' medians."""
        medians = [statistics.median(block) for block in self.counted if block]
        return statistics.stdev(medians) if len(medians) > 1 else 0.0

    @property
    def anchor_drift(self) -> float:
        """By which share the anchor was slower than undisturbed, median over the blocks that count."""
        return statistics.median(max(pair) for pair in self.anchor_ms) / self.reference_ms - 1


@dataclass(frozen=True)
class TimingJob:
    """Times one exported network, on the machine that the job is done on.

    Attributes:
        runtime: Runs it.
        file: What ``runtime.export`` gave.
        example: Input ``(n, ...)``, float32, on the CPU.
        threads: Threads that compute.
        schedule: How much is measured.
    """

    runtime: Runtime
    file: bytes
    example: Tensor
    threads: int = 1
    schedule: Schedule = Schedule()

    def __call__(self, bench: Bench) -> Timing:
        """Measure."""
        with bench.measuring(self.threads, device_of(self.runtime)) as processors, steady(self.threads, processors):
            load = os.getloadavg()[0]
            session = self.runtime.load(self.file, self.example, self.threads)
            anchor = anchor_session(self.runtime, self.threads)
            facts = {
                "runtime": self.runtime.name,
                **self.runtime.facts(),
                **session.facts(),
                "threads": self.threads,
                "batch": len(self.example),
                "processors": list(processors),
                "processor": processor(),
                "machine": platform.node(),
                "governor": governor(processors),
                "load": round(load, 2),
                "file_bytes": len(self.file),
                "file_sha256": sha256(self.file).hexdigest(),
            }
            record = AnchorRecord(bench.folder)
            key = canonical([describe(self.runtime), dict(self.runtime.facts()), self.threads, processor()])
            large = len(self.file) > own_cache_bytes()
            memory = _Memory(record, shared=large and needs_memory(self.runtime))
            few = FEW_SHARED if large else FEW
            timing = _timing(session, anchor, memory, self.schedule, record, key, few, facts)
            if not timing.suspect and 0 < len(processors) < self.threads:
                timing = replace(timing, suspect=f"{self.threads} threads on {len(processors)} processors")
            return timing


def _timing(
    session: Session,
    anchor: Session,
    memory: _Memory,
    schedule: Schedule,
    record: AnchorRecord,
    key: str,
    few: float,
    facts: dict[str, Any],
) -> Timing:
    _warm_up(anchor)
    once = _warm_up(session)
    runs = max(1, round(BLOCK_SECONDS / once))
    wanted = min(schedule.blocks, max(LEAST_BLOCKS, math.ceil(schedule.seconds / (runs * once))))
    watch = _Watch(anchor, record.reference_ms(key), schedule.tolerance)
    if record.is_young(key):
        begin = time.perf_counter()
        while time.perf_counter() - begin < CALIBRATION_SECONDS:
            watch.look()

    blocks: list[tuple[float, ...]] = []
    medians: list[float] = []
    around: list[tuple[float, float]] = []
    quiet: list[bool] = []
    begin, enough = time.perf_counter(), max(patience(schedule.patience_s), 3 * wanted * runs * once)
    while sum(quiet) < wanted:
        waiting = time.perf_counter() - begin < enough
        if not waiting and len(blocks) >= wanted:
            break
        # A look is short, a block may be long: while there is time, blocks begin only when the machine is quiet.
        if waiting and not watch.is_quiet():
            watch.look()
            continue
        before = watch.last
        if once < COLD_SECONDS:
            session.seconds()
        blocks.append(tuple(session.seconds() * 1e3 for _ in range(runs)))
        around.append((before, watch.look()))
        memory.look()
        medians.append(statistics.median(blocks[-1]))
        quiet = _quiet(medians, around, watch.bound, schedule.tolerance)
        watch.look()  # anew: this took a moment
    record.add(key, watch.quickest)
    facts["quiet_share"] = round(watch.quiet_share, 3)
    facts["memory_slower"] = round(memory.slower, 3)
    memory.remember()
    reasons = memory.reasons()
    if sum(quiet) < wanted:
        # The least disturbed blocks are the best there is.
        chosen = set(sorted(range(len(blocks)), key=lambda index: max(around[index]))[:wanted])
        drift = statistics.median(max(around[index]) for index in chosen) / watch.reference - 1
        reasons.append(
            f"the machine was disturbed: {sum(quiet)} of {len(blocks)} blocks were quiet ({wanted} wanted), and "
            f"around those that count the anchor was slower by {drift:.0%}"
        )
        quiet = [index in chosen for index in range(len(blocks))]
    timing = Timing(
        blocks=tuple(block for block, kept in zip(blocks, quiet, strict=True) if kept),
        disturbed=tuple(block for block, kept in zip(blocks, quiet, strict=True) if not kept),
        anchor_ms=tuple(pair for pair, kept in zip(around, quiet, strict=True) if kept),
        reference_ms=watch.reference,
        suspect="; ".join(reasons),
        facts=facts,
        trimmed=watch.quiet_share < QUIET,
    )
    share = len(timing.samples) / (len(timing.samples) + len(timing.slow))
    if not timing.suspect and share < few:
        why = f"only {share:.0%} of the runs are within {SPREAD:.0%} of the quickest: network or machine varies"
        timing = replace(timing, suspect=why)
    return timing


class _Watch:
    """Looks at the anchor, and knows what it takes undisturbed.

    Attributes:
        last: What it just took, in ms.
    """

    def __init__(self, anchor: Session, known_ms: float, tolerance: float) -> None:
        self._anchor, self._known, self._tolerance = anchor, known_ms, tolerance
        self._times: list[float] = []  # ascending
        self.look()

    def look(self) -> float:
        """Run the anchor, and give its time in ms."""
        self.last = _anchor_ms(self._anchor)
        insort(self._times, self.last)
        return self.last

    @property
    def quickest(self) -> float:
        """Undisturbed, as far as this measurement tells."""
        return self._times[int(QUICKEST * len(self._times))]

    @property
    def reference(self) -> float:
        """Undisturbed, as far as all measurements tell."""
        return min(self._known, self.quickest)

    @property
    def bound(self) -> float:
        """Up to which it passes for undisturbed."""
        return (1 + self._tolerance) * self.reference

    def is_quiet(self) -> bool:
        """Whether the machine was quiet at the last look."""
        return self.last <= self.bound

    @property
    def quiet_share(self) -> float:
        """Share of the looks at which the machine was quiet."""
        return bisect_right(self._times, self.bound) / len(self._times)


class _Memory:
    """Looks at memory, of which all cores share the way.

    Args:
        record: What it took before.
        shared: Whether the network needs it, because it does not fit what a core has to itself.
    """

    def __init__(self, record: AnchorRecord, *, shared: bool) -> None:
        self._record, self._shared = record, shared
        self._key = canonical(["memory", READ_BYTES, processor()])
        self._known = record.reference_ms(self._key)
        self._times: list[float] = []  # ascending

    def look(self) -> None:
        """Read it."""
        insort(self._times, read_seconds() * 1e3)

    @property
    def _quickest(self) -> float:
        return self._times[int(QUICKEST_READS * len(self._times))]

    @property
    def slower(self) -> float:
        """By which share reading takes longer than undisturbed."""
        return max(0.0, self._quickest / self._known - 1) if self._times else 0.0

    def remember(self) -> None:
        """Put it on record. Only while the bench is held."""
        self._record.add(self._key, self._quickest)

    def reasons(self) -> list[str]:
        """Why the number is not to be trusted."""
        if not self._shared or self.slower <= PRESSURE:
            return []
        return [
            f"others used the memory: reading it took {self.slower:.0%} longer than undisturbed, and the network is "
            f"larger than the {own_cache_bytes() / 1e6:.1f} MB of cache that a core has to itself"
        ]


def _quiet(
    medians: Sequence[float], around: Sequence[tuple[float, float]], bound: float, tolerance: float
) -> list[bool]:
    """Which blocks nothing disturbed: by the anchor before and after, and by the blocks themselves.

    A disturbance that begins and ends within a block shows only there, since it only ever adds time.
    """
    quiet = [max(pair) <= bound for pair in around]
    among = sorted(median for median, kept in zip(medians, quiet, strict=True) if kept)
    if among:
        highest = (1 + 2 * tolerance) * among[int(QUICKEST_BLOCKS * len(among))]
        quiet = [kept and median <= highest for median, kept in zip(medians, quiet, strict=True)]
    return quiet


def _anchor_ms(anchor: Session) -> float:
    """Time of the anchor just now."""
    return statistics.median(anchor.seconds() for _ in range(ANCHOR_RUNS)) * 1e3


def _warm_up(session: Session) -> float:
    """Run until it gets no quicker. Gives the seconds of a run."""
    session.seconds()  # memory, caches, what is compiled at the first run
    begin = time.perf_counter()
    quickest = float("inf")
    while True:
        group = [session.seconds() for _ in range(ANCHOR_RUNS)]
        while sum(group) < BLOCK_SECONDS:
            group.append(session.seconds())
        now = statistics.median(group)
        if now > (1 - STABLE) * quickest or time.perf_counter() - begin > WARM_UP_SECONDS:
            return min(now, quickest)
        quickest = min(now, quickest)
