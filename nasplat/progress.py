"""Live progress of a search: trials done, the best so far, the rate, the time left."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nasplat.errors import NasplatWarning
from nasplat.objectives import Objective
from nasplat.search import Search
from nasplat.strategy import Trial


class Display(Protocol):
    """What the driver tells of a search under way."""

    def begin(self, search: Search, max_trials: int, max_hours: float | None) -> None:
        """The search starts or goes on."""
        ...

    def changed(self, trial: Trial) -> None:
        """A trial started, reported or ended."""
        ...

    def say(self, message: str) -> None:
        """One line for the user."""
        ...

    def end(self) -> None:
        """The search is over or interrupted."""
        ...


class Silent:
    """Shows no progress; what has to be said becomes a warning."""

    def begin(self, search: Search, max_trials: int, max_hours: float | None) -> None:
        """Nothing."""

    def changed(self, trial: Trial) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """A warning."""
        warnings.warn(message, NasplatWarning, stacklevel=2)

    def end(self) -> None:
        """Nothing."""


class Terminal:
    """A bar on a terminal; a line every few seconds where the output is a file or a pipe."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0) -> None:
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False)
        self._every = every_s
        self._bar: Progress | None = None

    def begin(self, search: Search, max_trials: int, max_hours: float | None) -> None:
        """Start counting from what is done already."""
        self._search = search
        self._max_trials = max_trials
        self._hours = max_hours
        self._from = sum(trial.state != "running" for trial in search.history.trials)
        self._done = self._from
        self._failed = sum(trial.state == "failed" for trial in search.history.trials)
        self._best = search.history.best()
        self._began = self._said = time.monotonic()
        # A trial that goes on has taken its time before: the rate counts from here, not from its end.
        self._first: float | None = self._began if search.history.running else None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("trials", total=max_trials, completed=self._worked(), info="")
            self._bar.start()

    def _worked(self) -> int:
        return self._search.worked - len(self._search.history.running)

    def changed(self, trial: Trial) -> None:
        """Show a trial's step, and where the search stands."""
        if self._first is None:
            self._first = time.monotonic()
        if trial.state != "running":
            self._done += 1
            self._failed += trial.state == "failed"
            self._consider(trial)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._worked(), info=self._status(trial))
        elif trial.state != "running" and time.monotonic() - self._said >= self._every:
            self._said = time.monotonic()
            self.say(f"{self._worked()}/{self._max_trials} trials, {self._status(trial)}")

    def _consider(self, trial: Trial) -> None:
        history = self._search.history
        if trial.state != "complete" or not trial.full or history.violation(trial) > 0:
            return
        if any(objective.metric not in trial.metrics for objective in history.objectives):
            return
        if self._best is None or history.losses(trial) < history.losses(self._best):
            self._best = trial

    def _status(self, trial: Trial) -> str:
        parts = []
        if self._best is not None:
            parts.append("best " + _values(self._best, self._search.history.objectives))
        elif trial.reports:
            name, value = next(iter(trial.reports[-1].items()))
            parts.append(f"epoch {len(trial.reports)}: {name} {value:.4g}")
        # From the first trial on: starting workers is no part of the rate.
        spent = time.monotonic() - (self._first or self._began)
        done = self._done - self._from
        if done and spent:
            rate = done / spent
            parts.append(f"{rate * 60:.1f}/min" if rate < 5 else f"{rate:.0f}/s")
            left = (self._max_trials - self._worked()) / rate
            if self._hours is not None:
                left = min(left, self._hours * 3600 - self._search.elapsed)
            parts.append(f"{_duration(max(0.0, left))} left")
        if self._failed:
            parts.append(f"{self._failed} failed")
        return ", ".join(parts)

    def say(self, message: str) -> None:
        """One line, above the bar where there is one."""
        self._console.print(message, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Take the bar away and leave one line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        spent = time.monotonic() - self._began
        done = self._done - self._from
        best = f", best {_values(self._best, self._search.history.objectives)}" if self._best is not None else ""
        failed = f", {self._failed} failed" if self._failed else ""
        copied = sum(trial.copy_of is not None for trial in self._search.history.trials[self._from :])
        copies = f" and {copied} that repeat one" if copied else ""
        why = ""
        if self._best is None and self._failed:
            why = ": " + next(t.reason for t in reversed(self._search.history.trials) if t.state == "failed")
        self.say(f"{done - copied} trials{copies} in {_duration(spent)}{best}{failed}{why}")


def _values(trial: Trial, objectives: Sequence[Objective]) -> str:
    return ", ".join(f"{objective.metric} {trial.metrics[objective.metric]:.4g}" for objective in objectives)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
