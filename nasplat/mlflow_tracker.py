"""Studies in MLflow: one parent run a study, one nested child run a trial. The only module that imports mlflow.

Everything goes through ``MlflowClient`` with its own URI; neither mlflow's fluent state nor the environment changes.
Runs are known by the tags ``nasplat.study`` and ``nasplat.trial``, which are part of the very call that creates a run,
so whatever the moment at which a driver dies, the next one finds what there is and goes on with it. A child's status
leaves RUNNING last, so a run that has ended is complete.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from nasplat.errors import InvalidInputError, NasplatError
from nasplat.identity import describe
from nasplat.strategy import FINAL, Evaluate, Trial
from nasplat.tracking import StudyRecord
from nasplat.worker import SAMPLES, trial_folder

MAX_PARAMETER = 6000
"""Longest parameter value that MLflow stores, in characters."""

MAX_TAG = 5000
"""Longest tag value that every MLflow server since 2.0 stores, in characters."""

MAX_BATCH = 1000
"""Most metrics that MLflow takes in one call."""

REACH_S = 5.0
"""How long a server may take to show that it is there, in seconds. Its other calls keep MLflow's own time limits."""

_STATUS = {"complete": "FINISHED", "infeasible": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
_STUDY_STATUS = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_CHATTER = ("alembic.runtime.migration", "alembic.runtime.plugins", "mlflow.store.db.utils", "urllib3.connectionpool")


@dataclass
class _Child:
    """What is known of one child run."""

    id: str
    start_ms: int
    parameters: bool = False
    architecture: bool = False
    points: dict[tuple[str, int], float] = field(default_factory=dict)


@dataclass
class _Open:
    """An opened study."""

    client: Any
    uri: str
    study: StudyRecord
    experiment_id: str
    parent_id: str
    run_ids: dict[int, str]  # of every trial that has a run
    complete: set[int]
    unsure: set[int] = field(default_factory=set)  # a call for them raised, so the record must be asked
    children: dict[int, _Child] = field(default_factory=dict)  # in flight


@dataclass
class MlflowTracker:
    """Records a study in MLflow.

    Attributes:
        uri: An MLflow tracking URI. None means the environment's ``MLFLOW_TRACKING_URI``, and without that a SQLite
            file ``mlflow.db`` (files under ``mlartifacts``) beside the study's folder, so that the studies of one
            place are compared in one record.
        experiment: Name of the MLflow experiment, made where it is missing.

    Steps of metrics count epochs from 1. A final metric has the last epoch's step, or the one after it where that
    epoch reported the same name with another value. Infinite values are stored as the largest finite ones.

    A trial's run has the genes as parameters, and as files ``architecture.json``, ``facts.json`` (how each metric was
    measured) and ``samples.json`` (all readings), where there are any.

    MLflow cannot take a value back. So when a trial begins again after a crash and its epochs differ from those
    recorded, its run is deleted (it stays in MLflow's bin) and written anew; equal ones are kept.
    """

    uri: str | None = None
    experiment: str = "nasplat"
    _open: _Open | None = field(default=None, init=False, repr=False, compare=False)

    # The protocol.

    def start(self, study: StudyRecord) -> Set[int]:
        """Open the study's parent run, or go on with it, and look up its children once.

        Raises:
            NasplatError: The server is away, the file cannot be written, or the experiment was deleted.
        """
        if not re.fullmatch(r"[\w\-]+", study.id):  # it goes into a filter
            raise InvalidInputError(f"a study's id consists of letters, digits, '_' and '-'; got {study.id!r}")
        uri, artifacts = self.location(study.folder)
        with _quiet():
            _reach(uri)
            now = self._open
            if (
                now is not None
                and (now.study.id, now.uri) == (study.id, uri)
                and now.client.get_run(now.parent_id).info.lifecycle_stage == "active"
            ):
                return frozenset(now.complete)
            self._open = None
            client = self._connect(uri)
            experiment_id = self._experiment_id(client, artifacts)
            parent, children = _find(client, experiment_id, f"tags.`nasplat.study` = '{study.id}'")
            parent_id = self._open_parent(client, experiment_id, study, parent)
            for run in children.values():
                if run.data.tags.get("mlflow.parentRunId") != parent_id:  # someone deleted the first parent
                    client.set_tag(run.info.run_id, "mlflow.parentRunId", parent_id)
            self._open = _Open(
                client=client,
                uri=uri,
                study=study,
                experiment_id=experiment_id,
                parent_id=parent_id,
                run_ids={number: run.info.run_id for number, run in children.items()},
                complete={number for number, run in children.items() if run.info.status in _STATUS.values()},
            )
            return frozenset(self._open.complete)

    def log(self, trial: Trial) -> None:
        """Bring a trial's run up to date. Costs the same however many trials there are."""
        opened = self._opened()
        if trial.state in FINAL and trial.number in opened.complete:
            return
        with _quiet():
            _reach(opened.uri)
            try:
                self._write(opened, trial)
            except BaseException:
                opened.children.pop(trial.number, None)
                opened.unsure.add(trial.number)
                raise

    def artifact(self, path: Path, folder: str = "") -> None:
        """Put a file, or the files of a folder, with the parent run."""
        opened = self._opened()
        with _quiet():
            _reach(opened.uri)
            put = opened.client.log_artifacts if path.is_dir() else opened.client.log_artifact
            put(opened.parent_id, str(path), folder or None)

    def end(self, state: str, metrics: Mapping[str, float] | None = None) -> None:
        """End the parent run: FINISHED, KILLED for ``interrupted``, FAILED."""
        opened = self._opened()
        with _quiet():
            _reach(opened.uri)
            for name, value in (metrics or {}).items():
                opened.client.log_metric(opened.parent_id, name, value)
            opened.client.set_tag(opened.parent_id, "nasplat.state", state)
            _terminate(opened.client, opened.parent_id, _STUDY_STATUS[state], _now_ms())

    def where(self, study: StudyRecord) -> str:
        """The record's URI, and how to open it."""
        uri, _ = self.location(study.folder)
        shown = _without_password(uri)
        lines = [f"MLflow record: {shown}, experiment {self.experiment!r}, run {study.name!r}"]
        if uri.startswith(("http://", "https://")):
            now = self._open
            page = f"/#/experiments/{now.experiment_id}/runs/{now.parent_id}" if now is not None else ""
            lines.append(f"open it with a browser: {shown.rstrip('/')}{page}")
        elif self._beside(study.folder) == uri:
            lines.append(f"open it with: nasplat ui {shlex.quote(str(study.folder))}")
            lines.append(f'          or: mlflow ui --backend-store-uri "{uri}"')
        else:
            lines.append(f'open it with: mlflow ui --backend-store-uri "{shown}"')
        return "\n".join(lines)

    # A comparison of studies.

    def record_comparison(
        self,
        *,
        id: str,
        folder: Path,
        files: Sequence[Path],
        parameters: Mapping[str, str],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        studies: Sequence[str],
    ) -> str:
        """Record a comparison of several studies as one run; recorded again, it is written anew.

        Args:
            id: By which it is known: letters, digits, ``_`` and ``-``.
            folder: Where it was saved; its record is that of the studies in the folder.
            files: Put with the run.
            parameters: What was compared.
            metrics: Finite numbers, by name.
            tags: Get the prefix ``nasplat.``.
            studies: Ids of the studies. Those of them that this record has get a tag
                ``nasplat.comparison.<first 8 of id>`` with the id of the comparison's run.

        Returns:
            The id of the run, which has the tag ``nasplat.comparison``.

        Raises:
            InvalidInputError: An id has other characters.
            NasplatError: The server is away, the file cannot be written, or the experiment was deleted.
        """
        from mlflow.entities import Metric, Param, RunTag

        for known in (id, *studies):
            if not re.fullmatch(r"[\w\-]+", known):  # it goes into a filter
                raise InvalidInputError(f"an id consists of letters, digits, '_' and '-'; got {known!r}")
        uri, artifacts = self.location(folder / "comparison")
        with _quiet():
            _reach(uri)
            client = self._connect(uri)
            experiment_id = self._experiment_id(client, artifacts)
            for old in client.search_runs([experiment_id], f"tags.`nasplat.comparison` = '{id}'"):
                client.delete_run(old.info.run_id)
            every = {**tags, "studies": ", ".join(studies), "folder": str(folder), "comparison": id}
            run = client.create_run(experiment_id, tags=_prefixed("nasplat.", every), run_name=folder.name)
            run_id, now_ms = str(run.info.run_id), _now_ms()
            points = [Metric(_key(name), _finite(value), now_ms, 0) for name, value in metrics.items()]
            for first in range(0, len(points), MAX_BATCH):
                client.log_batch(run_id, metrics=points[first : first + MAX_BATCH])
            client.log_batch(
                run_id, params=[Param(_key(name), _cut(value, MAX_PARAMETER)) for name, value in parameters.items()]
            )
            for path in files:
                client.log_artifact(run_id, str(path))
            for study in studies:
                # Only a study's own run has its folder; those of its trials have not.
                parents = f"tags.`nasplat.study` = '{study}' and tags.`nasplat.folder` LIKE '%'"
                for parent in client.search_runs([experiment_id], parents):
                    client.log_batch(parent.info.run_id, tags=[RunTag(f"nasplat.comparison.{id[:8]}", run_id)])
            _terminate(client, run_id, "FINISHED", _now_ms())
        return run_id

    # Where things are.

    def location(self, folder: Path) -> tuple[str, str | None]:
        """Where the record of a study in ``folder`` is.

        Returns:
            The tracking URI, and the URI for the files of a new experiment; None leaves that to MLflow.

        Raises:
            NasplatError: No SQLite file can be opened in such a folder.
        """
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or self._beside(folder)
        path = _sqlite_path(uri)
        if path is None:
            return uri, None
        if uri == self._beside(folder) and ("%" in uri or "?" in uri):
            # SQLAlchemy reads both as part of the URI's syntax, and unquotes them differently from version to version.
            raise NasplatError(
                f"MLflow cannot open a SQLite file whose path has '%' or '?': {path}. "
                "Rename the folder, or say where to record: MlflowTracker(uri=...) or MLFLOW_TRACKING_URI"
            )
        return uri, (path.parent / "mlartifacts").as_uri()

    @staticmethod
    def _beside(folder: Path) -> str:
        return f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"

    def _connect(self, uri: str) -> Any:
        from mlflow import MlflowClient

        path = _sqlite_path(uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # MLflow itself would try for minutes.
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise NasplatError(f"MLflow's record {path} cannot be written: no permission")
            if not path.exists():
                _create_sqlite(path)
        return MlflowClient(tracking_uri=uri)

    def _experiment_id(self, client: Any, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return str(client.create_experiment(self.experiment, artifact_location=artifacts))
            except MlflowException:
                found = client.get_experiment_by_name(self.experiment)  # another study may have made it just now
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise NasplatError(
                f"the MLflow experiment {self.experiment!r} was deleted: restore it "
                f"(mlflow experiments restore --experiment-id {found.experiment_id}) "
                'or choose another name: MlflowTracker(experiment="...")'
            )
        return str(found.experiment_id)

    def _opened(self) -> _Open:
        if self._open is None:
            raise NasplatError("the study's record is not open: call start first")
        return self._open

    # The parent run.

    def _open_parent(self, client: Any, experiment_id: str, study: StudyRecord, run: Any) -> str:
        from mlflow.entities import Param, RunTag

        wanted = {_key(name): _cut(value, MAX_PARAMETER) for name, value in study.parameters.items()}
        tags = {
            **_prefixed("nasplat.", study.tags),
            "nasplat.study": study.id,
            "nasplat.folder": _cut(str(study.folder), MAX_TAG),
            "nasplat.state": "running",
            **_source(study),
        }
        if run is None:
            run = client.create_run(experiment_id, tags=tags, run_name=study.name)
            tags = {}
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        run_id = str(run.info.run_id)
        had = run.data.params
        # Objectives and constraints may change with a resume, and MLflow's parameters may not: tags say so.
        tags |= {_key(f"nasplat.resumed.{k}"): v[:MAX_TAG] for k, v in wanted.items() if had.get(k, v) != v}
        client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in wanted.items() if key not in had],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        if study.descriptions:
            client.log_text(run_id, json.dumps(dict(study.descriptions), indent=2), "study.json")
        return run_id

    # A child run.

    def _write(self, opened: _Open, trial: Trial) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, number, final = opened.client, trial.number, trial.state in FINAL
        points, parameters = _points(trial), _parameters(trial)
        tags: dict[str, str] = {}
        child = opened.children.get(number)
        if child is None:
            child = _read(opened, number, parameters)
            tags = _child_tags(opened, trial)
        if child is not None and _differs(child, points, final):
            client.delete_run(child.id)
            child = None
        if child is None:
            start_ms = _now_ms() - (_duration_ms(trial) or 0)
            run = client.create_run(
                opened.experiment_id,
                start_time=start_ms,
                tags=_child_tags(opened, trial),
                run_name=f"trial {number:04d}",
            )
            child, tags = _Child(str(run.info.run_id), start_ms), {}
        elif final:
            tags = tags or _outcome_tags(trial)
        opened.run_ids[number] = child.id
        opened.children[number] = child
        opened.unsure.discard(number)

        now_ms = _now_ms()
        new = {point: value for point, value in points.items() if point not in child.points}
        if new or tags or not child.parameters:
            client.log_batch(
                child.id,
                metrics=[Metric(key, value, now_ms, step) for (key, step), value in new.items()],
                params=[] if child.parameters else [Param(key, value) for key, value in parameters.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            child.points.update(new)
            child.parameters = True
        if trial.architecture is not None and not child.architecture:
            client.log_text(child.id, trial.architecture.to_json(), "architecture.json")
            child.architecture = True
        if not final:
            return
        for name, text in _files(trial).items():
            client.log_text(child.id, text, name)
        samples = trial_folder(opened.study.folder, number) / SAMPLES
        if trial.copy_of is None and samples.exists():
            client.log_artifact(child.id, str(samples))
        duration_ms = _duration_ms(trial)
        end_ms = now_ms if duration_ms is None else child.start_ms + duration_ms
        _terminate(client, child.id, _STATUS[trial.state], end_ms)
        opened.complete.add(number)
        del opened.children[number]


def _read(opened: _Open, number: int, parameters: Mapping[str, str]) -> _Child | None:
    """What the record has of a trial that this process has not written yet, or no longer knows the state of."""
    client = opened.client
    if number in opened.unsure:
        filters = f"tags.`nasplat.study` = '{opened.study.id}' and tags.`nasplat.trial` = '{number}'"
        run = _find(client, opened.experiment_id, filters)[1].get(number)
    elif number in opened.run_ids:
        run = client.get_run(opened.run_ids[number])
        if run.info.lifecycle_stage != "active":
            run = None
    else:
        run = None
    if run is None:
        return None
    run_id = str(run.info.run_id)
    if any(run.data.params.get(key, value) != value for key, value in parameters.items()):
        client.delete_run(run_id)
        return None
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
        opened.complete.discard(number)
    child = _Child(run_id, run.info.start_time)
    for key in run.data.metrics:
        for metric in client.get_metric_history(run_id, key):
            child.points[key, metric.step] = metric.value
    return child


def _find(client: Any, experiment_id: str, filters: str) -> tuple[Any, dict[int, Any]]:
    """The parent run, or None, and the child runs by trial.

    MLflow's client repeats a request whose answer got lost, and so may have created a run twice: the one that got
    further, else the older one, is kept and the other deleted.
    """
    found: dict[int | None, Any] = {}
    token = None
    while True:
        page = client.search_runs([experiment_id], filters, max_results=1000, page_token=token)
        for run in page:
            trial = run.data.tags.get("nasplat.trial")
            number = None if trial is None else int(trial)
            if number in found:
                run, other = sorted((found[number], run), key=_rank)
                client.delete_run(other.info.run_id)
            found[number] = run
        token = page.token
        if not token:
            break
    return found.pop(None, None), {number: run for number, run in found.items() if number is not None}


def _rank(run: Any) -> tuple[Any, ...]:
    return (run.info.status not in _STATUS.values(), -len(run.data.metrics), run.info.start_time, run.info.run_id)


def _differs(child: _Child, points: Mapping[tuple[str, int], float], final: bool) -> bool:
    """Whether the record has a value that is not the trial's (any more)."""
    for point, value in child.points.items():
        if point not in points:
            if final:
                return True
        elif not (value == points[point] or (math.isnan(value) and math.isnan(points[point]))):
            return True
    return False


def _points(trial: Trial) -> dict[tuple[str, int], float]:
    """Every metric of a trial, by key and step."""
    points: dict[tuple[str, int], float] = {}
    for epoch, report in enumerate(trial.reports, start=1):
        for name, value in report.items():
            points[_key(name), epoch] = _finite(value)
    last = len(trial.reports)
    for name, value in trial.metrics.items():
        key, number = _key(name), _finite(value)
        reported = points.get((key, last))
        if reported is None:
            points[key, last] = number
        elif reported != number and not (math.isnan(reported) and math.isnan(number)):
            points[key, last + 1] = number
    return points


def _finite(value: float) -> float:
    # What the SQL stores make of it, so that every store has the same and a value read back compares equal.
    value = float(value)
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else value


def _parameters(trial: Trial) -> dict[str, str]:
    """The genes (or what explores) and how the trial was to be trained."""
    proposal = trial.proposal
    if isinstance(proposal, Evaluate):
        values: dict[str, Any] = dict(proposal.architecture.genes)
        extra: dict[str, Any] = {
            "budget": proposal.budget,
            "weights_of": proposal.weights_of,
            "recalibrate": proposal.recalibrate or None,
        }
    else:
        values = _explorer(proposal.explorer)
        extra = {}
    for name, value in extra.items():
        if value is not None:
            values[f"nasplat.{name}" if name in values else name] = value
    return {_key(name): _cut(value, MAX_PARAMETER) for name, value in values.items()}


def _explorer(explorer: Any) -> dict[str, Any]:
    try:
        description = describe(explorer)
    except InvalidInputError:
        description = None
    if not isinstance(description, dict) or "fields" not in description:
        return {"explorer": repr(explorer)}
    fields = {f"explorer.{name}": value for name, value in description["fields"].items()}
    return {"explorer": description["type"], **fields}


def _child_tags(opened: _Open, trial: Trial) -> dict[str, str]:
    """All tags of a trial's run: what it is known by, and what is known of it so far."""
    study, architecture = opened.study, trial.architecture
    return {
        **_prefixed("nasplat.", study.tags),
        **_prefixed("nasplat.note.", trial.proposal.notes),
        **({} if architecture is None else {"nasplat.architecture": architecture.id}),
        **_outcome_tags(trial),
        **_source(study),
        "mlflow.parentRunId": opened.parent_id,
        "nasplat.study": study.id,
        "nasplat.trial": str(trial.number),
    }


def _outcome_tags(trial: Trial) -> dict[str, str]:
    tags: dict[str, str] = {"nasplat.state": trial.state}
    if trial.reason:
        tags["nasplat.reason"] = _cut(trial.reason, MAX_TAG)
    if trial.copy_of is not None:
        tags["nasplat.copy_of"] = str(trial.copy_of)
    tags |= _prefixed("nasplat.fact.", {name: value for name, value in trial.facts.items() if _is_scalar(value)})
    return tags


def _files(trial: Trial) -> dict[str, str]:
    """Files of a trial that has ended, by name; the architecture's is written at once."""
    files = {}
    if trial.traceback:
        files["traceback.txt"] = trial.traceback
    if trial.found:
        found = [json.loads(architecture.to_json()) for architecture in trial.found]
        files["found.json"] = json.dumps(found, indent=2)
    if any(not _is_scalar(value) for value in trial.facts.values()):
        files["facts.json"] = json.dumps(dict(trial.facts), indent=2, default=str)
    return files


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _source(study: StudyRecord) -> dict[str, str]:
    """Tags that MLflow's own pages know."""
    tags = {"mlflow.source.type": "LOCAL"}
    if sys.argv and sys.argv[0]:
        tags["mlflow.source.name"] = _cut(sys.argv[0], MAX_TAG)
    if "git.commit" in study.tags:
        tags["mlflow.source.git.commit"] = study.tags["git.commit"]
    with contextlib.suppress(KeyError, OSError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
    return {_key(f"{prefix}{name}"): _cut(value, MAX_TAG) for name, value in values.items()}


def _cut(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


_LEGAL = re.compile(r"[\w\-. /]+")


def _key(name: str) -> str:
    """A name as MLflow accepts it; one that had to change ends in a hash, so that no two names become one."""
    plain = (
        len(name) <= 250
        and _LEGAL.fullmatch(name) is not None
        and posixpath.normpath(name) == name
        and not name.startswith(("/", ".."))
        and name != "."
    )
    if plain:
        return name
    cleaned = re.sub(r"[^\w\-. ]", "_", name)[:200].strip(". ")
    return f"{cleaned}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _duration_ms(trial: Trial) -> int | None:
    return None if trial.finished is None else max(0, round(1000 * (trial.finished - trial.started)))


def _now_ms() -> int:
    return int(time.time() * 1000)


def _terminate(client: Any, run_id: str, status: str, end_ms: int) -> None:
    from mlflow.entities import RunStatus

    # MlflowClient.set_terminated prints two lines to stdout for every run on a server, and asks for the run once more.
    client._tracking_client.store.update_run_info(run_id, RunStatus.from_string(status), end_ms, None)


def _sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI; None for others and for a database in memory."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        return None
    path = uri.removeprefix(prefix).partition("?")[0]
    return Path(path).resolve() if path and path != ":memory:" else None


def _create_sqlite(path: Path) -> None:
    """Make MLflow's tables in a new file, which appears under its name when it is whole.

    MLflow runs its dozens of migrations one by one for some seconds: a driver that was killed then would leave a file
    that no MLflow opens again, and two drivers at once would trip over each other.
    """
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix="nasplat-") as scratch:
        fresh = Path(scratch) / "mlflow.db"
        client = MlflowClient(tracking_uri=f"sqlite:///{fresh}")
        with contextlib.suppress(AttributeError):  # closes the file; only tidiness
            client._tracking_client.store._dispose_engine()
        whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(fresh, whole)
            try:
                os.link(whole, path)  # unlike a rename, never replaces what another driver made meanwhile
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not path.exists():
                    whole.replace(path)
        finally:
            whole.unlink(missing_ok=True)


def _reach(uri: str) -> None:
    """Raise at once when a server is away. MLflow's own calls would try for four minutes, with a warning for each."""
    if not uri.startswith(("http://", "https://")):
        return
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        # Any answer will do: what it is worth, the call that follows finds out.
        http_request(
            get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=REACH_S, raise_on_status=False
        )
    except MlflowException as error:
        cause = str(error).splitlines()[0][:200]
        raise NasplatError(f"MLflow at {_without_password(uri)} cannot be reached ({cause})") from error


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if not parts.password:
        return uri
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}"))


class _OtherThreads(logging.Filter):
    """Drops what this thread logs."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the chatter of MLflow's libraries off the terminal, for this thread and this block only.

    What goes wrong is raised, and said by whoever calls; the schema's migrations interest nobody.
    """
    drop = _OtherThreads()
    loggers = [logging.getLogger(name) for name in _CHATTER]
    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)
