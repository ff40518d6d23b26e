"""A study as text: the leaderboard, the front, what went wrong, where it stands. Plain, at most 100 columns wide."""

from __future__ import annotations

import fcntl
import json
import math
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nasplat import journal
from nasplat.cost.predicted import prediction_quality
from nasplat.errors import InvalidInputError
from nasplat.quantities import UNITS, duration, quantity, unit_of
from nasplat.result import Result, last_run, restored
from nasplat.strategy import Evaluate, Trial
from nasplat.study import recorded_tracker
from nasplat.tracking import StudyRecord
from nasplat.uncertainty import CONFIDENCE, Member, estimate, is_predicted, validation_examples
from nasplat.worker import SAMPLES, trial_folder

if TYPE_CHECKING:
    from nasplat.export import ExportReport

WIDTH = 100
"""Columns that a table may take."""

COSTS = ("latency_ms", "latency_ms_speedup_fp32", "params", "ops", "macs", "model_bytes", "train_seconds")
"""Costs that are shown where they were measured and there is room, the most telling first."""

COUNTED = ("params", "macs", "bops", "flops", "ops")
"""Metrics without a unit that are large counts."""

TIES = 6
"""Sets of tied candidates that are written out for an objective."""

FRONT, OVER, PART, SUSPECT, SLOW, TABLE, MAYBE = "*", "!", "~", "?", "=", "p", "o"
_LEGEND = {
    FRONT: "on the Pareto front",
    MAYBE: "may be on it",
    OVER: "breaks a limit",
    PART: "trained in part, ended early, or scored with inherited weights",
    SUSPECT: "the machine was disturbed while it was measured: a rough value",
    TABLE: "a cost was predicted from a table, not measured",
    SLOW: "binary, and not faster than the same network in float32 and int8",
}
_SPREAD = "± is the median absolute deviation of one measurement's readings"
_ERROR = "± is the standard error"


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
    marks = [row[3] + _cost_marks(row[4]) for row in shown]
    lines = [_table(result, [row[4] for row in shown], marks)]
    lines += _legend(marks, _SPREAD if "±" in lines[0] else "")
    if len(rows) > limit:
        lines.append(f"{len(rows) - limit} more")
    return "\n".join(lines + _predictions(result))


def _predictions(result: Result) -> list[str]:
    """How good the predictions of a study were, a line a metric."""
    said = []
    checked = (name for trial in result.trials for name in trial.metrics if name.endswith("_prediction_error"))
    for metric in dict.fromkeys(name.removesuffix("_prediction_error") for name in checked):
        if (found := prediction_quality(result.trials, metric)) is not None:
            said += _wrapped(
                f"predictions of {metric}, over {found.n} candidates that were measured as well: median error "
                f"{found.median_relative_error:.1%}, Kendall's tau {found.kendall_tau:.2f}"
            )
    return said


def front(result: Result, limit: int = 20, confidence: float = CONFIDENCE) -> str:
    """The candidates that no other feasible candidate dominates, or may not, best first objective first.

    Where the objectives have errors (:mod:`nasplat.uncertainty`), they are shown, with each candidate's probability to
    be on the front, candidates that may be on it, and ties. Where there is no room for all rows, those that are on the
    front as measured come before those that may be on it.

    Args:
        result: What to show.
        limit: Rows at most.
        confidence: At which a difference counts, in (0, 1).

    Returns:
        A table, or a sentence where there is no such candidate.
    """
    found = result.uncertain_front(confidence)
    if not found.members:
        return "No candidate was trained in full and keeps the limits."
    likely = sorted(found.members, key=lambda member: (not member.on_front, -member.probability))[:limit]
    chosen = {member.number for member in likely}
    shown = [member for member in found.members if member.number in chosen]
    marks = [("" if member.on_front else MAYBE) + _cost_marks(member.trial) for member in shown]
    lines = [_table(result, [member.trial for member in shown], marks, shown if found.uncertain else None)]
    lines += _legend(marks, f"{_ERROR}, P the probability to be on the front" if found.uncertain else "")
    if len(found.members) > limit:
        left = [member.on_front for member in found.members if member.number not in chosen]
        lines.append(f"{len(left)} more" + ("" if any(left) else ", which may be on it"))
    if found.uncertain:
        for objective in found.objectives:
            lines += _tied(objective.metric, replace(found, members=tuple(shown)).groups(objective.metric), confidence)
        several = [member for member in shown if len(member.replicates) > 1]
        if several:
            said = "; ".join(f"{member.number}: {_listed(member.replicates)}" for member in several)
            lines += _wrapped(f"means over trials of one architecture: {said}")
    return "\n".join(lines)


