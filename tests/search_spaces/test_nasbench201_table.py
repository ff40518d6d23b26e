import math
import os
import pickle
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nasplat import Study, Task, at_least, maximise, minimise
from nasplat.architecture import Architecture
from nasplat.errors import FolderMismatchError, InvalidInputError
from nasplat.identity import describe
from search_spaces.nasbench201 import EDGES, OPERATIONS, NasBench201
from search_spaces.nasbench201_table import NasBench201Table
from strategies import RandomSearch

SPACE = NasBench201()
REAL = os.environ.get("NASPLAT_NASBENCH201", "")


def cell(*codes: int) -> Architecture:
    return SPACE.architecture({f"{s}-{t}": OPERATIONS[code] for (s, t), code in zip(EDGES, codes, strict=True)})


def columns(**changes: Any) -> dict[str, np.ndarray]:
    """Three cells; the second joins nothing, the third was trained twice only."""
    held: dict[str, Any] = {
        "code": np.array([(3, 3, 3, 1, 3, 2), (3, 3, 3, 0, 0, 0), (4, 2, 1, 2, 1, 1)], dtype=np.uint8),
        "cifar10_val200_s0": np.array([91.5, 9.7, 82.0], dtype=np.float32),
        "cifar10_val200_s1": np.array([91.7, 9.8, 81.5], dtype=np.float32),
        "cifar10_val200_s2": np.array([91.6, 9.9, np.nan], dtype=np.float32),
        "cifar10_test200_mean": np.array([94.25, 10.0, 85.5], dtype=np.float32),
        "cifar10_val12": np.array([80.5, 9.7, 60.0], dtype=np.float32),
        "cifar10_test12": np.array([82.0, 10.0, 61.0], dtype=np.float32),
        "cifar10_train_time200_s": np.array([2800.0, 2000.0, 1400.0], dtype=np.float32),
        "cifar10_params_M": np.array([1.073466, 0.802426, 0.129306], dtype=np.float32),
        "lat_ms_pixel2": np.array([25.0, 12.0, 9.0], dtype=np.float32),
        "lat_ms_raspi4": np.array([60.5, 0.0125, 14.5], dtype=np.float32),
    }
    held |= changes
    return {name: values for name, values in held.items() if values is not None}


def write(path: Path, held: Mapping[str, np.ndarray] | None = None) -> Path:
    np.savez(path, **(columns() if held is None else held))
    return path


@pytest.fixture
def table(tmp_path: Path) -> NasBench201Table:
    return NasBench201Table(write(tmp_path / "table.npz"))


def test_full_training(table: NasBench201Table) -> None:
    best = cell(3, 3, 3, 1, 3, 2)
    metrics = table(best, 1.0, 0)
    assert metrics == pytest.approx(
        {
            "val_accuracy": 0.915,
            "test_accuracy": 0.9425,
            "train_seconds": 2800.0,
            "params": 1_073_466,
            "latency_ms_pixel2": 25.0,
            "latency_ms_raspi4": 60.5,
            "connected": 1.0,
        }
    )
    assert set(metrics) == set(table.metrics)
    assert list(table.metrics[:3]) == ["val_accuracy", "test_accuracy", "train_seconds"]
    assert metrics["params"] == 1_073_466, "a whole number, although the file has millions in 32 bits"


def test_seed_chooses_among_trainings_that_all_cells_have(table: NasBench201Table) -> None:
    # The third training is missing for one cell, so no cell's is used.
    assert table.seeds == 2
    best = cell(3, 3, 3, 1, 3, 2)
    assert [round(table(best, 1.0, seed)["val_accuracy"], 4) for seed in (0, 1, 2, 3)] == [0.915, 0.917, 0.915, 0.917]
    assert table.mean_val_accuracy(best) == pytest.approx(0.916)
    assert table.mean_val_accuracy(cell(4, 2, 1, 2, 1, 1)) == pytest.approx(0.8175)
    assert table.test_accuracy(best) == pytest.approx(0.9425)


@pytest.mark.parametrize("budget", [0.06, 1 / 16, 1 / 17])
def test_short_training(table: NasBench201Table, budget: float) -> None:
    metrics = table(cell(3, 3, 3, 1, 3, 2), budget, 1)
    assert metrics["val_accuracy"] == pytest.approx(0.805)
    assert metrics["test_accuracy"] == pytest.approx(0.82)
    assert metrics["train_seconds"] == pytest.approx(2800 * 12 / 200)


def test_costs_alone(table: NasBench201Table) -> None:
    metrics = table(cell(3, 3, 3, 0, 0, 0), 0.0, 0)
    assert metrics == pytest.approx(
        {"params": 802_426, "latency_ms_pixel2": 12.0, "latency_ms_raspi4": 0.0125, "connected": 0.0}
    )


