"""Random search without replacement: the baseline that every other strategy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nasplat.strategy import Evaluate, History

ENUMERABLE = 20_000
"""Spaces up to this size are listed when drawing finds nothing new, so that the last architecture is found too."""


@dataclass(frozen=True)
class RandomSearch:
    """Draws architectures from the space, each at most once. Ends when the space is exhausted."""

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """An architecture that was not proposed before; None when there is none left.

        In a space too large to list, 10,000 draws in a row that were all seen before count as exhausted.

        Args:
            history: All trials so far.
            rng: The only source of randomness.
        """
        space = history.space
        size = space.size()
        if history.distinct >= size:
            return None
        for _ in range(20 if size <= ENUMERABLE else 10_000):
            architecture = space.sample(rng)
            if not history.of(architecture):
                return Evaluate(architecture)
        if size > ENUMERABLE:
            return None
        left = [architecture for architecture in space.enumerate() if not history.of(architecture)]
        return Evaluate(left[int(rng.integers(len(left)))]) if left else None
