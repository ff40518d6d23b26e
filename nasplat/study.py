"""The user's call: a study joins a space, a strategy and a task in a folder, and runs."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nasplat import baselines as baseline_networks
from nasplat import journal
from nasplat.architecture import Architecture
from nasplat.checks import is_number
from nasplat.cost.bench import Bench
from nasplat.cost.counter import Count
from nasplat.cost.energy import Energy
from nasplat.cost.latency import Latency
from nasplat.cost.memory import PeakMemory
from nasplat.cost.meter import ArchitectureMeter, BatchMeter, CostMeter, Meter
from nasplat.cost.predicted import Predicted, prediction_quality
from nasplat.cost.throughput import Throughput
from nasplat.cost.zero_cost import SCORES, ZeroCost
from nasplat.errors import (
    FolderError,
    FolderMismatchError,
    InvalidInputError,
    NasplatError,
    NasplatWarning,
    SearchInterrupted,
    UnknownMetricError,
)
from nasplat.identity import canonical, describe, source_hash, type_name
from nasplat.joint_space import JointSpace
from nasplat.journal import Journal
from nasplat.meter_checks import check_reachable, check_runtimes
from nasplat.mlflow_tracker import MlflowTracker
from nasplat.objectives import Constraint, Objective, RelativeConstraint, constraint_from_json
from nasplat.preflight import Preflight, preflight
from nasplat.progress import Display, Silent, Terminal
from nasplat.result import Result, header_of, load, restored
from nasplat.runners import local
from nasplat.search import Event, Limits, Search, check_whole
from nasplat.space import SearchSpace
from nasplat.strategy import Evaluate, Explore, History, Strategy, Trial
from nasplat.task import Task
from nasplat.tracking import Backlog, StudyRecord, Tracker, study_tags
from nasplat.train import place
from nasplat.worker import Worker, trial_folder

ALWAYS_KNOWN = ("train_seconds", "measure_seconds")
"""Metrics that every trial may have, whatever the task and the meters."""

CHECKED = 4
"""Networks tried before a space is said not to fit its task."""

ON_DEMAND: tuple[Meter, ...] = (
    Latency(), PeakMemory(), Throughput(), Energy(),
    *(ZeroCost(name) for name in SCORES),
)  # fmt: skip
"""Meters that join a study when an objective, a constraint or the strategy names one of their metrics."""


class Study:
    """A search of one space by one strategy on one task, in one folder.

    Example::

        study = Study(space=Bats.small(), strategy=RegularizedEvolution(population=10),
                      task=Task.fashion_mnist(epochs=3, size=16),
                      objectives=[maximise("val_accuracy"), minimise("latency_ms")],
                      constraints=[at_most("params", 1e6)], seed=0, folder="runs/first")
        result = study.run(max_trials=40, workers=2)

    The same call with the same folder continues the study. A folder of another space, strategy, task or seed is
    refused; objectives, constraints and meters may change where every past trial has the metric.
    """

    def __init__(
        self,
        space: SearchSpace,
        strategy: Strategy,
        task: Task,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint | RelativeConstraint] = (),
        *,
        baselines: Mapping[str, baseline_networks.Network] | None = None,
        seed: int = 0,
        folder: str | Path,
        meters: Sequence[Meter] = (),
        tracker: Tracker | Literal["mlflow"] | None = "mlflow",
        device: str = "cpu",
        threads: int = 1,
        time_limit_s: float | None = None,
        keep_weights: Literal["front", "all"] = "front",
        retrain_duplicates: bool = False,
        progress: bool = True,
    ) -> None:
        """Check everything that can be checked before work starts. Nothing is written yet.

        Args:
            space: What is searched.
            strategy: What proposes.
            task: What candidates are judged on.
            objectives: At least one; the first names the best.
            constraints: Hard limits on any metric; a percentage, ``at_most("latency_ms", "60%")``, is of a baseline.
            baselines: Networks that limits may be relative to, by name: architectures of the space, or functions
                without arguments that make the network. Measured once, before the search.
            seed: Of everything random, at least 0.
            folder: Holds the journal and the weights. On a cluster: a path that every node reaches.
            meters: Measured beside parameters, operations and model bytes, which always are. Latency and zero-cost
                scores join by themselves where an objective, a constraint or an objective of the strategy's own names
                them.
            tracker: ``"mlflow"`` (``MLFLOW_TRACKING_URI``, else a SQLite file beside the folder), a tracker, or None.
            device: Where to train and measure: ``cpu``, ``cuda``, ``cuda:1``.
            threads: Threads of torch for each trial.
            time_limit_s: Seconds a trial may take; past it, it has failed.
            keep_weights: Of the front (and of what may go on), or of all trials.
            retrain_duplicates: Evaluate an architecture again, instead of copying its result.
            progress: Show live progress on stderr.

        Raises:
            InvalidInputError: An argument is outside what is legal.
            UnknownMetricError: An objective or a constraint names a metric that nothing provides.
            FolderMismatchError: The folder holds another study.
        """
        for name, value, kind in (
            ("space", space, SearchSpace),
            ("strategy", strategy, Strategy),
            ("task", task, Task),
        ):
            if not isinstance(value, kind) or isinstance(value, type):
                hint = f" (the class; make one: {value.__name__}())" if isinstance(value, type) else ""
                raise InvalidInputError(f"{name} is {value!r}{hint}; a {kind.__name__} is needed")
        for name, given in (("objectives", objectives), ("constraints", constraints), ("meters", meters)):
            if not isinstance(given, list | tuple):
                raise InvalidInputError(f"{name} is {given!r}; a list is needed")
        for meter in meters:
            if isinstance(meter, type) or not isinstance(meter, CostMeter | BatchMeter | ArchitectureMeter):
                raise InvalidInputError(f"a meter is {meter!r}; an object with metrics, trained and measure is needed")
            if isinstance(meter, BatchMeter) and task.data is None:
                raise InvalidInputError(
                    f"{meter!r} needs a batch of training data; the task {task.name} is a function and has none"
                )
            if isinstance(meter, ArchitectureMeter):
                meter.check_space(space)
        if tracker not in (None, "mlflow") and (isinstance(tracker, type) or not isinstance(tracker, Tracker)):
            raise InvalidInputError(f"tracker is {tracker!r}; legal: 'mlflow', None, or a tracker: MlflowTracker()")
        if not objectives or not all(isinstance(objective, Objective) for objective in objectives):
            raise InvalidInputError(
                f"objectives is {objectives!r}; a list of at least one maximise('...') or minimise('...') is needed"
            )
        if len({objective.metric for objective in objectives}) < len(objectives):
            raise InvalidInputError(f"two objectives name one metric: {', '.join(map(str, objectives))}")
        if not all(isinstance(constraint, Constraint | RelativeConstraint) for constraint in constraints):
            raise InvalidInputError(
                f"constraints is {constraints!r}; at_most('...', x) or at_least('...', x) are needed"
            )
        self.baselines = baseline_networks.checked({} if baselines is None else baselines, space)
        check_whole("seed", seed, least=0)
        check_whole("threads", threads, least=1)
        if time_limit_s is not None and not (isinstance(time_limit_s, int | float) and time_limit_s > 0):
            raise InvalidInputError(f"time_limit_s is {time_limit_s!r}; positive seconds, or None for no limit")
        if keep_weights not in ("front", "all"):
            raise InvalidInputError(f"keep_weights is {keep_weights!r}; legal: 'front', 'all'")
        try:
            processor = torch.device(device)
        except RuntimeError as error:
            raise InvalidInputError(f"device is {device!r}; legal: 'cpu', 'cuda', 'cuda:1', ...") from error
        if processor.type == "cuda" and (processor.index or 0) >= torch.cuda.device_count():
            raise InvalidInputError(
                f"device is {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices; use device='cpu'"
            )
        self.space = space
        self.strategy = strategy
        self.task = task
        self.objectives = tuple(objectives)
        self.constraints: tuple[Constraint | RelativeConstraint, ...] = tuple(constraints)
        self.seed = seed
        self.folder = Path(folder)
        self.device = device
        self.threads = threads
        self.time_limit_s = time_limit_s
        self.keep_weights = keep_weights
        self.retrain_duplicates = retrain_duplicates
        self.progress = progress
        self.tracker = tracker
        self.given_meters = tuple(meters)
        self.meters = self._with_meters(self.given_meters)
        self.constraints = tuple(baseline_networks.named(constraints, self.baselines, self.meters))
        canonical(self._identity())  # what cannot be told apart is refused now, not when there is a folder already
        self._check_folder()

    # What is checked beforehand.

    def _wanted(self) -> list[str]:
        """The metrics that objectives and constraints name."""
        return [objective.metric for objective in self.objectives] + [limit.metric for limit in self.constraints]

    def _with_meters(self, given: tuple[Meter, ...]) -> tuple[Meter, ...]:
        """The given meters, those that every network gets, and those that a named metric asks for."""
        meters = list(given)
        wanted = [*self._wanted(), *_named_by(self.strategy)]
        if self.task.function is None:
            known = {name for meter in meters for name in meter.metrics}
            if not known.intersection(Count().metrics):
                meters.insert(0, Count())
            for meter in ON_DEMAND:
                if known.isdisjoint(meter.metrics) and set(wanted).intersection(meter.metrics):
                    meters.append(meter)
        for meter in meters:
            # A meter of what not every machine can tell says so beforehand.
            unavailable = getattr(meter, "unavailable", None)
            named = set(wanted).intersection(meter.metrics)
            if named and unavailable is not None and (why := unavailable(self.device)):
                raise UnknownMetricError(f"{', '.join(sorted(named))} cannot be measured here: {why}")
        names = [name for meter in meters for name in meter.metrics]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InvalidInputError(
                f"two meters give {', '.join(sorted(twice))}; a label tells them apart: Latency(..., label='second')"
            )
        task_names = self.task.metric_names
        if task_names is not None:
            known_names = [*task_names, *names, *ALWAYS_KNOWN]
            for name in wanted:
                if name not in known_names:
                    more = [m for meter in ON_DEMAND for m in meter.metrics if m not in known_names]
                    raise UnknownMetricError(
                        f"nothing in this study provides {name!r}; there are: {', '.join(known_names)}"
                        + (f"; and on demand: {', '.join(more)}" if more and self.task.function is None else "")
                        + (
                            f". {name} needs a network and data; this task is a function"
                            if name in more and self.task.function is not None
                            else ""
                        )
                    )
        return tuple(meters)

    def _identity(self) -> dict[str, Any]:
        return {
            "space": describe(self.space),
            "space_identity": self.space.identity,
            "strategy": describe(self.strategy),
            "task": describe(self.task),
            "seed": self.seed,
        }

    def _wishes(self) -> dict[str, Any]:
        return {
            "objectives": [dataclasses.asdict(objective) for objective in self.objectives],
            "constraints": [constraint.to_json() for constraint in self.constraints],
            "baselines": {name: baseline_networks.description_of(network) for name, network in self.baselines.items()},
            "meters": describe(self.meters),
        }

    def _check_folder(self) -> None:
        """Refuse a folder that holds another study. Reads only."""
        if self.folder.exists() and not self.folder.is_dir():
            raise FolderError(f"{self.folder} is a file; the study needs a folder")
        events, _ = journal.read(self.folder)
        if not events:
            return
        header = header_of(events, self.folder)
        self._check_same(header)
        for name, was in header.get("sources", {}).items():
            now = self._sources().get(name)
            if now is not None and now != was:
                warnings.warn(
                    f"the source of {name} changed since {self.folder} was made; past trials ran the old one",
                    NasplatWarning,
                    stacklevel=3,
                )
        result = load(self.folder, space=self.space, task=self.task)
        for metric in self._wanted():
            lacking = [
                trial.number
                for trial in result.trials
                if trial.state == "complete" and isinstance(trial.proposal, Evaluate) and trial.proposal.budget > 0
                and metric not in trial.metrics
            ]  # fmt: skip
            if lacking:
                raise FolderMismatchError(
                    f"{self.folder}: {len(lacking)} past trials (first: {lacking[0]}) have no {metric}, "
                    "so it cannot become an objective or a constraint of this study; use another folder"
                )

        self._check_same_meters(events)

    def _check_same_meters(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Warn where a metric that decides is measured in another way than in past runs."""
        if not any(event["event"] == "finish" for event in events):
            return
        runs = [event for event in events if event["event"] in ("study", "session")]
        past = {canonical(meter) for event in runs for meter in event["meters"]}
        for meter in self.meters:
            decides = [name for name in self._wanted() if name in meter.metrics]
            if decides and canonical(describe(meter)) not in past:
                warnings.warn(
                    f"{self.folder}: past trials did not have {', '.join(decides)} from {meter!r}, so their values and "
                    "new ones may not be comparable; give the meter that they had, or use another folder",
                    NasplatWarning,
                    stacklevel=4,
                )

    def _check_same(self, header: Mapping[str, Any]) -> None:
        """Refuse a folder whose journal begins with the header of another study."""
        for part, own in self._identity().items():
            if part == "space_identity" or canonical(header[part]) == canonical(own):
                continue
            raise FolderMismatchError(
                f"{self.folder} holds a study with another {part}. There: {_brief(header[part])}. "
                f"Here: {_brief(own)}. Use another folder, or the same {part}; nothing was changed"
            )

    def _check_architecture(self, architecture: Architecture) -> None:
        if not isinstance(architecture, Architecture):
            raise InvalidInputError(f"{architecture!r} is no architecture; study.space.architecture(genes) makes one")

    def _sources(self) -> dict[str, str]:
        """Hashes of the source of what the user's own script gave: a change is worth a warning."""
        given = [self.task.function, self.task.loss, *self.task.metrics.values(), getattr(self.space, "function", None)]
        given += [type(part) for part in (self.space, self.strategy)]
        given += [network for network in self.baselines.values() if not isinstance(network, Architecture)]
        found = {}
        for value in given:
            if value is None or getattr(value, "__module__", "").partition(".")[0] == "nasplat":
                continue
            digest = source_hash(value)
            if digest is not None and hasattr(value, "__qualname__"):
                found[f"{value.__module__}:{value.__qualname__}"] = digest
        return found

    def _check_build(self) -> None:
        """Build one network and run it on one example, so that a space that does not fit the task says so at once."""
        if self.task.function is not None:
            return
        example = self.task.example()
        rng = np.random.default_rng(self.seed)
        outputs: Any = None
        for left in reversed(range(CHECKED)):
            architecture = self.space.sample(rng)
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    outputs = self.space.build(architecture).eval()(place(example, torch.device("cpu")))
                break
            except Exception as error:
                # One candidate may fail, as a trial. That all of them do is worth saying before the start.
                if not left:
                    raise InvalidInputError(
                        f"a network of {self.space!r} cannot take the inputs of the task {self.task.name}, "
                        f"{tuple(example.shape)}: {error}"
                    ) from error
        splits = self.task.load()
        target = next(iter(splits.train.batches(2)))[1]
        classes = target.ndim == 1 and not target.is_floating_point()
        if classes and isinstance(outputs, torch.Tensor) and outputs.ndim == 2:
            highest = max(int(y.max()) for _, y in splits.validation.batches(4096))
            if highest >= outputs.shape[1]:
                raise InvalidInputError(
                    f"a network of {self.space!r} gives {outputs.shape[1]} logits; the task {self.task.name} has the "
                    f"class {highest}: give the space at least {highest + 1} classes"
                )

    def _check_strategy(self) -> None:
        """Ask the strategy once, so that one that cannot search this study says so before there is a folder."""
        if journal.read(self.folder)[0]:
            return
        # Whether it can search under such limits at all; how wide they are is not known yet where they are relative.
        limits = [c if isinstance(c, Constraint) else c.resolved(1.0) for c in self.constraints]
        history = History(self.space, self.objectives, limits)
        try:
            proposal = self.strategy.propose(history, np.random.default_rng([self.seed, 0]))
        except NasplatError:
            raise
        except Exception:  # a defect of the strategy: it shows where the search asks, with all that is known there
            return
        if not isinstance(proposal, Explore):
            return
        if self.task.function is not None:
            raise InvalidInputError(
                f"{type(self.strategy).__name__} trains a supernet; the task {self.task.name} is a function, without "
                "data to train it on"
            )
        if type(self.space).supernet is SearchSpace.supernet or isinstance(self.space, JointSpace):
            self.space.supernet()  # says why there is none

    # Running.

    def run(
        self,
        max_trials: int,
        *,
        max_hours: float | None = None,
        max_proposals: int | None = None,
        workers: int = 0,
        cpus_per_trial: float = 1.0,
        gpus_per_trial: float | None = None,
    ) -> Result:
        """Search until a limit is reached or the strategy has nothing more to propose.

        Args:
            max_trials: Trials over all runs of the study: run again with more to go on.
            max_hours: Hours of searching over all runs of the study.
            max_proposals: Candidates over all runs, those refused for a cheap cost and copies included; None is
                ``10 * max_trials + 100``.
            workers: Trials at a time, on Ray; 0 runs them one by one in this process.
            cpus_per_trial: Processors that Ray sets aside for a trial; may be a fraction.
            gpus_per_trial: GPUs, likewise; None is 1 on a CUDA device and 0 elsewhere.

        Returns:
            All trials of the study.

        Raises:
            SearchInterrupted: Ctrl-C. What had finished is in the folder.
            FolderInUseError: Another live process holds the folder.
            UnknownMetricError: The task's function does not return an objective.
        """
        limits = Limits(max_trials, max_proposals, max_hours)
        check_whole("workers", workers, least=0)
        if gpus_per_trial is None:
            gpus_per_trial = 1.0 if torch.device(self.device).type == "cuda" else 0.0
        run = {
            "max_trials": max_trials,
            "max_hours": max_hours,
            "max_proposals": max_proposals,
            "workers": workers,
            "cpus_per_trial": cpus_per_trial,
            "gpus_per_trial": gpus_per_trial,
        }
        check_reachable(self.meters, workers)
        size: Any = {"workers": workers, "cpus": cpus_per_trial, "gpus": gpus_per_trial}
        display: Display = Terminal() if self.progress else Silent()
        with ExitStack() as stack:
            place_to_measure = self._bench(size, display, stack)
            with self._opened(run, place_to_measure, display) as session:
                search = session.search
                search.begin(limits)
                session.display.begin(search, max_trials, max_hours)
                state = "failed"
                try:
                    if not search.has_work():
                        local.run(search, session.worker_at(Bench()))
                    else:
                        worker = session.worker_at(place_to_measure())
                        check_runtimes(worker, self.seed)
                        if workers == 0:
                            local.run(search, worker)
                        else:
                            from nasplat.runners import ray_tune

                            ray_tune.run(search, worker, **size)
                    state = "complete"
                except KeyboardInterrupt:
                    state = "interrupted"
                    raise SearchInterrupted(
                        f"interrupted; {sum(t.finished is not None for t in search.history.trials)} trials are in "
                        f"{self.folder}. To go on: {self._how_to_go_on()}"
                    ) from None
                finally:
                    search.end()
                    session.close(state)
                return session.result()

    def _bench(self, size: Mapping[str, Any], display: Display, stack: ExitStack) -> Callable[[], Bench]:
        """Gives the bench that the study measures on, made when it is first asked for: Ray takes seconds to start."""

        @cache
        def bench() -> Bench:
            if size["workers"] == 0:
                here = Bench()
                here.check()
                return here
            from nasplat.runners import ray_tune

            machines = {on for meter in self.meters if isinstance(on := getattr(meter, "on", None), str)}
            return stack.enter_context(
                ray_tune.connected(**size, machines=sorted(machines), time_limit_s=self.time_limit_s, say=display.say)
            )

        return bench

    def _how_to_go_on(self) -> str:
        script = sys.argv[0] if sys.argv else ""
        if Path(script).name in ("nasplat", "__main__.py"):
            return f"nasplat resume {shlex.quote(str(self.folder))}"
        return "run the same script again" if script.endswith(".py") else "call run() again with the same folder"

    def preflight(
        self, samples: int = 30, seconds: float = 60.0, *, max_trials: int | None = None, workers: int = 0
    ) -> Preflight:
        """What is known before the first trial: costs of the space, whether limits can be met, time, disk.

        Samples networks, builds and measures them, and trains a few for a few steps. Nothing is written; ``print``
        shows the result.

        Args:
            samples: Networks to sample; a space that has no more is measured as a whole.
            seconds: Time for it. What is under way when it ends is finished.
            max_trials: Trials of the search, for its expected time and disk; None leaves these out.
            workers: Trials at a time, likewise; as of :meth:`run`.

        Raises:
            UnsupportedError: A meter, or a baseline that limits are relative to, cannot be measured at all.
        """
        check_whole("samples", samples, least=1)
        check_whole("workers", workers, least=0)
        if max_trials is not None:
            check_whole("max_trials", max_trials, least=1)
        if not is_number(seconds) or not seconds > 0:
            raise InvalidInputError(f"seconds is {seconds!r}; a positive number is needed")
        check_reachable(self.meters, workers)
        self._check_build()
        with ExitStack() as stack:
            away = any(getattr(meter, "on", None) is not None for meter in self.meters)
            size = {"workers": workers if away else 0, "cpus": 1.0, "gpus": 0.0}
            worker = self.worker_at(self._bench(size, Silent(), stack)())
            check_runtimes(worker, self.seed)
            events, _ = journal.read(self.folder)
            limits, waiting = self.limits(events)
            if waiting:
                limits, _ = self.limits([*events, *baseline_networks.measured(waiting, self.baselines, worker)])
            return preflight(
                dataclasses.replace(worker, constraints=tuple(limits), meters=tuple(map(_without_twins, self.meters))),
                self.strategy,
                self.objectives,
                samples=samples,
                seconds=seconds,
                seed=self.seed,
                keep_weights=self.keep_weights,
                trials=max_trials,
                workers=workers,
            )

    def enqueue(self, architecture: Architecture) -> None:
        """Have an architecture evaluated next, before the strategy is asked again. Kept in the folder."""
        self._check_architecture(architecture)
        with self._opened(None) as session:
            session.search.enqueue(architecture)

    def evaluate(self, architecture: Architecture) -> Trial:
        """Evaluate one architecture now, in this process, as a trial of the study.

        Trials that an interrupted run left unfinished, and those enqueued, come first. An architecture that has been
        evaluated gives its result again (see ``retrain_duplicates``).
        """
        self._check_architecture(architecture)
        check_reachable(self.meters, 0)
        with self._opened({"evaluate": architecture.id}, Bench) as session:
            search = session.search
            state = "failed"
            try:
                worker = session.worker_at(Bench())
                check_runtimes(worker, self.seed)
                search.enqueue(architecture)
                search.begin(Limits(max_trials=10**9))
                while (assignment := search.next(ask=False)) is not None:
                    local.run_one(search, worker, assignment)
                state = "complete"
            except KeyboardInterrupt:
                state = "interrupted"
                raise
            finally:
                search.end()
                session.close(state)
            return search.history.of(architecture)[-1]

    def result(self) -> Result:
        """What is in the folder now.

        Raises:
            FolderError: Nothing has been run yet.
        """
        return load(self.folder, space=self.space, task=self.task)

    @classmethod
    def resume(cls, folder: str | Path, **changes: Any) -> Study:
        """The study of a folder, where space, strategy and task came from entry points (and nasplat's own tasks).

        Args:
            folder: The study's folder.
            changes: Arguments of :class:`Study` that may change: objectives, constraints, meters, tracker, device, ...

        Raises:
            FolderError: There is no study in the folder, or a part of it lives in the script that made it.
        """
        path = Path(folder)
        events, _ = journal.read(path)
        header = header_of(events, path)
        sessions = [event for event in events if event["event"] == "session"]
        wishes = sessions[-1] if sessions else header
        parts: dict[str, Any] = {}
        for name in ("space", "strategy", "task"):
            part = restored(header[name], default=lambda: None)
            if part is None:
                raise FolderError(
                    f"{path}: the {name} {_brief(header[name])} lives in the script that made the study; "
                    "run that script again with the same folder to go on"
                )
            parts[name] = part
        parts["objectives"] = [Objective(**objective) for objective in wishes["objectives"]]
        parts["constraints"] = [constraint_from_json(constraint) for constraint in wishes["constraints"]]
        parts["baselines"] = {
            name: baseline_networks.from_description(description)
            for name, description in wishes.get("baselines", {}).items()
        }
        parts["meters"] = [m for d in wishes["meters"] if (m := restored(d, default=lambda: None)) is not None]
        if len(parts["meters"]) < len(wishes["meters"]) and "meters" not in changes:
            raise FolderError(
                f"{path}: a meter lives in the script that made the study; run that script again, or give meters=[...]"
            )
        settings = dict(wishes["settings"])
        if "tracker" not in changes:
            settings["tracker"] = recorded_tracker(events)
        return cls(**{**parts, **settings, "seed": header["seed"], "folder": path, **changes})

    # The record.

    def open_tracker(self) -> Tracker | None:
        """A tracker for one run of the study; None where there is to be no record but the folder's."""
        return MlflowTracker() if isinstance(self.tracker, str) else self.tracker

    def record(self, header: Mapping[str, Any], limits: Sequence[Constraint] = ()) -> StudyRecord:
        """What a tracker says of this study.

        Args:
            header: The journal's first event.
            limits: The constraints, those relative to a baseline with their bounds, where known.
        """
        folder = self.folder.resolve()
        return StudyRecord(
            id=header["id"],
            name=folder.name,
            folder=folder,
            parameters={
                "space": self.space.identity,
                "strategy": repr(self.strategy),
                "task": self.task.name,
                "seed": str(self.seed),
                "objectives": ", ".join(map(str, self.objectives)),
                "constraints": ", ".join(map(str, limits or self.constraints)),
                "meters": ", ".join(map(repr, self.meters)),
            },
            tags={
                "space": self.space.name,
                "strategy": type(self.strategy).__name__,
                "task": self.task.name,
                "seed": str(self.seed),
                **study_tags(),
            },
            descriptions={name: header[name] for name in ("space", "strategy", "task")},
        )

    def where(self) -> str:
        """Where the record is and how to open it; "" without a record or before the first run."""
        tracker = self.open_tracker()
        events, _ = journal.read(self.folder)
        return tracker.where(self.record(events[0])) if tracker is not None and events else ""

    # The folder.

    def _settings(self) -> dict[str, Any]:
        names = ("device", "threads", "time_limit_s", "keep_weights", "retrain_duplicates")
        return {name: getattr(self, name) for name in names} | {"tracker": self._describe_tracker()}

    def _describe_tracker(self) -> Any:
        """The tracker as JSON values; never a password, which a URI may hold."""
        tracker = self.tracker
        if tracker is None or isinstance(tracker, str):
            return tracker
        if isinstance(tracker, MlflowTracker):
            uri = None if tracker.uri is not None and "@" in tracker.uri else tracker.uri
            return {"uri": uri, "experiment": tracker.experiment}
        return {"class": type_name(type(tracker))}

    @contextmanager
    def _opened(
        self, run: Mapping[str, Any] | None, bench: Callable[[], Bench] = Bench, display: Display | None = None
    ) -> Iterator[_Session]:
        """Hold the folder, bring the search to where its journal ends, and let it go at the end.

        Args:
            run: What the session's event says of the run; None where no trial is to be run.
            bench: Gives the bench that baselines are measured on, where they are not known yet.
            display: Shows progress.
        """
        if run is not None:
            self._check_build()
            if run.get("max_trials"):
                self._check_strategy()
        with Journal(self.folder) as held:
            if held.events:
                self._check_same(held.events[0])  # again: it may have become another study's since
            if held.torn is not None:
                warnings.warn(
                    f"the last line of {self.folder / journal.FILE} was torn (a crash while writing); it was moved to "
                    f"{held.torn.name}, and everything before it is kept",
                    NasplatWarning,
                    stacklevel=4,
                )
            if not held.events:
                header = {
                    "event": "study",
                    "schema": journal.SCHEMA_VERSION,
                    "id": uuid.uuid4().hex,
                    "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    **self._identity(),
                    **self._wishes(),
                    "settings": self._settings(),
                    "sources": self._sources(),
                }
                held.append(header, durable=True)
                held.events.append(header)
            if run is not None and self.limits(held.events)[1]:
                self._measure_baselines(held, bench(), display or Silent())
            yield _Session(self, held, run, display or Silent())

    # Limits relative to baselines.

    def limits(
        self, events: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[Constraint], list[RelativeConstraint]]:
        """The constraints as numbers, and those that are relative to a baseline that was not measured yet.

        Args:
            events: The journal's; None reads it.
        """
        known = journal.read(self.folder)[0] if events is None else events
        return baseline_networks.resolved(self.constraints, self.baselines, known, self.meters, self.device)

    def _measure_baselines(self, held: Journal, bench: Bench, display: Display) -> None:
        """Measure what limits are relative to, into the journal: later runs have the same limits."""
        waiting = self.limits(held.events)[1]
        if self.progress:
            display.say(f"Measuring the {_names({limit.of for limit in waiting})}, which limits are relative to")
        try:
            for event in baseline_networks.measured(waiting, self.baselines, self.worker_at(bench)):
                held.append(event, durable=True)
                held.events.append(event)
        except KeyboardInterrupt:
            raise SearchInterrupted(
                f"interrupted while a baseline was measured. To go on: {self._how_to_go_on()}"
            ) from None

    def worker_at(self, bench: Bench, limits: Sequence[Constraint] = ()) -> Worker:
        """What runs the trials, with the bench that they are measured on."""
        return Worker(
            space=self.space,
            task=self.task,
            folder=self.folder.resolve(),
            meters=self.meters,
            constraints=tuple(limits),
            device=self.device,
            threads=self.threads,
            time_limit_s=self.time_limit_s,
            bench=bench,
        )


