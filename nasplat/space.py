"""The search space: it names its choices and builds a network for one option of each.

A space owes two things, :attr:`SearchSpace.choices` and :meth:`SearchSpace.build`. Sampling, mutation, crossover,
neighbours, encoding, counting and discretisation are given here once for every space.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.checks import is_number
from nasplat.drawing import Block, Picture, Sketch, Stages
from nasplat.errors import ArchitectureError, InvalidInputError, UnsupportedError
from nasplat.identity import canonical, describe
from nasplat.ranges import Range

Option: TypeAlias = str | int | float | bool
"""One option of a choice: a JSON scalar."""

Relaxed: TypeAlias = Mapping[str, Tensor]
"""Per choice a weight per option, shape ``(options,)``, in the order of the choice. One-hot is one architecture."""

MAX_DRAWS = 10_000
"""Draws after which a space whose ``is_valid`` refuses everything is reported instead of searched for ever."""


@dataclass(frozen=True)
class Group:
    """Choices of which just ``pick`` are on: the two strongest of a node's incoming edges, for instance.

    Attributes:
        names: The choices that belong together.
        pick: How many of them have an option other than ``off``.
        off: The option that means "not used". Every choice of the group offers it.
    """

    names: tuple[str, ...]
    pick: int
    off: Option


class Supernet(nn.Module, ABC):
    """One network that holds every option of every choice, with shared weights."""

    @abstractmethod
    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        """Logits ``(n, classes)`` for a batch ``(n, ...)``.

        Options are mixed with the weights of ``relaxed``, and an option of weight exactly 0 is not computed.
        """


class SearchSpace(ABC):
    """A set of architectures. Subclass as a frozen dataclass of plain parameters.

    Example::

        @dataclass(frozen=True)
        class Mlp(SearchSpace):
            classes: int = 10

            @property
            def choices(self):
                return {"width": (16, 32, 64), "activation": ("relu", "gelu")}

            def build(self, architecture):
                genes = architecture.genes
                activation = {"relu": nn.ReLU, "gelu": nn.GELU}[genes["activation"]]()
                return nn.Sequential(nn.Flatten(), nn.LazyLinear(genes["width"]), activation,
                                     nn.Linear(genes["width"], self.classes))
    """

    # What a space owes.

    @property
    @abstractmethod
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """The options of each choice, in an order that never changes: a tuple, or a range of numbers.

        A range (``nasplat.ranges``: ``Float(1e-4, 1e-1, log=True)``, ``Int(2, 12)``) is the sequence of its values.
        Names keep to letters, digits and ``_ - . /`` so that they can be MLflow keys.
        """

    @abstractmethod
    def build(self, architecture: Architecture) -> nn.Module:
        """A fresh network of one architecture, weights initialised from torch's global generator.

        It takes a batch ``(n, ...)`` and returns logits ``(n, classes)``.
        """

    # What a space may override.

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        """Groups of choices of which only some are on. Default: none."""
        return {}

    def is_valid(self, genes: Mapping[str, Option]) -> bool:
        """Whether genes that name legal options, and keep the groups' rule, make a network. Default: always."""
        return True

    def temperatures(self) -> Mapping[str, float]:
        """Softmax temperature per choice that suits a relaxed search of this space; 1 where not named. Default: 1."""
        return {}

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        """A network that holds the options of every choice.

        Args:
            keep: Options still alive, per choice; None keeps all. Weights of dropped options are not made.
            partial: Share of channels that go through a mixture, as 1/partial (PC-DARTS); 1 is all of them.

        Raises:
            UnsupportedError: The space has no supernet (the default), or not with these arguments.
        """
        raise UnsupportedError(
            f"{self.name} has no supernet, so it cannot be searched by an explorer such as DARTS; "
            "a strategy that evaluates candidates one by one (random search, evolution, Optuna) can"
        )

    def inherit(self, model: nn.Module, source: Architecture | None, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights of another architecture, or of the supernet, into a built network, in place.

        Args:
            model: The network of :meth:`build`.
            source: The architecture that the weights belong to; None for the supernet.
            state: Its tensors by name.

        Raises:
            InvalidInputError: A tensor of the model is missing in ``state`` or has another shape. Default rule:
                names and shapes are equal; what ``state`` has besides is left alone.
        """
        own = model.state_dict()
        wrong = [
            f"{name} {tuple(tensor.shape)}: " + (f"has {tuple(state[name].shape)}" if name in state else "missing")
            for name, tensor in own.items()
            if name not in state or state[name].shape != tensor.shape
        ]
        if wrong:
            raise InvalidInputError(
                f"{self.name} cannot inherit {len(wrong)} of {len(own)} tensors; first: {'; '.join(wrong[:3])}"
            )
        model.load_state_dict({name: state[name] for name in own})
        return model

    def sketch(self, architecture: Architecture) -> Sketch:
        """What a picture of an architecture shows (:meth:`draw`). Default: a block per choice, with its option."""
        blocks = tuple(Block(name, (str(option),)) for name, option in architecture.genes.items())
        return [Stages(self.name, blocks)]

    def interactions(self) -> Sequence[tuple[str, ...]]:
        """Choices that make up a cost together, for instance a layer's kernel and its expansion.

        A table of costs (``nasplat.cost.table``) has an entry per combination of each tuple. Default: every choice
        by itself, which is exact where a network's cost is a sum over its choices.
        """
        return [(name,) for name in self._choices]

    def extremes(self) -> tuple[Architecture, Architecture]:
        """The smallest and the largest architecture, for trainings that bound all others by these two.

        Default: the least and the greatest option of every choice, for spaces of numbers alone. A space where a greater
        number does not mean a larger network, or where other options are ordered, overrides it.

        Returns:
            The architecture that takes the fewest operations, and the one that takes the most.

        Raises:
            UnsupportedError: A choice has options that are no numbers, or choices form groups, or ``is_valid`` refuses
                one of the two.
        """
        for name, options in self._choices.items():
            if any(isinstance(option, str) for option in options):
                raise UnsupportedError(
                    f"{self.name} does not say which architecture is the smallest and which the largest: {name} offers "
                    f"{', '.join(map(repr, options))}, which have no order. SearchSpace.extremes can be overridden"
                )
        if self._groups:
            raise UnsupportedError(f"{self.name} has groups of choices, and does not say what is smallest and largest")
        found = []
        for pick in (min, max):
            genes = {name: pick(options) for name, options in self._choices.items()}
            if not self.is_valid(genes):
                raise UnsupportedError(f"{self.name}: is_valid refuses {genes}, so there is no {pick.__name__}imum")
            found.append(Architecture(self.identity, genes))
        return found[0], found[1]

    def recipe(self, architecture: Architecture) -> Mapping[str, Any]:
        """Fields of the task's recipe (``nasplat.task.Recipe``) that an architecture sets. Default: none.

        The worker trains the network of the architecture with these in place of the task's own.
        """
        return {}

    def growth(self, architecture: Architecture) -> list[Architecture]:
        """The neighbours that a strategy which only grows networks may go on to. Default: all :meth:`neighbours`."""
        return self.neighbours(architecture)

    # Given once, for every space.

    def draw(self, architecture: Architecture) -> Picture:
        """A picture of an architecture: ``space.draw(architecture).save("best.svg")``; a notebook shows it.

        Raises:
            ArchitectureError: The architecture is of another space.
        """
        if not self.owns(architecture):
            raise ArchitectureError(f"{self.name} cannot draw an architecture of {architecture.space}")
        return Picture(tuple(self.sketch(architecture)))

    @property
    def name(self) -> str:
        """The name by which tables and messages know the space."""
        return type(self).__name__

    @cached_property
    def identity(self) -> str:
        """Name and canonical parameters: equal for equal spaces in every process."""
        description = describe(self)
        return self.name + canonical(description.get("fields", description))

    def describe(self) -> Any:
        """The space's JSON description (``nasplat.identity``)."""
        if not dataclasses.is_dataclass(self):
            raise InvalidInputError(
                f"{self.name} is not a dataclass: decorate it with @dataclass(frozen=True), "
                "so that its parameters tell one space from another"
            )
        fields = {f.name: describe(getattr(self, f.name)) for f in dataclasses.fields(self) if f.compare}
        return {"type": f"{type(self).__module__}:{type(self).__qualname__}", "fields": fields}

    @cached_property
    def _choices(self) -> dict[str, Sequence[Option]]:
        choices: dict[str, Sequence[Option]] = {
            name: options if isinstance(options, Range) else tuple(options) for name, options in self.choices.items()
        }
        for name, options in choices.items():
            if not options or len(set(options)) != len(options):
                raise InvalidInputError(f"choice {name!r} of {self.name} needs different options, got {options}")
        return choices

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        groups = tuple(self.choice_groups.values())
        seen: set[str] = set()
        for group in groups:
            for name in group.names:
                if name not in self._choices or group.off not in self._choices[name] or name in seen:
                    raise InvalidInputError(
                        f"group of {self.name}: {name!r} must be a choice that offers {group.off!r} and be in one group"
                    )
                if isinstance(self._choices[name], Range):
                    raise InvalidInputError(
                        f"group of {self.name}: {name!r} is a range, {self._choices[name]!r}; a member of a group "
                        f"lists its options, as a tuple that has {group.off!r}"
                    )
                seen.add(name)
            if not 0 < group.pick <= len(group.names):
                raise InvalidInputError(f"group of {self.name}: pick {group.pick} of {len(group.names)} choices")
        return groups

    @cached_property
    def _free(self) -> tuple[str, ...]:
        grouped = {name for group in self._groups for name in group.names}
        return tuple(name for name in self._choices if name not in grouped)

    @cached_property
    def _group_of(self) -> dict[str, Group]:
        return {name: group for group in self._groups for name in group.names}

    def _on_options(self, name: str, group: Group) -> list[Option]:
        return [option for option in self._choices[name] if option != group.off]

    def architecture(self, genes: Mapping[str, Any]) -> Architecture:
        """The architecture of these genes, checked.

        Raises:
            ArchitectureError: A choice is missing or unknown, an option is not offered, a group's rule is broken,
                or ``is_valid`` refuses. The message names the choice and lists what is legal.
        """
        choices = self._choices
        unknown = [name for name in genes if name not in choices]
        missing = [name for name in choices if name not in genes]
        if unknown or missing:
            raise ArchitectureError(
                f"{self.name} has the choices {', '.join(choices)}; "
                + (f"unknown: {', '.join(map(str, unknown))}; " if unknown else "")
                + (f"missing: {', '.join(missing)}" if missing else "")
            )
        exact: dict[str, Option] = {}
        for name, options in choices.items():
            gene = genes[name]
            if isinstance(options, Range):
                if gene not in options:
                    near = f"; nearest: {options.nearest(gene)!r}" if is_number(gene) else ""
                    raise ArchitectureError(f"{self.name}: {name} is {gene!r}; legal: a value of {options!r}{near}")
                exact[name] = gene
                continue
            legal = next((o for o in options if o == gene and type(o) is type(gene)), None)
            if legal is None:
                raise ArchitectureError(f"{self.name}: {name} is {gene!r}; legal: {', '.join(map(repr, options))}")
            exact[name] = legal
        for group in self._groups:
            on = [name for name in group.names if exact[name] != group.off]
            if len(on) != group.pick:
                raise ArchitectureError(
                    f"{self.name}: just {group.pick} of {', '.join(group.names)} may differ from {group.off!r}; "
                    f"got {len(on)}: {', '.join(on) or 'none'}"
                )
        if not self.is_valid(exact):
            raise ArchitectureError(f"{self.name}: is_valid refuses the genes {exact}")
        return Architecture(self.identity, exact)

    def owns(self, architecture: Architecture) -> bool:
        """Whether the architecture was made by an equal space."""
        return architecture.space == self.identity

    def size(self) -> int:
        """Number of architectures (an upper bound where ``is_valid`` refuses some)."""
        total = math.prod(len(self._choices[name]) for name in self._free)
        for group in self._groups:
            counts = [len(self._on_options(name, group)) for name in group.names]
            # Elementary symmetric polynomial: sum over the picked subsets of the product of their counts.
            ways = [1] + [0] * group.pick
            for count in counts:
                for picked in range(group.pick, 0, -1):
                    ways[picked] += ways[picked - 1] * count
            total *= ways[group.pick]
        return total

    def _valid(self, draw: Callable[[], dict[str, Option]], what: str) -> Architecture:
        for _ in range(MAX_DRAWS):
            genes = draw()
            if self.is_valid(genes):
                return Architecture(self.identity, genes)
        raise InvalidInputError(f"{self.name}: is_valid refused {MAX_DRAWS} draws of {what}; is it too strict?")

    def sample(self, rng: np.random.Generator) -> Architecture:
        """An architecture drawn evenly over the picks and options (rejecting what ``is_valid`` refuses).

        A range is drawn from evenly on its scale (``nasplat.ranges``).
        """

        def draw() -> dict[str, Option]:
            genes = {name: _pick(rng, options) for name, options in self._choices.items()}
            for group in self._groups:
                on = set(rng.choice(len(group.names), size=group.pick, replace=False).tolist())
                for index, name in enumerate(group.names):
                    genes[name] = _pick(rng, self._on_options(name, group)) if index in on else group.off
            return genes

        return self._valid(draw, "a sample")

    def _changes(self, name: str, genes: Mapping[str, Option]) -> list[dict[str, Option]]:
        """What one mutation can make of a free choice, or of a member of a group that is on."""
        group = self._group_of.get(name)
        options = self._choices[name]
        if group is None:
            others = options.beside(genes[name]) if isinstance(options, Range) else options
            return [{name: option} for option in others if option != genes[name]]
        changes: list[dict[str, Option]] = [
            {name: option} for option in self._on_options(name, group) if option != genes[name]
        ]
        changes += [
            {name: group.off, other: genes[name]}
            for other in group.names
            if genes[other] == group.off and genes[name] in self._choices[other]
        ]
        return changes

    def _changeable(self, genes: Mapping[str, Option]) -> list[str]:
        """The free choices, and the members of a group that are on, of which a mutation can make something else."""
        names = [name for name in self._free if len(self._choices[name]) > 1]
        for group in self._groups:
            names += [name for name in group.names if genes[name] != group.off and self._changes(name, genes)]
        return names

    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        """A neighbour of ``parent``: another option of one choice or, in a group, the same option at another member.

        A choice is drawn first, then one of its changes, so that choices with many options are not favoured; in a
        group, a change of option and a move each get half of the draws (Real et al. 2019: mutate an operation, or an
        edge's input). A range goes 1, 2, 4, ... places up or down, each as likely: mostly a small step, sometimes far.

        Raises:
            InvalidInputError: ``parent`` has no valid neighbour.
        """
        genes = cast("Mapping[str, Option]", parent.genes)
        names = self._changeable(genes)
        if not names:
            raise InvalidInputError(f"{self.name}: every choice has one option, so nothing can be mutated")

        def draw() -> dict[str, Option]:
            changes = self._changes(names[int(rng.integers(len(names)))], genes)
            kinds = [kind for n in (1, 2) if (kind := [change for change in changes if len(change) == n])]
            kind = kinds[int(rng.integers(len(kinds)))]
            return {**genes, **kind[int(rng.integers(len(kind)))]}

        return self._valid(draw, "a mutation")

    def neighbours(self, architecture: Architecture) -> list[Architecture]:
        """Every valid architecture that one mutation reaches, in a fixed order (of a range: 1, 2, 4, ... places)."""
        genes = cast("Mapping[str, Option]", architecture.genes)
        made = ({**genes, **change} for name in self._changeable(genes) for change in self._changes(name, genes))
        return [Architecture(self.identity, child) for child in made if self.is_valid(child)]

    def crossover(self, a: Architecture, b: Architecture, rng: np.random.Generator) -> Architecture:
        """A child that takes each free choice, and each group as a whole, from one of two parents (uniform)."""

        def draw() -> dict[str, Option]:
            genes = {name: (a if rng.random() < 0.5 else b).genes[name] for name in self._choices}
            for group in self._groups:
                donor = a if rng.random() < 0.5 else b
                genes.update({name: donor.genes[name] for name in group.names})
            return genes

        return self._valid(draw, "a crossover")

    def alive(self, keep: Mapping[str, Sequence[Option]] | None) -> dict[str, tuple[Option, ...]]:
        """The options that a supernet holds, per choice and in its order: the checked ``keep`` of :meth:`supernet`.

        Args:
            keep: Options still alive, per choice; a choice that is not named keeps all.

        Raises:
            InvalidInputError: ``keep`` names an unknown choice or option, or leaves a choice without any.
        """
        alive = {name: tuple(options) for name, options in self._choices.items()}
        for name, kept in (keep or {}).items():
            if name not in alive:
                raise InvalidInputError(f"{self.name}: keep names {name!r}; legal: {', '.join(alive)}")
            options = alive[name]
            if not kept or any(option not in options for option in kept):
                raise InvalidInputError(
                    f"{self.name}: keep[{name!r}] is {kept!r}; legal: one or more of {', '.join(map(str, options))}"
                )
            alive[name] = tuple(option for option in options if option in kept)
        return alive

    def used(self, relaxed: Relaxed, alive: Mapping[str, Sequence[Option]]) -> dict[str, list[int]]:
        """Per choice the indices of the options with a weight other than 0: what a supernet has to compute.

        Args:
            relaxed: Per choice a weight per option. All are copied to the host at once.
            alive: What the supernet holds (:meth:`alive`).

        Raises:
            InvalidInputError: A choice has no weights, too many or too few, or only zeros; a weight is not finite; or
                an option has weight that is not alive.
        """
        for name, options in self._choices.items():
            if name not in relaxed:
                raise InvalidInputError(f"{self.name}: relaxed lacks weights for {name}; it has {', '.join(relaxed)}")
            if relaxed[name].shape != (len(options),):
                shape = tuple(relaxed[name].shape)
                raise InvalidInputError(
                    f"{self.name}: the weights of {name} have shape {shape}; legal: ({len(options)},)"
                )
        values = torch.cat([relaxed[name].detach() for name in self._choices]).tolist()
        if not all(map(math.isfinite, values)):
            raise InvalidInputError(f"{self.name}: weights in relaxed are not finite; legal: finite numbers")
        weights = iter(values)
        used: dict[str, list[int]] = {}
        for name, options in self._choices.items():
            used[name] = [index for index in range(len(options)) if next(weights) != 0.0]
            dropped = [str(options[index]) for index in used[name] if options[index] not in alive[name]]
            if dropped or not used[name]:
                raise InvalidInputError(
                    f"{self.name}: {name} gives weight to {', '.join(dropped) or 'nothing'}; "
                    f"this supernet keeps {', '.join(map(str, alive[name]))}"
                )
        return used

    def encode(self, architecture: Architecture) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What a predictor gets: per choice one-hot, a range as its position in [0, 1]; concatenated.

        Returns:
            Shape ``(n,)``, float32: a number per option, one for each range (on its linear or logarithmic scale).
        """
        length, places = self._code
        code = np.zeros(length, dtype=np.float32)
        for name, gene in architecture.genes.items():
            at = places[name]
            if isinstance(at, int):
                options = self._choices[name]
                assert isinstance(options, Range)
                code[at] = options.position(gene)
            else:
                code[at[gene]] = 1.0
        return code

    @cached_property
    def _code(self) -> tuple[int, dict[str, int | dict[Option, int]]]:
        """Length of an encoding, and per choice where each option's number stands, or a range's."""
        length = 0
        places: dict[str, int | dict[Option, int]] = {}
        for name, options in self._choices.items():
            if isinstance(options, Range):
                places[name] = length
                length += 1
            else:
                places[name] = {option: length + index for index, option in enumerate(options)}
                length += len(options)
        return length, places

    def discretise(self, relaxed: Relaxed) -> Architecture:
        """The strongest architecture of a relaxed one.

        A free choice takes its strongest option. In a group each member stands for its strongest option other than
        ``off``; the ``pick`` strongest members keep theirs (DARTS: the two strongest edges of a node, by their best
        operation other than zero). Ties go to the first.

        Raises:
            ArchitectureError: ``is_valid`` refuses the result.
        """
        missing = [name for name in self._choices if name not in relaxed]
        if missing:
            raise ArchitectureError(f"{self.name}: no weights for {', '.join(missing)}")
        genes: dict[str, Option] = {}
        for name in self._free:
            genes[name] = self._choices[name][int(torch.argmax(relaxed[name]))]
        for group in self._groups:
            best: list[tuple[float, int, str, Option]] = []
            for index, name in enumerate(group.names):
                weights = dict(zip(self._choices[name], relaxed[name].tolist(), strict=True))
                option = max(self._on_options(name, group), key=weights.__getitem__)
                best.append((-weights[option], index, name, option))
                genes[name] = group.off
            for _, _, name, option in sorted(best)[: group.pick]:
                genes[name] = option
        return self.architecture(genes)

    def relax(self, architecture: Architecture) -> dict[str, Tensor]:
        """The one-hot weights of one architecture: per choice shape ``(options,)``, float32."""
        return {
            name: torch.tensor([float(option == architecture.genes[name]) for option in options])
            for name, options in self._choices.items()
        }

    def enumerate(self) -> Iterator[Architecture]:
        """Every architecture once, in a fixed order. For spaces small enough to count."""

        def parts() -> Iterator[list[dict[str, Option]]]:
            for name in self._free:
                yield [{name: option} for option in self._choices[name]]
            for group in self._groups:
                ways: list[dict[str, Option]] = []
                for on in combinations(group.names, group.pick):
                    partial: list[dict[str, Option]] = [dict.fromkeys(group.names, group.off)]
                    for name in on:
                        options = self._on_options(name, group)
                        partial = [{**genes, name: option} for genes in partial for option in options]
                    ways += partial
                yield ways

        def product(rest: list[list[dict[str, Option]]]) -> Iterator[dict[str, Option]]:
            if not rest:
                yield {}
                return
            for head in rest[0]:
                for tail in product(rest[1:]):
                    yield {**head, **tail}

        for genes in product(list(parts())):
            ordered = {name: genes[name] for name in self._choices}
            if self.is_valid(ordered):
                yield Architecture(self.identity, ordered)


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    if isinstance(options, Range):
        drawn: Option = options.draw(rng)
        return drawn
    return options[int(rng.integers(len(options)))]


@dataclass(frozen=True)
class FunctionSpace(SearchSpace):
    """A space made of a function and a dictionary of choices: ``space_from(build, choices)``.

    Attributes:
        function: Takes the genes as a plain dictionary and returns the network.
        options: The options of each choice.
    """

    function: Callable[[dict[str, Any]], nn.Module]
    options: Mapping[str, Sequence[Option]] = field(hash=False)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        """The options of each choice, as given."""
        return self.options

    def build(self, architecture: Architecture) -> nn.Module:
        """Call the function with the genes."""
        return self.function(dict(architecture.genes))


def space_from(build: Callable[[dict[str, Any]], nn.Module], choices: Mapping[str, Sequence[Option]]) -> SearchSpace:
    """A search space of a function and its choices.

    Args:
        build: Takes the genes (one option per choice) as a dictionary and returns a network.
        choices: The options of each choice, in an order that never changes; or a range of numbers
            (``nasplat.ranges``).
    """
    listed = {name: options if isinstance(options, Range) else tuple(options) for name, options in choices.items()}
    return FunctionSpace(build, listed)
