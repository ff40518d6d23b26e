"""Joint search: the architecture and how it is trained, as one space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.drawing import Block, Sketch, Stages
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.ranges import Range
from nasplat.space import Group, Option, Relaxed, SearchSpace, Supernet
from nasplat.task import Recipe

PREFIX = "recipe/"
"""Begins the names of the choices that are hyper-parameters: ``recipe/lr``."""

REFUSED: Mapping[str, str] = {
    "epochs": "how long a candidate is trained is the budget's business: candidates of unlike training do not compare",
    "augment": "its values are tuples, and an option is a single number or word",
    "teacher": "its value is an object, and an option is a single number or word",
}
"""Fields of a recipe that cannot be searched, and why."""

_EPOCHS = 10_000  # enough for any phases: whether the task's own epochs are, its trials will say


@dataclass(frozen=True)
class JointSpace(SearchSpace):
    """The architectures of a space, each with every setting of some hyper-parameters of its training.

    Example::

        space = JointSpace(Bats(classes=10), {
            "lr": Float(1e-4, 1e-1, log=True),
            "optimiser": ("adam", "sgd"),
        })

    The choices are those of the inner space, under their own names, and ``recipe/lr``, ``recipe/optimiser``, ... A
    trial's network is built by the inner space, and trained by the task's recipe with these fields replaced. A task
    that is a function gets the genes, and trains as it likes. Where the data are loaders, which make their own
    batches, ``batch_size`` changes nothing.

    What a network is does not depend on its training, so costs, pictures and growth are those of the inner space.

    Attributes:
        space: The architectures.
        hyperparameters: Per field of :class:`nasplat.task.Recipe` its options, or a range (``nasplat.ranges``). Legal
            fields: ``batch_size``, ``optimiser``, ``lr``, ``weight_decay``, ``schedule``, ``clip``,
            ``label_smoothing``, ``phases`` (by name). Kept in the order of the recipe's fields, whatever the order
            they are given in.

    Raises:
        InvalidInputError: A field is not legal, has no options or one that a recipe refuses; or the inner space has
            choices or hyper-parameters by these names itself.
    """

    space: SearchSpace
    hyperparameters: Mapping[str, Sequence[Option]] = field(hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.space, SearchSpace):
            raise InvalidInputError(f"JointSpace: space is {self.space!r}; a SearchSpace is needed")
        if isinstance(self.space, JointSpace):
            raise InvalidInputError(
                "JointSpace: space is a JointSpace already; give one mapping of all hyperparameters"
            )
        if not isinstance(self.hyperparameters, Mapping) or not self.hyperparameters:
            raise InvalidInputError(
                f"JointSpace: hyperparameters is {self.hyperparameters!r}; a mapping of one or more fields of a recipe "
                "to their options is needed"
            )
        legal = [f.name for f in fields(Recipe) if f.name not in REFUSED]
        for name in self.hyperparameters:
            if name not in legal:
                why = f" ({REFUSED[name]})" if name in REFUSED else ""
                raise InvalidInputError(
                    f"JointSpace: {name!r} is no hyperparameter to search{why}; legal: {', '.join(legal)}"
                )
        kept = {name: _options(name, self.hyperparameters[name]) for name in legal if name in self.hyperparameters}
        object.__setattr__(self, "hyperparameters", kept)
        taken = [name for name in self.space.choices if name.startswith(PREFIX)]
        if taken:
            raise InvalidInputError(
                f"JointSpace: {self.space.name} has choices of its own that begin with {PREFIX!r}: {taken}"
            )

    # The two halves of an architecture.

    def inner(self, architecture: Architecture) -> Architecture:
        """The architecture of the inner space: what is built, without how it is trained."""
        return Architecture(self.space.identity, self._inner_genes(architecture.genes))

    def recipe(self, architecture: Architecture) -> Mapping[str, Any]:
        """The fields of the recipe that an architecture sets, over those that the inner space may set itself."""
        own = {name: architecture.genes[PREFIX + name] for name in self.hyperparameters}
        return {**self.space.recipe(self.inner(architecture)), **own}

    @staticmethod
    def _inner_genes(genes: Mapping[str, Any]) -> dict[str, Any]:
        return {name: gene for name, gene in genes.items() if not name.startswith(PREFIX)}

    def _join(self, inner: Architecture, genes: Mapping[str, Any]) -> Architecture:
        """An inner architecture with the hyper-parameters among some genes."""
        return Architecture(self.identity, {**inner.genes, **{name: genes[name] for name in self._own.choices}})

    @cached_property
    def _own(self) -> _Hyperparameters:
        return _Hyperparameters({PREFIX + name: options for name, options in self.hyperparameters.items()})

    # What the space is.

    @property
    def name(self) -> str:
        """The inner space's name and ``+recipe``."""
        return f"{self.space.name}+recipe"

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """The inner space's choices, then the hyper-parameters."""
        return {**self.space.choices, **self._own.choices}

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        """The inner space's groups."""
        return self.space.choice_groups

    def is_valid(self, genes: Mapping[str, Option]) -> bool:
        """Whether the inner space takes its part of the genes."""
        return self.space.is_valid(self._inner_genes(genes))

    def interactions(self) -> Sequence[tuple[str, ...]]:
        """The inner space's: how a network is trained costs nothing when it runs."""
        return self.space.interactions()

    def temperatures(self) -> Mapping[str, float]:
        """The inner space's."""
        return self.space.temperatures()

    # Networks.

    def build(self, architecture: Architecture) -> nn.Module:
        """The inner space's network."""
        return self.space.build(self.inner(architecture))

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """Refused: the weights of one supernet are trained by one recipe.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"{self.name} has no supernet: all paths of a supernet are trained by one recipe, so it cannot tell "
            f"learning rates or optimisers apart. Search {self.space.name} by itself, or use a strategy that trains "
            "candidates one by one (random search, evolution, Optuna)"
        )

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """As the inner space does it."""
        return self.space.inherit(model, None if source is None else self.inner(source), state)

    def sketch(self, architecture: Architecture) -> Sketch:
        """The inner space's picture, and a row of the hyper-parameters."""
        settings = tuple(Block(name, (str(architecture.genes[PREFIX + name]),)) for name in self.hyperparameters)
        return [*self.space.sketch(self.inner(architecture)), Stages("recipe", settings)]

    # Verbs: the inner space may have rules of its own for each, so it is asked for its half.

    @property
    def start(self) -> Callable[[], Architecture] | None:
        """Where growth starts: the inner space's own start, if it has one, with the middle of each hyper-parameter."""
        inner: Callable[[], Architecture] | None = getattr(self.space, "start", None)
        if not callable(inner):
            return None
        middle = {name: options[(len(options) - 1) // 2] for name, options in self._own.choices.items()}
        return lambda: self._join(inner(), middle)

    def growth(self, architecture: Architecture) -> list[Architecture]:
        """The inner space's steps of growth, trained alike."""
        return [self._join(child, architecture.genes) for child in self.space.growth(self.inner(architecture))]

    def size(self) -> int:
        """Number of architectures of the inner space, times that of settings."""
        return self.space.size() * self._own.size()

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A sample of the inner space, with hyper-parameters drawn evenly (a range: evenly on its scale)."""
        return self._join(self.space.sample(rng), self._own.sample(rng).genes)

    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        """A mutant of the inner space's, trained alike; or the same network with another value of a hyper-parameter.

        Each choice of the inner space (each member that a group picks) and each hyper-parameter with more than one
        option is as likely to change.

        Raises:
            InvalidInputError: ``parent`` has no valid neighbour.
        """
        inner, own = self.inner(parent), self._setting(parent)
        off = sum(len(group.names) - group.pick for group in self.choice_groups.values())
        architectural = sum(len(options) > 1 for options in self.space.choices.values()) - off
        settings = sum(len(options) > 1 for options in self._own.choices.values())
        if int(rng.integers(max(architectural, 1) + settings)) >= settings:
            try:
                return self._join(self.space.mutate(inner, rng), parent.genes)
            except InvalidInputError:  # the inner space has nothing to change, or no valid change
                if not settings:
                    raise
        return self._join(inner, self._own.mutate(own, rng).genes)

    def neighbours(self, architecture: Architecture) -> list[Architecture]:
        """The inner space's neighbours, trained alike; then the same network with each next setting."""
        inner, own = self.inner(architecture), self._setting(architecture)
        return [
            *(self._join(child, architecture.genes) for child in self.space.neighbours(inner)),
            *(self._join(inner, setting.genes) for setting in self._own.neighbours(own)),
        ]

    def crossover(self, a: Architecture, b: Architecture, rng: np.random.Generator) -> Architecture:
        """The inner space's crossover, and each hyper-parameter from one of the parents."""
        inner = self.space.crossover(self.inner(a), self.inner(b), rng)
        return self._join(inner, self._own.crossover(self._setting(a), self._setting(b), rng).genes)

    def encode(self, architecture: Architecture) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The inner space's encoding, then the hyper-parameters'."""
        return np.concatenate(
            [self.space.encode(self.inner(architecture)), self._own.encode(self._setting(architecture))]
        )

    def discretise(self, relaxed: Relaxed) -> Architecture:
        """The inner space's strongest architecture, with the strongest option of each hyper-parameter."""
        return self._join(self.space.discretise(relaxed), self._own.discretise(relaxed).genes)

    def enumerate(self) -> Iterator[Architecture]:
        """Each architecture of the inner space, with each setting."""
        for inner, setting in product(self.space.enumerate(), list(self._own.enumerate())):
            yield self._join(inner, setting.genes)

    def _setting(self, architecture: Architecture) -> Architecture:
        return Architecture(self._own.identity, {name: architecture.genes[name] for name in self._own.choices})


@dataclass(frozen=True)
class _Hyperparameters(SearchSpace):
    """The hyper-parameters by themselves, for the verbs."""

    options: Mapping[str, Sequence[Option]] = field(hash=False)

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        return self.options

    def build(self, architecture: Architecture) -> nn.Module:
        raise UnsupportedError("hyper-parameters are no network")


def _options(name: str, given: Any) -> Sequence[Option]:
    """The options of one field, each of them tried."""
    if not isinstance(given, Range | tuple | list) or not given:
        raise InvalidInputError(
            f"JointSpace: {name} is {given!r}; legal: a tuple of one or more options, Float(low, high), Int(low, high)"
        )
    options: Sequence[Option] = given if isinstance(given, Range) else tuple(given)
    for option in options:
        if not isinstance(option, str | int | float):
            raise InvalidInputError(f"JointSpace: {name} has the option {option!r}; numbers and words are legal")
        settings: dict[str, Any] = {"epochs": _EPOCHS, name: option}
        try:
            Recipe(**settings)
        except (InvalidInputError, TypeError) as error:
            raise InvalidInputError(
                f"JointSpace: {name} has the option {option!r}, which no recipe takes: {error}"
            ) from error
    return options
