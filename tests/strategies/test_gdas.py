import numpy as np
import pytest
import torch
from experts import Experts, alphas, moment
from scipy import integrate

from nasplat.errors import InvalidInputError
from nasplat.task import Task
from nasplat.testing.landscapes import Levels
from nasplat.testing.strategy_contract import ExplorerContract, RecordingContext, explore
from search_spaces import DartsCell
from strategies.gdas import Gdas


class TestContract(ExplorerContract):
    @pytest.fixture
    def explorer(self):
        return Gdas(epochs=3, batch_size=16, alpha_lr=0.05)


def test_values_of_the_authors_code():
    gdas = Gdas()
    assert (gdas.epochs, gdas.batch_size, gdas.lr, gdas.lr_min) == (250, 256, 0.025, 0.001)
    assert (gdas.weight_decay, gdas.clip, gdas.alpha_lr, gdas.alpha_weight_decay) == (5e-4, 5.0, 3e-4, 1e-3)


def test_tau_falls_linearly_from_ten_to_a_tenth():
    space = Experts()
    taus = [Gdas().tau(moment(space, epoch, 100)) for epoch in range(1, 101)]
    assert (taus[0], taus[-1]) == (10.0, pytest.approx(0.1))
    assert np.diff(taus) == pytest.approx([-0.1] * 99)
    assert Gdas().tau(moment(space, 1, 1)) == 10.0


@pytest.mark.parametrize("tau", [0.1, 10.0])
def test_draws_one_option_exactly_with_its_share_whatever_tau_is(tau):
    space = Levels(length=3000, levels=3)
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    torch.manual_seed(0)
    drawn = Gdas(tau_max=tau, tau_min=0.1).draw(dict.fromkeys(space.choices, logits), moment(space))
    rows = torch.stack(list(drawn.values()))
    assert set(rows.flatten().tolist()) == {0.0, 1.0}
    assert rows.sum(dim=1).tolist() == [1.0] * 3000
    # Four standard errors.
    assert rows.mean(dim=0).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.037)


def test_all_alphas_learn_from_the_drawn_option_alone():
    space, tau = Levels(length=1, levels=3), 0.7
    contributions = torch.tensor([3.0, -1.0, 5.0])
    drawn_ones = set()
    for seed in range(12):
        parameters = alphas(x0=[0.2, -0.4, 0.1])
        torch.manual_seed(seed)
        weights = Gdas(tau_max=tau).draw(parameters, moment(space))["x0"]
        i = int(weights.detach().argmax())
        (gradient,) = torch.autograd.grad((weights * contributions).sum(), parameters["x0"])
        torch.manual_seed(seed)
        noise = -torch.empty(3).exponential_().log()
        p = torch.softmax((torch.log_softmax(parameters["x0"].detach(), 0) + noise) / tau, 0)
        assert i == int(p.argmax())
        by_hand = [float(contributions[i] * p[i] * (float(i == k) - p[k]) / tau) for k in range(3)]
        assert gradient.tolist() == pytest.approx(by_hand, rel=1e-4, abs=1e-7)
        drawn_ones.add(i)
    assert drawn_ones == {0, 1, 2}


def test_mean_gradient_is_that_of_the_integral_over_the_noise():
    # Two options: the difference of two Gumbel variables is logistic.
    count, tau, gap = 4000, 1.5, 0.8
    one, other = 2.0, -1.0
    space = Levels(length=count, levels=2)
    parameters = {name: torch.tensor([gap, 0.0], requires_grad=True) for name in space.choices}
    torch.manual_seed(0)
    drawn = Gdas(tau_max=tau).draw(parameters, moment(space))
    loss = (torch.stack(list(drawn.values())) @ torch.tensor([one, other])).sum()
    found = np.array([float(gradient[0]) for gradient in torch.autograd.grad(loss, list(parameters.values()))])

    def integrand(noise):
        p = 1 / (1 + np.exp(-(gap + noise) / tau))
        density = np.exp(-abs(noise)) / (1 + np.exp(-abs(noise))) ** 2
        return (one if gap + noise > 0 else -other) * p * (1 - p) / tau * density

    true = integrate.quad(integrand, -60, 60, points=[-gap])[0]
    assert found.mean() == pytest.approx(true, abs=4 * found.std() / count**0.5)
    assert abs(true) > 10 * found.std() / count**0.5


def test_computes_the_drawn_operations_only(monkeypatch):
    space = DartsCell.small(cells=2, channels=4)
    called, seen = [], []
    original = DartsCell.supernet

    def spied(self, **wanted):
        supernet = original(self, **wanted)
        for name, module in supernet.named_modules():
            # cells.<index>.edges.<edge>.<operation>
            if ".edges." in name and name.count(".") == 4:
                module.register_forward_hook(lambda *_, name=name: called.append(name))
        supernet.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
        return supernet

    monkeypatch.setattr(DartsCell, "supernet", spied)
    # Without the faster way to mix, which computes several separable convolutions in one call.
    monkeypatch.setattr(DartsCell, "mix", lambda self, x, uses: super(DartsCell, self).mix(x, uses))
    explore(Gdas(epochs=1, batch_size=8), space, Task.fashion_mnist(size=8, limit=24), RecordingContext())
    assert len(seen) >= 4
    drawn = [weights for relaxed in seen for name, weights in relaxed.items()]
    assert all(sorted(weights.tolist()) == [0.0] * 7 + [1.0] for weights in drawn)
    assert len(called) == sum(int(weights.argmax()) != 0 for weights in drawn)  # 0 is none
    assert len({str([int(w.argmax()) for w in relaxed.values()]) for relaxed in seen}) == len(seen)


def test_finds_the_option_that_carries_the_signal():
    # At few steps of the weights. Once they fit the image at weight 1, the derivative by that weight is about 0.
    explorer = Gdas(epochs=6, batch_size=16, alpha_lr=0.1, lr=0.01)
    for seed in range(2):
        (found,) = explore(explorer, Experts(), Task.digits(limit=400), RecordingContext(seed))
        assert found.genes == {"edge0": "off", "edge1": "image", "edge2": "off"}


@pytest.mark.parametrize("arguments", [{"tau_min": 0.0}, {"tau_max": 0.05}, {"tau_max": float("inf")}])
def test_refuses(arguments):
    with pytest.raises(InvalidInputError, match="tau"):
        Gdas(**arguments)
