"""Compiles the kernels once per machine: who compiles, who waits, what the user is told, and where the result is kept.

Numba keeps compiled code beside the package, or in the user's cache folder, or where ``NUMBA_CACHE_DIR`` says.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nasplat.errors import NasplatWarning
from nasplat.packed.engine import making
from nasplat.packed.kernels import emit, executor, fields, intrinsics, isa

_PATIENCE = 180.0
"""Seconds to wait for another process that compiles; then this one compiles as well."""


@lru_cache(maxsize=1)
def execute() -> Callable[..., None]:
    """The executor (:func:`nasplat.packed.kernels.executor.compile_executor`), compiled or from the cache."""
    compiled: Callable[..., None] = _compiled(executor.compile_executor)
    return compiled


def kernels_for() -> str:
    """Name of the instruction set that the kernels are compiled for."""
    return intrinsics.ISA.name


class Peaks(NamedTuple):
    """The most that one core does with operands in registers, in bit-MACs per second.

    Attributes:
        popcount: XOR, population count, addition.
        lookup: Table lookup, addition; None where there is no such instruction.
    """

    popcount: float
    lookup: float | None


@lru_cache(maxsize=1)
def peaks() -> Peaks:
    """Measured at the first call: the best of several goes of some milliseconds each."""
    compiled = _compiled(executor.compile_peak)

    def best(kind: Literal["popcount", "lookup"]) -> float:
        turns, macs = 200_000, emit.peak_macs(intrinsics.ISA, kind)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            compiled(kind == "lookup", turns)
            times.append(time.perf_counter() - start)
        return macs * turns / min(times)

    return Peaks(best("popcount"), best("lookup") if intrinsics.ISA.lookup != "none" else None)


def _compiled(make: Callable[..., Any]) -> Any:
    """What ``make(fingerprint, cache)`` compiles, without a cache where there is no place for one."""
    with making, _turn(), _ctrl_c_waits(), _telling():
        try:
            return make(_fingerprint(), cache=True)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            warnings.warn(
                "the compiled kernels cannot be kept, so that each process compiles them again: neither the folder of "
                "nasplat nor your cache folder can be written to. Name one that can: NUMBA_CACHE_DIR=/some/folder",
                NasplatWarning,
                stacklevel=2,
            )
            return make(_fingerprint(), cache=False)


def _fingerprint() -> str:
    """Of all code that the kernels are compiled from."""
    digest = hashlib.sha256()
    for module in (emit, executor, fields, intrinsics, isa):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _tell(text: str) -> None:
    print(f"nasplat: {text}", file=sys.stderr, flush=True)


@contextmanager
def _telling() -> Iterator[None]:
    """Say that something compiles, unless the cache has it."""
    start = time.monotonic()
    compiles: list[bool] = []

    def begun() -> None:
        if not compiles:
            compiles.append(True)
            _tell(
                f"compiling the packed kernels for {intrinsics.target_name()} (once per machine, about half a minute)"
            )

    with intrinsics.when_compiling(begun):
        yield
    if compiles:
        _tell(f"compiled in {time.monotonic() - start:.0f} s")


@contextmanager
def _turn() -> Iterator[None]:
    """Let one process of this user and machine compile, and the others wait and then find its work in the cache."""
    path = Path(tempfile.gettempdir()) / f"nasplat-packed-{os.getuid()}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        # Without a place for the lock, all compile: slower, not wrong.
        yield
        return
    try:
        _wait_for(handle)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int) -> None:
    start, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - start
            if waited > _PATIENCE:
                return
            if waited > 2 and not told:
                _tell("waiting for another process that compiles the packed kernels")
                told = True
            time.sleep(0.05)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Put Ctrl-C off: in the middle of a compilation it may get lost, or end in pages of the compiler's frames."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        _tell("stopping as soon as the kernels are compiled")

    before = signal.signal(signal.SIGINT, note) if callable(signal.getsignal(signal.SIGINT)) else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
