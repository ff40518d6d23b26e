from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from nasplat import Task
from nasplat.errors import InvalidInputError, NonFiniteError, UnsupportedError
from nasplat.space import SearchSpace, Supernet
from nasplat.testing.landscapes import Levels, TinyCell
from nasplat.testing.strategy_contract import RecordingContext, explore
from nasplat.train import evaluate
from nasplat.weight_sharing.inherited import SupernetPath
from nasplat.weight_sharing.paths import PathTraining
from nasplat.weight_sharing.recalibrate import calibration_batches, recalibrate


@dataclass(frozen=True)
class Rows(SearchSpace):
    """One choice among rows of a matrix: an option is a vector of logits."""

    rows: int = 4

    @property
    def choices(self):
        return {"row": tuple(range(self.rows))}

    def build(self, architecture):
        raise NotImplementedError

    def supernet(self, keep=None, partial=1):
        return RowsSupernet(self.rows)


class RowsSupernet(Supernet):
    def __init__(self, rows):
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(rows))
        self.shared = nn.Parameter(torch.zeros(2))
        self.seen = []

    def forward(self, x, relaxed):
        self.seen.append((int(relaxed["row"].argmax()), x[:, 0].tolist(), self.training))
        used = sum(weight * row for weight, row in zip(relaxed["row"], self.rows, strict=True) if weight)
        return (used + self.shared).expand(len(x), 2)


@dataclass(frozen=True)
class Given(PathTraining):
    """The same paths in every step."""

    rows: tuple[int, ...] = (0,)

    def steps(self, space, rng):
        while True:
            yield [space.architecture({"row": row}) for row in self.rows]


PLAIN = Given(
    epochs=1, batch_size=4, lr=0.5, momentum=0.0, weight_decay=0.0, clip=None, candidates=1, recalibrate=0
)  # fmt: skip


def task(n=4, **kwargs):
    x = torch.arange(float(n))[:, None]
    y = torch.ones(n, dtype=torch.long)
    return Task.from_tensors(x, y, x, y, **kwargs)


def trained(explorer, data=None, space=None, **kwargs):
    context = RecordingContext()
    found = explore(explorer, space or Rows(), data or task(), context, **kwargs)
    return context.kept, found, context


def test_gradients_of_a_steps_paths_are_summed_and_options_off_the_paths_stay():
    kept, *_ = trained(replace(PLAIN, rows=(0, 2)))
    # softmax - target = (0.5, -0.5) for each path; the shared vector is on both.
    assert kept["rows.0"].tolist() == kept["rows.2"].tolist() == [-0.25, 0.25]
    assert kept["shared"].tolist() == [-0.5, 0.5]
    assert kept["rows.1"].tolist() == kept["rows.3"].tolist() == [0.0, 0.0]


def test_an_option_off_the_paths_has_neither_momentum_nor_decay():
    @dataclass(frozen=True)
    class Leaves(Given):
        """Row 0 in the first step of an epoch, row 1 from then on."""

        def steps(self, space, rng):
            yield [space.architecture({"row": 0})]
            while True:
                yield [space.architecture({"row": 1})]

    once, *_ = trained(Leaves(epochs=1, batch_size=4, lr=0.5, weight_decay=0.1, clip=None, candidates=1))
    twice, *_ = trained(Leaves(epochs=1, batch_size=2, lr=0.5, weight_decay=0.1, clip=None, candidates=1))
    assert twice["rows.0"].tolist() == once["rows.0"].tolist() == [-0.25, 0.25]
    assert twice["rows.1"].abs().sum() > 0


def test_the_summed_gradient_is_clipped():
    kept, *_ = trained(replace(PLAIN, rows=(0, 0, 0, 0), clip=0.1))
    step = torch.cat([kept["rows.0"], kept["shared"]])
    assert float(step.norm()) == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_the_rate_follows_a_cosine_over_the_epochs():
    explorer = Given(epochs=4, lr=0.8, lr_min=0.2)
    assert [explorer._lr(epoch) for epoch in (1, 3)] == pytest.approx([0.8, 0.5])
    assert explorer._lr(5) == pytest.approx(0.2)


