"""What a search found: tables, the front, the best network and its export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from nasplat import front_figure, journal
from nasplat.architecture import Architecture
from nasplat.drawing import Picture
from nasplat.errors import FolderError, InvalidInputError, JournalError, UnsupportedError
from nasplat.identity import restore
from nasplat.objectives import Constraint, Objective, constraint_from_json
from nasplat.restorable import restorable
from nasplat.search import Search
from nasplat.space import Option, SearchSpace
from nasplat.strategy import Evaluate, History, Trial
from nasplat.task import Task
from nasplat.train import evaluate
from nasplat.uncertainty import CONFIDENCE, UncertainFront, uncertain_front, validation_examples
from nasplat.worker import SAMPLES, phase_of, trial_folder

if TYPE_CHECKING:
    from nasplat.export import ExportReport

HEADER = (
    "id",
    "space",
    "space_identity",
    "strategy",
    "task",
    "seed",
    "objectives",
    "constraints",
    "meters",
    "settings",
)
"""What the first event of a journal must have."""

VERIFY_WITH = 256
"""Real inputs that an exported network is compared on."""


class RecordedSpace(SearchSpace):
    """Stands for a space that only the script that made the study has: reads its architectures, builds none."""

    def __init__(self, recorded: str) -> None:
        self.recorded = recorded

    @property
    def name(self) -> str:
        """The space's name, which its identity begins with."""
        return self.recorded.partition("{")[0]

    @property
    def identity(self) -> str:
        """The identity that the folder recorded."""
        return self.recorded

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """None are known."""
        return {}

    def architecture(self, genes: Mapping[str, Any]) -> Architecture:
        """The architecture of recorded genes."""
        return Architecture(self.recorded, genes)

    def build(self, architecture: Architecture) -> nn.Module:
        """Refused."""
        raise UnsupportedError(
            f"the space {self.recorded} lives in the script that made the study: "
            "pass it, nasplat.load(folder, space=...)"
        )


class Candidate:
    """One evaluated architecture of a study, ready to rebuild and export."""

    def __init__(self, result: Result, trial: Trial) -> None:
        assert trial.architecture is not None
        self.architecture: Architecture = trial.architecture
        self.trial = trial
        self.metrics: Mapping[str, float] = trial.metrics
        self._result = result

    def __repr__(self) -> str:
        shown = {objective.metric: self.metrics[objective.metric] for objective in self._result.history.objectives}
        return f"<trial {self.trial.number}, architecture {self.architecture.id}, {shown}>"

    @property
    def _folder(self) -> Path:
        number = self.trial.number if self.trial.copy_of is None else self.trial.copy_of
        return trial_folder(self._result.folder, number)

    def model(self) -> nn.Module:
        """The trained network, on the CPU, in evaluation mode.

        Raises:
            UnsupportedError: The study's task trains nothing, its weights were not kept, or its space is not known.
        """
        path = self._folder / "weights.safetensors"
        if not path.exists():
            task = self._result.task
            # A task of the user's own script is not known here; what is on the front without weights tells the same.
            front = {trial.number for trial in self._result.history.front()}
            untrained = self.trial.number in front if task is None else task.function is not None
            raise UnsupportedError(
                f"trial {self.trial.number} has no weights: "
                + (
                    "the study's task is a function, which trains nothing here. architecture.to_json() is the result, "
                    "space.build(architecture) its network, untrained"
                    if untrained
                    else "weights are kept for the front; Study(keep_weights='all') keeps them for every trial"
                )
            )
        model = self._result.space.build(self.architecture)
        state = load_file(path)
        if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
            with torch.no_grad():
                model.eval()(self._task().example())
        model.load_state_dict(state)
        if (phase := phase_of(path)) is not None:
            phase.enter(model)
        return model.eval()

    def _task(self) -> Task:
        if self._result.task is None:
            raise UnsupportedError(
                "the study's task lives in the script that made it: pass it, nasplat.load(folder, task=...)"
            )
        return self._result.task

    def test(self) -> dict[str, float]:
        """Metrics on the test split, computed once and kept beside the weights; empty where the task has none."""
        kept = self._folder / "test.json"
        if kept.exists():
            return dict(json.loads(kept.read_text()))
        source = self._task().load().test
        if source is None:
            return {}
        scores = evaluate(self.model(), self._task(), source, "test", torch.device("cpu"), nullcontext)
        kept.write_text(json.dumps(scores))
        return scores

    def draw(self) -> Picture:
        """A picture of the architecture: ``result.best.draw().save("best.svg")``."""
        return self._result.space.draw(self.architecture)

    def export(self, folder: str | Path) -> ExportReport:
        """Write the network in every format, load each again and compare it on real validation inputs.

        The folder gets ``architecture.json``, ``weights.safetensors``, ``model.pt2``, ``model.onnx``, ``model.packed``
        for a binary network, and ``report.json`` with the comparison and the test metrics.

        Raises:
            ExportError: A file, loaded again, does not compute what the model computes.
            FolderError: The folder holds something else.
            UnsupportedError: There are no weights (see :meth:`model`).
        """
        from nasplat.export import export

        model = self.model()
        inputs = self._task().load().validation.first(VERIFY_WITH)
        metrics = {**self.metrics, **self.test()}
        return export(self._result.space, self.architecture, model, inputs, Path(folder), metrics=metrics)


