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
import math
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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

FOLDER = "NASPLAT_BENCH_FOLDER"
"""Environment variable: where the locks and the record of anchors lie.

Containers of one machine exclude each other only where they have a folder in common.
"""

PATIENCE = "NASPLAT_BENCH_PATIENCE"
"""Environment variable: seconds that a measurement waits for a quiet machine at most, whatever its schedule says.

For machines that never are: of continuous integration, say, where no number is to be trusted anyway.
"""

LEGAL = (
    "legal: numbers of processors ('3', or '3,7' for a core of two threads), or '' for none, so that training pauses "
    "while something is measured"
)

_TASKS = Path("/proc/self/task")
_PROCESSORS = Path("/sys/devices/system/cpu")


class _Held(threading.local):
    """What a thread holds, by folder of locks: it would wait for itself for ever."""

    def __init__(self) -> None:
        self.training: set[Path] = set()
        self.measuring: set[Path] = set()


_held = _Held()


def _after_fork() -> None:
    """A child holds nothing, though its parent may."""
    global _held
    _held = _Held()
    _leaving.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Bench:
    """The exclusive place to measure on this machine."""

    def __init__(self, folder: Path | None = None) -> None:
        """Name the locks.

        Args:
            folder: Where the lock files lie; None is one place per user and machine.
        """
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the lock files lie, on the machine that asks."""
        if self._folder is not None:
            return self._folder
        named = os.environ.get(FOLDER)
        return Path(named) if named else _default_folder()

    def check(self, machines: Iterable[str] = ()) -> None:
        """Refuse before the start what no measurement could be done with.

        Args:
            machines: Names that measurements of the study give as ``on``.

        Raises:
            InvalidInputError: There is no such machine, or ``NASPLAT_BENCH_PROCESSORS`` is not legal or leaves this
                process none to train on, or ``NASPLAT_BENCH_PATIENCE`` is no number of seconds.
        """
        patience(0.0)
        for name in machines:
            raise _elsewhere(name)
        owned = {processor for core in owned_cores() for processor in core}
        if owned and owned.issuperset(os.sched_getaffinity(0)):
            raise _invalid(f"{OWNED} is {os.environ[OWNED]!r}, which leaves this process no other to train on; {LEGAL}")

    def run(self, job: Callable[[Bench], T], on: str | None = None) -> T:
        """Do a job of measuring where the bench is.

        Args:
            job: Gets the bench of the machine that it runs on. It may travel to another process or machine.
            on: Name of another machine of the cluster; None is the study's own bench.

        Raises:
            InvalidInputError: There is no such machine.
        """
        if on is not None:
            raise _elsewhere(on)
        return job(self)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around one step of training: waits while a measurement that it would disturb runs or is asked for.

        Within another step, or a measurement, of the same thread it does nothing.
        """
        folder, training = self.folder, _held.training
        if folder in training or folder in _held.measuring:
            yield
            return
        room = _open(folder, "room")
        try:
            gate = _open(folder, "gate")
            try:
                fcntl.flock(gate, fcntl.LOCK_SH)
                fcntl.flock(room, fcntl.LOCK_SH)
            finally:
                _let_go(gate)
            training.add(folder)
            yield
        finally:
            training.discard(folder)
            _let_go(room)

    @contextmanager
    def measuring(self, threads: int = 1, device: str = "cpu") -> Iterator[tuple[int, ...]]:
        """Around one measurement: waits for the measurement before it, and for the training steps under way.

        Args:
            threads: That will compute. With more than the bench owns cores, training pauses.

        Args:
            threads: Threads that compute.
            device: What computes. For anything but ``cpu`` training pauses, whatever cores the bench owns.

        Gives:
            Numbers of the processors to compute on, one for each thread (fewer where there are not as many), no two of
            one physical core where there are enough cores. Empty where the system has no such numbers.

        Raises:
            RuntimeError: The same thread is measuring already, or within a step of training.
        """
        folder, measuring = self.folder, _held.measuring
        if folder in measuring or folder in _held.training:
            within = "another measurement" if folder in measuring else "a step of training"
            raise RuntimeError(f"measuring within {within} of the same thread, which would wait for itself for ever")
        cores = owned_cores()
        with _lock(folder, "bench") as bench, _lock(folder, "gate") as gate, _lock(folder, "room") as room:
            fcntl.flock(bench, fcntl.LOCK_EX)
            if device == "cpu" and threads <= len(cores):
                processors = tuple(core[0] for core in cores[:threads])
            else:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(room, fcntl.LOCK_EX)
                processors = _processors(threads)
            measuring.add(folder)
            try:
                yield processors
            finally:
                measuring.discard(folder)


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[int]:
    file = _open(folder, name)
    try:
        yield file
    finally:
        _let_go(file)


