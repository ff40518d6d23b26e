"""Does it search? Every sample-based strategy on NAS-Bench-201, beside random search and other libraries.

    python benchmarks/strategies.py --table nasbench201.npz --output runs/strategies --jobs 2

Nothing is trained: results come from a table (docs/spaces/nasbench201.md says how to get one). Three questions:

* With full trainings alone: how good is the pick after 50, 100, 200 evaluations? A search sees the validation accuracy
  of one training, drawn anew from the table's seeds; the pick is the best that it saw; what is reported is the pick's
  mean test accuracy, which no search sees (mean validation accuracy, where the table has no other).
* With trainings of 12 of 200 epochs as a low rung: how good is it after equal charged time? A unit of time is the mean
  full training of the table. A candidate that climbs is trained anew, and both trainings are charged.
* With two objectives, accuracy and a device's latency: which hypervolume has the front after 200 evaluations? The front
  is that of what was seen; its volume is taken with the mean test accuracies, up to a reference point beyond which lie
  the worst tenth of all cells in each objective, as a share of the volume of the best possible front.

Means over seeds have 95 % bootstrap intervals. Differences are tested by seed (Wilcoxon's signed-rank test, corrected
by Holm over all tests of a column; nasplat.compare). Numbers repeat exactly, whatever ``--jobs``, but for times.

Raw results lie in ``OUTPUT/runs``, a file per strategy; a later call with ``--output`` the same and other strategies
adds to them, and ``--report`` alone prints what is there. So a library that needs an environment of its own (NePS pins
other packages: ``pip install neural-pipeline-search`` beside nasplat) can be run there, and reported here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")  # before NumPy: one thread a job

# This file is called as the package of the strategies is, and its folder comes first where it is run as a script.
sys.path[:] = [
    str(Path(__file__).parents[1]),
    *(entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent),
]

import numpy as np  # noqa: E402

from benchmarks.table_search import ARMS, SPACE, Arm, Goal, Run, truth  # noqa: E402
from nasplat.compare.curves import band, on_grid, stack  # noqa: E402
from nasplat.compare.statistics import Statistics, centre_interval, compare_arms  # noqa: E402
from nasplat.errors import NasplatError  # noqa: E402
from nasplat.objectives import front, hypervolume  # noqa: E402
from search_spaces.nasbench201_table import NasBench201Table  # noqa: E402

COSTS = ("latency_ms_pixel2", "latency_ms_fpga")
"""Second objectives: a phone's CPU, in whole milliseconds, with many ties; and an FPGA, without ties, where other cells
are fast. Raspi4 and Pixel3 are not taken: they report nearly no time for cells that do not join input and output."""

SHORT_UNITS = 100
"""Charged time of the searches with short trainings, in mean full trainings."""

TARGETS = (("evolution", 200, 94.2), ("predictor", 100, 94.25))
"""Test accuracy in percent on CIFAR-10 that a strategy has to reach after so many evaluations."""

Runs = dict[str, dict[int, Run]]
"""By arm and second objective (``two-random@latency_ms_fpga``), then by seed."""


@dataclass(frozen=True)
class Settings:
    """What makes results comparable.

    Attributes:
        table: Content of the table.
        dataset: Of the table.
        evaluations: Of a full search.
        unit_seconds: Mean seconds of a full training.
    """

    table: str
    dataset: str
    evaluations: int
    unit_seconds: float

    def goal(self, arm: Arm, cost: str) -> Goal:
        """What this arm is asked for."""
        if arm.kind == "two":
            return Goal(self.evaluations, cost=cost)
        # Full searches go on to the time at which they are held against those with short trainings.
        units = min(SHORT_UNITS, self.evaluations) if arm.kind == "short" else self.evaluations
        return Goal(self.evaluations, units * self.unit_seconds)


def one(name: str, path: str, dataset: str, goal: Goal, seed: int) -> Run:
    """One search, in a process of its own or not."""
    import torch

    torch.set_num_threads(1)
    arm = next(arm for arm in ARMS if arm.name == name)
    return arm.search(_table(path, dataset), goal, seed)


_TABLES: dict[tuple[str, str], NasBench201Table] = {}


def _table(path: str, dataset: str) -> NasBench201Table:
    if (path, dataset) not in _TABLES:
        _TABLES[path, dataset] = NasBench201Table(path, dataset)
    return _TABLES[path, dataset]


# Raw results.


def save(folder: Path, key: str, settings: Settings, runs: Mapping[int, Run]) -> None:
    """Write the runs of one arm."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = sorted(runs)
    columns = {
        name: np.concatenate([np.asarray(getattr(runs[seed], name), dtype=np.float64) for seed in seeds])
        for name in ("seconds", "epochs", "observed", "truth", "cost")
    }
    np.savez_compressed(
        folder / f"{key}.npz",
        settings=np.array(json.dumps(asdict(settings), sort_keys=True)),
        seeds=np.array(seeds),
        lengths=np.array([len(runs[seed].truth) for seed in seeds]),
        cpu_seconds=np.array([runs[seed].cpu_seconds for seed in seeds]),
        **columns,
    )


