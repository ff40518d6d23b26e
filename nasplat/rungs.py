"""Rungs of training: what successive halving, Hyperband and asynchronous successive halving share.

A candidate is trained for a share of the full training, and only the best of a rung are trained on to the next. Each
step is a trial of its own: the history shows what was spent on whom, and a resume needs nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasplat import nested
from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError
from nasplat.strategy import Evaluate, History, Strategy, Trial

RUNG = "rung"
"""The note with the rung of a trial, counted from 0, the cheapest."""

BRACKET = "bracket"
"""The note with the bracket of a trial, counted from 0 in the order of starting."""

TRIES = 5
"""Newcomers asked for, for one that was not proposed before."""


@dataclass(frozen=True)
class Rungs:
    """How candidates climb from a short training to the full one.

    The budgets of the rungs are shares of the task's full training: 1, 1/eta, 1/eta^2, ... down to the last one that
    is not below ``min_budget``. A worker trains ``max(1, round(budget * epochs))`` epochs, and a strategy does not know
    how many epochs there are: choose ``min_budget`` at least 1/epochs, or the lowest rungs train for equally long.

    Attributes:
        min_budget: Least share of the full training, in (0, 1].
        eta: A rung keeps one in so many; the next trains so many times longer. An integer from 2 up.
        carry: Whether a promoted candidate goes on from its weights and optimiser. False trains it anew at each rung:
            for tables whose low rung is a training of its own, with its own schedule.
        newcomers: The strategy that draws candidates for the lowest rung; None draws at random. It is shown the trials
            of one budget: the highest at which there are more results than the space has choices (Falkner et al. 2018
            has TPE learn so: BOHB), else that of the newcomers. It may propose nothing but evaluations.
    """

    min_budget: float = 1 / 27
    eta: int = 3
    carry: bool = True
    newcomers: Strategy | None = None

    def __post_init__(self) -> None:
        if not is_number(self.min_budget) or not 0.0 < self.min_budget <= 1.0:
            raise InvalidInputError(f"min_budget is {self.min_budget!r}; a share of the full training, in (0, 1]")
        if not is_whole(self.eta, 2):
            raise InvalidInputError(f"eta is {self.eta!r}; an integer from 2 up")
        if not isinstance(self.carry, bool):
            raise InvalidInputError(f"carry is {self.carry!r}; True or False")
        if self.newcomers is not None:
            nested.check_inner("newcomers", self.newcomers)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Of the rungs, rising, the last one 1."""
        steps = 0
        # A whisker of tolerance, so that min_budget=1/27 has the rung 1/27 whatever the rounding.
        while self.eta ** -(steps + 1) >= self.min_budget * (1 - 1e-9):
            steps += 1
        return tuple(float(self.eta) ** -step for step in range(steps, -1, -1))

    def newcomer(
        self, history: History, rng: np.random.Generator, budget: float, notes: Mapping[str, Any]
    ) -> Evaluate | None:
        """A candidate that was not proposed before, for a lowest rung; None when there is none left.

        Args:
            history: All trials so far.
            rng: The only source of randomness.
            budget: Of the rung.
            notes: Its rung, and its bracket.
        """
        if self.newcomers is not None:
            shown = self._learns_from(history, budget)
            for _ in range(TRIES):
                proposal = nested.propose(
                    self.newcomers,
                    history,
                    rng,
                    f"budget {shown:.6g}",
                    belongs=lambda trial: isinstance(trial.proposal, Evaluate) and trial.proposal.budget == shown,
                    budget=budget,
                    notes=notes,
                )
                if proposal is None:
                    break
                if not history.of(proposal.architecture):
                    return proposal
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture, budget, notes=notes)

    def _learns_from(self, history: History, budget: float) -> float:
        """The highest budget with results enough to learn from; else that of the newcomers."""
        counts: dict[float, int] = {}
        for trial in history.scored():
            assert isinstance(trial.proposal, Evaluate)
            counts[trial.proposal.budget] = counts.get(trial.proposal.budget, 0) + 1
        enough = len(history.space.choices) + 1
        return max((share for share, count in counts.items() if count >= enough), default=budget)

    def promotion(self, trial: Trial, budget: float, notes: Mapping[str, Any]) -> Evaluate:
        """The next training of a candidate.

        Args:
            trial: Its last one.
            budget: Of the rung that it climbs to.
            notes: As in :meth:`newcomer`.
        """
        assert trial.architecture is not None
        # A copy has no weights of its own.
        source = trial.number if trial.copy_of is None else trial.copy_of
        # The newcomer's marks go with it, for the strategy that drew it.
        marks = {name: value for name, value in trial.proposal.notes.items() if name in (nested.BY, nested.NOTES)}
        return Evaluate(trial.architecture, budget, source if self.carry else None, {**marks, **notes})


