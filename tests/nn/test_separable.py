import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.nn import separable_mix
from nasplat.nn.cell import Use, mix
from nasplat.nn.mobile import SandglassBlock
from nasplat.nn.separable import (
    DilatedConv,
    FactorisedReduce,
    NormedPool,
    ReluConvNorm,
    SeparableConv,
    SeparableStage,
)
from nasplat.nn.separable_mix import from_phases, mix_separable, to_phases

Uses = dict[int, list[Use]]


def operations(channels: int, stride: int) -> dict[str, nn.Module]:
    return {
        "max": NormedPool(nn.MaxPool2d(3, stride, padding=1), channels),
        "avg": NormedPool(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False), channels),
        "skip": nn.Identity() if stride == 1 else FactorisedReduce(channels, channels, affine=False),
        "sep3": SeparableConv(channels, 3, stride=stride, affine=False),
        "sep5": SeparableConv(channels, 5, stride=stride, affine=False),
        "dil3": DilatedConv(channels, 3, stride=stride, affine=False),
        "dil5": DilatedConv(channels, 5, stride=stride, affine=False),
        "sand3": SandglassBlock(channels, channels, kernel_size=3, reduction=2, stride=stride, affine=False),
        "sand5": SandglassBlock(channels, channels, kernel_size=5, reduction=2, stride=stride, affine=False),
    }


def edges(channels: int, stride: int, nodes: Sequence[int]) -> Uses:
    """All operations on edges to these nodes, with random weights, in float64."""
    made: Uses = {}
    for node in nodes:
        held = nn.ModuleDict(operations(channels, stride)).double()
        for module in held.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        made[node] = [Use(name, held[name], torch.rand((), dtype=torch.double) + 0.1) for name in held]
    return made


