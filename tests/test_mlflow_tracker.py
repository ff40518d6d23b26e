from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from nasplat import mlflow_tracker
from nasplat.architecture import Architecture
from nasplat.errors import NasplatError
from nasplat.mlflow_tracker import MlflowTracker
from nasplat.strategy import Evaluate, Explore, Trial
from nasplat.tracking import Backlog, StudyRecord

WAIT_S = 60.0  # far more than needed; reached only by a test that fails
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """One folder, and so one database, for all studies of this module: its schema takes seconds."""
    return tmp_path_factory.mktemp("my runs")


@pytest.fixture
def study(home) -> StudyRecord:
    name = f"study{next(NUMBERS)}"
    return StudyRecord(
        id=f"id{name}",
        name=name,
        folder=home / name,
        parameters={"space": "Toy()", "seed": "0", "objectives": "maximize accuracy"},
        tags={"space": "toy", "strategy": "RandomSearch", "seed": "0", "version.torch": "2.9", "git.commit": "c0ffee"},
        descriptions={"space": {"type": "toy:Toy", "fields": {}}},
    )


def evaluate(number: int, **changes: Any) -> Trial:
    genes = {f"cell.edge{i}": f"op{(i + number) % 3}" for i in range(28)} | {"width": 24, "deep": True}
    proposal = Evaluate(Architecture("toy", genes), budget=0.5, notes={"generation": 3, "parent": {"a": [1]}})
    return replace(Trial(number, proposal, started=10.0), **changes)


REPORTS = tuple({"train_loss": 1.0 / epoch, "accuracy": 0.1 * epoch} for epoch in (1, 2, 3))


def complete(number: int) -> Trial:
    return evaluate(
        number,
        state="complete",
        reports=REPORTS,
        metrics={"accuracy": 0.31, "latency_ms": 2.5, "model_bytes": 4096.0},
        facts={"runtime": "onnxruntime", "samples_ms": [1.0, 2.0]},
        finished=12.5,
    )


def failed(number: int) -> Trial:
    return evaluate(
        number,
        state="failed",
        reason="loss is nan",
        traceback="Traceback ...\nNonFiniteError: loss is nan",
        reports=({"train_loss": math.nan, "norm": math.inf},),
        finished=11.0,
    )


def raw(study: StudyRecord) -> tuple[MlflowClient, str]:
    client = MlflowClient(tracking_uri=f"sqlite:///{study.folder.parent}/mlflow.db")
    return client, client.get_experiment_by_name("nasplat").experiment_id


def runs(study: StudyRecord) -> dict[str | None, list[Any]]:
    """All active runs of a study by trial number; the parent's key is None."""
    client, experiment = raw(study)
    found: dict[str | None, list[Any]] = {}
    for run in client.search_runs([experiment], f"tags.`nasplat.study` = '{study.id}'"):
        found.setdefault(run.data.tags.get("nasplat.trial"), []).append(run)
    return found