def _open(folder: Path, name: str) -> int:
    """A lock file. Opened anew each time, so that threads exclude each other too."""
    path, flags = f"{folder}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


def _let_go(file: int) -> None:
    """Unlock and close: a process that was forked meanwhile, a loader of data, still has the file open."""
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


@lru_cache(maxsize=1)
def _default_folder() -> Path:
    """One place per user and machine: not where ``TMPDIR`` points, which differs between the jobs of a machine.

    Raises:
        InvalidInputError: Somebody else made it, or may write there: its name is known to all.
    """
    shared = Path("/tmp")
    place = shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = place / f"nasplat-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise _invalid(
            f"{folder} is no folder that this user alone can write to, and holds the locks of all measurements; remove "
            f"it, or name another one in {FOLDER}"
        )
    return folder


def _elsewhere(name: str) -> Exception:
    return _invalid(
        f"on={name!r} names a machine of a Ray cluster (a node started with --resources='{{\"{name}\": 1}}'); this "
        "study runs in one process: run it with workers=1 or more"
    )


def _invalid(message: str) -> Exception:
    from nasplat.errors import InvalidInputError  # not above: it would load the package, and torch, for three locks

    return InvalidInputError(message)


def patience(wished: float) -> float:
    """Seconds that a measurement waits for a quiet machine.

    Args:
        wished: By its schedule.

    Raises:
        InvalidInputError: ``NASPLAT_BENCH_PATIENCE`` is no number of seconds.
    """
    given = os.environ.get(PATIENCE, "")
    if not given:
        return wished
    try:
        most = float(given)
    except ValueError:
        most = -1.0
    if not 0 <= most < math.inf:
        raise _invalid(f"{PATIENCE} is {given!r}; legal: seconds, from 0 up, or '' for what each schedule says")
    return min(wished, most)


# The processors that the bench owns.


def owned_cores() -> tuple[tuple[int, ...], ...]:
    """Processors that the bench owns, by physical core; none where training pauses instead.

    Raises:
        InvalidInputError: ``NASPLAT_BENCH_PROCESSORS`` is no list of processors that this process may use.
    """
    given = os.environ.get(OWNED)
    if given is None:
        cores = physical_cores()
        owned = cores[-1:] if len(cores) >= SPARE and _quota() >= sum(map(len, cores)) else ()
        given = os.environ[OWNED] = ",".join(str(processor) for core in owned for processor in core)
    return _owned(given)


@lru_cache(maxsize=8)
def _owned(given: str) -> tuple[tuple[int, ...], ...]:
    """The cores that a value of the variable names."""
    if not given.strip():
        return ()
    asked = f"{OWNED} is {given!r}"
    try:
        numbers = _numbers(given)
    except ValueError:
        raise _invalid(f"{asked}; {LEGAL}") from None
    if not hasattr(os, "sched_setaffinity"):
        raise _invalid(f"{asked}, but this system ties no process to processors; legal: ''")
    lacking = {number for number in numbers if not _may_use(number)}
    if lacking:
        may = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise _invalid(f"{asked}, but this process may not use processor {min(lacking)}, only {may}; {LEGAL}")
    return _by_core(numbers)


def _may_use(number: int) -> bool:
    """Whether the system lets this thread run there, though the present affinity may exclude it."""
    before = os.sched_getaffinity(0)
    if number in before:
        return True
    try:
        os.sched_setaffinity(0, {number})
    except (OSError, ValueError, OverflowError):
        return False
    os.sched_setaffinity(0, before)
    return True


