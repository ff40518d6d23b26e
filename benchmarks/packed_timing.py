"""Timing for ``packed.py``: compared subjects in turn, on given processors, some of them in other processes.

A sample is the mean of so many calls that they take about 2 ms, after one call that does not count (long calls need
none). In each round every subject gives one sample, and each round starts with the next subject. The fastest sample
counts: other work on the machine only ever adds time. How much it added shows in the spread.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

SAMPLE_SECONDS = 2e-3
WARM_UP_SECONDS = 0.02
LONG_SECONDS = 0.02
"""A call of so long finds nothing of its own in the caches anyway."""

SPINNING_SECONDS = 5e-3
"""After a run with two threads, the second one waits busily for more work: that must not be another subject's time."""


_V2 = "+cx16,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2"
_V3 = f"{_V2},+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe"
TARGETS: Mapping[str, str] = {
    "x86-64": "",
    "x86-64-v2": _V2,
    "haswell": _V3,
    "skylake-avx512": f"{_V3},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl",
}
"""Processors to compile for, by LLVM's name, and the features that Numba shall see."""


class Subject(Protocol):
    """What can be timed."""

    def seconds(self, calls: int, warm: bool) -> float:
        """Seconds of a call, the mean of ``calls``; ``warm``: after one that does not count."""


@dataclass(frozen=True)
class Here:
    """A function in this process.

    Attributes:
        call: The function.
    """

    call: Callable[[], object]

    def seconds(self, calls: int, warm: bool) -> float:
        """See :class:`Subject`."""
        call = self.call
        if warm:
            call()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls


@dataclass(frozen=True)
class Timing:
    """Samples of one subject.

    Attributes:
        samples: Seconds of a call, one for each round.
    """

    samples: tuple[float, ...]

    @property
    def best(self) -> float:
        """Seconds of the fastest sample."""
        return min(self.samples)

    @property
    def spread(self) -> float:
        """By how much the median sample is slower than the fastest: 0.1 is 10 %."""
        return statistics.median(self.samples) / self.best - 1


def measure(
    subjects: Mapping[str, Subject], rounds: int, *, pause: float = 0.0, seconds: float = float("inf")
) -> dict[str, Timing]:
    """Time subjects in turn.

    Args:
        subjects: By name.
        rounds: Samples of each.
        pause: Seconds to wait before each sample.
        seconds: When the rounds have taken so long, the third one is the last.
    """
    names = list(subjects)
    once = {name: _warm_up(subject) for name, subject in subjects.items()}
    calls = {name: max(1, round(SAMPLE_SECONDS / seconds)) for name, seconds in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.monotonic()
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() - begin > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            samples[name].append(subjects[name].seconds(calls[name], once[name] < LONG_SECONDS))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _warm_up(subject: Subject) -> float:
    """Call once, then for a while. Seconds of the fastest call."""
    begin = time.monotonic()
    best = subject.seconds(1, False)
    while time.monotonic() - begin < WARM_UP_SECONDS:
        best = min(best, subject.seconds(1, False))
    return best


def processors(threads: int) -> set[int]:
    """Numbers of the processors for so many threads: the last of those that this process may use. Empty: no choice."""
    return set(sorted(os.sched_getaffinity(0))[-threads:]) if hasattr(os, "sched_getaffinity") else set()


def usable() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def steady(threads: int, cpus: set[int]) -> Iterator[None]:
    """So many torch threads, these processors (empty: all), and no garbage collection."""
    before = os.sched_getaffinity(0) if cpus else set()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    if cpus:
        os.sched_setaffinity(0, cpus)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(torch_threads)
        if cpus:
            os.sched_setaffinity(0, before)


class OtherTarget:
    """A process in which Numba compiles for another processor, with fewer instructions than this one has.

    It times a saved program when it is asked to, while this process waits.

    Attributes:
        name: One of :data:`TARGETS`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # Without named features, Numba would add all that this processor has.
        environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": TARGETS[name]}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def load(self, program: Path, shape: Sequence[int], threads: int, cpus: set[int]) -> torch.Tensor:
        """Load a program and run it once, on ``torch.randn`` of seed 0. What :func:`excerpt` takes of the result."""
        asked = {"program": str(program), "shape": list(shape), "threads": threads, "cpus": sorted(cpus)}
        return torch.tensor(self._ask(asked)["result"])

    def seconds(self, calls: int, warm: bool) -> float:
        """Of the program loaded last; see :class:`Subject`."""
        return float(self._ask({"calls": calls, "warm": warm})["seconds"])

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            why = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise RuntimeError(f"the process for target {self.name} ended with {why}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def excerpt(y: torch.Tensor) -> torch.Tensor:
    """Some hundred numbers from all over a result, in one dimension."""
    return y.flatten()[:: max(1, y.numel() // 500)]


def serve() -> None:
    """Answer requests of :class:`OtherTarget`, a line of JSON each, until there are no more."""
    from nasplat.packed import PackedProgram

    # Whatever else prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    here: Here | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any]
        if "program" in asked:
            if asked["cpus"]:
                os.sched_setaffinity(0, asked["cpus"])
            program, threads = PackedProgram.load(asked["program"]), asked["threads"]
            x = torch.randn(asked["shape"], generator=torch.Generator().manual_seed(0))
            here = Here(partial(program, x, threads=threads))
            answer = {"result": excerpt(program(x, threads=threads)).tolist()}
        else:
            assert here is not None
            answer = {"seconds": here.seconds(asked["calls"], asked["warm"])}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the scripts beside this one must not hide the package strategies
    gc.disable()
    serve()
