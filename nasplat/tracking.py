"""The record that people compare in: what a tracker is, and the backlog that keeps a slow or absent one from stopping
a search. The journal, not the tracker, is the truth that a resume reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nasplat.strategy import Trial


@dataclass(frozen=True)
class StudyRecord:
    """What a tracker says of a study.

    Attributes:
        id: Made once, when the folder was; a resumed study has the same.
        name: The folder's last part.
        folder: Where the journal lies.
        parameters: Flat: space, strategy, task, seed, objectives, constraints, meters.
        tags: Names of space and strategy, versions, git commit.
        descriptions: JSON descriptions by name (space, strategy, task), for an artifact.
    """

    id: str
    name: str
    folder: Path
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    descriptions: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """Where a study is recorded. Called by one thread of the driver only, and may raise: what fails is tried again."""

    def start(self, study: StudyRecord, trials: int) -> None:
        """Open the study's record, or go on with the one that has its id. Safe to call again after it raised.

        Args:
            study: What to record.
            trials: How many trials the history holds already (0 for a fresh study).
        """
        ...

    def log(self, trial: Trial) -> None:
        """Bring the record of one trial up to date: create it, add its new epochs, end it. Safe to call again."""
        ...

    def artifact(self, path: Path, folder: str = "") -> None:
        """Put a file, or a folder's files, with the study's record, under ``folder``."""
        ...

    def end(self, state: str) -> None:
        """Close the study's record as ``complete``, ``interrupted`` or ``failed``. A resume opens it again."""
        ...

    def where(self) -> str:
        """One or more lines on where the record is and how to open it."""
        ...
