"""What a strategy is: a pure function from the history to the next proposal.

A strategy looks at the :class:`History` and proposes the next trial. It keeps no state of its own, so resuming hands
the history back, parallel search sees the running trials in it, and nothing needs saving.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.identity import describe
from nasplat.objectives import Constraint, Objective, crowding, front, ranks
from nasplat.space import SearchSpace

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from nasplat.task import Task

State: TypeAlias = Literal["running", "complete", "infeasible", "stopped", "failed"]
"""Where a trial stands.

``complete``: built, trained and measured as proposed. ``infeasible``: a cheap cost broke a hard limit, so it was not
trained. ``stopped``: ended early by the strategy's ``keep``. ``failed``: it raised, gave NaN, or ran out of memory
or time.
"""

ENUMERABLE = 20_000
"""Spaces up to this size are listed to find what was not proposed yet."""

FINAL: tuple[State, ...] = ("complete", "infeasible", "stopped", "failed")


@dataclass(frozen=True)
class Evaluate:
    """Train this network and measure it.

    Attributes:
        architecture: What to build.
        budget: Cumulative share of the task's full training, in [0, 1]; 0 is "measure only".
        weights_of: Number of the trial whose weights (and optimiser) it goes on from; None starts afresh. At budget 0
            with the number of an ``Explore``, the path of the supernet itself is scored, and no weights are kept.
        notes: The strategy's own marks, JSON values: generation, rung, Optuna's distributions. Kept in the history.
        recalibrate: Training batches from which the statistics of batch norms are estimated anew before the network is
            scored; 0 leaves them as they are. Inherited weights need it: a supernet's statistics are of all its paths.
    """

    architecture: Architecture
    budget: float = 1.0
    weights_of: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    recalibrate: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget <= 1.0:
            raise InvalidInputError(f"budget is {self.budget}; it is a share of the full training, in [0, 1]")
        if not is_whole(self.recalibrate, 0):
            raise InvalidInputError(f"recalibrate is {self.recalibrate!r}; a number of batches from 0 on is needed")
        if self.recalibrate and self.budget == 0 and self.weights_of is None:
            raise InvalidInputError(
                f"recalibrate is {self.recalibrate}, but nothing is scored at budget 0 without weights_of; legal: 0"
            )


@dataclass(frozen=True)
class Explore:
    """Train a supernet and say what was found.

    Attributes:
        explorer: What explores, on the worker.
        notes: The strategy's own marks, JSON values.
    """

    explorer: Explorer
    notes: Mapping[str, Any] = field(default_factory=dict)


Proposal: TypeAlias = Evaluate | Explore


class Report(NamedTuple):
    """What a running trial says after an epoch.

    Attributes:
        step: The epoch, counted from 1.
        metrics: By name, the unit in the name.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """One proposal and what became of it.

    Attributes:
        number: 0, 1, 2, ... in the order of starting.
        proposal: What was asked for.
        state: Where it stands.
        metrics: Final metrics by name, the unit in the name (``latency_ms``, ``model_bytes``).
        reports: One mapping of metrics per epoch, in order.
        reason: One line on why it is not complete, else "".
        traceback: The failure's traceback, else "".
        found: The architectures that an ``Explore`` found, best first.
        copy_of: Number of the trial whose result was copied because the same architecture had been evaluated.
        facts: What describes the measurement: runtime and version, threads, CPU, samples' spread.
        started: Seconds of search time when it started.
        finished: Seconds of search time when it ended; None while running.
    """

    number: int
    proposal: Proposal
    state: State = "running"
    metrics: Mapping[str, float] = field(default_factory=dict)
    reports: tuple[Mapping[str, float], ...] = ()
    reason: str = ""
    traceback: str = ""
    found: tuple[Architecture, ...] = ()
    copy_of: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    started: float = 0.0
    finished: float | None = None

    @property
    def architecture(self) -> Architecture | None:
        """The architecture of an ``Evaluate``; None for an ``Explore``."""
        return self.proposal.architecture if isinstance(self.proposal, Evaluate) else None

    @property
    def full(self) -> bool:
        """Whether it was trained in full, from its own weights: what ``best`` and the front look at."""
        return isinstance(self.proposal, Evaluate) and self.proposal.budget >= 1.0


