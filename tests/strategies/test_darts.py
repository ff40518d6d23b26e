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
from strategies import Darts

QUICK = Darts(epochs=3, batch_size=16, warmup=1, alpha_lr=0.1)


class TestSgdContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return QUICK


class TestAdamContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return replace(Darts.bats(epochs=3, warmup=0, batch_size=16), temperature=0.5)


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
    bats = Darts.bats()
    assert {bats._lr(epoch) for epoch in range(1, 26)} == {1e-3}


def test_bats_values():
    assert Darts.bats(epochs=30).epochs == 30
    bats = Darts.bats()
    assert (bats.epochs, bats.warmup, bats.batch_size, bats.optimiser) == (25, 10, 96, "adam")
    assert (bats.lr, bats.weight_decay) == (1e-3, 3e-4)
    assert (bats.alpha_lr, bats.alpha_weight_decay, bats.alpha_betas) == (6e-4, 1e-3, (0.5, 0.999))


def test_a_loss_that_is_not_finite_fails_by_name():
    task = Task.from_tensors(torch.full((64, 1, 8, 8), float("nan")), torch.arange(64) % 10)
    with pytest.raises(NonFiniteError, match="epoch 1: train_loss is nan"):
        explore(Darts(epochs=2), Experts(), task, RecordingContext())


def test_a_space_without_a_supernet_says_so():
    with pytest.raises(UnsupportedError, match="supernet"):
        explore(Darts(epochs=1), Levels(), Task.digits(limit=32), RecordingContext())


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimiser": "lion"},
        {"epochs": 5, "warmup": 5},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr_min": 1.0},
        {"alpha_lr": -1.0},
        {"temperature": 0.0},
        {"clip": 0.0},
    ],
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


def test_searches_bats():
    from search_spaces.bats import Bats

    space = Bats.small()
    reports = []
    found = explore(
        Darts.bats(epochs=2, warmup=1, batch_size=16),
        space,
        Task.fashion_mnist(size=8, limit=64),
        RecordingContext(),
        reports,
    )
    assert space.owns(found[0])
    assert len(reports) == 2
    assert np.isfinite(reports[-1].metrics["alpha_loss"])


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