def load(folder: Path, settings: Settings) -> Runs:
    """The runs of all arms that were made with these settings."""
    found: Runs = {}
    for file in sorted(folder.glob("*.npz")):
        with np.load(file, allow_pickle=False) as held:
            if json.loads(str(held["settings"])) != asdict(settings):
                print(f"left out, made with another table or number of evaluations: {file}")
                continue
            ends = np.cumsum(held["lengths"])
            parts = {n: np.split(held[n], ends[:-1]) for n in ("seconds", "epochs", "observed", "truth", "cost")}
            found[file.stem] = {
                int(seed): Run(**{n: part[i].tolist() for n, part in parts.items()}, cpu_seconds=float(cpu))
                for i, (seed, cpu) in enumerate(zip(held["seeds"], held["cpu_seconds"], strict=True))
            }
    order = {arm.name: index for index, arm in enumerate(ARMS)}
    known = [key for key in found if key.partition("@")[0] in order]
    return {key: found[key] for key in sorted(known, key=lambda key: (order[key.partition("@")[0]], key))}


def search_all(
    arms: Sequence[Arm], path: Path, settings: Settings, costs: Sequence[str], seeds: int, jobs: int, folder: Path
) -> None:
    """Run the arms, the slow ones first, and write the results of each as it ends."""
    todo = []
    for arm in arms:
        for cost in costs if arm.kind == "two" else ("",):
            key = f"{arm.name}@{cost}" if cost else arm.name
            todo += [(key, arm, settings.goal(arm, cost), seed) for seed in range(min(seeds, arm.seeds or seeds))]
    todo.sort(key=lambda task: -task[1].seeds if task[1].seeds else -(10**6), reverse=True)
    waiting: dict[str, int] = {}
    for key, *_ in todo:
        waiting[key] = waiting.get(key, 0) + 1
    runs: Runs = {key: {} for key in waiting}
    began = time.monotonic()

    def booked(key: str, seed: int, run: Run) -> None:
        runs[key][seed] = run
        waiting[key] -= 1
        if not waiting[key]:
            save(folder, key, settings, runs[key])
            print(f"{time.monotonic() - began:7.0f} s  {key}: {len(runs[key])} seeds", file=sys.stderr, flush=True)

    if jobs == 1:
        for key, arm, goal, seed in todo:
            booked(key, seed, one(arm.name, str(path), settings.dataset, goal, seed))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(one, arm.name, str(path), settings.dataset, goal, seed): (key, seed)
            for key, arm, goal, seed in todo
        }
        for future in as_completed(futures):
            booked(*futures[future], future.result())


# The report.


def label(key: str) -> str:
    """An arm in words."""
    return next(arm.label for arm in ARMS if arm.name == key.partition("@")[0])


