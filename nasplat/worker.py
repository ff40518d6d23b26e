"""Runs one proposal: build, measure what is cheap, train, score, measure the rest. Knows neither Ray nor MLflow.

:meth:`Worker.run` is a generator with one report an epoch and the outcome last, so that progress, early stopping and a
distributed runner all hang on the same place. A candidate's errors end its own trial, never the worker.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parameter import is_lazy

from nasplat.architecture import Architecture
from nasplat.cost.bench import Bench, leaving_owned_cores
from nasplat.cost.meter import ArchitectureMeter, BatchMeter, Measurement, Meter
from nasplat.errors import InvalidInputError, NonFiniteError, TimeLimitError
from nasplat.objectives import Constraint
from nasplat.phases import Phase
from nasplat.search import Assignment, Outcome
from nasplat.seeding import seeded
from nasplat.space import SearchSpace
from nasplat.strategy import Evaluate, Explore, Report
from nasplat.task import Task
from nasplat.train import Training, evaluate, lay_out, place
from nasplat.weight_sharing.inherited import SupernetPath, kept_supernet
from nasplat.weight_sharing.recalibrate import calibration_batches, kept_statistics, recalibrate

BATCH_SEED = 0
"""Seed of the training examples that a meter gets: the same for every candidate, whatever its seed and the study's."""

CHECKPOINT_SECONDS = 20.0
"""A running training is saved so that a kill costs about this long at most, besides the epoch under way."""

SAMPLES = "samples.json"
"""All single readings of a trial's measurements, by metric, in its folder."""


def trial_folder(study: Path, number: int) -> Path:
    """Where a trial keeps its weights."""
    return study / "trials" / f"{number:05d}"


