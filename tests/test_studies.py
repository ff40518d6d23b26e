"""Each study runs from its own command, in its short form."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import nasplat.export

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.name for path in (ROOT / "studies").glob("*.py"))


def run(study: str, folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, str(ROOT / "studies" / study), "--smoke", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_studies() -> None:
    assert "demo.py" in STUDIES


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "differentiable.py"))
        for name in STUDIES
        if name not in ("demo.py", "spaces.py")
    ],
)
def test_runs_in_short(study: str, tmp_path: Path) -> None:
    assert run(study, tmp_path).strip()


@pytest.mark.slow
def test_every_space_is_searched_by_every_kind_of_strategy(tmp_path: Path) -> None:
    rows = run("spaces.py", tmp_path).splitlines()[1:]
    for kind in ("random search", "regularised evolution", "TPE", "DARTS"):
        spaces = {row[:26].strip() for row in rows if row[26:50].strip() == kind}
        assert len(spaces) == 6, f"{kind} searched {spaces}"
    accuracies = [float(row[59:74]) for row in rows]
    assert len(rows) == 25 and all(0 <= accuracy <= 1 for accuracy in accuracies)


def again(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The demo once more, in this process and with the weights alone exported: a first run exported every file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo.py", "--smoke", *arguments])
        patch.setattr(nasplat.export, "export", partial(nasplat.export.export, targets=()))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "studies" / "demo.py"), run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_demo_searches_shows_exports_and_says_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("demo.py", tmp_path, "--trials", "3")
    assert "Leaderboard" in first and "Pareto front" in first and "nasplat ui" in first
    best = tmp_path / "runs" / "demo" / "best"
    report = json.loads((best / "report.json").read_text())
    assert {file["verdict"] for file in report["files"].values()} <= {"equal", "close"}
    assert 0.0 <= report["metrics"]["test_accuracy"] <= 1.0
    assert {"architecture.json", "weights.safetensors", "model.pt2", "model.onnx"} <= {p.name for p in best.iterdir()}
    journal = (tmp_path / "runs" / "demo" / "history.jsonl").read_bytes()

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    second = again(capsys, "--trials", "3")
    assert "is complete" in second and "Leaderboard" in second and "To go on" in second
    assert (tmp_path / "runs" / "demo" / "history.jsonl").read_bytes() == journal
    assert json.loads((best / "report.json").read_text())["architecture"] == report["architecture"]

    further = again(capsys, "--trials", "4")
    assert "is complete" not in further
    assert len((tmp_path / "runs" / "demo" / "history.jsonl").read_bytes()) > len(journal)
