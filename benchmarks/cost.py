"""Can measured costs be trusted, and what would have to do without them?

    python benchmarks/cost.py                           # all parts, 40 networks of each space: about an hour
    python benchmarks/cost.py --part retest --networks 10 --spaces bats sandglass

Parts:
    retest   random networks of each space are measured twice, all of them once before any of them again: the
             difference, the rank correlation, and values that are off by over 10 % without being flagged. First with
             the other cores idle, then while a study trains on them (it pauses for measurements, as all studies do),
             then with work on them that knows nothing of the bench (``--loads``).
    table    a table of costs is built for each space of ``--tables`` and predicts networks that it has not seen: of the
             steps of packed programs for binary spaces, else of the choices. They are measured three times, and the
             least counts.
    proxies  the rank correlation of what is used in place of a measurement with the measured latency: parameters, MACs,
             OPs, the training graph's time in eager torch, and the table where that part was run as well.
    seconds  what measuring one network costs after the first: building and exporting, timing, its memory in a fresh
             process.

Networks have images of 3x32x32. Binary ones are measured on packed bits, the others on ONNX Runtime, on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the script beside this one must not hide the package strategies
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import torch
from scipy import stats

from nasplat import Architecture, Latency
from nasplat.cost import Accuracy, Bench, CostTable, Count, PeakMemory, StepTable
from nasplat.cost.machine import processor
from nasplat.cost.timing import Timing, TimingJob
from nasplat.runtimes import Runtime, named
from nasplat.space import SearchSpace
from search_spaces.bats import Bats
from search_spaces.binary_growth import BinaryGrowth
from search_spaces.darts_cell import DartsCell
from search_spaces.meta_kernel import MetaKernel
from search_spaces.nasbench201 import NasBench201
from search_spaces.sandglass import Sandglass

EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

SPACES: Mapping[str, tuple[SearchSpace, str]] = {
    "bats": (Bats(cells=8), "packed"),
    "binary_growth": (
        BinaryGrowth(widths=(32, 64, 128, 256), stem="cifar", max_depth=3, image_size=32, experts=(1, 4)),
        "packed",
    ),
    "darts_cell": (DartsCell.search(), "onnxruntime"),
    "meta_kernel": (MetaKernel(classes=10, stem_stride=1), "onnxruntime"),
    "nasbench201": (NasBench201(), "onnxruntime"),
    "sandglass": (Sandglass(stem_stride=1), "onnxruntime"),
}
"""A space of each kind, at the size of CIFAR images, and the runtime that its networks are deployed on."""

BINARY = ("bats", "binary_growth")
PARTS = ("retest", "table", "proxies", "seconds")
LOADS = ("idle", "study", "stranger")
TRUTH = 3
"""Measurements of a network that a table is held against."""

OFF = 0.10
"""Difference of two measurements from which on one of them has to be flagged."""

_STUDY = """
import sys; sys.path.insert(0, sys.argv[2])
from nasplat import Study, Task, maximise
from search_spaces.bats import Bats
from strategies import RandomSearch
study = Study(space=Bats.small(), strategy=RandomSearch(), task=Task.fashion_mnist(epochs=1000, size=16),
              objectives=[maximise("val_accuracy")], folder=sys.argv[1], tracker=None, progress=False)
print("ready", flush=True)
study.run(max_trials=100)
"""

_STRANGER = """
import torch
torch.set_num_threads(1)
x, w = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
print("ready", flush=True)
while True:
    torch.nn.functional.conv2d(x, w, padding=1)
