from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nasplat.cost import CostTable, Resource
from nasplat.errors import InvalidInputError, NonFiniteError, UnsupportedError
from nasplat.space import SearchSpace, Supernet
from nasplat.task import Task
from nasplat.testing.landscapes import Levels, TinyCell
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from nasplat.weight_sharing.bilevel import Moment, Run
from strategies import Darts

QUICK = Darts(epochs=3, batch_size=16, warmup=1, alpha_lr=0.1)


class TestSgdContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return QUICK


class TestAdamContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return Darts(epochs=3, batch_size=16, optimiser="adam", lr=1e-3, alpha_lr=0.1, temperature=0.5)


class TestSecondOrderContract(ExplorerContract):
    """The space has dropout and a batch norm."""

    @pytest.fixture
    def explorer(self):
        return replace(QUICK, order="second")


@dataclass(frozen=True)
class Experts(SearchSpace):
    """One choice between feeding the classifier the image and feeding it zeros or noise."""

    temperature: float = 1.0

    @property
    def choices(self):
        return {"input": ("nothing", "noise", "image"), "idle": ("a", "b")}

    def temperatures(self):
        return {"input": self.temperature}

    def build(self, architecture):
        raise NotImplementedError

    def supernet(self, keep=None, partial=1):
        return ExpertsSupernet()


class ExpertsSupernet(Supernet):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.seen = []
        self.layouts = []

    def forward(self, x, relaxed):
        self.seen.append({name: weight.detach().clone() for name, weight in relaxed.items()})
        self.layouts.append(x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
        _, noise, image = relaxed["input"]
        return self.head(noise * torch.randn(len(x), 64) + image * x.flatten(1))


def spied(explorer, space, task, monkeypatch, **kwargs):
    made = []
    original = type(space).supernet
    monkeypatch.setattr(type(space), "supernet", lambda self: made.append(original(self)) or made[-1])
    reports = []
    context = RecordingContext()
    found = explore(explorer, space, task, context, reports, **kwargs)
    return found, reports, made[0], context


def test_finds_the_option_that_carries_the_signal():
    for seed in range(3):
        found = explore(
            Darts(epochs=4, batch_size=32, alpha_lr=0.05), Experts(), Task.digits(limit=400), RecordingContext(seed)
        )
        assert [architecture.genes["input"] for architecture in found] == ["image"]


def test_learns():
    reports = []
    explore(replace(QUICK, epochs=6, lr=0.2), TinyCell(channels=8), Task.digits(limit=300), RecordingContext(), reports)
    assert reports[-1].metrics["train_loss"] < 0.95 * reports[0].metrics["train_loss"]
    assert "alpha_loss" not in reports[0].metrics  # the warm-up
    assert reports[-1].metrics["mean_max_weight"] > reports[0].metrics["mean_max_weight"]


def test_alphas_start_small_and_stay_in_the_warm_up(monkeypatch):
    found, _, supernet, context = spied(
        Darts(epochs=2, warmup=1, batch_size=16), Experts(), Task.digits(limit=64), monkeypatch, stop_after=1
    )
    assert len(found) == 1
    assert context.steps == len(supernet.seen)  # weights alone
    first, last = supernet.seen[0]["input"], supernet.seen[-1]["input"]
    assert torch.equal(first, last)
    # alpha = 1e-3 * N(0, 1)
    assert 0 < (first - 1 / 3).abs().max() < 3e-3


def test_steps_alternate_on_two_halves_of_the_training_data(monkeypatch):
    rows = []
    original = Task.compute_loss
    monkeypatch.setattr(
        Task, "compute_loss", lambda self, outputs, y: rows.append(y.clone()) or original(self, outputs, y)
    )
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64).float()
    task = Task.from_tensors(
        x, y, x[:8], y[:8] + 100, loss=lambda outputs, targets: (outputs.mean(dim=1) - targets / 64).pow(2).mean()
    )
    spied(Darts(epochs=1, batch_size=8), Experts(), task, monkeypatch)
    alphas, weights = torch.cat(rows[0::2]), torch.cat(rows[1::2])
    assert sorted([*alphas.tolist(), *weights.tolist()]) == y.tolist()


