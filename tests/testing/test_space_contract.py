"""The contract passes on a sound space, and each of its tests fails on a space that breaks just that law."""

import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.errors import ArchitectureError, UnsupportedError
from nasplat.space import Group, Option, Relaxed, SearchSpace, Supernet
from nasplat.testing.space_contract import SpaceContract

OPERATIONS = {"none": None, "relu": nn.ReLU, "tanh": nn.Tanh}
EDGES = ("edge/0", "edge/1", "edge/2")


def operation(name: str, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh() if name == "tanh" else nn.LeakyReLU())


class Net(nn.Module):
    """The sum of some operations per edge, then one of two classifiers."""

    def __init__(self, edges: Mapping[str, Sequence[str]], heads: Sequence[str], classes: int) -> None:
        super().__init__()
        self.edges = nn.ModuleDict(
            {
                name.replace("/", "_"): nn.ModuleDict({o: operation(o, 5) for o in options if o != "none"})
                for name, options in edges.items()
            }
        )
        self.heads = nn.ModuleDict({name: nn.Linear(5, classes, bias=name == "biased") for name in heads})

    def forward(self, x: Tensor) -> Tensor:
        hidden = sum((o(x) for edge in self.edges.values() for o in edge.values()), x.new_zeros(()))
        (head,) = self.heads.values()
        logits: Tensor = head(hidden)
        return logits


class Mixed(Supernet):
    def __init__(self, space: "Good", net: Net) -> None:
        super().__init__()
        self.edges, self.heads = net.edges, net.heads
        self.space = space

    def weigh(self, relaxed: Relaxed, name: str) -> list[tuple[Any, Tensor]]:
        options = zip(self.space.choices[name], relaxed[name], strict=True)
        return [(option, weight) for option, weight in options if weight.item() != 0]

    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        hidden = x.new_zeros(())
        for name in EDGES:
            for option, weight in self.weigh(relaxed, name):
                if option != "none":
                    hidden = hidden + weight * self.edges[name.replace("/", "_")][option](x)
        return sum((w * self.heads[o](hidden) for o, w in self.weigh(relaxed, "head")), x.new_zeros(()))


@dataclass(frozen=True)
class Good(SearchSpace):
    classes: int = 3

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        return {**dict.fromkeys(EDGES, tuple(OPERATIONS)), "head": ("plain", "biased")}

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        return {"edges": Group(EDGES, 2, "none")}

    def build(self, architecture: Architecture) -> nn.Module:
        genes = architecture.genes
        return Net({name: (genes[name],) for name in EDGES}, (genes["head"],), self.classes)

    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        options: Any = {name: (keep or {}).get(name, options) for name, options in self.choices.items()}
        return Mixed(self, Net({name: options[name] for name in EDGES}, options["head"], self.classes))


class GoodContract(SpaceContract):
    samples = 8
    builds = 2

    @pytest.fixture
    def space(self) -> SearchSpace:
        return Good()

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class TestGood(GoodContract):
    pass


@dataclass(frozen=True)
class GlobalRandom(Good):
    def sample(self, rng: np.random.Generator) -> Architecture:
        return super().sample(np.random.default_rng(random.getrandbits(30)))


@dataclass(frozen=True)
class GlobalTorchInMutation(Good):
    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        return super().mutate(parent, np.random.default_rng(int(torch.randint(100, ()))))


@dataclass(frozen=True)
class RandomIdentity(Good):
    @cached_property
    def identity(self) -> str:
        return f"{super().identity}{random.random()}"


@dataclass(frozen=True)
class HashedIdentity(Good):
    # Python's hash of a text differs between processes.
    @property
    def identity(self) -> str:  # type: ignore[override]
        return f"Hashed{hash('text')}"


@dataclass(frozen=True)
class UnorderedOptions(Good):
    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        return {**super().choices, "head": tuple(np.random.permutation([f"h{i}" for i in range(20)]).tolist())}  # noqa: NPY002


@dataclass(frozen=True)
class SetOfOptions(Good):
    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        return {**super().choices, "head": tuple({f"h{i}" for i in range(20)})}


@dataclass(frozen=True)
class IllegalName(Good):
    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        return {**super().choices, "head: which?": (1, 2)}


