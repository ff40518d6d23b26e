from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn
from torch.nn import functional

from nasplat import Study, Task, at_least, maximise, minimise
from nasplat.cost import BatchMeter, Bench, CostMeter, Count, Measurement, ZeroCost
from nasplat.cost.zero_cost import SCORES
from nasplat.errors import InvalidInputError, NasplatWarning, NonFiniteError, UnsupportedError
from nasplat.identity import canonical, describe
from nasplat.nn import BinaryConv2d, ExpertBinaryConv2d, set_binarisation
from nasplat.nn.binary import BinaryBlock
from nasplat.restorable import restorable
from nasplat.result import restored
from nasplat.search import Assignment
from nasplat.strategy import Evaluate
from nasplat.task import cross_entropy
from nasplat.worker import Worker
from search_spaces import Bats, BinaryGrowth, DartsCell, MetaKernel, Sandglass
from strategies import RandomSearch, RegularizedEvolution
from tests.helpers import Conv

ALL = ZeroCost(*SCORES, batch_size=8)


@pytest.fixture
def measure(tmp_path):
    def score(model, x, y=None, *names, loss=cross_entropy):
        y = torch.zeros(len(x), dtype=torch.long) if y is None else y
        return ZeroCost(*(names or SCORES)).measure_batch(model, x, y, loss, Bench(tmp_path))

    return score


def linear(*rows, bias=None):
    weight = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(torch.tensor(bias))
    return layer


def convolutional(*activations):
    torch.manual_seed(0)
    first = activations[0] if activations else nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), first, nn.Dropout(0.5), nn.Flatten(), nn.Linear(6 * 36, 3)
    )


def images(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)


# synflow


def test_synflow_by_hand(measure):
    """Two layers, 1 - 2 - 1: R is 1 * 2 * 4 + 1 * 3 * 5 = 23, and each layer's weights share it out: 23 + 23."""
    model = nn.Sequential(linear([2.0], [-3.0]), nn.ReLU(), linear([-4.0, 5.0]))
    assert measure(model, torch.randn(2, 1), None, "synflow").values == {"synflow": 46.0}


def test_synflow_takes_biases_into_the_flow_and_not_into_the_sum(measure):
    """R is 2 * (3 * 1 + 1) = 8. The first weight's part is 3 * 2 = 6, the second's 2 * 4 = 8, the bias' is left out."""
    model = nn.Sequential(linear([-3.0], bias=[-1.0]), linear([2.0]))
    assert measure(model, torch.randn(2, 1), None, "synflow").values == {"synflow": 14.0}


def test_synflow_passes_by_batch_norm(measure):
    model = nn.Sequential(linear([2.0], [-3.0]), nn.BatchNorm1d(2), linear([-4.0, 5.0]))
    nn.init.constant_(model[1].weight, 7.0)
    assert measure(model, torch.randn(2, 1), None, "synflow").values == {"synflow": 46.0}


