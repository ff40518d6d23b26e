from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from nasplat import cli
from nasplat.cost import Bench
from nasplat.cost.breakdown import NO_MODULE, REST, Breakdown, Part, breakdown
from nasplat.cost.count import count_modules
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn import BinaryBlock
from nasplat.runtimes import TorchEager
from search_spaces import Bats


class Network(nn.Module):
    """A binary network with a module in a list, and an addition of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(BinaryBlock(8, 8, 3), nn.Sequential(BinaryBlock(8, 8, 3)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.pool(self.body(x) + x).flatten(1))


@pytest.fixture
def network():
    return Network().train()


EXAMPLE = torch.randn(1, 1, 12, 12)


def check(found, model):
    """What every breakdown keeps."""
    assert found.ms > 0
    assert all(part.ms >= 0 for part in found.parts)
    assert {part.module for part in found.parts} <= {name for name, _ in model.named_modules()}
    table = found.table()
    assert table["name"].tolist() == [*(part.name for part in found.parts), REST]
    # Nothing is hidden: the rows are the whole.
    assert table["ms"].sum() == pytest.approx(found.ms)
    assert table["share"].sum() == pytest.approx(1)
    assert found.by_kind().sum() == pytest.approx(found.ms)
    joined = found.with_counts(count_modules(model, EXAMPLE))
    assert joined["module"].tolist()[-2:] == [NO_MODULE, REST]
    assert joined["ms"].sum() == pytest.approx(found.ms)
    return {part.module for part in found.parts}


def test_torch_tells_each_module_that_holds_no_other(network, tmp_path):
    found = breakdown(network, EXAMPLE, "torch", runs=3, bench=Bench(tmp_path))
    leaves = {name for name, module in network.named_modules() if not list(module.children())}
    assert check(found, network) == leaves
    assert {part.name: part.kind for part in found.parts}["head"] == "Linear"
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_onnxruntime_tells_its_nodes(network, tmp_path):
    found = breakdown(network, EXAMPLE, "onnxruntime", runs=3, bench=Bench(tmp_path))
    modules = check(found, network)
    assert {"Conv", "PRelu", "Gemm"} <= set(found.by_kind().index)
    assert {"stem", "head", "body.1.0.conv"} <= modules
    assert not list(Path.cwd().glob("*profile*.json"))


def test_packed_tells_its_steps(network, tmp_path):
    pytest.importorskip("numba")
    found = breakdown(network, EXAMPLE, bench=Bench(tmp_path))
    assert found.runtime == "packed"
    modules = check(found, network)
    assert {"binary_conv", "pack", "conv"} <= set(found.by_kind().index)
    assert {"stem", "head"} <= modules
    assert any(module.startswith("body.1.0") for module in modules)


def test_a_shared_module_has_the_time_of_all_its_calls(tmp_path):
    layer = nn.Linear(4, 4)
    found = breakdown(nn.Sequential(layer, layer), torch.zeros(1, 4), "torch", runs=2, bench=Bench(tmp_path))
    assert [part.name for part in found.parts] == ["0"]


def test_a_runtime_that_does_not_tell_is_refused(tmp_path):
    class Silent(TorchEager):
        name = "silent"

    with pytest.raises(UnsupportedError, match="silent does not tell where its time goes; legal: packed"):
        breakdown(nn.Linear(2, 2), torch.zeros(1, 2), Silent(), bench=Bench(tmp_path))
    with pytest.raises(InvalidInputError, match="runs is 0"):
        breakdown(nn.Linear(2, 2), torch.zeros(1, 2), "torch", runs=0)


MADE = Breakdown(
    "packed",
    (
        Part("stem", "conv", "stem", 0.5),
        Part("pack", "pack", "", 0.25),
        Part("a", "binary_conv", "body", 1.0),
        Part("b", "binary_conv", "body", 1.25),
    ),
    2.0,
)


def test_the_rest_may_be_negative():
    assert MADE.rest_ms == -1.0
    assert MADE.by_kind().to_dict() == {"binary_conv": 2.25, "conv": 0.5, "pack": 0.25, REST: -1.0}
    assert MADE.by_kind().index[-1] == REST
    assert "2.000 ms a pass on packed: binary_conv 112%" in str(MADE)


def test_the_picture_has_a_bar_for_each_part_and_for_the_rest():
    figure = MADE.figure()
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["stem", "pack", "body (a)", "body (b)", REST]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.25, 1.0, 1.25, -1.0]
    (axes,) = MADE.figure(most=2).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["body (a)", "body (b)", "(2 shorter parts)", REST]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.25, 0.75, -1.0]


@pytest.mark.parametrize(("suffix", "begin"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_pictures_are_written(suffix, begin, tmp_path):
    written = MADE.save(tmp_path / "deep" / f"picture.{suffix}")
    assert written.read_bytes().startswith(begin)
    with pytest.raises(InvalidInputError, match="no picture's name"):
        MADE.save(tmp_path / "picture.txt")


def test_the_command_shows_counts_and_times(tmp_path):
    folder = str(tmp_path / "study")
    command = ["search", "--space", "bats", "-s", "cells=1", "--task", "digits", "-t", "epochs=1", "-t", "limit=60"]
    command += ["--strategy", "random_search", "--folder", folder, "--tracker", "none", "-q", "--trials", "1"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    picture = tmp_path / "picture.svg"
    done = CliRunner().invoke(cli.app, ["breakdown", folder, "--runtime", "torch", "--plot", str(picture), "--csv"])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert picture.read_bytes().startswith(b"<?xml")
    assert "classifier" in [row["module"] for row in rows]
    shown = CliRunner().invoke(cli.app, ["breakdown", folder, "--runtime", "torch"])
    lines = shown.stdout.splitlines()
    total = next(line for line in lines if line.startswith("total"))
    params = sum(float(row["params"]) for row in rows if row["params"])
    assert f"{params:,.0f}" in total
    assert total.endswith("100.0%")
    assert "a pass on torch" in lines[-1]
    history = tmp_path / "study" / "history.jsonl"
    history.write_text(history.read_text().replace('"metrics":{"params"', '"metrics":{"latency_ms":1.25,"params"'))
    shown = CliRunner().invoke(cli.app, ["breakdown", folder, "--runtime", "torch"])
    assert shown.stdout.splitlines()[-1] == "The study's own measurement: latency_ms 1.250"
    wrong = CliRunner().invoke(cli.app, ["breakdown", folder, "--plot", "picture.doc"])
    assert wrong.exit_code == 1 and "picture.doc is no picture's name" in wrong.stderr
    wrong = CliRunner().invoke(cli.app, ["breakdown", folder, "--runtime", "toaster"])
    assert wrong.exit_code == 1
    assert "toaster" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["packed", "onnxruntime", "torch"])
def test_networks_of_a_space(runtime, tmp_path):
    space = Bats.small()
    model = space.build(space.sample(np.random.default_rng(0)))
    found = breakdown(model, torch.randn(1, 1, 28, 28), runtime, bench=Bench(tmp_path))
    assert len(found.parts) > 20
    assert found.save(tmp_path / "picture.png").stat().st_size > 10_000