def _tied(metric: str, groups: Sequence[Sequence[int]], confidence: float) -> list[str]:
    """What cannot be told apart in one objective. Ties are not transitive, so groups may overlap."""
    if not groups:
        return []
    said = "; ".join(_listed(group) for group in groups[:TIES])
    said += f"; and {len(groups) - TIES} more sets" if len(groups) > TIES else ""
    return _wrapped(f"tied in {metric} ({confidence:.0%}): {said}")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _legend(marks: Sequence[str], more: str) -> list[str]:
    said = [f"{mark} {meaning}" for mark, meaning in _LEGEND.items() if any(mark in shown for shown in marks)]
    return _wrapped("; ".join([*said, *([more] if more else [])]))


def _cost_marks(trial: Trial) -> str:
    """Marks of a trial whose measured costs need a word."""
    # Not where only the twin of a binary network is: its own numbers are good.
    twins = ("_fp32", "_int8", "_fp32_suspect", "_int8_suspect")
    suspect = any(not name.endswith(twins) for name, _ in _suspicions(trial)) or any(
        name.endswith("_suspect") and not name.endswith(twins) and value for name, value in trial.metrics.items()
    )
    slow = any(name.endswith("_not_faster") and value > 0 for name, value in trial.metrics.items())
    predicted = any(
        is_predicted(name.removesuffix("_predicted"), trial) for name in trial.metrics if name.endswith("_predicted")
    )
    return SUSPECT * suspect + TABLE * predicted + SLOW * slow


def _suspicions(trial: Trial) -> Iterator[tuple[str, str]]:
    """Measurements that are not to be trusted, with the reason."""
    for name, fact in trial.facts.items():
        if isinstance(fact, Mapping) and fact.get("suspect"):
            yield name, str(fact["suspect"])


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


def trial(result: Result, number: int) -> str:
    """All that is known of one trial: genes, metrics with their errors, twins, and how each was measured.

    Args:
        result: The study.
        number: The trial's.

    Raises:
        InvalidInputError: There is no such trial.
    """
    if not 0 <= number < len(result.trials):
        raise InvalidInputError(f"there is no trial {number}; legal: 0 to {len(result.trials) - 1}")
    one = result.trials[number]
    state = one.state if one.copy_of is None else f"copy of trial {one.copy_of}"
    name = type(one.proposal).__name__.lower() if one.architecture is None else f"architecture {one.architecture.id}"
    spent = "" if one.finished is None else f", {duration(one.finished - one.started)}"
    lines = [f"trial {number}, {name}: {state}{spent}"]
    if isinstance(one.proposal, Evaluate) and one.proposal.budget != 1.0:
        lines.append(f"  trained with {one.proposal.budget:g} of the epochs")
    lines += [f"  {mark} {meaning}" for mark, meaning in _LEGEND.items() if mark in _cost_marks(one)]
    lines += [f"  {one.reason}"] if one.reason else []
    if one.architecture is not None:
        lines += ["", "genes", *_rows({key: _brief(value) for key, value in one.architecture.genes.items()})]
    if one.metrics:
        lines += ["", "metrics", *_rows(_measured(result, one))]
    for name, fact in one.facts.items():
        if isinstance(fact, Mapping):
            lines += ["", f"measurement of {name}", *_rows({key: _brief(value) for key, value in fact.items()})]
    if single := {name: _brief(fact) for name, fact in one.facts.items() if not isinstance(fact, Mapping)}:
        lines += ["", "facts", *_rows(single)]
    if readings := result.samples(one):
        of = number if one.copy_of is None else one.copy_of
        count = sum(len(values) for name, values in readings.items() if not name.endswith("_block"))
        lines += ["", f"all {count} readings: {trial_folder(result.folder, of) / SAMPLES}"]
    return "\n".join(lines)


_PARTS = {"_mad": "MAD", "_p95": "95 % take at most", "_block_sd": "sd of blocks", "_samples": "readings"}
"""Metrics that belong to a measured one, by the end of their name."""


def _measured(result: Result, one: Trial) -> dict[str, str]:
    """Each metric with its standard error; what describes a measured one on its line, twins below it."""
    metrics = one.metrics
    timed = [name for name in metrics if f"{name}_block_sd" in metrics]
    belongs = {f"{name}{part}" for name in timed for part in (*_PARTS, "_suspect", "_not_faster")}
    twins = {
        name: [key.partition("_speedup_")[2] for key in metrics if key.startswith(f"{name}_speedup_")] for name in timed
    }
    belongs |= {f"{name}{part}{twin}" for name in timed for twin in twins[name] for part in ("_", "_speedup_")}
    examples, readings = validation_examples(result.task), result.samples(one)
    rows = {}
    for name in metrics:
        if name in belongs:
            continue
        rows[name] = _estimated(name, one, readings, examples)
        if name in timed:
            said = [
                f"{label} {_number(value) if part == '_samples' else quantity(name, value)}"
                for part, label in _PARTS.items()
                if (value := metrics.get(name + part)) is not None
            ]
            rows[name] += f"; {', '.join(said)}"
            for twin in twins[name]:
                faster = _estimated(f"{name}_speedup_{twin}", one, readings, examples)
                rows[f"  {twin}"] = f"{_estimated(f'{name}_{twin}', one, readings, examples, name)}; speed-up {faster}"
    return rows


