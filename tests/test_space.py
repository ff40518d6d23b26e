import dataclasses
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nasplat.architecture import Architecture
from nasplat.errors import ArchitectureError, InvalidInputError, UnsupportedError
from nasplat.space import Group, Option, SearchSpace, space_from


@dataclass(frozen=True)
class Toy(SearchSpace):
    """Two free choices and two groups of different sizes; some genes can be declared invalid."""

    edges: int = 3
    pick: int = 2
    forbid_tanh_at: int = 0

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        edges = {f"a/{i}": ("off", "conv", "pool") for i in range(self.edges)}
        # The members of a group may offer different options.
        return {
            "width": (8, 16, 32),
            **edges,
            "b/0": ("none", "x"),
            "b/1": ("none", "x", "y", "z"),
            "act": ("relu", "tanh"),
        }

    @property
    def choice_groups(self) -> Mapping[str, Group]:
        return {
            "a": Group(tuple(f"a/{i}" for i in range(self.edges)), self.pick, "off"),
            "b": Group(("b/0", "b/1"), 1, "none"),
        }

    def is_valid(self, genes: Mapping[str, Option]) -> bool:
        return not (genes["act"] == "tanh" and genes["width"] == self.forbid_tanh_at)

    def build(self, architecture: Architecture) -> nn.Module:
        return nn.Linear(2, 3)


@dataclass(frozen=True)
class Free(SearchSpace):
    """Free choices only, with options of every JSON type."""

    options: tuple[tuple[Option, ...], ...] = ((1, 2), ("a", "b", "c"), (True, False), (0.5, 1.5))

    @property
    def choices(self) -> Mapping[str, Sequence[Option]]:
        return {f"c{i}": options for i, options in enumerate(self.options)}

    def build(self, architecture: Architecture) -> nn.Module:
        return nn.Identity()


spaces = st.one_of(
    st.integers(2, 4).flatmap(
        lambda edges: st.builds(
            Toy, edges=st.just(edges), pick=st.integers(1, edges), forbid_tanh_at=st.sampled_from([0, 8, 32])
        )
    ),
    st.builds(
        Free,
        st.lists(
            st.lists(st.integers(-9, 9), min_size=1, max_size=4, unique=True).map(tuple), min_size=1, max_size=4
        ).map(tuple),
    ),
)
seeds = st.integers(0, 2**32 - 1)