@dataclass(frozen=True)
class Result:
    """What a study found so far.

    Attributes:
        folder: The study's.
        space: The space, or a stand-in that reads its architectures only.
        task: The task; None where only the script that made the study has it.
        history: Every trial.
        over: Why the search ended; "" where it has not, or is not known to have.
    """

    folder: Path
    space: SearchSpace
    task: Task | None
    history: History
    over: str = ""

    def __repr__(self) -> str:
        best = self.history.best()
        shown = "none yet" if best is None else Candidate(self, best)
        return f"<{len(self.history)} trials in {self.folder}, best: {shown}>"

    @property
    def trials(self) -> Sequence[Trial]:
        """Every trial, by number."""
        return self.history.trials

    @property
    def worked(self) -> int:
        """Trials that count against ``max_trials``: all but those refused for a cheap cost, and copies."""
        return sum(trial.state != "infeasible" and trial.copy_of is None for trial in self.trials)

    @property
    def best(self) -> Candidate:
        """The candidate on the front with the best first objective.

        Raises:
            UnsupportedError: No candidate was evaluated in full within the limits.
        """
        trial = self.history.best()
        if trial is None:
            states = pd.Series([trial.state for trial in self.trials], dtype=object).value_counts().to_dict()
            failed = [trial for trial in self.trials if trial.state == "failed"]
            raise UnsupportedError(
                f"no candidate of {self.folder} was evaluated in full and keeps the limits; trials by state: {states}"
                + (f"; trial {failed[-1].number} failed: {failed[-1].reason}" if failed else "")
                + (f"; the search ended because {self.over}" if self.over else "")
            )
        return Candidate(self, trial)

    def candidate(self, number: int) -> Candidate:
        """The candidate of one trial.

        Raises:
            UnsupportedError: There is no such trial, or it is no evaluation of an architecture.
        """
        if not 0 <= number < len(self.trials) or self.trials[number].architecture is None:
            raise UnsupportedError(f"trial {number} is no evaluated architecture; there are {len(self.trials)} trials")
        return Candidate(self, self.trials[number])

    def table(self) -> pd.DataFrame:
        """One row a trial: state, metrics, genes, and what went wrong. Indexed by trial number."""
        return self._rows(self.trials)

    def front(self, confidence: float | None = None, *, examples: int | None = None) -> pd.DataFrame:
        """The rows of :meth:`table` that no other feasible full evaluation dominates, best first objective first.

        With a confidence the values' errors count (:mod:`nasplat.uncertainty`): there is a row for each candidate that
        is on the front as measured (``on_front``), or is on it with a ``front_probability`` of at least
        ``1 - confidence``. Each objective has its standard error, ``<metric>_se`` (NaN where it is not known, which
        counts as 0), and the trials that cannot be told apart in it, ``tied_<metric>``. Several trials of one
        architecture are one row with the means; ``replicates`` names them.

        Args:
            confidence: In (0, 1), such as 0.95; None leaves errors out.
            examples: Size of the validation split; None is what the task has, where that is known.
        """
        if confidence is None:
            return self._rows(self.history.front())
        return self._front_rows(self.uncertain_front(confidence, examples=examples))

    def _front_rows(self, found: UncertainFront) -> pd.DataFrame:
        table = self._rows([member.trial for member in found.members])
        columns: dict[str, list[Any]] = {"on_front": [], "front_probability": [], "replicates": []}
        for member in found.members:
            columns["on_front"].append(member.on_front)
            columns["front_probability"].append(member.probability)
            columns["replicates"].append(" ".join(map(str, member.replicates)) if len(member.replicates) > 1 else "")
            for metric, one in member.estimates.items():
                error = float("nan") if one.error is None else one.error
                columns.setdefault(f"{metric}_se", []).append(error)
                columns.setdefault(f"tied_{metric}", []).append(" ".join(map(str, member.ties.get(metric, ()))))
        # A gene with the name of one of these keeps out of its way.
        table = table.rename(columns={name: f"gene.{name}" for name in columns if name in table})
        return table.assign(**columns)

    def uncertain_front(self, confidence: float = CONFIDENCE, *, examples: int | None = None) -> UncertainFront:
        """The front with its errors, probabilities and ties, as objects: what :meth:`front` has as a table."""
        known = validation_examples(self.task) if examples is None else examples
        return uncertain_front(self.history, self.samples, known, confidence)

    def plot_front(self, path: str | Path, confidence: float = CONFIDENCE, *, examples: int | None = None) -> Path:
        """Draw the front with error bars and ties.

        Args:
            path: The file: a name in ``.svg``, ``.png`` or ``.pdf``.
            confidence: Of the intervals and of the differences that count, in (0, 1).
            examples: As of :meth:`front`.

        Returns:
            The file.

        Raises:
            InvalidInputError: The name ends otherwise, or there is no front yet.
        """
        return front_figure.save(self.uncertain_front(confidence, examples=examples), path)

    def save_front(self, folder: str | Path) -> list[Path]:
        """Write ``front.csv`` (:meth:`front` with errors) and, of two objectives or more, ``front.png``.

        Returns:
            The files; none where there is no front yet.
        """
        found, path = self.uncertain_front(), Path(folder)
        if not found.members:
            return []
        table = path / "front.csv"
        table.write_text(self._front_rows(found).to_csv())
        pictures = [front_figure.save(found, path / "front.png")] if len(found.objectives) > 1 else []
        return [table, *pictures]

    def samples(self, trial: Trial | int) -> Mapping[str, Sequence[float]]:
        """All single readings of a trial's measurements, by metric, in its unit; empty where none were kept.

        ``<metric>_block`` has the block of each reading, from 0; ``<metric>_disturbed`` the readings that do not count,
        ``<metric>_anchor`` the times of the anchor network before and after each block that does.
        """
        trial = self.trials[trial] if isinstance(trial, int) else trial
        path = trial_folder(self.folder, trial.number if trial.copy_of is None else trial.copy_of) / SAMPLES
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def _rows(self, trials: Sequence[Trial]) -> pd.DataFrame:
        rows = []
        for trial in trials:
            proposal = trial.proposal
            row: dict[str, Any] = {
                "trial": trial.number,
                "kind": "evaluate" if isinstance(proposal, Evaluate) else "explore",
                "state": trial.state,
                "feasible": trial.state == "complete" and self.history.violation(trial) == 0.0,
                "budget": proposal.budget if isinstance(proposal, Evaluate) else float("nan"),
                "copy_of": trial.copy_of,
                "reason": trial.reason,
                "seconds": None if trial.finished is None else trial.finished - trial.started,
            }
            if isinstance(proposal, Evaluate):
                row["architecture"] = proposal.architecture.id
                # A gene with the name of a metric or of a column above keeps out of its way.
                row |= {
                    f"gene.{name}" if name in row or name in trial.metrics else name: gene
                    for name, gene in proposal.architecture.genes.items()
                }
            rows.append(row | dict(trial.metrics))
        columns = ["kind", "state", "feasible", "budget", "copy_of", "reason", "seconds"]
        if not rows:
            return pd.DataFrame(columns=columns, index=pd.Index([], name="trial"))
        return pd.DataFrame(rows).set_index("trial").astype({"copy_of": "Int64"})