class History:
    """Every trial so far, in order. Read by strategies; written by the search alone.

    Attributes:
        space: The space that is searched.
        objectives: At least one; the first breaks ties and names the best.
        constraints: Hard limits.
        revision: Number of changes so far. A strategy may cache by it.
    """

    def __init__(
        self, space: SearchSpace, objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
    ) -> None:
        self.space = space
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        self.revision = 0
        self._trials: list[Trial] = []
        self._running: dict[int, None] = {}
        self._finished: list[int] = []
        self._scored: list[int] = []
        self._numbers: dict[str, list[int]] = {}

    # What strategies read.

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials, by number. Do not change it."""
        return self._trials

    def __len__(self) -> int:
        return len(self._trials)

    @property
    def running(self) -> list[Trial]:
        """Trials in flight, in the order of starting."""
        return [self._trials[number] for number in self._running]

    def finished(self, last: int | None = None) -> list[Trial]:
        """Trials that ended, whatever their state, in the order of ending; only the ``last`` ones where given."""
        return [self._trials[number] for number in _tail(self._finished, last)]

    def scored(self, last: int | None = None) -> list[Trial]:
        """Complete evaluations that have every objective, in the order of ending; only the ``last`` where given.

        Among them are those that break a limit known only after training: ask :meth:`violation`.
        """
        return [self._trials[number] for number in _tail(self._scored, last)]

    def of(self, architecture: Architecture) -> list[Trial]:
        """Trials of this architecture, by number."""
        return [self._trials[number] for number in self._numbers.get(architecture.id, ())]

    @property
    def distinct(self) -> int:
        """Number of different architectures proposed so far."""
        return len(self._numbers)

    def draw_new(self, rng: np.random.Generator) -> Architecture | None:
        """A random architecture that was not proposed before; None when there is none left.

        Spaces of up to 20,000 architectures are listed where drawing finds nothing new, so that the last one is found
        too. In a larger one, 10,000 draws in a row that had all been proposed count as exhausted.
        """
        size = self.space.size()
        if self.distinct >= size:
            return None
        for _ in range(20 if size <= ENUMERABLE else 10_000):
            architecture = self.space.sample(rng)
            if not self.of(architecture):
                return architecture
        if size > ENUMERABLE:
            return None
        left = [architecture for architecture in self.space.enumerate() if not self.of(architecture)]
        return left[int(rng.integers(len(left)))] if left else None

    def losses(self, trial: Trial) -> tuple[float, ...]:
        """The objectives with their signs turned so that smaller is better."""
        return tuple(objective.loss(trial.metrics) for objective in self.objectives)

    def violation(self, trial: Trial) -> float:
        """Sum of the relative excesses over the hard limits; 0 is feasible, infinite where a metric is missing.

        Of a trial that a cheap cost ended, the limits on what only training tells are left out: it was not trained.
        """
        total = 0.0
        for constraint in self.constraints:
            if constraint.metric in trial.metrics:
                total += constraint.violation(trial.metrics) / max(abs(constraint.bound), 1e-12)
            elif trial.state != "infeasible":
                return float("inf")
        # Refused under a limit that was since relaxed: it was not trained all the same.
        return total if total > 0.0 or trial.state != "infeasible" else float("inf")

    def standing(self, trials: Sequence[Trial]) -> list[tuple[int, float]]:
        """How good each of these trials is among them: sort by it, the best first.

        The non-dominated rank under the limits (:func:`~nasplat.objectives.ranks`: feasible beats infeasible, then the
        smaller violation), then the crowding distance within the rank with its sign turned, so that smaller is better
        in both. Trials that lack an objective and break no limit that is known (failed ones) come last.
        """
        losses: list[tuple[float, ...]] = []
        violations = []
        for trial in trials:
            violation = self.violation(trial)
            measured = all(objective.metric in trial.metrics for objective in self.objectives)
            violations.append(violation if violation > 0 or measured else float("inf"))
            losses.append(self.losses(trial) if measured else ())
        found = ranks(losses, violations)
        distances = [0.0] * len(trials)
        of_rank: dict[int, list[int]] = {}
        for index, rank in enumerate(found):
            if violations[index] == 0.0:
                of_rank.setdefault(rank, []).append(index)
        for indices in of_rank.values():
            for index, distance in zip(indices, crowding([losses[index] for index in indices]), strict=True):
                distances[index] = distance
        return [(rank, -distance) for rank, distance in zip(found, distances, strict=True)]

    def front(self) -> list[Trial]:
        """Feasible full evaluations that no other dominates, the best in the first objective first."""
        candidates = [
            trial for trial in self.scored() if trial.full and trial.copy_of is None and self.violation(trial) == 0.0
        ]
        kept = [candidates[index] for index in front([self.losses(trial) for trial in candidates])]
        return sorted(kept, key=lambda trial: (self.losses(trial), trial.number))

    def best(self) -> Trial | None:
        """The feasible full evaluation with the best first objective; None so far."""
        trials = self.front()
        return trials[0] if trials else None

    # What the search writes.

    def start(self, trial: Trial) -> None:
        """Book a trial as running. Called by the search alone."""
        if trial.number != len(self._trials):
            raise InvalidInputError(f"trial {trial.number} cannot start: the next number is {len(self._trials)}")
        self._trials.append(trial)
        self._running[trial.number] = None
        if trial.architecture is not None:
            self._numbers.setdefault(trial.architecture.id, []).append(trial.number)
        self.revision += 1

    def report(self, number: int, report: Report) -> None:
        """Book one epoch of a running trial. Called by the search alone.

        A trial that begins again after a kill reports its steps again: what it had reported from there on is dropped.
        """
        self.check_step(number, report.step)
        trial = self._trials[number]
        reports = (*trial.reports[: report.step - 1], MappingProxyType(dict(report.metrics)))
        self._trials[number] = replace(trial, reports=reports)
        self.revision += 1

    def check_step(self, number: int, step: int) -> None:
        """Raise InvalidInputError where trial ``number`` cannot report ``step`` now."""
        reported = len(self._of_running(number).reports)
        if not 1 <= step <= reported + 1:
            raise InvalidInputError(
                f"trial {number} reports step {step}; steps count from 1 without gaps, and it has reported {reported}"
            )

    def finish(self, number: int, **outcome: Any) -> Trial:
        """Book the end of a running trial. Called by the search alone."""
        trial = replace(self._of_running(number), **outcome)
        if trial.state not in FINAL:
            raise InvalidInputError(f"trial {number} cannot end as {trial.state!r}; legal: {', '.join(FINAL)}")
        self._trials[number] = trial
        del self._running[number]
        self._finished.append(number)
        if (
            trial.state == "complete"
            and isinstance(trial.proposal, Evaluate)
            and all(objective.metric in trial.metrics for objective in self.objectives)
        ):
            self._scored.append(number)
        self.revision += 1
        return trial

    def _of_running(self, number: int) -> Trial:
        if number not in self._running:
            raise InvalidInputError(f"trial {number} is not running")
        return self._trials[number]


def _tail(numbers: list[int], last: int | None) -> list[int]:
    return numbers if last is None else numbers[len(numbers) - min(last, len(numbers)) :]


@runtime_checkable
class Strategy(Protocol):
    """Proposes trials. A frozen dataclass of plain hyper-parameters.

    A strategy may also have ``keep(trial, history) -> bool``, pure as well: called after each epoch of a running
    trial, False ends that trial early.
    """

    def propose(self, history: History, rng: np.random.Generator) -> Proposal | None:
        """The next proposal.

        A pure function of its arguments: the same history and generator state give the same proposal in any process.

        Args:
            history: All trials so far, running ones included. Not to be changed.
            rng: The only source of randomness, made anew from the study's seed and the trial's number.

        Returns:
            A proposal, or None for "nothing now". The search is over when None comes while nothing runs.
        """
        ...


class Context(Protocol):
    """What a worker hands to an explorer.

    Attributes:
        device: Where to compute.
        seed: The trial's seed, in [0, 2**32).
    """

    device: torch.device
    seed: int

    def step(self) -> AbstractContextManager[None]:
        """Wraps each optimisation step: waits while a measurement runs, and raises when the time limit is past."""
        ...

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state of tensors, generators' states and plain values, replacing the last one.

        Saved after a report, it holds what the report was answered: an exploration that was told to end, and killed
        before it could, ends when it is resumed.
        """
        ...

    def keep(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep the supernet's weights, so that a later ``Evaluate(weights_of=...)`` can inherit them."""
        ...

    def load(self) -> dict[str, Any] | None:
        """The last state saved by an interrupted run of this same trial, or None."""
        ...


@runtime_checkable
class Explorer(Protocol):
    """Trains a supernet and finds architectures. A frozen dataclass; runs on the worker."""

    def explore(
        self, space: SearchSpace, task: Task, rng: np.random.Generator, context: Context
    ) -> Generator[Report, bool, Sequence[Architecture]]:
        """A generator: yields a report an epoch and returns what was found, best first, at least one.

        What ``yield`` gives back says whether to go on; at False the explorer returns what it has::

            for epoch in range(1, self.epochs + 1):
                ...
                if not (yield Report(epoch, {"train_loss": loss})):
                    break
            return [space.discretise(relaxed)]

        Args:
            space: Must have a supernet, else its ``UnsupportedError`` goes through.
            task: Its training data; validation data only for reporting.
            rng: The only source of randomness beside torch's global generators, which the worker has seeded.
            context: Device, progress, checkpoints.
        """
        ...


def proposal_to_json(proposal: Proposal) -> dict[str, Any]:
    """A proposal as JSON values. An explorer is described, not stored: a resumed search proposes it again."""
    if isinstance(proposal, Explore):
        record: dict[str, Any] = {"kind": "explore", "explorer": describe(proposal.explorer)}
    else:
        record = {
            "kind": "evaluate",
            "genes": dict(proposal.architecture.genes),
            "budget": proposal.budget,
        }
        if proposal.weights_of is not None:
            record["weights_of"] = proposal.weights_of
        if proposal.recalibrate:
            record["recalibrate"] = proposal.recalibrate
    if proposal.notes:
        record["notes"] = dict(proposal.notes)
    return record