@dataclass(frozen=True)
class Worker:
    """Runs proposals of one study.

    Attributes:
        space: Builds the networks.
        task: Judges them.
        folder: The study's; a worker writes only below ``trials/``.
        meters: Measured for each built candidate.
        constraints: Hard limits; those on cheap costs are checked before training.
        device: Where to train and measure.
        threads: Threads that torch computes with.
        time_limit_s: Seconds a trial may take, checked at each step of training; None is no limit.
        bench: Where measuring is exclusive.
    """

    space: SearchSpace
    task: Task
    folder: Path
    meters: Sequence[Meter] = ()
    constraints: Sequence[Constraint] = ()
    device: str = "cpu"
    threads: int = 1
    time_limit_s: float | None = None
    bench: Bench = field(default_factory=Bench)

    def run(self, assignment: Assignment) -> Generator[Report | Outcome, bool | None, None]:
        """Yield a :class:`Report` an epoch and an :class:`Outcome` last.

        Send False after a report to end the trial there, as ``stopped``.
        """
        clock = _Clock(self.time_limit_s, self.bench)
        with leaving_owned_cores(), _threads(self.threads), seeded(assignment.seed):
            try:
                proposal = assignment.proposal
                if isinstance(proposal, Explore):
                    yield from self._explore(assignment, proposal, clock)
                elif self.task.function is not None:
                    yield from self._call(assignment, proposal, clock)
                else:
                    yield from self._evaluate(assignment, proposal, clock)
            except (Exception, SystemExit) as error:
                (trial_folder(self.folder, assignment.number) / "checkpoint.pt").unlink(missing_ok=True)
                yield Outcome("failed", reason=_reason(error), traceback=traceback.format_exc())

    # Building and measuring.

    def build(self, proposal: Evaluate, example: torch.Tensor) -> nn.Module:
        """The network of a proposal, on the device, lazy layers made."""
        return self.settle(self.space.build(proposal.architecture), example)

    def settle(self, model: nn.Module, example: torch.Tensor) -> nn.Module:
        """A network on the device, lazy layers made, ready to be measured or trained."""
        model = model.to(self.device)
        if any(is_lazy(parameter) for parameter in model.parameters()):
            with torch.no_grad():
                model.eval()(example)
            model.train()
        return lay_out(model)

    @contextmanager
    def prepared(self, seed: int) -> Iterator[None]:
        """Around what is done outside a trial: threads and global generators as in one, and given back at the end."""
        with leaving_owned_cores(), _threads(self.threads), seeded(seed):
            yield

    def costs(self, model: nn.Module, example: torch.Tensor, architecture: Architecture | None = None) -> Measurement:
        """All that is known of a built network without training, limits or no limits; ``measure_seconds`` among it.

        Args:
            model: The network.
            example: One input.
            architecture: The network's; None where it is of no space, and nothing can be predicted.
        """
        found = _Found()
        replace(self, constraints=())._measure(architecture, model, example, False, found)
        metrics = {**found.metrics, "measure_seconds": found.measure_seconds}
        return Measurement(metrics, found.samples, found.facts)

    def _measure(
        self, architecture: Architecture | None, model: nn.Module, example: torch.Tensor, trained: bool, found: _Found
    ) -> str:
        """Measure, meter by meter, until a hard limit is broken: gives the limits that are, in words."""
        for meter in self.meters:
            if meter.trained is not trained:
                continue
            begin = time.monotonic()
            if isinstance(meter, BatchMeter):
                x, y = self._batch(meter.examples, example.device)
                measurement = meter.measure_batch(model, x, y, self.task.compute_loss, self.bench)
            elif isinstance(meter, ArchitectureMeter):
                measurement = meter.measure_architecture(architecture, model, example, self.bench)
            else:
                measurement = meter.measure(model, example, self.bench)
            found.metrics.update(_finite(measurement.values))
            found.samples.update({name: list(values) for name, values in measurement.samples.items()})
            found.facts.update(measurement.facts)
            found.measure_seconds += time.monotonic() - begin
            if not trained and (broken := self._broken(found.metrics)):
                return broken
        return ""

    def _batch(self, examples: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Random training examples, the same ones each time: meters compare candidates, not batches."""
        with seeded(BATCH_SEED):  # a loader's order may be that of the global generator
            order = torch.Generator().manual_seed(BATCH_SEED)
            xs, ys = [], []
            for x, y in self.task.load().train.batches(examples, order):
                xs.append(x)
                ys.append(y)
                if sum(map(len, xs)) >= examples:
                    break
        return place(torch.cat(xs)[:examples], device), torch.cat(ys)[:examples].to(device)

    def _broken(self, metrics: Mapping[str, float]) -> str:
        """The hard limits that the metrics known so far break, in words."""
        return "; ".join(
            f"{constraint.metric} is {metrics[constraint.metric]:g}, must be {constraint}"
            for constraint in self.constraints
            if constraint.metric in metrics and constraint.violation(metrics) > 0
        )

    # The three kinds of trial.

    def _evaluate(
        self, assignment: Assignment, proposal: Evaluate, clock: _Clock
    ) -> Generator[Report | Outcome, bool | None, None]:
        found = _Found()
        device = torch.device(self.device)
        example = place(self.task.example(), device)
        model = self.build(proposal, example)
        broken = self._measure(proposal.architecture, model, example, False, found)
        if broken:
            self._save_samples(assignment.number, found)
            yield found.outcome("infeasible", broken)
            return
        if proposal.budget == 0 and proposal.weights_of is not None and assignment.source is None:
            yield self._score_path(assignment, proposal, model, example, found, clock)
            return
        task = replace(self.task, recipe=replace(self.task.recipe, **self.space.recipe(proposal.architecture)))
        epochs = 0 if proposal.budget == 0 else max(1, round(proposal.budget * task.recipe.epochs))
        training = Training(model, task, device, assignment.seed, clock.step)
        own = trial_folder(self.folder, assignment.number) / "checkpoint.pt"
        first, last, stopped, spent = self._begin_from(training, assignment, own)
        begin = saved = time.monotonic()
        for report in training.epochs(training.epoch if stopped else epochs):
            last = dict(report.metrics)
            spent += time.monotonic() - begin  # not what passes until the next epoch is asked for
            # A trial counts its own epochs, wherever its weights came from.
            if (yield Report(report.step - first, last)) is False and report.step < epochs:
                stopped = True
                break
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint({**training.state(), "first": first, "last": last, "seconds": spent}, own)
                saved = time.monotonic()
            begin = time.monotonic()
        if proposal.recalibrate:
            recalibrate(training.model, self._calibration(assignment, proposal), clock.step)
            last = {**last, **training.validate()}
        elif not last and (epochs or proposal.weights_of is not None):
            # Nothing was left to train: the weights that it began with are what is scored.
            last = training.validate()
        found.metrics.update(last)
        if epochs:
            found.metrics["train_seconds"] = spent
        model.eval()
        self._measure(proposal.architecture, model, example, True, found)
        if epochs or proposal.weights_of is not None:
            goes_on = proposal.budget < 1
            self._save(training, assignment.number, found, first, last, goes_on=goes_on, stopped=stopped)
        else:  # a network as it was made, which the seed makes again: nothing to go on from
            self._save_samples(assignment.number, found)
        yield found.outcome("stopped" if stopped else "complete", "ended early by the strategy" if stopped else "")

    def _score_path(
        self,
        assignment: Assignment,
        proposal: Evaluate,
        model: nn.Module,
        example: torch.Tensor,
        found: _Found,
        clock: _Clock,
    ) -> Outcome:
        """Score the architecture as a path of an explored supernet. Costs are those of the built network."""
        assert proposal.weights_of is not None
        device = torch.device(self.device)
        file = trial_folder(self.folder, proposal.weights_of) / "weights.safetensors"
        if not file.exists():
            raise InvalidInputError(f"trial {proposal.weights_of} kept no weights of a supernet to score a path of")
        supernet = kept_supernet(self.space, file, device)
        path = SupernetPath(supernet, self.space, proposal.architecture).eval()
        with kept_statistics(supernet):
            if proposal.recalibrate:
                recalibrate(path, self._calibration(assignment, proposal), clock.step)
            validation = self.task.load().validation
            found.metrics.update(evaluate(path, self.task, validation, "val", device, clock.step))
            if any(meter.trained for meter in self.meters):
                self.space.inherit(model, None, supernet.state_dict())
                model.eval()
                self._measure(proposal.architecture, model, example, True, found)
        self._save_samples(assignment.number, found)
        return found.outcome("complete")

    def _calibration(self, assignment: Assignment, proposal: Evaluate) -> Iterator[torch.Tensor]:
        return calibration_batches(self.task, proposal.recalibrate, assignment.seed, torch.device(self.device))

    def _begin_from(
        self, training: Training, assignment: Assignment, own: Path
    ) -> tuple[int, dict[str, float], bool, float]:
        """Load what the training goes on from: its own interrupted run, or the trial named by the proposal.

        Returns:
            The epoch that the trial began at, the metrics of the last epoch that it had reported itself, whether it had
            been told to stop there, and the seconds that it had trained.
        """
        proposal = assignment.proposal
        assert isinstance(proposal, Evaluate)
        if own.exists():
            state = load_checkpoint(own)
            training.load_state(state)
            return state["first"], state["last"], state.get("stopped", False), state.get("seconds", 0.0)
        if proposal.weights_of is None:
            return 0, {}, False, 0.0
        source = trial_folder(self.folder, proposal.weights_of)
        if assignment.source == proposal.architecture and (source / "checkpoint.pt").exists():
            training.load_state(load_checkpoint(source / "checkpoint.pt"))
        elif (source / "weights.safetensors").exists():
            # Another network's weights, or the supernet's: inherited, and trained from the first epoch.
            self.space.inherit(training.model, assignment.source, load_file(source / "weights.safetensors"))
        else:
            raise InvalidInputError(f"trial {proposal.weights_of} kept no weights to go on from")
        return training.epoch, {}, False, 0.0

    def _save(
        self,
        training: Training,
        number: int,
        found: _Found,
        first: int,
        last: Mapping[str, float],
        *,
        goes_on: bool,
        stopped: bool,
    ) -> None:
        """Keep the weights, and what a later trial, or this one after a kill, needs to go on from here."""
        folder = trial_folder(self.folder, number)
        save_weights(training.model.state_dict(), folder / "weights.safetensors", training.phase)
        if goes_on or stopped:
            seconds = found.metrics.get("train_seconds", 0.0)
            state = {**training.state(), "first": first, "last": dict(last), "stopped": stopped, "seconds": seconds}
            save_checkpoint(state, folder / "checkpoint.pt")
        else:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        self._save_samples(number, found)

    def _save_samples(self, number: int, found: _Found) -> None:
        if found.samples:
            folder = trial_folder(self.folder, number)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SAMPLES).write_text(json.dumps(found.samples))

    def _call(
        self, assignment: Assignment, proposal: Evaluate, clock: _Clock
    ) -> Generator[Report | Outcome, bool | None, None]:
        """A task that is a function: nothing is built unless a meter asks for it."""
        assert self.task.function is not None
        found = _Found()
        if self.meters:
            example = place(self.task.example(), torch.device(self.device))
            model = self.build(proposal, example)
            broken = self._measure(proposal.architecture, model, example, False, found)
            self._save_samples(assignment.number, found)
            if broken:
                yield found.outcome("infeasible", broken)
                return
        begin = time.monotonic()
        metrics = self.task.function(proposal.architecture, proposal.budget, assignment.seed)
        if not isinstance(metrics, Mapping):
            raise InvalidInputError(
                f"{self.task.name} returned {metrics!r}; a mapping of metric names to numbers is needed"
            )
        found.metrics.update(_finite(metrics))
        found.metrics.setdefault("train_seconds", time.monotonic() - begin)
        clock.check()
        yield found.outcome("complete")

    def _explore(
        self, assignment: Assignment, proposal: Explore, clock: _Clock
    ) -> Generator[Report | Outcome, bool | None, None]:
        found = _Found()
        folder = trial_folder(self.folder, assignment.number)
        context = _Context(torch.device(self.device), assignment.seed, clock, folder / "checkpoint.pt", found.metrics)
        rng = np.random.default_rng(assignment.seed)
        steps = proposal.explorer.explore(self.space, self.task, rng, context)
        go_on: bool | None = None
        # The first report of an exploration that goes on from a checkpoint may be of any epoch.
        last = None if context.checkpoint.exists() else 0
        while True:
            begin = time.monotonic()
            try:
                report = steps.send(None if go_on is None else go_on)  # type: ignore[arg-type]
            except StopIteration as end:
                architectures = tuple(end.value or ())
                break
            finally:  # kept with the metrics in each checkpoint, so that a resumed run adds to it
                found.metrics["train_seconds"] = found.metrics.get("train_seconds", 0.0) + time.monotonic() - begin
            if report.step < 1 or (last is not None and report.step > last + 1):
                raise InvalidInputError(
                    f"{proposal.explorer!r} reports step {report.step} after {last or 0}; steps count from 1, no gaps"
                )
            last = report.step
            metrics = _finite(report.metrics)
            found.metrics.update(metrics)
            go_on = (yield Report(report.step, metrics)) is not False
        if not architectures:
            raise InvalidInputError(f"{proposal.explorer!r} found no architecture")
        for architecture in architectures:
            if not self.space.owns(architecture):
                raise InvalidInputError(f"{proposal.explorer!r} found {architecture!r}, which is not of {self.space!r}")
            self.space.architecture(architecture.genes)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        yield found.outcome("complete", found=architectures)


@dataclass
class _Found:
    """What is known of a candidate so far."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    measure_seconds: float = 0.0

    def outcome(self, state: Any, reason: str = "", found: tuple[Any, ...] = ()) -> Outcome:
        if self.measure_seconds:
            self.metrics["measure_seconds"] = self.measure_seconds
        return Outcome(state, self.metrics, reason, found=found, facts=self.facts)


class _Clock:
    """The time limit, and the turn that each step takes."""

    def __init__(self, limit_s: float | None, bench: Bench) -> None:
        self._limit = limit_s
        self._begin = time.monotonic()
        self._bench = bench

    def check(self) -> None:
        spent = time.monotonic() - self._begin
        if self._limit is not None and spent > self._limit:
            raise TimeLimitError(f"past its time limit: {spent:.1f} s of {self._limit:g} s")

    @contextmanager
    def step(self) -> Iterator[None]:
        self.check()
        with self._bench.training():
            yield


@dataclass
class _Context:
    """What an explorer gets (``nasplat.strategy.Context``)."""

    device: torch.device
    seed: int
    clock: _Clock
    checkpoint: Path
    reported: dict[str, float]

    def step(self) -> Any:
        return self.clock.step()

    def save(self, state: Mapping[str, Any]) -> None:
        # With what it has reported: killed after its last epoch, it has nothing more to report.
        save_checkpoint({"state": dict(state), "reported": dict(self.reported)}, self.checkpoint)

    def keep(self, weights: Mapping[str, torch.Tensor]) -> None:
        save_weights(weights, self.checkpoint.with_name("weights.safetensors"))

    def load(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        held = load_checkpoint(self.checkpoint)
        self.reported.update(held["reported"])
        state: dict[str, Any] = held["state"]
        return state


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Replace a checkpoint in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; nothing else can be in one."""
    state = torch.load(path, weights_only=True)
    assert isinstance(state, dict)
    return state


def save_weights(state: Mapping[str, torch.Tensor], path: Path, phase: Phase | None = None) -> None:
    """Write weights as safetensors, in one step; with the phase of training that they were left in, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    # safetensors takes contiguous tensors that share no memory (tied weights do): give each its own.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(own, temporary, {"phase": json.dumps(asdict(phase))} if phase else None)
    temporary.replace(path)


def phase_of(path: Path) -> Phase | None:
    """The phase that :func:`save_weights` wrote beside the weights: what of their network is binary."""
    with safe_open(path, "pt") as file:
        held = (file.metadata() or {}).get("phase")
    return Phase(**json.loads(held)) if held else None


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"the metric {name} is {value!r}; a number is needed") from error
        if not math.isfinite(number):
            raise NonFiniteError(f"{name} is {number}")
        numbers[str(name)] = number
    return numbers


def _reason(error: Exception | SystemExit) -> str:
    """One line on a failure."""
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error):
        return f"out of memory: {first}"
    if isinstance(error, TimeLimitError | NonFiniteError):
        return first
    return f"{type(error).__name__}: {first}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
