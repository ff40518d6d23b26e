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
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nasplat import seeding
from nasplat.architecture import Architecture
from nasplat.checks import is_whole
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
    """

    moment: Moment
    supernet: Supernet
    weights: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    parameters: dict[str, Tensor]
    loss: Callable[[Batch, Relaxed], Tensor]


@dataclass(frozen=True)
class Bilevel:
    """Explorer: trains a supernet and the weights of its options in turn, and discretises it.

    One half of the training data teaches the network weights, the other half the architecture parameters, a step each
    in turn. Data that comes as loaders cannot be halved: there the architecture parameters learn from the validation
    data. Of the task's recipe nothing is used but the label smoothing of its loss.

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
        first, second = self.alpha_betas
        object.__setattr__(self, "alpha_betas", (first, second))
        object.__setattr__(self, "stages", tuple(self.stages))
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
        if not is_whole(self.partial):
            raise InvalidInputError(f"partial is {self.partial!r}; legal: an integer from 1 up")
        if self.clip is not None and not self.clip > 0:
            raise InvalidInputError(f"clip is {self.clip}; it must be positive, or None for no clipping")
        for name, kind in (("resource", Resource), ("early_stop", EigenvalueStop)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InvalidInputError(f"{name} is {value!r}; a {kind.__module__}.{kind.__name__}, or None, is needed")
        if not all(isinstance(stage, Stage) for stage in self.stages):
            raise InvalidInputError(f"stages is {self.stages!r}; a sequence of {Stage.__module__}.Stage is needed")
        if self.stages and self.stages[0].options is not None:
            raise InvalidInputError("the first stage has options; there is no stage before it that could rank them")

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
        named = moment.space.temperatures()
        return {
            name: torch.softmax(parameters[name] / (self.temperature or named.get(name, 1.0)), dim=0)
            for name in moment.alive
        }

    def draw(self, parameters: Parameters, moment: Moment) -> dict[str, Tensor]:
        """The weights of one training step, drawn from torch's global generator where at all. Default: the mixture."""
        return self.mixture(parameters, moment)

    def penalty(self, parameters: Parameters, moment: Moment) -> Tensor | None:
        """What the architecture parameters' loss has besides; a scalar. Default: nothing."""
        return None

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

    def architecture_loss(self, run: Run, validation: Batch) -> Tensor:
        """Loss of the drawn mixtures on a batch, with penalty and resource."""
        moment, parameters = run.moment, run.parameters
        loss = run.loss(validation, self.draw(parameters, moment))
        penalty = self.penalty(parameters, moment)
        if penalty is not None:
            loss = loss + penalty
        if self.resource is not None:
            loss = loss + self.resource.loss(self.shares(run))
        return loss

    def shares(self, run: Run) -> Relaxed:
        """The mixture with a weight for every option, dropped ones 0."""
        return _full(self.mixture(run.parameters, run.moment), run.moment)

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
            UnsupportedError: The space has no supernet, or not of the depth or the channels that a stage asks for.
            InvalidInputError: The resource's table is of another space.
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
        state = context.load()
        begin, steps = 0, 0
        if state is not None:
            begin = int(state["stage"])
            alive = {name: tuple(options) for name, options in state["alive"].items()}
        stage_of = self.stages or (Stage(),)
        work: _Work | None = None
        for index in range(begin, len(stage_of)):
            if work is not None:
                alive = self._survivors(work.run, stage_of[index].options)
            work = _Work(self, self._at_depth(space, stage_of[index]), task, alive, stage_of[index], context)
            work.begin(np.random.default_rng(seeds[2 + index]))
            if state is not None:
                work.load(state, orders)
                steps, state = int(state["steps"]), None
            while not work.over:
                metrics = work.epoch(source, alpha_source, orders)
                steps += 1
                # Reported, then saved: a run killed in between reports the epoch again rather than never.
                go_on = yield Report(steps, metrics)
                context.save({"stage": index, "steps": steps, **work.state(orders)})
                if not go_on:
                    return self._result(space, work.run, context)
        assert work is not None
        return self._result(space, work.run, context)

    def _result(self, space: SearchSpace, run: Run, context: Context) -> list[Architecture]:
        context.keep(run.supernet.state_dict())
        return [space.discretise({name: share.detach().cpu() for name, share in self.shares(run).items()})]

    def _survivors(self, run: Run, count: int | None) -> dict[str, tuple[Option, ...]]:
        """The ``count`` strongest options of each choice (all where None), in the order of the choice."""
        alive = dict(run.moment.alive)
        for name, mixture in self.mixture(run.parameters, run.moment).items():
            ranked = sorted(range(len(mixture)), key=lambda index: -float(mixture[index]))
            alive[name] = tuple(alive[name][index] for index in sorted(ranked[:count]))
        return alive

    def _at_depth(self, space: SearchSpace, stage: Stage) -> SearchSpace:
        if stage.cells is None:
            return space
        deeper: Any = space
        try:
            deeper = dataclasses.replace(deeper, cells=stage.cells)
        except TypeError as error:
            raise UnsupportedError(
                f"{space.name} has no field 'cells', so a stage cannot have {stage.cells} of them; give cells=None"
            ) from error
        assert isinstance(deeper, SearchSpace)
        if deeper.choices != space.choices:
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
        self._partial = stage.partial or strategy.partial
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
        wanted: dict[str, Any] = {}
        if dict(moment.alive) != moment.space.alive(None):
            wanted["keep"] = moment.alive
        if self._partial != 1:
            wanted["partial"] = self._partial
        supernet = moment.space.supernet(**wanted)
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
        self.run = Run(moment, supernet, weights, optimiser, parameters, self._loss)

    @property
    def over(self) -> bool:
        """Whether the stage has ended."""
        return self._stopped or self._done == self._strategy.epochs

    def _loss(self, batch: Batch, mixture: Relaxed) -> Tensor:
        x, y = batch
        return self._task.compute_loss(self.run.supernet(x, _full(mixture, self.run.moment)), y)

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
                expected = strategy.resource.table.expected(shares)
                metrics[f"expected_{strategy.resource.table.metric}"] = float(expected)
        if strategy.early_stop is not None and strategy.early_stop.due(self._done):
            metrics["alpha_eigenvalue"] = self._look(strategy.early_stop, alpha_source)
        broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteError(f"epoch {run.moment.epoch}: {', '.join(broken)}")
        return metrics

    def _look(self, rule: EigenvalueStop, alpha_source: Source) -> float:
        """Record the dominant eigenvalue, and go back to an earlier record where the rule says so."""
        run = self.run
        batch = self._place(next(_batches(alpha_source, rule.batch_size or self._strategy.batch_size, None)))
        buffers = [buffer.clone() for buffer in run.supernet.buffers()]
        value = dominant_eigenvalue(
            lambda: self._loss(batch, self._strategy.mixture(run.parameters, run.moment)),
            list(run.parameters.values()),
            self._context.step,
        )
        with torch.no_grad():
            for buffer, before in zip(run.supernet.buffers(), buffers, strict=True):
                buffer.copy_(before)
        now = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
        self._records.append({"epoch": self._done, "eigenvalue": value, "parameters": now})
        back = rule.go_back([record["eigenvalue"] for record in self._records], self._done)
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


def _full(mixture: Relaxed, moment: Moment) -> dict[str, Tensor]:
    """A weight for every option of every choice: those that were dropped have none."""
    full: dict[str, Tensor] = {}
    for name, options in moment.space.alive(None).items():
        alive, weights = moment.alive[name], mixture[name]
        if len(alive) < len(options):
            places = torch.tensor([options.index(option) for option in alive], device=weights.device)
            weights = weights.new_zeros(len(options)).index_copy(0, places, weights)
        full[name] = weights
    return full


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