def content(study: StudyRecord, run: Any) -> dict[str, Any]:
    """What a run holds, but for times and ids."""
    client, _ = raw(study)
    folder = study.folder.parent / "mlartifacts" / run.info.run_id / "artifacts"
    history = {
        key: [(m.step, str(m.value)) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    own = ("mlflow.parentRunId", "nasplat.study", "nasplat.folder", "mlflow.runName")
    return {
        "status": run.info.status,
        "params": run.data.params,
        "metrics": {key: sorted(points) for key, points in history.items()},
        "tags": {key: value for key, value in run.data.tags.items() if key not in own},
        "files": {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()},
    }


def contents(study: StudyRecord) -> dict[str | None, Any]:
    found = runs(study)
    assert all(len(same) == 1 for same in found.values()), "a run twice"
    (parent,) = found[None]
    for number, (run,) in found.items():
        if number is not None:
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    return {number: content(study, run) for number, (run,) in found.items()}


def test_round_trip(study, tmp_path):
    tracker = MlflowTracker()
    assert tracker.start(study) == set()
    running = evaluate(0, state="running")
    tracker.log(running)
    (run,) = runs(study)["0"]
    assert run.info.status == "RUNNING"
    assert run.data.params["cell.edge1"] == "op1"
    for epochs in (1, 2, 3):
        tracker.log(replace(running, reports=REPORTS[:epochs]))
        tracker.log(replace(running, reports=REPORTS[:epochs]))  # the same again adds nothing
    tracker.log(complete(0))
    tracker.log(complete(0))
    tracker.log(failed(1))
    tracker.log(evaluate(2, state="infeasible", reason="params above 1e6", metrics={"params": 2e6}, finished=10.0))
    table = tmp_path / "table.csv"
    table.write_text("a,b")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "front.svg").write_text("<svg/>")
    tracker.artifact(table)
    tracker.artifact(tmp_path / "plots", "plots")
    tracker.end("complete")

    found = contents(study)
    assert set(found) == {None, "0", "1", "2"}
    parent, first, second, third = (found[key] for key in (None, "0", "1", "2"))
    assert parent["status"] == "FINISHED"
    assert parent["params"] == dict(study.parameters)
    assert parent["tags"]["nasplat.git.commit"] == parent["tags"]["mlflow.source.git.commit"] == "c0ffee"
    assert parent["tags"]["nasplat.version.torch"] == "2.9"
    assert set(parent["files"]) == {"study.json", "table.csv", "plots/front.svg"}
    assert json.loads(parent["files"]["study.json"]) == study.descriptions

    assert first["status"] == "FINISHED"
    assert first["params"].keys() == {*complete(0).architecture.genes, "budget"}
    assert first["params"]["width"] == "24" and first["params"]["deep"] == "true" and first["params"]["budget"] == "0.5"
    assert first["metrics"] == {
        "train_loss": [(1, "1.0"), (2, "0.5"), (3, str(1 / 3))],
        "accuracy": [(1, "0.1"), (2, "0.2"), (3, str(0.1 * 3)), (4, "0.31")],  # the final one differs from epoch 3
        "latency_ms": [(3, "2.5")],
        "model_bytes": [(3, "4096.0")],
    }
    (run,) = runs(study)["0"]
    assert run.data.metrics["accuracy"] == 0.31
    assert run.info.run_name == "trial 0000"
    assert run.info.end_time - run.info.start_time == 2500
    tags = first["tags"]
    assert tags["nasplat.architecture"] == complete(0).architecture.id
    assert tags["nasplat.state"] == "complete"
    assert tags["nasplat.note.generation"] == "3" and json.loads(tags["nasplat.note.parent"]) == {"a": [1]}
    assert tags["nasplat.fact.runtime"] == "onnxruntime"
    assert tags["nasplat.space"] == "toy" and tags["nasplat.strategy"] == "RandomSearch" and tags["nasplat.seed"] == "0"
    assert Architecture.from_json(first["files"]["architecture.json"]) == complete(0).architecture
    assert json.loads(first["files"]["facts.json"])["samples_ms"] == [1.0, 2.0]

    assert second["status"] == "FAILED"
    assert "NonFiniteError" in second["files"]["traceback.txt"]
    assert second["tags"]["nasplat.reason"] == "loss is nan"
    assert second["metrics"] == {"train_loss": [(1, "nan")], "norm": [(1, str(sys.float_info.max))]}
    assert third["status"] == "FINISHED"
    assert third["tags"]["nasplat.state"] == "infeasible"
    assert third["metrics"] == {"params": [(0, "2000000.0")]}


@dataclass(frozen=True)
class Supernet:
    epochs: int = 50
    name: str = "darts"

    def explore(self, space, task, rng, context):
        raise NotImplementedError


def test_an_exploration_has_its_settings_and_what_it_found(study):
    found = (Architecture("toy", {"a": 1}), Architecture("toy", {"a": 2}))
    tracker = MlflowTracker()
    tracker.start(study)
    tracker.log(Trial(0, Explore(Supernet(), notes={"stage": "search"}), state="complete", found=found, finished=1.0))
    record = contents(study)["0"]
    assert record["params"]["explorer.epochs"] == "50"
    assert record["params"]["explorer"].endswith(":Supernet")
    assert [item["id"] for item in json.loads(record["files"]["found.json"])] == [a.id for a in found]
    assert "architecture.json" not in record["files"]


def test_readings_and_facts_of_each_measurement_go_with_the_trial(study):
    folder = study.folder / "trials"
    for number in (0, 1):
        (folder / f"{number:05d}").mkdir(parents=True)
        (folder / f"{number:05d}" / "samples.json").write_text(json.dumps({"latency_ms": [2.4, 2.5, float(number)]}))
    facts = {"latency_ms": {"runtime": "onnxruntime", "threads": 1, "file_sha256": "abc", "suspect": "disturbed"}}
    spread = {"latency_ms": 2.5, "latency_ms_mad": 0.1, "latency_ms_block_sd": 0.2, "latency_ms_suspect": 1.0}
    tracker = MlflowTracker()
    tracker.start(study)
    tracker.log(evaluate(0, state="complete", metrics=spread, facts=facts, finished=11.0))
    tracker.log(evaluate(1, state="complete", metrics=spread, copy_of=0, finished=11.0))
    tracker.log(evaluate(2, state="complete", metrics={"accuracy": 1.0}, finished=11.0))
    found = contents(study)
    assert json.loads(found["0"]["files"]["samples.json"]) == {"latency_ms": [2.4, 2.5, 0.0]}
    assert json.loads(found["0"]["files"]["facts.json"]) == facts
    assert found["0"]["metrics"] == {name: [(0, str(value))] for name, value in spread.items()}
    assert all("samples.json" not in found[number]["files"] for number in ("1", "2"))  # a copy measured nothing


def test_names_and_values_that_mlflow_would_refuse(study):
    genes = {"budget": "mine", "a//b": 1, "a_b": 2, "../up": 3, "ü(x)": 4, "long": "x" * 9000, "n" * 300: 5, "": 6}
    trial = Trial(
        0,
        Evaluate(Architecture("toy", genes), notes={f"note{i}": "y" * 9000 for i in range(120)}),
        state="complete",
        reports=tuple({f"m{i}": float(i) for i in range(40)} for _ in range(30)),  # more than one batch
        metrics={"latency (ms)": 1.0, "latency [ms]": 2.0},
        finished=1.0,
    )
    tracker = MlflowTracker()
    tracker.start(study)
    tracker.log(trial)
    record = contents(study)["0"]
    assert len(record["params"]) == len(genes) + 1
    assert record["params"]["budget"] == "mine" and record["params"]["nasplat.budget"] == "1.0"
    assert len(record["params"]["long"]) == 6000
    assert sum(key.startswith("latency _ms_") for key in record["metrics"]) == 2
    assert len(record["metrics"]["m39"]) == 30
    assert len(record["tags"]["nasplat.note.note119"]) == 5000


def test_a_resume_goes_on_in_the_same_parent(study):
    first = MlflowTracker()
    first.start(study)
    first.log(complete(0))
    first.log(evaluate(1, state="running", reports=REPORTS[:1]))
    first.end("interrupted")
    (before,) = runs(study)[None]
    assert before.info.status == "KILLED"

    second = MlflowTracker()
    changed = replace(study, parameters={**study.parameters, "objectives": "minimize latency_ms", "task": "digits"})
    assert second.start(changed) == {0}
    (parent,) = runs(study)[None]
    assert (parent.info.run_id, parent.info.status) == (before.info.run_id, "RUNNING")
    # A parameter cannot change in MLflow; the tag has what the resumed study has.
    assert parent.data.params == {**study.parameters, "task": "digits"}
    assert parent.data.tags["nasplat.resumed.objectives"] == "minimize latency_ms"
    (kept,) = runs(study)["1"]
    second.log(evaluate(1, state="running"))
    second.log(complete(1))
    second.end("complete")
    found = contents(study)
    assert set(found) == {None, "0", "1"}
    assert [run.info.run_id for run in runs(study)["1"]] == [kept.info.run_id]
    assert found["1"]["metrics"] == found["0"]["metrics"]
    assert found[None]["status"] == "FINISHED"


def test_epochs_that_differ_from_those_recorded_replace_the_run(study):
    tracker = MlflowTracker()
    tracker.start(study)
    other = ({"train_loss": 7.0, "accuracy": 0.0},)
    tracker.log(evaluate(0, state="running", reports=other))
    tracker.log(evaluate(1, state="running", reports=other * 9))
    resumed = MlflowTracker()
    resumed.start(study)
    resumed.log(complete(0))  # another value at the same step
    resumed.log(evaluate(1, state="failed", reports=other, finished=11.0))  # fewer steps
    found = contents(study)
    assert found["0"]["metrics"]["train_loss"] == [(1, "1.0"), (2, "0.5"), (3, str(1 / 3))]
    assert found["1"]["metrics"]["train_loss"] == [(1, "7.0")]


def test_a_run_twice_and_a_deleted_one_are_put_right_by_a_resume(study):
    tracker = MlflowTracker()
    tracker.start(study)
    for number in (0, 1, 2):
        tracker.log(complete(number))
    client, experiment = raw(study)
    (original,) = runs(study)["0"]
    client.create_run(experiment, tags={"nasplat.study": study.id, "nasplat.trial": "0"})  # a repeated request
    client.delete_run(runs(study)["1"][0].info.run_id)
    resumed = MlflowTracker()
    assert resumed.start(study) == {0, 2}
    resumed.log(complete(1))
    assert [run.info.run_id for run in runs(study)["0"]] == [original.info.run_id]
    assert contents(study)["1"]["files"].keys() == contents(study)["0"]["files"].keys()


class Crash(BaseException):
    """Stands for the end of the process."""


class Crashing(MlflowTracker):
    """Dies after the k-th call that writes; the call itself gets through."""

    calls = 0
    crash_after = -1

    def _connect(self, uri):
        return Counting(super()._connect(uri), self)

    def count(self):
        self.calls += 1
        if self.calls == self.crash_after:
            raise Crash


class Counting:
    def __init__(self, client, owner):
        self.client, self.owner = client, owner

    def __getattr__(self, name):
        inner = getattr(self.client, name)
        if name.startswith(("create_", "log_", "set_", "update_", "delete_")):

            def call(*args, **kwargs):
                result = inner(*args, **kwargs)
                self.owner.count()
                return result

            return call
        return inner


@pytest.fixture
def counted_end(monkeypatch):
    terminate = mlflow_tracker._terminate

    def call(client, *args):
        terminate(client, *args)
        if isinstance(client, Counting):
            client.owner.count()

    monkeypatch.setattr(mlflow_tracker, "_terminate", call)


def search(tracker: MlflowTracker, study: StudyRecord) -> None:
    tracker.start(study)
    running = evaluate(0, state="running")
    tracker.log(running)
    tracker.log(replace(running, reports=REPORTS[:1]))
    tracker.log(failed(1))
    tracker.log(complete(0))
    tracker.end("complete")


def test_a_crash_after_any_call_leaves_nothing_twice_and_loses_nothing(study, counted_end):
    tracker = Crashing()
    search(tracker, study)
    expected = contents(study)
    assert tracker.calls > 10
    for k in range(1, tracker.calls):
        for same_process in (False, True) if k % 3 == 0 else (False,):
            crashed = replace(study, id=f"{study.id}k{k}{same_process}")
            tracker = Crashing()
            tracker.crash_after = k
            with pytest.raises(Crash):
                search(tracker, crashed)
            if not same_process:
                tracker = MlflowTracker()
            complete_ones = tracker.start(crashed)
            for trial in (complete(0), failed(1)):
                if trial.number not in complete_ones:
                    tracker.log(trial)
            tracker.end("complete")
            assert contents(crashed) == expected, (k, same_process)


def test_the_default_experiment_holds_the_studies_of_one_folder(study):
    tracker = MlflowTracker()
    tracker.start(study)
    client, experiment = raw(study)
    location = client.get_experiment(experiment).artifact_location
    assert location == (study.folder.parent / "mlartifacts").as_uri()
    assert f"nasplat ui {shlex.quote(str(study.folder))}" in tracker.where(study)


def test_a_deleted_experiment_is_said(study):
    MlflowTracker().start(study)
    client, _ = raw(study)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(NasplatError, match=r"'gone' was deleted: restore it .*--experiment-id \d"):
        MlflowTracker(experiment="gone").start(study)


def test_where_and_location(monkeypatch, tmp_path):
    study = StudyRecord("x", "a", tmp_path / "a", {}, {})
    assert MlflowTracker().location(study.folder) == (
        f"sqlite:///{tmp_path}/mlflow.db",
        (tmp_path / "mlartifacts").as_uri(),
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@host:5000")
    assert MlflowTracker().location(study.folder) == ("http://user:secret@host:5000", None)
    assert "secret" not in MlflowTracker().where(study)
    assert "http://user:***@host:5000" in MlflowTracker().where(study)
    other = MlflowTracker(uri="sqlite:////data/other.db")
    assert other.location(study.folder) == ("sqlite:////data/other.db", "file:///data/mlartifacts")
    assert 'mlflow ui --backend-store-uri "sqlite:////data/other.db"' in other.where(study)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(NasplatError, match="Rename the folder"):
        MlflowTracker().location(tmp_path / "100%" / "study")


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(NasplatError, match="cannot be written"):
        MlflowTracker().start(StudyRecord("x", "a", tmp_path / "a", {}, {}))


def test_log_before_start_is_said(study):
    with pytest.raises(NasplatError, match="start first"):
        MlflowTracker().log(complete(0))


def levels() -> dict[str, tuple]:
    names = ["", "mlflow", "alembic", *mlflow_tracker._CHATTER]
    loggers = {name: logging.getLogger(name) for name in names}
    return {name: (log.level, log.disabled, list(log.filters)) for name, log in loggers.items()}


def test_nothing_global_changes_and_nothing_is_printed(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    before = (mlflow.get_tracking_uri(), mlflow.active_run(), dict(os.environ), levels())
    study = StudyRecord("fresh", "fresh", tmp_path / "new" / "fresh", {}, {})
    tracker = MlflowTracker()
    tracker.start(study)  # makes the schema
    tracker.log(complete(0))
    tracker.end("complete")
    assert (mlflow.get_tracking_uri(), mlflow.active_run(), dict(os.environ), levels()) == before
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith(("alembic", "mlflow"))]
    assert sorted(path.name for path in study.folder.parent.iterdir()) == ["mlartifacts", "mlflow.db"]


def test_an_unreachable_server_does_not_stop_the_search(study):
    said: list[str] = []
    backlog = Backlog(MlflowTracker(uri="http://127.0.0.1:9"), say=said.append, retry_s=0.001, max_retry_s=0.01)
    backlog.start(study)
    for number in range(3):
        backlog.log(complete(number))
    backlog.end("complete")
    assert backlog.close(WAIT_S) == 3
    assert len(said) == 1 and "MLflow at http://127.0.0.1:9 cannot be reached" in said[0]

    # The next resume, with a record that comes back after some failures, writes what is missing.
    class Flaky(MlflowTracker):
        failures = 5

        def log(self, trial):
            if self.failures:
                self.failures -= 1
                raise ConnectionError("away")
            super().log(trial)

    said.clear()
    backlog = Backlog(Flaky(), say=said.append, retry_s=0.001, max_retry_s=0.01)
    backlog.start(study, [complete(number) for number in range(3)])
    end = time.monotonic() + WAIT_S
    while len(said) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    backlog.end("complete")
    assert backlog.close(WAIT_S) == 0
    assert "away" in said[0] and "caught up" in said[1]
    assert set(contents(study)) == {None, "0", "1", "2"}


@pytest.mark.slow
def test_a_real_server_that_comes_late(study, tmp_path, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    said: list[str] = []
    backlog = Backlog(MlflowTracker(uri=uri), say=said.append, retry_s=0.2, max_retry_s=0.5)
    backlog.start(study)
    backlog.log(evaluate(0, state="running", reports=REPORTS[:1]))
    backlog.log(failed(1))
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/files"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options, *store],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 4 * WAIT_S
        while len(said) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        backlog.log(complete(0))
        backlog.end("complete")
        assert backlog.close(WAIT_S) == 0
        assert len(said) == 2 and "cannot be reached" in said[0] and "caught up" in said[1]
        resumed = MlflowTracker(uri=uri)
        assert resumed.start(study) == {0, 1}
        resumed.end("complete")
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("nasplat").experiment_id
        found = {run.data.tags.get("nasplat.trial"): run for run in client.search_runs([experiment])}
        assert set(found) == {None, "0", "1"}
        assert (found["0"].info.status, found["1"].info.status) == ("FINISHED", "FAILED")
        assert math.isnan(client.get_metric_history(found["1"].info.run_id, "train_loss")[0].value)
        assert [m.step for m in client.get_metric_history(found["0"].info.run_id, "train_loss")] == [1, 2, 3]
        files = {item.path for item in client.list_artifacts(found["1"].info.run_id)}
        assert files == {"architecture.json", "traceback.txt"}
        assert urllib.request.urlopen(f"{uri}/health", timeout=10).status == 200
        assert capfd.readouterr() == ("", "")  # MLflow's client would print two lines for each run
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