def test_loaders_give_the_validation_data_to_the_alphas(monkeypatch):
    rows = []
    original = Task.compute_loss
    monkeypatch.setattr(
        Task, "compute_loss", lambda self, outputs, y: rows.append(y.clone()) or original(self, outputs, y)
    )
    train = DataLoader(TensorDataset(torch.randn(32, 1, 8, 8), torch.zeros(32, dtype=torch.long)), batch_size=8)
    validation = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), torch.ones(16, dtype=torch.long)), batch_size=8)
    task = Task.from_loaders(train, validation, name="halves")
    explore(Darts(epochs=1), Experts(), task, RecordingContext())
    assert all(y.eq(1).all() for y in rows[0::2])
    assert all(y.eq(0).all() for y in rows[1::2])
    assert len(rows) == 8


def test_temperature_is_the_spaces_unless_given(monkeypatch):
    def spread(explorer, space):
        with monkeypatch.context() as patch:
            *_, supernet, _ = spied(explorer, space, Task.digits(limit=64), patch)
        return float((supernet.seen[0]["input"] - 1 / 3).abs().max())

    explorer = Darts(epochs=1, batch_size=16)
    warm, cold = spread(explorer, Experts(1.0)), spread(explorer, Experts(0.1))
    # To first order the spread of a softmax around even weights is that of alpha / T.
    assert cold == pytest.approx(10 * warm, rel=0.05)
    assert spread(replace(explorer, temperature=0.1), Experts(1.0)) == pytest.approx(cold, rel=1e-5)


def test_images_are_channels_last_and_vectors_are_taken(monkeypatch):
    three = Task.from_tensors(torch.randn(64, 2, 4, 8), torch.arange(64) % 10)
    with monkeypatch.context() as patch:
        *_, supernet, _ = spied(Darts(epochs=1), Experts(), three, patch)
    assert all(supernet.layouts)
    flat = Task.from_tensors(torch.randn(64, 64), torch.arange(64) % 10)
    assert len(explore(Darts(epochs=1), Experts(), flat, RecordingContext())) == 1


def test_a_last_batch_of_one_is_left_out():
    # 34 examples, halves of 17, batches of 16.
    task = Task.from_tensors(torch.randn(34, 1, 4, 4), torch.zeros(34), torch.randn(2, 1, 4, 4), torch.zeros(2),
                             loss=lambda outputs, targets: outputs.pow(2).mean())  # fmt: skip
    context = RecordingContext()
    explore(Darts(epochs=1, batch_size=16), TinyCell(), task, context)
    assert context.steps == 2


def test_learning_rate_follows_a_cosine():
    darts = Darts(epochs=50)
    rates = [darts._lr(epoch) for epoch in range(1, 52)]
    assert rates[0] == 0.025
    assert rates[25] == pytest.approx((0.025 + 0.001) / 2)
    assert rates[50] == pytest.approx(0.001)
    assert rates == sorted(rates, reverse=True)


def test_a_loss_that_is_not_finite_fails_by_name():
    task = Task.from_tensors(torch.full((64, 1, 8, 8), float("nan")), torch.arange(64) % 10)
    with pytest.raises(NonFiniteError, match="epoch 1: train_loss is nan"):
        explore(Darts(epochs=2), Experts(), task, RecordingContext())


def test_a_space_without_a_supernet_says_so():
    with pytest.raises(UnsupportedError, match="supernet"):
        explore(Darts(epochs=1), Levels(), Task.digits(limit=32), RecordingContext())


@pytest.mark.parametrize(
    "arguments", [{"order": "third"}, {"order": 2}, {"optimiser": "adam", "order": "second"}, {"alpha_lr": 0}]
)
def test_refuses(arguments):
    with pytest.raises(InvalidInputError, match=next(reversed(arguments))):
        Darts(**arguments)


def test_clips_the_gradient(monkeypatch):
    seen = []
    original = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda weights, norm: seen.append(norm) or original(weights, norm)
    )
    explore(Darts(epochs=1, clip=0.5), Experts(), Task.digits(limit=64), RecordingContext())
    assert set(seen) == {0.5}
    explore(Darts(epochs=1, clip=None), Experts(), Task.digits(limit=64), RecordingContext())
    assert set(seen) == {0.5}


