"""Differentiable search: what DARTS and its descendants share.

Two sets of parameters learn in turn, each on its own half of the training data: the weights of a supernet, and the
architecture parameters from which the weights of its mixtures are made (Liu, Simonyan, Yang 2019, arXiv:1806.09055).
A member of the family is a subclass of :class:`Bilevel` that states how it differs: what its architecture parameters
are, how mixtures are made or drawn from them, what it adds to their loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nasplat import seeding
from nasplat.architecture import Architecture
from nasplat.checks import is_number, is_whole, sequence
from nasplat.cost.resource import Resource
from nasplat.data.sources import Source
from nasplat.errors import InvalidInputError, NonFiniteError, UnsupportedError
from nasplat.space import Option, Relaxed, SearchSpace, Supernet
from nasplat.strategy import Context, Report
from nasplat.task import Task
from nasplat.train import lay_out, place
from nasplat.weight_sharing.eigenvalue import EigenvalueStop, dominant_eigenvalue

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs ``(b, ...)`` and targets ``(b, ...)``, on the device."""

Parameters: TypeAlias = Mapping[str, Tensor]
"""The architecture parameters by name."""


@dataclass(frozen=True)
class Stage:
    """One stage of a progressive search. Each begins with a new supernet and new architecture parameters.

    Attributes:
        options: Options alive per choice; those that the stage before weighed least are dropped. None drops none.
        cells: Depth of the supernet, for spaces with a field ``cells``. None is the space's own.
        partial: As :attr:`Bilevel.partial`, for this stage. None is the strategy's own.
    """

    options: int | None = None
    cells: int | None = None
    partial: int | None = None

    def __post_init__(self) -> None:
        if self.options is not None and not is_whole(self.options, 2):
            raise InvalidInputError(f"options of a stage is {self.options!r}; None, or an integer from 2 up")
        for name in ("cells", "partial"):
            if getattr(self, name) is not None and not is_whole(getattr(self, name)):
                raise InvalidInputError(f"{name} of a stage is {getattr(self, name)!r}; None, or an integer from 1 up")


@dataclass(frozen=True)
class Moment:
    """Where a search is when its mixtures are asked for.

    Attributes:
        space: The space, at the depth of the stage.
        alive: The options of each choice that are still alive.
        epoch: In the stage, from 1.
        epochs: Of the stage.
    """

    space: SearchSpace
    alive: Mapping[str, tuple[Option, ...]]
    epoch: int
    epochs: int

    @property
    def progress(self) -> float:
        """From 0 in the first epoch of the stage to 1 in the last."""
        return (self.epoch - 1) / max(self.epochs - 1, 1)

    @cached_property
    def alike(self) -> dict[tuple[int, float], tuple[str, ...]]:
        """The choices, by the number of their alive options and the temperature that the space names.

        Those that agree in both can be computed as rows of one tensor.
        """
        named = self.space.temperatures()
        alike: dict[tuple[int, float], tuple[str, ...]] = {}
        for name, options in self.alive.items():
            key = len(options), named.get(name, 1.0)
            alike[key] = (*alike.get(key, ()), name)
        return alike


@dataclass
class Run:
    """A stage under way: what a member of the family may compute its architecture gradient with.

    Attributes:
        moment: Where it is.
        supernet: In training mode.
        weights: The supernet's trainable parameters.
        optimiser: Of the weights.
        parameters: The architecture parameters, all leaves with a gradient.
        loss: Training loss of a batch under mixtures with a weight per alive option.
        places: Where the alive options stand among all options of all choices; None where all are alive.
    """

    moment: Moment
    supernet: Supernet
    weights: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    parameters: dict[str, Tensor]
    loss: Callable[[Batch, Relaxed], Tensor]
    places: Tensor | None = None

    def full(self, mixture: Relaxed, dropped: float = 0.0) -> dict[str, Tensor]:
        """A weight for every option of every choice, from mixtures of the alive ones.

        Args:
            mixture: Per choice shape ``(alive,)``.
            dropped: The weight of the others.
        """
        if self.places is None:
            return dict(mixture)
        sizes = {name: len(options) for name, options in self.moment.space.alive(None).items()}
        weights = torch.cat([mixture[name] for name in sizes])
        every = weights.new_full((sum(sizes.values()),), dropped).index_copy(0, self.places, weights)
        return dict(zip(sizes, torch.split(every, list(sizes.values())), strict=True))