"""


@contextmanager
def load(kind: str) -> Iterator[None]:
    """Work beside the measurements, in another process."""
    if kind == "idle":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        script = _STUDY if kind == "study" else _STRANGER
        root = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", script, f"{folder}/study", root]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the load {kind!r} did not start")
            time.sleep(3)
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the load {kind!r} ended before the measurements")
        finally:
            process.kill()
            process.wait()


class Networks:
    """Random networks of one space, exported once.

    Args:
        name: One of :data:`SPACES`.
        count: How many.
        seed: Draws them, and makes their weights.
    """

    def __init__(self, name: str, count: int, seed: int = 1) -> None:
        self.name = name
        self.space, runtime = SPACES[name]
        self.runtime: Runtime = named(runtime)
        rng = np.random.default_rng(seed)
        seen: dict[str, Architecture] = {}
        while len(seen) < count:
            architecture = self.space.sample(rng)
            seen.setdefault(architecture.id, architecture)
        self.architectures = list(seen.values())
        self.files: list[bytes] = []
        self.export_seconds: list[float] = []
        for architecture in self.architectures:
            begin = time.perf_counter()
            self.files.append(self.runtime.export(self.build(architecture), EXAMPLE))
            self.export_seconds.append(time.perf_counter() - begin)

    def build(self, architecture: Architecture) -> torch.nn.Module:
        """The network, in evaluation mode."""
        torch.manual_seed(0)
        return self.space.build(architecture).eval()

    def measure(self, bench: Bench) -> tuple[list[Timing], list[float]]:
        """Each once: what was measured, and the seconds that it took."""
        timings, seconds = [], []
        for file in self.files:
            begin = time.perf_counter()
            timings.append(TimingJob(self.runtime, file, EXAMPLE)(bench))
            seconds.append(time.perf_counter() - begin)
        return timings, seconds


def compare(first: Sequence[Timing], second: Sequence[Timing]) -> dict[str, Any]:
    """Two measurements of the same networks."""
    a, b = (np.array([timing.median_ms for timing in round_]) for round_ in (first, second))
    flagged = np.array([bool(x.suspect or y.suspect) for x, y in zip(first, second, strict=True)])
    difference = np.abs(a - b) / np.minimum(a, b)
    clean = ~flagged
    return {
        "networks": len(a),
        "least_ms": float(min(a.min(), b.min())),
        "greatest_ms": float(max(a.max(), b.max())),
        "median_difference": float(np.median(difference)),
        "p90_difference": float(np.quantile(difference, 0.9)),
        "spearman": float(stats.spearmanr(a, b).statistic),
        "flagged": int(flagged.sum()),
        "unflagged_median_difference": float(np.median(difference[clean])) if clean.any() else None,
        "unflagged_spearman": float(stats.spearmanr(a[clean], b[clean]).statistic) if clean.sum() > 2 else None,
        "off": int((difference > OFF).sum()),
        "silent_outliers": int(((difference > OFF) & clean).sum()),
        "difference_of_means": float(np.mean(a) / np.mean(b) - 1),
        "quiet_share": _median(first, second, "quiet_share"),
        "memory_slower": _median(first, second, "memory_slower"),
        "measurements": [[_record(x), _record(y)] for x, y in zip(first, second, strict=True)],
    }


def _median(first: Sequence[Timing], second: Sequence[Timing], fact: str) -> float:
    """Of a fact, over all measurements."""
    return float(np.median([timing.facts[fact] for timing in (*first, *second)]))


def _record(timing: Timing) -> dict[str, Any]:
    """What is kept of a measurement."""
    facts = {name: timing.facts[name] for name in ("file_bytes", "quiet_share", "memory_slower")}
    return {"ms": timing.median_ms, "suspect": timing.suspect, **facts}


def retest(names: Sequence[str], count: int, loads: Sequence[str], bench: Bench) -> dict[str, Any]:
    """The first part; also gives the measured values, which others compare with."""
    found: dict[str, Any] = {}
    heads = ("median diff", "p90", "Spearman", "flagged", "unflagged: diff", "Spearman", "silent >10%", "s each")
    heads += ("machine quiet", "memory slower")
    _line("space", "beside", "ms", *heads)
    for name in names:
        networks = Networks(name, count)
        for kind in loads:
            with load(kind):
                first, seconds = networks.measure(bench)
                second, more = networks.measure(bench)
            row = compare(first, second)
            row["seconds_each"] = float(np.median([*seconds, *more]))
            row["export_seconds_each"] = float(np.median(networks.export_seconds))
            found[f"{name}/{kind}"] = row
            _line(
                name,
                kind,
                f"{row['least_ms']:.2f}-{row['greatest_ms']:.2f}",
                f"{row['median_difference']:.2%}",
                f"{row['p90_difference']:.1%}",
                f"{row['spearman']:.4f}",
                str(row["flagged"]),
                _percent(row["unflagged_median_difference"]),
                _number(row["unflagged_spearman"]),
                str(row["silent_outliers"]),
                f"{row['seconds_each']:.2f}",
                f"{row['quiet_share']:.0%}",
                f"{row['memory_slower']:.0%}",
            )
    return found


def tables(names: Sequence[str], count: int, bench: Bench) -> dict[str, Any]:
    """The second part."""
    found: dict[str, Any] = {}
    _line("space", "build s", "Spearman", "interval", "Kendall", "median error", "slope", "steps", "unknown", "suspect")
    for name in names:
        networks = Networks(name, count, seed=2)
        latency = Latency(networks.runtime, twins=False)
        begin = time.perf_counter()
        table = (StepTable if name in BINARY else CostTable).measured(networks.space, EXAMPLE, latency, bench=bench)
        built = time.perf_counter() - begin
        rounds = [networks.measure(bench)[0] for _ in range(TRUTH)]
        best = [min(timings, key=lambda timing: timing.median_ms) for timings in zip(*rounds, strict=True)]
        given = [
            table.predict(one, networks.build(one), EXAMPLE) if isinstance(table, StepTable) else table.cost(one)
            for one in networks.architectures
        ]
        pairs = [(p, timing.median_ms) for p, timing in zip(given, best, strict=True) if p is not None]
        predicted, measured = zip(*pairs, strict=True)
        value, low, high = _spearman(predicted, np.array(measured))
        accuracy = Accuracy.of(predicted, measured)
        found[name] = {
            "build_seconds": built,
            "steps": len(table.steps) if isinstance(table, StepTable) else 0,
            "unknown": count - len(pairs),
            "suspect": sum(bool(timing.suspect) for timing in best),
            "spearman": (value, low, high),
            "accuracy": dataclasses.asdict(accuracy),
            "facts": dict(table.facts),
            "ms": pairs,
        }
        _line(
            name,
            f"{built:.0f}",
            f"{value:.4f}",
            f"{low:.3f}..{high:.3f}",
            f"{accuracy.kendall_tau:.3f}",
            f"{accuracy.median_relative_error:.2%}",
            f"{accuracy.calibration:.3f}",
            *(str(found[name][key]) for key in ("steps", "unknown", "suspect")),
        )
    return found


def proxies(names: Sequence[str], count: int, bench: Bench, predicted: Mapping[str, Any]) -> dict[str, Any]:
    """The third part.

    Args:
        names: Of spaces.
        count: Networks of each.
        bench: Measures.
        predicted: What the second part found.
    """
    found: dict[str, Any] = {}
    counted = ("params", "macs", "ops")
    graph = "training graph"
    _line("space", *counted, graph, "table", "graph / deployed", width=24)
    for name in names:
        networks = Networks(name, count)
        latency = np.array([timing.median_ms for timing in networks.measure(bench)[0]])
        values: dict[str, list[float]] = {proxy: [] for proxy in (*counted, graph)}
        eager = named("torch")
        for architecture in networks.architectures:
            model = networks.build(architecture)
            costs = Count().measure(model, EXAMPLE, bench).values
            for proxy in counted:
                values[proxy].append(costs[proxy])
            values[graph].append(TimingJob(eager, eager.export(model, EXAMPLE), EXAMPLE)(bench).median_ms)
        row = {proxy: _spearman(given, latency) for proxy, given in values.items()}
        if name in predicted:
            row["table"] = predicted[name]["spearman"]
        found[name] = {**row, "graph_ratio": float(np.median(np.array(values[graph]) / latency))}
        cells = [f"{value:+.3f} [{low:+.2f}, {high:+.2f}]" for value, low, high in row.values()]
        cells += ["-"] * (name not in predicted)
        _line(name, *cells, f"{found[name]['graph_ratio']:.2f}x", width=24)
    return found


def seconds(names: Sequence[str], bench: Bench) -> dict[str, Any]:
    """The fourth part."""
    found: dict[str, Any] = {}
    _line("space", "export s", "timing s", "both s", "with twins s", "memory s", "memory MB")
    for name in names:
        networks = Networks(name, 6)
        timings, taken = networks.measure(bench)
        model = networks.build(networks.architectures[1])
        twins = _seconds(lambda m=model: Latency().measure(m, EXAMPLE, bench))
        begin = time.perf_counter()
        memory = PeakMemory(networks.runtime).measure(model, EXAMPLE, bench).values["peak_memory_bytes"]
        row = {
            "export_seconds": float(np.median(networks.export_seconds[1:])),
            "timing_seconds": float(np.median(taken[1:])),
            "latency_seconds": twins,
            "memory_seconds": time.perf_counter() - begin,
            "memory_bytes": memory,
            "suspect": sum(bool(timing.suspect) for timing in timings),
        }
        found[name] = row
        both = row["export_seconds"] + row["timing_seconds"]
        numbers = (row["export_seconds"], row["timing_seconds"], both, twins, row["memory_seconds"], memory / 1e6)
        _line(name, *(f"{number:.2f}" for number in numbers))
    return found


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _spearman(a: Sequence[float] | np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The rank correlation and its 95 % bootstrap interval over networks."""

    def statistic(x: np.ndarray, y: np.ndarray) -> float:
        return float(stats.spearmanr(x, y).statistic)

    pairs = (np.asarray(a), np.asarray(b))
    found = stats.bootstrap(
        pairs, statistic, paired=True, vectorized=False, n_resamples=999, method="percentile", rng=0
    )
    return statistic(*pairs), float(found.confidence_interval.low), float(found.confidence_interval.high)


def _line(first: str, *cells: str, width: int = 16) -> None:
    """A row of a table."""
    print(f"{first:15}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts that are asked for, print them, and give the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--spaces", nargs="+", choices=list(SPACES), default=list(SPACES), help="default: all")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="beside a retest; default: all")
    parser.add_argument(
        "--tables", nargs="+", choices=list(SPACES), default=list(BINARY), help="default: those of binary networks"
    )
    parser.add_argument("--networks", type=int, default=40, help="of each space (default 40)")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args(arguments)
    if options.networks < 3:
        parser.error("--networks: at least 3")
    torch.set_num_threads(1)
    print(f"{processor()}, {platform.python_version()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    bench = Bench()
    found: dict[str, Any] = {}
    for part in sorted(options.part, key=PARTS.index):
        print(part)
        if part == "retest":
            found[part] = retest(options.spaces, options.networks, options.loads, bench)
        elif part == "table":
            found[part] = tables(options.tables, options.networks, bench)
        elif part == "proxies":
            found[part] = proxies(options.spaces, options.networks, bench, found.get("table", {}))
        else:
            found[part] = seconds(options.spaces, bench)
        print(flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