def _on_rungs(history: History) -> dict[tuple[int, int], list[Trial]]:
    """The trials on each (bracket, rung), by number.

    A newcomer that a limit on a cheap cost ended was never trained: it takes nobody's place, and is left out.
    """
    found: dict[tuple[int, int], list[Trial]] = {}
    for trial in history.trials:
        notes = trial.proposal.notes
        if RUNG in notes and not (notes[RUNG] == 0 and trial.state == "infeasible"):
            found.setdefault((notes[BRACKET], notes[RUNG]), []).append(trial)
    return found


def _is_scored(history: History, trial: Trial) -> bool:
    return trial.state == "complete" and all(objective.metric in trial.metrics for objective in history.objectives)


def _best(history: History, scored: Sequence[Trial], count: int) -> list[Trial]:
    """The best ``count`` of a rung, the best first: by non-dominated rank under the limits, then crowding, then age."""
    order = sorted(zip(history.standing(scored), scored, strict=True), key=lambda pair: (pair[0], pair[1].number))
    return [trial for _, trial in order[:count]]


def next_of_brackets(
    rungs: Rungs,
    history: History,
    rng: np.random.Generator,
    plan: Sequence[tuple[int, Sequence[float]]],
    last: int | None = None,
) -> Evaluate | None:
    """The next trial of synchronous successive halving, bracket after bracket (Jamieson and Talwalkar 2016).

    The oldest bracket that has something to do comes first. One that waits for its last running trials does not keep
    workers from beginning the next.

    Args:
        rungs: How candidates climb.
        history: All trials so far.
        rng: The only source of randomness.
        plan: Of each bracket the candidates on its lowest rung and its budgets, rising; then it begins again.
        last: Number of brackets; None goes on for ever.

    Returns:
        None when nothing is to be done now, or no candidate is left.
    """
    found = _on_rungs(history)
    begun = max((bracket for bracket, _ in found), default=-1) + 1
    for bracket in range(begun + 1 if last is None else min(begun + 1, last)):
        proposal = _next_of_bracket(rungs, history, rng, bracket, *plan[bracket % len(plan)], found)
        if proposal is not None:
            return proposal
    return None


def _next_of_bracket(
    rungs: Rungs,
    history: History,
    rng: np.random.Generator,
    bracket: int,
    size: int,
    budgets: Sequence[float],
    found: Mapping[tuple[int, int], Sequence[Trial]],
) -> Evaluate | None:
    """A rung is judged when all its trials have ended; of n the best ``n // eta`` climb, at least one.

    Where no newcomer is left, the bracket does with those that it has.
    """
    trials = found.get((bracket, 0), ())
    if len(trials) < size:
        proposal = rungs.newcomer(history, rng, budgets[0], {RUNG: 0, BRACKET: bracket})
        if proposal is not None:
            return proposal
    for rung, budget in enumerate(budgets[1:], 1):
        if any(trial.state == "running" for trial in trials):
            return None
        scored = [trial for trial in trials if _is_scored(history, trial)]
        count = min(max(1, len(trials) // rungs.eta), len(scored))
        trials = found.get((bracket, rung), ())
        if len(trials) < count:
            there = {trial.architecture for trial in trials}
            climbing = next(trial for trial in _best(history, scored, count) if trial.architecture not in there)
            return rungs.promotion(climbing, budget, {RUNG: rung, BRACKET: bracket})
    return None


def next_without_waiting(rungs: Rungs, history: History, rng: np.random.Generator) -> Evaluate | None:
    """The next trial of asynchronous successive halving (Li et al. 2020, algorithm 2).

    Args:
        rungs: How candidates climb.
        history: All trials so far.
        rng: The only source of randomness.

    Returns:
        A promotion from the highest rung that has one, else a newcomer; None when there is neither.
    """
    budgets, found = rungs.budgets, _on_rungs(history)

    def climb(rung: int, count: int) -> Evaluate | None:
        """A promotion of one of the best ``count`` that ended on a rung."""
        scored = [trial for trial in found.get((0, rung), ()) if _is_scored(history, trial)]
        there = {trial.architecture for trial in found.get((0, rung + 1), ())}
        for trial in _best(history, scored, count) if count else ():
            if trial.architecture not in there:
                return rungs.promotion(trial, budgets[rung + 1], {RUNG: rung + 1, BRACKET: 0})
        return None

    for rung in range(len(budgets) - 2, -1, -1):
        ended = sum(trial.state != "running" for trial in found.get((0, rung), ()))
        proposal = climb(rung, ended // rungs.eta)
        if proposal is not None:
            return proposal
    newcomer = rungs.newcomer(history, rng, budgets[0], {RUNG: 0, BRACKET: 0})
    if newcomer is not None or history.running:
        return newcomer
    # Nobody is left to compare with: bring one to the end, so that the search has a result.
    reached = [rung for (_, rung), trials in found.items() if any(_is_scored(history, trial) for trial in trials)]
    top = max(reached, default=len(budgets))
    return climb(top, len(history)) if top < len(budgets) - 1 else None
