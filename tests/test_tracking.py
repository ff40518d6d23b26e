from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nasplat.architecture import Architecture
from nasplat.errors import NasplatWarning
from nasplat.strategy import Evaluate, Trial
from nasplat.tracking import Backlog, StudyRecord, study_tags

STUDY = StudyRecord("s1", "study", Path("runs/study"), {}, {})
WAIT_S = 60.0  # far more than needed; reached only by a test that fails


def trial(number: int, state: str = "complete", epochs: int = 0) -> Trial:
    proposal = Evaluate(Architecture("toy", {"a": number}))
    return Trial(number, proposal, state=state, reports=({"loss": 1.0},) * epochs)  # type: ignore[arg-type]


class Fake:
    """A tracker in memory whose calls can be held up or refused."""

    def __init__(self, complete: set[int] | None = None) -> None:
        self.complete = complete or set()
        self.calls: list[tuple] = []
        self.failing = 0  # how many calls still raise
        self.refused: set[int] = set()
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def _call(self, *call: object) -> None:
        self.entered.set()
        assert self.open.wait(WAIT_S)
        if self.failing:
            self.failing -= 1
            raise ConnectionError("nobody there")
        self.calls.append(call)

    def start(self, study):
        self._call("start")
        return frozenset(self.complete)

    def log(self, trial):
        if trial.number in self.refused:
            raise ValueError("not this one")
        self._call("log", trial)

    def artifact(self, path, folder=""):
        self._call("artifact", path, folder)

    def end(self, state):
        self._call("end", state)

    def where(self, study):
        return f"the record of {study.name}"

    @property
    def logged(self) -> list[int]:
        return [call[1].number for call in self.calls if call[0] == "log"]


def test_delivers_everything_in_order_and_ends_last(tmp_path):
    fake = Fake()
    backlog = Backlog(fake)
    file = tmp_path / "table.csv"
    file.write_text("a,b")
    backlog.start(STUDY)
    backlog.artifact(file, "tables")
    for number in range(5):
        backlog.log(trial(number))
    backlog.end("complete")
    assert backlog.close(WAIT_S) == 0
    assert fake.calls[0] == ("start",)
    assert sorted(fake.logged) == list(range(5))
    assert ("artifact", file, "tables") in fake.calls
    assert fake.calls[-1] == ("end", "complete")
    assert backlog.where() == "the record of study"


def test_log_returns_while_the_record_hangs_and_only_the_newest_state_is_kept():
    fake = Fake()
    fake.open.clear()
    backlog = Backlog(fake)
    backlog.start(STUDY)
    assert fake.entered.wait(WAIT_S)
    for epochs in range(1000):  # would never get here if log waited
        backlog.log(trial(0, "running", epochs))
        backlog.log(trial(1, "running", epochs))
    backlog.log(trial(0, "complete", 1000))
    assert len(backlog._trials) == 2
    fake.open.set()
    backlog.end("complete")
    assert backlog.close(WAIT_S) == 0
    assert fake.logged == [0, 1]  # first appearance counts
    assert fake.calls[1][1].state == "complete"
    assert len(fake.calls[2][1].reports) == 999


def test_a_state_that_comes_during_delivery_is_delivered_too():
    class Slow(Fake):
        def log(self, trial):
            if trial.state == "running":
                backlog.log(replace(trial, state="complete"))
            super().log(trial)

    fake = Slow()
    backlog = Backlog(fake)
    backlog.start(STUDY)
    backlog.log(trial(0, "running"))
    assert backlog.close(WAIT_S) == 0
    assert [call[1].state for call in fake.calls if call[0] == "log"] == ["running", "complete"]


def test_a_resume_writes_only_what_the_record_lacks():
    fake = Fake(complete={0, 2, 3})
    backlog = Backlog(fake)
    backlog.start(STUDY, [trial(0), trial(1), trial(2), trial(3, "running")])
    assert backlog.close(WAIT_S) == 0
    # A trial that the record has as complete and the history as running is written again.
    assert fake.logged == [1, 3]