def run(way: object, x: Tensor, uses: Mapping[int, Sequence[Use]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Nodes, gradients and buffers."""
    x = x.clone().requires_grad_()
    weights = [use.weight.requires_grad_() for listed in uses.values() for use in listed]
    modules = nn.ModuleList(use.operation for listed in uses.values() for use in listed)
    nodes = way(x, uses)  # type: ignore[operator]
    loss = sum(((1 + node) * y.pow(2) + y.pow(3)).sum() for node, y in nodes.items())
    gradients = torch.autograd.grad(loss, [x, *weights, *modules.parameters()])  # type: ignore[arg-type]
    return [nodes[node] for node in uses], list(gradients), list(modules.buffers())


def assert_same(x: Tensor, uses: Mapping[int, Sequence[Use]]) -> None:
    twin = {
        node: [Use(use.name, copy.deepcopy(use.operation), use.weight.detach().clone()) for use in listed]
        for node, listed in uses.items()
    }
    for ours, plain in zip(run(mix_separable, x, uses), run(mix, x, twin), strict=True):
        assert len(ours) == len(plain)
        for one, two in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
# The second batch is too small for the way of small images; the fourth image too large. Two rows at least are needed
# for a factorised reduce, at stride 2.
@pytest.mark.parametrize(
    ("n", "height", "width", "stride"),
    [
        *(
            (n, height, width, stride)
            for n, height, width in [(13, 5, 4), (2, 5, 4), (2, 7, 6), (2, 10, 8)]
            for stride in (1, 2)
        ),
        (40, 1, 2, 1),
    ],
)
def test_mix_equals_the_plain_one(n: int, height: int, width: int, stride: int, training: bool) -> None:
    torch.manual_seed(0)
    uses = edges(4, stride, (2, 4, 5))
    for listed in uses.values():
        for use in listed:
            use.operation.train(training)
    assert_same(torch.randn(n, 4, height, width, dtype=torch.double), uses)


@pytest.mark.parametrize("n", [2, 13])
def test_mix_of_a_part_of_the_operations(n: int) -> None:
    torch.manual_seed(0)
    uses = edges(4, 1, (2, 3, 4, 5))
    part = {2: [uses[2][3]], 3: uses[3][1:7:2], 4: [uses[4][2]], 5: [uses[5][0], uses[5][8]]}
    before = copy.deepcopy(nn.ModuleList(use.operation for use in uses[2]).state_dict())
    assert_same(torch.randn(n, 4, 5, 5, dtype=torch.double), part)
    # What is not used keeps its statistics.
    for name, tensor in nn.ModuleList(use.operation for use in uses[2]).state_dict().items():
        assert torch.equal(tensor, before[name]) or name.startswith("3.")


def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for way in (separable_mix._SmallImages, separable_mix._LargeImages):
        monkeypatch.setattr(way, "mix", lambda self, uses: taken.append(type(self).__name__) or {})
    for n, side in ((32, 8), (31, 8), (64, 9), (8, 4), (7, 4)):
        mix_separable(torch.zeros(n, 1, side, side), {})
    assert taken == ["_SmallImages", "_LargeImages", "_LargeImages", "_SmallImages", "_LargeImages"]


@pytest.mark.parametrize("n", [1, 8])
def test_derivatives_by_finite_differences(n: int) -> None:
    torch.manual_seed(0)
    uses = edges(2, 1, (2, 3))
    convolutions = {
        node: [use for use in listed if use.name in ("sep3", "dil3", "avg")] for node, listed in uses.items()
    }
    weights = torch.rand(6, dtype=torch.double).requires_grad_()

    def function(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        values = iter(weights.unbind())
        fresh = {node: [use._replace(weight=next(values)) for use in listed] for node, listed in convolutions.items()}
        return tuple(mix_separable(x, fresh).values())

    x = torch.randn(n, 2, 4, 4, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weights), fast_mode=True)


def test_training_after_inference_mode() -> None:
    separable_mix._taps.cache_clear()
    uses = {2: [Use("dil", DilatedConv(2, 3, affine=False), torch.ones(()))]}
    with torch.inference_mode():
        mix_separable(torch.randn(16, 2, 4, 4), uses)
    mix_separable(torch.randn(16, 2, 4, 4), uses)[2].sum().backward()


@pytest.mark.parametrize(("height", "width"), [(6, 4), (5, 4), (6, 7), (1, 3)])
def test_phases(height: int, width: int) -> None:
    x = torch.randn(3, height, width, 2)
    phases = to_phases(x)
    assert phases.shape == (12, -(-height // 2), -(-width // 2), 2)
    assert torch.equal(phases[3:6, :, : width // 2], x[:, ::2, 1::2])
    assert torch.equal(from_phases(phases)[:, :height, :width], x)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 8), (7, 5)])
def test_factorised_reduce_sees_even_and_odd_pixels(height: int, width: int) -> None:
    torch.manual_seed(0)
    reduce = FactorisedReduce(2, 5).eval()
    assert (reduce.conv_even.out_channels, reduce.conv_odd.out_channels) == (2, 3)
    x = torch.randn(3, 2, height, width)
    rows, columns = -(-height // 2), -(-width // 2)
    y = reduce(x)
    assert y.shape == (3, 5, rows, columns)
    rectified = x.clamp(min=0)
    even = torch.einsum("oc,nchw->nohw", reduce.conv_even.weight.flatten(1), rectified[:, :, ::2, ::2])
    odd = torch.zeros(3, 3, rows, columns)
    pixels = rectified[:, :, 1::2, 1::2]
    odd[:, :, : pixels.shape[2], : pixels.shape[3]] = torch.einsum(
        "oc,nchw->nohw", reduce.conv_odd.weight.flatten(1), pixels
    )
    torch.testing.assert_close(y, torch.cat([even, odd], 1) / (1 + reduce.norm.eps) ** 0.5)


def test_stage_is_relu_depthwise_pointwise_norm() -> None:
    torch.manual_seed(0)
    stage = SeparableStage(3, 3, dilation=2).eval()
    x = torch.randn(2, 3, 6, 6)
    padded = functional.pad(x.clamp(min=0), (2, 2, 2, 2))
    windows = sum(
        stage.depthwise.weight[:, 0, i, j].view(-1, 1, 1) * padded[:, :, 2 * i : 2 * i + 6, 2 * j : 2 * j + 6]
        for i in range(3)
        for j in range(3)
    )
    expected = torch.einsum("oc,nchw->nohw", stage.pointwise.weight.flatten(1), windows)
    torch.testing.assert_close(stage(x), expected / (1 + stage.norm.eps) ** 0.5)


@pytest.mark.parametrize("affine", [True, False])
def test_affine_reaches_every_norm(affine: bool) -> None:
    for module in (
        ReluConvNorm(2, 4, affine=affine),
        FactorisedReduce(2, 4, affine=affine),
        SeparableConv(2, 3, affine=affine),
        DilatedConv(2, 3, affine=affine),
    ):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(norm.affine == affine for norm in norms)
        assert sum(norm.num_features for norm in norms) <= sum(p.numel() for p in module.parameters())
