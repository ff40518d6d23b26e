from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nasplat import Task
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.testing.landscapes import TinyCell
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from search_spaces import MetaKernel
from strategies.sandwich_paths import SandwichPaths

SPACE = MetaKernel.small(stages=((8, 1, 2),), head_channels=16)
QUICK = SandwichPaths(epochs=3, batch_size=32, random=1, candidates=2, recalibrate=1)


class TestSandwichPathsContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return QUICK

    @pytest.fixture
    def space(self):
        return SPACE


def test_a_step_has_the_largest_first_random_ones_and_the_smallest():
    smallest, largest = SPACE.extremes()
    steps = SandwichPaths(random=3).steps(SPACE, np.random.default_rng(0))
    drawn = [next(steps) for _ in range(20)]
    assert all(len(paths) == 5 and paths[0] == largest and paths[-1] == smallest for paths in drawn)
    assert {path for paths in drawn for path in paths[1:-1]} == set(SPACE.enumerate())
    assert [len(next(SandwichPaths(random=0).steps(SPACE, np.random.default_rng(0)))) for _ in range(2)] == [2, 2]


def test_a_space_without_extremes_is_refused():
    with pytest.raises(UnsupportedError, match="does not say which architecture is the smallest"):
        explore(QUICK, TinyCell(), Task.digits(limit=64), RecordingContext())


@dataclass(frozen=True)
class Constant(MetaKernel):
    """Its supernet returns a free vector of logits per extreme: gradients can be told by hand."""

    def supernet(self, keep=None, partial=1):
        return Logits(self)


class Logits(torch.nn.Module):
    def __init__(self, space):
        super().__init__()
        self.space = space
        self.large = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        self.small = torch.nn.Parameter(torch.tensor([0.0, 0.0]))

    def forward(self, x, relaxed):
        found = self.space.discretise(relaxed)
        return (self.large if found == self.space.extremes()[1] else self.small).expand(len(x), 2)


@pytest.mark.parametrize("distil", [True, False])
def test_in_place_distillation_teaches_the_smallest_what_the_largest_predicts(distil):
    x = torch.zeros(4, 1, 8, 8)
    y = torch.tensor([1, 1, 1, 1])
    task = Task.from_tensors(x, y, x, y)
    context = RecordingContext()
    explorer = SandwichPaths(
        epochs=1, batch_size=4, lr=1.0, momentum=0.0, weight_decay=0.0, clip=None, random=0, distil=distil,
        candidates=1,
    )  # fmt: skip
    explore(explorer, Constant(stages=((8, 1, 2),), in_channels=1, classes=2), task, context)
    hot = float(torch.softmax(torch.tensor([1.0, 0.0]), 0)[0])
    # The gradient of cross-entropy in the logits is softmax minus target; a step of rate 1 subtracts it.
    assert context.kept["large"].tolist() == pytest.approx([1 - hot, 1 - (1 - hot)])
    target = [hot, 1 - hot] if distil else [0.0, 1.0]
    assert context.kept["small"].tolist() == pytest.approx([target[0] - 0.5, target[1] - 0.5])


def test_distillation_needs_cross_entropy():
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    task = Task.from_tensors(x, y, x, y, loss=lambda outputs, targets: outputs.square().mean())
    with pytest.raises(InvalidInputError, match="distil=False"):
        explore(QUICK, SPACE, task, RecordingContext())


@pytest.mark.parametrize("wrong", [{"random": -1}, {"random": 1.5}, {"distil": 1}, {"epochs": 0}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        SandwichPaths(**wrong)
