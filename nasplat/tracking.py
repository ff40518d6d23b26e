"""The record that people compare in: what a tracker is, and the backlog that delivers to it.

The backlog keeps a slow or absent record from stopping a search. The journal, not the record, is the truth that a
resume reads.
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from nasplat.errors import NasplatWarning
from nasplat.strategy import FINAL, Trial


@dataclass(frozen=True)
class StudyRecord:
    """What a tracker says of a study.

    Attributes:
        id: Made once, when the folder was; a resumed study has the same. Letters, digits, `_` and `-`.
        name: The folder's last part.
        folder: Where the journal lies.
        parameters: Flat: space, strategy, task, seed, objectives, constraints, meters.
        tags: Names of space and strategy, seed, versions, git commit (:func:`study_tags` has the last two).
        descriptions: JSON descriptions by name (space, strategy, task), for an artifact.
    """

    id: str
    name: str
    folder: Path
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    descriptions: Mapping[str, Any] = field(default_factory=dict)


def study_tags(directory: Path | None = None) -> dict[str, str]:
    """What a study ran with: ``version.*`` of Python and of the libraries that matter, and the git commit.

    Nothing is imported for it, and what is not installed, or not in a git checkout, is left out.

    Args:
        directory: Whose git checkout to look at; the current working directory by default.
    """
    tags = {"version.python": platform.python_version()}
    for name in ("nasplat", "torch", "ray", "optuna", "mlflow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            tags[f"version.{name}"] = metadata.version(name)
    commit = _git(directory, "rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit
        # Only tracked files: data and results lying about do not change what ran.
        changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
        if changed is not None:
            tags["git.dirty"] = "true" if changed else "false"
    return tags


def _git(directory: Path | None, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


@runtime_checkable
class Tracker(Protocol):
    """Where a study is recorded.

    Called by one thread of the driver only, never by workers. Every method may raise, for instance because a server
    is away: the same call is then made again later, so each must find out for itself what had been written.
    """

    def start(self, study: StudyRecord) -> Set[int]:
        """Open the study's record, or go on with the one that has its id.

        Called again after anything raised, as a cheap question whether the record can be written now.

        Returns:
            Numbers of the trials whose record is complete, so that a resumed study need not log them again.
        """
        ...

    def log(self, trial: Trial) -> None:
        """Bring the record of one trial up to date: create it, add its new epochs, end it."""
        ...

    def artifact(self, path: Path, folder: str = "") -> None:
        """Put a file, or a folder's files, with the study's record, under ``folder``."""
        ...

    def end(self, state: str, metrics: Mapping[str, float] = ...) -> None:
        """Close the study's record as ``complete``, ``interrupted`` or ``failed``. A resume opens it again.

        Args:
            state: One of these.
            metrics: Of the study as a whole. Not given where there are none.
        """
        ...

    def where(self, study: StudyRecord) -> str:
        """One or more lines on where the record is and how to open it. Asks nobody: works before ``start``."""
        ...


_Item: TypeAlias = tuple[Any, ...]
"""One thing to deliver: ("start",), ("trial", number), ("artifact", path, folder) or ("end",)."""


class Backlog:
    """Delivers to a tracker in one background thread, so that a slow or absent record never stops a search.

    Of each trial only the newest state is kept, in the order of first appearance, so the backlog holds at most one
    reference per trial of the history. What cannot be delivered is tried again after ``retry_s`` seconds, then after
    twice as many, up to ``max_retry_s``; a single trial that is refused does not hold up the others. Trouble is said
    once, and once more when the record has caught up.

    Args:
        tracker: Where to deliver.
        say: Takes a line of text for the user, possibly on the background thread; a :class:`NasplatWarning` by
            default.
        retry_s: First pause after a failure, in seconds.
        max_retry_s: Longest pause, in seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        say: Callable[[str], None] | None = None,
        retry_s: float = 5.0,
        max_retry_s: float = 60.0,
    ) -> None:
        self._tracker = tracker
        self._say_to = say if say is not None else _warn
        self._retry_s = retry_s
        self._max_retry_s = max_retry_s
        self._wake = threading.Condition()
        self._study: StudyRecord | None = None
        self._thread: threading.Thread | None = None
        self._opened = False
        self._trials: dict[int, Trial] = {}
        self._artifacts: dict[tuple[Path, str], None] = {}
        self._end: str | None = None
        self._metrics: Mapping[str, float] = {}
        self._failures: dict[_Item, int] = {}
        self._not_before: dict[_Item, float] = {}
        self._troubled = False
        self._deadline: float | None = None  # Set by close; in time.monotonic().

    # What the driver calls. None of these waits for the tracker, but for close.

    def start(self, study: StudyRecord, trials: Iterable[Trial] = ()) -> None:
        """Open the record in the background.

        Args:
            study: What to record.
            trials: The history so far. Those that the record lacks are written.
        """
        assert self._study is None, "a backlog serves one search"
        self._study = study
        self._trials = {trial.number: trial for trial in trials}
        self._thread = threading.Thread(target=self._deliver, name="nasplat-record", daemon=True)
        self._thread.start()

    def log(self, trial: Trial) -> None:
        """Have the record of this trial brought up to date."""
        with self._wake:
            self._trials[trial.number] = trial
            self._wake.notify()

    def artifact(self, path: Path, folder: str = "") -> None:
        """Have a file, or a folder's files, put with the study's record. They are read when they are delivered."""
        with self._wake:
            self._artifacts[Path(path), folder] = None
            self._wake.notify()

    def end(self, state: str, metrics: Mapping[str, float] | None = None) -> None:
        """Have the study's record closed as ``complete``, ``interrupted`` or ``failed``, when all else is written.

        Args:
            state: One of these.
            metrics: Of the study as a whole.
        """
        with self._wake:
            self._end = state
            self._metrics = metrics or {}
            self._wake.notify()

    def where(self) -> str:
        """One or more lines on where the record is and how to open it."""
        assert self._study is not None, "start comes first"
        return self._tracker.where(self._study)

    def close(self, timeout: float = 30.0) -> int:
        """Try once more to write what is left, and stop.

        Args:
            timeout: Longest time to wait, in seconds.

        Returns:
            How many trials are not known to be written. The next resume writes them.
        """
        with self._wake:
            if self._deadline is None:
                self._deadline = time.monotonic() + timeout
                self._not_before.clear()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(max(0.0, self._deadline - time.monotonic()))
        with self._wake:
            return len(self._trials)

    # The background thread.

    def _deliver(self) -> None:
        while (item := self._wait()) is not None:
            try:
                self._hand_over(item)
            except Exception as error:  # whatever it is, the search must not hear of it
                self._failed(item, error)
            else:
                self._delivered(item)

    def _wait(self) -> _Item | None:
        """The next item that may be tried; None when the thread shall end."""
        with self._wake:
            while True:
                now = time.monotonic()
                if self._deadline is not None and now >= self._deadline:
                    return None
                earliest = float("inf")
                for item in self._left():
                    due = self._not_before.get(item, 0.0)
                    if due <= now:
                        return item
                    earliest = min(earliest, due)
                if self._deadline is not None:  # closing, and everything has had its last try
                    return None
                self._wake.wait(None if earliest == float("inf") else earliest - now)

    def _left(self) -> Iterator[_Item]:
        """What there is to deliver, in this order."""
        if not self._opened:
            yield ("start",)
            return
        for number in self._trials:
            yield ("trial", number)
        for key in self._artifacts:
            yield ("artifact", *key)
        # When closing, the study's end is recorded even if some trial was refused.
        if self._end is not None and (self._deadline is not None or not (self._trials or self._artifacts)):
            yield ("end",)

    def _hand_over(self, item: _Item) -> None:
        assert self._study is not None
        match item:
            case ("start",):
                complete = self._tracker.start(self._study)
                with self._wake:
                    self._opened = True
                    for number in [n for n, trial in self._trials.items() if n in complete and trial.state in FINAL]:
                        del self._trials[number]
            case ("trial", number):
                trial = self._trials[number]
                self._tracker.log(trial)
                with self._wake:
                    if self._trials[number] is trial:  # else a newer state has come meanwhile
                        del self._trials[number]
            case ("artifact", path, folder):
                if path.exists():
                    self._tracker.artifact(path, folder)
                else:
                    self._say(f"{path} is gone, so it is not put with the record")
                with self._wake:
                    self._artifacts.pop((path, folder), None)
            case ("end",):
                state = self._end
                assert state is not None
                if self._metrics:
                    self._tracker.end(state, self._metrics)
                else:
                    self._tracker.end(state)
                with self._wake:
                    if self._end == state:
                        self._end = None

    def _failed(self, item: _Item, error: Exception) -> None:
        with self._wake:
            count = self._failures.get(item, 0)
            self._failures[item] = count + 1
            pause = min(self._retry_s * 2.0 ** min(count, 30), self._max_retry_s)
            if self._deadline is not None:
                pause = float("inf")
            self._not_before[item] = time.monotonic() + pause
            # Whether this one item was refused or the whole record is away: start, tried at once, tells.
            self._opened = False
            troubled, self._troubled = self._troubled, True
        if not troubled:
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            what = {"start": "the study's record", "end": "the end of the study"}.get(item[0], f"{item[0]} {item[-1]}")
            if item[0] == "artifact":
                what = f"{item[1]}"
            self._say(f"{what} cannot be recorded now; the search goes on, and it is tried again ({text})")

    def _delivered(self, item: _Item) -> None:
        with self._wake:
            self._failures.pop(item, None)
            self._not_before.pop(item, None)
            left = self._trials or self._artifacts
            caught_up = self._troubled and self._opened and not left
            if caught_up:
                self._troubled = False
        if caught_up:
            self._say("the record has caught up with the search")

    def _say(self, text: str) -> None:
        # A warning turned into an error, or a closed terminal, must not end the delivery.
        with contextlib.suppress(Exception):
            self._say_to(text)


def _warn(text: str) -> None:
    warnings.warn(text, NasplatWarning, stacklevel=2)
