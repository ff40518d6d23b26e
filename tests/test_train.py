from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import Conv, Mlp, equal_states
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nasplat import Task
from nasplat.errors import InvalidInputError, NonFiniteError
from nasplat.nn import BinaryConv2d
from nasplat.train import Training, augment, evaluate, place

CPU = torch.device("cpu")
CONV = Conv().architecture({"channels": 6, "kernel": 3})


def built(space=None, genes=None, seed=0):
    torch.manual_seed(seed)
    space = space or Conv()
    model = space.build(space.architecture(genes) if genes else CONV)
    if isinstance(space, Conv):
        model.eval()(torch.zeros(1, 1, 8, 8))
    return model.train()


def training(task, model=None, seed=0, step=nullcontext):
    return Training(model or built(), task, CPU, seed, step)


def deep(state):
    return torch.load(saved(state), weights_only=True)


def saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_the_loss_falls_on_digits_and_the_scores_are_the_models():
    task = Task.digits(epochs=3, batch_size=64, lr=0.01)
    run = training(task)
    reports = list(run.epochs(3))
    assert [report.step for report in reports] == [1, 2, 3]
    losses = [report.metrics["train_loss"] for report in reports]
    assert losses[0] > losses[1] > losses[2]
    assert reports[-1].metrics["val_accuracy"] > 0.85
    validation = task.load().validation
    run.model.eval()
    with torch.no_grad():
        outputs = run.model(validation.x)
    right = float((outputs.argmax(1) == validation.y).double().mean())
    assert reports[-1].metrics["val_accuracy"] == pytest.approx(right)
    assert set(reports[-1].metrics) == set(task.metric_names)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_each_optimiser_learns(blobs, kind):
    task = Task.from_tensors(blobs.data.x_train, blobs.data.y_train, epochs=4, optimiser=kind, lr=0.05, batch_size=16)
    run = training(task, built(Mlp(), {"width": 16, "depth": 1, "act": "relu", "norm": False}))
    reports = list(run.epochs(4))
    assert reports[-1].metrics["train_loss"] < 0.8 * reports[0].metrics["train_loss"]


def rates(task, model=None, epochs=None):
    """The learning rate of each step."""
    found = []

    @contextmanager
    def step():
        yield
        if run.model.training:
            found.append(run.optimiser.param_groups[0]["lr"])

    run = training(task, model, step=step)
    list(run.epochs(epochs or task.recipe.epochs))
    return found


def test_the_cosine_falls_from_the_rate_to_nearly_nothing(blobs):
    x, y = blobs.data.x_train[:160], blobs.data.y_train[:160]
    task = Task.from_tensors(x, y, x, y, epochs=2, batch_size=32, lr=0.02)
    found = rates(task, built(Mlp(), {"width": 2, "depth": 1, "act": "relu", "norm": False}))
    steps = 2 * 5
    assert found == pytest.approx([0.02 * 0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)])
    assert found[0] == 0.02 and found[-1] < 0.03 * 0.02


def test_a_constant_rate_is_constant_and_a_share_of_the_epochs_passes_through_the_same_rates(blobs):
    genes = {"width": 2, "depth": 1, "act": "relu", "norm": False}
    recipe = dict(batch_size=32, lr=0.02, epochs=4)
    x, y = blobs.data.x_train, blobs.data.y_train
    constant = Task.from_tensors(x, y, schedule="constant", **recipe)
    assert set(rates(constant, built(Mlp(), genes))) == {0.02}
    cosine = Task.from_tensors(x, y, **recipe)
    whole = rates(cosine, built(Mlp(), genes))
    assert rates(cosine, built(Mlp(), genes), epochs=2) == whole[: len(whole) // 2]


def test_a_loader_of_unknown_length_changes_its_rate_by_the_epoch():
    class Stream:
        def __iter__(self):
            for _ in range(3):
                yield torch.randn(8, 4), torch.arange(8) % 3

    task = Task.from_loaders(Stream(), Stream(), name="stream", epochs=2, lr=0.1)
    found = rates(task, built(Mlp(), {"width": 2, "depth": 1, "act": "relu", "norm": False}))
    assert found == pytest.approx([0.1] * 3 + [0.05] * 3)


class Binary(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = BinaryConv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8 * 64, 10)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x):
        if self.training:
            self.seen.append((self.conv.is_binary, bool(torch.is_grad_enabled())))
        return self.head(self.conv(x).flatten(1))


