from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint

import pytest

from nasplat import Count, Latency, Task, at_most, maximise, plugins
from nasplat.errors import UnknownPluginError, UnsupportedError
from nasplat.identity import canonical, describe, restore
from nasplat.restorable import restorable
from search_spaces import Bats
from strategies import BatsSearch, Darts, OneShot, OptunaSearch, RandomSearch, RegularizedEvolution


def test_the_projects_own_plugins_come_in_through_the_door():
    assert plugins.load(plugins.SPACES, "bats") is Bats
    own = {"random_search": RandomSearch, "regularized_evolution": RegularizedEvolution, "optuna": OptunaSearch}
    for name, kind in {**own, "one_shot": OneShot}.items():
        assert plugins.load(plugins.STRATEGIES, name) is kind
    assert plugins.load(plugins.EXPLORERS, "darts") is Darts


@pytest.mark.parametrize("group", plugins.GROUPS)
def test_every_installed_plugin_is_plain_data(group):
    assert plugins.installed(group)
    for name in plugins.installed(group):
        kind = plugins.load(group, name)
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen, name


def test_an_unknown_name_lists_what_is_installed():
    with pytest.raises(UnknownPluginError, match="no plug-in 'bat' among the search spaces; installed: bats"):
        plugins.load(plugins.SPACES, "bat")


def test_two_packages_with_one_name_are_an_error(monkeypatch):
    claims = [EntryPoint("cells", f"{package}.cells:Cells", plugins.SPACES) for package in ("one", "other")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: claims)
    with pytest.raises(UnknownPluginError, match=r"two installed packages claim 'cells'.*one\.cells:Cells and other"):
        plugins.installed.__wrapped__(plugins.SPACES)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [claims[0], claims[0]])
    assert list(plugins.installed.__wrapped__(plugins.SPACES)) == ["cells"]  # one package found twice on the path


@pytest.mark.parametrize(
    "value",
    [
        Bats.small(), Bats.imagenet(wide=True), RandomSearch(), RegularizedEvolution(population=3, crossover=0.5),
        OptunaSearch("nsga2", {"population_size": 4}), OneShot(BatsSearch(epochs=12)), Latency(batch=2), Count(0),
        Task.fashion_mnist(epochs=1, size=16, augment=("flip",)), maximise("val_accuracy"), at_most("params", 3),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_a_folder_describes_comes_back_equal(value):
    description = describe(value)
    back = restore(description, restorable())
    assert back == value and canonical(describe(back)) == canonical(description)


@pytest.mark.parametrize(
    "description",
    [
        {"type": "os:system", "fields": {}},
        {"type": "nasplat.study:Study", "fields": {}},
        {"function": "os:system"},
        {"class": "subprocess:Popen"},
        {"type": "strategies.one_shot:OneShot", "fields": {"explorer": {"function": "builtins:eval"}}},
    ],
)
def test_nothing_else_is_made_or_named_by_a_folder(description):
    with pytest.raises(UnsupportedError):
        restore(description, restorable())