@given(spaces, seeds)
@settings(max_examples=60, deadline=None)
def test_laws_of_the_verbs(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    assert space.sample(np.random.default_rng(seed)) == a
    assert space.architecture(a.genes) == a
    assert Architecture.from_json(a.to_json()) == a
    assert space.discretise(space.relax(a)) == a
    neighbours = space.neighbours(a)
    assert a not in neighbours
    assert len(set(neighbours)) == len(neighbours)
    for neighbour in neighbours:
        assert space.architecture(neighbour.genes) == neighbour
        assert a in space.neighbours(neighbour), "being neighbours goes both ways"
    if neighbours:
        assert space.mutate(a, rng) in neighbours
    child = space.crossover(a, b, rng)
    assert space.architecture(child.genes) == child
    assert all(child.genes[name] in (a.genes[name], b.genes[name]) for name in child.genes)
    assert (space.encode(a) == space.encode(b)).all() == (a == b)


@given(spaces)
@settings(max_examples=25, deadline=None)
def test_enumerate_lists_the_whole_space(space: SearchSpace) -> None:
    everything = list(space.enumerate())
    assert len(set(everything)) == len(everything)
    assert all(space.architecture(architecture.genes) == architecture for architecture in everything)
    assert everything == list(space.enumerate())
    if isinstance(space, Toy) and space.forbid_tanh_at:
        assert len(everything) * 6 == space.size() * 5
    else:
        assert len(everything) == space.size()


def test_size_of_groups_and_free_choices() -> None:
    assert Free().size() == 2 * 3 * 2 * 2
    # 3 widths, 2 of 3 edges with 2 operations each, x at one end or x, y, z at the other, 2 activations.
    assert Toy().size() == 3 * (3 * 2 * 2) * (1 + 3) * 2
    assert Toy(edges=5, pick=5).size() == 3 * 2**5 * 4 * 2


def test_every_architecture_can_be_drawn_and_mutated_into() -> None:
    space = Toy(edges=2, pick=1)
    everything = set(space.enumerate())
    rng = np.random.default_rng(0)
    assert {space.sample(rng) for _ in range(3000)} == everything
    reached, front = set(), [space.sample(rng)]
    while front:
        reached.update(front)
        front = [n for a in front for n in space.neighbours(a) if n not in reached]
        front = list(dict.fromkeys(front))
    # A group moves with its option, so y and z, which one member alone offers, are still reached through x.
    assert reached == everything


def test_mutation_reaches_every_neighbour() -> None:
    space = Toy()
    parent = space.sample(np.random.default_rng(0))
    rng = np.random.default_rng(1)
    assert {space.mutate(parent, rng) for _ in range(2000)} == set(space.neighbours(parent))


def test_neighbours_change_one_choice_or_move_one_option() -> None:
    space = Toy()
    parent = space.sample(np.random.default_rng(3))
    for neighbour in space.neighbours(parent):
        changed = [name for name in parent.genes if parent.genes[name] != neighbour.genes[name]]
        assert len(changed) in (1, 2)
        if len(changed) == 2:
            before, after = ([g.genes[name] for name in changed] for g in (parent, neighbour))
            assert before == after[::-1]


def test_crossover_takes_a_group_whole() -> None:
    space = Toy(edges=4)
    rng = np.random.default_rng(0)
    a, b = space.sample(rng), space.sample(rng)
    donors = set()
    for _ in range(50):
        child = space.crossover(a, b, rng)
        genes = [tuple(x.genes[name] for name in space.choice_groups["a"].names) for x in (child, a, b)]
        assert genes[0] in genes[1:]
        donors.add(genes[0])
    assert len(donors) == 2


def test_no_verb_touches_global_generators() -> None:
    space = Toy()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[2]  # noqa: NPY002
    rng = np.random.default_rng(0)
    a, b = space.sample(rng), space.sample(rng)
    space.crossover(space.mutate(a, rng), b, rng)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[2] == numpy_state  # noqa: NPY002


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width is 9; legal: 8, 16, 32"),
        ({"width": 8.0}, "width is 8.0; legal: 8, 16, 32"),
        ({"act": None}, "act is None; legal: 'relu', 'tanh'"),
        ({"colour": 1}, "has the choices width, .*unknown: colour"),
        ({"a/0": "off"}, "just 2 of a/0, a/1, a/2 may differ from 'off'; got 1: a/1"),
        ({"a/2": "pool"}, "got 3: a/0, a/1, a/2"),
    ],
)
def test_wrong_genes_are_named(change: dict[str, object], message: str) -> None:
    genes = {"width": 8, "a/0": "conv", "a/1": "pool", "a/2": "off", "b/0": "x", "b/1": "none", "act": "relu"}
    space = Toy()
    assert dict(space.architecture(genes).genes) == genes
    with pytest.raises(ArchitectureError, match=message):
        space.architecture({**genes, **change})
    with pytest.raises(ArchitectureError, match="missing: act"):
        space.architecture({name: gene for name, gene in genes.items() if name != "act"})


def test_true_is_not_one() -> None:
    genes = {"c0": 1, "c1": "a", "c2": True, "c3": 0.5}
    assert Free().architecture(genes).genes["c2"] is True
    with pytest.raises(ArchitectureError, match="c2 is 1; legal: True, False"):
        Free().architecture({**genes, "c2": 1})


def test_is_valid_rejects_everywhere() -> None:
    space = Toy(forbid_tanh_at=8)

    def legal(architecture: Architecture) -> bool:
        return space.is_valid(architecture.genes)

    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(100)]
    assert all(map(legal, drawn))
    assert all(legal(n) for a in drawn[:10] for n in space.neighbours(a))
    assert all(legal(space.mutate(a, rng)) for a in drawn)
    assert all(legal(space.crossover(a, b, rng)) for a, b in pairwise(drawn))
    genes = {"width": 8, "a/0": "conv", "a/1": "pool", "a/2": "off", "b/0": "x", "b/1": "none", "act": "tanh"}
    with pytest.raises(ArchitectureError, match="is_valid refuses"):
        space.architecture(genes)
    relaxed = Toy().relax(Toy().architecture(genes))
    with pytest.raises(ArchitectureError, match="is_valid refuses"):
        space.discretise(relaxed)


def test_a_space_that_refuses_everything_says_so() -> None:
    class Never(Free):
        def is_valid(self, genes: Mapping[str, Option]) -> bool:
            return False

    with pytest.raises(InvalidInputError, match="is_valid refused 10000 draws of a sample"):
        Never().sample(np.random.default_rng(0))


def test_nothing_to_mutate() -> None:
    space = Free(options=((1,), ("a",)))
    (only,) = space.enumerate()
    assert space.neighbours(only) == []
    with pytest.raises(InvalidInputError, match="nothing can be mutated"):
        space.mutate(only, np.random.default_rng(0))


