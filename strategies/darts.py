"""DARTS (Liu, Simonyan, Yang 2019, arXiv:1806.09055): mixtures by softmax, learnt by gradient of either order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nasplat.errors import InvalidInputError
from nasplat.weight_sharing.bilevel import Batch, Bilevel, Run

RADIUS = 0.01
"""L2 length, in the space of the weights, of the step of the finite differences (the authors' code)."""


@dataclass(frozen=True)
class Darts(Bilevel):
    """Explorer: options are mixed by ``softmax(alpha / temperature)``. Defaults are those of the paper on CIFAR-10.

    Attributes:
        order: ``first``: the alphas' gradient at the current weights (algorithm 1 with xi = 0). ``second``: through
            one step of the weights ahead, xi the weights' learning rate (equations 7 and 8); four times the work of
            an alpha step, and SGD only.

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
        rate = run.optimiser.param_groups[0]["lr"]
        alphas = list(run.parameters.values())
        now = [weight.detach().clone() for weight in run.weights]
        # The looks ahead are not steps of the training: batch norm's running statistics stay as they were.
        buffers = [buffer.clone() for buffer in run.supernet.buffers()]

        ahead = _filled(torch.autograd.grad(self._train_loss(run, train), run.weights, allow_unused=True), run.weights)
        with torch.no_grad():
            for weight, gradient in zip(run.weights, ahead, strict=True):
                momentum = run.optimiser.state[weight].get("momentum_buffer")
                step = gradient + self.weight_decay * weight
                weight.sub_(rate * (step if momentum is None else step + self.momentum * momentum))
        loss = self.architecture_loss(run, validation)
        found = torch.autograd.grad(loss, [*alphas, *run.weights], allow_unused=True)
        direct, by_weights = found[: len(alphas)], _filled(found[len(alphas) :], run.weights)

        # The Hessian-vector product of equation 8, by central differences around the current weights.
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in by_weights]))
        radius = RADIUS / float(length) if float(length) > 0 else 0.0
        sides: list[tuple[Tensor | None, ...]] = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, value, part in zip(run.weights, now, by_weights, strict=True):
                    weight.copy_(value + sign * radius * part)
            sides.append(torch.autograd.grad(self._train_loss(run, train), alphas, allow_unused=True))
        with torch.no_grad():
            for weight, value in zip(run.weights, now, strict=True):
                weight.copy_(value)
            for buffer, value in zip(run.supernet.buffers(), buffers, strict=True):
                buffer.copy_(value)
        gradients: list[Tensor | None] = []
        for own, plus, minus in zip(direct, *sides, strict=True):
            if own is not None and plus is not None and minus is not None and radius > 0:
                own = own - rate * (plus - minus) / (2 * radius)
            gradients.append(own)
        return loss.detach(), gradients

    def _train_loss(self, run: Run, train: Batch) -> Tensor:
        return run.loss(train, self.draw(run.parameters, run.moment))


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with zeros for what the loss does not depend on."""
    return [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, like, strict=True)]
