from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nasplat import Recipe, Task
from nasplat.cli import values
from nasplat.data.sources import DatasetData, LoaderData, Splits, TensorSource
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.identity import describe, restore
from nasplat.phases import POLICIES, TWO_STEP, Phase
from nasplat.restorable import restorable
from nasplat.task import cross_entropy
from nasplat.teacher import Teacher


def rows(source) -> set[bytes]:
    return {x.numpy().tobytes() for batch, _ in source.batches(64) for x in batch}


def counts(source) -> torch.Tensor:
    return torch.bincount(torch.cat([y for _, y in source.batches(512)]), minlength=10)


@pytest.mark.parametrize(
    ("task", "sizes"), [(Task.digits(), (1151, 287, 359)), (Task.fashion_mnist(), (4000, 1000, 1000))]
)
def test_the_embedded_splits_are_disjoint_and_stratified(task, sizes):
    splits = task.load()
    parts = [splits.train, splits.validation, splits.test]
    assert sum(sizes) == sum(len(part.y) for part in parts)
    assert all(abs(len(part.y) - size) <= 10 for part, size in zip(parts, sizes, strict=True))
    images = [rows(part) for part in parts]
    whole = sum(len(part) for part in images)
    assert len(set.union(*images)) == whole
    shares = torch.stack([counts(part) / len(part.y) for part in parts])
    assert (shares.max(0).values - shares.min(0).values).max() < 0.005
    assert counts(parts[2]).min() > 0


def test_statistics_come_from_the_training_images_alone():
    splits = Task.fashion_mnist(size=8).load()
    assert splits.train.x.mean().abs() < 1e-4 and abs(splits.train.x.std() - 1) < 1e-4
    # The others are scaled by the same numbers, so they are near to, but not exactly, normalised themselves.
    for part in (splits.validation, splits.test):
        assert 1e-5 < part.x.mean().abs() < 0.1
    whole = torch.cat([part.x for part in (splits.train, splits.validation, splits.test)])
    assert abs(whole.mean()) > 1e-5


