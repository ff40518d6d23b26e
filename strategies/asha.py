"""Asynchronous successive halving (ASHA): Li et al. 2020, arXiv:1810.05934, algorithm 2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.rungs import Rungs, next_without_waiting
from nasplat.strategy import Evaluate, History


@dataclass(frozen=True)
class AsyncSuccessiveHalving(Rungs):
    """Promotes a candidate as soon as it is among the best 1/eta of those that ended on its rung; never waits.

    A free worker takes a promotion, from the highest rung that has one, else a new candidate on the lowest rung. Some
    are promoted that would not be, had all been known; in return no worker is ever idle. Several objectives: the best
    of a rung are chosen by non-dominated rank, then crowding distance. Failed and stopped trials count as ended and are
    never promoted; those that a cheap limit refused do not count.

    Only the highest rung, the full training, makes a result (``Result.best``), and the first candidate gets there
    after ``eta ** (rungs - 1)`` newcomers at the least: 27 with the defaults. Where the space is exhausted before,
    the best candidate is trained on to the end.

    Attributes:
        min_budget: Least share of the full training, in (0, 1]; at least 1/epochs.
        eta: A rung keeps one in so many; the next trains so many times longer.
        carry: Whether a promoted candidate goes on from its weights. False trains it anew at each rung.
        newcomers: Strategy that draws new candidates; None draws at random.
    """

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """A promotion from the highest rung that has one, else a newcomer; None when there is neither.

        Args:
            history: All trials so far.
            rng: The only source of randomness.
        """
        return next_without_waiting(self, history, rng)
