"""DARTS- (Chu et al. 2021, arXiv:2009.01027): an auxiliary skip connection beside each mixture, which fades."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError
from nasplat.weight_sharing.bilevel import Bilevel, Moment, Parameters


@dataclass(frozen=True)
class DartsMinus(Bilevel):
    """Explorer: DARTS, with a skip connection of weight beta added to each edge; beta falls from 1 in the search.

    Skip connections help a supernet to train, whatever they are worth in the network that is built in the end. The
    auxiliary one gives that help to every edge, so that the candidate need not have a large weight for it. What options
    are judged by does not contain it.

    Beta is ``beta * (1 - e / epochs)`` in epoch e counted from 0 (the authors' script; cosine is another choice of
    their code): it ends one step above 0.

    Here the auxiliary skip is the candidate itself, to whose weight beta is added. For an identity that is the same
    network. Otherwise than in the original: at stride 2, where a skip is a factorised reduce with weights, these are
    those of the candidate; an edge that does not offer the skip, or whose skip an earlier stage dropped, has no
    auxiliary one; with ``partial`` the channels that pass by have beta in their weight as well.

    Attributes:
        skip: The option that is a skip connection: ``skip_connect`` in the DARTS space, ``identity`` in that of BATS.
        beta: Weight of the auxiliary skip in the first epoch of a stage.
        decay: ``linear`` or ``cosine``.

    The other attributes are those of :class:`nasplat.weight_sharing.bilevel.Bilevel`; the defaults are those of DARTS.
    """

    skip: str = "skip_connect"
    beta: float = 1.0
    decay: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.beta) or self.beta < 0:
            raise InvalidInputError(f"beta is {self.beta!r}; legal: a number from 0 up")
        if self.decay not in ("linear", "cosine"):
            raise InvalidInputError(f"decay is {self.decay!r}; legal: 'linear', 'cosine'")

    def weight(self, moment: Moment) -> float:
        """The auxiliary skip's weight in an epoch."""
        done = (moment.epoch - 1) / moment.epochs
        return self.beta * (1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)

    def initial(self, moment: Moment, rng: np.random.Generator) -> dict[str, Tensor]:
        """The alphas of DARTS.

        Raises:
            InvalidInputError: No choice of the space offers ``skip``.
        """
        offered = dict.fromkeys(option for options in moment.space.choices.values() for option in options)
        if self.skip not in offered:
            raise InvalidInputError(
                f"skip is {self.skip!r}, which no choice of {moment.space.name} offers; legal: "
                f"the one that is a skip connection of {', '.join(map(repr, offered))}"
            )
        return super().initial(moment, rng)

    def draw(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """The mixture, with the auxiliary skip's weight added to that of the skip where it is alive."""
        mixture, weight = self.mixture(parameters, moment), self.weight(moment)
        weights = torch.cat([mixture[name] for name in moment.alive])
        skips = [weight * (option == self.skip) for options in moment.alive.values() for option in options]
        sizes = [len(options) for options in moment.alive.values()]
        return dict(zip(moment.alive, torch.split(weights + weights.new_tensor(skips), sizes), strict=True))
