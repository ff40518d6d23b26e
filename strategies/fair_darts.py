"""Fair DARTS (Chu et al. 2020, arXiv:1911.12126): options do not compete, and are pushed to be on or off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nasplat.checks import is_number
from nasplat.errors import ArchitectureError, InvalidInputError
from nasplat.space import SearchSpace
from nasplat.weight_sharing.bilevel import Bilevel, Moment, Parameters, Run


@dataclass(frozen=True)
class FairDarts(Bilevel):
    """Explorer: every option has a sigmoid of its own, and a zero-one loss pushes each away from 0.5.

    In a softmax an option that learns fast, such as a skip connection, takes weight from all others; sigmoids do not
    take from each other. The zero-one loss is ``-zero_one * mean((sigmoid(alpha) - 0.5)^2)``, the mean over all options
    of all choices. Alphas begin at 0, as in the authors' code, whose values for CIFAR-10 the defaults are.

    An option that turns a member of a group off, ``none`` in the DARTS space, has weight 0 and no part in the loss:
    the original has no such option. Expected costs of a ``resource`` are of the sigmoids over their sum.

    Otherwise than in the original: it keeps at most two edges of a node and drops those below the threshold 0.85, so
    nodes may end with one edge or none. The spaces here have just two edges on per node: the two strongest are taken
    whatever their weight, and ``picked_above_threshold`` is reported, the share of the picked options that reach it.
    Below 1, the found architecture is not yet one that the search is sure of.

    Attributes:
        zero_one: Factor of the zero-one loss.
        threshold: In (0, 1), for the report alone.

    The other attributes are those of :class:`nasplat.weight_sharing.bilevel.Bilevel`; ``temperature`` is not used.
    """

    batch_size: int = 128
    lr: float = 0.005
    alpha_lr: float = 3e-3
    alpha_betas: tuple[float, float] = (0.9, 0.999)
    zero_one: float = 10.0
    threshold: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.zero_one) or self.zero_one < 0:
            raise InvalidInputError(f"zero_one is {self.zero_one!r}; legal: a number from 0 up")
        if not is_number(self.threshold) or not 0 < self.threshold < 1:
            raise InvalidInputError(f"threshold is {self.threshold!r}; legal: a number in (0, 1)")
        if self.temperature is not None:
            raise InvalidInputError(f"temperature is {self.temperature}; sigmoids have none: legal: None")

    def initial(self, moment: Moment, rng: np.random.Generator) -> dict[str, Tensor]:
        """Zeros: all options half on."""
        return {name: torch.zeros(len(options)) for name, options in moment.alive.items()}

    def mixture(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """``sigmoid(alpha)``; 0 for the option that turns a member of a group off."""
        alphas, on = _alphas(parameters, moment)
        sizes = [len(options) for options in moment.alive.values()]
        return dict(zip(moment.alive, torch.split(torch.sigmoid(alphas) * on, sizes), strict=True))

    def penalty(self, parameters: Parameters, moment: Moment) -> Tensor | None:
        """The zero-one loss."""
        alphas, on = _alphas(parameters, moment)
        return -self.zero_one * ((torch.sigmoid(alphas) - 0.5).square() * on).sum() / on.sum()

    def metrics(self, run: Run) -> dict[str, float]:
        """``picked_above_threshold``; not where the space refuses what would be picked now."""
        space, shares = run.moment.space, self.shares(run)
        try:
            genes = space.discretise(shares).genes
        except ArchitectureError:
            return {}
        off = _off(space)
        picked = [
            shares[name].tolist()[list(options).index(genes[name])]
            for name, options in space.choices.items()
            if genes[name] != off.get(name)
        ]
        return {"picked_above_threshold": sum(weight >= self.threshold for weight in picked) / len(picked)}


def _alphas(parameters: Parameters, moment: Moment) -> tuple[Tensor, Tensor]:
    """All alphas in a row; and 1 for each alive option, 0 for those that turn a member of a group off."""
    off = _off(moment.space)
    alphas = torch.cat([parameters[name] for name in moment.alive])
    on = [float(option != off.get(name)) for name, options in moment.alive.items() for option in options]
    return alphas, alphas.new_tensor(on)


def _off(space: SearchSpace) -> dict[str, object]:
    return {name: group.off for group in space.choice_groups.values() for name in group.names}
