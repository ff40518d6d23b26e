"""Successive halving: Jamieson and Talwalkar 2016, arXiv:1502.07943, with budgets as Li et al. 2018 choose them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.rungs import Rungs, next_of_brackets
from nasplat.strategy import Evaluate, History


@dataclass(frozen=True)
class SuccessiveHalving(Rungs):
    """Trains many candidates briefly, the best 1/eta of them eta times longer, and so on up to the full training.

    When a bracket is done, the next begins with new candidates; while one waits for its last running trials, free
    workers begin the next. Several objectives: the best are chosen by non-dominated rank, then crowding distance. A
    failed or stopped trial climbs no further; one that a cheap limit refused is replaced.

    Only the highest rung, the full training, makes a result (``Result.best``): with the defaults each bracket has 27
    candidates and 27 + 9 + 3 + 1 trials, for the cost of 4 full trainings without ``carry``, and of 3 with it.

    Attributes:
        min_budget: Least share of the full training, in (0, 1]; at least 1/epochs.
        eta: A rung keeps one in so many; the next trains so many times longer.
        carry: Whether a promoted candidate goes on from its weights. False trains it anew at each rung.
        newcomers: Strategy that draws new candidates; None draws at random.
        candidates: Number of candidates on the lowest rung of a bracket.
        brackets: After how many brackets the search ends; None goes on until the study's limits.
    """

    candidates: int = 27
    brackets: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.candidates):
            raise InvalidInputError(f"candidates is {self.candidates!r}; an integer from 1 up")
        if self.brackets is not None and not is_whole(self.brackets):
            raise InvalidInputError(f"brackets is {self.brackets!r}; None, or an integer from 1 up")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """A newcomer or a promotion of the oldest bracket that has one; None at the end.

        Args:
            history: All trials so far.
            rng: The only source of randomness.
        """
        return next_of_brackets(self, history, rng, [(self.candidates, self.budgets)], self.brackets)