def load(
    folder: str | Path,
    *,
    space: SearchSpace | None = None,
    task: Task | None = None,
) -> Result:
    """Read a finished or running study.

    Args:
        folder: The study's folder.
        space: Its space, where that is not part of an installed plug-in and networks are to be rebuilt.
        task: Its task, likewise.

    Raises:
        FolderError: There is no study in the folder, or the space is another one.
    """
    path = Path(folder)
    events, _ = journal.read(path)
    header, sessions = header_of(events, path), [event for event in events if event["event"] == "session"]
    if space is None:
        space = restored(header["space"], default=lambda: None)
        if space is None or space.identity != header["space_identity"]:  # or the plug-in has changed since
            space = RecordedSpace(header["space_identity"])
    if space.identity != header["space_identity"]:
        raise FolderError(f"{path} searched {header['space_identity']}; got the space {space.identity}")
    task = task or restored(header["task"], default=lambda: None)
    wanted = sessions[-1] if sessions else header
    history = History(
        space,
        [Objective(**objective) for objective in wanted["objectives"]],
        # One relative to a baseline that was not measured yet: nothing has run under it.
        [limit for limit in map(constraint_from_json, wanted["constraints"]) if isinstance(limit, Constraint)],
    )
    Search(_Reader(), history, header["seed"]).replay(events, to_go_on=False)
    ending = last_run(events)
    over = ending["over"] if ending.get("state") == "complete" else ""
    return Result(path, space, task, history, over)


def header_of(events: Sequence[Mapping[str, Any]], folder: Path) -> Mapping[str, Any]:
    """The first event of a journal, which says what the study is.

    Raises:
        FolderError: There is none.
        JournalError: It lacks a part.
    """
    if not events:
        raise FolderError(f"no study in {folder}: it has no {journal.FILE}")
    missing = [part for part in HEADER if part not in events[0]]
    if missing:
        raise JournalError(
            f"{folder / journal.FILE}, line 1 lacks {', '.join(missing)}, without which nothing can be read"
        )
    return events[0]


def last_run(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """How the last ``Study.run`` stands: its ``end`` event, its ``session`` event where it has not ended, or empty."""
    for event in events[::-1]:
        if event["event"] == "end" or (event["event"] == "session" and "max_trials" in event["run"]):
            return event
    return {}


class _Reader:
    """A strategy for reading only: it is never asked."""

    def propose(self, history: History, rng: Any) -> None:
        return None


def restored(description: Any, default: Callable[[], Any]) -> Any:
    """The object of a description, or a default where only the user's script has it."""
    try:
        return restore(description, restorable())
    except (UnsupportedError, InvalidInputError, TypeError):  # the script's own, or a plug-in that has changed since
        return default()
