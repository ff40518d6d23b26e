"""PC-DARTS (Xu et al. 2020, arXiv:1907.05737): part of the channels go through the mixtures; edges have weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nasplat.weight_sharing.bilevel import Bilevel, Moment, Parameters


@dataclass(frozen=True)
class PcDarts(Bilevel):
    """Explorer: DARTS on a quarter of the channels, with a weight for each edge of a node.

    One in ``partial`` channels of a node goes through the mixtures, the others pass by them, so that a step takes less
    memory and time and batches can be larger. Fewer channels make the choice of edges noisier; so the edges of a node
    have weights of their own, ``softmax(beta)`` over the members of a group of the space, and an option counts with
    ``softmax(alpha) * softmax(beta)``, in training and in discretisation. A space without groups has no edge weights.
    The defaults are those of the authors' code for CIFAR-10, for :meth:`search_spaces.DartsCell.search`.

    Otherwise than in the original: the channels that pass by an edge are multiplied by
    ``softmax(beta) * (1 - softmax(alpha)[none])``, there by ``softmax(beta)`` alone, so that here an edge that tends to
    ``none`` fades as a whole.

    The attributes are those of :class:`nasplat.weight_sharing.bilevel.Bilevel`; ``partial`` must divide the space's
    channels (the space says which numbers do). The betas learn as the alphas do.
    """

    batch_size: int = 256
    warmup: int = 15
    lr: float = 0.1
    lr_min: float = 0.0
    alpha_lr: float = 6e-4
    partial: int = 4

    def initial(self, moment: Moment, rng: np.random.Generator) -> dict[str, Tensor]:
        """Alphas, and a ``beta:<group>`` per group, ``1e-3 * N(0, 1)`` per member."""
        betas = {
            beta(name): torch.from_numpy(1e-3 * rng.standard_normal(len(group.names))).float()
            for name, group in moment.space.choice_groups.items()
        }
        return {**super().initial(moment, rng), **betas}

    def mixture(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """``softmax(alpha)``, for a member of a group times its part of ``softmax(beta)``."""
        mixture = super().mixture(parameters, moment)
        for name, group in moment.space.choice_groups.items():
            for edge, weight in zip(group.names, torch.softmax(parameters[beta(name)], dim=0).unbind(), strict=True):
                mixture[edge] = mixture[edge] * weight
        return mixture

    def odds(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """As many members of a group count in an expected cost as it picks: the mixture times their number."""
        odds = self.mixture(parameters, moment)
        for group in moment.space.choice_groups.values():
            for edge in group.names:
                odds[edge] = odds[edge] * group.pick
        return odds


def beta(group: str) -> str:
    """The parameter of a group's edge weights. No choice has a colon in its name."""
    return f"beta:{group}"