def by_seed(values: Mapping[int, float], seeds: Iterable[int]) -> list[float]:
    """One number a seed, NaN for those that were not run."""
    return [values.get(seed, float("nan")) for seed in seeds]


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of what is not NaN, as text."""
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return "-"
    mean, (low, high) = centre_interval(known)
    return f"{mean:.2f}" if np.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def against(statistics: Statistics, name: str, baseline: str) -> str:
    """What is shown of an arm against another, as text."""
    if name == baseline:
        return "baseline"
    pair = statistics.pair(name, baseline)
    return f"{pair.outcome}, {pair.difference:+.2f}, p {pair.p_corrected:.2g}, A12 {pair.a12:.2f}"


def table_of(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, columns aligned; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report_arms(finals: Mapping[str, Mapping[str, Mapping[int, float]]], runs: Runs, baselines: Sequence[str]) -> str:
    """A row per arm: its numbers at each point, its speed, and what is shown against the baselines at the last point.

    Args:
        finals: By arm, then by point ("at 50"), then by seed.
        runs: For the number of seeds and the speed.
        baselines: Arms that all others are held against, where they were run.
    """
    seeds = sorted({seed for key in finals for seed in runs[key]})
    points = list(next(iter(finals.values())))
    last = {key: by_seed(finals[key][points[-1]], seeds) for key in finals}
    present = [name for name in baselines if name in finals]
    tests = {
        name: compare_arms(last, baseline=name, pairs="baseline", metric="accuracy")
        for name in present
        if len(last) > 1
    }
    rows = [["strategy", "seeds", *points, "sd", "ms/eval", *(f"{points[-1]} against {label(name)}" for name in tests)]]
    for key, own in finals.items():
        spent = sum(run.cpu_seconds for run in runs[key].values())
        steps = sum(len(run.truth) for run in runs[key].values())
        known = [value for value in last[key] if not np.isnan(value)]
        rows.append(
            [
                label(key),
                str(len(runs[key])),
                *(interval(by_seed(own[point], seeds)) for point in points),
                f"{np.std(known, ddof=1):.2f}" if len(known) > 1 else "-",
                f"{1000 * spent / steps:.1f}",
                *(against(statistics, key, name) for name, statistics in tests.items()),
            ]
        )
    return table_of(rows)


def percent_at(run: Run, evaluations: int) -> float:
    """The pick after so many evaluations, in percent."""
    return 100 * run.picks()[: min(evaluations, len(run.truth))][-1]


def percent_after(run: Run, seconds: float) -> float:
    """The pick after so many charged seconds, in percent."""
    return 100 * float(on_grid(run.seconds, run.picks(), [seconds])[0])


def volumes(
    runs: Runs, table: NasBench201Table, cost: str, evaluations: int
) -> tuple[str, dict[str, dict[int, float]]]:
    """Hypervolume in percent of the best possible, by arm and seed; and in words what it is measured against."""
    cells = list(table.architectures(SPACE))
    accuracies = np.array([truth(table, cell) for cell in cells])
    costs = np.array([table(cell, 0.0, 0)[cost] for cell in cells])
    reference = (-float(np.quantile(accuracies, 0.1)), float(np.quantile(costs, 0.9)))
    inside = [(-a, c) for a, c in zip(accuracies, costs, strict=True) if -a < reference[0] and c < reference[1]]
    most = hypervolume(inside, reference)
    found: dict[str, dict[int, float]] = {}
    for key, of_seed in runs.items():
        if key.partition("@")[2] != cost:
            continue
        found[key] = {}
        for seed, run in of_seed.items():
            seen = list(zip((-value for value in run.observed[:evaluations]), run.cost[:evaluations], strict=True))
            kept = [(-run.truth[i], run.cost[i]) for i in front(seen)]
            found[key][seed] = 100 * hypervolume(kept, reference) / most
    words = f"reference point: accuracy {-100 * reference[0]:.2f} %, {cost} {reference[1]:.3g}"
    return words, found


def write_curves(path: Path, runs: Runs, kinds: Sequence[str], grid: Sequence[float], unit_seconds: float) -> None:
    """Anytime curves as CSV: by evaluations for full searches, by charged time in units for all."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["strategy", "x", "unit", "mean", "low", "high", "seeds"])
        for key, of_seed in runs.items():
            kind = next(arm.kind for arm in ARMS if arm.name == key.partition("@")[0])
            if kind not in kinds:
                continue
            curves = {
                "charged": np.stack(
                    [on_grid(r.seconds, r.picks(), np.array(grid) * unit_seconds) for r in of_seed.values()]
                )
            }
            places = {"charged": np.array(grid, dtype=float)}
            if kind == "full":
                steps = int(max(grid))
                curves["evaluations"] = stack([run.picks() for run in of_seed.values()], steps)
                places["evaluations"] = np.arange(1.0, steps + 1)
            for unit, curve in curves.items():
                drawn = band(100 * curve, places[unit], resamples=500)
                for x, middle, low, high in zip(drawn.x, drawn.centre, drawn.low, drawn.high, strict=True):
                    writer.writerow([key, f"{x:g}", unit, f"{middle:.4f}", f"{low:.4f}", f"{high:.4f}", drawn.seeds])


