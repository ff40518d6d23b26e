"""One study as a comparison needs it: what it had found, and spent, when each of its trials ended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nasplat import journal
from nasplat.compare.budget import COST, Budget
from nasplat.compare.curves import best_so_far
from nasplat.compare.statistics import Floats
from nasplat.errors import UnsupportedError
from nasplat.objectives import Constraint, Objective, constraint_from_json, hypervolume
from nasplat.result import Candidate, Result, header_of
from nasplat.strategy import Evaluate, History, Trial

COLUMNS = ("trial", "evaluation", "whole", "ended", "busy", "training", "measuring", "charged", "held_out")


@dataclass(frozen=True)
class Account:
    """Where the time of one or more studies went, in seconds of one worker.

    Attributes:
        evaluations: Trials that were worked on.
        training: Sum of ``train_seconds``.
        measuring: Sum of ``measure_seconds``.
        scheduling: One worker: everything else (proposing, building, saving, the journal). Several: the part of the
            trials' time that is neither training nor measuring (handing out, building, saving).
        idle: Several workers: workers times wall-clock, less the time that trials ran; the strategy's own time, in
            which nothing could be handed out, is part of it. One worker: 0.
        wall: Wall-clock of searching.
        workers: Trials at a time.
        simulated: Whether the trials' metrics name more seconds than the trials took, as where results are looked up
            in a table: ``training`` and ``measuring`` are then the table's, and all else this machine's.
    """

    evaluations: int
    training: float
    measuring: float
    scheduling: float
    idle: float
    wall: float
    workers: int
    simulated: bool


@dataclass(frozen=True, eq=False)
class Trace:
    """What one study had found, and spent, when each of its trials ended.

    Attributes:
        seed: The study's.
        study: Its id, by which its record is known.
        folder: Where it lies.
        workers: Trials at a time.
        over: Why its last run ended; "" where it was killed.
        trials: A row a trial that ended, in the order of ending. ``trial``: its number; ``evaluation``: trials worked
            on so far; ``whole``: evaluated in full, not stopped; ``ended``: seconds of searching; ``busy``: seconds
            that it ran; ``training``, ``measuring``: as it recorded; ``charged``: the budget's metrics, summed so far;
            ``held_out``: the metric to report; then each objective's metric, NaN where the trial does not count
            (failed, infeasible, in part, a copy).
    """

    seed: int
    study: str
    folder: str
    workers: int
    over: str
    trials: pd.DataFrame

    @property
    def evaluations(self) -> int:
        """Trials that were worked on and ended."""
        return 0 if self.trials.empty else int(self.trials["evaluation"].iloc[-1])

    @property
    def spent(self) -> float:
        """All that was charged."""
        return 0.0 if self.trials.empty else float(self.trials["charged"].iloc[-1])

    @property
    def exhausted(self) -> bool:
        """Whether the search ended because there was nothing more to evaluate: more budget would change nothing."""
        return bool(self.over) and not re.match(r"max_hours|max_proposals|\d+ of \d+ trials are done", self.over)

    def capped(self, budget: Budget) -> bool:
        """Whether the search ended because it had proposed all the candidates that the budget allows."""
        reached = re.match(r"max_proposals: (\d+)", self.over)
        return reached is not None and int(reached[1]) >= budget.proposals

    def complete(self, budget: Budget) -> bool:
        """Whether the study used the budget up, or ended by itself or by the budget's limit on proposals before."""
        return self.exhausted or self.capped(budget) or self.used(budget)

    def used(self, budget: Budget) -> bool:
        """Whether the study used the budget up."""
        if self.evaluations == 0:
            return False
        match budget.kind:
            case "evaluations":
                return self.evaluations >= budget.amount
            case "hours":
                limit = budget.amount * 3600
                reached = re.match(r"max_hours: .* of (.*) hours", self.over)
                within = reached is not None and float(reached[1]) * (1 + 1e-5) >= budget.amount
                return within or float(self.trials["ended"].iloc[-1]) >= limit
        return self.spent >= budget.amount

    def within(self, budget: Budget) -> pd.DataFrame:
        """The rows of ``trials`` that ended within a budget."""
        column, limit = {
            "evaluations": ("evaluation", budget.amount),
            "hours": ("ended", budget.amount * 3600),
            "charged": ("charged", budget.amount * (1 + 1e-12)),
        }[budget.kind]
        return self.trials[self.trials[column] <= limit]

    def account(self, budget: Budget) -> Account:
        """Where the time went, within a budget."""
        rows = self.within(budget)
        training, measuring, busy = (float(rows[name].sum()) for name in ("training", "measuring", "busy"))
        wall = float(rows["ended"].max()) if len(rows) else 0.0
        simulated = training + measuring > 1.001 * busy + 0.01 * len(rows)
        known = 0.0 if simulated else training + measuring
        alone = self.workers <= 1
        return Account(
            evaluations=0 if rows.empty else int(rows["evaluation"].iloc[-1]),
            training=training,
            measuring=measuring,
            scheduling=max(0.0, (wall if alone else busy) - known),
            idle=0.0 if alone else max(0.0, self.workers * wall - busy),
            wall=wall,
            workers=max(1, self.workers),
            simulated=simulated,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values; NaN becomes null."""
        columns = {
            str(name): [None if pd.isna(value) else value for value in self.trials[name].tolist()]
            for name in self.trials
        }
        return {
            "seed": self.seed,
            "study": self.study,
            "folder": self.folder,
            "workers": self.workers,
            "over": self.over,
            "trials": columns,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Trace:
        """The trace of :meth:`to_json`."""
        whole: dict[str, type] = {"trial": int, "evaluation": int, "whole": bool}
        columns: dict[str, NDArray[Any]] = {
            name: np.array([np.nan if value is None else value for value in values], dtype=whole.get(name, float))
            for name, values in record["trials"].items()
        }
        return cls(**{**record, "trials": pd.DataFrame(columns)})


def trace_of(result: Result, *, metrics: Sequence[str] = COST, report: str | None = None) -> Trace:
    """The trace of a study's folder.

    Args:
        result: What was found.
        metrics: What is charged.
        report: A metric that is to be reported for the pick, besides the objectives.
    """
    events, _ = journal.read(result.folder)
    header = header_of(events, result.folder)
    runs = [event["run"] for event in events if event["event"] == "session" and "max_trials" in event["run"]]
    history = result.history
    names = [objective.metric for objective in history.objectives]
    rows: list[list[Any]] = []
    evaluation, charged = 0, 0.0
    for trial in history.finished():
        copied = trial.copy_of is not None
        busy = 0.0 if copied or trial.finished is None else trial.finished - trial.started
        evaluation += trial.state != "infeasible" and not copied
        found = {} if copied else trial.metrics
        known = [found[name] for name in metrics if name in found]
        charged += busy if trial.state == "failed" and not known else sum(known)
        counts = _counts(history, trial)
        rows.append(
            [
                trial.number,
                evaluation,
                (trial.full and trial.state != "stopped") or trial.state == "infeasible" or copied,
                trial.finished,
                busy,
                found.get("train_seconds", 0.0),
                found.get("measure_seconds", 0.0),
                charged,
                trial.metrics.get(report, np.nan) if report and counts else np.nan,
                *(trial.metrics[name] if counts else np.nan for name in names),
            ]
        )
    # An objective may be reported too, and have the name of a column: by position, not by name.
    table = pd.DataFrame(rows, columns=[*COLUMNS, *(f"objective.{name}" for name in names)])
    return Trace(
        seed=header["seed"],
        study=header["id"],
        folder=str(result.folder),
        workers=int(runs[-1]["workers"]) if runs else 0,
        over=result.over,
        trials=table,
    )


def _counts(history: History, trial: Trial) -> bool:
    """Whether a trial may be the best: a full, feasible evaluation with every objective."""
    return (
        trial.state == "complete"
        and isinstance(trial.proposal, Evaluate)
        and trial.full
        and trial.copy_of is None
        and all(objective.metric in trial.metrics for objective in history.objectives)
        and history.violation(trial) == 0.0
    )


def first_objective(rows: pd.DataFrame) -> Floats:
    """The first objective's metric of each row, NaN where the trial does not count."""
    values: Floats = rows.iloc[:, len(COLUMNS)].to_numpy(dtype=np.float64)
    return values


def pick(rows: pd.DataFrame, objective: Objective) -> int | None:
    """The row (by position) that a user would take: the best first objective; the earliest of equal ones."""
    values = first_objective(rows)
    if np.isnan(values).all():
        return None
    return int(np.nanargmax(values) if objective.direction == "maximise" else np.nanargmin(values))


def with_held_out(trace: Trace, result: Result, budget: Budget, report: str) -> Trace:
    """The trace with the pick's metric on the test split, where the trial itself does not have it.

    The pick's kept weights are scored (:meth:`nasplat.result.Candidate.test`); where there are none, NaN stays.
    """
    rows = trace.within(budget)
    best = pick(rows, result.history.objectives[0])
    if best is None or not report.startswith("test_") or not np.isnan(rows["held_out"].iloc[best]):
        return trace
    try:
        scores = Candidate(result, result.trials[int(rows["trial"].iloc[best])]).test()
    except UnsupportedError:
        return trace
    trials = trace.trials.copy()
    trials.loc[rows.index[best], "held_out"] = scores.get(report, np.nan)
    return Trace(trace.seed, trace.study, trace.folder, trace.workers, trace.over, trials)


def score_curve(rows: pd.DataFrame, objectives: Sequence[Objective], reference: Sequence[float] | None) -> Floats:
    """What had been found when each row's trial ended.

    Args:
        rows: Of :attr:`Trace.trials`.
        objectives: The study's.
        reference: In the metrics' units: the hypervolume that the front so far dominates; None: the best first
            objective so far.

    Returns:
        ``(rows,)``. The best is NaN before the first trial that counts; the hypervolume is 0.
    """
    if reference is None:
        return best_so_far(first_objective(rows), direction=objectives[0].direction)
    signs = np.array([-1.0 if objective.direction == "maximise" else 1.0 for objective in objectives])
    losses = rows.iloc[:, len(COLUMNS) :].to_numpy(dtype=np.float64) * signs
    corner = np.asarray(reference, dtype=np.float64) * signs
    curve = np.zeros(len(rows))
    kept: list[list[float]] = []
    volume = 0.0
    for index, row in enumerate(losses):
        if not np.isnan(row).any() and not any((np.array(other) <= row).all() for other in kept):
            kept = [other for other in kept if not (row <= np.array(other)).all()] + [row.tolist()]
            volume = hypervolume(kept, corner.tolist())
        curve[index] = volume
    return curve


@dataclass(frozen=True)
class Terms:
    """What studies must have in common to be compared, as JSON values.

    Attributes:
        space: Identity of the space.
        task: Description of the task.
        objectives: Each with metric and direction.
        constraints: Each with metric, bound and sense.
    """

    space: str
    task: Any
    objectives: Any
    constraints: Any

    @classmethod
    def of(cls, result: Result) -> Terms:
        """The terms of a study's folder, as its last run had them."""
        events, _ = journal.read(result.folder)
        header = header_of(events, result.folder)
        wishes = [event for event in events if event["event"] in ("study", "session")][-1]
        return cls(header["space_identity"], header["task"], wishes["objectives"], wishes["constraints"])

    def made(self) -> tuple[tuple[Objective, ...], tuple[Constraint, ...]]:
        """Objectives and constraints as objects."""
        return (
            tuple(Objective(**objective) for objective in self.objectives),
            tuple(limit for limit in map(constraint_from_json, self.constraints) if isinstance(limit, Constraint)),
        )
