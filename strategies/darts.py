"""DARTS, first order: architecture weights and network weights learn in turn, by gradient.

Liu, Simonyan, Yang 2019, arXiv:1806.09055, algorithm 1 with xi = 0. A softmax temperature below 1 after Bulat,
Martinez, Tzimiropoulos 2020, arXiv:2003.01711.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from nasplat import seeding
from nasplat.architecture import Architecture
from nasplat.cost.resource import Resource
from nasplat.data.sources import Source
from nasplat.errors import InvalidInputError, NonFiniteError, UnsupportedError
from nasplat.space import Relaxed, SearchSpace
from nasplat.strategy import Context, Report
from nasplat.task import Task
from nasplat.train import lay_out, place


@dataclass(frozen=True)
class Darts:
    """Explorer: trains a supernet whose options are mixed by ``softmax(alpha / temperature)``, and discretises it.

    One half of the training data teaches the network weights, the other half the alphas, a step each in turn. Data
    that comes as loaders cannot be halved: there the alphas learn from the validation data. Of the task's recipe
    nothing is used but the label smoothing of its loss.

    Defaults are those of the DARTS paper's search on CIFAR-10; :meth:`bats` has those of BATS.

    Attributes:
        epochs: Passes over the half that teaches the weights, warm-up included.
        batch_size: Examples a step, of each half.
        warmup: Epochs at the start in which the weights learn alone.
        optimiser: Of the weights: ``sgd`` or ``adam``.
        lr: Learning rate of the weights at the start.
        lr_min: And at the end; in between it follows a cosine, a step an epoch.
        momentum: Of SGD; Adam takes ``(0.9, 0.999)``.
        weight_decay: L2 coefficient of the weights.
        clip: Greatest L2 norm of the weights' gradient; None does not clip.
        alpha_lr: Learning rate of the alphas (Adam).
        alpha_betas: Of the alphas' Adam.
        alpha_weight_decay: L2 coefficient of the alphas.
        temperature: Of the softmax, for every choice; None takes what the space names (``SearchSpace.temperatures``).
        resource: A term in the alphas' loss that pulls towards a target cost; None looks at the task's loss alone.
    """

    epochs: int = 50
    batch_size: int = 64
    warmup: int = 0
    optimiser: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.025
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float | None = 5.0
    alpha_lr: float = 3e-4
    alpha_betas: tuple[float, float] = (0.5, 0.999)
    alpha_weight_decay: float = 1e-3
    temperature: float | None = None
    resource: Resource | None = None

    def __post_init__(self) -> None:
        first, second = self.alpha_betas
        object.__setattr__(self, "alpha_betas", (first, second))
        if self.optimiser not in ("sgd", "adam"):
            raise InvalidInputError(f"optimiser is {self.optimiser!r}; legal: 'sgd', 'adam'")
        if not 0 <= self.warmup < self.epochs:
            raise InvalidInputError(f"warmup is {self.warmup} of {self.epochs} epochs; legal: 0 to epochs - 1")
        if self.batch_size < 2:
            raise InvalidInputError(f"batch_size is {self.batch_size}; batch norm needs at least 2 examples")
        if not (self.lr > 0 and 0 <= self.lr_min <= self.lr and self.alpha_lr > 0):
            raise InvalidInputError(
                f"lr is {self.lr}, lr_min {self.lr_min}, alpha_lr {self.alpha_lr}; "
                "rates must be positive and lr_min in [0, lr]"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise InvalidInputError(f"temperature is {self.temperature}; it must be positive, or None for the space's")
        if self.resource is not None and not isinstance(self.resource, Resource):
            raise InvalidInputError(f"resource is {self.resource!r}; a nasplat.cost.Resource, or None, is needed")
        if self.clip is not None and not self.clip > 0:
            raise InvalidInputError(f"clip is {self.clip}; it must be positive, or None for no clipping")

    @classmethod
    def bats(cls, **overrides: Any) -> Self:
        """The values of BATS (arXiv:2003.01711), in one stage: Adam for both, 10 of 25 epochs for the weights alone.

        The paper searches in three stages of growing depth, and does not say how the rate changes (here: it does not)
        or whether gradients are clipped (here: at 5).

        Args:
            overrides: Any attribute, e.g. ``Darts.bats(epochs=5, warmup=2)``.
        """
        values: dict[str, Any] = {
            "epochs": 25,
            "batch_size": 96,
            "warmup": 10,
            "optimiser": "adam",
            "lr": 1e-3,
            "weight_decay": 3e-4,
            "clip": 5.0,
            "alpha_lr": 6e-4,
            "alpha_betas": (0.5, 0.999),
            "alpha_weight_decay": 1e-3,
            **overrides,
        }
        return cls(**{"lr_min": values["lr"], **values})

    def explore(
        self, space: SearchSpace, task: Task, rng: np.random.Generator, context: Context
    ) -> Generator[Report, bool, Sequence[Architecture]]:
        """Train the supernet and return its strongest architecture.

        Yields per epoch ``train_loss`` and ``alpha_loss`` (means over the epoch), ``mean_max_weight``, the largest
        mixture weight of a choice, averaged over the choices (1 is as good as discrete), and with a resource the
        expected cost, named ``expected_<metric>``.

        Args:
            space: Must have a supernet.
            task: Its training data.
            rng: Draws the alphas, the halves and the orders of the data.
            context: Device, progress, checkpoints.

        Raises:
            UnsupportedError: The space has no supernet.
            InvalidInputError: The resource's table is of another space.
            NonFiniteError: A loss or an alpha became NaN or infinite.
            ArchitectureError: The space refuses the architecture that was found.
        """
        device = context.device
        if self.resource is not None and self.resource.table.space != space.identity:
            raise InvalidInputError(f"the resource's table is of {self.resource.table.space}, not of {space.identity}")
        alphas = {
            name: torch.from_numpy(1e-3 * rng.standard_normal(len(options))).float().to(device).requires_grad_()
            for name, options in space.choices.items()
        }
        halves, order, alpha_order = (int(seed) for seed in rng.integers(2**31, size=3))
        data = task.load()
        source: Source
        alpha_source: Source
        try:
            source, alpha_source = data.train.split(0.5, halves)
        except UnsupportedError:
            source, alpha_source = data.train, data.validation
        orders = [torch.Generator().manual_seed(seed) for seed in (order, alpha_order)]

        supernet = lay_out(space.supernet().to(device))
        supernet.train()
        # foreach: hundreds of small tensors are stepped in a few calls.
        weights = [parameter for parameter in supernet.parameters() if parameter.requires_grad]
        optimiser: torch.optim.Optimizer
        if self.optimiser == "sgd":
            optimiser = torch.optim.SGD(
                weights, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, foreach=True
            )
        else:
            optimiser = torch.optim.Adam(weights, self.lr, weight_decay=self.weight_decay, foreach=True)
        alpha_optimiser = torch.optim.Adam(
            list(alphas.values()),
            self.alpha_lr,
            betas=self.alpha_betas,
            weight_decay=self.alpha_weight_decay,
            foreach=True,
        )

        done = 0
        state = context.load()
        if state is not None:
            done = int(state["epoch"])
            supernet.load_state_dict(state["supernet"])
            optimiser.load_state_dict(state["optimiser"])
            alpha_optimiser.load_state_dict(state["alpha_optimiser"])
            with torch.no_grad():
                for name, alpha in alphas.items():
                    alpha.copy_(state["alphas"][name])
            for generator, saved in zip(orders, state["orders"], strict=True):
                generator.set_state(saved)
            seeding.set_state(state["generators"])

        for epoch in range(done + 1, self.epochs + 1):
            for group in optimiser.param_groups:
                group["lr"] = self._lr(epoch)
            losses: list[Tensor] = []
            alpha_losses: list[Tensor] = []
            alpha_batches = _endless(alpha_source, self.batch_size, orders[1])
            for x, y in _batches(source, self.batch_size, orders[0]):
                if epoch > self.warmup:
                    batch = next(alpha_batches)
                    with context.step():
                        loss = self._alpha_loss(supernet, space, task, alphas, batch, device)
                        alpha_optimiser.step()
                        alpha_losses.append(loss)
                with context.step():
                    relaxed = {name: weight.detach() for name, weight in self._relax(space, alphas).items()}
                    optimiser.zero_grad()
                    loss = task.compute_loss(supernet(place(x, device), relaxed), y.to(device))
                    loss.backward()  # type: ignore[no-untyped-call]
                    if self.clip is not None:
                        nn.utils.clip_grad_norm_(weights, self.clip)
                    optimiser.step()
                    losses.append(loss.detach())
            # Reported, then saved: a run killed in between reports the epoch again rather than never.
            go_on = yield Report(epoch, self._metrics(space, alphas, losses, alpha_losses, epoch))
            context.save(
                {
                    "epoch": epoch,
                    "alphas": {name: alpha.detach() for name, alpha in alphas.items()},
                    "supernet": dict(supernet.state_dict()),
                    "optimiser": optimiser.state_dict(),
                    "alpha_optimiser": alpha_optimiser.state_dict(),
                    "orders": [generator.get_state() for generator in orders],
                    "generators": seeding.get_state(),
                }
            )
            if not go_on:
                break
        context.keep(supernet.state_dict())
        return [space.discretise({name: weight.detach().cpu() for name, weight in self._relax(space, alphas).items()})]

    def _lr(self, epoch: int) -> float:
        # Computed, not stepped, so that there is no schedule to save: epoch 1 has lr, the end of the last lr_min.
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2

    def _relax(self, space: SearchSpace, alphas: Mapping[str, Tensor]) -> Relaxed:
        named = space.temperatures() if self.temperature is None else dict.fromkeys(alphas, self.temperature)
        return {name: torch.softmax(alpha / named.get(name, 1.0), dim=0) for name, alpha in alphas.items()}

    def _alpha_loss(
        self,
        supernet: nn.Module,
        space: SearchSpace,
        task: Task,
        alphas: Mapping[str, Tensor],
        batch: tuple[Tensor, Tensor],
        device: torch.device,
    ) -> Tensor:
        """The loss, with the gradients of the alphas set."""
        x, y = batch
        relaxed = self._relax(space, alphas)
        loss = task.compute_loss(supernet(place(x, device), relaxed), y.to(device))
        if self.resource is not None:
            loss = loss + self.resource.loss(relaxed)
        # Of the alphas alone: the gradients of the weights would be computed for nothing.
        gradients = torch.autograd.grad(loss, list(alphas.values()), allow_unused=True)
        for alpha, gradient in zip(alphas.values(), gradients, strict=True):
            alpha.grad = gradient
        return loss.detach()

    def _metrics(
        self,
        space: SearchSpace,
        alphas: Mapping[str, Tensor],
        losses: Sequence[Tensor],
        alpha_losses: Sequence[Tensor],
        epoch: int,
    ) -> dict[str, float]:
        if not losses:
            raise InvalidInputError("the training data has no batch of at least 2 examples")
        largest = torch.stack([weight.detach().max() for weight in self._relax(space, alphas).values()])
        metrics = {"train_loss": float(torch.stack(list(losses)).mean())}
        if alpha_losses:
            metrics["alpha_loss"] = float(torch.stack(list(alpha_losses)).mean())
        metrics["mean_max_weight"] = float(largest.mean())
        if self.resource is not None:
            expected = self.resource.table.expected(self._relax(space, alphas))
            metrics[f"expected_{self.resource.table.metric}"] = float(expected.detach())
        broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(f"epoch {epoch}: {', '.join(broken)}")
        return metrics


def _batches(source: Source, size: int, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass, without a last batch of one example, which batch norm refuses."""
    return ((x, y) for x, y in source.batches(size, order) if len(x) > 1)


def _endless(source: Source, size: int, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Pass after pass, each in a new order."""
    while True:
        count = 0
        for batch in _batches(source, size, order):
            count += 1
            yield batch
        if count == 0:
            raise InvalidInputError("the data for the alphas has no batch of at least 2 examples")