def test_limit_takes_from_train_alone_and_size_resizes():
    whole, some = Task.digits().load(), Task.digits(limit=100, size=12).load()
    assert abs(len(some.train) - 100) <= 10
    assert torch.equal(some.validation.y, whole.validation.y) and torch.equal(some.test.y, whole.test.y)
    assert some.train.x.shape[1:] == (1, 12, 12) and some.test.x.shape[1:] == (1, 12, 12)
    assert Task.digits().example().shape == (1, 1, 8, 8)
    assert Task.digits().load() is Task.digits().load()  # once a process


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Task.digits(epochs=0), "epochs is 0; at least 1"),
        (lambda: Task.digits(epochs=1, phases=TWO_STEP), "epochs is 1; phases with shares 0.5, 0.5 need at least 2"),
        (lambda: Task.digits(epochs=2, phases="expert"), "shares 0.333333, 0.333333, 0.333333 need at least 3"),
        (lambda: Task.digits(phases="three_step"), "phases is 'three_step'; legal: .* one of two_step, expert, "),
        (lambda: Task.digits(phases=("two_step",)), "legal: a sequence of nasplat.Phase"),
        (lambda: Task.digits(phases=Phase(1)), "legal: a sequence of nasplat.Phase"),
        (lambda: Task.digits(phases=(Phase(0.5), Phase(0.4))), "shares of the 2 phases sum to 0.9; they must sum to 1"),
        (lambda: Task.digits(teacher=True), "teacher is True; a nasplat.Teacher, or None, is needed"),
        (lambda: Task.digits(teacher=Teacher()), r"no phase before the first to teach it; .*Teacher\(network="),
        (lambda: Task.digits(phases=(Phase(1),), teacher=Teacher()), "give two phases or more"),
        (lambda: Task.digits(batch_size=1), "batch norm needs at least 2"),
        (lambda: Task.digits(lr=0), "lr 0 must be positive"),
        (lambda: Task.digits(lr=float("nan")), "must be positive"),
        (lambda: Task.digits(label_smoothing=1.0), "label_smoothing"),
        (lambda: Task.digits(optimiser="lion"), "legal: adam, adamw, sgd"),
        (lambda: Task.digits(schedule="step"), "legal: cosine, constant"),
        (lambda: Task.digits(augment=("flip", "rotate")), "augment has rotate; legal: flip, shift, cutout"),
        (lambda: Task.digits(size=2), "size is 2; legal: 4 to 256"),
        (lambda: Task.digits(limit=3), "limit is 3; at least 20"),
        (lambda: Task("x"), "a task needs data or a function"),
        (lambda: Task.from_function(3), "evaluate must be callable"),
        (lambda: Task.from_tensors(torch.ones(4, 2), torch.ones(3)), "train: 4 inputs and 3 targets"),
        (lambda: Task.from_tensors(torch.ones(0, 2), torch.ones(0)), "more than 0"),
        (lambda: Task.from_tensors(torch.ones(4, 2), torch.ones(4), torch.ones(1, 2)), "validation: give both"),
        (lambda: Task.from_tensors(torch.ones(4, 2), torch.ones(4), validation=1.0), r"a share in \(0, 1\)"),
        (lambda: Task.from_tensors(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), validation=0.2), "0 to validate with"),
        (lambda: Task.from_tensors(torch.ones(2, 2), torch.tensor([0, 1]), validation=0.8), "leaves 0 to train"),
        (lambda: Task.from_loaders(iter([]), [], name="x"), "train is .* only once"),
        (lambda: Task.from_loaders([], (b for b in ()), name="x"), "validation is .* only once"),
        (lambda: Task.from_function(lambda a, b, s: {}).load(), "no data of its own"),
        (lambda: Task.from_function(lambda a, b, s: {}).example(), "example=tensor"),
    ],
)
def test_what_is_wrong_is_said(make, says):
    with pytest.raises(InvalidInputError, match=says):
        make()


def test_tensors_are_split_class_by_class():
    x = torch.arange(300.0)[:, None].repeat(1, 2)
    y = torch.cat([torch.zeros(200), torch.ones(100)]).to(torch.uint8)
    splits = Task.from_tensors(x, y, validation=0.3).load()
    assert torch.bincount(splits.train.y).tolist() == [140, 70]
    assert torch.bincount(splits.validation.y).tolist() == [60, 30]
    assert rows(splits.train).isdisjoint(rows(splits.validation))
    assert splits.test is None
    # One split, whatever is searched with which seed.
    again = Task.from_tensors(x.clone(), y, validation=0.3).load()
    assert torch.equal(again.validation.x, splits.validation.x)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_arrays_are_taken_and_classes_of_any_integer_type(kind):
    x = np.random.default_rng(0).integers(0, 255, (40, 3), dtype=np.uint8)
    y = (np.arange(40) % 2).astype(kind)
    splits = Task.from_tensors(x, y, x_validation=x[:10], y_validation=y[:10], x_test=x[:5], y_test=y[:5]).load()
    for part, size in ((splits.train, 40), (splits.validation, 10), (splits.test, 5)):
        assert part.x.dtype == torch.float32 and part.y.dtype == torch.int64 and len(part) == size


def test_real_targets_stay_real_and_are_split_in_one_go():
    y = torch.linspace(0, 1, 50)
    splits = Task.from_tensors(torch.rand(50, 2), y, loss=torch.nn.functional.mse_loss).load()
    assert splits.train.y.dtype == torch.float32
    assert (len(splits.train), len(splits.validation)) == (40, 10)


