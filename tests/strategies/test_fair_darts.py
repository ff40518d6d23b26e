import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from experts import Experts, alphas, moment

from nasplat.cost import CostTable, Resource
from nasplat.errors import InvalidInputError
from nasplat.task import Task
from nasplat.testing.landscapes import TinyCell
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from nasplat.weight_sharing.bilevel import Run
from strategies.fair_darts import FairDarts


class TestContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return FairDarts(epochs=3, batch_size=16, alpha_lr=0.05)


def test_values_of_the_authors_code():
    fair = FairDarts()
    assert (fair.epochs, fair.warmup, fair.batch_size, fair.lr, fair.lr_min) == (50, 0, 128, 0.005, 0.001)
    assert (fair.alpha_lr, fair.alpha_betas, fair.alpha_weight_decay) == (3e-3, (0.9, 0.999), 1e-3)
    assert (fair.zero_one, fair.threshold) == (10.0, 0.85)


def test_begins_half_on_and_off_has_no_part():
    at = moment(Experts())
    begun = FairDarts().initial(at, np.random.default_rng(0))
    mixture = FairDarts().mixture(begun, at)
    assert list(mixture) == list(Experts().choices)
    assert all(weights.tolist() == [0.0, 0.5, 0.5] for weights in mixture.values())


def test_options_do_not_take_from_each_other():
    at = moment(Experts())

    def weights(values):
        return FairDarts().mixture({"edge0": values, "edge1": values, "edge2": values}, at)["edge1"]

    values = torch.tensor([0.4, math.log(3), -math.log(3)])
    assert weights(values).tolist() == pytest.approx([0.0, 0.75, 0.25])
    jacobian = torch.autograd.functional.jacobian(weights, values)
    assert jacobian.flatten().tolist() == pytest.approx([0, 0, 0, 0, 3 / 16, 0, 0, 0, 3 / 16])


def test_zero_one_loss_pushes_away_from_a_half():
    at = moment(Experts())
    parameters = alphas(edge0=[0.0, 0.0, 0.0], edge1=[2.0, math.log(3), -math.log(3)], edge2=[0.0, 0.0, 0.0])
    loss = FairDarts().penalty(parameters, at)
    # Six options that are not off, two of them a quarter away from a half.
    assert loss.item() == pytest.approx(-10 * 2 * 0.25**2 / 6)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    off, above, below = gradients["edge1"].tolist()
    # -10 / 6 * 2 * (s - 0.5) * s * (1 - s): a descent raises what is above a half.
    assert (off, above) == (0.0, pytest.approx(-10 / 6 * 2 * 0.25 * 0.75 * 0.25))
    assert below == pytest.approx(-above)
    assert gradients["edge0"].tolist() == [0.0, 0.0, 0.0]


def test_alphas_leave_the_middle():
    explorer = FairDarts(epochs=3, batch_size=16, alpha_lr=0.2)
    sides = {}
    for zero_one in (0.0, 10.0):
        context = RecordingContext()
        explore(
            FairDarts(epochs=explorer.epochs, batch_size=16, alpha_lr=0.2, zero_one=zero_one),
            TinyCell(),
            Task.digits(limit=200),
            context,
        )
        values = torch.cat([value[1:] for name, value in context.load()["parameters"].items() if "edge" in name])
        sides[zero_one] = float((torch.sigmoid(values) - 0.5).abs().mean())
    assert sides[10.0] > 0.4 > sides[0.0]


def run_of(space, parameters):
    return Run(moment(space), None, [], None, parameters, None)


def test_reports_how_many_picked_options_reach_the_threshold():
    space = TinyCell()
    sure, unsure = math.log(0.9 / 0.1), math.log(0.8 / 0.2)
    parameters = alphas(
        edge0=[9.0, 0.0, sure, 0.0],
        edge1=[0.0, unsure, 0.0, 0.0],
        edge2=[0.0, -1.0, -1.0, -1.0],
        activation=[sure, sure + 1],
    )
    assert FairDarts().metrics(run_of(space, parameters)) == {"picked_above_threshold": 2 / 3}
    assert FairDarts(threshold=0.75).metrics(run_of(space, parameters)) == {"picked_above_threshold": 1.0}
    reports = []
    explore(FairDarts(epochs=2, batch_size=16), space, Task.digits(limit=64), RecordingContext(), reports)
    assert [report.metrics["picked_above_threshold"] for report in reports] == [0.0, 0.0]


@dataclass(frozen=True)
class Strict(TinyCell):
    def is_valid(self, genes):
        return genes["activation"] == "tanh"


def test_does_not_report_a_pick_that_the_space_refuses():
    parameters = {name: torch.zeros(len(options)) for name, options in Strict().choices.items()}
    assert FairDarts().metrics(run_of(Strict(), parameters)) == {}


def test_expected_costs_are_of_shares():
    space = TinyCell()
    costs_ms = {"zero": 0.0, "identity": 1.0, "pool": 3.0, "conv": 10.0, "relu": 1.0, "tanh": 2.0}
    table = CostTable.fit(
        space, "latency_ms", lambda a: sum(costs_ms[option] for option in a.genes.values()), np.random.default_rng(0)
    )
    explorer = FairDarts(epochs=4, batch_size=16, alpha_lr=0.1)
    at = moment(space)
    odds = explorer.odds(explorer.initial(at, np.random.default_rng(0)), at)
    assert {name: pytest.approx(1) for name in odds} == {name: float(weights.sum()) for name, weights in odds.items()}
    found = {}
    for weight in (0.0, 10.0):
        pulled = FairDarts(
            epochs=4, batch_size=16, alpha_lr=0.1, zero_one=1.0, resource=Resource(table, target=1.0, weight=weight)
        )
        reports = []
        (architecture,) = explore(pulled, space, Task.digits(limit=100), RecordingContext(), reports)
        found[weight] = table.cost(architecture), reports[-1].metrics["expected_latency_ms"]
    assert found[10.0][1] < found[0.0][1]
    assert found[10.0][0] == pytest.approx(min(table.cost(architecture) for architecture in space.enumerate()))


def test_finds_the_option_that_carries_the_signal():
    explorer = FairDarts(epochs=4, batch_size=32, alpha_lr=0.05, lr=0.05, zero_one=1.0)
    for seed in range(3):
        (found,) = explore(explorer, Experts(), Task.digits(limit=400), RecordingContext(seed))
        assert found.genes == {"edge0": "off", "edge1": "image", "edge2": "off"}


@pytest.mark.parametrize("arguments", [{"zero_one": -1.0}, {"threshold": 1.0}, {"temperature": 0.5}])
def test_refuses(arguments):
    with pytest.raises(InvalidInputError, match=next(iter(arguments))):
        FairDarts(**arguments)