def test_synflow_is_not_clipped_by_relu6(measure):
    class Clipped(nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.first, self.second, self.clip = linear([100.0]), linear([1.0]), clip

        def forward(self, x):
            return self.second(self.clip(self.first(x)))

    clips = (nn.ReLU(), nn.ReLU6(), functional.relu6, lambda x: functional.hardtanh(x, 0.0, 6.0))
    assert [measure(Clipped(clip), torch.randn(2, 1), None, "synflow").values["synflow"] for clip in clips] == [
        200.0
    ] * 4


def test_synflow_depends_on_the_shape_of_the_data_alone(measure):
    model = convolutional()
    values = {measure(model, *images(n, seed), "synflow").values["synflow"] for n, seed in ((8, 0), (8, 1), (2, 2))}
    assert len(values) == 1
    assert measure(model, images()[0] * 1e6, images()[1], "synflow").values["synflow"] in values


def test_synflow_does_not_overflow_where_single_precision_does(measure):
    model = nn.Sequential(*[linear([1e10]) for _ in range(10)])
    assert measure(model, torch.randn(2, 1), None, "synflow").values["synflow"] == pytest.approx(1e101, rel=1e-5)
    with pytest.raises(NonFiniteError, match="synflow is inf"):
        measure(nn.Sequential(*[linear([1e20]) for _ in range(20)]), torch.randn(2, 1), None, "synflow")


def test_synflow_of_binary_layers_counts_paths(measure):
    """Weights are signs, of absolute value 1: whatever the latent ones, each of two layers gets all 3 * 4 * 9 paths."""
    model = nn.Sequential(BinaryConv2d(4, 3, 3), BinaryConv2d(3, 1, 1))
    nn.init.constant_(model[0].scale, -2.0)
    x = torch.randn(2, 4, 3, 3)
    assert measure(model, x, None, "synflow").values["synflow"] == 2 * 2 * (3 * 4 * 9)
    nn.init.normal_(model[0].weight)
    assert measure(model, x, None, "synflow").values["synflow"] == 2 * 2 * (3 * 4 * 9)
    set_binarisation(model, weights=False)
    nn.init.constant_(model[0].weight, -0.5)
    nn.init.constant_(model[1].weight, 0.25)
    assert measure(model, x, None, "synflow").values["synflow"] == pytest.approx(2 * 2 * (3 * 4 * 9) * 0.125)


def test_synflow_of_experts_counts_what_one_example_uses(measure):
    x = torch.randn(2, 4, 3, 3)
    plain, experts = BinaryConv2d(4, 3, 3), ExpertBinaryConv2d(4, 3, 3, experts=4)
    assert (
        measure(experts, x, None, "synflow").values == measure(plain, x, None, "synflow").values == {"synflow": 108.0}
    )


# naswot


def test_naswot_by_hand(measure):
    """Codes 11, 10, 01 of three examples: K is [[2, 1, 1], [1, 2, 0], [1, 0, 2]], of determinant 4."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    found = measure(nn.ReLU(), x, None, "naswot")
    assert found.values["naswot"] == pytest.approx(math.log(4))
    assert found.facts["naswot"] == {"examples": 3, "rank": 3}


RELUS = {
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "function": functional.relu,
    "method": lambda x: x.relu(),
    "leaky": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(),
    "relu6": nn.ReLU6(),
    "relu6 function": functional.relu6,
    "rrelu": nn.RReLU(),
    "sign": torch.sign,
}


class Around(nn.Module):
    """An activation between a layer with weights and another."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.activation, self.last = nn.Linear(4, 32), activation, nn.Linear(32, 3)

    def forward(self, x):
        return self.last(self.activation(self.first(x)))


@pytest.mark.parametrize("name", RELUS)
def test_naswot_sees_an_activation_however_it_is_called(measure, name):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = measure(Around(nn.ReLU()), x, None, "naswot").values["naswot"]
    codes = (Around(nn.ReLU()).first(x) > 0).double()
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert expected == pytest.approx(float(torch.linalg.slogdet(kernel)[1]))
    assert measure(Around(RELUS[name]), x, None, "naswot").values["naswot"] == pytest.approx(expected)


def test_naswot_sees_signs_of_binary_layers_once_and_not_those_of_weights(measure):
    torch.manual_seed(0)
    block = BinaryBlock(2, 2, 3)
    x = torch.randn(2, 2, 4, 4)  # two examples, and two output channels: weights have the shape of a batch
    with torch.no_grad():
        normed = block.train().norm(x)
        codes = [(normed >= 0).flatten(1), (block.conv(normed) > 0).flatten(1)]
    agree = [int((code[0] == code[1]).sum()) for code in codes]
    bits, same = sum(code.shape[1] for code in codes), sum(agree)
    expected = math.log(bits**2 - same**2)
    assert measure(block, x, None, "naswot").values["naswot"] == pytest.approx(expected)


def test_naswot_does_not_count_what_the_output_does_not_depend_on(measure):
    class Idle(Around):
        def forward(self, x):
            self.idle = functional.relu(x * 3)  # an auxiliary head, say
            functional.relu(torch.zeros_like(x))
            return super().forward(x)

    x = torch.randn(6, 4)
    assert measure(Idle(nn.ReLU()), x, None, "naswot").values == measure(Around(nn.ReLU()), x, None, "naswot").values


def test_naswot_of_a_singular_kernel_is_low_and_ranks_by_what_it_tells_apart(measure):
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [2.0, 2.0]])
    two_alike = measure(nn.ReLU(), x, None, "naswot")
    three_alike = measure(nn.ReLU(), x[[0, 0, 0, 1]], None, "naswot")
    all_alike = measure(nn.ReLU(), x[[0, 0, 0, 0]], None, "naswot")
    assert [found.facts["naswot"]["rank"] for found in (two_alike, three_alike, all_alike)] == [3, 2, 1]
    values = [found.values["naswot"] for found in (two_alike, three_alike, all_alike)]
    assert values[0] > values[1] + 20 > values[2] + 40
    assert values[0] < measure(nn.ReLU(), x[:3], None, "naswot").values["naswot"] - 20
    assert all(map(math.isfinite, values))