def test_a_source_shuffles_by_its_generator_alone_and_gives_every_row_once():
    source = TensorSource(torch.arange(10.0)[:, None], torch.arange(10))
    torch.manual_seed(1)
    one = [y.tolist() for _, y in source.batches(4, torch.Generator().manual_seed(3))]
    torch.manual_seed(2)
    two = [y.tolist() for _, y in source.batches(4, torch.Generator().manual_seed(3))]
    assert one == two and [len(y) for y in one] == [4, 4, 2]
    flat = [row for batch in one for row in batch]
    assert sorted(flat) == list(range(10)) and flat != list(range(10))
    assert [y.tolist() for _, y in source.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert source.first(3).flatten().tolist() == [0, 1, 2]
    assert len(source.first(99)) == 10


def test_datasets_and_loaders_give_the_rows_of_their_own():
    data = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 2)
    held = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6) % 2)
    task = Task.from_datasets(data, held, name="mine", epochs=1)
    splits = task.load()
    assert isinstance(task.data, DatasetData) and isinstance(splits, Splits)
    assert [len(x) for x, _ in splits.train.batches(8)] == [8, 8, 4]
    seen = torch.cat([x for x, _ in splits.train.batches(8, torch.Generator().manual_seed(0))]).flatten()
    assert sorted(seen.tolist()) == list(range(20)) and seen.tolist() != list(range(20))
    halves = splits.train.split(0.25, seed=1)
    assert [len(half) for half in halves] == [5, 15] and rows(halves[0]).isdisjoint(rows(halves[1]))
    assert task.example().shape == (1, 1)

    loaders = Task.from_loaders(DataLoader(data, batch_size=5), DataLoader(held, batch_size=3), name="theirs")
    splits = loaders.load()
    assert isinstance(loaders.data, LoaderData)
    for _ in range(2):  # it starts anew
        assert [len(x) for x, _ in splits.train.batches(99)] == [5, 5, 5, 5]
    with pytest.raises(UnsupportedError, match="from_datasets or from_tensors"):
        splits.train.split(0.5, seed=0)


def test_a_dataset_without_a_length_is_told_to_be_a_loader():
    class Endless(Dataset):
        def __getitem__(self, index):
            return torch.zeros(1), 0

    with pytest.raises(InvalidInputError, match=r"Task\.from_loaders"):
        Task.from_datasets(Endless(), Endless(), name="x").load()


def test_identity_is_the_name_of_data_sets_and_the_recipe_counts():
    a, b = TensorDataset(torch.ones(4, 1)), TensorDataset(torch.zeros(4, 1))
    assert describe(Task.from_datasets(a, a, name="n")) == describe(Task.from_datasets(b, b, name="n"))
    assert describe(Task.from_datasets(a, a, name="n")) != describe(Task.from_datasets(a, a, name="m"))
    assert describe(Task.digits(epochs=2)) != describe(Task.digits(epochs=3))
    assert describe(Task.digits()) != describe(Task.fashion_mnist())


def half(outputs, targets):
    return 0.5


def test_metrics_are_named_by_split():
    task = Task.from_tensors(torch.ones(10, 2), torch.arange(10) % 2, metrics={"half": half})
    outputs, targets = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])
    scores = task.score(outputs, targets, "val")
    assert scores["val_accuracy"] == 0.5 and scores["val_half"] == 0.5
    assert scores["val_loss"] == pytest.approx(float(cross_entropy(outputs, targets)))
    assert set(scores) | {"train_loss"} == set(task.metric_names or ())


def test_a_loss_of_the_users_own_is_the_only_metric_beside_theirs():
    task = Task.from_tensors(torch.ones(10, 2), torch.ones(10), loss=torch.nn.functional.mse_loss)
    assert task.metric_names == ("val_loss", "train_loss")
    assert task.score(torch.zeros(4), torch.ones(4), "val") == {"val_loss": 1.0}


def test_label_smoothing_is_in_the_training_loss_alone():
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    task = Task.digits(label_smoothing=0.2)
    assert task.compute_loss(outputs, targets) == cross_entropy(outputs, targets, 0.2)
    assert task.score(outputs, targets, "val")["val_loss"] == float(cross_entropy(outputs, targets))


