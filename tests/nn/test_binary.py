import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from nasplat.cost.count import count
from nasplat.nn import BinaryBlock, BinaryConv2d, BinaryFactorisedReduce, set_binarisation, sign

VALUES = [-2.0, -1.0, -0.5, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, 2.0]
SIGNS = [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_sign_has_two_values_and_zero_is_positive() -> None:
    assert sign(torch.tensor(VALUES)).tolist() == SIGNS
    with torch.no_grad():
        assert sign(torch.tensor(VALUES, requires_grad=True)).tolist() == SIGNS
    assert sign(torch.tensor(VALUES, requires_grad=True)).tolist() == SIGNS


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=20))
def test_sign_is_one_where_not_negative(values: list[float]) -> None:
    x = torch.tensor(values)
    for y in (sign(x), sign(x.requires_grad_())):
        assert torch.equal(y.detach() == 1, x >= 0)
        assert torch.equal(y.detach().abs(), torch.ones(len(values)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sign_keeps_dtype_and_input(dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, 0.0, 2.0], dtype=dtype)
    y = sign(x)
    assert y.dtype == dtype
    assert y.tolist() == [-1, 1, 1]
    assert x.tolist() == [-3, 0, 2]


def test_sign_gradient_is_zero_from_one_on() -> None:
    x = torch.tensor(VALUES, requires_grad=True)
    sign(x).backward(torch.arange(1.0, 11.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 8, 0, 0]


def test_sign_exports_as_plain_operators() -> None:
    class Sign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sign(x)

    program = torch.export.export(Sign(), (torch.tensor(VALUES, requires_grad=True),))
    assert program.module()(torch.tensor(VALUES)).tolist() == SIGNS
    assert any("where" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_binary_conv_is_scale_times_conv_of_signs(groups: int, dilation: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(4, 6, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups)
    nn.init.uniform_(layer.scale, 0.5, 2)
    x = torch.randn(2, 4, 7, 7)
    # Padded by hand, after the sign, to say where the zeros are.
    padded = F.pad(torch.where(x >= 0, 1.0, -1.0), (dilation,) * 4)
    weight = torch.where(layer.weight >= 0, 1.0, -1.0)
    sums = F.conv2d(padded, weight, stride=stride, dilation=dilation, groups=groups)
    assert torch.equal(sums, sums.round())
    assert torch.equal(layer(x), sums * layer.scale[None, :, None, None])


def test_binary_conv_switches() -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(2, 2, 3, padding=1)
    x = torch.randn(1, 2, 5, 5)
    assert layer.is_binary
    layer.binary_weights = False
    assert not layer.is_binary
    torch.testing.assert_close(layer(x), F.conv2d(sign(x), layer.weight, padding=1))
    layer.binary_activations = False
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))
    assert "binary_weights=False" in repr(layer)


def test_binary_conv_with_tanh_in_place_of_the_sign() -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(2, 2, 3, padding=1)
    x = torch.randn(1, 2, 5, 5)
    binary = layer(x)
    set_binarisation(layer, activations="tanh")
    torch.testing.assert_close(layer(x), F.conv2d(torch.tanh(x), sign(layer.weight), padding=1))
    assert not layer.is_binary and layer.binary_weights
    assert "binary_activations=False, binary_weights=True, tanh_activations=True" in repr(layer)
    set_binarisation(layer, weights=False)
    torch.testing.assert_close(layer(x), F.conv2d(torch.tanh(x), layer.weight, padding=1))
    # 4 * 9 products at each of 25 places, a scale for each of 50 outputs, a tanh of each of 50 inputs.
    counts = count(layer, x)
    assert (counts.bops, counts.conv_macs_real, counts.flops) == (0, 36 * 25, 36 * 25 + 50 + 50)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))
    set_binarisation(layer, activations=False)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1))
    assert not layer.tanh_activations and "tanh" not in repr(layer)
    set_binarisation(layer, activations="tanh")
    set_binarisation(layer, activations=True, weights=True)
    assert layer.is_binary and not layer.tanh_activations and torch.equal(layer(x), binary)


def test_binary_conv_trains_weights_and_scale() -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(2, 3, 3)
    assert layer.bias is None
    assert layer.scale.tolist() == [1, 1, 1]
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, layer.weight, layer.scale):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_set_binarisation_reaches_every_layer_and_leaves_none_alone() -> None:
    model = nn.Sequential(BinaryBlock(4, 4, 3), nn.Conv2d(4, 4, 1), BinaryFactorisedReduce(4, 6))
    layers = [layer for layer in model.modules() if isinstance(layer, BinaryConv2d)]
    assert len(layers) == 3
    set_binarisation(model, weights=False)
    assert all(layer.binary_activations and not layer.binary_weights for layer in layers)
    set_binarisation(model, activations=False)
    assert not any(layer.binary_activations or layer.binary_weights for layer in layers)
    set_binarisation(model, weights=True, activations=True)
    assert all(layer.is_binary for layer in layers)


def test_block_is_norm_conv_activation_then_shortcut() -> None:
    torch.manual_seed(0)
    block = BinaryBlock(4, 4, 3, dilation=2, groups=2)
    block(torch.randn(8, 4, 6, 6))
    block.eval()
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(x), block.activation(block.conv(block.norm(x))) + x)
    assert block.activation.num_parameters == 4


@pytest.mark.parametrize(("out_channels", "stride"), [(4, 2), (6, 1)])
def test_block_that_changes_shape_has_no_shortcut(out_channels: int, stride: int) -> None:
    block = BinaryBlock(4, out_channels, 3, stride=stride).eval()
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(x), block.activation(block.conv(block.norm(x))))


def test_block_shuffle_permutes_channels_before_the_shortcut() -> None:
    torch.manual_seed(0)
    plain = BinaryBlock(4, 4, 3).eval()
    shuffled = BinaryBlock(4, 4, 3, shuffle=2).eval()
    shuffled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(shuffled(x) - x, (plain(x) - x)[:, [0, 2, 1, 3]])


@pytest.mark.parametrize("side", [6, 7])
def test_factorised_reduce_sees_even_and_odd_pixels(side: int) -> None:
    torch.manual_seed(0)
    layer = BinaryFactorisedReduce(4, 6).eval()
    nn.init.constant_(layer.activation.weight, 1.0)
    x = torch.randn(2, 4, side, side)
    y = layer(x)
    half = (side + 1) // 2
    assert y.shape == (2, 6, half, half)
    odd_x = F.pad(sign(layer.norm(x)), (0, 1, 0, 1))[:, :, 1::2, 1::2][:, :, :half, :half]
    torch.testing.assert_close(y[:, :3], F.conv2d(sign(layer.norm(x))[:, :, ::2, ::2], sign(layer.conv_even.weight)))
    torch.testing.assert_close(y[:, 3:], F.conv2d(odd_x, sign(layer.conv_odd.weight)))


def test_layers_keep_channels_last() -> None:
    model = nn.Sequential(BinaryBlock(8, 8, 3, groups=2), BinaryFactorisedReduce(8, 8))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    same = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(model.eval()(x), same.eval()(x.contiguous()))