def test_naswot_of_a_network_without_such_activations_is_refused(measure):
    with pytest.raises(UnsupportedError, match="depends on no ReLU, PReLU or sign"):
        measure(Around(nn.Tanh()), torch.randn(4, 4), None, "naswot")


# jacob_cov


def test_jacob_cov_by_hand(measure):
    """The summed outputs are x0^2 + x0 x1, so the gradients are (2 x0 + x1, x0)."""

    class Product(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], 0 * x[:, 0]], dim=1)

    x = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, -3.0], [1.0, -2.0, 0.5]])
    rows = np.array([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    v = np.linalg.eigvalsh(np.corrcoef(rows))
    expected = -float(np.sum(np.log(v + 1e-5) + 1 / (v + 1e-5)))
    assert measure(Product(), x, None, "jacob_cov").values["jacob_cov"] == pytest.approx(expected, rel=1e-4)


def test_jacob_cov_of_uncorrelated_and_of_equal_gradients(measure):
    """Eigenvalues 1, 1 at best; 2 and 0 where the gradients are the same."""
    best = -2 * (math.log(1 + 1e-5) + 1 / (1 + 1e-5))
    worst = -(math.log(2 + 1e-5) + 1 / (2 + 1e-5) + math.log(1e-5) + 1e5)

    class Own(nn.Module):
        def forward(self, x):
            return x**2

    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    assert measure(Own(), x, None, "jacob_cov").values["jacob_cov"] == pytest.approx(best)
    same = measure(linear([1.0, 2.0, 3.0, 4.0]), x, None, "jacob_cov").values["jacob_cov"]
    assert same == pytest.approx(worst, rel=1e-3)


@pytest.mark.parametrize("constant", [lambda x: x.sum(1, keepdim=True), lambda x: torch.ones(len(x), 2)])
def test_jacob_cov_is_undefined_where_a_gradient_is_constant(measure, constant):
    class Model(nn.Module):
        def forward(self, x):
            return constant(x)

    with pytest.raises(NonFiniteError, match="jacob_cov is undefined: for 4 of 4 examples"):
        measure(Model(), torch.randn(4, 3), None, "jacob_cov")


# grad_norm and snip


def test_grad_norm_and_snip_by_hand(measure):
    """Of 0.5 * mean((3 * 2x - y)^2) at x = 1, y = 4 both times: the error is 2, the gradients are 2 * 3 and 2 * 2."""
    model = nn.Sequential(linear([2.0], bias=[0.0]), linear([3.0]))
    found = measure(
        model,
        torch.ones(2, 1),
        torch.full((2, 1), 4.0),
        "grad_norm",
        "snip",
        loss=lambda p, y: ((p - y) ** 2).mean() / 2,
    )
    assert found.values == {"grad_norm": 6.0 + 4.0, "snip": 12.0 + 12.0}


def test_grad_norm_and_snip_are_those_of_autograd(measure):
    model, (x, y) = convolutional(), images()
    model[3].p = 0.0
    values = measure(model, x, y, "snip", "grad_norm").values
    other = copy.deepcopy(model)
    cross_entropy(other.train()(x), y).backward()
    weights = (other[0].weight, other[5].weight)
    assert values["grad_norm"] == pytest.approx(sum(float(w.grad.norm()) for w in weights), rel=1e-5)
    assert values["snip"] == pytest.approx(sum(float((w.detach() * w.grad).abs().sum()) for w in weights), rel=1e-5)


def test_snip_of_binary_layers_has_the_signs_as_weights(measure):
    torch.manual_seed(0)
    model = nn.Sequential(BinaryConv2d(1, 3, 8), nn.Flatten())
    x, y = images()
    real = copy.deepcopy(model)
    real[0].weight.data.sign_()
    set_binarisation(real, weights=False)
    cross_entropy(real(x), y).backward()
    values = measure(model, x, y, "snip", "grad_norm").values
    assert values["snip"] == pytest.approx(float(real[0].weight.grad.abs().sum()), rel=1e-5)
    assert values["grad_norm"] == pytest.approx(float(real[0].weight.grad.norm()), rel=1e-5)


# The meter.


def lazy():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize("make", [convolutional, lazy])
def test_the_model_and_the_generators_are_left_as_they_were(measure, make):
    model, (x, y) = make(), images()
    model[1].eval()
    if make is convolutional:
        model[0].weight.grad = torch.ones_like(model[0].weight)
        model[5].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model)
    x_before, generator, python = x.clone(), torch.get_rng_state(), random.getstate()
    measure(model, x, y)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator) and random.getstate() == python
    assert torch.equal(x, x_before) and not x.requires_grad and x.grad is None
    for (name, old), (_, new) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert old.requires_grad == new.requires_grad, name
        if not nn.parameter.is_lazy(old):
            assert torch.equal(old, new), name
        else:
            assert nn.parameter.is_lazy(new)
    if make is convolutional:
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "0.weight")
    for (_, old), (_, new) in zip(before.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(old, new)


def test_repeats_to_the_last_bit_whatever_the_generators(measure):
    model, (x, y) = convolutional(), images()
    first = measure(model, x, y).values
    torch.manual_seed(99)
    assert measure(model.eval(), x, y).values == first
    # Each by itself, and in another order: no score changes another.
    assert {name: measure(model, x, y, name).values[name] for name in reversed(SCORES)} == first


@pytest.mark.parametrize("space", [Bats, BinaryGrowth, DartsCell, MetaKernel, Sandglass])
def test_networks_of_every_space(tmp_path, space):
    task = Task.fashion_mnist(size=16, limit=64)
    x, y = next(iter(task.load().train.batches(8)))
    small = space.small()
    model = small.build(small.sample(np.random.default_rng(0)))
    before = copy.deepcopy(model.state_dict())
    values = ALL.measure_batch(model, x, y, task.compute_loss, Bench(tmp_path)).values
    assert tuple(values) == SCORES and all(map(math.isfinite, values.values()))
    assert min(values["synflow"], values["grad_norm"], values["snip"]) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_auxiliary_heads_count_for_nothing(tmp_path):
    task = Task.fashion_mnist(size=16, limit=64)
    x, y = next(iter(task.load().train.batches(8)))
    genes = Bats.small(cells=3).sample(np.random.default_rng(0)).genes
    plain, with_head = (
        space.build(space.architecture(genes)) for space in (Bats.small(cells=3), Bats.small(cells=3, auxiliary=True))
    )
    missing, unexpected = with_head.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    values = [ALL.measure_batch(net, x, y, task.compute_loss, Bench(tmp_path)).values for net in (plain, with_head)]
    assert values[0] == pytest.approx(values[1])


def test_it_is_a_meter_known_by_its_fields_and_refuses_nonsense(measure):
    meter = ZeroCost("synflow", "naswot", batch_size=32)
    assert isinstance(meter, BatchMeter) and not isinstance(meter, CostMeter)
    assert meter.metrics == ("synflow", "naswot") and meter.examples == 32 and meter.trained is False
    assert meter == ZeroCost(scores=["synflow", "naswot"], batch_size=32) == eval(repr(meter)) and hash(meter)
    restorable.cache_clear()
    again = restored(describe(meter), default=lambda: None)
    assert again == meter and canonical(describe(again)) == canonical(describe(meter))
    for wrong in ((), ("synflow", "synflow"), ("zen",), ("synflow", 3)):
        with pytest.raises(InvalidInputError, match="legal: one or more of synflow, naswot, jacob_cov"):
            ZeroCost(*wrong)
    with pytest.raises(InvalidInputError, match="batch_size is 1"):
        ZeroCost("synflow", batch_size=1)
    with pytest.raises(InvalidInputError, match="got 1 examples"):
        measure(nn.ReLU(), torch.ones(1, 2))
    for model in (nn.ReLU(), nn.BatchNorm1d(2)):
        for name in ("synflow", "snip"):
            with pytest.raises(UnsupportedError, match="no weights"):
                measure(model, torch.ones(2, 2), None, name)


# In a study.


def study(folder, strategy=None, **changes):
    parts = {
        "space": Conv(),
        "strategy": strategy or RandomSearch(),
        "task": Task.digits(epochs=1, limit=96),
        "objectives": [maximise("val_accuracy")],
        "folder": folder,
        "tracker": None,
        "progress": False,
    }
    return Study(**{**parts, **changes})


def test_a_score_that_is_an_objective_is_measured_by_itself_and_ends_in_the_folder(tmp_path):
    made = study(tmp_path / "a", objectives=[maximise("naswot"), minimise("params")], constraints=[at_least("snip", 0)])
    assert [meter for meter in made.meters if isinstance(meter, BatchMeter)] == [ZeroCost("naswot"), ZeroCost("snip")]
    trial = made.evaluate(Conv().architecture({"channels": 4, "kernel": 3}))
    assert {"naswot", "snip", "params", "val_accuracy"} <= set(trial.metrics)
    assert trial.facts["naswot"]["examples"] == 64
    assert "synflow" not in trial.metrics
    with pytest.warns(NasplatWarning, match="past trials did not have naswot"):  # but those of another batch
        again = study(tmp_path / "a", objectives=[maximise("naswot")], meters=[ZeroCost("naswot", batch_size=32)])
    assert [meter for meter in again.meters if isinstance(meter, BatchMeter)] == [ZeroCost("naswot", batch_size=32)]


def test_budget_0_measures_and_trains_nothing(tmp_path):
    worker = Worker(Conv(), Task.digits(epochs=1, limit=96), tmp_path, meters=(Count(), ALL))
    architecture = Conv().architecture({"channels": 4, "kernel": 3})
    (outcome,) = worker.run(Assignment(0, Evaluate(architecture, budget=0.0), seed=3))
    assert outcome.state == "complete"
    assert set(outcome.metrics) == {*SCORES, *Count().metrics, "measure_seconds"}


def test_a_hard_limit_on_a_score_costs_no_epoch(tmp_path):
    made = study(tmp_path / "a", constraints=[at_least("naswot", 1e9)])
    trial = made.evaluate(Conv().architecture({"channels": 4, "kernel": 3}))
    assert trial.state == "infeasible" and "naswot is" in trial.reason and "train_seconds" not in trial.metrics


class Seen:
    """A meter that notes the batches that it gets."""

    metrics, trained, examples = (), False, 24

    def __init__(self):
        self.batches = []

    def measure_batch(self, model, x, y, loss, bench):
        self.batches.append((x.clone(), y.clone()))
        assert loss(model.eval()(x), y).ndim == 0
        return Measurement({})


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
def test_every_candidate_gets_the_same_batch(tmp_path, kind):
    images, classes = (torch.cat(parts) for parts in zip(*Task.digits().load().train.batches(64), strict=True))
    order = classes.argsort()  # class by class, as data sets on disk often are
    data = torch.utils.data.TensorDataset(images[order], classes[order])
    if kind == "loader":
        loader = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
        task = Task.from_loaders(loader, loader, name="digits")
    elif kind == "dataset":
        task = Task.from_datasets(data, data, name="digits")
    else:
        task = Task.from_tensors(images[order], classes[order])
    meter = Seen()
    worker = Worker(Conv(), task, tmp_path, meters=(meter,))
    for number, channels in enumerate((4, 6)):
        proposal = Evaluate(Conv().architecture({"channels": channels, "kernel": 3}), budget=0.0)
        (outcome,) = worker.run(Assignment(number, proposal, seed=number))
        assert outcome.state == "complete", outcome.traceback
    (x, y), (x_again, y_again) = meter.batches
    assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert x.shape == (24, 1, 8, 8) and len(y.unique()) >= 5


def test_a_task_without_data_is_refused_before_the_start(tmp_path):
    task = Task.from_function(lambda architecture, budget, seed: {"val_accuracy": 0.5}, name="table")
    with pytest.raises(InvalidInputError, match="needs a batch of training data; the task table is a function"):
        study(tmp_path / "a", task=task, meters=[ZeroCost("naswot")])


def test_a_score_that_is_undefined_fails_its_trial_and_says_why(tmp_path):
    class Mute(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(10))

        def forward(self, x):
            return self.bias.expand(len(x), 10)

    class Silent(Conv):
        def build(self, architecture):
            return Mute()

    worker = Worker(Silent(), Task.digits(epochs=1, limit=96), tmp_path, meters=(ZeroCost("jacob_cov"),))
    architecture = Silent().architecture({"channels": 4, "kernel": 3})
    (outcome,) = worker.run(Assignment(0, Evaluate(architecture, budget=0.0), seed=0))
    assert outcome.state == "failed" and outcome.reason.startswith("jacob_cov is undefined: for 64 of 64 examples")


def test_a_study_of_scores_goes_on(tmp_path):
    strategy = RegularizedEvolution(population=2, sample=2)
    assert study(tmp_path / "a", strategy, objectives=[maximise("synflow")]).run(max_trials=1).worked == 1
    trials = study(tmp_path / "a", strategy, objectives=[maximise("synflow")]).run(max_trials=3).trials
    assert len({trial.metrics["synflow"] for trial in trials}) == 3


def test_wider_networks_score_higher(tmp_path):
    """Of networks of one depth."""
    x, y = images(16)
    scores, widths = [], (2, 4, 8, 16, 32)
    for width in widths:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 3))
        found = ZeroCost("synflow", "naswot").measure_batch(model, x, y, cross_entropy, Bench(tmp_path)).values
        scores.append((found["synflow"], found["naswot"]))
    for column in zip(*scores, strict=True):
        assert kendalltau(column, widths)[0] > 0.79
