"""The comparison of strategies on a table of made-up numbers."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every convolution is worth 2 %, every skip to the output 1 %; trainings differ by noise."""
    codes = np.array(list(product(range(5), repeat=6)), dtype=np.uint8)
    rng = np.random.default_rng(0)
    worth = 80 + 2.0 * (codes == 3).sum(axis=1) + (codes[:, 3:] == 1).sum(axis=1)
    path = tmp_path_factory.mktemp("table") / "table.npz"
    np.savez(
        path,
        code=codes,
        cifar10_val200_s0=worth + rng.normal(0, 0.2, len(codes)),
        cifar10_val200_s1=worth + rng.normal(0, 0.2, len(codes)),
        cifar10_test200_mean=worth,
        cifar10_val12=worth - 20 + rng.normal(0, 1, len(codes)),
        cifar10_train_time200_s=1000 + 100.0 * (codes == 3).sum(axis=1),
        cifar10_params_M=(codes == 3).sum(axis=1) * 0.25,
        lat_ms_pixel2=4.0 + (codes == 3).sum(axis=1) * 3 + (codes == 2).sum(axis=1),
    )
    return path


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The script as a module. It puts the project's folder in front of the path."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("benchmarks.strategies", ROOT / "benchmarks" / "strategies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


Compare = Callable[..., str]


@pytest.fixture
def compare(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> Compare:
    def run(table: Path, output: Path, *arguments: str) -> str:
        assert benchmark.main(["--table", str(table), "--output", str(output), "--jobs", "1", *arguments]) == 0
        return capsys.readouterr().out

    return run


def without_times(text: str) -> list[list[str]]:
    """The cells of the tables that do not tell times."""
    return [line.split("  ")[0].split() + line.split("  ")[1:4] for line in text.splitlines() if "[" in line]


def test_compares_strategies(compare: Compare, table: Path, tmp_path: Path) -> None:
    chosen = "random,evolution,optuna-tpe,halving,two-random,two-optuna-nsga2"
    shared = ("--evaluations", "10,80", "--seeds", "6")
    text = compare(table, tmp_path / "one", *shared, "--strategies", chosen, "--figure")
    parts = text.split("\ncifar10: ")
    assert [part.split(",")[0].split(" in %")[0] for part in parts[1:]] == [
        "test accuracy of the pick", "test accuracy of the pick", "hypervolume"
    ]  # fmt: skip
    for part, rows in zip(parts[1:], (3, 4, 2), strict=True):
        assert sum("[" in line for line in part.splitlines()) == rows, part
    assert "reference point: accuracy" in text and "latency_ms_pixel2" in text and "fpga" not in text
    assert (tmp_path / "one" / "curves.png").stat().st_size > 10_000

    with (tmp_path / "one" / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    evolution, random = (
        [float(row["mean"]) for row in curves if row["strategy"] == name and row["unit"] == "evaluations"]
        for name in ("evolution", "random")
    )
    assert len(evolution) == len(random) == 80
    # Both begin with the same cells: the population of evolution is what random search draws.
    assert evolution[:20] == random[:20]
    assert evolution[-1] > random[-1], "on a landscape without traps evolution must be ahead"
    assert 80 < random[0] < random[-1] < evolution[-1] <= 92

    # In two calls, the same searches, and a report of both.
    for name in ("evolution", "two-random"):
        compare(table, tmp_path / "two", *shared, "--strategies", name)
    again = compare(table, tmp_path / "two", *shared, "--report")
    assert "regularised evolution" in again and "hypervolume" in again
    for name in ("evolution", "two-random@latency_ms_pixel2"):
        one, two = (np.load(tmp_path / folder / "runs" / f"{name}.npz") for folder in ("one", "two"))
        assert {n for n in one.files if not np.array_equal(one[n], two[n])} <= {"cpu_seconds"}


def test_says_what_is_left_out_and_what_is_legal(
    compare: Compare, benchmark: ModuleType, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(table) as held:
        short = {name: held[name] for name in held.files if not any(part in name for part in ("12", "lat_", "test"))}
    np.savez(tmp_path / "short.npz", **short)
    text = compare(
        tmp_path / "short.npz", tmp_path / "out", "--seeds", "1", "--evaluations", "5",
        "--strategies", "random,halving,two-random",
    )  # fmt: skip
    assert "left out: searches with short trainings: the table has none" in text
    assert "left out: two objectives: the table has no latencies" in text
    assert "the table has no test accuracies" in text
    # Results of another table are not mixed in.
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--table", str(table), "--strategies", "rnd"])
    assert ended.value.code == 2
    assert "--strategies has rnd; legal: random, evolution" in capsys.readouterr().err
    assert benchmark.main(["--table", str(table), "--output", str(tmp_path / "out"), "--report"]) == 1
    assert "left out, made with another table or number of evaluations" in capsys.readouterr().out


@pytest.mark.slow
def test_as_a_script_with_two_processes(compare: Compare, table: Path, tmp_path: Path) -> None:
    chosen = ("--evaluations", "10", "--seeds", "4", "--strategies", "random,evolution")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "strategies.py"), "--table", str(table),
         "--output", str(tmp_path / "two"), "--jobs", "2", *chosen],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert without_times(done.stdout) == without_times(compare(table, tmp_path / "one", *chosen))
