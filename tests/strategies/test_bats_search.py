from dataclasses import replace

import pytest

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.task import Task
from nasplat.testing.landscapes import TinyCell
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from nasplat.weight_sharing.bilevel import Stage
from search_spaces import Bats
from strategies import BatsSearch


class TestContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return BatsSearch(epochs=3, warmup=1, batch_size=16, temperature=0.5, stages=())


def test_values_of_the_paper():
    bats = BatsSearch()
    assert BatsSearch.paper() == bats
    assert (bats.epochs, bats.warmup, bats.batch_size, bats.optimiser) == (25, 10, 96, "adam")
    assert (bats.lr, bats.weight_decay) == (1e-3, 3e-4)
    assert (bats.alpha_lr, bats.alpha_weight_decay, bats.alpha_betas) == (6e-4, 1e-3, (0.5, 0.999))
    assert [(stage.cells, stage.options) for stage in bats.stages] == [(5, None), (11, 5), (17, 3)]
    assert {bats._lr(epoch) for epoch in range(1, 26)} == {1e-3}


def test_presets_take_any_attribute():
    assert BatsSearch.paper(epochs=30) == BatsSearch(epochs=30)
    small = BatsSearch.small(epochs=9, stages=[])
    assert (small.epochs, small.stages) == (9, ())
    assert small.optimiser == "adam"


def test_searches_in_stages_of_growing_depth(monkeypatch):
    """The small preset as it is, a step an epoch; what is found belongs to the space as given."""
    space, made = Bats.small(), []
    original = Bats.supernet

    def supernet(self, keep=None, partial=1):
        alive = {len(options) for options in self.alive(keep).values()}
        net = original(self, keep, partial)
        net.register_forward_hook(lambda *_: made.append((self.cells, alive)))
        return net

    monkeypatch.setattr(Bats, "supernet", supernet)
    reports, context = [], RecordingContext()
    explorer = BatsSearch.small(epochs=2, batch_size=16)
    found = explore(explorer, space, Task.fashion_mnist(size=8, limit=20), context, reports)
    assert len(reports) == 6
    assert list(dict.fromkeys((cells, *alive) for cells, alive in made)) == [(2, 8), (3, 5), (5, 3)]
    assert [space.owns(architecture) for architecture in found] == [True]
    space.build(found[0])
    # A network of another depth cannot have the weights of the last supernet.
    with pytest.raises(InvalidInputError, match=r"cannot inherit .* tensors"):
        space.inherit(space.build(found[0]), None, context.kept)


def test_a_network_inherits_from_stages_of_its_own_depth():
    space, context = Bats.small(cells=2), RecordingContext()
    explorer = BatsSearch.small(epochs=1, warmup=0, batch_size=16, stages=(Stage(), Stage(options=3)))
    found = explore(explorer, space, Task.fashion_mnist(size=8, limit=20), context)
    model = space.inherit(space.build(found[0]), None, context.kept)
    assert (model.classifier.weight == context.kept["classifier.weight"]).all()


def test_a_space_without_cells_is_told_how():
    explorer = BatsSearch(epochs=2, warmup=1, batch_size=16)
    with pytest.raises(UnsupportedError, match="no field 'cells'"):
        explore(explorer, TinyCell(), Task.digits(limit=32), RecordingContext())
    assert len(explore(replace(explorer, stages=()), TinyCell(), Task.digits(limit=32), RecordingContext())) == 1
