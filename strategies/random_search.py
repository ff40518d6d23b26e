"""Random search without replacement: the baseline that every other strategy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.strategy import Evaluate, History


@dataclass(frozen=True)
class RandomSearch:
    """Random search: draws architectures from the space, each at most once. Ends when the space is exhausted."""

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """An architecture that was not proposed before; None when there is none left (``History.draw_new``).

        Args:
            history: All trials so far.
            rng: The only source of randomness.
        """
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture)
