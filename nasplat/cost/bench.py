"""Where measuring is exclusive: one measurement at a time on a machine, and no training that disturbs it.

With processors to spare the bench owns a physical core, which trainers leave alone. Else training pauses while a
measurement runs. Three file locks per machine and user:

* ``bench`` is held alone by a measurement;
* a training step holds the ``room`` shared; a measurement for which training has to pause holds it alone;
* who wants the room alone first holds the ``gate``, through which every step passes, so that trainers cannot starve it.

A process that dies lets go of them. The same locks serve any number of studies on the machine.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SPARE = 4
"""Physical cores from which on the bench owns one."""

OWNED = "NASPLAT_BENCH_PROCESSORS"
"""Environment variable: numbers of the processors that the bench owns, ``3`` or ``3,7``; empty: none, training pauses.

Where it is not set, nasplat chooses, and sets it, so that processes of its own choose the same.
"""


class Bench:
    """The exclusive place to measure on this machine."""

    def __init__(self, folder: Path | None = None) -> None:
        """Name the locks.

        Args:
            folder: Where the lock files lie; None is one place per user and machine.
        """
        self.folder = folder or Path(tempfile.gettempdir()) / f"nasplat-bench-{os.getuid()}"

    def run(self, job: Callable[[Bench], T], on: str | None = None) -> T:
        """Do a job of measuring where the bench is.

        Args:
            job: Gets the bench of the machine that it runs on. It may travel to another process or machine.
            on: Name of another machine of the cluster; None is the study's own bench.

        Raises:
            InvalidInputError: There is no such machine.
        """
        if on is not None:
            from nasplat.errors import InvalidInputError

            raise InvalidInputError(
                f"on={on!r} names a machine of a Ray cluster (a node started with --resources='{{\"{on}\": 1}}'); this "
                "study runs in one process, so run it with workers=1 or more"
            )
        return job(self)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around one step of training: waits while a measurement that it would disturb runs or is asked for."""
        with self._lock("room") as room:
            with self._lock("gate") as gate:
                fcntl.flock(gate, fcntl.LOCK_SH)
                fcntl.flock(room, fcntl.LOCK_SH)
            yield

    @contextmanager
    def measuring(self, threads: int = 1) -> Iterator[tuple[int, ...]]:
        """Around one measurement: waits for the measurement before it, and for the training steps under way.

        Gives:
            Numbers of the processors to compute on, one for each thread, no two of one physical core where there are
            as many. Empty where the system has no such numbers.
        """
        cores = owned_cores()
        with self._lock("bench") as bench, self._lock("gate") as gate, self._lock("room") as room:
            fcntl.flock(bench, fcntl.LOCK_EX)
            if threads <= len(cores):
                yield tuple(core[0] for core in cores[:threads])
                return
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX)
            yield _processors(threads)

    @contextmanager
    def _lock(self, name: str) -> Iterator[int]:
        """An open lock file; closing it lets go. Opened anew each time, so that threads exclude each other too."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            file = os.open(self.folder / name, flags, 0o600)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.folder / name, flags, 0o600)
        try:
            yield file
        finally:
            os.close(file)


@lru_cache(maxsize=1)
def owned_cores() -> tuple[tuple[int, ...], ...]:
    """Processors that the bench owns, by physical core; none where training pauses instead."""
    cores = physical_cores()
    given = os.environ.get(OWNED)
    if given is None:
        owned = cores[-1:] if len(cores) >= SPARE else ()
        os.environ[OWNED] = ",".join(str(processor) for core in owned for processor in core)
        return owned
    numbers = {int(number) for number in given.split(",") if number.strip().isdigit()}
    return tuple(core for core in cores if numbers.issuperset(core)) or tuple((number,) for number in sorted(numbers))


def physical_cores() -> tuple[tuple[int, ...], ...]:
    """The processors that this process may use, those of one physical core together."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    usable = os.sched_getaffinity(0)
    cores: dict[tuple[int, ...], None] = {}
    for number in sorted(usable):
        try:
            text = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
        except OSError:
            text = str(number)
        cores[tuple(sorted(usable.intersection(_numbers(text))))] = None
    return tuple(cores)


def _numbers(text: str) -> set[int]:
    """Processors of a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _processors(threads: int) -> tuple[int, ...]:
    """So many processors, the last ones, of different physical cores as far as there are so many."""
    cores: Sequence[Sequence[int]] = physical_cores()
    first = [core[0] for core in cores]
    rest = [processor for core in cores for processor in core[1:]]
    return tuple((rest + first)[-threads:])
