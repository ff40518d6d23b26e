"""Before a search: what the space costs, whether the limits can be met, how long it will take, what it will write.

Networks are sampled, built, and measured with the study's own meters; a few of them are trained for a few steps of the
real recipe. Every number comes from that; what cannot be known beforehand is called unknown. Nothing is written.
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save
from scipy.stats import binomtest
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.data.sources import LoaderSource, Source, Splits
from nasplat.errors import InvalidInputError, NonFiniteError
from nasplat.objectives import Constraint, Objective
from nasplat.phases import spans
from nasplat.quantities import duration, quantity
from nasplat.search import Limits, Outcome, Search
from nasplat.strategy import Evaluate, Explore, History, Report, Strategy
from nasplat.task import Recipe, Task
from nasplat.train import EVALUATION_BATCH, Training, place
from nasplat.worker import Worker

WIDTH = 100
"""Columns that the text may take."""

LEVEL = 0.95
"""Of the interval of a share."""

TIMED = 3
"""Networks that are trained for a few steps."""

STEPS = 6
"""Steps of training timed in each phase; the first of them warms up."""

VALIDATED = 2
"""Batches of validation timed."""

SAMPLING, TRAINING = 0.6, 0.85
"""Shares of the time after which no further network is sampled, and none further trained."""


@dataclass(frozen=True)
class Spread:
    """Least, median and greatest of a metric over the sampled networks."""

    least: float
    median: float
    greatest: float


@dataclass(frozen=True)
class Share:
    """How many of the sampled networks keep a limit.

    Attributes:
        limit: In words.
        met: Networks that keep it; None where it is known only after training.
        of: Networks that were measured.
        low: Lower end of the 95 % interval of the share in the whole space (Clopper and Pearson); the share itself
            where the whole space was measured.
        high: Upper end.
    """

    limit: str
    met: int | None
    of: int
    low: float = 0.0
    high: float = 1.0

    @property
    def share(self) -> float | None:
        """Of the networks measured, in [0, 1]; None where it is not known."""
        return None if self.met is None or not self.of else self.met / self.of


@dataclass(frozen=True)
class TrialTime:
    """Seconds that one trial takes, as a mean over the networks timed. None is unknown.

    Attributes:
        build: Building the network.
        measure: All that is measured before training.
        train: Training in full: every epoch of the recipe.
        validate: Validation after each epoch, together.
        steps: Optimisation steps of a full training.
        epochs: Epochs of a full training.
        timed: Networks that were trained for a few steps.
    """

    build: float | None
    measure: float | None
    train: float | None
    validate: float | None
    steps: float | None
    epochs: int | None
    timed: int


@dataclass(frozen=True)
class ExploreTime:
    """What training the strategy's supernet takes.

    Attributes:
        step: Seconds of one optimisation step; None where none could be timed.
        steps: Steps timed.
        epoch: Seconds of its first epoch; None where the time did not suffice for one.
        reason: Why nothing is known; else "".
    """

    step: float | None
    steps: int
    epoch: float | None
    reason: str = ""


@dataclass(frozen=True)
class Disk:
    """Bytes that a trial leaves, as a mean over the networks sampled. None is unknown.

    Attributes:
        weights: Its weights (safetensors); kept for the front, or for all trials where the study says so.
        checkpoint: What a running trial saves now and then, and a trial that may go on keeps.
        record: Its lines in the journal, and the single readings of its measurements.
    """

    weights: float | None
    checkpoint: float | None
    record: float | None


@dataclass(frozen=True)
class Preflight:
    """What is known before the first trial. ``print`` shows it as tables.

    Attributes:
        space: The space's name.
        size: Its architectures (an upper bound where it refuses some).
        seed: Of the sample.
        sampled: Networks that were tried.
        measured: Networks that were built and measured.
        whole: Whether these are the whole space.
        seconds: How long the pre-flight took.
        out_of_time: Whether it sampled fewer than asked because its time was over.
        failed: Networks that could not be built or measured.
        reason: Why the first of them could not.
        costs: Spread of each metric that is known without training.
        limits: For each constraint, how many keep it.
        all_limits: How many keep all that are known without training; None without such.
        trial: Seconds of a trial.
        explore: Seconds of the supernet; None where the strategy's first proposal is an architecture.
        first_budget: The share of a full training that the strategy's first proposal gets; None where that is unknown.
        trials: Trials that the search is to have; None where it was not said.
        workers: Trials at a time.
        search_seconds: Least and greatest expected wall-clock of the search; None where it is unknown.
        disk: Bytes of a trial.
        search_bytes: Least and greatest expected bytes in the folder; None where unknown.
        notes: What is and what is not included.
    """

    space: str
    size: int
    seed: int
    sampled: int
    measured: int
    whole: bool
    seconds: float
    out_of_time: bool
    failed: int
    reason: str
    costs: Mapping[str, Spread]
    limits: Sequence[Share]
    all_limits: Share | None
    trial: TrialTime
    explore: ExploreTime | None
    first_budget: float | None
    trials: int | None
    workers: int
    search_seconds: tuple[float, float] | None
    disk: Disk
    search_bytes: tuple[float, float] | None
    notes: Sequence[str] = field(default=())

    @property
    def can_be_met(self) -> bool:
        """Whether at least one sampled network keeps all limits that are known without training."""
        return self.measured > 0 and (self.all_limits is None or bool(self.all_limits.met))

    def to_json(self, indent: int | None = 2) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (self._head(), self._costs(), self._limits(), self._times(), self._notes())))

    def _head(self) -> str:
        what = "all of them" if self.whole else f"{self.sampled} sampled (seed {self.seed})"
        lines = [
            f"{self.space}: {_many(self.size)} architectures, {what}; {self.measured} built and measured in "
            f"{duration(self.seconds)}."
        ]
        if self.out_of_time:
            lines.append("The time was over before all were sampled: give it more seconds, or ask for fewer samples.")
        if self.failed:
            lines.append(f"{self.failed} failed, the first: {self.reason}")
        return "\n".join(_wrapped(line) for line in lines)

    def _costs(self) -> str:
        if not self.costs:
            return ""
        rows = [
            [name, quantity(name, spread.least), quantity(name, spread.median), quantity(name, spread.greatest)]
            for name, spread in self.costs.items()
        ]
        return _table(("cost", "least", "median", "greatest"), rows)

    def _limits(self) -> str:
        if not self.limits:
            return "No limits."
        shown = list(self.limits)
        if self.all_limits is not None and len([share for share in shown if share.met is not None]) > 1:
            shown.append(self.all_limits)
        rows = []
        for share in shown:
            if share.share is None:
                said = "known only after training" if share.met is None else "nothing was measured"
                rows.append([share.limit, said, ""])
            else:
                interval = "whole space" if self.whole else f"{_percent(share.low)} to {_percent(share.high)}"
                rows.append([share.limit, f"{_percent(share.share)} of samples ({share.met} of {share.of})", interval])
        return _table(("limit", "kept by", "95% interval"), rows)

    def _times(self) -> str:
        trial, disk = self.trial, self.disk
        rows = [["building", _seconds(trial.build), ""], ["measuring", _seconds(trial.measure), ""]]
        steps = f"epochs: {trial.epochs}, steps: {_many(round(trial.steps))}" if trial.steps else ""
        rows += [["training in full", _seconds(trial.train), steps], ["validation", _seconds(trial.validate), ""]]
        rows += [["weights", _bytes(disk.weights), ""], ["checkpoint", _bytes(disk.checkpoint), ""]]
        rows += [["journal and readings", _bytes(disk.record), ""]]
        text = _table(("one trial", "mean", ""), rows)
        if self.explore is not None:
            explore = self.explore
            if explore.step is None:
                text += "\n\n" + _wrapped(f"The supernet's training is unknown: {explore.reason.rstrip('.')}.")
            else:
                text += f"\n\nOne step of the supernet: {duration(explore.step)} ({explore.steps} timed)."
                if explore.epoch is not None:
                    text += f" Its first epoch: {duration(explore.epoch)}."
        if self.trials is not None:
            many = f"{self.trials} trials" + (f", {self.workers} at a time" if self.workers > 1 else "")
            text += f"\n\nThe search ({many}): " + (
                f"{_range(self.search_seconds, duration)} expected" if self.search_seconds else "time unknown"
            )
            text += f"; {_range(self.search_bytes, _bytes)} on disk." if self.search_bytes else "; disk unknown."
        return text

    def _notes(self) -> str:
        return "\n".join(_wrapped(f"- {note}", "  ") for note in self.notes)


def preflight(
    worker: Worker,
    strategy: Strategy,
    objectives: Sequence[Objective],
    *,
    samples: int,
    seconds: float,
    seed: int,
    keep_weights: Literal["front", "all"],
    trials: int | None,
    workers: int,
    notes: Sequence[str] = (),
) -> Preflight:
    """Sample, measure, time. Global generators are left as they were.

    Args:
        worker: Builds, measures and trains as in a trial; its constraints are the limits.
        strategy: Asked for its first proposal.
        objectives: Of the study.
        samples: Networks to sample.
        seconds: Time for all of it; a step under way is finished.
        seed: Of the sample.
        keep_weights: Whose weights the study keeps.
        trials: Of the search; None gives no total.
        workers: Trials at a time; 0 and 1 are one.
        notes: Said first.
    """
    begin = time.monotonic()
    space, task = worker.space, worker.task
    builds = task.function is None or bool(worker.meters)
    sample = _sample(worker, samples if builds else 0, seed, lambda: time.monotonic() - begin < SAMPLING * seconds)
    said = [*notes]
    timed: list[_Training] = []
    if task.function is not None:
        said.append(
            f"The task {task.name} is a function: there are no training steps to time, and its metrics and its time "
            "are known only by calling it."
        )
    else:
        until = begin + TRAINING * seconds
        for one in sample.good[:TIMED]:
            if timed and time.monotonic() > until:
                break
            try:
                timed.append(_timed(worker, one, seed, until))
            except Exception as error:
                said.append(f"A network could not be trained: {type(error).__name__}: {_first_line(error)}")
    said += _doubts(sample.good)
    history = History(space, objectives, worker.constraints)
    first, explore = _first(strategy, history, worker, seed, begin + seconds)
    trial, time_notes = _trial_time(sample, timed, task)
    said += time_notes
    known = {name for one in sample.good for name in one.metrics}
    limits = [_share(str(limit), [limit], sample, known) for limit in worker.constraints]
    cheap = [limit for limit in worker.constraints if limit.metric in known]
    together = _share("all of these together", cheap, sample, known) if cheap else None
    disk = Disk(
        _mean([one.weights_bytes for one in sample.good]) if task.function is None else 0.0,
        _mean([one.checkpoint_bytes for one in timed]) if task.function is None else 0.0,
        _record_bytes(worker, objectives, sample, timed, seed),
    )
    budget = first.budget if isinstance(first, Evaluate) else None
    wall, wall_notes = _wall(trial, together, budget, explore, trials, workers, worker)
    space_notes: list[str] = []
    room = _room(disk, budget, explore, trials, workers, keep_weights, space_notes, task)
    return Preflight(
        space=space.name,
        size=space.size(),
        seed=seed,
        sampled=sample.tried,
        measured=len(sample.good),
        whole=sample.whole and not sample.out_of_time,
        seconds=time.monotonic() - begin,
        out_of_time=sample.out_of_time,
        failed=sample.tried - len(sample.good),
        reason=sample.reason,
        costs={name: spread for name in _ordered(sample.good) if (spread := _spread(sample.good, name)) is not None},
        limits=limits,
        all_limits=together,
        trial=trial,
        explore=explore,
        first_budget=budget,
        trials=trials,
        workers=workers,
        search_seconds=wall,
        disk=disk,
        search_bytes=room,
        notes=[*said, *wall_notes, *space_notes],
    )


# Sampling and measuring.


@dataclass
class _One:
    """A network that was built and measured."""

    architecture: Architecture
    metrics: Mapping[str, float]
    samples: Mapping[str, Sequence[float]]
    facts: Mapping[str, Any]
    build_seconds: float
    weights_bytes: float


@dataclass
class _Sample:
    good: list[_One] = field(default_factory=list)
    tried: int = 0
    reason: str = ""
    out_of_time: bool = False
    whole: bool = False


def _sample(worker: Worker, samples: int, seed: int, in_time: Callable[[], bool]) -> _Sample:
    rng = np.random.default_rng(seed)
    found = _Sample()
    if not samples:
        return found
    found.whole = worker.space.size() <= samples
    if found.whole:
        every = list(worker.space.enumerate())
        drawn: Iterator[Architecture] = (every[index] for index in rng.permutation(len(every)))
    else:
        drawn = (worker.space.sample(rng) for _ in range(samples))
    example = place(worker.task.example(), torch.device(worker.device))
    for architecture in drawn:
        if found.tried and not in_time():
            found.out_of_time = True
            break
        found.tried += 1
        try:
            found.good.append(_measured(worker, architecture, example, seed))
        except Exception as error:
            found.reason = found.reason or f"{type(error).__name__}: {_first_line(error)}"
    return found


def _measured(worker: Worker, architecture: Architecture, example: Tensor, seed: int) -> _One:
    with worker.prepared(seed):
        begin = time.monotonic()
        model = worker.settle(worker.space.build(architecture), example)
        built = time.monotonic() - begin
        found = worker.costs(model, example, architecture)
        return _One(architecture, found.values, found.samples, found.facts, built, _weights_bytes(model))


def _weights_bytes(model: nn.Module) -> float:
    """The length of the file that a trial's weights are kept in."""
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    return float(len(save(state)))