def test_discretise_takes_the_strongest() -> None:
    space = Toy()
    relaxed = {
        "width": torch.tensor([0.1, 0.7, 0.2]),
        # "off" is strongest everywhere: it never counts in a group.
        "a/0": torch.tensor([0.6, 0.3, 0.1]),
        "a/1": torch.tensor([0.6, 0.1, 0.25]),
        "a/2": torch.tensor([0.6, 0.2, 0.2]),
        "b/0": torch.tensor([0.9, 0.1]),
        "b/1": torch.tensor([0.7, 0.1, 0.1, 0.1]),
        "act": torch.tensor([0.5, 0.5]),
    }
    assert dict(space.discretise(relaxed).genes) == {
        "width": 16,
        "a/0": "conv",
        "a/1": "pool",
        "a/2": "off",
        "b/0": "x",
        "b/1": "none",
        "act": "relu",
    }
    with pytest.raises(ArchitectureError, match="no weights for act"):
        space.discretise({name: weights for name, weights in relaxed.items() if name != "act"})


def test_encode_is_one_hot_per_choice() -> None:
    space = Free()
    genes = {"c0": 2, "c1": "a", "c2": False, "c3": 1.5}
    assert space.encode(space.architecture(genes)).tolist() == [0, 1, 1, 0, 0, 0, 1, 0, 1]


def test_identity_follows_from_the_fields() -> None:
    assert Toy().identity == Toy(edges=3).identity
    assert Toy().identity != Toy(edges=4).identity
    genes = dict(Toy().sample(np.random.default_rng(0)).genes)
    a, b = Toy().architecture(genes), Toy(forbid_tanh_at=99).architecture(genes)
    assert a.id != b.id
    assert Toy().owns(a)
    assert not Toy().owns(b)
    assert pickle.loads(pickle.dumps(Toy())) == Toy()
    assert dataclasses.replace(Toy(), edges=4).size() == Toy(edges=4).size()


def test_identity_needs_a_dataclass() -> None:
    class Plain(SearchSpace):
        @property
        def choices(self) -> Mapping[str, Sequence[Option]]:
            return {"a": (1, 2)}

        def build(self, architecture: Architecture) -> nn.Module:
            return nn.Identity()

    with pytest.raises(InvalidInputError, match="decorate it with @dataclass"):
        _ = Plain().identity


@pytest.mark.parametrize("options", [(), (1, 1), (1, True)])
def test_options_must_be_different(options: tuple[Option, ...]) -> None:
    with pytest.raises(InvalidInputError, match="needs different options"):
        Free(options=(options,)).size()


@pytest.mark.parametrize(
    "group",
    [
        Group(("c0", "nowhere"), 1, 1),
        Group(("c0", "c1"), 1, 1),
        Group(("c0", "c0"), 1, 1),
        Group(("c0",), 0, 1),
        Group(("c0",), 2, 1),
    ],
)
def test_impossible_groups_are_refused(group: Group) -> None:
    class Grouped(Free):
        @property
        def choice_groups(self) -> Mapping[str, Group]:
            return {"g": group}

    with pytest.raises(InvalidInputError, match="group of Grouped"):
        Grouped().sample(np.random.default_rng(0))


def test_no_supernet_by_default() -> None:
    with pytest.raises(UnsupportedError, match="Toy has no supernet"):
        Toy().supernet()


def test_inherit_wants_equal_names_and_shapes() -> None:
    space = Toy()
    model, source = nn.Linear(2, 3), nn.Linear(2, 3)
    assert space.inherit(model, None, {**source.state_dict(), "more": torch.zeros(1)}) is model
    assert torch.equal(model.weight, source.weight)
    with pytest.raises(InvalidInputError, match=r"1 of 2 tensors; first: weight \(3, 2\): has \(4, 2\)"):
        space.inherit(model, None, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3)})
    with pytest.raises(InvalidInputError, match=r"bias \(3,\): missing"):
        space.inherit(model, None, {"weight": torch.zeros(3, 2)})
    assert torch.equal(model.weight, source.weight)


def make_mlp(genes: dict[str, object]) -> nn.Module:
    width = genes["width"]
    assert isinstance(width, int)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def test_a_function_and_its_choices_are_a_space() -> None:
    space = space_from(make_mlp, {"width": [8, 16], "bias": [True, False]})
    assert space.name == "make_mlp"
    assert space.size() == 4
    architecture = space.architecture({"width": 16, "bias": True})
    assert space.build(architecture)(torch.zeros(3, 4)).shape == (3, 2)
    again = space_from(make_mlp, {"width": (8, 16), "bias": (True, False)})
    assert again.identity == space.identity
    assert pickle.loads(pickle.dumps(space)).identity == space.identity
    assert space_from(make_mlp, {"width": [8, 32], "bias": [True, False]}).identity != space.identity
    json.loads(architecture.to_json())
    assert hash(space) == hash(again)
    assert math.isfinite(space.size())