def test_a_function_says_its_metrics_or_not():
    assert Task.from_function(half).metric_names is None
    assert Task.from_function(half, metrics=["val_accuracy"]).metric_names == ("val_accuracy",)
    assert Task.from_function(half).name == "half"
    assert Task.from_function(half, example=torch.ones(1, 3)).example().shape == (1, 3)


def test_a_recipe_takes_a_list_of_augmentations():
    assert Recipe(augment=["flip"]) == Recipe(augment=("flip",))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_by_its_name_is_its_phases(name):
    named, given = Task.digits(phases=name), Task.digits(phases=list(POLICIES[name]))
    assert named == given and describe(named) == describe(given) != describe(Task.digits())
    assert Recipe(phases=name).phases == POLICIES[name]


def test_phases_and_teacher_come_back_from_a_description():
    task = Task.digits(phases="progressive", teacher=Teacher(attention=3.0, last="all"))
    assert restore(describe(task), restorable()) == task


def test_phases_are_named_on_the_command_line():
    assert values.task_of("digits", {"epochs": "4", "phases": "two_step"}) == Task.digits(epochs=4, phases=TWO_STEP)
    with pytest.raises(InvalidInputError, match="or one of two_step, expert"):
        values.task_of("digits", {"phases": "two_steps"})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Phase(0), r"share is 0; legal: a number in \[0.001, 1\]"),
        (lambda: Phase(1, binary_activations="sigmoid"), "binary_activations is 'sigmoid'; legal: True, False, 'tanh'"),
        (lambda: Phase(1, binary_weights=None), "binary_weights is None; legal: True, False"),
        (lambda: Phase(1, experts="none"), "experts is 'none'; legal: 'all', 'one'"),
        (lambda: Phase(1, lr=0.0), "lr is 0.0; legal: a positive number"),
        (lambda: Phase(1, weight_decay=-1e-5), "weight_decay is -1e-05; legal: a number from 0 up"),
    ],
)
def test_a_phase_says_what_is_wrong(make, says):
    with pytest.raises(InvalidInputError, match=says):
        make()


@pytest.mark.parametrize(
    ("shares", "epochs", "expected"),
    [
        ((0.5, 0.5), 5, [(0, 2), (2, 5)]),
        ((1 / 3, 1 / 3, 1 / 3), 3, [(0, 1), (1, 2), (2, 3)]),
        ((1 / 3, 1 / 3, 1 / 3), 75, [(0, 25), (25, 50), (50, 75)]),
        ((0.1, 0.2, 0.7), 10, [(0, 1), (1, 3), (3, 10)]),
        ((0.8, 0.2), 2, [(0, 1), (1, 2)]),
        ((0.7, 0.1, 0.2), 10, [(0, 7), (7, 8), (8, 10)]),
        ((1.0,), 1, [(0, 1)]),
    ],
)
def test_phases_share_the_epochs(shares, epochs, expected):
    phases = tuple(map(Phase, shares))
    found = Recipe(epochs=epochs, phases=phases).spans
    assert [(span.begin, span.end) for span in found] == expected
    assert tuple(span.phase for span in found) == phases
    for fewer in range(1, epochs):
        if fewer < len(shares):
            with pytest.raises(InvalidInputError, match="need at least"):
                Recipe(epochs=fewer, phases=phases)


def test_the_least_number_of_epochs_is_said_and_is_enough():
    phases = (Phase(0.4), Phase(0.2), Phase(0.4))
    with pytest.raises(InvalidInputError, match=r"epochs is 3; phases with shares 0.4, 0.2, 0.4 need at least 4$"):
        Recipe(epochs=3, phases=phases)
    assert [span.end for span in Recipe(epochs=4, phases=phases).spans] == [1, 2, 4]
