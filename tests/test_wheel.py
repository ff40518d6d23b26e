"""The wheel holds what it needs: built, installed outside the checkout, and searched with there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SEARCH = """
import sys
from pathlib import Path
import nasplat
from nasplat import Study, Task, maximise
from nasplat.plugins import SPACES, STRATEGIES, load
here = Path(sys.prefix).resolve()
for module in (nasplat, sys.modules[load(SPACES, "bats").__module__]):
    assert here in Path(module.__file__).resolve().parents, module.__file__
study = Study(load(SPACES, "bats").small(), load(STRATEGIES, "random_search")(),
              Task.fashion_mnist(epochs=1, size=8, limit=100), [maximise("val_accuracy")],
              folder="runs/wheel", tracker=None, progress=False)
result = study.run(max_trials=2)
assert [trial.state for trial in result.trials] == ["complete", "complete"], result.table()
print("searched", len(result.trials))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "nasplat/data/fashion_mnist_6k.npz" in names
    assert any(name.endswith("fashion_mnist_6k.LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "nasplat", "search_spaces", "strategies",
    }  # fmt: skip
    assert "nasplat/testing/space_contract.py" in names
    data = zipfile.ZipFile(wheel).getinfo("nasplat/data/fashion_mnist_6k.npz")
    assert data.file_size <= 3_000_000


def _environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def _clean(folder: Path) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return variables | {"HOME": str(folder)}


def test_searches_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Its own environment holds nothing but the wheel; the dependencies are lent by the one that runs the tests."""
    python = _environment(tmp_path / "venv")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, timeout=120
    )
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # A path line lends packages without following the .pth files there, so an editable checkout stays out of reach.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [python, "-c", SEARCH], cwd=tmp_path, env=_clean(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "searched 2"


@pytest.mark.slow
def test_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The same with the dependencies that the wheel itself names, pinned by constraints.txt."""
    python = _environment(tmp_path / "venv")
    for what in (["torch"], [str(wheel)]):
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), *what],
            check=True, timeout=1800,
        )  # fmt: skip
    done = subprocess.run(
        [python, "-c", SEARCH], cwd=tmp_path, env=_clean(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "searched 2"
