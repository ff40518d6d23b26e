"""What a trial that does nothing costs: the platform's own time, beside named baselines of the same run.

    python benchmarks/overhead.py                  # all parts, about 10 minutes
    python benchmarks/overhead.py local growth     # some of them
    python benchmarks/overhead.py --quick          # fewer trials

Parts:
    local    in this process, no tracker, journal fsync included: milliseconds a trial.
    mlflow   with the MLflow tracker on SQLite, against the raw client making the same record; interleaved blocks.
    ray      on Ray with one worker, against a bare Ray Tune function trainable that returns at once.
    growth   our own part (scheduling, journal, history, tracking) at the 5,000th trial against the 100th.
    propose  milliseconds a proposal of each strategy against the length of the history.

The task is a function that returns a constant, so everything measured is overhead.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the script beside this one must not hide the package strategies
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
from torch import nn

from nasplat import Architecture, History, Study, Task, Trial, maximise, space_from
from nasplat.cost.bench import Bench
from nasplat.cost.machine import processor
from nasplat.mlflow_tracker import MlflowTracker
from nasplat.search import Limits, Outcome, Search
from nasplat.strategy import Proposal, Strategy
from nasplat.tracking import StudyRecord
from strategies import OptunaSearch, RandomSearch, RegularizedEvolution


def build(genes: Mapping[str, Any]) -> nn.Module:
    """Never called: the task is a function."""
    raise AssertionError


# The size of a BATS architecture: 28 genes of 8 options, so that genes, parameters and lines are as long as real ones.
SPACE = space_from(build, {f"edge{i:02d}": tuple(f"operation{j}" for j in range(8)) for i in range(28)})


def nothing(architecture: Architecture, budget: float, seed: int) -> dict[str, float]:
    """A score that differs between architectures."""
    return {"val_accuracy": int(architecture.id, 16) / 16**16}


TASK = Task.from_function(nothing, metrics=["val_accuracy"])
OBJECTIVES = [maximise("val_accuracy")]


@dataclass(frozen=True)
class Timed:
    """A strategy whose proposals are timed, so that its own time can be shown apart."""

    strategy: Strategy
    spent: list[float] = field(default_factory=list, compare=False)

    def propose(self, history: History, rng: np.random.Generator) -> Proposal | None:
        """Pass on, and take the time."""
        begin = time.perf_counter()
        try:
            return self.strategy.propose(history, rng)
        finally:
            self.spent.append(time.perf_counter() - begin)


def study(folder: Path, strategy: Strategy, tracker: Any = None) -> Study:
    """A study of nothing."""
    return Study(SPACE, strategy, TASK, OBJECTIVES, folder=folder, tracker=tracker, progress=False)


def per_trial(run: Callable[[], Any], trials: int) -> float:
    """Milliseconds a trial of one run."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3 / trials


def spread(values: list[float]) -> str:
    """Median with minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def local(trials: int, temporary: Path) -> None:
    """Milliseconds a trial in this process."""
    runs = [
        per_trial(lambda i=i: study(temporary / f"local{i}", RandomSearch()).run(trials), trials)  # type: ignore[misc]
        for i in range(5)
    ]
    path = temporary / "fsync"
    with path.open("wb") as file:
        begin = time.perf_counter()
        for _ in range(200):
            file.write(b"x" * 300)
            file.flush()
            os.fsync(file.fileno())
        fsync = (time.perf_counter() - begin) * 1e3 / 200
    print(f"local, no tracker, {trials} trials, 5 runs: {spread(runs)} ms a trial; one fsync here: {fsync:.2f} ms")


def raw_record(client: Any, experiment: str, parent: str, trial: Trial) -> None:
    """What a careful user would write with the raw client: four calls and one artifact."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1e3)
    tags = {"mlflow.parentRunId": parent, "mlflow.runName": f"trial {trial.number}", "trial": str(trial.number)}
    run = client.create_run(experiment, tags=tags).info.run_id
    architecture = trial.architecture
    assert architecture is not None
    client.log_batch(
        run,
        metrics=[Metric(name, value, now, 0) for name, value in trial.metrics.items()],
        params=[Param(name, str(gene)) for name, gene in architecture.genes.items()],
    )
    client.log_text(run, architecture.to_json(), "architecture.json")
    client.set_terminated(run)


