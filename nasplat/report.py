"""A study as text: the leaderboard, the front, what went wrong, where it stands. Plain, at most 100 columns wide."""

from __future__ import annotations

import fcntl
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nasplat import journal
from nasplat.result import Result, last_run, restored
from nasplat.strategy import Evaluate, Trial
from nasplat.study import recorded_tracker
from nasplat.tracking import StudyRecord

if TYPE_CHECKING:
    from nasplat.export import ExportReport

WIDTH = 100
"""Columns that a table may take."""

COSTS = ("latency_ms", "params", "ops", "macs", "model_bytes", "train_seconds")
"""Costs that are shown where they were measured and there is room, the most telling first."""

UNITS = {"ms": "ms", "us": "us", "seconds": "s", "s": "s", "bytes": "B", "mj": "mJ", "joules": "J", "watts": "W"}
"""Units by the last part of a metric's name."""

COUNTED = ("params", "macs", "bops", "flops", "ops")
"""Metrics without a unit that are large counts."""

FRONT, OVER, PART = "*", "!", "~"
_LEGEND = {
    FRONT: "on the Pareto front",
    OVER: "breaks a limit",
    PART: "trained in part, ended early, or scored with inherited weights",
}
_SPREAD = "± is the median absolute deviation of one measurement's readings"


def leaderboard(result: Result, limit: int = 10) -> str:
    """The best candidates, best first objective first.

    Candidates that keep the limits and were trained in full come first; the others follow, marked.

    Args:
        result: What to show.
        limit: Rows at most.

    Returns:
        A table with objectives and costs, and what its marks mean.
    """
    history = result.history
    front_numbers = {trial.number for trial in history.front()}
    rows = []
    for trial in history.trials:
        if (
            trial.state not in ("complete", "stopped")
            or not isinstance(trial.proposal, Evaluate)
            or trial.copy_of is not None
            or any(objective.metric not in trial.metrics for objective in history.objectives)
        ):
            continue
        if trial.state == "stopped" or not trial.full:
            mark = PART
        elif history.violation(trial) > 0:
            mark = OVER
        else:
            mark = FRONT if trial.number in front_numbers else ""
        rows.append((mark in (OVER, PART), history.losses(trial), trial.number, mark, trial))
    rows.sort(key=lambda row: row[:3])
    if not rows:
        return "No candidate has been evaluated yet." if not history.trials else "No candidate has every objective."
    shown = rows[:limit]
    lines = [_table(result, [row[4] for row in shown], [row[3] for row in shown])]
    marks = [f"{mark} {_LEGEND[mark]}" for mark in _LEGEND if any(row[3] == mark for row in shown)]
    if "±" in lines[0]:
        marks.append(_SPREAD)
    if marks:
        lines.append("; ".join(marks))
    if len(rows) > limit:
        lines.append(f"{len(rows) - limit} more")
    return "\n".join(lines)


def front(result: Result, limit: int = 20) -> str:
    """The candidates that no other feasible candidate dominates, best first objective first.

    Args:
        result: What to show.
        limit: Rows at most.

    Returns:
        A table, or a sentence where there is no such candidate.
    """
    trials = result.history.front()
    if not trials:
        return "No candidate was trained in full and keeps the limits."
    table = _table(result, trials[:limit], None)
    return table if len(trials) <= limit else f"{table}\n{len(trials) - limit} more"


def counts(result: Result) -> str:
    """How many trials there are by state, and why some were refused or failed, like reasons together.

    Trials that an interrupted study has begun are unfinished: a resume runs them first.
    """
    trials = result.trials
    running = "running" if _holder(result.folder) else "unfinished"
    names = {"running": running}
    states = Counter("copied" if trial.copy_of is not None else names.get(trial.state, trial.state) for trial in trials)
    order = ("complete", running, "infeasible", "stopped", "copied", "failed")
    said = ", ".join(f"{states[state]} {state}" for state in order if states[state])
    lines = [f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}" + (f": {said}" if said else "")]
    for state in ("infeasible", "failed"):
        alike: dict[str, list[Trial]] = {}
        for trial in trials:
            if trial.state == state and trial.copy_of is None:
                alike.setdefault(re.sub(r"\d[\d.,e+-]*", "#", trial.reason), []).append(trial)
        for same in sorted(alike.values(), key=len, reverse=True):
            numbers = ", ".join(str(trial.number) for trial in same[:5]) + (", ..." if len(same) > 5 else "")
            label = "trial" if len(same) == 1 else "trials"
            example = "" if len(same) == 1 else "e.g. "
            lines.append(f"  {state}: {len(same)} ({label} {numbers}), {example}{same[0].reason or 'no reason given'}")
    return "\n".join(lines)


def status(folder: str | Path) -> str:
    """Whether a study is complete, running or interrupted, and how to go on with it.

    Args:
        folder: The study's folder.
    """
    path = Path(folder)
    holder = _holder(path)
    if holder:
        return f"running (process {holder})"
    events, _ = journal.read(path)
    last = last_run(events)
    own = [
        part for part in ("space", "strategy", "task") if events and restored(events[0].get(part), lambda: None) is None
    ]
    if own:
        how = f"to go on, run the script that made it: it has the {' and the '.join(own)}"
    elif last.get("state") == "complete":
        how = f"for more trials: nasplat resume {shlex.quote(str(path))} --trials N"
    else:
        how = f"to go on: nasplat resume {shlex.quote(str(path))}"
    if not last:
        stand = "not run yet"
    elif last["event"] == "session":
        stand = "interrupted (its process was killed)"
    elif last["state"] == "complete":
        stand = "complete" + (f": {last['over']}" if last.get("over") else "")
    else:
        stand = "interrupted" if last["state"] == "interrupted" else "ended by an error"
    return f"{stand}; {how}"


