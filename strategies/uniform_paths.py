"""Single-path one-shot training: one random architecture a step (Guo et al. 2020, arXiv:1904.00420)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nasplat.architecture import Architecture
from nasplat.space import SearchSpace
from nasplat.weight_sharing.paths import PathTraining


@dataclass(frozen=True)
class UniformPaths(PathTraining):
    """Explorer: trains a supernet on one uniformly drawn path a step.

    For ``OneShot(UniformPaths(epochs=120), search=RegularizedEvolution(50), n_search=1000)``. 120 epochs is the paper's
    number; batch size and learning rate are set for one machine, not for the paper's batches of 1,024 images.

    Attributes are those of :class:`~nasplat.weight_sharing.paths.PathTraining`.
    """

    def steps(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[Sequence[Architecture]]:
        """One architecture a step, drawn evenly (``SearchSpace.sample``).

        Args:
            space: Where it is drawn.
            rng: The only source of randomness.
        """
        while True:
            yield [space.sample(rng)]
