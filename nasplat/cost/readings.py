"""Readings that a table is made from, kept in a file while it is made: an interrupted building goes on from there."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nasplat.architecture import Architecture
from nasplat.cost.bench import Bench
from nasplat.cost.machine import processor
from nasplat.cost.meter import CostMeter
from nasplat.errors import InvalidInputError
from nasplat.identity import canonical, describe
from nasplat.space import SearchSpace

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: how far a building is; total is None where nobody knows."""

VERSION = 1

VOLATILE = (
    "file_bytes", "file_sha256", "load", "anchor_ms", "anchor_drift", "quiet_share", "memory_slower", "suspect",
)  # fmt: skip
"""Facts of one measurement that say nothing of the next."""


def silent(what: str, done: int, total: int | None) -> None:
    """No progress."""


class Readings:
    """Numbers by name, each written down when it is there. One file of JSON lines, or none.

    A name may have several numbers: all are kept, in order.

    Attributes:
        facts: What describes the measurements, as far as one was made.
    """

    def __init__(self, path: Path | None, of: Mapping[str, Any]) -> None:
        """Go on from a file, or begin one at the first number.

        Args:
            path: The file; None keeps the numbers in memory alone.
            of: What the numbers belong to, JSON values. Numbers of something else are refused.

        Raises:
            InvalidInputError: The file holds numbers of something else, or is no such file.
        """
        self.facts: dict[str, Any] = {}
        self._path = path
        self._of = json.loads(canonical(dict(of)))
        self._numbers: dict[str, list[float]] = {}
        self._before = 0.0
        self._began = time.monotonic()
        self._begun = False
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        session = 0.0
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines[:-1]):  # a line without its end is a torn one
            try:
                record = json.loads(line)
                if number == 0:
                    version, of = record["nasplat_readings"], record["of"]
                    if version != VERSION or of != self._of:
                        raise InvalidInputError(
                            f"{path} holds readings of {canonical(of)}; these would be of {canonical(self._of)}. "
                            "Delete the file, or choose another output"
                        )
                elif "facts" in record:
                    self.facts = dict(record["facts"])
                else:
                    self._before += session if record["s"] < session else 0.0
                    session = float(record["s"])
                    self._numbers.setdefault(str(record["name"]), []).append(float(record["value"]))
            except InvalidInputError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInputError(
                    f"{path}, line {number + 1}, is no reading; delete the file, or choose another output"
                ) from error
        self._before += session
        self._begun = len(lines) > 1
        if lines[-1]:
            path.write_text("\n".join([*lines[:-1], ""]))

    def __getitem__(self, name: str) -> list[float]:
        """All numbers of a name, none where there are none."""
        return self._numbers.get(name, [])

    def __len__(self) -> int:
        """Numbers in all."""
        return sum(map(len, self._numbers.values()))

    def add(self, name: str, value: float) -> None:
        """Keep a number."""
        self._numbers.setdefault(name, []).append(value)
        self._write({"name": name, "value": value, "s": round(time.monotonic() - self._began, 3)})

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Keep what describes the measurements."""
        if dict(facts) != self.facts:
            self.facts = dict(facts)
            self._write({"facts": self.facts})

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        header = "" if self._begun else json.dumps({"nasplat_readings": VERSION, "of": self._of}) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(header + json.dumps(record) + "\n")
        self._begun = True

    @property
    def seconds(self) -> float:
        """Time since the first run of the building began, without what passed between runs."""
        return self._before + time.monotonic() - self._began

    def remove(self) -> None:
        """Delete the file: what was made of it is there."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class WholeNetworks:
    """Costs of whole networks of a space, measured.

    Attributes:
        calls: Costs given so far.
        suspect: Those of them that the meter says are not to be trusted.
    """

    def __init__(
        self, space: SearchSpace, example: Tensor, meter: CostMeter, metric: str, bench: Bench, readings: Readings
    ) -> None:
        """Nothing is measured yet.

        Raises:
            InvalidInputError: The meter does not give the metric.
        """
        if metric not in meter.metrics:
            raise InvalidInputError(f"{meter!r} does not give {metric!r}; legal: {', '.join(meter.metrics)}")
        self._space, self._example, self._meter = space, example, meter
        self._metric, self._bench, self._readings = metric, bench, readings
        self.calls = self.suspect = 0
        self._asked: Counter[str] = Counter()

    def __call__(self, architecture: Architecture) -> float:
        """The cost of one: another measurement at each call, from the readings as far as they go."""
        turn = self._asked[architecture.id]
        self._asked[architecture.id] += 1
        name, doubtful = architecture.id, f"{architecture.id} suspect"
        if len(self._readings[name]) <= turn:
            with torch.random.fork_rng(devices=[]):
                model = self._space.build(architecture).eval()
                measurement = self._meter.measure(model, self._example, self._bench)
            self._readings.describe(plain_facts(measurement.facts.get(self._metric, {})))
            if measurement.values.get(f"{self._metric}_suspect"):
                self._readings.add(doubtful, 1.0)
            self._readings.add(name, measurement.values[self._metric])
        self.calls += 1
        self.suspect += turn < len(self._readings[doubtful])
        return self._readings[name][turn]


def subject(kind: str, space: SearchSpace, example: Tensor, meter: CostMeter, metric: str) -> dict[str, Any]:
    """What readings belong to (``of`` of :class:`Readings`)."""
    return {
        "kind": kind,
        "space": space.identity,
        "input": list(example.shape),
        "meter": describe(meter),
        "metric": metric,
        "processor": processor(),
        "machine": platform.node(),
    }


def plain_facts(facts: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The single values among the facts of a measurement that hold for the next one too."""
    return {
        str(name): value
        for name, value in facts.items()
        if isinstance(value, str | int | float) and name not in VOLATILE
    }


def table_facts(readings: Readings, example: Tensor, candidates: int, suspect: int) -> dict[str, str | int | float]:
    """What a table says of how it was made: the runtime and machine that were measured, and what it took."""
    return {
        "processor": processor(),
        "machine": platform.node(),
        **readings.facts,
        "input": "x".join(map(str, example.shape[1:])),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "build_seconds": round(readings.seconds, 1),
        "candidates": candidates,
        "suspect": suspect,
    }