def physical_cores() -> tuple[tuple[int, ...], ...]:
    """The processors that this process may use, those of one physical core together; the fastest cores last."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    return _by_core(os.sched_getaffinity(0))


def _by_core(numbers: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    usable = set(numbers)
    cores: dict[tuple[int, ...], None] = {}
    for number in sorted(usable, key=lambda number: (_speed(number), number)):
        try:
            siblings = _numbers((_PROCESSORS / f"cpu{number}/topology/thread_siblings_list").read_text())
        except (OSError, ValueError):
            siblings = {number}
        cores[tuple(sorted(usable & (siblings | {number})))] = None
    return tuple(cores)


def _speed(number: int) -> int:
    """How fast a processor is beside the others of its machine: some have fast and slow cores. 0: not known."""
    for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        try:
            return int((_PROCESSORS / f"cpu{number}" / file).read_text())
        except (OSError, ValueError):
            continue
    return 0


def _quota() -> float:
    """Processors' worth of time that the control groups let this process use at most.

    Where it is less than the processors, a measurement would share what is left of it with the training beside.
    """
    root = Path("/sys/fs/cgroup")
    least = math.inf
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return least
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = root / "cpu" if controllers else root
        inner = place / path.lstrip("/")
        for folder in (inner, *inner.parents):
            least = min(least, _quota_of(folder))
            if folder == place:
                break
    return least


def _quota_of(folder: Path) -> float:
    """The limit of one group: in one file, or in the two of the first version of control groups."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such limit: no file, "max"
        return math.inf


def _numbers(text: str) -> set[int]:
    """Processors of a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        found.update(range(int(first), int(last if dash else first) + 1))
    return found


def _processors(threads: int) -> tuple[int, ...]:
    """So many processors, the last ones, of different physical cores as far as there are so many."""
    owned = (processor for core in owned_cores() for processor in core)
    # Those that the bench owns too: a trainer's affinity leaves them out.
    cores: Sequence[Sequence[int]] = _by_core(os.sched_getaffinity(0).union(owned)) if physical_cores() else ()
    first = [core[0] for core in cores]
    rest = [processor for core in cores for processor in core[1:]]
    return tuple((rest + first)[-threads:])


# Where threads run.


class _Leaving:
    """How many trainings of this process keep off the bench, and what they changed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.before: dict[int, frozenset[int]] = {}
        """Affinity of each thread that was changed."""
        self.wider: dict[frozenset[int], frozenset[int]] = {}
        """The affinity that each narrower one came from."""


_leaving = _Leaving()


@contextmanager
def leaving_owned_cores() -> Iterator[None]:
    """Keep all threads of this process, and those that they start, off the processors that the bench owns.

    A measurement in the process may still go there. A thread that may run only there stays.

    Raises:
        InvalidInputError: As of :func:`owned_cores`.
    """
    owned = frozenset(processor for core in owned_cores() for processor in core)
    if not owned:
        yield
        return
    with _leaving.lock:
        _leaving.count += 1
        if _leaving.count == 1:
            for thread, affinity in _affinities().items():
                narrow = affinity - owned
                if narrow and narrow != affinity and _move(thread, narrow):
                    _leaving.before[thread] = affinity
                    _leaving.wider.setdefault(narrow, affinity)
    try:
        yield
    finally:
        with _leaving.lock:
            _leaving.count -= 1
            if not _leaving.count:
                for thread, affinity in _affinities().items():
                    # Threads started meanwhile have the affinity of the one that started them.
                    wide = _leaving.wider.get(affinity)
                    if wide is not None:
                        _move(thread, _leaving.before.get(thread, wide))
                _leaving.before.clear()
                _leaving.wider.clear()


@contextmanager
def pinned(processors: Sequence[int]) -> Iterator[None]:
    """Run this thread, and the threads that it starts, on these processors; empty: wherever it ran.

    Threads that outlive it (pools that a library keeps) are let go at the end.
    """
    if not processors:
        yield
        return
    affinity = os.sched_getaffinity(0)
    present = set(_threads())
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, affinity)
        for thread, now in _affinities().items():
            if thread not in present and now == frozenset(processors):
                _move(thread, affinity)


def _threads() -> list[int]:
    return [int(task.name) for task in _TASKS.iterdir()]


def _affinities() -> dict[int, frozenset[int]]:
    """The processors of each thread of this process."""
    found = {}
    for thread in _threads():
        try:
            found[thread] = frozenset(os.sched_getaffinity(thread))
        except OSError:  # it has ended
            continue
    return found


def _move(thread: int, processors: Iterable[int]) -> bool:
    try:
        os.sched_setaffinity(thread, processors)
    except OSError:  # it has ended
        return False
    return True