def test_two_step_binarises_in_the_second_half_and_begins_the_schedule_anew():
    task = Task.digits(epochs=4, limit=100, batch_size=50, lr=0.01, two_step=True)
    model = Binary()
    found = rates(task, model)
    steps = len(found) // 4
    binary = [seen for seen, _ in model.seen]
    assert binary == [False] * (2 * steps) + [True] * (2 * steps)
    assert found[: 2 * steps] == found[2 * steps :]
    assert found[0] == 0.01 and found[2 * steps - 1] < 0.005


def test_two_step_makes_the_optimiser_anew():
    task = Task.digits(epochs=2, limit=60, batch_size=30, two_step=True)
    run = training(task, Binary())
    first = run.optimiser
    list(run.epochs(1))
    assert run.optimiser is first
    list(run.epochs(2))
    assert run.optimiser is not first


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_state_goes_on_bit_for_bit(two_step, cut):
    task = Task.digits(epochs=4, limit=100, batch_size=32, augment=("flip", "shift", "cutout"), two_step=two_step)
    torch.manual_seed(1)
    whole = training(task, built(seed=3), seed=5)
    torch.manual_seed(7)  # dropout draws from here
    expected = [dict(report.metrics) for report in whole.epochs(4)]

    torch.manual_seed(1)
    first = training(task, built(seed=3), seed=5)
    torch.manual_seed(7)
    reports = [dict(report.metrics) for report in first.epochs(cut)]
    state = deep(first.state())
    torch.manual_seed(99)
    second = training(task, built(seed=11), seed=12)
    second.load_state(state)
    reports += [dict(report.metrics) for report in second.epochs(4)]
    assert reports == expected
    assert equal_states(second.model.state_dict(), whole.model.state_dict())


def test_the_seed_decides_the_order(blobs):
    genes = {"width": 4, "depth": 1, "act": "tanh", "norm": True}
    runs = [training(blobs, built(Mlp(), genes), seed=seed) for seed in (1, 1, 2)]
    for run in runs:
        list(run.epochs(2))
    states = [run.model.state_dict() for run in runs]
    assert equal_states(states[0], states[1])
    assert not equal_states(states[0], states[2])


def test_a_last_batch_of_one_example_does_not_end_a_batch_norm(blobs):
    x, y = blobs.data.x_train[:65], blobs.data.y_train[:65]
    task = Task.from_tensors(x, y, x, y, epochs=1, batch_size=32)
    run = training(task, built(Mlp(), {"width": 4, "depth": 1, "act": "relu", "norm": True}))
    assert len(list(run.epochs(1))) == 1


def test_nan_is_said_with_its_epoch(blobs):
    x = blobs.data.x_train.clone()
    x[3] = float("nan")
    genes = {"width": 4, "depth": 1, "act": "relu", "norm": False}
    task = Task.from_tensors(x, blobs.data.y_train, x, blobs.data.y_train, epochs=1)
    with pytest.raises(NonFiniteError, match="the training loss is nan in epoch 1"):
        list(training(task, built(Mlp(), genes)).epochs(1))
    good = Task.from_tensors(blobs.data.x_train, blobs.data.y_train, x, blobs.data.y_train, epochs=1)
    with pytest.raises(NonFiniteError, match="val_loss is nan"):
        list(training(good, built(Mlp(), genes)).epochs(1))


def test_a_loader_that_gives_nothing_is_not_a_loss_of_zero():
    data = DataLoader(TensorDataset(torch.randn(4, 4), torch.zeros(4).long()), batch_size=2)
    task = Task.from_loaders([], data, name="empty", epochs=1)
    with pytest.raises(InvalidInputError, match="gave no batch in epoch 1"):
        list(training(task, built(Mlp(), {"width": 4, "depth": 1, "act": "relu", "norm": False})).epochs(1))


