import pytest
import torch
from torch import Tensor, nn

from nasplat.nn.prelu import PReLU, prelu_sums

FORMATS = (torch.contiguous_format, torch.channels_last)


def _draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("slopes", [1, 3])
def test_prelu_is_pytorchs(slopes: int, layout: torch.memory_format) -> None:
    ours, theirs = PReLU(slopes).double(), nn.PReLU(slopes).double()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.tensor([0.25, -0.5, 1.5])[:slopes])
    data = _draw(2, 3, 4, 5).contiguous(memory_format=layout)
    data[0, :, 0] = 0.0
    x, y = data.clone().requires_grad_(), data.clone().requires_grad_()
    out, expected = ours(x), theirs(y)
    assert torch.equal(out, expected)
    gradient = _draw(2, 3, 4, 5).flip(0)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_prelu_of_other_shapes_and_without_gradient() -> None:
    module = PReLU(3)
    x = torch.randn(4, 3, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(module(x), torch.where(x > 0, x, 0.25 * x))


def test_prelu_gradient_by_finite_differences() -> None:
    x = _draw(2, 3, 2, 2).requires_grad_()
    module = PReLU(3).double()
    assert torch.autograd.gradcheck(module, (x,))


def _plainly(inputs: list[Tensor], slopes: Tensor, weights: Tensor) -> list[Tensor]:
    parts = weights.shape[1]
    return [
        sum(
            weights[k, t] * nn.functional.prelu(x[:, t::parts], slopes[k, :, t].contiguous())
            for k, x in enumerate(inputs)
        )
        for t in range(parts)
    ]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("parts", [1, 3])
def test_prelu_sums(parts: int, layout: torch.memory_format) -> None:
    given = [
        _draw(2, 2, parts),
        _draw(2, parts),
        *(_draw(2, 2 * parts, 3, 3 + k)[..., :3].contiguous(memory_format=layout) for k in range(2)),
    ]
    results = []
    for compute in (prelu_sums, _plainly):
        slopes, weights, *inputs = (tensor.clone().requires_grad_() for tensor in given)
        sums = compute(inputs, slopes, weights)
        assert all(y.is_contiguous(memory_format=layout) for y in sums)
        sum((y * (t + 1)).square().sum() for t, y in enumerate(sums)).backward()
        results.append([*sums, slopes.grad, weights.grad, *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_prelu_sums_gradient_by_finite_differences() -> None:
    inputs = [_draw(2, 4, 2, 1).requires_grad_(), _draw(2, 4, 1, 2).reshape(2, 4, 2, 1).requires_grad_()]
    slopes, weights = _draw(2, 2, 2).requires_grad_(), _draw(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, w, *x: prelu_sums(x, s, w), (slopes, weights, *inputs))
    # A sum that the loss does not see, and weights that learn nothing.
    assert torch.autograd.gradcheck(lambda s, *x: prelu_sums(x, s, weights.detach())[1], (slopes, *inputs))


def test_prelu_sums_saves_its_inputs_only() -> None:
    inputs = [torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(3)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        prelu_sums(inputs, torch.full((3, 2, 2), 0.25, requires_grad=True), torch.ones(3, 2))
    assert [tuple(x.shape) for x in saved] == [(3, 2, 2), (3, 2), *[(2, 4, 3, 3)] * 3]


def test_autocast_trains() -> None:
    layer = PReLU(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(nn.functional.conv2d(x, torch.ones(3, 3, 1, 1)))
    y.float().sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