def test_a_resource_pulls_towards_the_cheap_options():
    space, task = TinyCell(), Task.digits(limit=200)
    costs_ms = {"zero": 0.0, "identity": 1.0, "pool": 3.0, "conv": 10.0, "relu": 1.0, "tanh": 2.0}
    metric = CostTable.fit(
        space,
        "latency_ms",
        lambda a: 5.0 + sum(costs_ms[option] for option in a.genes.values()),
        np.random.default_rng(0),
    )
    explorer = Darts(epochs=3, batch_size=32, alpha_lr=0.2)
    costs = {}
    for weight in (0.0, 10.0):
        reports = []
        found = explore(
            replace(explorer, resource=Resource(metric, target=1.0, weight=weight)),
            space,
            task,
            RecordingContext(),
            reports,
        )
        costs[weight] = metric.cost(found[0])
        expected = [report.metrics["expected_latency_ms"] for report in reports]
        assert weight == 0.0 or expected[-1] < 0.95 * expected[0]
    everything = [metric.cost(architecture) for architecture in space.enumerate()]
    assert costs[10.0] == pytest.approx(min(everything))
    with pytest.raises(InvalidInputError, match="table is of"):
        explore(replace(explorer, resource=Resource(metric, 1.0)), Experts(), task, RecordingContext())


# Second order: the gradient through one step of the weights.


@dataclass(frozen=True)
class Sums(SearchSpace):
    """Two mixtures of matrices."""

    @property
    def choices(self):
        return {"first": (0, 1, 2), "second": (0, 1, 2, 3)}

    def build(self, architecture):
        raise NotImplementedError


class Matrices(Supernet):
    """``x`` times two mixtures of matrices. The first option of the second choice is nothing.

    Only the first layer learns unless it is ``deep``: then its output is quadratic in the weights.
    """

    def __init__(self, deep=False, noise=0.0):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.randn(3, 4, 3, dtype=torch.float64), requires_grad=deep)
        self.unused = torch.nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))
        self.noise = noise
        self.noises = []

    def forward(self, x, relaxed):
        if self.noise:
            self.noises.append(torch.randn_like(x))
            x = x + self.noise * self.noises[-1]
        self.passes += 1
        self.mean.lerp_(x.mean(dim=0), 0.1)
        hidden = torch.einsum("ni,oij,o->nj", x, self.first, relaxed["first"])
        return torch.einsum("ni,oij,o->nj", hidden, self.second, relaxed["second"][1:])


def squares(outputs, y):
    return (outputs - torch.nn.functional.one_hot(y, 3)).square().mean()


def ready_run(darts, supernet, loss, steps=0, seed=0):
    """A run as the search makes it, after some steps of the weights' optimiser, and two batches."""
    generator = torch.Generator().manual_seed(seed)
    train, validation = (
        (torch.randn(20, 5, generator=generator, dtype=torch.float64), torch.randint(3, (20,), generator=generator))
        for _ in range(2)
    )
    space = Sums()
    alphas = {
        name: torch.randn(len(options), generator=generator, dtype=torch.float64).requires_grad_()
        for name, options in space.choices.items()
    }
    weights = [weight for weight in supernet.parameters() if weight.requires_grad]
    optimiser = torch.optim.SGD(
        weights, darts.lr, momentum=darts.momentum, weight_decay=darts.weight_decay, foreach=True
    )

    def batch_loss(batch, mixture):
        return loss(supernet(batch[0], mixture), batch[1])

    run = Run(Moment(space, space.alive(None), 1, 1), supernet, weights, optimiser, alphas, batch_loss)
    for _ in range(steps):
        optimiser.zero_grad()
        batch_loss(train, {name: share.detach() for name, share in darts.shares(run).items()}).backward()
        optimiser.step()
    return run, train, validation


