"""A machine with a clock of its own, on which timing can be tested without any time passing.

It is quiet and disturbed by turns, and what runs while it is disturbed takes longer by a factor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.cost import Bench
from nasplat.cost.anchor import _sessions
from nasplat.cost.timing import Schedule, Timing, TimingJob
from nasplat.runtimes import Session

ANCHOR_S = 0.00025
"""The anchor, undisturbed."""


class Machine:
    """A clock, and phases of a duration in seconds and a factor, drawn or given."""

    def __init__(
        self,
        seed: int = 0,
        *,
        quiet_share: float = 1.0,
        dwell: tuple[float, float] = (0.02, 0.1),
        factor: tuple[float, float] = (1.5, 2.0),
        jitter: float = 0.01,
        spikes: float = 0.0,
        drift: float = 0.0,
        phases: Sequence[tuple[float, float]] = (),
    ) -> None:
        """Say what the machine is like.

        Args:
            seed: Of all that is drawn.
            quiet_share: Of the time.
            dwell: Shortest and longest phase of the rarer kind; the others are longer by the share.
            factor: Least and greatest of a disturbed phase.
            jitter: Relative deviation of a run.
            spikes: Share of runs that are interrupted, for 5 ms on average.
            drift: Relative slowdown per second, for ever.
            phases: Takes the place of what is drawn; the last one has no end.
        """
        self.now = 0.0
        self._rng = np.random.default_rng(seed)
        self._share, self._dwell, self._factor = quiet_share, dwell, factor
        self._jitter, self._spikes, self._drift = jitter, spikes, drift
        self._phases = list(phases)
        self._quiet = self._rng.random() >= quiet_share  # the phase before the first
        self._end, self._slower = 0.0, 1.0
        self._next()

    def _next(self) -> None:
        if self._phases:
            seconds, self._slower = self._phases.pop(0)
            self._end = self._end + seconds if self._phases else math.inf
            return
        share = self._share
        if share in (0.0, 1.0):
            self._quiet, self._end = bool(share), math.inf
        else:
            self._quiet = not self._quiet
            ratio = share / (1 - share)
            self._end += self._rng.uniform(*self._dwell) * max(1.0, ratio if self._quiet else 1 / ratio)
        self._slower = 1.0 if self._quiet else self._rng.uniform(*self._factor)

    def work(self, seconds: float) -> float:
        """Compute what takes so long undisturbed. Gives the time that it took."""
        begin, left = self.now, seconds * (1 + self._jitter * abs(self._rng.normal()))
        left *= 1 + self._drift * self.now
        if self._spikes and self._rng.random() < self._spikes:
            left += self._rng.exponential(0.005)
        while self.now + left * self._slower > self._end:
            left -= (self._end - self.now) / self._slower
            self.now = self._end
            self._next()
        self.now += left * self._slower
        return self.now - begin


class ScriptedSession(Session):
    """Takes its time on the machine."""

    def __init__(self, machine: Machine, seconds: float) -> None:
        self._machine, self._seconds = machine, seconds

    def run(self) -> None:
        self.seconds()

    def seconds(self) -> float:
        return self._machine.work(self._seconds)

    def output(self) -> Tensor:
        return torch.zeros(1, 1)


@dataclass(frozen=True, eq=False)
class Scripted:
    """A runtime of such sessions: a file says how long a run takes, and every exported network is the anchor."""

    machine: Machine = field(compare=False)
    anchor: float = field(default=ANCHOR_S, compare=False)
    version: str = "1"

    @property
    def name(self) -> str:
        return "scripted"

    def export(self, model: nn.Module, example: Tensor) -> bytes:
        return repr(self.anchor).encode()

    def load(self, file: bytes, example: Tensor, threads: int) -> Session:
        return ScriptedSession(self.machine, float(file))

    def facts(self) -> dict[str, Any]:
        return {"scripted": self.version}


@contextmanager
def clock_of(machine: Machine) -> Iterator[None]:
    """While in it, the process's clock is the machine's."""
    before, time.perf_counter = time.perf_counter, lambda: machine.now
    try:
        yield
    finally:
        time.perf_counter = before


def timed(
    bench: Bench, machine: Machine, seconds: float, schedule: Schedule | None = None, *, anchor: float = ANCHOR_S,
    threads: int = 1, version: str = "1",
) -> Timing:  # fmt: skip
    """Time a network whose run takes so many seconds, undisturbed."""
    job = TimingJob(
        Scripted(machine, anchor, version), repr(seconds).encode(), torch.zeros(1, 1), threads, schedule or Schedule()
    )
    _sessions.clear()  # the anchor of another machine has another clock
    with clock_of(machine):
        return job(bench)