def exported(report: ExportReport) -> str:
    """What an export wrote, how each file compares with the network, and the metrics of the test split."""
    lines = [f"{report.folder}: architecture {report.architecture.id}"]
    lines += [f"  {file.explain()}" for file in report.files]
    tests = [f"{name} {_number(value)}" for name, value in report.metrics.items() if name.startswith("test_")]
    lines.append("  on the test split: " + ", ".join(tests) if tests else "  the task has no test split")
    return "\n".join(lines)


def _holder(folder: Path) -> str:
    """The process that holds a study's folder; "" where none does."""
    lock = folder / journal.LOCK
    if not lock.exists():
        return ""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return file.read().strip() or "unknown"
        fcntl.flock(file, fcntl.LOCK_UN)
    return ""


class _Column(NamedTuple):
    header: str
    cells: list[str]
    right: bool = True

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.header, *self.cells)) + 3  # padding left and right, and the gap


def _table(result: Result, trials: Sequence[Trial], marks: Sequence[str] | None) -> str:
    """Rank, trial, objectives, costs and architecture; costs that find no room are left out."""
    history = result.history
    wanted = [objective.metric for objective in history.objectives]
    wanted += [constraint.metric for constraint in history.constraints]
    metrics = [name for name in dict.fromkeys((*wanted, *COSTS)) if any(name in trial.metrics for trial in trials)]
    columns = [
        _Column("", [str(rank) for rank in range(1, len(trials) + 1)]),
        _Column("trial", [str(trial.number) for trial in trials]),
    ]
    if marks is not None and any(marks):
        columns.append(_Column("", list(marks), right=False))
    last = _Column("architecture", [trial.architecture.id for trial in trials if trial.architecture], right=False)
    room = WIDTH - sum(column.width for column in (*columns, last))
    for name in metrics:
        header, show = _format(name, trials)
        column = _Column(header, [show(trial) for trial in trials])
        if column.width <= room:
            columns.append(column)
            room -= column.width
    columns.append(last)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(Text(column.header), justify="right" if column.right else "left", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell) for cell in row))
    return plain(table)


def plain(table: Table) -> str:
    """A rich table as text without colours, at most :data:`WIDTH` columns wide."""
    stream = StringIO()
    Console(file=stream, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _format(name: str, trials: Sequence[Trial]) -> tuple[str, Callable[[Trial], str]]:
    """A metric's header, with its unit, and how to write a trial's value."""
    values = [trial.metrics[name] for trial in trials if name in trial.metrics]
    stem, _, suffix = name.rpartition("_")
    unit = UNITS.get(suffix.lower(), "") if stem else ""
    if unit == "B":
        scale, unit = next(
            ((10.0**power, label) for power, label in ((9, "GB"), (6, "MB"), (3, "kB")) if max(values) >= 10.0**power),
            (1.0, "B"),
        )
        largest = max(values) / scale
        decimals = 0 if unit == "B" or largest >= 100 else 1 if largest >= 10 else 2
        return f"{stem} [{unit}]", _show(name, lambda value: f"{value / scale:.{decimals}f}")
    header = f"{stem} [{unit}]" if unit else name
    if name in COUNTED:
        return header, _show(name, _count)
    if suffix in ("accuracy", "f1", "precision", "recall"):
        return header, _show(name, lambda value: f"{value:.4f}")
    return header, _show(name, _number)


def _show(name: str, number: Callable[[float], str]) -> Callable[[Trial], str]:
    def show(trial: Trial) -> str:
        if name not in trial.metrics:
            return "-"
        spread = trial.metrics.get(f"{name}_mad")
        return number(trial.metrics[name]) if spread is None else _spread(trial.metrics[name], spread)

    return show


def _spread(value: float, spread: float) -> str:
    """A value and its spread, to the spread's first digit."""
    if not spread > 0:
        return f"{_number(value)} ±0"
    decimals = min(6, max(0, -math.floor(math.log10(spread))))
    return f"{value:.{decimals}f} ±{spread:.{decimals}f}"


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def _count(value: float) -> str:
    """A large count to three digits: 12.3k, 1.20M."""
    for power, label in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10.0**power:
            scaled = value / 10.0**power
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{label}"
    return _number(value)


def record(folder: str | Path) -> str:
    """Where the MLflow record of a study is and how to open it; "" where there is none.

    A server that ``MLFLOW_TRACKING_URI`` names is not asked.

    Args:
        folder: The study's folder.

    Raises:
        FolderError: There is no study in the folder.
    """
    path = Path(folder).resolve()
    events, _ = journal.read(path)
    tracker = recorded_tracker(events) if events else None
    return "" if tracker is None else tracker.where(StudyRecord(str(events[0]["id"]), path.name, Path(folder), {}, {}))
