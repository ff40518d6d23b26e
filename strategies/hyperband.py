"""Hyperband: Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar 2018, arXiv:1603.06560, algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.rungs import Rungs, next_of_brackets
from nasplat.strategy import Evaluate, History


@dataclass(frozen=True)
class Hyperband(Rungs):
    """Successive halving in brackets that differ in how short the first training is.

    How far a short training tells the good from the bad is not known beforehand, so the brackets go from many
    candidates that begin at the lowest budget to few that are trained in full at once, each bracket for about the same
    cost; then they begin again. Within a bracket, see ``SuccessiveHalving``: the promoted, failures, several
    objectives and free workers are treated the same. With ``newcomers=OptunaSearch("tpe")`` this is BOHB (Falkner,
    Klein, Hutter 2018, arXiv:1807.01774), with Optuna's TPE in the place of theirs.

    Attributes:
        min_budget: Least share of the full training, in (0, 1]; at least 1/epochs.
        eta: A rung keeps one in so many; the next trains so many times longer.
        carry: Whether a promoted candidate goes on from its weights. False trains it anew at each rung.
        newcomers: Strategy that draws new candidates; None draws at random.
    """

    @property
    def plan(self) -> list[tuple[int, tuple[float, ...]]]:
        """The brackets of one round: candidates on the lowest rung, and the rungs' budgets.

        With s_max + 1 budgets, bracket s = s_max, ..., 0 begins with ``ceil((s_max + 1) / (s + 1) * eta^s)``
        candidates at the budget ``eta^-s``.
        """
        budgets = self.budgets
        highest = len(budgets) - 1
        return [(-(-(highest + 1) * self.eta**s // (s + 1)), budgets[highest - s :]) for s in range(highest, -1, -1)]

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """A newcomer or a promotion of the oldest bracket that has one; None when no candidate is left.

        Args:
            history: All trials so far.
            rng: The only source of randomness.
        """
        return next_of_brackets(self, history, rng, self.plan)
