"""What several test modules share: small spaces, small strategies, and what "the same" means."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from nasplat import Architecture, Evaluate, History, SearchSpace
from nasplat.nn import BinaryBlock
from nasplat.nn.expert import ExpertBinaryConv2d

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mlp(SearchSpace):
    """32 perceptrons for 4 inputs and 3 classes."""

    classes: int = 3
    inputs: int = 4

    @property
    def choices(self):
        return {"width": (2, 4, 8, 16), "depth": (1, 2), "act": ("relu", "tanh"), "norm": (False, True)}

    def build(self, architecture: Architecture) -> nn.Module:
        genes = architecture.genes
        layers: list[nn.Module] = [nn.Flatten()]
        size = self.inputs
        for _ in range(genes["depth"]):
            layers.append(nn.Linear(size, genes["width"]))
            if genes["norm"]:
                layers.append(nn.BatchNorm1d(genes["width"]))
            layers.append(nn.ReLU() if genes["act"] == "relu" else nn.Tanh())
            size = genes["width"]
        return nn.Sequential(*layers, nn.Linear(size, self.classes))


@dataclass(frozen=True)
class Conv(SearchSpace):
    """Six small convolutional networks for grey images."""

    classes: int = 10

    @property
    def choices(self):
        return {"channels": (4, 6, 8), "kernel": (3, 5)}

    def build(self, architecture: Architecture) -> nn.Module:
        channels, kernel = architecture.genes["channels"], architecture.genes["kernel"]
        return nn.Sequential(
            nn.Conv2d(1, channels, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.LazyLinear(self.classes),
        )


@dataclass(frozen=True)
class Binary(SearchSpace):
    """Two small networks for grey images, with binary layers, experts and transfer points."""

    classes: int = 10

    @property
    def choices(self):
        return {"channels": (4, 6)}

    def build(self, architecture: Architecture) -> nn.Module:
        return BinaryNetwork(architecture.genes["channels"], self.classes)


class BinaryNetwork(nn.Module):
    """Two stages at half and a quarter of the side."""

    transfer_points = ("stage1", "stage2")

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.stage1 = BinaryBlock(channels, channels, 3)
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(channels)
        self.stage2 = ExpertBinaryConv2d(channels, channels, 3, padding=1, experts=2)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.LazyLinear(classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage2(self.norm(self.pool(self.stage1(self.stem(x)))))
        return self.head(self.dropout(x.flatten(1)))


@dataclass(frozen=True)
class Ladder(SearchSpace):
    """Numbers from 0 on. For tasks that are functions."""

    steps: int = 100

    @property
    def choices(self):
        return {"x": tuple(range(self.steps))}

    def build(self, architecture: Architecture) -> nn.Module:
        raise RuntimeError("a ladder is not a network")


@dataclass(frozen=True)
class InOrder:
    """Proposes x = 0, 1, 2, ..., or the given values and then nothing more."""

    values: tuple[int, ...] = ()

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        number = len(history)
        if self.values and number >= len(self.values):
            return None
        return Evaluate(history.space.architecture({"x": self.values[number] if self.values else number}))


@dataclass(frozen=True)
class Drawn:
    """Samples the space; repeats happen."""

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        return Evaluate(history.space.sample(rng))


def climb(architecture: Architecture, budget: float, seed: int) -> Mapping[str, float]:
    """A function task: the larger x, the better, and the dearer."""
    x = architecture.genes["x"]
    return {"val_accuracy": x / 100, "size": float(x)}


MEASURED = ("seconds", "latency_ms")
"""Columns with these in the name differ from run to run."""


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    """A table without its measured columns, in one order of columns."""
    kept = sorted(name for name in table.columns if not any(part in name for part in MEASURED))
    return table[kept]


def assert_same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(comparable(a), comparable(b), check_exact=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def python(script: Path | str, *arguments: Any, **kwargs: Any) -> subprocess.Popen[str]:
    """A process that runs a script, with this checkout and its tests importable."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script] if isinstance(script, str) else [sys.executable, str(script)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **kwargs,
    )  # fmt: skip


def equal_states(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
