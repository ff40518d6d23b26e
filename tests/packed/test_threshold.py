"""BatchNorm and sign as one comparison: against PyTorch's own normalisation, at neighbours and over all decades."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.packed.threshold import threshold

LARGEST = np.finfo(np.float32).max


def norm(channels: int = 1, *, weight=1.0, bias=0.0, mean=0.0, var=1.0, eps=0.0, affine=True) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=eps, affine=affine).eval()
    with torch.no_grad():
        if affine:
            layer.weight.copy_(torch.as_tensor(weight))
            layer.bias.copy_(torch.as_tensor(bias))
        layer.running_mean.copy_(torch.as_tensor(mean))
        layer.running_var.copy_(torch.as_tensor(var))
    return layer


def random_norm(channels: int, seed: int, *, decades: float, affine: bool = True) -> nn.BatchNorm2d:
    """Of every sign and of sizes over ``2 * decades`` decades; every eleventh factor is zero."""
    generator = torch.Generator().manual_seed(seed)

    def sizes() -> torch.Tensor:
        return 10 ** torch.empty(channels).uniform_(-decades, decades, generator=generator)

    def numbers() -> torch.Tensor:
        return torch.randn(channels, generator=generator) * sizes()

    weight = numbers()
    weight[::11] = 0
    return norm(channels, weight=weight, bias=numbers(), mean=numbers(), var=sizes(), eps=1e-5, affine=affine)


def neighbours(centre: np.ndarray, reach: int) -> np.ndarray:
    """``(2 * reach + 1, channels)``: each number, and those that follow and precede it."""
    up, down = [centre], [centre]
    for _ in range(reach):
        up.append(np.nextafter(up[-1], np.float32(np.inf)))
        down.append(np.nextafter(down[-1], np.float32(-np.inf)))
    found = np.stack([*down[:0:-1], *up])
    return np.clip(found, -LARGEST, LARGEST)


def any_float(count: int, channels: int, seed: int) -> np.ndarray:
    """Of uniformly drawn bits: finite numbers of every decade, zeros and denormal ones among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (count, channels), dtype=np.uint32)
    bits[0], bits[1], bits[2], bits[3] = 0, 1 << 31, 1, (1 << 31) + 1
    x = bits.view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(0))


def positive(layer: nn.Module, x: np.ndarray, *, channels_last: bool = False) -> np.ndarray:
    """``norm(x) >= 0`` of numbers ``(k, channels)``, as pixels of one image."""
    image = torch.from_numpy(np.ascontiguousarray(x.T))[None, :, :, None]
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return (layer(image)[0, :, :, 0].T >= 0).numpy()


def probes(layer: nn.BatchNorm2d, thresholds: np.ndarray, seed: int) -> np.ndarray:
    centre = np.where(np.isfinite(thresholds), thresholds, np.float32(0))
    return np.concatenate([neighbours(centre, 150), any_float(400, len(thresholds), seed)])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("decades", [0.5, 4.0, 9.0])
@pytest.mark.parametrize("channels", [1, 7, 16, 37, 128])
def test_equals_the_normalisation_everywhere(channels, decades, affine):
    layer = random_norm(channels, seed=channels, decades=decades, affine=affine)
    thresholds, flip = threshold(layer, channels)
    assert thresholds.dtype == np.float32 and flip.dtype == np.bool_
    x = probes(layer, thresholds, seed=channels)
    found = (x >= thresholds) != flip
    assert np.array_equal(found, positive(layer, x))
    assert np.array_equal(found, positive(layer, x, channels_last=True))


def test_the_usual_fold_is_not_exact():
    """That the probes can tell: ``mean - bias * sqrt(var + eps) / weight`` is off by some ulps in a few channels."""
    wrong, count = 0, 0
    for seed in range(4):
        layer = random_norm(128, seed, decades=2.0)
        thresholds, flip = threshold(layer, 128)
        x = probes(layer, thresholds, seed)
        with torch.no_grad():
            fold = layer.running_mean - layer.bias * (layer.running_var + layer.eps).sqrt() / layer.weight
        turns = layer.weight.detach().numpy() != 0
        folded = np.where(layer.weight.detach().numpy() > 0, x >= fold.numpy(), x <= fold.numpy())
        expected = positive(layer, x)
        assert np.array_equal((x >= thresholds) != flip, expected)
        wrong += int((folded != expected)[:, turns].sum())
        count += int(expected[:, turns].size)
    assert count > 200_000
    assert 0 < wrong < 0.01 * count


