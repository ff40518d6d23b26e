"""The smallest and the largest architecture of each space that has them, by counted operations."""

import numpy as np
import pytest
import torch

from nasplat import space_from
from nasplat.cost.count import count
from nasplat.errors import UnsupportedError
from nasplat.testing.landscapes import Edges, Levels
from search_spaces import Bats, BinaryGrowth, DartsCell, MetaKernel, Sandglass
from search_spaces.sandglass import Stage

STAGES = (Stage(16, 1, (2, 3), (2, 4)), Stage(64, 2, (1,), (2, 6)))
SPACES = {
    "sandglass": Sandglass.small(stages=STAGES),
    "sandglass of the code": Sandglass.small(stages=STAGES, variant="code", kernels=(3, 7)),
    "growth": BinaryGrowth.small(),
    "growth in groups": BinaryGrowth.small(groups=(4, 8)),
    "growth aggregated": BinaryGrowth.small(groups=(2, 8), aggregation=(True,)),
    "meta kernel": MetaKernel.small(),
    "meta kernel of all kinds": MetaKernel.small(
        kernels=("conv_3x3", "identity", "avg_pool_5x5", "conv_1x5", "zero"), skip=True, parts=2
    ),
}


def ops(space, architecture):
    if isinstance(space, BinaryGrowth):  # its closed form, which is tested to be what is counted
        return space.ops(architecture)
    with torch.device("meta"):
        return count(space.build(architecture).eval(), torch.empty(1, space.in_channels, 16, 16)).ops


@pytest.mark.parametrize("name", SPACES)
def test_no_other_takes_fewer_or_more_operations(name):
    space = SPACES[name]
    smallest, largest = space.extremes()
    assert space.architecture(smallest.genes) == smallest and space.architecture(largest.genes) == largest
    low, high = ops(space, smallest), ops(space, largest)
    rng = np.random.default_rng(0)
    some = [space.sample(rng) for _ in range(3)]
    around = [a for extreme in (smallest, largest) for a in space.neighbours(extreme)]
    for architecture in [*some, *(around[int(i)] for i in rng.choice(len(around), min(8, len(around)), False))]:
        assert low <= ops(space, architecture) <= high


def test_sandglass_extremes_among_all_blocks_and_reductions_of_a_stage():
    space = SPACES["sandglass of the code"]
    for extreme, pick in zip(space.extremes(), (min, max), strict=True):
        for stage in ("stage1", "stage2"):
            counted = [
                ops(space, space.architecture({**extreme.genes, f"{stage}/block": b, f"{stage}/reduction": r}))
                for b in space.choices[f"{stage}/block"]
                for r in space.choices[f"{stage}/reduction"]
            ]
            assert ops(space, extreme) == pick(counted)


def test_a_budget_that_refuses_the_largest_is_named():
    with pytest.raises(UnsupportedError, match="max_ops is 100000"):
        BinaryGrowth.small(max_ops=100_000).extremes()


def test_by_default_numbers_have_extremes():
    smallest, largest = Levels(3, 4).extremes()
    assert set(smallest.genes.values()) == {0} and set(largest.genes.values()) == {3}
    mixed = space_from(lambda genes: None, {"width": (32, 8, 16), "norm": (True, False), "rate": (0.5, 0.1)})
    assert [dict(a.genes) for a in mixed.extremes()] == [
        {"width": 8, "norm": False, "rate": 0.1},
        {"width": 32, "norm": True, "rate": 0.5},
    ]


@pytest.mark.parametrize("space", [Bats.small(), DartsCell.small(), Edges()])
def test_spaces_of_operations_have_none(space):
    with pytest.raises(UnsupportedError, match="does not say which architecture is the smallest"):
        space.extremes()
