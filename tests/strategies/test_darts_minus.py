import numpy as np
import pytest
import torch
from experts import Experts, ExpertsSupernet, alphas, moment

from nasplat.errors import InvalidInputError
from nasplat.nn.cell import KINDS, NODES
from nasplat.task import Task
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from nasplat.weight_sharing.bilevel import Stage
from search_spaces import Bats, DartsCell
from strategies.darts_minus import DartsMinus


class TestContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return DartsMinus(epochs=3, batch_size=16, alpha_lr=0.05, skip="identity")


def test_values_of_the_authors_script():
    minus = DartsMinus()
    assert (minus.epochs, minus.batch_size, minus.lr, minus.lr_min) == (50, 64, 0.025, 0.001)
    assert (minus.alpha_lr, minus.beta, minus.decay) == (3e-4, 1.0, "linear")


def test_beta_falls_by_the_epoch():
    space = DartsCell.small()
    betas = [DartsMinus().weight(moment(space, epoch, 50)) for epoch in range(1, 51)]
    assert betas == pytest.approx([1 - epoch / 50 for epoch in range(50)])
    assert betas[-1] == pytest.approx(0.02)
    cosine = DartsMinus(decay="cosine", beta=2.0)
    assert [cosine.weight(moment(space, epoch, 50)) for epoch in (1, 26)] == pytest.approx([2.0, 1.0])
    assert cosine.weight(moment(space, 50, 50)) == pytest.approx(1 + np.cos(np.pi * 49 / 50))


def test_beta_is_in_the_drawn_weight_of_the_skip_and_not_in_the_mixture():
    at = moment(Experts(), epoch=2, epochs=4)
    parameters = alphas(edge0=[0.0] * 3, edge1=[0.0] * 3, edge2=[0.0] * 3)
    minus = DartsMinus(skip="zeros")
    assert minus.mixture(parameters, at)["edge0"].tolist() == pytest.approx([1 / 3] * 3)
    drawn = minus.draw(parameters, at)
    assert drawn["edge0"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3 + 0.75])
    assert drawn["edge1"].tolist() == pytest.approx([1 / 3] * 3)  # does not offer it
    assert drawn["edge2"].tolist() == pytest.approx([1 / 3, 1 / 3 + 0.75, 1 / 3])
    # The same gradient as without: beta is a constant.
    worth = torch.tensor([1.0, 2.0, 4.0])
    (with_beta,) = torch.autograd.grad(drawn["edge0"] @ worth, parameters["edge0"])
    (without,) = torch.autograd.grad(minus.mixture(parameters, at)["edge0"] @ worth, parameters["edge0"])
    assert torch.equal(with_beta, without)


@pytest.mark.parametrize("kind", KINDS)
def test_is_an_auxiliary_skip_beside_the_mixture(kind):
    space = DartsCell.small(cells=2, channels=4)
    torch.manual_seed(0)
    supernet = space.supernet()
    at, minus = moment(space, epoch=3, epochs=8), DartsMinus()
    parameters = minus.initial(at, np.random.default_rng(0))

    def uses(relaxed):
        return {
            (node, source): list(
                zip(space.operations[1:], relaxed[f"{kind}/node{node}/from{source}"][1:].unbind(), strict=True)
            )
            for node in NODES
            for source in range(node)
        }

    cell = supernet.cells[KINDS.index(kind)]
    x = supernet.stem0(torch.randn(3, 1, 16, 16))
    older, newer = (x, x) if kind == "normal" else (x, supernet.cells[0](x, x, uses(minus.mixture(parameters, at))))
    plain = cell(older, newer, uses(minus.mixture(parameters, at)))
    drawn = cell(older, newer, uses(minus.draw(parameters, at)))
    # The first node sees the two inputs and nothing that changed.
    inputs = cell.preprocess0(older), cell.preprocess1(newer)
    skips = [cell.edges[f"node2_from{source}"]["skip_connect"](state) for source, state in enumerate(inputs)]
    channels = skips[0].shape[1]
    assert torch.allclose(drawn[:, :channels] - plain[:, :channels], 0.75 * (skips[0] + skips[1]), atol=1e-5)
    assert (kind == "normal") == torch.equal(skips[0], inputs[0])


def test_fades_in_the_training_passes():
    ExpertsSupernet.made.clear()
    explorer = DartsMinus(epochs=2, batch_size=16, skip="zeros", alpha_lr=1e-9)
    explore(explorer, Experts(), Task.digits(limit=64), RecordingContext())
    (supernet,) = ExpertsSupernet.made
    seen = [float(weights["edge0"].sum()) for weights in supernet.seen]
    half = len(seen) // 2
    assert seen == pytest.approx([2.0] * half + [1.5] * half)


def test_has_none_where_a_stage_dropped_the_skip():
    keep = {"edge0": ("off", "noise"), "edge2": ("zeros",)}
    at = moment(Experts(), keep=keep)
    parameters = alphas(edge0=[0.0, 0.0], edge1=[0.0, 0.0, 0.0], edge2=[0.0])
    minus = DartsMinus(skip="zeros")
    assert minus.initial(at, np.random.default_rng(0)).keys() == parameters.keys()
    drawn = minus.draw(parameters, at)
    assert drawn["edge0"].tolist() == [0.5, 0.5]
    assert drawn["edge2"].tolist() == [2.0]
    explorer = DartsMinus(epochs=1, batch_size=16, skip="image", stages=(Stage(), Stage(options=2)))
    assert explore(explorer, Experts(), Task.digits(limit=64), RecordingContext())


def test_finds_the_option_that_carries_the_signal():
    explorer = DartsMinus(epochs=4, batch_size=32, alpha_lr=0.05, skip="zeros")
    for seed in range(3):
        (found,) = explore(explorer, Experts(), Task.digits(limit=400), RecordingContext(seed))
        assert found.genes["edge1"] == "image"


def test_the_skip_must_be_an_option():
    with pytest.raises(InvalidInputError, match=r"skip is 'skip_connect'.* of Bats.*'zero', .*'identity'"):
        explore(DartsMinus(epochs=1), Bats.small(), Task.digits(limit=32), RecordingContext())
    minus = DartsMinus(skip="identity")
    assert len(minus.initial(moment(Bats.small()), np.random.default_rng(0))) == 28


@pytest.mark.parametrize("arguments", [{"beta": -1.0}, {"beta": float("nan")}, {"decay": "step"}])
def test_refuses(arguments):
    with pytest.raises(InvalidInputError, match=next(iter(arguments))):
        DartsMinus(**arguments)