@dataclass(frozen=True)
class Bilevel:
    """Explorer: trains a supernet and the weights of its options in turn, and discretises it.

    One half of the training data teaches the network weights, the other half the architecture parameters, a step each
    in turn. Data that comes as loaders cannot be halved: there the architecture parameters learn from the validation
    data, from the beginning in each epoch: let the loader shuffle. Of the task's recipe nothing is used but the label
    smoothing of its loss.

    Attributes:
        epochs: Passes over the half that teaches the weights, warm-up included; of each stage where there are several.
        batch_size: Examples a step, of each half.
        warmup: Epochs at the start of a stage in which the weights learn alone.
        optimiser: Of the weights: ``sgd`` or ``adam``.
        lr: Learning rate of the weights at the start of a stage.
        lr_min: And at its end; in between it follows a cosine, a step an epoch.
        momentum: Of SGD; Adam takes ``(0.9, 0.999)``.
        weight_decay: L2 coefficient of the weights.
        clip: Greatest L2 norm of the weights' gradient; None does not clip.
        alpha_lr: Learning rate of the architecture parameters (Adam).
        alpha_betas: Of their Adam.
        alpha_weight_decay: Their L2 coefficient.
        temperature: Of the softmax, for every choice; None takes what the space names (``SearchSpace.temperatures``).
        partial: One in so many channels goes through the mixtures, the others pass by (PC-DARTS); 1 is all.
        stages: Of a progressive search; empty is one stage with everything alive.
        early_stop: Ends a stage when the loss landscape sharpens (R-DARTS); None trains every epoch.
        resource: A term in the loss that pulls towards a target cost; None looks at the task's loss alone.
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
    partial: int = 1
    stages: tuple[Stage, ...] = ()
    early_stop: EigenvalueStop | None = None
    resource: Resource | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("alpha_betas", "stages"):
            object.__setattr__(self, name, sequence(owner, name, getattr(self, name)))
        for name, least in (("epochs", 1), ("batch_size", 2), ("warmup", 0), ("partial", 1)):
            if not is_whole(getattr(self, name), least):
                why = "; batch norm needs at least 2 examples" if name == "batch_size" else ""
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; legal: an integer from {least} up{why}")
        if self.warmup >= self.epochs:
            raise InvalidInputError(f"warmup is {self.warmup} of {self.epochs} epochs; legal: 0 to epochs - 1")
        if self.optimiser not in ("sgd", "adam"):
            raise InvalidInputError(f"optimiser is {self.optimiser!r}; legal: 'sgd', 'adam'")
        for name in ("lr", "alpha_lr", "temperature", "clip"):
            value = getattr(self, name)
            none = name in ("temperature", "clip")
            if not (none and value is None) and not (is_number(value) and value > 0):
                raise InvalidInputError(f"{name} is {value!r}; legal: {'None, or ' if none else ''}a positive number")
        if not is_number(self.lr_min) or not 0 <= self.lr_min <= self.lr:
            raise InvalidInputError(f"lr_min is {self.lr_min!r}; legal: 0 to lr, which is {self.lr}")
        for name in ("weight_decay", "alpha_weight_decay"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; legal: a number from 0 up")
        if not _is_rate(self.momentum):
            raise InvalidInputError(f"momentum is {self.momentum!r}; legal: a number from 0 up, below 1")
        if len(self.alpha_betas) != 2 or not all(map(_is_rate, self.alpha_betas)):
            raise InvalidInputError(
                f"alpha_betas is {self.alpha_betas!r}; legal: two numbers from 0 up, below 1, such as (0.5, 0.999)"
            )
        for name, kind in (("resource", Resource), ("early_stop", EigenvalueStop)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InvalidInputError(
                    f"{name} is {value!r}; legal: None, or a {kind.__module__}.{kind.__name__}, made in Python"
                )
        if not all(isinstance(stage, Stage) for stage in self.stages):
            raise InvalidInputError(
                f"stages is {self.stages!r}; legal: empty, or a sequence of {Stage.__module__}.Stage, made in Python"
            )
        if self.stages and self.stages[0].options is not None:
            raise InvalidInputError(
                f"the first of the stages has options={self.stages[0].options}, and there is none before it that could "
                "rank them; legal: None"
            )

    # How a member of the family differs.

    def initial(self, moment: Moment, rng: np.random.Generator) -> dict[str, Tensor]:
        """The architecture parameters at the start of a stage. Default: alphas, ``1e-3 * N(0, 1)`` per alive option.

        Args:
            moment: The first epoch of the stage.
            rng: The only source of randomness.

        Returns:
            By name, float32, on the CPU. Alphas bear the name of their choice.
        """
        return {
            name: torch.from_numpy(1e-3 * rng.standard_normal(len(options))).float()
            for name, options in moment.alive.items()
        }

    def mixture(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """Per choice the weight of each alive option: what options are judged by, shape ``(alive,)``.

        Default: ``softmax(alpha / temperature)``.
        """
        mixture: dict[str, Tensor] = {}
        # Choices that are alike as rows of one tensor: a few calls instead of some for each choice.
        for (_, named), names in moment.alike.items():
            logits = torch.stack([parameters[name] for name in names]) / (self.temperature or named)
            mixture.update(zip(names, torch.softmax(logits, dim=1).unbind(), strict=True))
        return {name: mixture[name] for name in moment.alive}

    def draw(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """The weights of one training step, drawn from torch's global generator where at all. Default: the mixture."""
        return self.mixture(parameters, moment)

    def penalty(self, parameters: Parameters, moment: Moment) -> Tensor | None:
        """What the architecture parameters' loss has besides; a scalar. Default: nothing."""
        return None

    def odds(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """Per choice how often each alive option counts in an expected cost, shape ``(alive,)``.

        Default: the mixture over its sum, so that a choice counts once also where its weights do not sum to 1.
        """
        return {name: weights / weights.sum() for name, weights in self.mixture(parameters, moment).items()}

    def metrics(self, run: Run) -> dict[str, float]:
        """What an epoch reports besides, by name, taken after its last step without gradients. Default: nothing."""
        return {}

    def architecture_gradient(self, run: Run, train: Batch, validation: Batch) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of the architecture parameters. Default: first order, at the current weights.

        Args:
            run: The stage under way.
            train: The batch that the weights learn from next.
            validation: The batch that the architecture parameters learn from.

        Returns:
            The loss, detached, and a gradient per parameter, in their order.
        """
        loss = self.architecture_loss(run, validation)
        # Of these alone: the gradients of the weights would be computed for nothing.
        gradients = torch.autograd.grad(loss, list(run.parameters.values()), allow_unused=True)
        return loss.detach(), list(gradients)

    # Given once.

    @property
    def keeps_whole_supernet(self) -> bool:
        """Whether it ends with weights for every option, channel and cell, so that paths can be scored with them."""
        return self.partial == 1 and all(stage == Stage() for stage in self.stages)

    def architecture_loss(self, run: Run, validation: Batch) -> Tensor:
        """Loss of the drawn mixtures on a batch, with penalty and resource."""
        moment, parameters = run.moment, run.parameters
        loss = run.loss(validation, self.draw(parameters, moment))
        penalty = self.penalty(parameters, moment)
        if penalty is not None:
            loss = loss + penalty
        if self.resource is not None:
            loss = loss + self.resource.loss(run.full(self.odds(parameters, moment)))
        return loss

    def shares(self, run: Run) -> Relaxed:
        """The mixture with a weight for every option, dropped ones 0."""
        return run.full(self.mixture(run.parameters, run.moment))

    def explore(
        self, space: SearchSpace, task: Task, rng: np.random.Generator, context: Context
    ) -> Generator[Report, bool, Sequence[Architecture]]:
        """Train the supernet and return its strongest architecture.

        Yields per epoch ``train_loss`` and ``alpha_loss`` (means over the epoch), ``mean_max_weight``, the largest
        share of an option in its choice, averaged over the choices (1 is as good as discrete), with a resource the
        expected cost, named ``expected_<metric>``, and with early stopping, in the epochs that look at it,
        ``alpha_eigenvalue``.

        Args:
            space: Must have a supernet.
            task: Its training data.
            rng: Draws the architecture parameters, the halves and the orders of the data.
            context: Device, progress, checkpoints.

        Raises:
            UnsupportedError: The space has no supernet, or not of the depth, the options or the channels that a stage
                asks for; of all stages before the first begins.
            InvalidInputError: The resource's table is of another space, or the space refuses what a stage asks for.
            NonFiniteError: A loss or an architecture parameter became NaN or infinite.
            ArchitectureError: The space refuses the architecture that was found.
        """
        if self.resource is not None and self.resource.table.space != space.identity:
            raise InvalidInputError(f"the resource's table is of {self.resource.table.space}, not of {space.identity}")
        halves, *seeds = (int(seed) for seed in rng.integers(2**31, size=3 + len(self.stages or (None,))))
        data = task.load()
        try:
            source, alpha_source = data.train.split(0.5, halves)
        except UnsupportedError:
            source, alpha_source = data.train, data.validation
        orders = [torch.Generator().manual_seed(seed) for seed in seeds[:2]]

        alive = space.alive(None)
        stages = self.stages or (Stage(),)
        spaces = [self._at_depth(space, stage) for stage in stages]
        state = context.load()
        begin, steps = 0, 0
        if state is None:
            self._try_later(spaces, stages)
        else:
            begin = int(state["stage"])
            alive = {name: tuple(options) for name, options in state["alive"].items()}
        work: _Work | None = None
        for index in range(begin, len(stages)):
            if work is not None:
                alive = self._survivors(work.run, stages[index].options)
            work = _Work(self, spaces[index], task, alive, stages[index], context)
            work.begin(np.random.default_rng(seeds[2 + index]))
            if state is not None:
                work.load(state, orders)
                if state["ended"]:  # it was told so, and killed before it could answer
                    return self._result(space, work.run, context)
                steps, state = int(state["steps"]), None
            while not work.over:
                metrics = work.epoch(source, alpha_source, orders)
                steps += 1
                # Reported, then saved: a run killed in between reports the epoch again rather than never.
                go_on = yield Report(steps, metrics)
                context.save({"stage": index, "steps": steps, "ended": not go_on, **work.state(orders)})
                if not go_on:
                    return self._result(space, work.run, context)
        assert work is not None
        return self._result(space, work.run, context)

    def _result(self, space: SearchSpace, run: Run, context: Context) -> list[Architecture]:
        context.keep(run.supernet.state_dict())
        with torch.no_grad():
            # A dropped option stays dropped, also where the weight of an alive one has underflown to 0.
            shares = run.full(self.mixture(run.parameters, run.moment), dropped=-math.inf)
        return [space.discretise({name: share.cpu() for name, share in shares.items()})]

    def _survivors(self, run: Run, count: int | None) -> dict[str, tuple[Option, ...]]:
        """The ``count`` strongest options of each choice (all where None), in the order of the choice."""
        alive = dict(run.moment.alive)
        for name, mixture in self.mixture(run.parameters, run.moment).items():
            weights = mixture.tolist()
            ranked = sorted(range(len(weights)), key=lambda index: -weights[index])
            alive[name] = tuple(alive[name][index] for index in sorted(ranked[:count]))
        return alive

    def _try_later(self, spaces: Sequence[SearchSpace], stages: Sequence[Stage]) -> None:
        """Make what later stages ask of the space once, so that what it refuses costs no earlier stage."""
        with seeding.seeded(0):  # what is drawn here, the run does not see
            for space, stage in list(zip(spaces, stages, strict=True))[1:]:
                alive = {name: options[: stage.options] for name, options in space.alive(None).items()}
                self._supernet(Moment(space, alive, 1, self.epochs), stage)

    def _supernet(self, moment: Moment, stage: Stage) -> Supernet:
        wanted: dict[str, Any] = {}
        if dict(moment.alive) != moment.space.alive(None):
            wanted["keep"] = moment.alive
        partial = stage.partial or self.partial
        if partial != 1:
            wanted["partial"] = partial
        return moment.space.supernet(**wanted)

    def _at_depth(self, space: SearchSpace, stage: Stage) -> SearchSpace:
        if stage.cells is None:
            return space
        if not dataclasses.is_dataclass(space) or "cells" not in {field.name for field in dataclasses.fields(space)}:
            raise UnsupportedError(
                f"{space.name} has no field 'cells', so a stage cannot have {stage.cells} of them; legal: cells=None"
            )
        given: Any = space
        deeper: SearchSpace = dataclasses.replace(given, cells=stage.cells)
        if deeper.alive(None) != space.alive(None):
            raise UnsupportedError(
                f"{space.name} with cells={stage.cells} has other choices than with its own depth; legal: depths at "
                "which every kind of cell occurs"
            )
        return deeper

    def _lr(self, epoch: int) -> float:
        # Computed, not stepped, so that there is no schedule to save: epoch 1 has lr, the end of the last lr_min.
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2


class _Work:
    """One stage: its supernet, its optimisers, and its epochs."""

    def __init__(
        self,
        strategy: Bilevel,
        space: SearchSpace,
        task: Task,
        alive: Mapping[str, tuple[Option, ...]],
        stage: Stage,
        context: Context,
    ) -> None:
        self._strategy = strategy
        self._task = task
        self._context = context
        self._device = context.device
        self._stage = stage
        self._moment = Moment(space, alive, 1, strategy.epochs)
        self._done = 0
        self._stopped = False
        self._records: list[dict[str, Any]] = []

    def begin(self, rng: np.random.Generator) -> None:
        """Make the supernet, the architecture parameters and the optimisers."""
        strategy, moment = self._strategy, self._moment
        parameters = {
            name: value.to(self._device).requires_grad_() for name, value in strategy.initial(moment, rng).items()
        }
        supernet = strategy._supernet(moment, self._stage)
        lay_out(supernet.to(self._device)).train()
        weights = [parameter for parameter in supernet.parameters() if parameter.requires_grad]
        optimiser: torch.optim.Optimizer
        # foreach: hundreds of small tensors are stepped in a few calls.
        if strategy.optimiser == "sgd":
            optimiser = torch.optim.SGD(
                weights, strategy.lr, momentum=strategy.momentum, weight_decay=strategy.weight_decay, foreach=True
            )
        else:
            optimiser = torch.optim.Adam(weights, strategy.lr, weight_decay=strategy.weight_decay, foreach=True)
        self._alpha_optimiser = torch.optim.Adam(
            list(parameters.values()),
            strategy.alpha_lr,
            betas=strategy.alpha_betas,
            weight_decay=strategy.alpha_weight_decay,
            foreach=True,
        )
        places = None
        if dict(moment.alive) != moment.space.alive(None):
            kept = [
                option in moment.alive[name] for name, options in moment.space.alive(None).items() for option in options
            ]
            places = torch.tensor(kept).nonzero().flatten().to(self._device)
        self.run = Run(moment, supernet, weights, optimiser, parameters, self._loss, places)

    @property
    def over(self) -> bool:
        """Whether the stage has ended."""
        return self._stopped or self._done == self._strategy.epochs

    def _loss(self, batch: Batch, mixture: Relaxed) -> Tensor:
        x, y = batch
        return self._task.compute_loss(self.run.supernet(x, self.run.full(mixture)), y)

    def _place(self, batch: tuple[Tensor, Tensor]) -> Batch:
        return place(batch[0], self._device), batch[1].to(self._device)

    def epoch(self, source: Source, alpha_source: Source, orders: Sequence[torch.Generator]) -> dict[str, float]:
        """One pass over the data of the weights; its metrics."""
        strategy, run = self._strategy, self.run
        run.moment = dataclasses.replace(run.moment, epoch=self._done + 1)
        for group in run.optimiser.param_groups:
            group["lr"] = strategy._lr(run.moment.epoch)
        losses: list[Tensor] = []
        alpha_losses: list[Tensor] = []
        alpha_batches = _endless(alpha_source, strategy.batch_size, orders[1])
        for given in _batches(source, strategy.batch_size, orders[0]):
            batch = self._place(given)
            if run.moment.epoch > strategy.warmup:
                validation = self._place(next(alpha_batches))
                with self._context.step():
                    alpha_losses.append(self._architecture_step(batch, validation))
            with self._context.step():
                losses.append(self._weight_step(batch))
        if not losses:
            raise InvalidInputError("the training data has no batch of at least 2 examples")
        self._done += 1
        return self._metrics(losses, alpha_losses, alpha_source)

    def _architecture_step(self, train: Batch, validation: Batch) -> Tensor:
        run = self.run
        loss, gradients = self._strategy.architecture_gradient(run, train, validation)
        for parameter, gradient in zip(run.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        self._alpha_optimiser.step()
        return loss

    def _weight_step(self, batch: Batch) -> Tensor:
        run, clip = self.run, self._strategy.clip
        with torch.no_grad():
            drawn = self._strategy.draw(run.parameters, run.moment)
        run.optimiser.zero_grad()
        loss = self._loss(batch, drawn)
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            nn.utils.clip_grad_norm_(run.weights, clip)
        run.optimiser.step()
        return loss.detach()

    def _metrics(
        self, losses: Sequence[Tensor], alpha_losses: Sequence[Tensor], alpha_source: Source
    ) -> dict[str, float]:
        strategy, run = self._strategy, self.run
        metrics = {"train_loss": float(torch.stack(list(losses)).mean())}
        if alpha_losses:
            metrics["alpha_loss"] = float(torch.stack(list(alpha_losses)).mean())
        with torch.no_grad():
            shares = strategy.shares(run)
            metrics["mean_max_weight"] = float(
                torch.stack([share.max() / share.sum() for share in shares.values()]).mean()
            )
            if strategy.resource is not None:
                odds = run.full(strategy.odds(run.parameters, run.moment))
                expected = strategy.resource.table.expected(odds)
                metrics[f"expected_{strategy.resource.table.metric}"] = float(expected)
            metrics |= strategy.metrics(run)
        rule = strategy.early_stop
        # Not in the warm-up: its architecture parameters are nothing to go back to.
        if rule is not None and self._done > strategy.warmup and rule.due(self._done):
            metrics["alpha_eigenvalue"] = self._look(rule, alpha_source)
        broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(f"epoch {run.moment.epoch}: {', '.join(broken)}")
        return metrics

    def _look(self, rule: EigenvalueStop, alpha_source: Source) -> float:
        """Record the dominant eigenvalue, and go back to an earlier record where the rule says so."""
        run = self.run
        # The same examples each time, drawn: data may come class by class.
        order = torch.Generator().manual_seed(0)
        batch = self._place(next(_batches(alpha_source, rule.batch_size or self._strategy.batch_size, order)))
        buffers = list(run.supernet.buffers())
        before = [buffer.clone() for buffer in buffers]
        value = dominant_eigenvalue(
            lambda: self._loss(batch, self._strategy.mixture(run.parameters, run.moment)),
            list(run.parameters.values()),
            self._context.step,
        )
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, before)
        now = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
        self._records.append({"epoch": self._done, "eigenvalue": value, "parameters": now})
        back = rule.go_back(
            [record["eigenvalue"] for record in self._records], [record["epoch"] for record in self._records]
        )
        if back is not None:
            self._stopped = True
            with torch.no_grad():
                for name, parameter in run.parameters.items():
                    parameter.copy_(self._records[back]["parameters"][name])
        return value

    def state(self, orders: Sequence[torch.Generator]) -> dict[str, Any]:
        """What :meth:`load` goes on from: tensors and plain values only."""
        run = self.run
        return {
            "epoch": self._done,
            "stopped": self._stopped,
            "alive": {name: list(options) for name, options in run.moment.alive.items()},
            "parameters": {name: parameter.detach() for name, parameter in run.parameters.items()},
            "records": self._records,
            "supernet": dict(run.supernet.state_dict()),
            "optimiser": run.optimiser.state_dict(),
            "alpha_optimiser": self._alpha_optimiser.state_dict(),
            "orders": [generator.get_state() for generator in orders],
            "generators": seeding.get_state(),
        }

    def load(self, state: Mapping[str, Any], orders: Sequence[torch.Generator]) -> None:
        """Go on from a state, exactly."""
        run = self.run
        self._done, self._stopped = int(state["epoch"]), bool(state["stopped"])
        run.moment = dataclasses.replace(run.moment, epoch=max(self._done, 1))
        self._records = [dict(record) for record in state["records"]]
        run.supernet.load_state_dict(state["supernet"])
        run.optimiser.load_state_dict(state["optimiser"])
        self._alpha_optimiser.load_state_dict(state["alpha_optimiser"])
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                parameter.copy_(state["parameters"][name])
        for generator, saved in zip(orders, state["orders"], strict=True):
            generator.set_state(saved)
        seeding.set_state(state["generators"])


def _is_rate(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _batches(source: Source, size: int, order: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
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
            raise InvalidInputError("the data for the architecture parameters has no batch of at least 2 examples")