@pytest.mark.parametrize("budget", [0.5, 0.001, 0.07, 0.99])
def test_other_budgets_are_refused(table: NasBench201Table, budget: float) -> None:
    with pytest.raises(InvalidInputError, match=r"budget is .*this table has 0, 0\.06, 1: 0, 12, 200 of 200 epochs"):
        table(cell(3, 3, 3, 1, 3, 2), budget, 0)


def test_a_table_without_test_and_short_trainings(tmp_path: Path) -> None:
    held = columns(cifar10_test200_mean=None, cifar10_val12=None, cifar10_test12=None)
    table = NasBench201Table(write(tmp_path / "table.npz", held))
    assert table.budgets == (0.0, 1.0)
    assert "test_accuracy" not in table.metrics
    assert "test_accuracy" not in table(cell(3, 3, 3, 1, 3, 2), 1.0, 0)
    with pytest.raises(InvalidInputError, match="this table has 0, 1"):
        table(cell(3, 3, 3, 1, 3, 2), 0.06, 0)
    with pytest.raises(InvalidInputError, match="has no cifar10_test200_mean"):
        table.test_accuracy(cell(3, 3, 3, 1, 3, 2))


def test_several_data_sets(tmp_path: Path) -> None:
    held = columns()
    other = {name.replace("cifar10_", "cifar100_"): held[name] / 2 for name in held if name.startswith("cifar10_")}
    path = write(tmp_path / "table.npz", held | other)
    with pytest.raises(InvalidInputError, match=r"dataset is ''; .* has 'cifar10', 'cifar100'"):
        NasBench201Table(path)
    assert NasBench201Table(path, "cifar100")(cell(3, 3, 3, 1, 3, 2), 1.0, 0)["val_accuracy"] == pytest.approx(0.4575)
    assert NasBench201Table(path, "cifar10") != NasBench201Table(path, "cifar100")


def test_unknown_cells_and_other_spaces(table: NasBench201Table) -> None:
    with pytest.raises(InvalidInputError, match=r"has 3 of 15625 cells, and .* is not among them"):
        table(cell(0, 0, 0, 0, 0, 0), 1.0, 0)
    with pytest.raises(InvalidInputError, match="0-1 is None; legal: none, skip_connect"):
        table(Architecture("Other", {"width": 16}), 1.0, 0)
    # The cell is what counts, not the size of the network around it.
    small = NasBench201.small()
    assert table(small.architecture(cell(3, 3, 3, 1, 3, 2).genes), 1.0, 0)["val_accuracy"] == pytest.approx(0.915)


def test_every_cell_has_its_row(tmp_path: Path) -> None:
    codes = np.array(list(product(range(5), repeat=6)), dtype=np.uint8)
    numbers = np.arange(len(codes)) / 1000
    held = {
        "code": codes, "d_val200_s0": numbers, "d_train_time200_s": numbers + 1, "d_params_M": numbers
    }  # fmt: skip
    table = NasBench201Table(write(tmp_path / "table.npz", held))
    assert len(table) == 15_625
    assert list(table.architectures())[5_000] == cell(*codes[5_000])
    for architecture, row in zip(table.architectures(), range(0, 15_625), strict=True):
        if row % 371 == 0:
            assert table.row(architecture) == row
            assert table(architecture, 0.0, 0)["connected"] == SPACE.connected(architecture)


def test_is_known_by_content(tmp_path: Path, table: NasBench201Table) -> None:
    elsewhere = NasBench201Table(write(tmp_path / "elsewhere.npz"))
    other = NasBench201Table(write(tmp_path / "other.npz", columns(lat_ms_raspi4=None)))
    assert elsewhere == table and hash(elsewhere) == hash(table) and describe(elsewhere) == describe(table)
    assert other != table and describe(other) != describe(table)
    assert "elsewhere" not in str(describe(elsewhere))


def test_survives_pickle_and_notices_another_file(tmp_path: Path, table: NasBench201Table) -> None:
    data = pickle.dumps(table)
    assert len(data) < 1000, "another process reads the file itself"
    assert pickle.loads(data)(cell(4, 2, 1, 2, 1, 1), 1.0, 0) == table(cell(4, 2, 1, 2, 1, 1), 1.0, 0)
    write(tmp_path / "table.npz", columns(lat_ms_raspi4=None))
    with pytest.raises(InvalidInputError, match="its content has changed"):
        pickle.loads(data)(cell(4, 2, 1, 2, 1, 1), 1.0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": None}, "lacks code; a table of cifar10 needs code, cifar10_val200_s0"),
        ({"cifar10_train_time200_s": None}, "lacks cifar10_train_time200_s"),
        ({"code": np.zeros((3, 5), dtype=np.uint8)}, r"code is uint8 of shape \(3, 5\); integers \(rows, 6\)"),
        ({"code": np.zeros((3, 6), dtype=np.uint8)}, "code lists a cell twice"),
        ({"code": np.full((3, 6), 5, dtype=np.uint8)}, r"code is in 5\.\.5; legal: 0 to 4"),
        ({"lat_ms_raspi4": np.zeros(2)}, r"lat_ms_raspi4 has shape \(2,\); legal: \(3,\)"),
        ({f"cifar10_val200_s{seed}": np.full(3, np.nan) for seed in range(3)}, "is without NaN"),
        ({f"cifar10_val200_s{seed}": None for seed in range(3)}, "none, so it is no table of NAS-Bench-201"),
    ],
)
def test_wrong_files_say_what_is_needed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        NasBench201Table(write(tmp_path / "table.npz", columns(**changes)))