def _estimated(
    name: str, one: Trial, readings: Mapping[str, Sequence[float]], examples: int | None, like: str = ""
) -> str:
    """A value with its standard error and unit, which is that of ``like`` where the name does not say."""
    if name not in one.metrics:
        return "-"
    found, like = estimate(name, [one], lambda _: readings, examples), like or name
    unit = unit_of(like)
    if not found.error:
        return quantity(like, found.value) if unit else _number(found.value)
    scale, unit = (1e3, "kB") if unit == "B" and found.value >= 1e4 else (1.0, unit)
    return f"{_spread(found.value / scale, found.error / scale, digits=2)} {unit}".rstrip()


def _rows(values: Mapping[str, str]) -> list[str]:
    width = max((len(name) for name in values), default=0)
    return [
        line
        for name, value in values.items()
        for line in textwrap.wrap(
            value or "-",
            max(WIDTH, width + 40),
            initial_indent=f"  {name:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _brief(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


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


def _table(
    result: Result, trials: Sequence[Trial], marks: Sequence[str], members: Sequence[Member] | None = None
) -> str:
    """Rank, trial, objectives, costs and architecture; costs that find no room are left out.

    With the members of a front, their standard errors stand instead of the spread of readings, and probabilities.
    """
    history = result.history
    errors = {
        (member.number, name): one.error for member in members or () for name, one in member.estimates.items()
    }  # fmt: skip
    wanted = [objective.metric for objective in history.objectives]
    wanted += [constraint.metric for constraint in history.constraints]
    metrics = [name for name in dict.fromkeys((*wanted, *COSTS)) if any(name in trial.metrics for trial in trials)]
    columns = [
        _Column("", [str(rank) for rank in range(1, len(trials) + 1)]),
        _Column("trial", [str(trial.number) for trial in trials]),
    ]
    if any(marks):
        columns.append(_Column("", list(marks), right=False))
    if members is not None:
        columns.append(_Column("P", [_probability(member.probability) for member in members]))
    last = _Column("architecture", [trial.architecture.id for trial in trials if trial.architecture], right=False)
    room = WIDTH - sum(column.width for column in (*columns, last))
    for name in metrics:
        header, show = _format(name, trials, None if members is None else errors)
        column = _Column(header, [show(trial) for trial in trials])
        if column.width <= room or name in wanted:
            columns.append(column)
            room -= column.width
    if room >= 0:
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


Errors: TypeAlias = Mapping[tuple[int, str], float | None]
"""Standard errors by trial and metric."""


def _format(name: str, trials: Sequence[Trial], errors: Errors | None) -> tuple[str, Callable[[Trial], str]]:
    """A metric's header, with its unit, and how to write a trial's value."""
    values = [trial.metrics[name] for trial in trials if name in trial.metrics]
    unit = unit_of(name)
    stem, _, suffix = name.rpartition("_")
    if unit == "B":
        scale, unit = next(
            ((10.0**power, label) for power, label in ((9, "GB"), (6, "MB"), (3, "kB")) if max(values) >= 10.0**power),
            (1.0, "B"),
        )
        largest = max(values) / scale
        decimals = 0 if unit == "B" or largest >= 100 else 1 if largest >= 10 else 2
        return f"{stem} [{unit}]", _show(name, lambda value: f"{value / scale:.{decimals}f}", errors, scale)
    if "_speedup_" in name:
        return f"{name.partition('_speedup_')[2]} speed-up", _show(name, lambda value: f"{value:.2f}x", errors)
    header = f"{stem if suffix in UNITS else name.replace('_per_s', '')} [{unit}]" if unit else name
    if name in COUNTED:
        return header, _show(name, _count, errors)
    if suffix in ("accuracy", "f1", "precision", "recall"):
        return header, _show(name, lambda value: f"{value:.4f}", errors)
    return header, _show(name, _number, errors)


def _show(
    name: str, number: Callable[[float], str], errors: Errors | None, scale: float = 1.0
) -> Callable[[Trial], str]:
    def show(trial: Trial) -> str:
        if name not in trial.metrics:
            return "-"
        value = trial.metrics[name]
        if errors is None:
            spread = trial.metrics.get(f"{name}_mad")
            return number(value) if spread is None else _spread(value, spread)
        error = errors.get((trial.number, name))
        return _spread(value / scale, error / scale, digits=2) if error else number(value)

    return show


def _probability(value: float) -> str:
    return "1" if value == 1 else f"{min(value, 0.99):.2f}"


def _spread(value: float, spread: float, digits: int = 1) -> str:
    """A value and its spread, to so many digits of the spread."""
    if not spread > 0:
        return f"{_number(value)} ±0"
    decimals = min(6, max(0, digits - 1 - math.floor(math.log10(spread))))
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
