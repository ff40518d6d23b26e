"""Joint search of architecture and training."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Conv, Mlp

import nasplat
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.export import load_bundle
from nasplat.identity import canonical, describe, restore
from nasplat.joint_space import JointSpace
from nasplat.ranges import Float, Int
from nasplat.restorable import restorable
from nasplat.search import Assignment
from nasplat.strategy import Evaluate
from nasplat.testing.drive import trial_rng
from nasplat.testing.landscapes import TinyCell
from nasplat.testing.space_contract import SpaceContract
from nasplat.train import Training
from nasplat.worker import Worker
from search_spaces import BinaryGrowth, MetaKernel
from strategies import RandomSearch

HYPERPARAMETERS = {
    "lr": Float(1e-4, 1e-1, log=True, steps=7),
    "optimiser": ("adam", "sgd"),
    "batch_size": (32, 64, 128),
}


class TestJointSpaceContract(SpaceContract):
    classes = 10

    @pytest.fixture
    def space(self):
        return JointSpace(TinyCell(), HYPERPARAMETERS)

    @pytest.fixture
    def example(self):
        return torch.randn(4, 1, 8, 8)


# A space whose verbs are its own, and that refuses some genes.
GROWTH = JointSpace(BinaryGrowth(classes=10), {"lr": Float(1e-3, 1e-1, log=True, steps=5)})


def samples(space, count=10):
    return [space.sample(trial_rng(seed, 0)) for seed in range(count)]


def test_verbs_of_the_inner_space_are_kept():
    for architecture in samples(GROWTH):
        inner = GROWTH.inner(architecture)
        assert GROWTH.space.architecture(inner.genes) == inner
        assert GROWTH.architecture(architecture.genes) == architecture
        moves = GROWTH.neighbours(architecture)
        assert {GROWTH.inner(move) for move in moves} == {inner, *GROWTH.space.neighbours(inner)}
        assert GROWTH.mutate(architecture, trial_rng(1, 0)) in moves
        grown = GROWTH.growth(architecture)
        assert [GROWTH.inner(child) for child in grown] == GROWTH.space.growth(inner)
        assert {child.genes["recipe/lr"] for child in grown} <= {architecture.genes["recipe/lr"]}
        assert GROWTH.discretise(GROWTH.relax(architecture)) == architecture


def test_growth_starts_where_the_inner_space_does():
    start = GROWTH.start()
    assert GROWTH.inner(start) == GROWTH.space.start()
    assert start.genes["recipe/lr"] == 0.01
    assert JointSpace(Mlp(), HYPERPARAMETERS).start is None


def test_size_enumeration_and_encoding():
    space = JointSpace(Mlp(), HYPERPARAMETERS)
    assert space.size() == 32 * 7 * 2 * 3
    listed = list(space.enumerate())
    assert len(set(listed)) == len(listed) == space.size()
    assert space.encode(listed[0]).shape == (4 + 2 + 2 + 2 + 3 + 2 + 1,)
    assert len({space.encode(architecture).tobytes() for architecture in listed}) == len(listed)


def test_choices_change_about_equally_often():
    space = JointSpace(Mlp(), HYPERPARAMETERS)
    parent, rng = space.sample(trial_rng(0, 0)), trial_rng(1, 0)
    changed = Counter()
    for _ in range(700):
        child = space.mutate(parent, rng)
        (name,) = [name for name in parent.genes if parent.genes[name] != child.genes[name]]
        changed[name] += 1
    assert set(changed) == set(space.choices)
    assert all(60 < count < 145 for count in changed.values())  # 100 each, 5 standard deviations


def test_nothing_architectural_to_change():
    space = JointSpace(replace_options(), {"lr": (0.1, 0.2)})
    (parent, other) = space.enumerate()
    assert {space.mutate(parent, trial_rng(seed, 0)) for seed in range(8)} == {other}
    with pytest.raises(InvalidInputError):
        JointSpace(replace_options(), {"lr": (0.1,)}).mutate(*one_architecture())


def replace_options():
    return nasplat.space_from(torch.nn.Identity, {"only": ("one",)})


def one_architecture():
    space = JointSpace(replace_options(), {"lr": (0.1,)})
    return space.sample(trial_rng(0, 0)), trial_rng(0, 0)


def test_what_a_network_costs_and_looks_like_is_the_inner_spaces():
    inner = MetaKernel(classes=10)
    space = JointSpace(inner, HYPERPARAMETERS)
    architecture = space.sample(trial_rng(0, 0))
    assert space.interactions() == inner.interactions()
    assert space.temperatures() == inner.temperatures()
    assert space.choice_groups == inner.choice_groups
    *own, row = space.sketch(architecture)
    assert own == list(inner.sketch(space.inner(architecture)))
    assert [block.name for block in row.blocks] == ["batch_size", "optimiser", "lr"]
    assert space.draw(architecture).svg()


def test_no_supernet_and_why():
    with pytest.raises(UnsupportedError, match="one recipe"):
        JointSpace(TinyCell(), HYPERPARAMETERS).supernet()


def test_equal_whatever_the_order_given():
    one, two = (
        JointSpace(Mlp(), dict(items)) for items in (HYPERPARAMETERS.items(), reversed(HYPERPARAMETERS.items()))
    )
    assert one == two
    assert one.identity == two.identity
    assert list(one.choices) == list(two.choices)
    assert hash(one) == hash(two)
    assert one.identity != JointSpace(Mlp(), {**HYPERPARAMETERS, "optimiser": ("adam",)}).identity
    assert one.name == "Mlp+recipe"


def test_described_and_restored():
    space = JointSpace(MetaKernel(classes=10), {**HYPERPARAMETERS, "label_smoothing": (0.0, 0.1), "clip": (1.0,)})
    again = restore(json.loads(canonical(describe(space))), restorable())
    assert again == space
    assert again.identity == space.identity
    assert list(again.choices) == list(space.choices)


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"epochs": (1, 2)}, "'epochs' is no hyperparameter.*budget.*legal: batch_size, optimiser, lr"),
        ({"augment": ("flip",)}, "'augment'.*tuples"),
        ({"teacher": ("a",)}, "'teacher'.*object"),
        ({"learning_rate": (0.1,)}, "'learning_rate'.*legal: batch_size, optimiser, lr"),
        ({"optimiser": ("adam", "lion")}, "optimiser has the option 'lion'.*legal: adam, adamw, sgd"),
        ({"lr": (0.1, -0.1)}, "lr has the option -0.1.*positive"),
        ({"lr": Float(-1, 1)}, "lr has the option -1.0"),
        ({"lr": ("fast",)}, "lr has the option 'fast'"),
        ({"lr": 0.1}, "lr is 0.1; legal: a tuple"),
        ({"lr": ()}, "lr is "),
        ({"optimiser": "adam"}, "optimiser is 'adam'; legal: a tuple"),
        ({"clip": (None, 1.0)}, "clip has the option None"),
        ({"batch_size": Int(1, 4)}, "batch_size has the option 1"),
        ({"batch_size": (32, 32)}, "different options"),
        ({"phases": ("no such",)}, "phases has the option 'no such'"),
        ({}, "one or more"),
        (None, "one or more"),
    ],
)
def test_refuses(hyperparameters, message):
    with pytest.raises(InvalidInputError, match=message):
        JointSpace(Mlp(), hyperparameters).sample(trial_rng(0, 0))


def test_refuses_what_is_no_inner_space():
    with pytest.raises(InvalidInputError, match="SearchSpace"):
        JointSpace("mlp", HYPERPARAMETERS)
    with pytest.raises(InvalidInputError, match="one mapping"):
        JointSpace(JointSpace(Mlp(), HYPERPARAMETERS), {"clip": (1.0,)})
    with pytest.raises(InvalidInputError, match="begin with 'recipe/'"):
        JointSpace(nasplat.space_from(torch.nn.Identity, {"recipe/lr": (1, 2)}), HYPERPARAMETERS)


# Training.


def run(space, genes, task, folder, budget=1.0):
    worker = Worker(space, task, folder)
    *reports, outcome = worker.run(Assignment(0, Evaluate(space.architecture(genes), budget), seed=3))
    assert outcome.state == "complete", outcome.reason
    return outcome.metrics, reports


@pytest.fixture
def task():
    return nasplat.Task.digits(epochs=2, limit=200, lr=1e-3, batch_size=50)


INNER = {"channels": 4, "kernel": 3}
SETTING = {"recipe/lr": 0.01, "recipe/optimiser": "adam", "recipe/batch_size": 32}


def test_the_worker_trains_by_the_genes(task, tmp_path, monkeypatch):
    seen = []
    original = Training.__init__

    def spy(self, model, task, *arguments):
        seen.append(task)
        original(self, model, task, *arguments)

    monkeypatch.setattr(Training, "__init__", spy)
    run(JointSpace(Conv(), HYPERPARAMETERS), {**INNER, **SETTING, "recipe/optimiser": "sgd"}, task, tmp_path)
    (used,) = seen
    assert used == replace(task, recipe=replace(task.recipe, lr=0.01, optimiser="sgd", batch_size=32))
    assert used.recipe.epochs == 2
    seen.clear()
    run(Conv(), INNER, task, tmp_path)
    assert seen == [task]


def test_a_gene_is_worth_as_much_as_the_tasks_own_setting(task, tmp_path):
    """The same training, whether the recipe or the genes ask for it; another one with another gene."""
    joint = JointSpace(Conv(), HYPERPARAMETERS)
    by_genes, _ = run(joint, {**INNER, **SETTING}, task, tmp_path / "a")
    own = replace(task, recipe=replace(task.recipe, lr=0.01, optimiser="adam", batch_size=32))
    by_recipe, _ = run(Conv(), INNER, own, tmp_path / "b")
    assert by_genes["train_loss"] == by_recipe["train_loss"]
    assert by_genes["val_loss"] == by_recipe["val_loss"]
    for gene, value in (("recipe/lr", 0.0001), ("recipe/optimiser", "sgd"), ("recipe/batch_size", 128)):
        other, _ = run(joint, {**INNER, **SETTING, gene: value}, task, tmp_path / gene.replace("/", "_"))
        assert other["train_loss"] != by_genes["train_loss"], gene
    slow, _ = run(joint, {**INNER, **SETTING, "recipe/lr": 0.0001}, task, tmp_path / "slow")
    assert slow["train_loss"] > by_genes["train_loss"] + 0.5


class TestStudy:
    """A real study: searched, interrupted, gone on with, loaded, exported."""

    def study(self, folder, space):
        return nasplat.Study(
            space=space,
            strategy=RandomSearch(),
            task=nasplat.Task.digits(epochs=1, limit=200),
            objectives=[nasplat.maximise("val_accuracy")],
            folder=folder,
            tracker=None,
            seed=1,
        )

    def test_from_search_to_export(self, tmp_path):
        space = JointSpace(
            Conv(),
            {"lr": Float(1e-4, 1e-1, log=True), "optimiser": ("adam", "sgd")},
        )
        self.study(tmp_path / "study", space).run(max_trials=2)
        result = self.study(tmp_path / "study", space).run(max_trials=4)
        assert [trial.state for trial in result.trials] == ["complete"] * 4
        assert len(set(result.table()["recipe/lr"])) > 1
        whole = self.study(tmp_path / "whole", space).run(max_trials=4)
        assert list(whole.table()["val_accuracy"]) == list(result.table()["val_accuracy"])

        best = nasplat.load(tmp_path / "study", space=space, task=nasplat.Task.digits(epochs=1, limit=200)).best
        assert best.architecture == result.best.architecture
        report = best.export(tmp_path / "exported")
        assert not report.bad
        exported = json.loads((tmp_path / "exported" / "architecture.json").read_text())
        assert exported["genes"]["recipe/lr"] == best.architecture.genes["recipe/lr"]
        x = nasplat.Task.digits().load().validation.first(8)
        with torch.inference_mode():
            torch.testing.assert_close(load_bundle(tmp_path / "exported", space)(x), best.model()(x))

    def test_resumed_from_its_folder_alone(self, tmp_path):
        small = MetaKernel(
            stages=((4, 1, 2),), stem_channels=4, first_channels=4, head_channels=8, in_channels=1, classes=10
        )
        space = JointSpace(small, {"lr": Float(1e-3, 1e-1, log=True, steps=5), "batch_size": (50, 100)})
        self.study(tmp_path / "study", space).run(max_trials=1)
        study = nasplat.Study.resume(tmp_path / "study", tracker=None)
        assert study.space == space
        resumed = study.run(max_trials=2)
        whole = self.study(tmp_path / "whole", space).run(max_trials=2)
        assert list(resumed.table()["train_loss"]) == list(whole.table()["train_loss"])
        loaded = nasplat.load(tmp_path / "study")
        assert loaded.space == space
        assert loaded.best.architecture.genes["recipe/batch_size"] in (50, 100)
        loaded.best.model()


def test_numpy_scalars_do_not_get_into_genes():
    for architecture in samples(
        JointSpace(Mlp(), {"lr": Float(1e-4, 1, log=True), "batch_size": Int(16, 512, log=True)})
    ):
        assert not any(isinstance(gene, np.generic) for gene in architecture.genes.values())
        json.dumps(dict(architecture.genes))
