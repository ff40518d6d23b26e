import numpy as np
import pytest
import torch
from torch import nn

from nasplat import Task
from nasplat.errors import InvalidInputError
from nasplat.nn.leading import LeadingBatchNorm2d
from nasplat.weight_sharing.inherited import SupernetPath
from nasplat.weight_sharing.recalibrate import calibration_batches, kept_statistics, recalibrate
from search_spaces import Bats, BinaryGrowth, DartsCell, MetaKernel, Sandglass

CPU = torch.device("cpu")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(1), nn.BatchNorm2d(1, momentum=None), LeadingBatchNorm2d(1)])
def test_statistics_are_averages_over_the_batches(norm):
    norm.running_mean.fill_(7.0)
    momentum = norm.momentum
    norm.eval()
    batches = [torch.tensor([0.0, 2.0, 4.0, 6.0]).view(4, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)]
    recalibrate(norm, batches)
    # Means 3 and 2; unbiased variances (9 + 1 + 1 + 9) / 3 and (1 + 1) / 1.
    assert norm.running_mean.item() == pytest.approx(2.5)
    assert norm.running_var.item() == pytest.approx((20 / 3 + 2) / 2)
    assert norm.momentum == momentum and not norm.training
    assert norm.num_batches_tracked == 2


class Twice(nn.Module):
    """One norm for two features, a norm that nothing reaches, one that keeps no statistics, and dropout."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, momentum=0.3)
        self.idle = nn.BatchNorm1d(1)
        self.without = nn.BatchNorm1d(1, track_running_stats=False)
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x):
        self.seen.append((self.dropout.training, torch.is_grad_enabled()))
        return self.norm(x * self.scale) + self.norm(x + 10) + self.dropout(self.without(x))


def test_only_statistics_change():
    network = Twice()
    network.dropout.eval()
    network.idle.running_mean.fill_(3.0)
    modes = [module.training for module in network.modules()]
    recalibrate(network, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])])
    # Batch means are 1, 11, 5, 15: a norm that is applied twice averages over all four.
    assert network.norm.running_mean.item() == pytest.approx(8.0)
    assert network.norm.running_var.item() == pytest.approx(2.0)
    assert (network.idle.running_mean.item(), network.idle.running_var.item()) == (0.0, 1.0)
    assert network.norm.momentum == 0.3
    assert [module.training for module in network.modules()] == modes
    assert network.seen == [(False, False)] * 2
    assert network.scale.grad is None


def test_an_error_leaves_momentum_and_modes_as_they_were():
    network = Twice()
    with pytest.raises(InvalidInputError, match="no batch"):
        recalibrate(network, [])
    with pytest.raises(ValueError, match="2D or 3D"):
        recalibrate(network, [torch.zeros(2)])
    assert network.norm.momentum == 0.3 and network.norm.training and not network.norm._forward_pre_hooks


def test_kept_statistics_come_back_after_an_error_too():
    network = Twice()
    recalibrate(network, [torch.tensor([[0.0], [2.0]])])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    buffer = network.norm.running_mean
    with pytest.raises(KeyError), kept_statistics(network):
        recalibrate(network, [torch.tensor([[5.0], [9.0]])])
        assert network.norm.running_mean.item() != before["norm.running_mean"].item()
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.norm.running_mean is buffer


def test_batches_are_those_of_the_seed_and_go_on_past_one_pass():
    x = torch.arange(10.0)[:, None]
    task = Task.from_tensors(x, torch.arange(10) % 2, x[:2], torch.arange(2), batch_size=3)
    one, two, other = (
        [batch.flatten().tolist() for batch in calibration_batches(task, 5, seed, CPU)] for seed in (1, 1, 2)
    )
    assert one == two != other
    # Three full batches a pass, and one of a single example, which has no variance.
    assert [len(batch) for batch in one] == [3] * 5
    assert len({value for batch in one[:3] for value in batch}) == 9
    assert one[3:] != one[:2]


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_batches_is_an_integer_from_1(count):
    with pytest.raises(InvalidInputError, match="from 1 up"):
        calibration_batches(Task.digits(), count, 0, CPU)


def test_data_of_single_examples_is_refused():
    x = torch.zeros(1, 3)
    task = Task.from_tensors(x, torch.zeros(1).long(), x, torch.zeros(1).long())
    with pytest.raises(InvalidInputError, match="at least 2 examples"):
        next(calibration_batches(task, 1, 0, CPU))


SPACES = {
    "bats": Bats(cells=2, channels=4, groups=2, in_channels=1, stem_stride=2),
    "merged": Bats(cells=2, channels=4, groups=2, in_channels=1, stem_stride=2, supernet_form="merged"),
    "darts": DartsCell(cells=2, channels=4, in_channels=1, stem_stride=2),
    "meta_kernel": MetaKernel.small(),
    "sandglass": Sandglass.small(),
    "growth": BinaryGrowth.small(max_depth=2, widths=(8, 8)),
}


@pytest.mark.parametrize("name", SPACES)
def test_after_recalibration_a_path_normalises_each_batch_as_training_does(name):
    """With one batch, running statistics are that batch's own (but for the variance's n / (n - 1))."""
    space = SPACES[name]
    torch.manual_seed(0)
    supernet = space.supernet()
    path = SupernetPath(supernet, space, space.sample(np.random.default_rng(1))).eval()
    x = torch.randn(64, 1, 16, 16)
    statistics = {key: value.clone() for key, value in supernet.state_dict().items()}
    with kept_statistics(supernet):
        recalibrate(path, [x])
        with torch.no_grad():
            scored = path(x)
            for module in path.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
            trained = path(x)
        path.eval()
    assert all(torch.equal(value, statistics[key]) for key, value in supernet.state_dict().items())
    # Signs of what is near 0 may flip: compare the bulk.
    error = (scored - trained).abs().flatten()
    assert error.median() < 0.05 * trained.std()
    with torch.no_grad():
        assert not torch.allclose(path(x), scored, atol=1e-2)
