"""The comparison of strategies on a table of made-up numbers, and what the benchmark of packed programs is made of."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from search_spaces.bats import Bats

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


def load(name: str) -> Iterator[ModuleType]:
    """A script as a module. It puts the project's folder in front of the path."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    yield from load("strategies")


@pytest.fixture(scope="module")
def packed() -> Iterator[ModuleType]:
    pytest.importorskip("numba")
    yield from load("packed")


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


class Clock:
    """A subject that takes given seconds, and writes down when it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, int]], seconds: float) -> None:
        self.name, self.asked, self.taken = name, asked, seconds

    def seconds(self, calls: int, warm: bool) -> float:
        self.asked.append((self.name, calls))
        self.taken += 1e-4
        return self.taken


def test_subjects_take_turns(packed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed.measure.__globals__, "WARM_UP_SECONDS", 0)
    asked: list[tuple[str, int]] = []
    subjects = {name: Clock(name, asked, seconds) for name, seconds in (("a", 4e-4), ("b", 1e-2), ("c", 1e-3))}
    found = packed.measure(subjects, 4)
    # One warm-up each; then every round starts with the next one. As many calls as take 2 ms.
    assert [name for name, _ in asked] == [*"abc", *"abc", *"bca", *"cab", *"abc"]
    assert dict(asked[3:]) == {"a": 4, "b": 1, "c": 2}
    assert found["a"].samples == pytest.approx([6e-4, 7e-4, 8e-4, 9e-4])
    assert found["a"].best == pytest.approx(6e-4) and found["a"].spread == pytest.approx(7.5 / 6 - 1)
    assert len(packed.measure(subjects, 9, seconds=0.0)["a"].samples) == 3


def test_ratios_are_of_the_fastest_of_a_kind(packed: ModuleType) -> None:
    seconds = {"packed": (2.0, 3.0), "float32 torch": (30.0, 20.0), "float32 ORT": (12.0, 40.0), "int8 QDQ": (6.0, 8.0)}
    timings = {name: packed.Timing(samples) for name, samples in seconds.items()}
    row = packed.Row("layer", packed.Setting(1, 1), timings, {"family": "dense 3x3"})
    assert (row.best_ratio("float32"), row.best_ratio("int8"), row.ratio("float32 torch")) == (6, 3, 10)
    assert row.as_json()["ratios"] == {"float32 torch": 10, "float32 ORT": 6, "int8 QDQ": 3}
    assert packed.geometric_mean([2.0, 8.0]) == pytest.approx(4)


def test_layers_of_the_tables(packed: ModuleType) -> None:
    layers = packed.all_layers()
    families = [layer.family for layer in layers]
    assert len(set(layers)) == len(layers) == 43
    assert {name: families.count(name) for name in dict.fromkeys(families)} == {
        "dense 1x1": 9, "grouped 1x1": 6, "dense 3x3": 6, "grouped 3x3": 10,
        "BATS 3x3, 12 groups": 6, "BATS 5x5, 12 groups": 6,
    }  # fmt: skip
    assert {layer.family for layer in packed.quick_layers()} == set(families)
    assert str(layers[0]) == "64->64 32x32 k1" and layers[0].macs == 64 * 64 * 32 * 32


def test_times_a_layer(
    packed: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packed, "quick_layers", lambda: (packed.Layer(24, 12, 5, 3, 2, 12),))
    monkeypatch.setattr(packed, "SETTINGS", (packed.Setting(1, 1), packed.Setting(3, 1), packed.Setting(3, 4096)))
    assert packed.main(["--quick", "--layers", "--json", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    assert "left out: 4096 threads, batch 3" in text and "24->12 5x5 k3 d2 g12" in text
    one, three = json.loads((tmp_path / "found.json").read_text())["layers"]
    assert (one["batch"], three["batch"]) == (1, 3)
    for row in (one, three):
        assert set(row["ratios"]) == {
            *(f"float32 {name}" for name in ("torch", "torch cl", "ORT")),
            *(f"int8 {name}" for name in ("QDQ", "QLinear", "QLinear cl", "torch")),
        }
        assert all(len(samples) == 3 and min(samples) > 0 for samples in row["seconds"].values())
    assert one["bit_macs"] == 5 * 5 * 12 * 9 * 2 and one["steps_us"] >= one["conv_us"] > 0


def test_refuses_to_time_what_computes_something_else(packed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: object, example: object) -> object:
        return type("Wrong", (), {"save": lambda self, path: None, "__call__": lambda self, x, threads=1: -model(x)})()

    monkeypatch.setattr(packed, "pack", wrong)
    with pytest.raises(RuntimeError, match=r"4->4 5x5 k1: the packed layer differs"):
        packed.time_layer(packed.Layer(4, 4, 5, 1, 1, 1), [packed.Setting(1, 1)], packed.Effort(1, 1.0, "no"))


@pytest.mark.slow
def test_times_a_network_here_and_for_another_target(
    packed: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = Bats.small()
    network = packed.Network("small BATS", lambda: space.build(space.paper_genes()), (1, 16, 16))
    monkeypatch.setattr(packed, "all_networks", lambda experts: (network,))
    monkeypatch.setattr(packed, "SETTINGS", (packed.Setting(1, 1),))
    path = tmp_path / "found.json"
    assert packed.main(["--quick", "--networks", "--target", "x86-64", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "small BATS" in text and "packed@x86-64" in text and "every step is what the network computes" in text
    (row,) = json.loads(path.read_text())["networks"]
    assert {"graph ORT", "twin torch cl", "int8-twin ORT QDQ", "packed@x86-64"} <= set(row["ratios"])
    assert row["artefact_bytes"] < row["checkpoint_bytes"] and row["profile"]["arena_bytes"] > 0


# Costs.


@pytest.fixture(scope="module")
def cost() -> Iterator[ModuleType]:
    yield from load("cost")


def test_two_measurements_are_compared_by_hand(cost: ModuleType) -> None:
    from nasplat.cost.timing import Timing

    def timing(ms: float, suspect: str = "") -> Timing:
        facts = {"file_bytes": 100, "quiet_share": 0.5, "memory_slower": ms / 10}
        return Timing(((ms,),), (), ((1.0, 1.0),), 1.0, suspect, facts)

    first = [timing(1.0), timing(2.0), timing(3.0), timing(4.0, "disturbed"), timing(6.0)]
    second = [timing(1.01), timing(2.0), timing(3.6), timing(5.0), timing(6.0)]
    row = cost.compare(first, second)
    assert row["networks"] == 5 and row["flagged"] == 1
    assert row["off"] == 2 and row["silent_outliers"] == 1  # 3 against 3.6; 4 against 5 was flagged
    assert row["median_difference"] == pytest.approx(0.01)  # of 0.01, 0, 0.2, 0.25 and 0
    assert row["spearman"] == pytest.approx(1.0) and (row["least_ms"], row["greatest_ms"]) == (1.0, 6.0)
    assert row["quiet_share"] == 0.5 and row["memory_slower"] == pytest.approx(0.33)  # of 1, 1.01, 2, 2, 3, 3.6, 4 ...
    assert [pair[0]["suspect"] for pair in row["measurements"]] == ["", "", "", "disturbed", ""]


@pytest.mark.slow
def test_costs_are_measured_in_all_parts(cost: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    arguments = ["--part", "retest", "proxies", "seconds", "--networks", "3", "--spaces", "sandglass"]
    found = cost.main([*arguments, "--loads", "idle", "study", "--out", str(out)])
    assert set(found["retest"]) == {"sandglass/idle", "sandglass/study"}
    assert all(one["ms"] > 0 for row in found["retest"].values() for pair in row["measurements"] for one in pair)
    assert not {"params", "macs", "ops", "training graph"}.difference(found["proxies"]["sandglass"])
    assert found["seconds"]["sandglass"]["memory_bytes"] > 0
    assert json.loads(out.read_text())["seconds"] == found["seconds"]
