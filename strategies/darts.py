"""DARTS (Liu, Simonyan, Yang 2019, arXiv:1806.09055): mixtures by softmax, learnt by gradient of either order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nasplat import seeding
from nasplat.errors import InvalidInputError
from nasplat.weight_sharing.bilevel import Batch, Bilevel, Run

RADIUS = 0.01
"""L2 length, in the space of the weights, of the step of the finite differences (the authors' code)."""


@dataclass(frozen=True)
class Darts(Bilevel):
    """Explorer: options are mixed by ``softmax(alpha / temperature)``. Defaults are those of the paper on CIFAR-10.

    Attributes:
        order: ``first``: the alphas' gradient at the current weights (algorithm 1 with xi = 0). ``second``: through
            one step of the weights ahead, xi the weights' learning rate (equations 7 and 8). The step ahead has
            momentum and weight decay and is not clipped, as in the authors' code. An alpha step computes four
            gradients instead of one; SGD only.

    The other attributes are those of :class:`nasplat.weight_sharing.bilevel.Bilevel`.
    """

    order: Literal["first", "second"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("first", "second"):
            raise InvalidInputError(f"order is {self.order!r}; legal: 'first', 'second'")
        if self.order == "second" and self.optimiser != "sgd":
            raise InvalidInputError(
                f"order='second' looks one step of SGD ahead, and optimiser is {self.optimiser!r}; legal: 'sgd'"
            )

    def architecture_gradient(self, run: Run, train: Batch, validation: Batch) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of the alphas, by the order asked for."""
        if self.order == "first":
            return super().architecture_gradient(run, train, validation)
        alphas, rate = list(run.parameters.values()), run.optimiser.param_groups[0]["lr"]
        weights: list[Tensor] = [*run.weights]
        now = [weight.detach().clone() for weight in weights]
        buffers = list(run.supernet.buffers())
        before = [buffer.clone() for buffer in buffers]
        # The three training losses see the same random numbers: else their differences were of these.
        seed = int(torch.randint(2**31, ()))

        def train_loss() -> Tensor:
            with seeding.seeded(seed):
                return run.loss(train, self.draw(run.parameters, run.moment))

        ahead = _filled(torch.autograd.grad(train_loss(), weights, allow_unused=True), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, ahead, strict=True):
                gradient = gradient.add(weight, alpha=self.weight_decay)
                momentum = run.optimiser.state.get(weight, {}).get("momentum_buffer")
                weight.sub_(gradient if momentum is None else gradient.add_(momentum, alpha=self.momentum), alpha=rate)
        loss = self.architecture_loss(run, validation)
        found = torch.autograd.grad(loss, [*alphas, *weights], allow_unused=True)
        direct, by_weights = found[: len(alphas)], _filled(found[len(alphas) :], weights)

        # The Hessian-vector product of equation 8, by central differences around the current weights.
        length = float(nn.utils.get_total_norm(by_weights))
        radius = RADIUS / length if length > 0 else 0.0
        sides: list[tuple[Tensor | None, ...]] = []
        for sign in (1, -1):
            with torch.no_grad():
                torch._foreach_copy_(weights, now)
                torch._foreach_add_(weights, by_weights, alpha=sign * radius)
            sides.append(torch.autograd.grad(train_loss(), alphas, allow_unused=True))
        with torch.no_grad():
            # To the last bit. These were no steps of the training: batch norm's statistics are given back, too.
            torch._foreach_copy_(weights, now)
            if buffers:
                torch._foreach_copy_(buffers, before)
        gradients: list[Tensor | None] = []
        for own, plus, minus in zip(direct, *sides, strict=True):
            if plus is not None and minus is not None and radius > 0:
                through = (minus - plus) * (rate / (2 * radius))
                own = through if own is None else own + through
            gradients.append(own)
        return loss.detach(), gradients


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with zeros for what the loss does not depend on."""
    return [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, like, strict=True)]
