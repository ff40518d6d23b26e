from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import Binary, Conv, Mlp, equal_states
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nasplat import Recipe, Task
from nasplat.errors import InvalidInputError, NonFiniteError
from nasplat.nn import BinaryConv2d
from nasplat.phases import EXPERT, PROGRESSIVE, PROGRESSIVE_EXPERT, TWO_STEP, Phase
from nasplat.teacher import Teacher
from nasplat.train import Training, augment, evaluate, place

CPU = torch.device("cpu")
CONV = Conv().architecture({"channels": 6, "kernel": 3})


def built(space=None, genes=None, seed=0):
    torch.manual_seed(seed)
    space = space or Conv()
    model = space.build(space.architecture(genes) if genes else CONV)
    if isinstance(space, Conv | Binary):
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


# Phases.


class Watched(nn.Module):
    """Writes down, at each training pass, the mode of the layers of a binary network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = Binary().build(Binary().architecture({"channels": 4}))
        self.network.eval()(torch.zeros(1, 1, 8, 8))
        self.transfer_points = ("network.stage1", "network.stage2")
        self.modes: list[tuple[object, bool, bool]] = []
        self.experts: list[torch.Tensor] = []

    def forward(self, x):
        if self.training:
            layers = [layer for layer in self.modules() if isinstance(layer, BinaryConv2d)]
            assert len(layers) == 2
            modes = {(x.tanh_activations or (x.binary_activations and "sign"), x.binary_weights) for x in layers}
            assert len(modes) == 1
            self.modes.append((*modes.pop(), self.network.stage2.single))
            self.experts.append(self.network.stage2.weight.detach().clone())
        return self.network(x)


@pytest.mark.parametrize(
    ("phases", "epochs", "expected"),
    [
        ((), 2, [("sign", True, False)] * 2),
        (TWO_STEP, 5, [("sign", False, False)] * 2 + [("sign", True, False)] * 3),
        (EXPERT, 4, [("sign", False, True), ("sign", False, False), ("sign", True, False), ("sign", True, False)]),
        (PROGRESSIVE, 3, [(True, False, True), ("sign", False, False), ("sign", True, False)]),
        (PROGRESSIVE_EXPERT, 3, [(False, False, True), ("sign", False, True), ("sign", True, False)]),
        ((Phase(0.25), Phase(0.75, False, True)), 4, [("sign", True, False)] + [(False, True, True)] * 3),
    ],
)
def test_each_epoch_is_in_the_mode_of_its_phase(phases, epochs, expected):
    task = Task.digits(epochs=epochs, limit=60, batch_size=30, phases=phases)
    model = Watched()
    found = rates(task, model)
    steps = len(found) // epochs
    assert model.modes == [mode for mode in expected for _ in range(steps)]
    # The schedule begins anew with each phase, and falls within it.
    begins = [span.begin for span in task.recipe.spans]
    assert [index for index, rate in enumerate(found) if rate == task.recipe.lr] == [steps * begin for begin in begins]


def test_experts_begin_as_copies_of_the_one_that_was_trained():
    model = Watched()
    list(training(Task.digits(epochs=3, limit=60, batch_size=30, lr=0.01, phases=EXPERT), model).epochs(3))
    steps = len(model.experts) // 3
    first, copied, later = (model.experts[index] for index in (0, steps, 2 * steps - 1))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(copied[0], copied[1]) and not torch.equal(copied[0], first[0])
    assert not torch.equal(later[0], later[1])


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_phase_has_an_optimiser_of_its_own(kind):
    phases = (Phase(0.25, lr=0.1, weight_decay=1e-5), Phase(0.25, weight_decay=0.0), Phase(0.5, lr=0.3))
    task = Task.digits(
        epochs=4, limit=60, batch_size=30, lr=0.2, weight_decay=0.01, phases=phases, schedule="constant",
        optimiser=kind,
    )  # fmt: skip
    run = training(task, Watched())
    seen = []
    for _ in run.epochs(4):
        group = run.optimiser.param_groups[0]
        seen.append((run.optimiser, group["lr"], group["weight_decay"]))
    assert [rest for _, *rest in seen] == [[0.1, 1e-5], [0.2, 0.0], [0.3, 0.01], [0.3, 0.01]]
    assert len({id(optimiser) for optimiser, *_ in seen}) == 3 and seen[2][0] is seen[3][0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"share": "a"}, "share is 'a'; legal: a number"),
        ({"binary_activations": 1}, "binary_activations is 1; legal: True, False, 'tanh'"),
        ({"binary_weights": 0}, "binary_weights is 0; legal: True, False"),
        ({"lr": "x"}, "lr is 'x'; legal: a positive number"),
        ({"lr": float("inf")}, "lr is inf; legal: a positive number"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; legal: a number from 0 up"),
    ],
)
def test_a_phase_says_what_is_wrong(wrong, says):
    with pytest.raises(InvalidInputError, match=says):
        Phase(**{"share": 1.0, **wrong})


def test_a_phases_own_rate_falls_from_there():
    phases = (Phase(0.5, lr=0.1), Phase(0.5))
    found = rates(Task.digits(epochs=2, limit=60, batch_size=30, lr=0.2, phases=phases), Watched())
    half = len(found) // 2
    assert found[half:] == pytest.approx([0.1 * (1 + math.cos(math.pi * i / half)) for i in range(half)])
    assert found[:half] == pytest.approx([rate / 2 for rate in found[half:]])


def test_a_network_without_binary_layers_passes_through_phases_as_it_is(blobs):
    genes = {"width": 4, "depth": 1, "act": "relu", "norm": False}
    x, y = blobs.data.x_train, blobs.data.y_train
    task = Task.from_tensors(x, y, epochs=2, phases="two_step", lr=0.02)
    assert rates(task, built(Mlp(), genes)) == 2 * rates(
        replace(task, recipe=Recipe(epochs=1, lr=0.02)), built(Mlp(), genes)
    )


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"phases": TWO_STEP},
        {"phases": EXPERT},
        {"phases": PROGRESSIVE, "teacher": Teacher(last="all")},
    ],
    ids=["plain", "two_step", "expert", "progressive"],
)
def test_a_state_goes_on_bit_for_bit(policy):
    task = Task.digits(epochs=4, limit=60, batch_size=20, augment=("flip", "shift", "cutout"), **policy)
    genes = {"channels": 4}
    whole = training(task, built(Binary(), genes, seed=3), seed=5)
    torch.manual_seed(7)  # dropout draws from here
    reports, states = [], []
    for report in whole.epochs(4):
        reports.append(dict(report.metrics))
        states.append(deep(whole.state()))
    for cut in (1, 2, 3):
        torch.manual_seed(99)
        second = training(task, built(Binary(), genes, seed=11), seed=12)
        second.load_state(states[cut - 1])
        # Where a phase has just ended, the network is still in it.
        assert second.validate() == {name: reports[cut - 1][name] for name in ("val_loss", "val_accuracy")}
        assert [dict(report.metrics) for report in second.epochs(4)] == reports[cut:]
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
