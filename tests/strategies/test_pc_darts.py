import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from experts import Experts, alphas, moment
from torch.utils.flop_counter import FlopCounterMode

from nasplat.cost import CostTable, Resource
from nasplat.errors import InvalidInputError
from nasplat.task import Task
from nasplat.testing.landscapes import Levels, TinyCell
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from search_spaces import DartsCell
from strategies.pc_darts import PcDarts

QUICK = PcDarts(epochs=3, warmup=1, batch_size=16, partial=1, alpha_lr=0.05)


class TestContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return QUICK


def test_values_of_the_authors_code():
    pc = PcDarts()
    assert (pc.epochs, pc.warmup, pc.batch_size, pc.partial) == (50, 15, 256, 4)
    assert (pc.lr, pc.lr_min, pc.momentum, pc.weight_decay, pc.clip) == (0.1, 0.0, 0.9, 3e-4, 5.0)
    assert (pc.alpha_lr, pc.alpha_weight_decay, pc.alpha_betas) == (6e-4, 1e-3, (0.5, 0.999))


def test_starts_with_small_alphas_and_an_edge_weight_per_member():
    begun = PcDarts().initial(moment(DartsCell.small()), np.random.default_rng(0))
    betas = {name: value for name, value in begun.items() if name.startswith("beta:")}
    assert {name: len(value) for name, value in betas.items()} == {
        f"beta:{kind}/node{node}": node for kind in ("normal", "reduction") for node in (2, 3, 4, 5)
    }
    assert len(begun) == 28 + 8
    # 1e-3 * N(0, 1), all 28 betas together.
    assert 0.0005 < float(torch.cat(list(betas.values())).std()) < 0.002


def test_a_space_without_groups_has_no_edge_weights():
    at = moment(Levels(length=2, levels=3))
    parameters = PcDarts().initial(at, np.random.default_rng(0))
    assert list(parameters) == ["x0", "x1"]
    assert PcDarts().mixture(parameters, at)["x1"].sum().item() == pytest.approx(1)
    assert PcDarts().odds(parameters, at)["x1"].sum().item() == pytest.approx(1)


def test_an_option_counts_with_alpha_times_beta():
    parameters = alphas(edge0=[0.0, 0.0, math.log(2)], edge1=[0.0, 0.0, 0.0], edge2=[0.0, 0.0, 0.0])
    parameters["beta:node"] = torch.tensor([0.0, math.log(2), 0.0])
    mixture = PcDarts().mixture(parameters, moment(Experts()))
    assert mixture["edge0"].tolist() == pytest.approx([1 / 16, 1 / 16, 1 / 8])
    assert mixture["edge1"].tolist() == pytest.approx([1 / 6] * 3)
    assert mixture["edge2"].tolist() == pytest.approx([1 / 12] * 3)
    # Alpha alone would pick edge0; the edge weight makes it edge1.
    found = Experts().discretise({name: weights.detach() for name, weights in mixture.items()})
    assert found.genes == {"edge0": "off", "edge1": "noise", "edge2": "off"}


def test_alphas_and_betas_have_the_gradient_of_the_loss():
    space = DartsCell.small(cells=2, channels=4)
    explorer = PcDarts(partial=2)
    torch.manual_seed(0)
    supernet = space.supernet(partial=2).double()
    at = moment(space)
    parameters = {
        name: (300 * value).double().requires_grad_()
        for name, value in explorer.initial(at, np.random.default_rng(0)).items()
    }
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)

    def loss():
        return torch.nn.functional.cross_entropy(supernet(x, explorer.mixture(parameters, at)), y)

    watched = ["beta:normal/node3", "beta:reduction/node5", "normal/node2/from0"]
    gradients = torch.autograd.grad(loss(), [parameters[name] for name in watched])
    for name, gradient in zip(watched, gradients, strict=True):
        with torch.no_grad():
            parameters[name][0] += 1e-5
            above = loss()
            parameters[name][0] -= 2e-5
            slope = (above - loss()) / 2e-5
            parameters[name][0] += 1e-5
        assert float(gradient[0]) == pytest.approx(float(slope), rel=1e-4, abs=1e-8)
        assert abs(float(slope)) > 1e-6


def test_a_quarter_of_the_channels_goes_through_the_mixtures():
    space, x = DartsCell.small(cells=1, channels=8), torch.randn(2, 1, 8, 8)
    context = RecordingContext()
    task = Task.fashion_mnist(size=8, limit=24)
    (found,) = explore(PcDarts(epochs=1, warmup=0, batch_size=8), space, task, context)
    assert space.owns(found)
    # Kernels of 8 / 4 channels.
    kernels = [weights for name, weights in context.kept.items() if "sep_conv" in name and weights.ndim == 4]
    assert {len(weights) for weights in kernels} == {2}

    shares = {name: torch.full((8,), 1 / 8) for name in space.choices}
    costs, sizes = [], []
    for partial in (1, 4):
        supernet = space.supernet(partial=partial)
        with FlopCounterMode(display=False) as counter:
            supernet(x, shares)
        costs.append(counter.get_total_flops())
        sizes.append(sum(p.numel() for name, p in supernet.named_parameters() if ".edges." in name))
    assert sizes[1] < sizes[0] / 4
    assert costs[1] < costs[0] / 2


def test_the_space_says_which_partials_are_legal():
    with pytest.raises(InvalidInputError, match="partial is 3; legal: 1, 2, 4, 8"):
        explore(PcDarts(epochs=1, warmup=0, partial=3), DartsCell.small(), Task.digits(limit=32), RecordingContext())


def test_finds_the_edge_and_the_option_that_carry_the_signal():
    explorer = PcDarts(epochs=4, warmup=1, batch_size=32, partial=1, alpha_lr=0.05)
    for seed in range(3):
        (found,) = explore(explorer, Experts(), Task.digits(limit=400), RecordingContext(seed))
        assert found.genes == {"edge0": "off", "edge1": "image", "edge2": "off"}


def test_expected_costs_are_of_as_many_edges_as_are_picked():
    space, explorer = TinyCell(), QUICK
    costs_ms = {"zero": 0.0, "identity": 1.0, "pool": 3.0, "conv": 10.0, "relu": 1.0, "tanh": 2.0}
    table = CostTable.fit(
        space, "latency_ms", lambda a: sum(costs_ms[option] for option in a.genes.values()), np.random.default_rng(0)
    )
    at = moment(space)
    parameters = explorer.initial(at, np.random.default_rng(0))
    odds = explorer.odds(parameters, at)
    assert sum(float(odds[f"edge{index}"].sum()) for index in range(3)) == pytest.approx(2)
    assert float(odds["activation"].sum()) == pytest.approx(1)
    # Sure of an architecture: its own cost.
    genes = {"edge0": "conv", "edge1": "zero", "edge2": "pool", "activation": "tanh"}
    sure = {name: 100 * weights for name, weights in space.relax(space.architecture(genes)).items()}
    sure["beta:edges"] = torch.tensor([100.0, 0.0, 100.0])
    assert float(table.expected(explorer.odds(sure, at))) == pytest.approx(15, rel=1e-4)
    reports = []
    pulled = replace(explorer, alpha_lr=0.2, resource=Resource(table, target=1.0, weight=10.0))
    explore(pulled, space, Task.digits(limit=64), RecordingContext(), reports)
    expected = [report.metrics["expected_latency_ms"] for report in reports]
    assert expected[-1] < 0.9 * expected[0]