def test_all_paths_of_a_step_see_one_batch_and_single_examples_are_left_out(monkeypatch):
    made = []
    original = Rows.supernet
    monkeypatch.setattr(Rows, "supernet", lambda self: made.append(original(self)) or made[0])
    *_, context = trained(replace(PLAIN, rows=(1, 3), epochs=2), task(9))
    seen = made[0].seen
    assert context.steps == 4 and len(seen) == 8
    assert [row for row, *_ in seen] == [1, 3] * 4
    assert all(one[1] == two[1] and one[2] for one, two in zip(seen[::2], seen[1::2], strict=True))
    epochs = [[row for _, x, _ in seen[begin : begin + 4 : 2] for row in x] for begin in (0, 4)]
    assert all(len(set(rows)) == 8 for rows in epochs) and epochs[0] != epochs[1]


def test_label_smoothing_is_the_tasks():
    kept, *_ = trained(PLAIN, task(label_smoothing=0.2))
    assert kept["rows.0"].tolist() == pytest.approx([-0.2, 0.2])  # (0.5, 0.5) - (0.1, 0.9), times 0.5


def test_what_is_found_has_the_least_validation_loss_of_the_candidates():
    _, found, _ = trained(replace(PLAIN, rows=(2,), candidates=30))
    assert found == [Rows().architecture({"row": 2})]


@dataclass(frozen=True)
class Sampled(PathTraining):
    def steps(self, space, rng):
        while True:
            yield [space.sample(rng)]


def test_candidates_are_validated_with_statistics_of_their_own_and_the_supernets_are_kept():
    space, data = TinyCell(), Task.digits(limit=200, batch_size=50)
    explorer = Sampled(epochs=1, batch_size=32, candidates=4, recalibrate=3)
    context = RecordingContext()
    found = explore(explorer, space, data, context)
    supernet = space.supernet()
    supernet.load_state_dict(context.kept)
    rng = np.random.default_rng([context.seed, 0])  # as the contract's explore makes it
    last = [int(seed) for seed in rng.integers(2**31, size=3)][2]
    draws = np.random.default_rng(last)
    losses = {}
    for architecture in [space.sample(draws) for _ in range(4)]:
        supernet.load_state_dict(context.kept)
        path = SupernetPath(supernet, space, architecture).eval()
        recalibrate(path, calibration_batches(data, 3, last, context.device))
        scores = evaluate(path, data, data.load().validation, "val", context.device, context.step)
        losses[architecture] = scores["val_loss"]
    assert found == [min(losses, key=losses.__getitem__)]
    assert len(set(losses.values())) > 1
    # Kept before the candidates were validated, whose statistics are put back.
    assert all(torch.equal(value, context.load()["supernet"][name]) for name, value in context.kept.items())


def test_a_run_that_was_told_to_end_does_not_go_on_when_it_is_resumed():
    explorer = replace(PLAIN, epochs=5, candidates=3)
    _, found, context = trained(explorer, stop_after=2)
    resumed, reports = RecordingContext(), []
    resumed.stored = context.stored
    assert explore(explorer, Rows(), task(), resumed, reports) == found
    assert reports == []
    assert all(torch.equal(value, context.kept[name]) for name, value in resumed.kept.items())


def test_loaders_are_taken():
    batches = [(torch.ones(4, 1), torch.ones(4, dtype=torch.long))] * 3
    data = Task.from_loaders(batches, batches, name="three")
    *_, context = trained(replace(PLAIN, epochs=2), data)
    assert context.steps == 6


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UnsupportedError, match="no supernet"):
        trained(PLAIN, space=Levels())
    with pytest.raises(InvalidInputError, match="at least 2 examples"):
        trained(PLAIN, task(1))
    with pytest.raises(NonFiniteError, match="train_loss"):
        trained(replace(PLAIN, epochs=2), task(loss=lambda outputs, targets: outputs.sum() * float("nan")))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"epochs": 1.0}, {"batch_size": 1}, {"candidates": 0}, {"recalibrate": -1}, {"lr": 0.0},
        {"lr": "fast"}, {"lr_min": 1.0}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"clip": 0.0},
    ],
)  # fmt: skip
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        Given(**wrong)
