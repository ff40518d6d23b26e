import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian

from nasplat.errors import InvalidInputError, NonFiniteError
from nasplat.weight_sharing.eigenvalue import STEP, EigenvalueStop, dominant_eigenvalue


class Steps:
    """Counts the gradients that are computed."""

    def __init__(self):
        self.count = 0

    @contextmanager
    def __call__(self):
        self.count += 1
        yield


def mixed_loss(seed, sizes, dtype=torch.float64):
    """The loss of a small network of mixtures in its architecture parameters, and these: as a function of a list."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, head = draw(40, 6), draw(6, 3)
    y = torch.randint(3, (40,), generator=generator)
    kernels = [draw(size, 6, 6) for size in sizes]
    values = [0.5 * draw(size) for size in sizes]

    def loss(*alphas):
        hidden = x
        for alpha, kernel in zip(alphas, kernels, strict=True):
            hidden = torch.tanh(hidden @ torch.einsum("o,oij->ij", torch.softmax(alpha, 0), kernel))
        return torch.nn.functional.cross_entropy(hidden @ head, y)

    return loss, values


def exact(loss, values):
    blocks = hessian(loss, tuple(values))
    return torch.cat([torch.cat(list(row), dim=1) for row in blocks]).numpy()


def quadratic(matrix):
    """A loss with this Hessian everywhere, and its parameter."""
    parameter = torch.linspace(-1, 1, len(matrix), dtype=torch.float64).requires_grad_()
    return (lambda: parameter @ torch.as_tensor(matrix) @ parameter / 2), [parameter]


def spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return basis @ np.diag(values) @ basis.T


@pytest.mark.parametrize("sizes", [(4, 3), (8, 8, 8, 8), (5, 1, 30)], ids=["whole", "Lanczos", "uneven"])
@pytest.mark.parametrize("seed", range(4))
def test_is_that_of_the_exact_hessian(seed, sizes):
    loss, values = mixed_loss(seed, sizes)
    expected = np.linalg.eigvalsh(exact(loss, values))
    parameters = [value.clone().requires_grad_() for value in values]
    found = dominant_eigenvalue(lambda: loss(*parameters), parameters, Steps())
    # Central differences of a step of 1e-2: a relative error of some 1e-4; Lanczos' is quadratic in its tolerance.
    assert found == pytest.approx(expected[-1], abs=1e-3 * max(abs(expected)))


def test_single_precision_is_enough():
    loss, values = mixed_loss(0, (8, 8, 8, 8))
    expected = np.linalg.eigvalsh(exact(loss, values))[-1]
    loss, values = mixed_loss(0, (8, 8, 8, 8), torch.float32)
    parameters = [value.requires_grad_() for value in values]
    found = dominant_eigenvalue(lambda: loss(*parameters), parameters, Steps())
    assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("size", [1, 2, 20, 21, 60])
@pytest.mark.parametrize(
    "values",
    [
        lambda n: np.linspace(1.0, 3.0, n),
        lambda n: np.linspace(-3.0, -1.0, n),
        lambda n: np.r_[-5.0 * np.ones(n - 1), 2.0],
        lambda n: np.r_[-5.0, 1e-3 * np.ones(n - 1)],
    ],
    ids=["positive", "negative", "negative end larger", "nearly flat"],
)
def test_of_a_quadratic_loss(size, values):
    wanted = values(size)
    loss, parameters = quadratic(spectrum(wanted))
    found = dominant_eigenvalue(loss, parameters, Steps())
    assert found == pytest.approx(max(wanted), abs=1e-2 * max(abs(wanted)))


def test_costs_few_gradients():
    """Two a product: a multiple of the vectors kept, and not of the parameters."""
    steps = Steps()
    loss, parameters = quadratic(spectrum(np.r_[np.zeros(200), 1.0, 2.0]))
    assert dominant_eigenvalue(loss, parameters, steps) == pytest.approx(2.0, rel=1e-3)
    assert steps.count <= 60


@pytest.mark.parametrize("size", [1, 2, 30])
def test_of_a_flat_loss_is_zero(size):
    parameter = torch.zeros(size, requires_grad=True)
    assert dominant_eigenvalue(lambda: 3.0 * parameter.sum(), [parameter], Steps()) == 0.0


def test_parameters_that_the_loss_does_not_depend_on():
    matrix = spectrum([-3.0, -2.0, -1.0])
    loss, parameters = quadratic(matrix)
    idle = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    # In their directions the Hessian is 0, which is more than -1.
    assert dominant_eigenvalue(loss, [*parameters, idle], Steps()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("sizes", [(2,), (4, 3), (8, 8, 8, 8)])
def test_leaves_the_parameters_as_they_were(sizes):
    loss, values = mixed_loss(1, sizes)
    parameters = [value.clone().requires_grad_() for value in values]
    before = torch.get_rng_state()
    dominant_eigenvalue(lambda: loss(*parameters), parameters, Steps())
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, values, strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)
    assert torch.equal(torch.get_rng_state(), before)


def test_leaves_the_parameters_as_they_were_where_it_fails():
    parameter = torch.linspace(0, 1, 30).requires_grad_()
    before = parameter.detach().clone()

    def loss():
        if parameter[0] != 0:
            raise KeyboardInterrupt
        return parameter.square().sum()

    with pytest.raises(KeyboardInterrupt):
        dominant_eigenvalue(loss, [parameter], Steps())
    assert torch.equal(parameter, before)


def test_every_gradient_sees_the_same_random_numbers():
    """A noisy gradient that differed between the two sides would be divided by the small step."""
    matrix = torch.as_tensor(spectrum(np.linspace(0.0, 1.0, 40)))
    parameter = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    drawn = []

    def loss():
        noise = torch.randn(40, dtype=torch.float64)
        drawn.append(noise)
        return parameter @ matrix @ parameter / 2 + noise @ parameter

    assert dominant_eigenvalue(loss, [parameter], Steps()) == pytest.approx(1.0, rel=1e-2)
    assert all(torch.equal(noise, drawn[0]) for noise in drawn)


@pytest.mark.parametrize("size", [1, 30])
def test_a_gradient_that_is_not_finite_is_named(size):
    parameter = torch.zeros(size, requires_grad=True)
    with pytest.raises(NonFiniteError, match="gradient of the architecture parameters"):
        dominant_eigenvalue(lambda: (parameter * math.inf).sum(), [parameter], Steps())


def test_noise_alone_ends():
    """Rounding errors are no symmetric matrix: no iteration converges."""
    parameter = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    generator = np.random.default_rng(0)

    def loss():
        return torch.from_numpy(1e-9 * generator.standard_normal(40)) @ parameter

    assert abs(dominant_eigenvalue(loss, [parameter], Steps())) < 1e-9 / STEP * 40


# The rule.


def ends(rule, eigenvalues, epochs=None):
    """After how many records the rule ends the search, and the record that it goes back to."""
    epochs = epochs or [rule.every * (index + 1) for index in range(len(eigenvalues))]
    for count in range(1, len(eigenvalues) + 1):
        back = rule.go_back(eigenvalues[:count], epochs[:count])
        if back is not None:
            return count, back
    return None


def test_is_due_every_second_epoch():
    rule = EigenvalueStop()
    assert [epoch for epoch in range(1, 9) if rule.due(epoch)] == [2, 4, 6, 8]


def test_stops_where_the_means_rise():
    rule = EigenvalueStop(every=1, window=3, lag=2, factor=1.3, not_before=1)
    assert ends(rule, [1.0, 1.0, 1.0, 1.0, 1.0, 2.0]) == (6, 2)  # (1 + 1 + 2) / 3 > 1.3 * 1, around records 4 and 2
    assert ends(rule, [1.0, 1.0, 1.0, 1.0, 1.0, 1.89]) is None
    assert ends(rule, [1.0] * 20) is None
    assert ends(rule, [float(n) for n in range(20, 0, -1)]) is None


def test_windows_are_short_at_the_beginning():
    rule = EigenvalueStop(every=1, window=5, lag=4, factor=1.3, not_before=1)
    # The first comparison has seven records: the last five with the first three.
    series = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.6]
    assert ends(rule, series) == (7, 0)  # 6.6 / 5 = 1.32
    assert ends(rule, [*series[:-1], 2.4]) is None  # 1.28
    # With the eighth the earlier window has four.
    assert ends(rule, [1.0] * 7 + [2.6]) == (8, 1)
    assert ends(rule, [3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 3.9]) is None


def test_goes_back_no_further_than_allowed():
    # By the defaults records are of epochs 2, 4, ...; the first that may be gone back to is that of epoch 10.
    rule = EigenvalueStop()
    series = [0.1 * 1.2**n for n in range(25)]
    count, back = ends(rule, series)
    assert (2 * count, 2 * (back + 1)) == (22, 10)
    count, back = ends(EigenvalueStop(not_before=2), series)
    assert (2 * count, 2 * (back + 1)) == (14, 2)
    # Records that begin late, after a warm-up.
    count, back = ends(rule, series, [20 + 2 * n for n in range(25)])
    assert (count, back) == (7, 0)


@pytest.mark.parametrize("before", [0.0, -1.0])
def test_no_ratio_to_what_is_not_positive(before):
    rule = EigenvalueStop(every=1, window=1, lag=1, not_before=1)
    assert ends(rule, [before, -0.5, before, 0.5, before, 5.0]) is None
    assert ends(rule, [0.5, 1.0]) == (2, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": 2.0},
        {"window": 0},
        {"window": 4},
        {"lag": 0},
        {"lag": True},
        {"factor": 1.0},
        {"factor": math.nan},
        {"factor": "1.3"},
        {"not_before": 0},
        {"batch_size": 1},
    ],
)
def test_refuses(arguments):
    (name,) = arguments
    with pytest.raises(InvalidInputError, match=f"{name} is .*legal|{name} is .*None"):
        EigenvalueStop(**arguments)
