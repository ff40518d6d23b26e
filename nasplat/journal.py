"""The journal: ``history.jsonl``, append-only, the truth that a resume reads.

One JSON object a line. What ends a trial is forced to the disk before the search goes on; everything is handed to the
operating system at once, so a killed process loses nothing that it had said, and after a power cut the file is a prefix
of what was said (with a torn last line at most, which is set aside).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nasplat.errors import FolderError, FolderInUseError, JournalError

try:
    import fcntl
except ImportError as error:  # pragma: no cover - Windows
    raise ImportError("nasplat needs a POSIX system (Linux, macOS): its folders are held by fcntl locks") from error

SCHEMA_VERSION = 1
FILE = "history.jsonl"
LOCK = "study.lock"


def read(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """All whole events of a folder, and where they end.

    Safe while another process writes: a last line without its end is left out.

    Returns:
        The events in order, and the length in bytes of what they take; the file may be longer by a torn line.

    Raises:
        JournalError: A line before the last is no JSON object, or the schema is newer than this nasplat.
    """
    path = folder / FILE
    events: list[dict[str, Any]] = []
    end = 0
    raw = path.read_bytes() if path.exists() else b""
    lines = raw.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("not an event")
        except ValueError as error:
            if number == len(lines) - 1 and not lines[-1]:
                # The very last line, with its end but broken: a torn write whose tail reached the disk first.
                break
            raise JournalError(
                f"{path}, line {number} is broken ({error}), and {len(lines) - 1 - number} lines follow it. "
                f"Nothing was changed. To go on without them, keep the first {number - 1} lines"
            ) from error
        events.append(event)
        end += len(line) + 1
    if events and events[0].get("schema") != SCHEMA_VERSION:
        raise JournalError(f"{path} has schema {events[0].get('schema')!r}; this nasplat reads schema {SCHEMA_VERSION}")
    return events, end


def _hold(file: IO[str]) -> None:
    """Lock the file alone. Somebody who only looks whether it is held may hold it for an instant: try for a while."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Journal:
    """A folder's journal, held for writing by this process until closed."""

    def __init__(self, folder: Path) -> None:
        """Hold the folder and read what is there.

        Raises:
            FolderInUseError: Another live process holds it. (A dead one holds nothing: the lock goes with it.)
            JournalError: The journal cannot be read.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("a+")
        except OSError as error:
            raise FolderError(f"{folder} cannot be made or written to: {error}") from error
        try:
            _hold(self._lock)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise FolderInUseError(
                f"{folder} is held by a running study (process {holder}). Wait for it, stop it, or use another folder; "
                f"nasplat.load({str(folder)!r}) reads it while it runs"
            ) from error
        except OSError as error:
            self._lock.close()
            raise FolderError(f"{folder} cannot be held ({error}): its file system must offer flock") from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self._file: IO[bytes] | None = None
        try:
            self.events, end = read(folder)
            self.torn = self._set_torn_aside(end)
        except BaseException:
            self.close()
            raise
        self._file = (folder / FILE).open("ab")

    def _set_torn_aside(self, end: int) -> Path | None:
        """Move what follows the last whole event into a file of its own, and say where."""
        path = self.folder / FILE
        if not path.exists() or path.stat().st_size == end:
            return None
        aside = self.folder / f"{FILE}.torn"
        with path.open("r+b") as file:
            file.seek(end)
            with aside.open("ab") as kept:
                kept.write(file.read() + b"\n")
            file.truncate(end)
        return aside

    def append(self, event: Mapping[str, Any], *, durable: bool = False) -> None:
        """Write one event.

        Args:
            event: JSON values; finite numbers only.
            durable: Force it to the disk before returning.
        """
        assert self._file is not None, "the journal is closed"
        self._file.write(json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let the folder go."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self._lock.closed:
            # Said aloud: a child forked meanwhile has the file open too, and would hold the folder on.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.events)
