import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

import nasplat
from nasplat import cli, journal
from nasplat.cli import values
from nasplat.errors import InvalidInputError
from nasplat.task import Task
from search_spaces import Bats
from strategies import BatsSearch, Darts, OneShot, OptunaSearch, RegularizedEvolution

TINY = ["--space", "bats", "-s", "cells=1", "--task", "digits", "-t", "epochs=1", "-t", "limit=60"]
"""The quickest study: one cell, 60 images, one epoch."""


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def search(folder: Path, *arguments: str) -> Any:
    return call(
        "search", *TINY, "--strategy", "random_search", "--folder", folder, "--tracker", "none", "-q", *arguments
    )


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trials, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    done = search(folder, "--trials", "3", "--objective", "max:val_accuracy", "--objective", "min:params")
    assert done.exit_code == 0, done.output
    return folder


# What is installed.


def test_version() -> None:
    done = call("--version")
    assert (done.exit_code, done.stdout.strip()) == (0, f"nasplat {nasplat.__version__}")


@pytest.mark.parametrize("command", [[], ["spaces"], ["search"], ["resume"], ["show"], ["export"], ["draw"], ["ui"]])
def test_help(command: list[str]) -> None:
    done = call(*command, "--help")
    assert done.exit_code == 0
    if not command:
        assert "Exit codes" in done.stdout and "130" in done.stdout


def test_runtimes_are_listed_with_what_they_find_here() -> None:
    text = call("runtimes").stdout
    assert "nasplat.runtimes.onnx_runtime:OnnxRuntime" in text
    assert "providers CPUExecutionProvider" in text


def test_spaces_are_listed_with_parameters_and_presets() -> None:
    text = call("spaces").stdout
    assert "search_spaces.bats:Bats" in text
    assert "cells" in text and "20" in text and "Number of cells." in text
    assert all(f"bats:{preset}" in text for preset in ("small", "cifar", "imagenet"))


def test_strategies_are_listed_with_explorers() -> None:
    text = call("strategies").stdout
    assert all(
        name in text for name in ("random_search", "regularized_evolution", "optuna", "one_shot", "bats_search:small")
    )
    assert "population" in text and "(required)" in text


# Values.


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("1e3", int, 1000),
        ("3", float, 3.0),
        ("true", bool, True),
        ("False", bool, False),
        ("123", str, "123"),
        ('"a b"', str, "a b"),
        ("none", int | None, None),
        ("5", int | None, 5),
        ("0.5", float | None, 0.5),
        ("sgd", Literal["adam", "sgd"], "sgd"),
        ("flip,shift", tuple[str, ...], ("flip", "shift")),
        ('["flip"]', tuple[str, ...], ("flip",)),
        ("0.5,0.9", tuple[float, float], (0.5, 0.9)),
        ("1,2", Sequence[int], (1, 2)),
        ('{"n": 1}', Mapping[str, Any], {"n": 1}),
        ("tpe", str | type[int], "tpe"),
        ("[1, 2]", Any, [1, 2]),
    ],
)
def test_values_follow_the_type(text: str, annotation: Any, value: Any) -> None:
    parsed = values.parse(text, annotation, "x")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [("a", int), ("1.5", int), ("true", int), ("a", float), ("1", bool), ("rms", Literal["adam"]), ("1,2", tuple[int])],
)
def test_wrong_values_are_named(text: str, annotation: Any) -> None:
    with pytest.raises(InvalidInputError, match="epochs of digits is"):
        values.parse(text, annotation, "epochs of digits")


@pytest.mark.parametrize(
    ("group", "reference", "given", "made"),
    [
        ("search_spaces", "bats", {}, Bats.small()),
        ("search_spaces", "bats:cifar", {"classes": "100"}, Bats.cifar(classes=100)),
        ("search_spaces", "bats:imagenet", {"wide": "true"}, Bats.imagenet(wide=True)),
        ("strategies", "regularized_evolution", {"population": "5"}, RegularizedEvolution(population=5)),
        ("strategies", "optuna", {"sampler": "nsga2"}, OptunaSearch("nsga2")),
        ("strategies", "one_shot", {"explorer": "darts", "explorer.epochs": "3"}, OneShot(Darts(epochs=3))),
        ("strategies", "one_shot", {"explorer": "bats_search"}, OneShot(BatsSearch.small())),
        ("strategies", "one_shot", {"explorer": "bats_search:paper"}, OneShot(BatsSearch())),
        (
            "strategies",
            "one_shot",
            {"explorer": "bats_search", "explorer.epochs": "3", "explorer.stages": "[]", "explorer.early_stop": "none"},
            OneShot(BatsSearch.small(epochs=3, stages=())),
        ),
        (
            "strategies",
            "one_shot",
            {
                "explorer": "darts",
                "explorer.order": "second",
                "explorer.partial": "2",
                "explorer.alpha_betas": "0.5,0.9",
            },
            OneShot(Darts(order="second", partial=2, alpha_betas=(0.5, 0.9))),
        ),
    ],
)
def test_plugins_are_made_from_text(group: str, reference: str, given: dict[str, str], made: Any) -> None:
    assert values.plugin_of(f"nasplat.{group}", reference, given) == made