def test_is_the_smallest_number_behind_the_turn():
    layer = random_norm(200, seed=5, decades=3.0)
    thresholds, flip = threshold(layer, 200)
    turns = np.isfinite(thresholds)
    below = np.nextafter(thresholds, np.float32(-np.inf))
    x = np.where(turns, np.stack([below, thresholds]), np.float32(0))
    signs = positive(layer, x)[:, turns]
    assert turns.sum() > 150
    assert np.array_equal(signs[0], flip[turns])
    assert np.array_equal(signs[1], ~flip[turns])


def test_by_hand():
    # x - 3, 2x + 3, -x - 3 and -4x + 1 with no rounding near the turn.
    layer = norm(4, weight=[1.0, 2.0, -1.0, -4.0], bias=[-3.0, 3.0, -3.0, 1.0])
    thresholds, flip = threshold(layer, 4)
    assert flip.tolist() == [False, False, True, True]
    assert thresholds[:2].tolist() == [3.0, -1.5]
    # Zero counts as +, so a falling line turns at the next number.
    assert thresholds[2:].tolist() == [np.nextafter(np.float32(at), np.float32(1)) for at in (-3.0, 0.25)]


def test_the_sign_itself():
    thresholds, flip = threshold(None, 5)
    assert thresholds.tolist() == [0.0] * 5 and not flip.any()
    identity, flipped = threshold(norm(), 1)
    assert identity.tolist() == [0.0] and not flipped.any()


def test_a_factor_of_zero_is_a_constant():
    layer = norm(4, weight=0.0, bias=[1.0, 0.0, -0.0, -1.0], mean=7.0)
    thresholds, flip = threshold(layer, 4)
    assert thresholds.tolist() == [-np.inf, -np.inf, -np.inf, np.inf]
    assert not flip.any()


def test_a_factor_too_small_to_turn_the_sign_is_a_constant():
    layer = norm(2, weight=[1e-30, -1e-30], bias=[1e20, -1e20])
    thresholds, flip = threshold(layer, 2)
    assert thresholds.tolist() == [-np.inf, np.inf]
    assert not flip.any()


def test_leaves_the_module_and_the_generator_alone():
    layer = random_norm(9, seed=1, decades=1.0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    threshold(layer, 9)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight.grad is None


def with_nan(name: str) -> nn.BatchNorm2d:
    layer = norm(3)
    with torch.no_grad():
        getattr(layer, name)[1] = torch.nan
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (norm(3).train(), "training mode"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), "no running statistics"),
        (with_nan("running_mean"), "running_mean .* not finite"),
        (with_nan("running_var"), "running_var .* not finite"),
        (with_nan("weight"), "weight .* not finite"),
        (with_nan("bias"), "bias .* not finite"),
        (norm(3, var=0.0), "factor or the shift"),
        (norm(3, weight=1e38, mean=1e10), "factor or the shift"),
        (norm(3).double(), "torch.float64"),
        (nn.GroupNorm(3, 3), "GroupNorm"),
        (nn.BatchNorm1d(3).eval(), "BatchNorm1d"),
    ],
)
def test_refuses(layer, message):
    with pytest.raises(UnsupportedError, match=message):
        threshold(layer, 3)


def test_refuses_another_number_of_channels():
    with pytest.raises(InvalidInputError, match="of 3 channels; legal: 4"):
        threshold(norm(3), 4)


def test_refuses_a_normalisation_that_is_not_monotone():
    layer = norm(3)
    layer.forward = lambda x: torch.sin(x)
    with pytest.raises(UnsupportedError, match="no comparison with one number"):
        threshold(layer, 3)


def test_refuses_a_normalisation_that_rounds_by_layout():
    layer = norm(3, bias=-1.0)
    later = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))

    def forward(x: torch.Tensor) -> torch.Tensor:
        last = x.shape[2] > 1 and x.is_contiguous(memory_format=torch.channels_last)
        return x - (later if last else 1.0)

    layer.forward = forward
    with pytest.raises(UnsupportedError, match="channels last"):
        threshold(layer, 3)
