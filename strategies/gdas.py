"""GDAS (Dong & Yang 2019, arXiv:1910.04465): one sampled option per choice is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nasplat.checks import is_number
from nasplat.errors import InvalidInputError
from nasplat.weight_sharing.bilevel import Bilevel, Moment, Parameters


@dataclass(frozen=True)
class Gdas(Bilevel):
    """Explorer: every step samples an architecture; a straight-through Gumbel-softmax takes the gradient to the alphas.

    Of each choice one option is drawn, with the probabilities ``softmax(alpha)`` whatever ``tau`` is (the argmax of
    ``log softmax(alpha)`` plus Gumbel noise). Its weight is exactly 1, that of all others exactly 0, so a step
    computes one operation per choice. Weights and alphas learn from samples of their own.

    The gradient: let ``p = softmax((log softmax(alpha) + noise) / tau)``, i the drawn option, and g the derivative of
    the loss by its weight. Then alpha_k receives ``g * p_i * ([i = k] - p_k) / tau``. So all alphas of a choice learn
    from a step, but what the other options would have done is not known to it: their own derivative counts as 0. (In
    the authors' code the zero weight of the others is added to every number of the output, which gives them the
    derivative of an option whose output is all ones.)

    Options are judged by ``softmax(alpha)``. Defaults are those of the authors' code for the DARTS space on CIFAR-10,
    but for its Nesterov momentum. There a node may take both of its inputs along one edge; here they are two edges.

    Attributes:
        tau_max: Temperature in the first epoch of a stage.
        tau_min: In the last; linear in between.

    The other attributes are those of :class:`nasplat.weight_sharing.bilevel.Bilevel`; ``temperature`` divides the
    alphas, ``tau`` the perturbed logarithms.
    """

    epochs: int = 250
    batch_size: int = 256
    weight_decay: float = 5e-4
    tau_max: float = 10.0
    tau_min: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.tau_max) and is_number(self.tau_min)) or not 0 < self.tau_min <= self.tau_max:
            raise InvalidInputError(
                f"tau_max is {self.tau_max!r}, tau_min {self.tau_min!r}; legal: positive numbers, the second not larger"
            )

    def tau(self, moment: Moment) -> float:
        """The temperature of the Gumbel-softmax in an epoch."""
        return self.tau_max - (self.tau_max - self.tau_min) * moment.progress

    def draw(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """One-hot weights, exact, with the gradient of the Gumbel-softmax at the drawn option."""
        mixture = self.mixture(parameters, moment)
        drawn: dict[str, Tensor] = {}
        for names in moment.alike.values():
            rows = torch.stack([mixture[name] for name in names])
            logits = rows.clamp_min(torch.finfo(rows.dtype).tiny).log()
            soft = functional.gumbel_softmax(logits, tau=self.tau(moment), dim=-1)
            hard = functional.one_hot(soft.argmax(dim=-1), soft.shape[-1]).to(soft)
            # Times the one-hot, so that no gradient comes from options of weight 0 that a supernet computes all the
            # same.
            drawn.update(zip(names, (hard * (1 + (soft - soft.detach()))).unbind(), strict=True))
        return drawn