class _Session:
    """One run of a study: its search, joined to journal, tracker and display."""

    def __init__(self, study: Study, held: Journal, run: Mapping[str, Any] | None, display: Display) -> None:
        self.study = study
        self._is_run = run is not None and "max_trials" in run
        self.display = display
        limits, _ = study.limits(held.events)
        history = History(study.space, study.objectives, limits)
        self.search = Search(
            study.strategy,
            history,
            study.seed,
            retrain_duplicates=study.retrain_duplicates,
            record=self._record,
            booked=self._booked,
        )
        self._journal = held
        self._tracker: Backlog | None = None
        self._weights: set[int] = set()
        self.search.replay(held.events)
        if run is not None:
            held.append(
                {
                    "event": "session",
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    **study._wishes(),
                    "constraints": [limit.to_json() for limit in limits],
                    "settings": study._settings(),
                    "run": dict(run),
                    "versions": study_tags(),
                }
            )
            self._weights = {
                trial.number for trial in history.trials if trial.full and self._weights_of(trial.number).exists()
            }
            self._start_tracker(held.events[0])

    def worker_at(self, bench: Bench) -> Worker:
        """What runs the trials, with the bench that they are measured on."""
        return self.study.worker_at(bench, self.search.history.constraints)

    def _weights_of(self, number: int) -> Path:
        return trial_folder(self.study.folder, number) / "weights.safetensors"

    def _record(self, event: Event) -> None:
        # A report too: an explorer saves its checkpoint after it, which must never be newer than the journal.
        self._journal.append(event, durable=event["event"] in ("report", "finish"))

    def _booked(self, event: Event) -> None:
        if event["event"] == "enqueue":
            return
        trial = self.search.history.trials[event["trial"]]
        if self._tracker is not None:
            self._tracker.log(trial)
        self.display.changed(trial)
        if event["event"] == "finish":
            self._tidy(trial)
            self._check_function(trial)

    def _tidy(self, trial: Trial) -> None:
        """Delete weights that neither the front nor a later trial can need."""
        if self.study.keep_weights == "all":
            return
        self._tidy_rungs(trial)
        if not trial.full or not self._weights_of(trial.number).exists():
            return
        needed = {kept.number for kept in self.search.history.front()}
        for other in self.search.history.running:
            if isinstance(other.proposal, Evaluate) and other.proposal.weights_of is not None:
                needed.add(other.proposal.weights_of)
        self._weights.add(trial.number)
        for number in self._weights - needed:
            self._weights_of(number).unlink(missing_ok=True)
        self._weights &= needed

    def _tidy_rungs(self, trial: Trial) -> None:
        """Delete what a stopped trial kept, and what a longer training of the same architecture has gone on from."""
        history, proposal = self.search.history, trial.proposal
        over = [trial.number] if trial.state == "stopped" else []
        if trial.state == "complete" and isinstance(proposal, Evaluate) and proposal.weights_of is not None:
            source = history.trials[proposal.weights_of]
            if source.architecture == trial.architecture and not source.full and proposal.budget > 0:
                over.append(source.number)
        used = {t.proposal.weights_of for t in history.running if isinstance(t.proposal, Evaluate)}
        for number in set(over) - used:
            for file in ("weights.safetensors", "checkpoint.pt"):
                (trial_folder(self.study.folder, number) / file).unlink(missing_ok=True)

    def _check_function(self, trial: Trial) -> None:
        """A user's function that does not return an objective will not for the next candidate either."""
        if trial.state != "complete" or self.study.task.function is None or not isinstance(trial.proposal, Evaluate):
            return
        wanted = self.study._wanted()
        missing = [name for name in wanted if name not in trial.metrics]
        if missing and trial.proposal.budget > 0:
            raise UnknownMetricError(
                f"{self.study.task.name} returned {', '.join(trial.metrics)}; the study needs {', '.join(missing)} too."
                f" Trial {trial.number} is in {self.study.folder}"
            )

    # Tracking.

    def _start_tracker(self, header: Mapping[str, Any]) -> None:
        tracker = self.study.open_tracker()
        if tracker is not None:
            self._tracker = Backlog(tracker, say=self.display.say)
            self._tracker.start(self.study.record(header, self.search.history.constraints), self.search.history.trials)

    def close(self, state: str) -> None:
        """Write what is left: the journal's end, the tables for the record, the tracker's backlog."""
        self.display.end()
        if self._is_run:
            over = self.search.over if state == "complete" else ""
            self._journal.append({"event": "end", "state": state, "over": over}, durable=True)
        if self._tracker is not None:
            if self._is_run and state != "failed":
                self._put_front(self._tracker)
            self._tracker.end(state, self._prediction_quality())
            left = self._tracker.close(timeout=30.0)
            if left:
                self.display.say(f"{left} trials are not in the record yet; the next run of the study writes them")

    def _prediction_quality(self) -> dict[str, float]:
        """How well costs were predicted, where they were, on the candidates that were measured as well."""
        found: dict[str, float] = {}
        for meter in self.study.meters:
            if isinstance(meter, Predicted):
                quality = prediction_quality(self.search.history.trials, meter.metric)
                found |= quality.metrics(meter.metric) if quality is not None else {}
        return found

    def _put_front(self, tracker: Backlog) -> None:
        """Put the front, with its errors, with the study's record."""
        try:
            for path in self.result().save_front(self.study.folder):
                tracker.artifact(path)
        except Exception as error:  # the search is over and kept; only a table and a picture of it are missing
            self.display.say(f"the front could not be written for the record: {type(error).__name__}: {error}")

    def result(self) -> Result:
        return Result(self.study.folder, self.study.space, self.study.task, self.search.history, self.search.over)