def _ordered(good: Sequence[_One]) -> list[str]:
    """Metrics of the samples without those that describe a measurement."""
    names = dict.fromkeys(name for one in good for name in one.metrics)
    aside = ("_mad", "_p95", "_samples", "_block_sd", "_suspect")
    return [name for name in names if not name.endswith(aside) and name != "measure_seconds"]


def _doubts(good: Sequence[_One]) -> list[str]:
    """Measurements that say of themselves that the machine was disturbed."""
    counts: dict[str, int] = {}
    for one in good:
        for name, value in one.metrics.items():
            if name.endswith("_suspect") and value > 0:
                counts[name.removesuffix("_suspect")] = counts.get(name.removesuffix("_suspect"), 0) + 1
    return [
        f"{name}: {count} of {len(good)} measurements were disturbed by other work on the machine."
        for name, count in counts.items()
    ]


def _spread(good: Sequence[_One], name: str) -> Spread | None:
    values = [one.metrics[name] for one in good if name in one.metrics]
    return Spread(min(values), statistics.median(values), max(values)) if values else None


def _share(text: str, limits: Sequence[Constraint], sample: _Sample, known: set[str]) -> Share:
    """How many samples keep all of these limits. One that lacks the metric does not keep a limit on it."""
    if any(limit.metric not in known for limit in limits):
        return Share(text, None if sample.good else 0, len(sample.good))
    of = len(sample.good)
    met = sum(
        all(limit.metric in one.metrics and limit.violation(one.metrics) == 0 for limit in limits)
        for one in sample.good
    )
    if sample.whole and not sample.out_of_time:
        return Share(text, met, of, met / of, met / of)
    return Share(text, met, of, *interval(met, of))