def test_an_outage_is_said_once_and_caught_up():
    fake = Fake()
    fake.failing = 7
    said: list[str] = []
    caught_up = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if "caught up" in text:
            caught_up.set()

    backlog = Backlog(fake, say=say, retry_s=0.001, max_retry_s=0.01)
    backlog.start(STUDY)
    for number in range(4):
        backlog.log(trial(number))
    assert caught_up.wait(WAIT_S)
    backlog.end("complete")
    assert backlog.close(WAIT_S) == 0
    assert fake.logged == [0, 1, 2, 3]
    assert len([text for text in said if "cannot be recorded" in text]) == 1
    assert "ConnectionError: nobody there" in said[0]


def test_one_refused_trial_does_not_hold_up_the_others():
    fake = Fake()
    fake.refused = {0, 1, 2}
    said: list[str] = []
    backlog = Backlog(fake, say=said.append, retry_s=0.001, max_retry_s=0.002)
    backlog.start(STUDY)
    for number in range(6):
        backlog.log(trial(number))
    backlog.end("complete")
    assert backlog.close(WAIT_S) == 3
    assert fake.logged == [3, 4, 5]
    assert fake.calls[-1] == ("end", "complete")
    assert len(said) == 1


def test_close_counts_what_is_left_and_tries_an_absent_record_only_once_more():
    fake = Fake()
    fake.failing = 10**9
    said: list[str] = []
    backlog = Backlog(fake, say=said.append, retry_s=3600.0)
    backlog.start(STUDY, [trial(0)])
    backlog.log(trial(1))
    backlog.end("interrupted")
    assert backlog.close(WAIT_S) == 2
    assert backlog._thread is not None and not backlog._thread.is_alive()
    assert len(said) == 1


def test_close_does_not_wait_for_a_record_that_hangs():
    fake = Fake()
    fake.open.clear()
    backlog = Backlog(fake)
    backlog.start(STUDY)
    backlog.log(trial(0))
    assert fake.entered.wait(WAIT_S)
    assert backlog.close(0.01) == 1
    fake.open.set()


def test_an_artifact_that_is_gone_is_said_and_dropped(tmp_path):
    fake = Fake()
    said: list[str] = []
    backlog = Backlog(fake, say=said.append)
    backlog.start(STUDY)
    backlog.artifact(tmp_path / "gone.csv")
    backlog.end("complete")
    assert backlog.close(WAIT_S) == 0
    assert "gone.csv" in said[0]
    assert fake.calls == [("start",), ("end", "complete")]


def test_trouble_is_a_warning_by_default_and_survives_warnings_as_errors():
    fake = Fake()
    fake.failing = 10**9
    with pytest.warns(NasplatWarning, match="cannot be recorded now"):
        backlog = Backlog(fake)
        backlog.start(STUDY, [trial(0)])
        assert backlog.close(WAIT_S) == 1
    # Here the suite's own filter makes it an error; the thread must live on and deliver.
    fake = Fake()
    fake.failing = 1
    backlog = Backlog(fake, retry_s=0.001)
    backlog.start(STUDY, [trial(0)])
    backlog.log(trial(1))
    while fake.logged != [0, 1]:
        assert backlog._thread is not None and backlog._thread.is_alive()
        time.sleep(0.001)
    assert backlog.close(WAIT_S) == 0


def test_close_without_start_is_nothing():
    assert Backlog(Fake()).close(1.0) == 0


def test_study_tags(tmp_path):
    tags = study_tags(tmp_path)  # not a git checkout
    assert tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"version.torch", "version.mlflow"} <= set(tags)
    assert "git.commit" not in tags
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    tags = study_tags(tmp_path)
    assert len(tags["git.commit"]) == 40
    assert tags["git.dirty"] == "false"
    (tmp_path / "file").write_text("2")
    assert study_tags(tmp_path)["git.dirty"] == "true"


def test_importing_trackers_does_not_import_mlflow():
    code = "import sys, nasplat.tracking, nasplat.mlflow_tracker; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