@pytest.mark.parametrize(
    ("name", "text"),
    [("stages", '[{"cells": 5}]'), ("stages", "5"), ("early_stop", "true"), ("resource", '{"target": 1}')],
)
def test_what_only_python_can_make_says_so(name: str, text: str) -> None:
    given = {"explorer": "darts", f"explorer.{name}": text}
    with pytest.raises(InvalidInputError, match=f"{name}.*(made in Python|legal|is needed)"):
        values.plugin_of("nasplat.strategies", "one_shot", given)


def test_tasks_are_made_from_text() -> None:
    made = values.task_of("fashion-mnist", {"epochs": "2", "size": "16", "lr": "0.01", "augment": "flip"})
    assert made == Task.fashion_mnist(epochs=2, size=16, lr=0.01, augment=("flip",))


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--space", "nothing"], 1, "installed: bats"),
        (["--space", "bats:huge"], 1, "small, cifar, imagenet"),
        (["-s", "cels=1"], 1, "there are: cells"),
        (["-s", "cells=many"], 1, "cells of bats is 'many'; int is needed"),
        (["-s", "cells"], 2, "KEY=VALUE"),
        (["--strategy", "one_shot"], 1, "explorer=..."),
        (["--strategy", "one_shot", "-p", "explorer.epochs=3"], 1, "explorer=NAME"),
        (["--strategy", "one_shot", "-p", "explorer=none"], 1, "installed: bats_search, darts"),
        (["--task", "cifar"], 1, "fashion-mnist, digits"),
        (["-t", "lr=-1"], 1, "must be positive"),
        (["--objective", "val_accuracy"], 2, "max:METRIC"),
        (["--objective", "max:joy"], 1, "nothing in this study provides 'joy'"),
        (["--constraint", "params<1"], 2, "METRIC<=NUMBER"),
        (["--trials", "few"], 2, "integer"),
        (["--seed", "-1"], 1, "seed is -1"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    done = search(tmp_path / "study", *arguments)
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "study").exists()


def test_another_study_is_refused_by_name(study: Path) -> None:
    done = search(study, "--seed", "7")
    assert done.exit_code == 1
    assert "another seed" in done.stderr


@pytest.mark.parametrize("command", [["show"], ["resume"], ["export", "--to", "out"]])
def test_an_empty_folder(tmp_path: Path, command: list[str]) -> None:
    done = call(command[0], tmp_path, *command[1:])
    assert done.exit_code == 1
    assert "no study in" in done.stderr


# Searching and looking.


def test_search_shows_what_it_found(tmp_path: Path) -> None:
    done = search(tmp_path / "a", "--trials", "2", "--constraint", "params<=1e9")
    assert done.exit_code == 0, done.output
    assert "2 trials: 2 complete" in done.stdout and "val_accuracy" in done.stdout and "nasplat export" in done.stdout
    again = search(tmp_path / "a", "--trials", "3", "--constraint", "params<=1e9")
    assert again.exit_code == 0 and "3 trials: 3 complete" in again.stdout


def test_nothing_feasible_is_exit_code_3(tmp_path: Path) -> None:
    done = search(tmp_path / "a", "--trials", "1", "--constraint", "params<=1")
    assert done.exit_code == 3, done.output
    assert "No candidate was trained in full" in done.stderr
    assert "must be params at most 1" in done.stdout


def test_resume_goes_on_with_the_same_settings(tmp_path: Path) -> None:
    search(tmp_path / "a", "--trials", "1", "--objective", "min:val_loss", "--threads", "2")
    done = call("resume", tmp_path / "a", "-q")
    assert done.exit_code == 0 and "1 trial: 1 complete" in done.stdout
    done = call("resume", tmp_path / "a", "--trials", "2", "-q")
    assert done.exit_code == 0 and "2 trials: 2 complete" in done.stdout
    sessions = [event for event in journal.read(tmp_path / "a")[0] if event["event"] == "session"]
    assert [session["run"]["max_trials"] for session in sessions] == [1, 1, 2]
    assert all(session["settings"]["threads"] == 2 for session in sessions)
    assert sessions[-1]["objectives"] == [{"metric": "val_loss", "direction": "minimise"}]
    # Begun without a record, so gone on without one.
    assert not (tmp_path / "mlflow.db").exists()


def test_show(study: Path) -> None:
    done = call("show", study, "--limit", "2")
    assert done.exit_code == 0
    assert "complete: 3 of 3 trials" in done.stdout and "Pareto front" in done.stdout
    assert "maximise val_accuracy, minimise params" in done.stdout
    assert "1 more" in done.stdout and "No MLflow record" in done.stdout


