"""The training loop: one network, one recipe, plain enough to read in one go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nasplat import seeding
from nasplat.data.sources import Source
from nasplat.errors import InvalidInputError, NonFiniteError
from nasplat.phases import Phase, Span
from nasplat.strategy import Report
from nasplat.task import Recipe, Task
from nasplat.teacher import Lesson, frozen, transfer_points

Step: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Wraps one optimisation step: waits while a measurement runs, raises when the time is up."""

EVALUATION_BATCH = 512


class Training:
    """A network in training, epoch by epoch.

    The schedule always spans the full recipe, so a network trained to a share of it and on from there passes through
    the same learning rates as one trained in one go.
    """

    def __init__(self, model: nn.Module, task: Task, device: torch.device, seed: int, step: Step) -> None:
        """Place the model on the device and make its optimiser.

        Args:
            model: Trained in place.
            task: Data, recipe, loss.
            device: Where to train.
            seed: Of the order of the examples and of augmentation, in [0, 2**32).
            step: Wraps each optimisation step.
        """
        self.model = lay_out(model.to(device))
        self.task = task
        self.device = device
        self.epoch = 0
        self._step = step
        self._order = torch.Generator().manual_seed(seed)
        self._spans = task.recipe.spans
        if any(self._taught(index)[0] for index in range(len(self._spans))):
            transfer_points(self.model)  # refused before the first epoch, not after a phase
        self._begin_phase(0)

    def _begin_phase(self, index: int) -> None:
        """Switch the model to a phase, and make its teacher, optimiser and schedule anew."""
        self._phase = index
        self._lesson = self._make_lesson()
        if self.phase is not None:
            self.phase.enter(self.model)
        self.optimiser = _optimiser(self.model, self.task.recipe, self.phase)

    def _taught(self, index: int) -> tuple[float, float]:
        """The weights of attention and logits in a phase."""
        teacher = self.task.recipe.teacher
        return teacher.weights(index, len(self._spans)) if teacher else (0.0, 0.0)

    def _make_lesson(self) -> Lesson | None:
        """The teacher of the phase, made while the model is still in the one before; None where it has none."""
        teacher, (attention, logits) = self.task.recipe.teacher, self._taught(self._phase)
        if teacher is None or not (attention or logits):
            return None
        if self._phase:
            network = frozen(self.model)
        else:
            assert teacher.network is not None
            with seeding.seeded(0):  # what it draws, the training does not
                network = frozen(lay_out(teacher.network().to(self.device)))
        return Lesson(teacher, network, self.model, attention, logits)

    @property
    def _span(self) -> Span:
        return self._spans[self._phase]

    @property
    def phase(self) -> Phase | None:
        """The phase that the model is in; None where the recipe has none."""
        return self._span.phase

    def epochs(self, until: int) -> Iterator[Report]:
        """Train up to epoch ``until`` (counted from 1), with one report an epoch.

        Raises:
            NonFiniteError: The loss is NaN or infinite.
        """
        splits = self.task.load()
        while self.epoch < until:
            if self.epoch == self._span.end:
                self._begin_phase(self._phase + 1)
            train_loss = self._train_epoch(splits.train)
            self.epoch += 1
            yield Report(self.epoch, {"train_loss": train_loss, **self.validate()})

    def validate(self) -> dict[str, float]:
        """Metrics on the validation split.

        Raises:
            NonFiniteError: A metric is NaN or infinite.
        """
        return evaluate(self.model, self.task, self.task.load().validation, "val", self.device, self._step)

    def _train_epoch(self, source: Source) -> float:
        recipe = self.task.recipe
        begin, end, phase = self._span
        lr, _ = _rates(recipe, phase)
        batches = -(-len(source) // recipe.batch_size) if isinstance(source, Sized) else 0
        self.model.train()
        total, count = torch.zeros((), device=self.device), 0
        for index, (x, y) in enumerate(source.batches(recipe.batch_size, self._order)):
            if index and len(x) == 1:
                continue  # a last batch of one example has no variance for a batch norm
            with self._step():
                if recipe.schedule == "cosine":
                    # Without a known length (a loader) the rate changes by the epoch.
                    passed = self.epoch - begin + (index / batches if batches else 0.0)
                    rate = lr * 0.5 * (1 + math.cos(math.pi * passed / (end - begin)))
                    for group in self.optimiser.param_groups:
                        group["lr"] = rate
                x, y = place(augment(x, recipe.augment, self._order), self.device), y.to(self.device)
                loss = self._loss(x, y)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if recipe.clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
                self.optimiser.step()
                total += loss.detach() * len(x)
                count += len(x)
        if not count:
            raise InvalidInputError(f"the training data gave no batch in epoch {self.epoch + 1}; a loader starts anew")
        mean = float(total) / count
        if not math.isfinite(mean):
            raise NonFiniteError(f"the training loss is {mean} in epoch {self.epoch + 1}")
        return mean

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one batch: from the labels, from auxiliary heads, and from the teacher."""
        if self._lesson is None:
            outputs, loss = self.model(x), torch.zeros((), device=self.device)
        else:
            outputs, loss = self._lesson(self.model, x)
            if not self._lesson.teacher.labels:
                return loss
        loss = loss + self.task.compute_loss(outputs, y)
        # Extra logits of the last training pass, and their weight in the loss: how a network offers auxiliary heads.
        auxiliary_weight: Any = getattr(self.model, "auxiliary_weight", 0.0)
        for extra in getattr(self.model, "auxiliary", ()):
            loss = loss + auxiliary_weight * self.task.compute_loss(extra, y)
        return loss

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` goes on from: tensors and plain values only."""
        return {
            "epoch": self.epoch,
            "phase": self._phase,
            "model": self.model.state_dict(),
            # That of a user's own network is not among it: its function makes it again.
            "teacher": self._lesson.network.state_dict() if self._lesson and self._phase else None,
            "optimiser": self.optimiser.state_dict(),
            "order": self._order.get_state(),
            "generators": seeding.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, exactly."""
        self.epoch, index = state["epoch"], state["phase"]
        if index and (before := self._spans[index - 1].phase):
            before.enter(self.model)  # the mode that the teacher is in
        self._begin_phase(index)
        if self._lesson and index:
            self._lesson.network.load_state_dict(state["teacher"])
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self._order.set_state(state["order"])
        seeding.set_state(state["generators"])


def evaluate(
    model: nn.Module, task: Task, source: Source, prefix: str, device: torch.device, step: Step
) -> dict[str, float]:
    """Metrics of a model on one split, named ``<prefix>_<metric>``.

    Raises:
        NonFiniteError: A metric is NaN or infinite.
    """
    was_training = model.training
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    model.eval()
    try:
        for x, y in source.batches(EVALUATION_BATCH):
            with step(), torch.inference_mode():
                outputs.append(model(place(x, device)).cpu())
                targets.append(y)
    finally:
        model.train(was_training)
    scores = task.score(torch.cat(outputs), torch.cat(targets), prefix)
    for name, value in scores.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value}")
    return scores


def lay_out(model: nn.Module) -> nn.Module:
    """Kernels of 2-D convolutions in channels-last format, in place.

    Grouped convolutions train 2 to 3.5 times faster in it on a CPU. It is defined for 4-D tensors only.
    """
    if all(parameter.ndim <= 4 for parameter in model.parameters()):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def place(x: Tensor, device: torch.device) -> Tensor:
    """A batch on the device; images ``(n, c, h, w)`` in channels-last format."""
    if x.ndim == 4:
        return x.to(device, memory_format=torch.channels_last)
    return x.to(device)


def augment(x: Tensor, kinds: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Random changes to a batch of images ``(n, c, h, w)``, each image its own (see ``Recipe.augment``)."""
    if not kinds:
        return x
    n, _, h, w = x.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    if "flip" in kinds:
        x = torch.where(draw(2).bool()[:, None, None, None], x.flip(-1), x)
    rows, columns = torch.arange(h), torch.arange(w)
    if "shift" in kinds:
        dy, dx = (draw(2 * (side // 8) + 1) - side // 8 for side in (h, w))
        y_from, x_from = rows + dy[:, None], columns + dx[:, None]
        inside = ((y_from >= 0) & (y_from < h))[:, None, :, None] & ((x_from >= 0) & (x_from < w))[:, None, None, :]
        each = torch.arange(n)[:, None, None]
        shifted = x.permute(0, 2, 3, 1)[each, y_from.clamp(0, h - 1)[:, :, None], x_from.clamp(0, w - 1)[:, None, :]]
        x = shifted.permute(0, 3, 1, 2) * inside
    if "cutout" in kinds:
        cy, cx = draw(h), draw(w)
        from_y, from_x = rows - cy[:, None] + h // 4, columns - cx[:, None] + w // 4
        hole_y, hole_x = (from_y >= 0) & (from_y < h // 2), (from_x >= 0) & (from_x < w // 2)
        x = x * ~(hole_y[:, None, :, None] & hole_x[:, None, None, :])
    return x


def _rates(recipe: Recipe, phase: Phase | None) -> tuple[float, float]:
    """Learning rate at the start, and weight decay."""
    lr, decay = (None, None) if phase is None else (phase.lr, phase.weight_decay)
    return recipe.lr if lr is None else lr, recipe.weight_decay if decay is None else decay


def _optimiser(model: nn.Module, recipe: Recipe, phase: Phase | None) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    lr, weight_decay = _rates(recipe, phase)
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    kind = torch.optim.Adam if recipe.optimiser == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=True)
