from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.space import Group
from nasplat.testing.landscapes import Levels, TinyCell
from nasplat.testing.strategy_contract import ExplorerContract
from search_spaces import BinaryGrowth, DartsCell, MetaKernel
from strategies.fair_paths import FairPaths, balanced_block, block_length


class TestFairPathsContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return FairPaths(epochs=3, batch_size=32, candidates=2, recalibrate=2)


@dataclass(frozen=True)
class Uneven(Levels):
    """Free choices of 2 and 3 options, and a group that picks 2 of 3 members with 2, 2 and 1 other options."""

    @property
    def choices(self):
        return {
            "two": ("a", "b"),
            "three": (1, 2, 3),
            "from0": ("off", "x", "y"),
            "from1": ("off", "x", "y"),
            "from2": ("off", "x"),
        }

    @property
    def choice_groups(self):
        return {"node": Group(("from0", "from1", "from2"), 2, "off")}


def counts(block, name):
    return Counter(architecture.genes[name] for architecture in block)


def test_where_all_choices_have_m_options_a_block_takes_each_once():
    space = Levels(length=5, levels=4)
    block = balanced_block(space, np.random.default_rng(0))
    assert len(block) == 4
    for name in space.choices:
        assert sorted(architecture.genes[name] for architecture in block) == [0, 1, 2, 3]


def test_counts_of_a_block_of_uneven_choices_and_a_group():
    space = Uneven()
    # lcm(2, 3) = 6; a member is on in 2/3 of the paths, which must be a multiple of 2 options: 3 paths, then 6.
    assert block_length(space) == 6
    for seed in range(20):
        block = balanced_block(space, np.random.default_rng(seed))
        assert counts(block, "two") == {"a": 3, "b": 3}
        assert counts(block, "three") == {1: 2, 2: 2, 3: 2}
        assert counts(block, "from0") == counts(block, "from1") == {"off": 2, "x": 2, "y": 2}
        assert counts(block, "from2") == {"off": 2, "x": 4}
        assert all(space.architecture(architecture.genes) == architecture for architecture in block)


def test_a_darts_cell_has_blocks_of_210_paths():
    space = DartsCell.small()
    assert block_length(space) == 210
    block = balanced_block(space, np.random.default_rng(0))
    for node in (2, 3, 4, 5):
        for source in range(node):
            found = counts(block, f"normal/node{node}/from{source}")
            off = found.pop(space.operations[0], 0)
            assert off == 210 - 420 // node
            assert set(found.values()) == {420 // node // 7} and len(found) == 7


def test_within_a_block_counts_differ_by_one_at_most():
    space = Uneven()
    block = balanced_block(space, np.random.default_rng(3))
    for end in range(1, len(block)):
        for name in ("two", "three"):
            found = [counts(block[:end], name)[option] for option in space.choices[name]]
            assert max(found) - min(found) <= 1
        on = [sum(a.genes[name] != "off" for a in block[:end]) for name in ("from0", "from1", "from2")]
        assert max(on) - min(on) <= 1


def test_choices_are_shuffled_independently():
    space = Levels(length=2, levels=3)
    rng = np.random.default_rng(0)
    seen = Counter(
        tuple(sorted((a.genes["x0"], a.genes["x1"]) for a in balanced_block(space, rng))) for _ in range(600)
    )
    # 3! pairings of the two columns, each about 100 times: 99.9% quantile of 5 degrees of freedom.
    assert len(seen) == 6
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 20.5


def test_members_of_a_group_are_paired_evenly():
    rng = np.random.default_rng(0)
    pairs = Counter(
        tuple(name for name in ("from0", "from1", "from2") if a.genes[name] != "off")
        for _ in range(200)
        for a in balanced_block(Uneven(), rng)
    )
    assert sorted(pairs.values()) == [400, 400, 400]  # each of three paths leaves out one member


def test_steps_are_whole_blocks_or_parts_of_them():
    space = Uneven()
    whole = FairPaths().steps(space, np.random.default_rng(0))
    parts = FairPaths(paths=2).steps(space, np.random.default_rng(0))
    for _ in range(3):
        assert list(next(whole)) == [path for _ in range(3) for path in next(parts)]
    with pytest.raises(InvalidInputError, match=r"6 paths, so that legal are None and 1, 2, 3, 6"):
        next(FairPaths(paths=4).steps(space, np.random.default_rng(0)))


def test_spaces_with_even_choices_need_short_blocks():
    assert block_length(MetaKernel.small()) == 6  # 3 kernels, 2 expansions
    assert block_length(TinyCell()) == 18  # a pair of 3 edges with 3 operations each, and 2 activations


@dataclass(frozen=True)
class Picky(Levels):
    most: int = 0

    def is_valid(self, genes):
        return sum(genes.values()) <= self.most


def test_a_space_that_refuses_some_paths_is_drawn_again_and_one_that_refuses_too_many_is_refused():
    # Of two choices of 3 levels, the only block whose sums stay at 2 pairs each level with its opposite.
    block = balanced_block(Picky(2, 3, most=2), np.random.default_rng(0))
    assert sorted((a.genes["x0"], a.genes["x1"]) for a in block) == [(0, 2), (1, 1), (2, 0)]
    with pytest.raises(UnsupportedError, match="UniformPaths"):
        balanced_block(Picky(2, 3, most=1), np.random.default_rng(0))
    # Aggregation without groups is refused, so not every block of this space will do.
    space = BinaryGrowth.small(groups=(1, 2))
    assert all(space.is_valid(a.genes) for a in balanced_block(space, np.random.default_rng(0)))


@pytest.mark.parametrize("paths", [0, -1, 1.0, True])
def test_a_wrong_number_of_paths_is_refused(paths):
    with pytest.raises(InvalidInputError, match="paths"):
        FairPaths(paths=paths)