def _without_twins(meter: Meter) -> Meter:
    """A meter that measures nothing but the network: twins take most of the time, and no limit is on them."""
    return dataclasses.replace(meter, twins=False) if isinstance(meter, Latency) else meter


def _names(names: Collection[str]) -> str:
    return ("baseline " if len(names) == 1 else "baselines ") + ", ".join(sorted(names))


def recorded_tracker(events: Sequence[Mapping[str, Any]]) -> Tracker | None:
    """The tracker of a study's last run (of MLflow, or none).

    Args:
        events: The journal's.

    Raises:
        FolderError: It was a tracker of the user's own.
    """
    wishes = [event for event in events if event["event"] in ("study", "session")][-1]
    tracker = wishes["settings"]["tracker"]
    if tracker is None:
        return None
    if tracker == "mlflow":
        return MlflowTracker()
    if "class" in tracker:
        raise FolderError(f"the tracker {tracker['class']} lives in the script that made the study; give tracker=...")
    return MlflowTracker(tracker["uri"], tracker["experiment"])


def _named_by(part: Any) -> list[str]:
    """Metrics of the objectives that a strategy, or a strategy inside it, holds itself."""
    if isinstance(part, Objective):
        return [part.metric]
    if isinstance(part, list | tuple):
        return [name for item in part for name in _named_by(item)]
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [name for field in dataclasses.fields(part) for name in _named_by(getattr(part, field.name))]
    return []


def _brief(description: Any) -> str:
    """A description short enough for a message: a dataclass as its constructor call."""
    if isinstance(description, dict) and "fields" in description:
        name = str(description["type"]).rpartition(":")[2]
        return f"{name}({', '.join(f'{key}={_brief(value)}' for key, value in description['fields'].items())})"
    if isinstance(description, dict) and len(description) == 1:
        return str(next(iter(description.values())))
    return repr(description)
