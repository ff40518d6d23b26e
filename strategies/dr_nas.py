"""DrNAS (Chen et al. 2021, arXiv:2006.10355): mixtures are drawn from learnt Dirichlet distributions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError
from nasplat.weight_sharing.bilevel import Bilevel, Moment, Parameters, Stage

FLOOR = 1e-3
"""Least concentration: far below, samples underflow to 0 and have no gradient."""


@dataclass(frozen=True)
class DrNas(Bilevel):
    """Explorer: the weights of a choice are drawn anew for each step from a Dirichlet of concentration ``elu(a) + 1``.

    The gradient of the concentrations is the pathwise one. Options are judged by the mean of the distribution. At
    alpha = 0 it is uniform over all mixtures; what pulls back to there is ``alpha_weight_decay`` (the default), or
    the Kullback-Leibler divergence (``kl``; then give ``alpha_weight_decay=0``).

    Progressive: the defaults are two stages of 25 epochs, the first with a sixth of the channels in the mixtures, the
    second with a quarter and the 4 strongest options of each choice; the alphas of each learn from its epoch 11 on.
    They are for the network that the authors search, with 36 channels: ``DartsCell.cifar()``. For others give stages
    with a ``partial`` that divides the channels, as :meth:`small` does for 8.

    Otherwise than in the original: each stage begins with a new supernet and new alphas, where theirs goes on with
    the weights widened and the alphas of what was kept; the learning rate falls to its end in each stage, where theirs
    falls once over both; where a space has ``none`` among the options, it competes, theirs was left out; after a
    stage weights are drawn from a Dirichlet over the options kept, where theirs are drawn over all and rescaled; edges
    are ranked by the mean, theirs by ``softmax(alpha)``.

    Attributes:
        kl: Factor of the divergence of each choice's distribution from the uniform one, summed over the choices.

    The other attributes are those of :class:`nasplat.weight_sharing.bilevel.Bilevel`.
    """

    epochs: int = 25
    warmup: int = 10
    lr: float = 0.1
    lr_min: float = 0.0
    alpha_lr: float = 6e-4
    stages: tuple[Stage, ...] = (Stage(partial=6), Stage(options=4, partial=4))
    kl: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.kl) or self.kl < 0:
            raise InvalidInputError(f"kl is {self.kl!r}; legal: a number from 0 up")

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """Stages with a quarter and a half of the channels, 4 epochs each, the first one warm-up: for one CPU core.

        Of this project, for tests and first steps, with spaces of 8 channels such as ``DartsCell.small()``.

        Args:
            overrides: Any attribute, e.g. ``DrNas.small(epochs=10)``.
        """
        stages = (Stage(partial=4), Stage(options=4, partial=2))
        return cls(**{"epochs": 4, "warmup": 1, "lr": 0.025, "alpha_lr": 6e-3, "stages": stages, **overrides})

    def mixture(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """The means: concentrations over their sum."""
        mixture: dict[str, Tensor] = {}
        for names, rows in _rows(parameters, moment):
            mixture.update(zip(names, (rows / rows.sum(dim=-1, keepdim=True)).unbind(), strict=True))
        return mixture

    def draw(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """A sample of each choice's Dirichlet."""
        drawn: dict[str, Tensor] = {}
        for names, rows in _rows(parameters, moment):
            drawn.update(zip(names, Dirichlet(rows).rsample().unbind(), strict=True))
        return drawn

    def penalty(self, parameters: Parameters, moment: Moment) -> Tensor | None:
        """``kl`` times the sum of the divergences; nothing where it is 0."""
        if self.kl == 0:
            return None
        divergences = [
            kl_divergence(Dirichlet(rows), Dirichlet(torch.ones_like(rows))).sum()
            for _, rows in _rows(parameters, moment)
        ]
        return self.kl * torch.stack(divergences).sum()


def _rows(parameters: Parameters, moment: Moment) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Choices that are alike, and their concentrations ``(choices, alive)``."""
    for names in moment.alike.values():
        yield names, (functional.elu(torch.stack([parameters[name] for name in names])) + 1).clamp_min(FLOOR)