class Opened:
    """What an unpickler would call."""

    def __reduce__(self) -> Any:
        return (os.putenv, ("NASPLAT_UNPICKLED", "1"))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read: No such file"):
        NasBench201Table(tmp_path / "none.npz")
    text = tmp_path / "text.npz"
    text.write_text("code")
    with pytest.raises(InvalidInputError, match=r"an \.npz file of plain arrays is needed"):
        NasBench201Table(text)
    alone = tmp_path / "alone.npy"
    np.save(alone, np.zeros(3))
    with pytest.raises(InvalidInputError, match=r"an \.npz file of plain arrays is needed"):
        NasBench201Table(alone)
    np.savez(tmp_path / "objects.npz", **columns(), more=np.array([Opened()], dtype=object))
    with pytest.raises(InvalidInputError, match=r"an \.npz file of plain arrays is needed"):
        NasBench201Table(tmp_path / "objects.npz")


def test_as_a_task(tmp_path: Path, table: NasBench201Table) -> None:
    task = table.task()
    assert isinstance(task, Task) and task.metric_names == table.metrics and task.name == "nas-bench-201 cifar10"
    codes = np.array(list(product(range(5), repeat=6)), dtype=np.uint8)
    rng = np.random.default_rng(0)
    held = {
        "code": codes,
        "d_val200_s0": rng.uniform(80, 90, len(codes)),
        "d_train_time200_s": np.full(len(codes), 1000.0),
        "d_params_M": np.full(len(codes), 0.5),
        "lat_ms_pixel3": rng.uniform(1, 9, len(codes)),
    }
    study: dict[str, Any] = {
        "space": SPACE,
        "strategy": RandomSearch(),
        "objectives": [maximise("val_accuracy"), minimise("latency_ms_pixel3")],
        "constraints": [at_least("connected", 1)],
        "folder": tmp_path / "study",
        "tracker": None,
    }
    path = write(tmp_path / "whole.npz", held)
    result = Study(task=NasBench201Table(path).task(), **study).run(max_trials=6)
    trials = result.history.trials
    assert len(trials) == 6 and {trial.state for trial in trials} == {"complete"}
    assert {trial.metrics["train_seconds"] for trial in trials} == {1000.0}, "the table's time, not the look-up's"
    # Moved, and gone on with; another content is another task.
    path.rename(tmp_path / "moved.npz")
    assert len(Study(task=NasBench201Table(tmp_path / "moved.npz").task(), **study).run(max_trials=8).history) == 8
    write(path, held | {"lat_ms_pixel3": held["lat_ms_pixel3"] + 1})
    with pytest.raises(FolderMismatchError):
        Study(task=NasBench201Table(path).task(), **study).run(max_trials=9)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="NASPLAT_NASBENCH201 names no table of CIFAR-10 (docs/spaces/nasbench201.md)")
class TestRealTable:
    def test_known_values(self) -> None:
        table = NasBench201Table(REAL, "cifar10")
        best = SPACE.from_string(
            "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
        )
        assert len(table) == 15_625 and table.seeds == 2
        assert max(table.test_accuracy(architecture) for architecture in table.architectures()) == pytest.approx(
            0.9437, abs=5e-5
        )
        assert table.test_accuracy(best) == pytest.approx(0.9437, abs=5e-5)
        assert sum(table(architecture, 0.0, 0)["connected"] for architecture in table.architectures()) == 15_625 - 341

    def test_parameters_are_those_of_the_networks(self) -> None:
        table = NasBench201Table(REAL, "cifar10")
        # By hand: what is not in cells, and a convolution in each of 15 cells.
        fixed = sum(p.numel() for p in SPACE.build(cell(0, 0, 0, 0, 0, 0)).parameters())
        conv = {k: 5 * sum(k * k * c * c + 2 * c for c in (16, 32, 64)) for k in (1, 3)}
        differ = 0
        for index, architecture in enumerate(table.architectures(SPACE)):
            options = list(architecture.genes.values())
            counted = fixed + options.count("nor_conv_1x1") * conv[1] + options.count("nor_conv_3x3") * conv[3]
            if index % 400 == 0:
                assert sum(p.numel() for p in SPACE.build(architecture).parameters()) == counted
            published = table(architecture, 0.0, 0)["params"]
            differ += not math.isclose(published, counted, abs_tol=1)
        # The benchmark's own, the same in all three data sets: as though an edge of these cells were another one.
        assert differ == 150