def interval(met: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Clopper and Pearson (1934): exact, and rather too wide than too narrow.

    Args:
        met: Successes.
        of: Trials, at least 1.
    """
    found = binomtest(met, of).proportion_ci(confidence_level=LEVEL, method="exact")
    return float(found.low), float(found.high)


# Timing the training.


@dataclass
class _Training:
    """What a few steps of a real training took."""

    train_seconds: float | None
    validate_seconds: float | None
    steps: float | None
    epochs: int
    checkpoint_bytes: float
    metrics: Mapping[str, float]


class _Head(Source):
    """The first batches of a source, with the time that each took: its loading and what was done with it."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source, self._limit = source, limit
        self.passes: list[list[float]] = []
        self.ended = False

    def batches(self, size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        marks = [time.perf_counter()]
        self.passes.append([])
        for index, batch in enumerate(self._source.batches(size, shuffle)):
            if index == self._limit:
                return
            yield batch
            marks.append(time.perf_counter())
            self.passes[-1].append(marks[-1] - marks[-2])
        self.ended = True

    def split(self, share: float, seed: int) -> tuple[Source, Source]:
        return self._source.split(share, seed)

    def count(self, size: int) -> int | None:
        """Batches of a whole pass; None where the source does not tell."""
        held: Any = self._source.loader if isinstance(self._source, LoaderSource) else self._source
        if not isinstance(held, Sized):
            return len(self.passes[-1]) if self.ended and self.passes else None
        return len(held) if isinstance(self._source, LoaderSource) else math.ceil(len(held) / size)


@dataclass(frozen=True)
class _HeadData:
    splits: Splits

    def load(self) -> Splits:
        return self.splits

    def describe(self) -> str:
        return "the first batches"


def _timed(worker: Worker, one: _One, seed: int, until: float) -> _Training:
    """Train one network for a few steps in each phase of its recipe."""
    task = worker.task
    recipe = replace(task.recipe, **worker.space.recipe(one.architecture))
    splits = task.load()
    train, validation = _Head(splits.train, STEPS), _Head(splits.validation, VALIDATED)
    short = _shortest(recipe)
    few = replace(task, recipe=short, data=_HeadData(Splits(train, validation)))
    device = torch.device(worker.device)
    with worker.prepared(seed):
        model = worker.settle(worker.space.build(one.architecture), place(task.example(), device))
        training = Training(model, few, device, seed, worker.bench.training)
        metrics: Mapping[str, float] = {}
        checkpoint = 0.0
        try:
            for report in training.epochs(short.epochs):
                metrics = report.metrics
                checkpoint = max(checkpoint, _checkpoint_bytes(training))
                if time.monotonic() > until:
                    break
        except NonFiniteError:  # a few steps at a high rate; the time is that of a training all the same
            checkpoint = checkpoint or _checkpoint_bytes(training)
    size = recipe.batch_size
    batches, validations = train.count(size), validation.count(EVALUATION_BATCH)
    steps = None if batches is None else float(batches * recipe.epochs)
    in_validation = [took for marks in validation.passes for took in (marks[1:] or marks)]
    return _Training(
        None if batches is None else _of_phases(train, short, recipe) * batches,
        None if validations is None or not in_validation
        else statistics.median(in_validation) * validations * recipe.epochs,
        steps,
        recipe.epochs,
        checkpoint,
        metrics,
    )  # fmt: skip


def _of_phases(train: _Head, short: Recipe, recipe: Recipe) -> float:
    """Seconds of one step in each epoch of the recipe, summed over its epochs."""
    times: dict[int, list[float]] = {}
    for epoch, marks in enumerate(train.passes):
        phase = next(index for index, span in enumerate(short.spans) if span.begin <= epoch < span.end)
        times.setdefault(phase, []).extend(marks[1:] or marks)
    means = {phase: statistics.median(took) for phase, took in times.items() if took}
    if not means:
        raise InvalidInputError("the training data gave no batch")
    # A phase that was not reached in time is taken to be like the last one that was.
    return sum((span.end - span.begin) * means.get(index, means[max(means)]) for index, span in enumerate(recipe.spans))


def _shortest(recipe: Recipe) -> Recipe:
    """The recipe with the fewest epochs in which each phase has one."""
    for epochs in range(1, recipe.epochs):
        try:
            spans(recipe.phases, epochs)  # type: ignore[arg-type]
        except InvalidInputError:
            continue
        return replace(recipe, epochs=epochs)
    return recipe


def _checkpoint_bytes(training: Training) -> float:
    file = io.BytesIO()
    torch.save(training.state(), file)
    return float(len(file.getvalue()))


# The strategy.


class _Enough(Exception):  # noqa: N818
    """Ends an exploration that was only begun to time its steps."""


class _Clocked:
    """What an explorer gets: it times the steps, keeps nothing, and ends the exploration."""

    def __init__(self, worker: Worker, seed: int, until: float) -> None:
        self.device, self.seed = torch.device(worker.device), seed
        self._bench, self._until = worker.bench, until
        self.marks: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        # From step to step, so that loading the data is in it.
        self.marks.append(time.monotonic())
        if len(self.marks) > STEPS and time.monotonic() > self._until:
            raise _Enough
        with self._bench.training():
            yield

    def save(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def load(self) -> None:
        """There is nothing to go on from."""
        return None


def _first(
    strategy: Strategy, history: History, worker: Worker, seed: int, until: float
) -> tuple[Evaluate | Explore | None, ExploreTime | None]:
    """The strategy's first proposal, and what its supernet takes where it trains one."""
    try:
        with worker.prepared(seed):
            proposal = strategy.propose(history, np.random.default_rng([seed, 0]))
    except Exception as error:
        return None, ExploreTime(None, 0, None, f"the strategy raises {type(error).__name__}: {_first_line(error)}")
    if not isinstance(proposal, Explore):
        return proposal, None
    clock = _Clocked(worker, seed, until)
    epoch = None
    begin = time.monotonic()
    try:
        with worker.prepared(seed):
            steps = proposal.explorer.explore(worker.space, worker.task, np.random.default_rng(seed), clock)
            next(steps)
            epoch = time.monotonic() - begin
            steps.close()
    except (_Enough, StopIteration):
        pass
    except Exception as error:
        return proposal, ExploreTime(None, 0, None, f"{type(error).__name__}: {_first_line(error)}")
    took = np.diff(clock.marks)[1:]  # the first step warms up
    if not len(took):
        return proposal, ExploreTime(None, 0, epoch, "it made no two steps")
    return proposal, ExploreTime(float(np.median(took)), len(took), epoch)


# Totals.


def _trial_time(sample: _Sample, timed: Sequence[_Training], task: Task) -> tuple[TrialTime, list[str]]:
    notes = []
    trains = [one.train_seconds for one in timed if one.train_seconds is not None]
    checks = [one.validate_seconds for one in timed if one.validate_seconds is not None]
    if timed and not trains:
        notes.append("The training data does not tell its length, so how many steps an epoch has is unknown.")
    if trains and len(trains) < len(sample.good):
        notes.append(
            f"Training: a few steps of each phase were timed, of {len(trains)} "
            f"network{'s' if len(trains) > 1 else ''}: {duration(min(trains))} to {duration(max(trains))} in full."
        )
    steps = [one.steps for one in timed if one.steps is not None]
    time_of_one = TrialTime(
        _mean([one.build_seconds for one in sample.good]),
        _mean([one.metrics["measure_seconds"] for one in sample.good]),
        _mean(trains),
        _mean(checks),
        _mean(steps),
        round(statistics.mean(one.epochs for one in timed)) if timed else None,
        len(timed),
    )
    return time_of_one, notes


def _wall(
    trial: TrialTime,
    together: Share | None,
    budget: float | None,
    explore: ExploreTime | None,
    trials: int | None,
    workers: int,
    worker: Worker,
) -> tuple[tuple[float, float] | None, list[str]]:
    """Least and greatest wall-clock of the search, and what it is made of."""
    notes = []
    if later := [meter for meter in worker.meters if meter.trained]:
        notes.append(f"Not included: measuring the trained networks ({', '.join(map(repr, later))}).")
    if trials is None or trial.train is None or trial.validate is None:
        return None, notes
    if explore is not None:
        notes.append(
            "The search's time is unknown: how long the supernet is trained is the explorer's own, and it is all or "
            f"most of the search. Training {trials} architectures in full would take "
            f"{duration(trials * (trial.train + trial.validate) / max(1, workers))} besides."
        )
        return None, notes
    assert trial.build is not None and trial.measure is not None
    proposals = 1.0
    if together is not None and together.share is not None:
        if not together.met:
            notes.append("The search's time is unknown: no sampled network keeps the limits, so none would be trained.")
            return None, notes
        proposals = min(1 / together.share, 10.0 + 100 / max(1, trials))
        if proposals > 1:
            notes.append(
                f"Counted in: for each trial that is trained, {proposals - 1:.2g} candidates that are measured and "
                "break a limit, as among the samples."
            )
    at_once = max(1, workers)
    full = trial.train + trial.validate
    alone = proposals * trial.measure  # one measurement at a time on a machine
    together_s = proposals * trial.build
    least, most = full, full
    if budget is not None and budget < 1 and trial.epochs:
        least = full * (max(1, round(budget * trial.epochs)) / trial.epochs if budget > 0 else 0.0)
        notes.append(
            f"The strategy begins with {_percent(budget)} of a full training: the least time is with all trials so, "
            "the greatest with all in full."
        )
    if at_once > 1:
        notes.append(
            f"{workers} trials at a time are taken not to slow each other; this machine has {os.cpu_count()} "
            "processors. Measuring is one at a time."
        )
    notes.append("Not included: starting up, writing files, and the strategy's own computing.")
    low, high = (trials * ((part + together_s) / at_once + alone) for part in (least, most))
    return (low, high), notes


def _room(
    disk: Disk,
    budget: float | None,
    explore: ExploreTime | None,
    trials: int | None,
    workers: int,
    keep: str,
    notes: list[str],
    task: Task,
) -> tuple[float, float] | None:
    """Least and greatest bytes in the study's folder at its end."""
    if trials is None or disk.record is None or disk.weights is None or disk.checkpoint is None:
        return None
    record = trials * disk.record
    notes.append("Disk: an MLflow record beside the folder is not included; it takes more than the journal.")
    if task.function is not None:
        return record, record
    notes.append(
        "Disk: the weights of all trials are kept."
        if keep == "all"
        else "Disk: weights are kept for the front, which has at least one trial and at most all."
    )
    if explore is not None:
        notes.append("Disk: the weights and the checkpoint of the supernet are not included.")
    low = record + disk.weights * (trials if keep == "all" else min(1, trials))
    # Checkpoints of the trials that run; of all, where trials may go on.
    going_on = trials if budget is not None and budget < 1 else min(max(1, workers), trials)
    return low, record + disk.weights * trials + disk.checkpoint * going_on


def _record_bytes(
    worker: Worker, objectives: Sequence[Objective], sample: _Sample, timed: Sequence[_Training], seed: int
) -> float | None:
    """Bytes of a trial's lines in the journal and of its readings: those of a sampled network, written to nowhere."""
    if not sample.good:
        return None
    sizes = []
    trained = timed[0].metrics if timed else {}
    epochs = timed[0].epochs if timed else 0
    for one in sample.good:
        lines: list[int] = []
        search = Search(
            _Nobody(),
            History(worker.space, objectives, worker.constraints),
            seed,
            record=lambda event, lines=lines: lines.append(len(json.dumps(event, separators=(",", ":"))) + 1),  # type: ignore[misc]
        )
        search.begin(Limits(max_trials=1))
        search.enqueue(one.architecture)
        lines.clear()
        if search.next(ask=False) is None:
            return None
        for epoch in range(epochs):
            search.report(0, Report(epoch + 1, trained))
        search.finish(0, Outcome("complete", {**one.metrics, **trained}, facts=one.facts))
        readings = len(json.dumps({name: list(values) for name, values in one.samples.items()})) if one.samples else 0
        sizes.append(float(sum(lines) + readings))
    return _mean(sizes)


class _Nobody:
    """A strategy that is never asked."""

    def propose(self, history: History, rng: np.random.Generator) -> None:
        return None


# Text.


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _many(count: int) -> str:
    return f"{count:,}" if count < 10**9 else f"{count:.2e}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share in (0, 1) or 0.01 <= share <= 0.99 else f"{100 * share:.1f}%"


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else duration(value)


def _bytes(value: float | None) -> str:
    return "unknown" if value is None else quantity("size_bytes", value)


def _range(pair: tuple[float, float], write: Callable[[float], str]) -> str:
    low, high = map(write, pair)
    return low if low == high else f"{low} to {high}"