def draw(path: Path, csv_path: Path) -> None:
    """The curves of the CSV file as a figure, an axis per unit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True)
    for axis, unit, title in zip(
        axes, ("evaluations", "charged"), ("full evaluations", "charged time, in mean full trainings"), strict=True
    ):
        for index, key in enumerate(dict.fromkeys(row["strategy"] for row in rows if row["unit"] == unit)):
            own = [row for row in rows if row["strategy"] == key and row["unit"] == unit]
            if unit == "charged":  # searches with short trainings end there
                own = [row for row in own if float(row["x"]) <= SHORT_UNITS]
            x, middle, low, high = (np.array([float(row[n]) for row in own]) for n in ("x", "mean", "low", "high"))
            (line,) = axis.plot(x, middle, label=label(key), linewidth=1.2, linestyle="-" if index < 10 else "--")
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set_xlabel(title)
        # Ten colours repeat, so dashes tell the second ten; below the axis the legend hides no curve.
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    tops = [float(row["mean"]) for row in rows if float(row["mean"]) > 0]
    axes[0].set_ylim(np.quantile(tops, 0.05), max(tops) + 0.1)
    axes[0].set_ylabel("accuracy of the pick, %")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def report(runs: Runs, table: NasBench201Table, settings: Settings, points: Sequence[int], output: Path) -> None:
    """Print the tables and write the curves."""
    kinds = {arm.name: arm.kind for arm in ARMS}
    held_out = "test" if "test_accuracy" in table.metrics else "mean validation (the table has no test accuracies)"
    full = {key: own for key, own in runs.items() if kinds.get(key) == "full"}
    if full:
        print(f"\n{table.dataset}: {held_out} accuracy of the pick in %, full trainings, after so many evaluations\n")
        finals = {
            key: {f"at {n}": {seed: percent_at(run, n) for seed, run in own.items()} for n in points}
            for key, own in full.items()
        }
        print(report_arms(finals, runs, ("random", "optuna-tpe")))
        if table.dataset == "cifar10" and "test_accuracy" in table.metrics and len(table) == SPACE.size():
            for key, n, target in TARGETS:
                if key in full and n in points:
                    reached = float(np.mean(list(finals[key][f"at {n}"].values())))
                    state = "reached" if reached >= target else "missed"
                    print(f"target: {label(key)}, {target:.2f} at {n}: {state} with {reached:.2f}")
    timed = {key: own for key, own in runs.items() if kinds.get(key) in ("full", "short")}
    units = sorted({min(n, SHORT_UNITS) for n in points})
    if any(kinds[key] == "short" for key in timed):
        print(
            f"\n{table.dataset}: {held_out} accuracy of the pick in %, after charged time of so many mean full "
            f"trainings ({settings.unit_seconds:.0f} s each)\n"
        )
        finals = {
            key: {
                f"at {n}": {seed: percent_after(run, n * settings.unit_seconds) for seed, run in own.items()}
                for n in units
            }
            for key, own in timed.items()
        }
        print(report_arms(finals, runs, ("random", "evolution")))
    for cost in dict.fromkeys(key.partition("@")[2] for key in runs if "@" in key):
        words, found = volumes(runs, table, cost, settings.evaluations)
        print(f"\n{table.dataset}: hypervolume in % of the best possible, {held_out} accuracy and {cost}; {words}\n")
        finals = {key: {f"at {settings.evaluations}": values} for key, values in found.items()}
        print(report_arms(finals, runs, (f"two-random@{cost}", f"two-optuna-nsga2@{cost}")))
    if timed:
        grid = list(range(1, settings.evaluations + 1))
        write_curves(output / "curves.csv", timed, ("full", "short"), grid, settings.unit_seconds)
        print(f"\ncurves: {output / 'curves.csv'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [arm.name for arm in ARMS]
    parser.add_argument(
        "--table", type=Path, required=True, help="an .npz file as search_spaces.nasbench201_table says"
    )
    parser.add_argument("--dataset", default="", help="of the table, where it has several")
    parser.add_argument("--output", type=Path, default=Path("runs/strategies"), help="folder of results")
    parser.add_argument("--strategies", default="", help=f"some of {','.join(names)}; all where empty")
    parser.add_argument("--seeds", type=int, default=200, help="searches per strategy; slow strategies have fewer")
    parser.add_argument("--evaluations", default="50,100,200", help="where to look; the last is a search's length")
    parser.add_argument("--costs", default="", help=f"second objectives; {','.join(COSTS)} where empty")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--report", action="store_true", help="print what the folder has, and run nothing")
    parser.add_argument("--figure", action="store_true", help="draw the curves, too")
    given = parser.parse_args(arguments)
    chosen = [name for name in given.strategies.split(",") if name] or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--strategies has {', '.join(unknown)}; legal: {', '.join(names)}")
    try:
        points = sorted({int(n) for n in given.evaluations.split(",")})
    except ValueError:
        parser.error(f"--evaluations is {given.evaluations!r}; legal: whole numbers such as 50,100,200")
    if given.seeds < 1 or given.jobs < 1 or points[0] < 1:
        parser.error("--seeds, --jobs and --evaluations: whole numbers from 1 up are legal")
    try:
        table = NasBench201Table(given.table, given.dataset)
    except NasplatError as error:
        parser.error(str(error))
    costs = given.costs.split(",") if given.costs else [cost for cost in COSTS if cost in table.metrics]
    if unknown := [cost for cost in costs if cost not in table.metrics]:
        parser.error(f"--costs has {', '.join(unknown)}; this table has {', '.join(table.metrics)}")
    settings = Settings(table.content, table.dataset, points[-1], table.mean_train_seconds)
    folder = given.output / "runs"
    if not given.report:
        arms = [arm for arm in ARMS if arm.name in chosen]
        for arm in arms:
            if missing := arm.missing():
                print(f"left out: {arm.name}: {missing}")
        if len(table.budgets) < 3:
            print("left out: searches with short trainings: the table has none")
            arms = [arm for arm in arms if arm.kind != "short"]
        if not costs:
            print("left out: two objectives: the table has no latencies")
        runnable = [arm for arm in arms if not arm.missing()]
        search_all(runnable, given.table, settings, costs, given.seeds, given.jobs, folder)
    runs = load(folder, settings)
    if not runs:
        print(f"no results in {folder}", file=sys.stderr)
        return 1
    report(runs, table, settings, points, given.output)
    if given.figure:
        draw(given.output / "curves.png", given.output / "curves.csv")
        print(f"figure: {given.output / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
