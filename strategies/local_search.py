"""Local search: White, Nolen, Savani 2020, arXiv:2005.02960; with several objectives, Pareto local search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.objectives import constrained_dominates
from nasplat.strategy import Evaluate, History, Trial

WALK = "walk"
"""The note with the number of a trial's walk, counted from 0."""

CENTRE = "centre"
"""The note with the number of the trial that it is a neighbour of; the random draws of a walk's start have none."""


@dataclass(frozen=True)
class LocalSearch:
    """Hill climbing by one mutation at a time, with restarts: beside random search, the baseline to beat.

    A walk begins with a few random architectures and goes on from the best: its neighbours are evaluated in random
    order, and a better one becomes the new centre. Where no neighbour is better, the walk ends and the next begins. A
    neighbour that an earlier walk evaluated is not evaluated again; its result counts.

    Better means better by any amount: an equal neighbour is no improvement, so a plateau ends a walk. A feasible trial
    is better than one that breaks a limit, and a smaller violation than a larger one, so a walk climbs to the limits
    first. With several objectives a walk keeps the trials that no other dominates or equals, and evaluates the
    neighbours of each, in random order (Pareto local search: Paquete, Chiarandini, Stützle 2004).

    Failed and stopped trials are not better than anything. Architectures that the user enqueued belong to the first
    walk's start. While a walk waits for its last running trials, free workers draw the start of the next.

    Attributes:
        initial: Random architectures at the start of a walk.
        move: ``"first"`` goes on from a better neighbour as soon as it is known, as the authors' code does by default;
            ``"best"`` evaluates all neighbours of a centre before it goes on from the best.
    """

    initial: int = 10
    move: Literal["first", "best"] = "first"

    def __post_init__(self) -> None:
        if not is_whole(self.initial):
            raise InvalidInputError(f"initial is {self.initial!r}; an integer from 1 up")
        if self.move not in ("first", "best"):
            raise InvalidInputError(f"move is {self.move!r}; legal: 'first', 'best'")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """A neighbour, or a random start; None while a walk waits, and when the space is exhausted.

        Args:
            history: All trials so far.
            rng: Draws the starts, and the order of centres and neighbours.
        """
        walks: dict[int, list[Trial]] = {}
        walk = 0
        for trial in (*history.finished(), *history.running):
            notes = trial.proposal.notes
            if trial.architecture is not None:
                walks.setdefault(notes.get(WALK, 0), []).append(trial)
            if CENTRE in notes:
                walk = max(walk, notes[WALK])
        while True:
            trials = walks.get(walk, [])
            proposal = self._start(history, trials, walk, rng) or self._step(history, trials, walk, rng)
            if proposal is not None or not trials:
                return proposal
            if any(trial.state == "running" for trial in trials):
                return self._start(history, walks.get(walk + 1, []), walk + 1, rng)
            walk += 1

    def _start(self, history: History, trials: Sequence[Trial], walk: int, rng: np.random.Generator) -> Evaluate | None:
        """A random architecture, as long as the walk began with too few; those that failed are replaced."""
        starts = [trial for trial in trials if CENTRE not in trial.proposal.notes]
        if sum(trial.state not in ("failed", "stopped") for trial in starts) >= self.initial:
            return None
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture, notes={WALK: walk})

    def _step(self, history: History, trials: Sequence[Trial], walk: int, rng: np.random.Generator) -> Evaluate | None:
        """A new neighbour of a centre; None where there is none, or none yet."""
        if self.move == "best":
            last = max((trial.number for trial in trials if CENTRE in trial.proposal.notes), default=None)
            if last is not None:
                centre = history.trials[history.trials[last].proposal.notes[CENTRE]]
                new = [near for near in _neighbours(history, centre) if not history.of(near)]
                if new:
                    return _neighbour(new, centre, walk, rng)
            if any(trial.state == "running" for trial in trials):
                return None
        best = _undominated(history, trials)
        done: set[int] = set()
        while left := [trial for trial in best if trial.number not in done]:
            centre = left[int(rng.integers(len(left)))]
            near = _neighbours(history, centre)
            new = [architecture for architecture in near if not history.of(architecture)]
            if new:
                return _neighbour(new, centre, walk, rng)
            done.add(centre.number)
            # What earlier walks evaluated belongs to this neighbourhood as well.
            best = _undominated(
                history, [*best, *(trial for architecture in near for trial in history.of(architecture))]
            )
        return None


def _neighbours(history: History, centre: Trial) -> list[Architecture]:
    assert centre.architecture is not None
    return history.space.neighbours(centre.architecture)


def _neighbour(new: Sequence[Architecture], centre: Trial, walk: int, rng: np.random.Generator) -> Evaluate:
    return Evaluate(new[int(rng.integers(len(new)))], notes={WALK: walk, CENTRE: centre.number})


def _undominated(history: History, trials: Iterable[Trial]) -> list[Trial]:
    """The trials with a result that no other dominates, under the limits; of equal ones the first."""
    kept: list[tuple[tuple[float, ...], float, Trial]] = []
    for trial in trials:
        violation = history.violation(trial)
        if trial.state == "infeasible" and violation > 0:
            losses: tuple[float, ...] = ()
        elif trial.state == "complete" and _measured(history, trial.metrics):
            losses = history.losses(trial) if violation == 0 else ()
        else:
            continue
        if any(
            (losses, violation) == (a, broken) or constrained_dominates(a, losses, broken, violation)
            for a, broken, _ in kept
        ):
            continue
        kept = [item for item in kept if not constrained_dominates(losses, item[0], violation, item[1])]
        kept.append((losses, violation, trial))
    return [trial for _, _, trial in kept]


def _measured(history: History, metrics: Mapping[str, float]) -> bool:
    return all(objective.metric in metrics for objective in history.objectives)
