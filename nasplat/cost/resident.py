"""The fresh process of ``memory``: what it holds before a network, and what it holds while that runs.

Its parent sends a header, a warm-up network and the network by standard input, and gets one line of JSON back.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import pickle
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

RUNS = 3
"""Runs of the network whose high-water mark counts."""

_THP_DISABLE = 41  # PR_SET_THP_DISABLE of prctl(2)
_FILL = 1 << 16
_TRIAL = 8 << 20


class Marks:
    """Resident memory of this process, and its high-water mark.

    Where the kernel lets a process take its mark back (Linux, ``/proc/self/clear_refs``) the mark is that of what ran
    since :meth:`restart`. Elsewhere memory is filled up to the old mark first, so that whatever is needed beyond it
    shows.

    Attributes:
        method: ``VmHWM`` or ``ru_maxrss``.
    """

    memory = "host"

    def __init__(self) -> None:
        self.method = "VmHWM" if _sees_what_was_freed() else "ru_maxrss"
        self._ballast: list[bytearray] = []

    def restart(self) -> int:
        """Forget the mark; gives the bytes that are resident now."""
        if self.method == "VmHWM" and _restarted():
            return _status("VmRSS")
        mark = _greatest()
        while _greatest() == mark:
            self._ballast.append(bytearray(os.urandom(1) * _FILL))
        return _greatest()

    def highest(self) -> int:
        """The most bytes that were resident since :meth:`restart`."""
        if self.method == "VmHWM":
            return max(_status("VmHWM"), _now())
        return _greatest()


class DeviceMarks:
    """Memory of the CUDA device that torch's allocator gave out, and its high-water mark."""

    memory = "device"
    method = "torch.cuda.max_memory_allocated"

    def restart(self) -> int:
        """Forget the mark; gives the bytes in use now."""
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def highest(self) -> int:
        """The most bytes that were in use since :meth:`restart`."""
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _restarted() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _sees_what_was_freed() -> bool:
    """Whether the mark can be taken back, and moves: some sandboxes accept the former without the latter."""
    if not _restarted():
        return False
    before = _status("VmRSS")
    with mmap.mmap(-1, _TRIAL) as memory:
        memory.write(bytes(_TRIAL))
    return _status("VmHWM") - before > _TRIAL // 2


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _now() -> int:
    """Resident bytes, counted page by page where the kernel does so; its running sums are off by some pages."""
    with suppress(OSError):
        found = re.search(r"^Rss:\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    return _status("VmRSS")


def _greatest() -> int:
    """``ru_maxrss`` in bytes: macOS counts bytes, others kibibytes."""
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024


def _tidy() -> None:
    """Give back to the system what is free."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _small_pages() -> None:
    """No huge pages: with them, one byte may count as two mebibytes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_THP_DISABLE, 1, 0, 0, 0)


def _measure(given: BinaryIO) -> dict[str, Any]:
    import torch

    header = pickle.load(given)
    runtime, threads = header["runtime"], header["threads"]
    torch.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        # The kernel sums resident pages by processor, and knows the sum of one best.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # What the runtime does once: libraries, compiled kernels, pools.
    session = runtime.load(pickle.load(given), torch.from_numpy(header["warm_up_example"]), threads)
    for _ in range(RUNS):
        session.run()
    example = torch.from_numpy(header["example"])
    del session, header
    _tidy()
    on_device: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    marks: Marks | DeviceMarks = DeviceMarks() if on_device else Marks()
    before = marks.restart()
    file = pickle.load(given)
    session = runtime.load(file, example, threads)
    session.run()
    load = marks.highest() - before
    del file
    _tidy()
    loaded = marks.restart() - before
    for _ in range(RUNS):
        session.run()
    return {
        "peak": marks.highest() - before,
        "load": load,
        "loaded": loaded,
        "before": before,
        "memory": marks.memory,
        "method": marks.method,
        "facts": dict(runtime.facts()),
    }


def main() -> None:
    """Read from standard input, measure, answer on standard output."""
    # Whatever else is printed goes to standard error.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _small_pages()
    from nasplat.errors import NasplatError

    try:
        found = _measure(sys.stdin.buffer)
    except MemoryError:
        found = {"error": "memory", "text": "the process ran out of memory"}
    except NasplatError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    except Exception as error:
        found = {"error": "other", "text": f"{type(error).__name__}: {error}"}
    answer.write(json.dumps(found))
    answer.close()


if __name__ == "__main__":
    main()
