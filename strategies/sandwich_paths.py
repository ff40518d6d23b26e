"""The sandwich rule: the largest, the smallest and some random architectures in each step, the largest as teacher.

Yu, Huang 2019, arXiv:1903.05134, algorithm 1; for whole search spaces Yu et al. 2020 (BigNAS), arXiv:2003.11142.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.space import SearchSpace
from nasplat.weight_sharing.paths import PathTraining


@dataclass(frozen=True)
class SandwichPaths(PathTraining):
    """Explorer: trains a supernet on its largest, its smallest and some random paths in each step.

    What lies between two extremes that are trained well is expected to be trained well. For spaces of elastic
    dimensions, where smaller networks are parts of larger ones: those that have ``SearchSpace.extremes``.

    Attributes:
        random: Random paths a step, beside the two; from 0 up.
        distil: Whether the largest path alone learns from the labels, and the others from the probabilities that it
            predicts in the same step (in-place distillation). Needs the default loss, cross-entropy.

    Further attributes are those of :class:`~nasplat.weight_sharing.paths.PathTraining`.
    """

    random: int = 2
    distil: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.random, 0):
            raise InvalidInputError(f"random is {self.random!r}; an integer from 0 up is needed")
        if not isinstance(self.distil, bool):
            raise InvalidInputError(f"distil is {self.distil!r}; legal: True, False")

    @property
    def first_teaches(self) -> bool:
        """Whether the largest path is the others' teacher."""
        return self.distil

    def steps(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[Sequence[Architecture]]:
        """The largest architecture, ``random`` uniform ones, the smallest.

        Args:
            space: Names its extremes.
            rng: The only source of randomness.

        Raises:
            UnsupportedError: The space does not say what is smallest and largest.
        """
        smallest, largest = space.extremes()
        while True:
            yield [largest, *(space.sample(rng) for _ in range(self.random)), smallest]
