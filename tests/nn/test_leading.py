import pytest
import torch
from torch import nn

from nasplat.nn.leading import LeadingBatchNorm2d, LeadingPReLU


@pytest.mark.parametrize("channels", [3, 8])
def test_leading_channels_are_normalised_as_by_a_layer_of_their_own(channels: int) -> None:
    wide, own = LeadingBatchNorm2d(8), nn.BatchNorm2d(channels, affine=False)
    x = torch.randn(5, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wide(x), own(x))
    for name, held in own.state_dict().items():
        mine = wide.state_dict()[name]
        assert torch.equal(mine[:channels] if mine.ndim else mine, held), name
    assert torch.equal(wide.running_mean[channels:], torch.zeros(8 - channels))
    assert torch.equal(wide.eval()(x), own.eval()(x))


def test_leading_channels_have_their_slopes() -> None:
    wide = LeadingPReLU(8)
    with torch.no_grad():
        wide.weight.copy_(torch.linspace(0, 1, 8))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = wide(x)
    assert torch.equal(y, nn.functional.prelu(x, wide.weight[:3]))
    y.sum().backward()
    assert torch.equal(wide.weight.grad[3:], torch.zeros(5))
    torch.testing.assert_close(wide.weight.grad[:3], x.detach().clamp_max(0).sum((0, 2, 3)))
