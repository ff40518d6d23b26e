"""A search in a few lines, for trying strategies: no training, no folder, any number of trials in flight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from nasplat.architecture import Architecture
from nasplat.errors import CandidateError
from nasplat.space import SearchSpace
from nasplat.strategy import Explore, Explorer, History, Proposal, Strategy, Trial, proposal_to_json
from nasplat.testing.landscapes import Landscape, Score

Event: TypeAlias = tuple[str, Any, dict[str, Any]]
"""``("start", trial, {})`` or ``("finish", number, outcome)``."""

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
    run: Run | None = None,
) -> Run:
    """Search a landscape. Which running trial ends next is drawn from the seed and the number of finished ones.

    Args:
        strategy: What proposes.
        landscape: What is searched.
        trials: Number of trials at which to stop proposing; those in flight still end.
        seed: Of proposals and of the order of ending.
        in_flight: Trials running at the same time.
        fails: Whether the trial of this number fails.
        cheap: Metrics known before training: a limit on one of them, broken, ends a trial as infeasible.
        find: What an exploration finds.
        run: A run to go on with; None starts afresh.
    """
    run = run or Run(landscape.history())
    history = run.history
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
        order = np.random.default_rng([seed, len(history.finished()), 1])
        trial = running[int(order.integers(len(running)))]
        _apply(run, ("finish", trial.number, _outcome(trial, history, landscape.score, seed, fails, cheap, find)))


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
    else:
        run.history.finish(what, **outcome)
    run.events.append(event)


def _outcome(
    trial: Trial,
    history: History,
    score: Score,
    seed: int,
    fails: Callable[[int], bool],
    cheap: Collection[str],
    find: Find,
) -> dict[str, Any]:
    if fails(trial.number):
        return {"state": "failed", "reason": "as asked"}
    if isinstance(trial.proposal, Explore):
        found = find(trial.proposal.explorer, history.space, np.random.default_rng([seed, trial.number, 2]))
        return {"state": "complete", "found": tuple(found)}
    try:
        metrics = dict(score(trial.proposal.architecture))
    except CandidateError as error:
        return {"state": "failed", "reason": str(error)}
    if any(limit.metric in cheap and limit.violation(metrics) > 0 for limit in history.constraints):
        return {"state": "infeasible", "metrics": {name: metrics[name] for name in cheap}}
    earlier = next((t for t in history.of(trial.proposal.architecture) if t.state == "complete"), None)
    return {"state": "complete", "metrics": metrics, "copy_of": earlier.number if earlier else None}