def test_clipping_bounds_the_gradient(blobs):
    norms = []

    @contextmanager
    def step():
        yield
        if run.model.training:
            norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in run.model.parameters())))

    x, y = 100 * blobs.data.x_train, blobs.data.y_train
    task = Task.from_tensors(x, y, epochs=1, clip=0.1)
    run = training(task, built(Mlp(), {"width": 16, "depth": 2, "act": "relu", "norm": False}), step=step)
    list(run.epochs(1))
    assert norms and max(norms) <= 0.1 + 1e-5


def test_evaluation_leaves_the_mode_and_wraps_each_batch_in_a_step(blobs):
    calls = []

    @contextmanager
    def step():
        calls.append(torch.is_grad_enabled())
        yield

    model = built(Mlp(), {"width": 4, "depth": 1, "act": "relu", "norm": True})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        scores = evaluate(model, blobs, blobs.load().test, "test", CPU, step)
        assert model.training is mode
    assert set(scores) == {"test_loss", "test_accuracy"}
    assert len(calls) == 2
    assert equal_states(model.state_dict(), before)


def test_auxiliary_heads_join_the_loss(blobs):
    class Two(nn.Module):
        auxiliary_weight = 0.4

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.auxiliary = [self.b(x)] if self.training else []
            return self.a(x)

    model = Two()
    before = model.b.weight.clone()
    list(training(blobs, model).epochs(1))
    assert not torch.equal(model.b.weight, before)


# Augmentation, against loops over pixels.


def slow_augment(x, kinds, generator):
    n, _, h, w = x.shape
    draw = lambda high: torch.randint(high, (n,), generator=generator).tolist()  # noqa: E731
    out = x.clone()
    if "flip" in kinds:
        for i, flip in enumerate(draw(2)):
            if flip:
                out[i] = out[i].flip(-1)
    if "shift" in kinds:
        dy = [d - h // 8 for d in draw(2 * (h // 8) + 1)]
        dx = [d - w // 8 for d in draw(2 * (w // 8) + 1)]
        source, out = out, torch.zeros_like(out)
        for i in range(n):
            for r in range(h):
                for k in range(w):
                    if 0 <= r + dy[i] < h and 0 <= k + dx[i] < w:
                        out[i, :, r, k] = source[i, :, r + dy[i], k + dx[i]]
    if "cutout" in kinds:
        cy, cx = draw(h), draw(w)
        for i in range(n):
            for r in range(max(0, cy[i] - h // 4), min(h, cy[i] - h // 4 + h // 2)):
                for k in range(max(0, cx[i] - w // 4), min(w, cx[i] - w // 4 + w // 2)):
                    out[i, :, r, k] = 0
    return out


@pytest.mark.parametrize("kinds", [("flip",), ("shift",), ("cutout",), ("flip", "shift", "cutout")])
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (5, 3, 17, 9), (4, 2, 5, 16)])
def test_augmentation_equals_loops_over_pixels(kinds, shape):
    x = torch.rand(shape) + 0.1
    for seed in range(5):
        fast = augment(x, kinds, torch.Generator().manual_seed(seed))
        slow = slow_augment(x, kinds, torch.Generator().manual_seed(seed))
        assert torch.equal(fast, slow)


def test_a_cutout_in_the_middle_is_a_square_of_half_the_side():
    x = torch.ones(400, 1, 16, 16)
    holes = (augment(x, ("cutout",), torch.Generator().manual_seed(0)) == 0).sum(dim=(1, 2, 3))
    assert holes.max() == 64 and holes.min() >= 16


def test_nothing_asked_nothing_drawn():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    x = torch.rand(2, 1, 4, 4)
    assert augment(x, (), generator) is x
    assert torch.equal(generator.get_state(), before)


def test_images_are_placed_in_channels_last():
    assert place(torch.rand(2, 3, 4, 4), CPU).is_contiguous(memory_format=torch.channels_last)
    assert place(torch.rand(2, 3), CPU).shape == (2, 3)