def exact_gradient(darts, run, train, validation, loss):
    """The loss one step ahead and its gradients, by automatic differentiation through the step."""
    mixture = darts.shares(run)
    names = [name for name, weight in run.supernet.named_parameters() if weight.requires_grad]
    weights = [weight.detach().clone().requires_grad_() for weight in run.weights]

    def at(values, batch):
        values = dict(zip(names, values, strict=True))
        return loss(torch.func.functional_call(run.supernet, values, (batch[0], mixture)), batch[1])

    gradients = torch.autograd.grad(at(weights, train), weights, create_graph=True, allow_unused=True)
    ahead = []
    for own, weight, gradient in zip(run.weights, weights, gradients, strict=True):
        velocity = (0.0 if gradient is None else gradient) + darts.weight_decay * weight
        if "momentum_buffer" in run.optimiser.state.get(own, {}):
            velocity = velocity + darts.momentum * run.optimiser.state[own]["momentum_buffer"]
        ahead.append(weight - darts.lr * velocity)
    value = at(ahead, validation)
    return value.detach(), torch.autograd.grad(value, list(run.parameters.values()))


@pytest.mark.parametrize("steps", [0, 3], ids=["before the first step", "with momentum"])
@pytest.mark.parametrize("seed", range(3))
def test_second_order_is_the_derivative_through_the_step(seed, steps):
    """With a loss quadratic in the weights central differences are exact."""
    torch.manual_seed(seed)
    darts = Darts(order="second", lr=0.2, weight_decay=0.1)
    run, train, validation = ready_run(darts, Matrices(), squares, steps, seed)
    assert (steps > 0) == any("momentum_buffer" in state for state in run.optimiser.state.values())
    loss, gradients = darts.architecture_gradient(run, train, validation)
    expected_loss, expected = exact_gradient(darts, run, train, validation, squares)
    first_order = Darts().architecture_gradient(run, train, validation)[1]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for own, exact, first in zip(gradients, expected, first_order, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-9, atol=1e-11)
        assert (own - first).norm() > 0.03 * first.norm(), "the two orders cannot be told apart here"


@pytest.mark.parametrize("seed", range(3))
def test_second_order_of_a_loss_that_is_not_quadratic(seed):
    torch.manual_seed(seed)
    darts, criterion = Darts(order="second", lr=0.1), torch.nn.functional.cross_entropy
    run, train, validation = ready_run(darts, Matrices(deep=True), criterion, 2, seed)
    _, gradients = darts.architecture_gradient(run, train, validation)
    _, expected = exact_gradient(darts, run, train, validation, criterion)
    for own, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-3, atol=1e-5)