@dataclass(frozen=True)
class TupleOption(Good):
    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        return {**super().choices, "shape": ((1, 2), (3, 4))}  # type: ignore[dict-item]


@dataclass(frozen=True)
class Unpicklable(Good):
    function: Any = field(default_factory=lambda: lambda: 0, compare=False)


@dataclass(frozen=True)
class LazyMutant(Good):
    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        return parent


@dataclass(frozen=True)
class BoldMutant(Good):
    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        return next(a for a in self.enumerate() if a != parent and a not in self.neighbours(parent))


@dataclass(frozen=True)
class InventiveCrossover(Good):
    def crossover(self, a: Architecture, b: Architecture, rng: np.random.Generator) -> Architecture:
        return self.sample(rng)


@dataclass(frozen=True)
class BrokenGroup(Good):
    def sample(self, rng: np.random.Generator) -> Architecture:
        genes = {name: options[int(rng.integers(1, len(options)))] for name, options in self.choices.items()}
        return Architecture(self.identity, genes)


@dataclass(frozen=True)
class SilentError(Good):
    def architecture(self, genes: Mapping[str, Any]) -> Architecture:
        try:
            return super().architecture(genes)
        except ArchitectureError:
            raise ArchitectureError("wrong genes") from None


@dataclass(frozen=True)
class BlindEncoding(Good):
    def encode(self, architecture: Architecture) -> Any:
        return super().encode(architecture)[:3]


@dataclass(frozen=True)
class WrongSize(Good):
    def size(self) -> int:
        return super().size() + 1


@dataclass(frozen=True)
class WrongDiscretise(Good):
    def discretise(self, relaxed: Relaxed) -> Architecture:
        return next(self.enumerate())


@dataclass(frozen=True)
class OwnSeed(Good):
    def build(self, architecture: Architecture) -> nn.Module:
        torch.seed()
        return super().build(architecture)


@dataclass(frozen=True)
class SharedWeights(Good):
    @cached_property
    def layer(self) -> nn.Module:
        return nn.Linear(6, 3)

    def build(self, architecture: Architecture) -> nn.Module:
        return self.layer


@dataclass(frozen=True)
class WrongWidth(Good):
    def build(self, architecture: Architecture) -> nn.Module:
        return nn.Linear(6, self.classes + 1)


@dataclass(frozen=True)
class IdleParameter(Good):
    def build(self, architecture: Architecture) -> nn.Module:
        net = super().build(architecture)
        net.idle = nn.Parameter(torch.ones(1))
        return net


@dataclass(frozen=True)
class NotFinite(Good):
    def build(self, architecture: Architecture) -> nn.Module:
        net = super().build(architecture)
        nn.init.constant_(next(net.parameters()), float("nan"))
        return net


class DeafMixed(Mixed):
    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        # Ignores one option's weight.
        return super().forward(x, {**relaxed, "head": torch.ones(2)})


class EagerMixed(Mixed):
    def weigh(self, relaxed: Relaxed, name: str) -> list[tuple[Any, Tensor]]:
        # Computes options of weight zero as if they had a little.
        options = zip(self.space.choices[name], relaxed[name], strict=True)
        return [(option, weight + 1e-6) for option, weight in options if option in self.held(name)]

    def held(self, name: str) -> Sequence[str]:
        return list(self.heads) if name == "head" else list(self.edges[name.replace("/", "_")])


class ShiftedMixed(Mixed):
    def forward(self, x: Tensor, relaxed: Relaxed) -> Tensor:
        return super().forward(x, relaxed) + 1


def supernet_of(kind: type[Mixed]) -> type[Good]:
    @dataclass(frozen=True)
    class Odd(Good):
        def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
            supernet = super().supernet(keep, partial)
            supernet.__class__ = kind
            return supernet

    return Odd


@dataclass(frozen=True)
class GreedyKeep(Good):
    def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
        supernet = super().supernet()
        if keep is not None:
            supernet.more = nn.Linear(9, 9)
        return supernet


