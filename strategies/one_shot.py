"""One-shot search: train one supernet, then what it found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.errors import InvalidInputError
from nasplat.strategy import Evaluate, Explore, Explorer, History, Proposal


@dataclass(frozen=True)
class OneShot:
    """Lets an explorer train a supernet, then trains each architecture it found from scratch, in full.

    Searching the trained supernet itself, with the inherited weights as a proxy and another strategy to choose, would
    be further steps between the two; they are not here yet.

    Attributes:
        explorer: Trains the supernet: ``OneShot(Darts(epochs=50))``.
    """

    explorer: Explorer

    def __post_init__(self) -> None:
        if isinstance(self.explorer, type) or not isinstance(self.explorer, Explorer):
            raise InvalidInputError(
                f"explorer is {self.explorer!r}; an object with explore(space, task, rng, context), "
                "such as Darts(epochs=50)"
            )

    def propose(self, history: History, rng: np.random.Generator) -> Proposal | None:
        """The exploration; None while it runs; then what it found, best first; None after that or if it failed.

        Args:
            history: All trials so far.
            rng: Not used: the explorer has its own.
        """
        exploration = next((trial for trial in history.trials if isinstance(trial.proposal, Explore)), None)
        if exploration is None:
            return Explore(self.explorer)
        if exploration.state in ("running", "failed"):
            return None
        for architecture in exploration.found:
            if not history.of(architecture):
                return Evaluate(architecture)
        return None
