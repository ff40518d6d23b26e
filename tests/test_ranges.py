"""The laws of ranges, by themselves and as choices of a space."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nasplat.errors import ArchitectureError, InvalidInputError
from nasplat.identity import canonical, describe, restore
from nasplat.ranges import Float, Int
from nasplat.restorable import restorable
from nasplat.space import Group, SearchSpace, space_from


def network(genes):
    return nn.Identity()


@st.composite
def floats(draw):
    log = draw(st.booleans())
    low = draw(st.floats(1e-9, 1e6)) if log else draw(st.floats(-1e6, 1e6))
    width = draw(st.floats(1e-2, 1e6))
    high = low * (1 + width) if log else low + width
    return Float(low, high, log=log, steps=draw(st.integers(2, 120)))


@st.composite
def ints(draw):
    log = draw(st.booleans())
    low = draw(st.integers(1 if log else -1000, 1000))
    return Int(low, low + draw(st.integers(0, 900)), log=log, step=draw(st.integers(1, 50)))


ranges = st.one_of(floats(), ints())
seeds = st.integers(0, 2**32 - 1)


@given(ranges)
@settings(max_examples=60, deadline=None)
def test_laws_of_the_grid(grid):
    values = list(grid)
    assert len(values) == len(grid) >= 1
    assert values == sorted(set(values)), "ascending, none twice"
    assert values[0] == grid.low
    assert values[-1] <= grid.high
    if isinstance(grid, Float):
        assert values[-1] == grid.high
        assert len(values) == grid.steps
    assert json.loads(json.dumps(values)) == values
    kind = int if isinstance(grid, Int) else float
    for index, value in list(enumerate(values))[:: max(1, len(values) // 20)]:
        assert type(value) is kind
        assert value in grid
        assert grid.index(value) == index
        assert grid[index] == value
        assert grid.nearest(value) == value
    positions = [grid.position(value) for value in values]
    assert all(0.0 <= position <= 1.0 for position in positions)
    assert positions == sorted(set(positions)), "positions keep the order and tell values apart"
    assert pickle.loads(pickle.dumps(grid)) == grid
    assert restore(json.loads(canonical(describe(grid))), restorable()) == grid
    assert hash(restore(describe(grid), restorable())) == hash(grid)


@given(ranges, seeds)
@settings(max_examples=60, deadline=None)
def test_laws_of_mutation(grid, seed):
    value = grid.draw(np.random.default_rng(seed))
    assert value in grid
    assert grid.draw(np.random.default_rng(seed)) == value
    beside = grid.beside(value)
    assert value not in beside
    assert len(set(beside)) == len(beside) <= 2 * math.log2(len(grid)) + 2
    assert all(value in grid.beside(other) for other in beside), "going there and back"
    at = grid.index(value)
    assert {abs(grid.index(other) - at) for other in beside} <= {2**k for k in range(20)}
    for next_to in (at - 1, at + 1):
        if 0 <= next_to < len(grid):
            assert grid[next_to] in beside


@given(floats(), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_values_are_near_their_exact_place(grid, share):
    index = round(share * (grid.steps - 1))
    exact = index / (grid.steps - 1)
    # Rounded by at most a twentieth of the distance to the next one.
    assert grid.position(grid[index]) == pytest.approx(exact, abs=0.06 / (grid.steps - 1))


def test_known_values():
    assert Float(0, 1, steps=5).values == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert Float(1, 1024, log=True, steps=3).values == (1.0, 32.0, 1024.0)
    assert Float(1e-4, 1e-1, log=True, steps=7).values == (0.0001, 0.00032, 0.001, 0.0032, 0.01, 0.032, 0.1)
    assert list(Float(0, 0.5))[:4] == [0.0, 0.005, 0.01, 0.015]
    assert list(Int(2, 12, step=4)) == [2, 6, 10]
    assert list(Int(5, 5)) == [5]
    assert Int(1, 8)[2:4] == (3, 4)
    assert Int(1, 16).beside(5) == [4, 6, 3, 7, 1, 9, 13]
    assert Float(1e-3, 1e-1, log=True).position(1e-2) == pytest.approx(0.5)
    assert Float(0, 10).position(-3) == 0.0
    assert Float(0, 10).position(12) == 1.0
    assert Float(1e-4, 1e-1, log=True, steps=4).nearest(0.004) == 0.01  # above the geometric mean 0.00316
    assert Float(1e-4, 1e-1, log=True, steps=4).nearest(0.003) == 0.001
    assert Int(0, 10, step=5).nearest(7) == 5
    assert Int(1, 5).count(3) == 1
    assert 3.0 not in Int(1, 5)
    assert True not in Int(1, 5)
    assert 1 not in Float(0, 1)
    assert "1" not in Float(0, 1)


def test_values_print_short():
    assert max(len(repr(value)) for value in Float(1e-4, 1e-1, log=True)) <= len("0.0001072")
    assert max(len(repr(value)) for value in Float(0, 1, steps=1001)) <= len("0.001")


def test_equal_by_parameters():
    assert Float(0, 1) == Float(0.0, 1.0) != Float(0, 1, steps=11)
    assert hash(Float(0, 1)) == hash(Float(-0.0, 1.0))
    assert canonical(describe(Float(0, 1))) == canonical(describe(Float(-0.0, 1.0)))
    assert Int(1, 4) != Int(1, 4, log=True)
    assert Int(1, 4) != (1, 2, 3, 4)
    with pytest.raises(FrozenInstanceError):
        Int(1, 4).low = 2


def test_logarithmic_whole_numbers_are_drawn_evenly_on_their_scale():
    grid, rng = Int(1, 1024, log=True), np.random.default_rng(0)
    drawn = np.array([grid.draw(rng) for _ in range(4000)])
    # Half of the scale from 0.5 to 1024.5 is below sqrt(0.5 * 1024.5) = 22.6.
    assert 0.46 < np.mean(drawn <= 22) < 0.54
    even = np.array([Int(1, 1024).draw(rng) for _ in range(4000)])
    assert 0.46 < np.mean(even <= 512) < 0.54


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(1, 0), "low must be the smaller"),
        (lambda: Float(1, 1), "low must be the smaller"),
        (lambda: Float(0, 1, log=True), "above 0"),
        (lambda: Float(0, math.inf), "finite"),
        (lambda: Float("0", 1), "finite number"),
        (lambda: Float(0, 1, steps=1), "from 2 to 10000"),
        (lambda: Float(0, 1, steps=10_001), "from 2 to 10000"),
        (lambda: Float(0, 1, log=1), "True, False"),
        (lambda: Float(1, 1 + 1e-15, steps=101), "floating point"),
        (lambda: Int(1.0, 4), "whole number"),
        (lambda: Int(4, 1), "greater one"),
        (lambda: Int(0, 4, log=True), "above 0"),
        (lambda: Int(0, 4, step=0), "step"),
        (lambda: Int(0, 10_000), "larger step"),
        (lambda: Int(1, 5).index(9), "not among"),
        (lambda: Int(1, 5).beside(9), "not among"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# As choices of a space.

SPACE = space_from(network, {"kind": ("a", "b"), "lr": Float(1e-4, 1e-1, log=True, steps=31), "depth": Int(2, 9)})


@given(st.dictionaries(st.sampled_from("pqrs"), ranges, min_size=1, max_size=3), seeds)
@settings(max_examples=60, deadline=None)
def test_laws_of_the_verbs(choices, seed):
    space = space_from(network, {"first": ("a", "b"), **choices})
    rng = np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    assert space.architecture(json.loads(a.to_json())["genes"]) == a
    assert space.discretise(space.relax(a)) == a
    assert space.encode(a).shape == (2 + len(choices),)
    assert (space.encode(a) == space.encode(b)).all() == (a == b)
    assert ((space.encode(a) >= 0) & (space.encode(a) <= 1)).all()
    neighbours = space.neighbours(a)
    assert a not in neighbours
    assert len(set(neighbours)) == len(neighbours)
    assert all(a in space.neighbours(neighbour) for neighbour in neighbours[:5])
    assert space.mutate(a, rng) in neighbours
    child = space.crossover(a, b, rng)
    assert all(child.genes[name] in (a.genes[name], b.genes[name]) for name in child.genes)
    assert space.size() == 2 * math.prod(len(options) for options in choices.values())


def test_a_space_keeps_its_ranges():
    assert SPACE.size() == 2 * 31 * 8 == len(list(SPACE.enumerate()))
    assert SPACE.alive({"depth": (3, 4)})["depth"] == (3, 4)
    assert len(SPACE.alive(None)["lr"]) == 31
    middle = SPACE.architecture({"kind": "b", "lr": SPACE.choices["lr"][15], "depth": 9})
    np.testing.assert_allclose(SPACE.encode(middle), [0, 1, 0.5, 1], atol=0.002)
    other = space_from(network, {**SPACE.choices, "depth": Int(2, 10)})
    assert other.identity != SPACE.identity
    assert space_from(network, dict(SPACE.choices)).identity == SPACE.identity


def test_mutations_of_a_range_are_mostly_small_and_sometimes_far():
    space = space_from(network, {"x": Int(0, 1000)})
    rng = np.random.default_rng(0)
    parent = space.architecture({"x": 500})
    steps = np.array([abs(space.mutate(parent, rng).genes["x"] - 500) for _ in range(2000)])
    assert np.median(steps) <= 16
    assert np.mean(steps >= 128) > 0.1
    assert set(steps) == {1, 2, 4, 8, 16, 32, 64, 128, 256}


def test_errors_name_the_range_and_the_nearest_value():
    with pytest.raises(ArchitectureError, match=r"lr is 0\.011; legal: a value of Float\(.*nearest: 0\.01"):
        SPACE.architecture({"kind": "a", "lr": 0.011, "depth": 2})
    with pytest.raises(ArchitectureError, match=r"depth is 3\.0; legal: a value of Int\(low=2, high=9"):
        SPACE.architecture({"kind": "a", "lr": 0.01, "depth": 3.0})
    with pytest.raises(ArchitectureError, match="depth is 'deep'"):
        SPACE.architecture({"kind": "a", "lr": 0.01, "depth": "deep"})


def test_a_member_of_a_group_is_no_range():
    class Grouped(SearchSpace):
        identity = "grouped"

        @property
        def choices(self):
            return {"a": Int(0, 3), "b": (0, 1)}

        @property
        def choice_groups(self):
            return {"both": Group(("a", "b"), 1, 0)}

        def build(self, architecture):
            return nn.Identity()

    with pytest.raises(InvalidInputError, match="'a' is a range"):
        Grouped().sample(np.random.default_rng(0))
