import math

import numpy as np
import pytest
import torch
from experts import Experts, ExpertsSupernet, alphas, moment
from scipy.special import gammaln, psi

from nasplat.errors import InvalidInputError
from nasplat.task import Task
from nasplat.testing.landscapes import Levels
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from nasplat.weight_sharing.bilevel import Stage
from search_spaces import DartsCell
from strategies.dr_nas import DrNas


class TestContract(ExplorerContract):
    epochs = 4

    @pytest.fixture
    def explorer(self):
        return DrNas(epochs=2, warmup=0, batch_size=16, alpha_lr=0.05, stages=(Stage(), Stage(options=2, partial=2)))

    @pytest.fixture
    def space(self):
        return Experts()


class TestOneStage(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return DrNas(epochs=3, warmup=1, batch_size=16, alpha_lr=0.05, stages=(), kl=1e-3, alpha_weight_decay=0.0)


def test_values_of_the_authors_code():
    dr = DrNas()
    assert (dr.epochs, dr.warmup, dr.batch_size, dr.lr, dr.lr_min) == (25, 10, 64, 0.1, 0.0)
    assert (dr.alpha_lr, dr.alpha_weight_decay, dr.alpha_betas) == (6e-4, 1e-3, (0.5, 0.999))
    assert dr.stages == (Stage(partial=6), Stage(options=4, partial=4))
    assert {6, 4} <= set(DartsCell.cifar().partials())


def test_both_default_stages_have_a_supernet_on_the_papers_channels():
    space = DartsCell(cells=3, channels=36)
    keep = {name: space.operations[2:6] for name in space.choices}
    for stage, alive in zip(DrNas().stages, (None, keep), strict=True):
        at = moment(space, keep=alive)
        drawn = DrNas().draw({name: torch.zeros(len(options)) for name, options in at.alive.items()}, at)
        relaxed = {name: torch.zeros(8) for name in space.choices}
        for name, weights in drawn.items():
            relaxed[name][[space.operations.index(option) for option in at.alive[name]]] = weights
        supernet = space.supernet(keep=alive, partial=stage.partial)
        assert supernet(torch.randn(2, 3, 8, 8), relaxed).shape == (2, 10)


def test_small_searches_eight_channels():
    space = DartsCell.small(cells=1)
    found = explore(
        DrNas.small(epochs=1, warmup=0, batch_size=8), space, Task.fashion_mnist(size=8, limit=24), RecordingContext()
    )
    assert all(space.owns(architecture) for architecture in found) and found


def test_judges_by_the_mean_of_the_distribution():
    mixture = DrNas().mixture(alphas(x0=[0.0, 1.0, -1.0]), moment(Levels(length=1, levels=3)))
    concentrations = np.array([1.0, 2.0, math.exp(-1)])  # elu(a) + 1
    assert mixture["x0"].tolist() == pytest.approx((concentrations / concentrations.sum()).tolist())


def test_draws_from_the_dirichlet_and_its_mean_has_the_pathwise_gradient():
    space, count = Levels(length=1, levels=3), 20_000
    values, worth = [0.3, 1.5, -0.5], torch.tensor([1.0, -2.0, 0.5])
    at, explorer = moment(space), DrNas()
    rows = torch.tensor(values).repeat(count, 1).requires_grad_()
    torch.manual_seed(0)
    drawn = explorer.draw({"x0": rows}, at)["x0"]
    assert torch.all(drawn > 0) and drawn.sum(dim=1).detach().numpy() == pytest.approx(np.ones(count))
    (gradients,) = torch.autograd.grad((drawn @ worth).sum(), rows)

    exact = alphas(x0=values)
    mean = explorer.mixture(exact, at)["x0"]
    (gradient,) = torch.autograd.grad(mean @ worth, exact["x0"])
    # Variance of a Dirichlet: m * (1 - m) / (sum of the concentrations + 1).
    total = sum(np.where(np.array(values) > 0, np.array(values) + 1, np.exp(values)))
    share = mean.detach().numpy()
    assert drawn.detach().mean(dim=0).numpy() == pytest.approx(share, abs=0.01)
    assert drawn.detach().var(dim=0).numpy() == pytest.approx(share * (1 - share) / (total + 1), rel=0.05)
    errors = gradients.std(dim=0) / count**0.5
    assert torch.all((gradients.mean(dim=0) - gradient).abs() < 4 * errors)
    assert torch.all(gradient.abs() > 10 * errors)


def test_divergence_from_the_uniform_distribution():
    space, explorer = Levels(length=2, levels=3), DrNas(kl=0.5, alpha_weight_decay=0.0)
    at = moment(space)
    parameters = alphas(x0=[0.0, 0.0, 0.0], x1=[1.0, -1.0, 0.0])
    penalty = explorer.penalty(parameters, at)
    a = np.array([2.0, math.exp(-1), 1.0])
    by_hand = gammaln(a.sum()) - gammaln(a).sum() - gammaln(3) + ((a - 1) * (psi(a) - psi(a.sum()))).sum()
    assert penalty.item() == pytest.approx(0.5 * by_hand, rel=1e-5)
    even, uneven = torch.autograd.grad(penalty, list(parameters.values()))
    assert even.abs().max() < 1e-6
    assert uneven[0] > 0 > uneven[1]  # a descent goes back to 0 on both sides
    assert DrNas().penalty(parameters, at) is None


def test_very_negative_alphas_give_finite_weights_and_gradients():
    parameters = alphas(x0=[-200.0, -200.0, 0.0, 300.0])
    at = moment(Levels(length=1, levels=4))
    torch.manual_seed(0)
    for _ in range(200):
        drawn = DrNas().draw(parameters, at)["x0"]
        (gradient,) = torch.autograd.grad(drawn[3] + 2 * drawn[0], parameters["x0"])
        assert drawn.isfinite().all() and gradient.isfinite().all()


def test_draws_anew_for_every_step_of_either_kind():
    ExpertsSupernet.made.clear()
    explore(DrNas(epochs=1, warmup=0, batch_size=16, stages=()), Experts(), Task.digits(limit=64), RecordingContext())
    (supernet,) = ExpertsSupernet.made
    assert len(supernet.seen) == len({str(seen) for seen in supernet.seen}) >= 4


def test_finds_the_option_that_carries_the_signal_in_stages():
    stages = (Stage(), Stage(options=2, partial=4))
    explorer = DrNas(epochs=5, warmup=1, batch_size=16, alpha_lr=0.1, stages=stages)
    for seed in range(2):
        ExpertsSupernet.made.clear()
        (found,) = explore(explorer, Experts(), Task.digits(limit=400), RecordingContext(seed))
        assert found.genes["edge1"] == "image"
        first, second = (supernet for supernet in ExpertsSupernet.made if supernet.seen)
        assert (first.partial, second.partial) == (1, 4)
        assert {len(options) for options in second.alive.values()} == {2}
        assert "image" in second.alive["edge1"]


def test_refuses():
    with pytest.raises(InvalidInputError, match="kl"):
        DrNas(kl=-1.0)
    with pytest.raises(InvalidInputError, match="partial is 6; legal: 1, 2, 4, 8"):
        explore(DrNas(epochs=1, warmup=0), DartsCell.small(), Task.digits(limit=32), RecordingContext())
