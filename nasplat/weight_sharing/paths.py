"""Supernets trained path by path: what uniform, fair and sandwich sampling share.

In a step only some paths of the supernet are computed, each for one architecture, and their gradients are summed. The
members of the family differ in nothing but the paths that they draw for a step. Architectures are searched afterwards,
by their validated quality with inherited weights (Guo et al. 2020, arXiv:1904.00420).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat import seeding
from nasplat.architecture import Architecture
from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError, NonFiniteError
from nasplat.space import SearchSpace, Supernet
from nasplat.strategy import Context, Report
from nasplat.task import Task, cross_entropy
from nasplat.train import evaluate, lay_out, place
from nasplat.weight_sharing.inherited import SupernetPath, on_device
from nasplat.weight_sharing.recalibrate import calibration_batches, kept_statistics, recalibrate


@dataclass(frozen=True)
class PathTraining(ABC):
    """Explorer: trains a supernet on paths drawn for each step, then takes the best of some random architectures.

    Weights learn by SGD with momentum on all training data. An option that is on no path of a step is not touched by
    it, neither by momentum nor by weight decay. Of the task's recipe nothing is used but the label smoothing of its
    loss, and the batch size for estimating batch-norm statistics.

    The weights are kept for evaluations that inherit them (``OneShot(..., search=...)``). What the exploration itself
    finds is meant as a first answer: the best of a few random architectures.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Examples a step. All paths of a step see the same.
        lr: Learning rate at the start.
        lr_min: And at the end; in between it follows a cosine, a step an epoch.
        momentum: Of SGD, in [0, 1).
        weight_decay: L2 coefficient.
        clip: Greatest L2 norm of a step's summed gradient; None does not clip.
        candidates: Random architectures validated at the end, of which the one with the smallest loss is what the
            exploration finds. 1 takes a random one as it is.
        recalibrate: Training batches from which the batch-norm statistics of each of them are estimated anew; 0 keeps
            those of the training.
    """

    epochs: int = 120
    batch_size: int = 64
    lr: float = 0.05
    lr_min: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 4e-5
    clip: float | None = 5.0
    candidates: int = 10
    recalibrate: int = 20

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("candidates", 1), ("recalibrate", 0)):
            if not is_whole(getattr(self, name), least):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; an integer from {least} up is needed")
        for name in ("lr", "lr_min", "momentum", "weight_decay"):
            if not is_number(getattr(self, name)):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; a number is needed")
        if not (self.lr > 0 and 0 <= self.lr_min <= self.lr):
            raise InvalidInputError(f"lr is {self.lr}, lr_min {self.lr_min}; lr must be positive and lr_min in [0, lr]")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise InvalidInputError(
                f"momentum is {self.momentum}, weight_decay {self.weight_decay}; legal: [0, 1), and from 0 up"
            )
        if self.clip is not None and not (is_number(self.clip) and self.clip > 0):
            raise InvalidInputError(f"clip is {self.clip!r}; it must be positive, or None for no clipping")

    # What a member states.

    @abstractmethod
    def steps(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[Sequence[Architecture]]:
        """The paths of each step of one epoch, without an end.

        Args:
            space: Where architectures are drawn.
            rng: The only source of randomness, made anew from the seed and the epoch.
        """

    @property
    def first_teaches(self) -> bool:
        """Whether the other paths of a step learn from what the first one predicts. Default: all from the labels."""
        return False

    # Given once.

    def explore(
        self, space: SearchSpace, task: Task, rng: np.random.Generator, context: Context
    ) -> Generator[Report, bool, Sequence[Architecture]]:
        """Train the supernet, keep its weights, and return the best of some random architectures.

        Yields per epoch ``train_loss``, the mean loss over all steps and paths.

        Args:
            space: Must have a supernet.
            task: Its training data; validation data only to choose what is returned.
            rng: Draws the seeds of the order of the data and of the paths.
            context: Device, progress, checkpoints.

        Raises:
            UnsupportedError: The space has no supernet, or cannot be sampled in this way.
            InvalidInputError: The training data has no batch of 2 examples; or paths are to learn from each other, and
                the task's loss is not cross-entropy.
            NonFiniteError: A loss became NaN or infinite.
        """
        if self.first_teaches and task.loss is not cross_entropy:
            raise InvalidInputError(
                f"{self!r} has one path predict the targets of the others, for which the task's loss must be the "
                "default cross-entropy; distil=False takes any loss"
            )
        device = context.device
        # An epoch's generators are made from these and its number: there is no state of theirs to save.
        order_seed, path_seed, last_seed = (int(seed) for seed in rng.integers(2**31, size=3))
        source = task.load().train
        supernet = space.supernet()
        lay_out(supernet.to(device))
        supernet.train()
        weights = [parameter for parameter in supernet.parameters() if parameter.requires_grad]
        # foreach: hundreds of small tensors are stepped in a few calls.
        optimiser = torch.optim.SGD(
            weights, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, foreach=True
        )

        done, over = 0, False
        state = context.load()
        if state is not None:
            done = int(state["epoch"])
            supernet.load_state_dict(state["supernet"])
            optimiser.load_state_dict(state["optimiser"])
            seeding.set_state(state["generators"])
            over = bool(state["over"])

        for epoch in () if over else range(done + 1, self.epochs + 1):
            for group in optimiser.param_groups:
                group["lr"] = self._lr(epoch)
            order = torch.Generator().manual_seed(order_seed + epoch)
            steps = self.steps(space, np.random.default_rng([path_seed, epoch]))
            losses: list[Tensor] = []
            for x, y in source.batches(self.batch_size, order):
                if len(x) == 1:
                    continue  # batch norm has no variance of one example
                with context.step():
                    optimiser.zero_grad(set_to_none=True)
                    x, y = place(x, device), y.to(device)
                    losses.append(self._accumulate(supernet, space, task, next(steps), x, y))
                    if self.clip is not None:
                        nn.utils.clip_grad_norm_(weights, self.clip, foreach=True)
                    optimiser.step()
            if not losses:
                raise InvalidInputError("the training data has no batch of at least 2 examples")
            metrics = {"train_loss": float(torch.stack(losses).mean())}
            if not math.isfinite(metrics["train_loss"]):
                raise NonFiniteError(f"epoch {epoch}: train_loss is {metrics['train_loss']}")
            # Reported, then saved: a run killed in between reports the epoch again rather than never.
            go_on = yield Report(epoch, metrics)
            over = not go_on or epoch == self.epochs
            context.save(
                {
                    "epoch": epoch,
                    "over": over,
                    "supernet": dict(supernet.state_dict()),
                    "optimiser": optimiser.state_dict(),
                    "generators": seeding.get_state(),
                }
            )
            if over:
                break
        optimiser.zero_grad(set_to_none=True)
        context.keep(supernet.state_dict())
        return [self._best(supernet, space, task, last_seed, context)]

    def _lr(self, epoch: int) -> float:
        # Computed, not stepped, so that there is no schedule to save: epoch 1 has lr, the end of the last lr_min.
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2

    def _accumulate(
        self,
        supernet: Supernet,
        space: SearchSpace,
        task: Task,
        paths: Sequence[Architecture],
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        """Add up the gradients of some paths on one batch: gives their mean loss."""
        soft: Tensor | None = None
        losses = []
        for architecture in paths:
            logits = supernet(x, on_device(space, architecture, x.device))
            loss = task.compute_loss(logits, y) if soft is None else functional.cross_entropy(logits, soft)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            if soft is None and self.first_teaches:
                soft = logits.detach().softmax(dim=1)
        return torch.stack(losses).mean()

    def _best(self, supernet: Supernet, space: SearchSpace, task: Task, seed: int, context: Context) -> Architecture:
        """The random architecture whose path has the smallest validation loss; the first of equals."""
        rng = np.random.default_rng(seed)
        drawn = [space.sample(rng) for _ in range(self.candidates)]
        if len(drawn) == 1:
            return drawn[0]
        losses = []
        validation = task.load().validation
        for architecture in drawn:
            path = SupernetPath(supernet, space, architecture).eval()
            with kept_statistics(supernet):
                if self.recalibrate:
                    batches = calibration_batches(task, self.recalibrate, seed, context.device)
                    recalibrate(path, batches, context.step)
                scores = evaluate(path, task, validation, "val", context.device, context.step)
            losses.append(scores["val_loss"])
        return drawn[losses.index(min(losses))]
