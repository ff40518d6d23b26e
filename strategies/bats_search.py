"""The search of BATS (Bulat, Martinez, Tzimiropoulos 2020, arXiv:2003.01711): temperature, and stages of depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nasplat.weight_sharing.bilevel import Bilevel, Stage


@dataclass(frozen=True)
class BatsSearch(Bilevel):
    """Explorer: first-order DARTS in three stages of 5, 11 and 17 cells, with 8, 5 and 3 operations alive per edge.

    Mixtures are ``softmax(alpha / T)`` with the temperatures that the space names: 0.2 in normal cells and 0.15 in
    reduction cells of :class:`search_spaces.Bats`. Weights and alphas learn with Adam; the weights learn alone for 10
    of the 25 epochs of each stage. The paper does not say how the learning rate changes (here: it does not) or whether
    gradients are clipped (here: at 5). For a single stage at the space's own depth, give ``stages=()``.

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
