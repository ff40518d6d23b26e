"""One measurement at a time, while training pauses.

Two file locks per machine and user. A training step holds the *room* shared; a measurement holds it alone. Who wants to
measure first holds the *gate*, through which every step has to pass, so that trainers cannot starve it. A process that
dies lets go of both. The same locks serve any number of studies on the machine.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Bench:
    """The exclusive place to measure on this machine."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open the locks.

        Args:
            folder: Where the lock files lie; None is one place per user and machine.
        """
        self.folder = folder or Path(tempfile.gettempdir()) / f"nasplat-bench-{os.getuid()}"
        self._open: tuple[int, int, int] | None = None

    def _locks(self) -> tuple[int, int]:
        # Locks belong to an open file: a forked child must open its own, or it would share its parent's turn.
        if self._open is None or self._open[0] != os.getpid():
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            gate, room = (os.open(self.folder / name, flags, 0o600) for name in ("gate", "room"))
            self._open = (os.getpid(), gate, room)
        return self._open[1:]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around one step of training: waits while a measurement runs or is asked for."""
        gate, room = self._locks()
        try:
            try:
                fcntl.flock(gate, fcntl.LOCK_SH)
                fcntl.flock(room, fcntl.LOCK_SH)
            finally:
                fcntl.flock(gate, fcntl.LOCK_UN)
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around one measurement: waits for the measurement before it and for the steps under way."""
        gate, room = self._locks()
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)
            fcntl.flock(gate, fcntl.LOCK_UN)

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_open": None}
