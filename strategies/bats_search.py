"""The search of BATS (Bulat, Martinez, Tzimiropoulos 2020, arXiv:2003.01711): temperature, and stages of depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from nasplat.weight_sharing.bilevel import Bilevel, Stage


@dataclass(frozen=True)
class BatsSearch(Bilevel):
    """Explorer: first-order DARTS in three stages of 5, 11 and 17 cells, with 8, 5 and 3 operations alive per edge.

    Mixtures are ``softmax(alpha / T)`` with the temperatures that the space names: 0.2 in normal cells and 0.15 in
    reduction cells of :class:`search_spaces.Bats`. Weights and alphas learn with Adam; the weights learn alone for 10
    of the 25 epochs of each stage. The paper does not say how the learning rate changes (here: it does not) or whether
    gradients are clipped (here: at 5). For a single stage at the space's own depth, give ``stages=()``.

    The depths are those of the supernets alone: what is found is an architecture of the space as given. It needs a
    space with a field ``cells``, such as the two-cell spaces; others are searched with ``stages=()``. The weights that
    are kept are those of the last stage's supernet, which a network of another depth cannot inherit.

    The attributes are those of :class:`nasplat.weight_sharing.bilevel.Bilevel`.
    """

    epochs: int = 25
    batch_size: int = 96
    warmup: int = 10
    optimiser: Literal["sgd", "adam"] = "adam"
    lr: float = 1e-3
    lr_min: float = 1e-3
    alpha_lr: float = 6e-4
    stages: tuple[Stage, ...] = (Stage(cells=5), Stage(cells=11, options=5), Stage(cells=17, options=3))

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """Stages of 2, 3 and 5 cells, 4 epochs each, the first one warm-up: for one CPU core.

        Of this project, for tests and first steps, with small spaces such as ``Bats.small()``.

        Args:
            overrides: Any attribute, e.g. ``BatsSearch.small(epochs=10)``.
        """
        stages = (Stage(cells=2), Stage(cells=3, options=5), Stage(cells=5, options=3))
        return cls(**{"epochs": 4, "warmup": 1, "batch_size": 64, "alpha_lr": 6e-3, "stages": stages, **overrides})

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The defaults: what the plain name stands for in Python, and on the command line ``bats_search:paper``.

        Args:
            overrides: Any attribute.
        """
        return cls(**overrides)