def finished(count: int) -> list[Trial]:
    """Trials of a search that ran in memory."""
    history = History(SPACE, OBJECTIVES)
    search = Search(RandomSearch(), history, seed=0)
    search.begin(Limits(max_trials=count))
    while (assignment := search.next()) is not None:
        architecture = assignment.proposal.architecture  # type: ignore[union-attr]
        search.finish(assignment.number, Outcome("complete", {**nothing(architecture, 1.0, 0), "train_seconds": 0.01}))
    return list(history.trials)


def record(name: str, folder: Path) -> StudyRecord:
    """A study's record with the usual fields."""
    return StudyRecord(name, name, folder / name, {"space": SPACE.identity, "seed": "0"}, {"strategy": "RandomSearch"})


def mlflow(trials: int, temporary: Path) -> None:
    """The tracker against the raw client, in interleaved blocks on the same SQLite file."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{temporary / 'mlflow.db'}"
    tracker = MlflowTracker(uri, "ours")
    tracker.start(record("ours", temporary))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("raw", artifact_location=(temporary / "raw").as_uri())
    parent = client.create_run(experiment).info.run_id
    made = finished(2 * trials)
    block = 10
    ours: list[float] = []
    raw: list[float] = []
    for begin in range(0, trials, block):
        part = made[begin : begin + block]
        ours.append(per_trial(lambda part=part: [tracker.log(trial) for trial in part], block))  # type: ignore[misc]
        raw.append(
            per_trial(
                lambda part=part: [raw_record(client, experiment, parent, trial) for trial in part],  # type: ignore[misc]
                block,
            )
        )
    ratios = [a / b for a, b in zip(ours, raw, strict=True)]
    print(f"mlflow, {trials} trials in blocks of {block}: tracker {spread(ours)} ms, raw client {spread(raw)} ms")
    print(f"mlflow, tracker / raw client: {spread(ratios)}")
    whole = [
        per_trial(
            lambda i=i: study(temporary / f"mlflow{i}", RandomSearch(), MlflowTracker(uri, "whole")).run(trials), trials
        )  # type: ignore[misc]
        for i in range(3)
    ]
    base = statistics.median(raw)
    print(
        f"mlflow, a whole study of {trials} trials, the record written to its end: {spread(whole)} ms a trial, "
        f"{statistics.median(whole) / base:.2f} times the raw client"
    )


def ray_part(trials: int, temporary: Path) -> None:
    """Our Ray runner against a bare Ray Tune function trainable, start of Ray excluded from both."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import tune

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    study(temporary / "ray-warm", RandomSearch()).run(2, workers=1)
    ours = per_trial(lambda: study(temporary / "ray", RandomSearch()).run(trials, workers=1), trials)
    short = per_trial(lambda: study(temporary / "ray-short", RandomSearch()).run(20, workers=1), 20)
    bare_trials = max(10, trials // 15)

    def bare(config: dict[str, Any]) -> dict[str, float]:
        return {"val_accuracy": config["x"]}

    def run_bare() -> None:
        tuner = tune.Tuner(
            tune.with_resources(bare, {"cpu": 1}),
            param_space={"x": tune.uniform(0, 1)},
            tune_config=tune.TuneConfig(num_samples=bare_trials, max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=str(temporary / "bare"), verbose=0),
        )
        tuner.fit()

    theirs = per_trial(run_bare, bare_trials)
    ray.shutdown()
    print(
        f"ray, one worker: ours {ours:.1f} ms a trial over {trials} trials ({short:.1f} over 20: the worker's start); "
        f"bare function trainable {theirs:.0f} ms over {bare_trials}; ratio 1/{theirs / ours:.0f}"
    )


def growth(trials: int, temporary: Path) -> None:
    """Our own part of late trials against early ones, the sampler's time shown apart."""
    strategy = Timed(RegularizedEvolution(population=20))
    stamps: list[float] = []
    held = study(temporary / "growth", strategy)
    with held._opened({"max_trials": trials}) as session:
        search = session.search
        search.begin(Limits(trials, max_proposals=10 * trials))
        while (assignment := search.next()) is not None:
            for event in session.worker_at(Bench()).run(assignment):
                search.finish(assignment.number, event)  # type: ignore[arg-type]
            stamps.append(time.perf_counter())
        search.end()
        session.close("complete")
        made = [trial for trial in search.history.trials if trial.copy_of is None]
    count = min(len(stamps), len(made))
    total = np.diff(stamps)[: count - 1] * 1e3
    sampler = np.asarray(strategy.spent[1:count]) * 1e3
    early, late = slice(50, 250), slice(count - 201, count - 1)
    tracked, raw = _tracking_growth(made[1:count], (early, late), temporary)
    own = total - sampler[: len(total)]

    def line(name: str, values: np.ndarray) -> None:
        a, b = float(np.median(values[early])), float(np.median(values[late]))
        print(f"growth, {name:<42} trial ~150: {a:6.2f} ms   trial ~{count - 100}: {b:6.2f} ms   ratio {b / a:.2f}")

    line("scheduling, journal, history", own)
    line("tracking: the tracker on MLflow's SQLite", tracked)
    line("apart: the raw MLflow client, same file", raw)
    line("tracking over raw client", tracked / raw)
    line("apart: evolution's proposal", sampler[: len(own)])
    line("our own part in all, tracking included", own + tracked)


def _tracking_growth(
    trials: list[Trial], windows: tuple[slice, slice], temporary: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds to record each trial: by the tracker and, in the windows, by the raw client into the same file."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{temporary / 'growth.db'}"
    tracker = MlflowTracker(uri, "growth")
    tracker.start(record("growth", temporary))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("raw", artifact_location=(temporary / "growth-raw").as_uri())
    parent = client.create_run(experiment).info.run_id
    compared = {index for window in windows for index in range(len(trials))[window]}
    tracked, raw = np.full(len(trials), np.nan), np.full(len(trials), np.nan)
    for index, trial in enumerate(trials):
        begin = time.perf_counter()
        tracker.log(trial)
        tracked[index] = (time.perf_counter() - begin) * 1e3
        if index in compared:
            begin = time.perf_counter()
            raw_record(client, experiment, parent, trial)
            raw[index] = (time.perf_counter() - begin) * 1e3
    return tracked, raw


def propose(lengths: list[int], temporary: Path) -> None:
    """Milliseconds a proposal against the length of the history; Optuna's bare ask beside ours."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    arms: dict[str, Strategy] = {
        "random search": RandomSearch(),
        "regularised evolution": RegularizedEvolution(population=20),
        "optuna TPE": OptunaSearch("tpe"),
    }
    for name, strategy in arms.items():
        history = History(SPACE, OBJECTIVES)
        search = Search(RandomSearch(), history, seed=0)
        row = []
        for length in lengths:
            search.begin(Limits(max_trials=length))
            while (assignment := search.next()) is not None:
                architecture = assignment.proposal.architecture  # type: ignore[union-attr]
                search.finish(assignment.number, Outcome("complete", nothing(architecture, 1.0, 0)))
            strategy.propose(history, np.random.default_rng(0))  # brings a private cache up to date
            times = []
            for repeat in range(5):
                begin = time.perf_counter()
                strategy.propose(history, np.random.default_rng(repeat))
                times.append((time.perf_counter() - begin) * 1e3)
            row.append(f"{statistics.median(times):8.2f} at {length}")
        print(f"propose, {name:<24} ms: {'   '.join(row)}")
    distributions = {
        name: optuna.distributions.CategoricalDistribution(options) for name, options in SPACE.choices.items()
    }
    bare = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), direction="maximize")
    row = []
    filled = 0
    for length in lengths:
        for number in range(filled, length):
            genes = SPACE.sample(np.random.default_rng(number))
            bare.add_trial(
                optuna.trial.create_trial(
                    params=dict(genes.genes), distributions=distributions, value=nothing(genes, 1.0, 0)["val_accuracy"]
                )
            )
        filled = length
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            asked = bare.ask(distributions)
            times.append((time.perf_counter() - begin) * 1e3)
            bare.tell(asked, state=optuna.trial.TrialState.FAIL)
        row.append(f"{statistics.median(times):8.2f} at {length}")
    print(f"propose, {'bare Optuna TPE ask':<24} ms: {'   '.join(row)}")


def main() -> None:
    """Run the parts asked for."""
    parts = ("local", "mlflow", "ray", "growth", "propose")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[], help="default: all")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    chosen = arguments.parts or parts
    quick = arguments.quick
    print(json.dumps({"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}))
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        if "local" in chosen:
            local(100 if quick else 500, temporary)
        if "mlflow" in chosen:
            mlflow(30 if quick else 200, temporary)
        if "ray" in chosen:
            ray_part(60 if quick else 300, temporary)
        if "growth" in chosen:
            growth(600 if quick else 5000, temporary)
        if "propose" in chosen:
            propose([100, 300] if quick else [100, 1000, 5000], temporary)


if __name__ == "__main__":
    main()