def run(space: SearchSpace, law: str) -> None:
    test = getattr(SpaceContract(), law)
    needs_example = "example" in test.__code__.co_varnames[: test.__code__.co_argcount]
    example = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    test(space, example) if needs_example else test(space)


@pytest.mark.parametrize(
    ("space", "law", "why"),
    [
        (IllegalName(), "test_choices_are_ordered_json", "letters, digits"),
        (TupleOption(), "test_choices_are_ordered_json", "not a JSON scalar"),
        (UnorderedOptions(), "test_choices_are_ordered_json", "choices changed"),
        (RandomIdentity(), "test_space_survives_pickle", "identity"),
        (Unpicklable(), "test_space_survives_pickle", "pickle"),
        (BrokenGroup(), "test_architecture_survives_json_and_pickle", "just 2 of"),
        (HashedIdentity(), "test_same_id_in_another_process", "differ in another process"),
        (SetOfOptions(), "test_same_id_in_another_process", "differ in another process"),
        (GlobalRandom(), "test_sampling_depends_on_rng_only", "more than its rng"),
        (GlobalTorchInMutation(), "test_sampling_depends_on_rng_only", "global generator of torch"),
        (LazyMutant(), "test_mutants_are_valid_neighbours", "equals its parent"),
        (BoldMutant(), "test_mutants_are_valid_neighbours", "not among the neighbours"),
        (GlobalTorchInMutation(), "test_mutants_are_valid_neighbours", "more than its rng"),
        (InventiveCrossover(), "test_crossover_takes_from_parents_only", "neither parent"),
        (BrokenGroup(), "test_groups_keep_their_rule", "are on, not 2"),
        (SilentError(), "test_errors_list_what_is_legal", "does not mention"),
        (BlindEncoding(), "test_encoding_tells_architectures_apart", "one encoding"),
        (WrongSize(), "test_size_counts_what_enumerate_lists", "size says"),
        (WrongDiscretise(), "test_relaxed_one_hot_is_the_architecture", "undo relax"),
        (OwnSeed(), "test_build_depends_on_torch_seed_only", "between two builds"),
        (SharedWeights(), "test_build_depends_on_torch_seed_only", "shared by two builds"),
        (WrongWidth(), "test_network_is_differentiable", "4 logits for 3 classes"),
        (IdleParameter(), "test_network_is_differentiable", "idle gets no gradient"),
        (NotFinite(), "test_network_is_differentiable", "not finite"),
        (supernet_of(DeafMixed)(), "test_supernet_reaches_every_option", "get no gradient"),
        (supernet_of(ShiftedMixed)(), "test_one_hot_supernet_agrees_with_build", "not close"),
        (supernet_of(EagerMixed)(), "test_one_hot_supernet_agrees_with_build", "are computed"),
        (GreedyKeep(), "test_supernet_keeps_what_it_is_told", "with fewer options"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_contract_catches(space: SearchSpace, law: str, why: str) -> None:
    with pytest.raises((AssertionError, ArchitectureError, AttributeError, pickle.PicklingError), match=why):
        run(space, law)


def test_every_law_has_a_space_that_breaks_it() -> None:
    (mark,) = (mark for mark in test_contract_catches.pytestmark if mark.name == "parametrize")
    laws = {name for name in dir(SpaceContract) if name.startswith("test_")}
    assert {law for _, law, _ in mark.args[1]} == laws


def test_supernet_laws_skip_with_the_spaces_own_reason() -> None:
    @dataclass(frozen=True)
    class Discrete(Good):
        def supernet(self, keep: Mapping[str, Sequence[Option]] | None = None, partial: int = 1) -> Supernet:
            raise UnsupportedError("counts only")

    for law in dir(SpaceContract):
        if law.startswith("test_supernet") or law == "test_one_hot_supernet_agrees_with_build":
            with pytest.raises(pytest.skip.Exception, match="counts only"):
                run(Discrete(), law)


def test_fixtures_are_owed() -> None:
    class Bare(SpaceContract):
        pass

    for name in ("space", "example"):
        fixture = getattr(Bare, name)
        function = getattr(fixture, "_fixture_function", None) or fixture.__wrapped__
        with pytest.raises(NotImplementedError, match=f"Bare needs a fixture `{name}`"):
            function(Bare())
