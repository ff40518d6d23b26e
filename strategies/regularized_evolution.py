"""Regularised (aging) evolution: Real, Aggarwal, Huang, Le 2019, arXiv:1802.01548, algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nasplat.architecture import Architecture
from nasplat.errors import InvalidInputError
from nasplat.strategy import Evaluate, History, Trial

TRIES = 10
"""Children tried for one that was not proposed before."""


@dataclass(frozen=True)
class RegularizedEvolution:
    """Mutates the winner of a tournament among the latest trials: an architecture dies of age, not of being worse.

    With several objectives the winner is drawn among the non-dominated of the tournament. A feasible trial beats one
    that breaks a limit, and a smaller violation a larger one. Failed and stopped trials are in no tournament; trials
    that a cheap limit ended are, as long as nothing has been scored.

    Two things are not as in the paper: a child that was proposed before is not proposed again, and a free worker does
    not wait until all of the first population have ended.

    Attributes:
        population: Number of random architectures to start with, and of latest trials that the tournament draws from.
        sample: Size of the tournament, drawn with replacement.
        crossover: Probability, in [0, 1], that a child takes its genes from two winners before it mutates. 0 in the
            paper.
    """

    population: int = 20
    sample: int = 5
    crossover: float = 0.0

    def __post_init__(self) -> None:
        if self.population < 1 or self.sample < 1:
            raise InvalidInputError(f"population is {self.population}, sample {self.sample}; both at least 1")
        if not 0.0 <= self.crossover <= 1.0:
            raise InvalidInputError(f"crossover is {self.crossover}; a probability, in [0, 1]")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """A mutant of a recent winner; a random architecture while the population fills; None on exhaustion.

        The cost does not grow with the history: only the last ``population`` trials are looked at.

        Args:
            history: All trials so far.
            rng: The only source of randomness.
        """
        parents: list[Trial] = []
        if len(history) >= self.population:
            parents = history.scored(last=self.population)
            # Nothing feasible was found: climb towards the limits, by the costs that are known.
            parents = parents or [t for t in history.finished(last=self.population) if t.state == "infeasible"]
        for _ in range(TRIES if parents else 0):
            proposal = self._child(history, parents, rng)
            if not history.of(proposal.architecture):
                return proposal
        # No population yet, or every neighbour seems known: repeating one would teach nothing.
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture)

    def _child(self, history: History, trials: Sequence[Trial], rng: np.random.Generator) -> Evaluate:
        space = history.space
        parent = self._winner(history, trials, rng)
        parents = [parent.number]
        genes = _architecture(parent)
        if self.crossover > 0 and rng.random() < self.crossover:
            other = self._winner(history, trials, rng)
            parents.append(other.number)
            genes = space.crossover(genes, _architecture(other), rng)
        try:
            child = space.mutate(genes, rng)
        except InvalidInputError:  # is_valid left this one without a neighbour
            child = space.sample(rng)
        return Evaluate(child, notes={"parents": parents})

    def _winner(self, history: History, trials: Sequence[Trial], rng: np.random.Generator) -> Trial:
        drawn = [trials[int(index)] for index in rng.integers(len(trials), size=self.sample)]
        best = [trial for trial, (rank, _) in zip(drawn, history.standing(drawn), strict=True) if rank == 0]
        return best[int(rng.integers(len(best)))]


def _architecture(trial: Trial) -> Architecture:
    assert trial.architecture is not None
    return trial.architecture
