"""NSGA-II: Deb, Pratap, Agarwal, Meyarivan 2002, IEEE Transactions on Evolutionary Computation 6(2)."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError
from nasplat.strategy import Evaluate, History, Trial

TRIES = 10
"""Children tried for one that was not proposed before."""


@dataclass(frozen=True)
class Nsga2:
    """Elitist evolution towards the whole front: non-dominated sort, crowding distance, binary tournaments.

    The parents of a generation are the best ``population`` of its predecessor's parents and children together: by
    non-dominated rank, within a rank by crowding distance. Two parents are chosen, each the better of two drawn from
    them by the same order; their child takes its genes from both and then mutates in one choice. A feasible trial is
    better than one that breaks a limit, and a smaller violation than a larger one. With one objective this is
    evolution that keeps the best.

    A generation is the next ``population`` trials to end with a result, whichever parents they have, so no worker
    waits for a generation's last trial, and with one worker it is the published algorithm. Failed and stopped trials
    are in no generation; trials that a cheap limit refused are. Children that were proposed before are not proposed
    again, as the paper's would be. A search needs several generations before it is ahead of random search.

    Attributes:
        population: Number of parents, and of children in a generation.
        crossover: Probability, in [0, 1], that a child takes its genes from two parents; 0.9 in the paper.
        mutation: Probability, in [0, 1], that a child mutates in one choice. The paper changes each of n variables
            with probability 1/n.
    """

    population: int = 20
    crossover: float = 0.9
    mutation: float = 1.0

    def __post_init__(self) -> None:
        if not is_whole(self.population, 2):
            raise InvalidInputError(f"population is {self.population!r}; an integer from 2 up")
        for name in ("crossover", "mutation"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 <= value <= 1.0:
                raise InvalidInputError(f"{name} is {value!r}; a probability, in [0, 1]")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """A child of the last complete generation; a random architecture in the first; None on exhaustion.

        Args:
            history: All trials so far.
            rng: The only source of randomness.
        """
        generation, parents = self._parents(history)
        for _ in range(TRIES if parents else 0):
            child, numbers = self._child(history, parents, rng)
            if not history.of(child):
                return Evaluate(child, notes={"generation": generation, "parents": numbers})
        # The first generation, or every child seems known: repeating one would teach nothing.
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture, notes={"generation": generation})

    def _parents(self, history: History) -> tuple[int, list[tuple[tuple[int, float], Trial]]]:
        """The generation to propose for, and its parents with their standing."""
        known = _GENERATIONS.setdefault(history, {}).setdefault(self.population, _Generations())
        for trial in history.finished(last=len(history) - len(history.running) - known.seen):
            known.seen += 1
            if not _has_result(history, trial):
                continue
            known.children.append(trial)
            if len(known.children) == self.population:
                merged = [*(parent for _, parent in known.parents), *known.children]
                order = sorted(
                    zip(history.standing(merged), merged, strict=True), key=lambda pair: (pair[0], -pair[1].number)
                )
                known.parents, known.children, known.count = order[: self.population], [], known.count + 1
        return known.count, known.parents

    def _child(
        self, history: History, parents: list[tuple[tuple[int, float], Trial]], rng: np.random.Generator
    ) -> tuple[Architecture, list[int]]:
        space = history.space
        first = _winner(parents, rng)
        numbers, genes = [first.number], _architecture(first)
        if rng.random() < self.crossover:
            second = _winner(parents, rng)
            numbers.append(second.number)
            genes = space.crossover(genes, _architecture(second), rng)
        if rng.random() < self.mutation:
            try:
                genes = space.mutate(genes, rng)
            except InvalidInputError:  # is_valid left this one without a neighbour
                genes = space.sample(rng)
        return genes, numbers


class _Generations:
    """How far the trials of a history fill generations. Made from those that ended, which never change again."""

    def __init__(self) -> None:
        self.seen = 0
        self.count = 0
        self.parents: list[tuple[tuple[int, float], Trial]] = []
        self.children: list[Trial] = []


def _has_result(history: History, trial: Trial) -> bool:
    if trial.architecture is None or trial.copy_of is not None:
        return False
    if trial.state == "infeasible":
        return history.violation(trial) > 0
    return trial.state == "complete" and all(objective.metric in trial.metrics for objective in history.objectives)


def _winner(parents: list[tuple[tuple[int, float], Trial]], rng: np.random.Generator) -> Trial:
    """The better of two different parents; either where they stand alike."""
    a, b = (parents[int(index)] for index in rng.choice(len(parents), size=2, replace=False))
    # Their order is random, so of equal ones each wins as often.
    return b[1] if b[0] < a[0] else a[1]


def _architecture(trial: Trial) -> Architecture:
    assert trial.architecture is not None
    return trial.architecture


_GENERATIONS: WeakKeyDictionary[History, dict[int, _Generations]] = WeakKeyDictionary()
