from collections import Counter

import numpy as np
import pytest

from nasplat.testing.landscapes import Edges, TinyCell
from nasplat.testing.strategy_contract import ExplorerContract
from strategies.uniform_paths import UniformPaths


class TestUniformPathsContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return UniformPaths(epochs=3, batch_size=16, candidates=2, recalibrate=2)


def test_one_path_a_step_drawn_evenly():
    space = TinyCell()
    steps = UniformPaths().steps(space, np.random.default_rng(0))
    drawn = [next(steps) for _ in range(2700)]
    assert all(len(paths) == 1 for paths in drawn)
    counts = Counter(paths[0] for paths in drawn)
    # 3 pairs of edges, 3 * 3 operations, 2 activations: 54 architectures, each about 50 times.
    assert len(counts) == space.size() == 54
    chi_square = sum((count - 50) ** 2 / 50 for count in counts.values())
    assert chi_square < 90.6  # 99.9% quantile of 53 degrees of freedom


def test_paths_follow_the_generator():
    def first(seed):
        steps = UniformPaths().steps(Edges(), np.random.default_rng(seed))
        return [next(steps) for _ in range(5)]

    assert first(0) == first(0) != first(1)
