"""A search in a few lines, for trying strategies: no training, no folder, any number of trials in flight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from nasplat.architecture import Architecture
from nasplat.errors import CandidateError
from nasplat.space import SearchSpace
from nasplat.strategy import (
    Evaluate,
    Explore,
    Explorer,
    History,
    Proposal,
    Report,
    Strategy,
    Trial,
    proposal_to_json,
)
from nasplat.testing.landscapes import Landscape

Event: TypeAlias = tuple[str, Any, dict[str, Any]]
"""``("start", trial, {})``, ``("report", number, metrics)`` or ``("finish", number, outcome)``."""

Find = Callable[[Explorer, SearchSpace, np.random.Generator], Sequence[Architecture]]
"""Stands in for an explorer's training."""


@dataclass
class Run:
    """A driven search.

    Attributes:
        history: Its trials.
        events: What was written to the history, in order.
        asked: Per call of ``propose``: the number of events before it, the trial's number, and what it returned.
    """

    history: History
    events: list[Event] = field(default_factory=list)
    asked: list[tuple[int, int, Proposal | None]] = field(default_factory=list)

    @property
    def proposals(self) -> list[Any]:
        """What was proposed, as JSON values."""
        return [proposal_to_json(trial.proposal) for trial in self.history.trials]

    def best(self) -> float:
        """First objective of the best trial, its sign turned so that smaller is better; infinite without one."""
        best = self.history.best()
        return float("inf") if best is None else self.history.losses(best)[0]


def trial_rng(seed: int, number: int) -> np.random.Generator:
    """The generator from which trial ``number`` of a search with ``seed`` is proposed."""
    return np.random.default_rng([seed, number])


def drive(
    strategy: Strategy,
    landscape: Landscape,
    trials: int,
    *,
    seed: int = 0,
    in_flight: int = 1,
    fails: Callable[[int], bool] = lambda number: False,
    cheap: Collection[str] = (),
    find: Find = lambda explorer, space, rng: [space.sample(rng)],
    epochs: int = 0,
    run: Run | None = None,
) -> Run:
    """Search a landscape. Which running trial goes on next is drawn from the seed and how far the search is.

    Args:
        strategy: What proposes.
        landscape: What is searched.
        trials: Number of trials at which to stop proposing; those in flight still end.
        seed: Of proposals and of the order of ending.
        in_flight: Trials running at the same time.
        fails: Whether the trial of this number fails.
        cheap: Metrics known before training: a limit on one of them, broken, ends a trial as infeasible.
        find: What an exploration finds.
        epochs: Of the full training. An evaluation reports after each of its epochs what the landscape has for that
            budget, and the strategy's ``keep`` may end it there; 0 reports nothing.
        run: A run to go on with; None starts afresh.
    """
    run = run or Run(landscape.history())
    history = run.history
    keep: Callable[[Trial, History], bool] | None = getattr(strategy, "keep", None)
    while True:
        while len(history.running) < in_flight and len(history) < trials:
            number = len(history)
            proposal = strategy.propose(history, trial_rng(seed, number))
            run.asked.append((len(run.events), number, proposal))
            if proposal is None:
                break
            _apply(run, ("start", Trial(number, proposal), {}))
        running = history.running
        if not running:
            return run
        reported = [sum(len(trial.reports) for trial in history.trials)] if epochs else []
        order = np.random.default_rng([seed, len(history.finished()), 1, *reported])
        trial = running[int(order.integers(len(running)))]
        failed = fails(trial.number)
        if epochs and not failed and _report(run, trial, landscape, epochs):
            last = history.trials[trial.number]
            if keep is None or keep(last, history):
                continue
            if len(last.reports) < _epochs(trial, history, epochs)[1]:
                outcome = {"state": "stopped", "metrics": dict(last.reports[-1]), "reason": "ended by keep"}
                _apply(run, ("finish", trial.number, outcome))
                continue
        _apply(run, ("finish", trial.number, _outcome(trial, history, landscape, seed, failed, cheap, find)))


def _report(run: Run, trial: Trial, landscape: Landscape, epochs: int) -> bool:
    """Report the next epoch of an evaluation; False where it has none left."""
    first, count = _epochs(trial, run.history, epochs)
    if trial.architecture is None or len(trial.reports) == count:
        return False
    budget = (first + len(trial.reports) + 1) / epochs
    try:
        metrics = dict(landscape.metrics(trial.architecture, budget))
    except CandidateError:
        return False
    _apply(run, ("report", trial.number, metrics))
    return True


def _epochs(trial: Trial, history: History, epochs: int) -> tuple[int, int]:
    """The epoch that an evaluation goes on from, and how many it trains, as a worker counts them."""
    proposal = trial.proposal
    if isinstance(proposal, Explore):
        return 0, 0
    until = max(1, round(proposal.budget * epochs)) if proposal.budget > 0 else 0
    first = 0
    if proposal.weights_of is not None:
        source = history.trials[proposal.weights_of].proposal
        if isinstance(source, Evaluate) and source.architecture == proposal.architecture:
            first = max(1, round(source.budget * epochs)) if source.budget > 0 else 0
    return first, max(0, until - first)


def replay(landscape: Landscape, events: Sequence[Event]) -> Run:
    """A fresh run in which these events have happened."""
    run = Run(landscape.history())
    for event in events:
        _apply(run, event)
    return run


def _apply(run: Run, event: Event) -> None:
    kind, what, outcome = event
    if kind == "start":
        run.history.start(what)
    elif kind == "report":
        run.history.report(what, Report(len(run.history.trials[what].reports) + 1, outcome))
    else:
        run.history.finish(what, **outcome)
    run.events.append(event)


def _outcome(
    trial: Trial,
    history: History,
    landscape: Landscape,
    seed: int,
    failed: bool,
    cheap: Collection[str],
    find: Find,
) -> dict[str, Any]:
    if failed:
        return {"state": "failed", "reason": "as asked"}
    if isinstance(trial.proposal, Explore):
        found = find(trial.proposal.explorer, history.space, np.random.default_rng([seed, trial.number, 2]))
        return {"state": "complete", "found": tuple(found)}
    try:
        metrics = dict(landscape.metrics(trial.proposal.architecture, trial.proposal.budget))
    except CandidateError as error:
        return {"state": "failed", "reason": str(error)}
    if any(limit.metric in cheap and limit.violation(metrics) > 0 for limit in history.constraints):
        return {"state": "infeasible", "metrics": {name: metrics[name] for name in cheap}}
    return {"state": "complete", "metrics": metrics, "copy_of": _twin(trial.proposal, history)}


def _twin(proposal: Evaluate, history: History) -> int | None:
    """The trial that a search would copy instead of training again."""
    if proposal.weights_of is not None:
        return None
    for trial in history.of(proposal.architecture):
        other = trial.proposal
        if (
            trial.state == "complete"
            and isinstance(other, Evaluate)
            and (other.budget, other.weights_of) == (proposal.budget, None)
        ):
            return trial.number
    return None