def test_show_one_trial_and_a_picture_of_the_front(study: Path, tmp_path: Path) -> None:
    text = call("show", study, "--trial", "1").stdout
    assert text.startswith("trial 1, architecture ") and "genes" in text and "val_accuracy" in text
    assert call("show", study, "--trial", "9").exit_code == 1
    done = call("show", study, "--plot", tmp_path / "front.png")
    assert done.exit_code == 0 and (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_show_as_csv(study: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(call("show", study, "--csv").stdout)))
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["params"]) > 0 for row in rows)


def test_export(study: Path, tmp_path: Path) -> None:
    done = call("export", study, "--to", tmp_path / "best")
    assert done.exit_code == 0, done.output
    assert "model.onnx is" in done.stdout and "test_accuracy" in done.stdout
    assert {"architecture.json", "weights.safetensors", "model.pt2", "model.onnx", "report.json"} <= {
        path.name for path in (tmp_path / "best").iterdir()
    }
    wrong = call("export", study, "--to", tmp_path / "none", "--trial", "99")
    assert wrong.exit_code == 1 and "trial 99" in wrong.stderr


def test_draw(study: Path, tmp_path: Path) -> None:
    best = nasplat.load(study).best
    done = call("draw", study, "--to", tmp_path / "new" / "best.svg")
    assert done.exit_code == 0, done.output
    assert f"trial {best.trial.number}, architecture {best.architecture.id}" in done.stdout
    assert (tmp_path / "new" / "best.svg").read_text() == best.draw().svg()
    other = next(trial.number for trial in nasplat.load(study).trials if trial.number != best.trial.number)
    done = call("draw", study, "-o", tmp_path / "other.png", "--trial", other)
    assert done.exit_code == 0 and f"trial {other}," in done.stdout
    assert (tmp_path / "other.png").read_bytes() == nasplat.load(study).candidate(other).draw().png()
    wrong = call("draw", study, "-o", tmp_path / "best.jpg")
    assert wrong.exit_code == 1 and ".svg, .png or .pdf" in wrong.stderr
    wrong = call("draw", study, "-o", tmp_path / "none.svg", "--trial", "99")
    assert wrong.exit_code == 1 and "trial 99" in wrong.stderr and not (tmp_path / "none.svg").exists()


# MLflow's own interface.


def test_ui_starts_mlflow_on_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append([program, *arguments]))
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / journal.FILE).touch()
    missing = call("ui", tmp_path / "runs" / "a")
    assert missing.exit_code == 1 and "no record found" in missing.stderr
    with journal.Journal(tmp_path / "runs" / "a") as held:
        held.append({"event": "study", "schema": 1, "id": "abc", "settings": {"tracker": "mlflow"}})
    (tmp_path / "runs" / "mlflow.db").touch()
    monkeypatch.chdir(tmp_path)
    for arguments in ([tmp_path / "runs" / "a"], [tmp_path / "runs"], []):
        done = call("ui", *arguments, "--port", "5987")
        assert done.exit_code == 0, done.output
        assert "http://127.0.0.1:5987" in done.stdout
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert all(command[command.index("--backend-store-uri") + 1] == uri for command in started)
    assert len(started) == 3


def test_ui_of_a_server_only_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://records:5000")
    done = call("ui")
    assert done.exit_code == 0 and "http://records:5000" in done.stdout


# As a process.


def command(*arguments: str | Path) -> list[str]:
    """The installed command, with the signal handling of a terminal even where the tests run in the background."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from nasplat.cli import main; sys.argv[0] = 'nasplat'; main()"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_exit_code_of_a_process(tmp_path: Path) -> None:
    done = subprocess.run(command("show", tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.startswith("Error: no study in") and "Traceback" not in done.stderr


def test_ctrl_c_is_clean_and_resume_finishes(tmp_path: Path) -> None:
    folder = tmp_path / "a study"
    arguments = ["search", *TINY, "--strategy", "random_search", "--folder", folder, "--tracker", "none"]
    process = subprocess.Popen(
        command(*arguments, "--trials", "5000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and '"finish"' not in _text(folder / journal.FILE):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    how = f"nasplat resume {shlex.quote(str(folder))}"
    assert how in stderr
    assert f"interrupted; to go on: {how}" in call("show", folder).stdout

    finished = [event for event in journal.read(folder)[0] if event["event"] == "finish"]
    done = call("resume", folder, "--trials", str(len(finished) + 2), "-q")
    assert done.exit_code == 0, done.output
    assert f"{len(finished) + 2} trials: {len(finished) + 2} complete" in done.stdout
    # What had finished was not run again.
    again = [event for event in journal.read(folder)[0] if event["event"] == "finish"]
    assert [json.dumps(event) for event in again[: len(finished)]] == [json.dumps(event) for event in finished]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