class OneWeight(Supernet):
    """``p * w * x``, p the weight of the option ``on``."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x, relaxed):
        return relaxed["switch"][1] * self.w * x


@dataclass(frozen=True)
class Switch(SearchSpace):
    @property
    def choices(self):
        return {"switch": ("off", "on")}

    def build(self, architecture):
        raise NotImplementedError


def test_second_order_by_hand():
    """Half squares of ``p w``, wanted 3 in training and 5 in validation; p = 1/2, w = 2, xi = 0.2.

    Ahead: the gradient p (p w - 3) = -1, decay 0.25 * 2, momentum 0.5 * 4: w' = 2 - 0.2 * 1.5 = 1.7.
    Direct: w' (p w' - 5) = -7.055. Through the weights: p (p w' - 5) = -2.075, times the mixed derivative
    2 p w - 3 = -1, times -xi: -0.415. So -7.47 by p, whose derivative by the alphas is -1/4 and 1/4.
    """
    darts = Darts(order="second", lr=0.2, momentum=0.5, weight_decay=0.25)
    supernet, space = OneWeight(), Switch()
    alphas = {"switch": torch.zeros(2, dtype=torch.float64, requires_grad=True)}
    optimiser = torch.optim.SGD([supernet.w], 0.2, momentum=0.5, weight_decay=0.25, foreach=True)
    optimiser.state[supernet.w]["momentum_buffer"] = torch.tensor(4.0, dtype=torch.float64)
    run = Run(
        Moment(space, space.alive(None), 1, 1),
        supernet,
        [supernet.w],
        optimiser,
        alphas,
        lambda batch, mixture: (supernet(batch[0], mixture) - batch[1]).square() / 2,
    )
    one = torch.ones((), dtype=torch.float64)
    loss, (gradient,) = darts.architecture_gradient(run, (one, 3 * one), (one, 5 * one))
    assert float(loss) == pytest.approx((0.85 - 5) ** 2 / 2, rel=1e-12)
    assert gradient.tolist() == pytest.approx([7.47 / 4, -7.47 / 4], rel=1e-9)
    # First order: w (p w - 5) = -8.
    _, (gradient,) = Darts().architecture_gradient(run, (one, 3 * one), (one, 5 * one))
    assert gradient.tolist() == pytest.approx([2.0, -2.0], rel=1e-12)


def test_second_order_leaves_everything_as_it_was():
    torch.manual_seed(0)
    darts = Darts(order="second", lr=0.5, weight_decay=0.1)
    supernet = Matrices(deep=True)
    run, train, validation = ready_run(darts, supernet, squares, 2)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    alphas = {name: alpha.detach().clone() for name, alpha in run.parameters.items()}
    velocities = {weight: state["momentum_buffer"].clone() for weight, state in run.optimiser.state.items()}
    gradients = [None if weight.grad is None else weight.grad.clone() for weight in run.weights]
    darts.architecture_gradient(run, train, validation)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    assert all(torch.equal(alpha, alphas[name]) for name, alpha in run.parameters.items())
    assert velocities.keys() == run.optimiser.state.keys()
    assert all(torch.equal(state["momentum_buffer"], velocities[w]) for w, state in run.optimiser.state.items())
    assert all(
        (weight.grad is None) if gradient is None else torch.equal(weight.grad, gradient)
        for weight, gradient in zip(run.weights, gradients, strict=True)
    )


def test_second_order_compares_losses_under_the_same_random_numbers():
    """Else the difference of the two sides would be one of noise, over a small step."""
    torch.manual_seed(0)
    darts = Darts(order="second", lr=0.05)
    supernet = Matrices(noise=1.0)
    run, train, validation = ready_run(darts, supernet, squares)
    _, first = darts.architecture_gradient(run, train, validation)
    ahead, other, plus, minus = supernet.noises
    assert torch.equal(ahead, plus)
    assert torch.equal(ahead, minus)
    assert not torch.equal(ahead, other)
    darts.architecture_gradient(run, train, validation)
    assert not torch.equal(supernet.noises[4], ahead), "each step draws anew"
    # And so it is the derivative for these random numbers.
    quiet = Matrices()
    quiet.load_state_dict(supernet.state_dict())
    run = replace(run, supernet=quiet, weights=[quiet.first, quiet.unused])
    shifted = [(train[0] + ahead, train[1]), (validation[0] + other, validation[1])]
    _, expected = exact_gradient(darts, run, *shifted, squares)
    for own, exact in zip(first, expected, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-9, atol=1e-11)


def test_second_order_where_the_validation_loss_does_not_depend_on_the_weights():
    """No direction to step in: the direct gradient alone."""
    darts = Darts(order="second", lr=0.1)
    run, train, validation = ready_run(darts, Matrices(), lambda outputs, y: 0.0 * outputs.sum())
    _, gradients = darts.architecture_gradient(run, train, validation)
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_second_order_takes_penalty_and_parameters_that_no_loss_reaches():
    @dataclass(frozen=True)
    class Penalised(Darts):
        def penalty(self, parameters, moment):
            return 3.0 * parameters["own"]

    torch.manual_seed(0)
    run, train, validation = ready_run(Darts(), Matrices(), squares)
    plain = Darts(order="second", lr=0.05).architecture_gradient(run, train, validation)[1]
    for name in ("own", "idle"):
        run.parameters[name] = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    *found, own, idle = Penalised(order="second", lr=0.05).architecture_gradient(run, train, validation)[1]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert float(own) == 3.0
    assert idle is None


def test_second_order_searches():
    for seed in range(2):
        found = explore(
            Darts(order="second", epochs=4, batch_size=32, alpha_lr=0.05),
            Experts(),
            Task.digits(limit=400),
            RecordingContext(seed),
        )
        assert [architecture.genes["input"] for architecture in found] == ["image"]
