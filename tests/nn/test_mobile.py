from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.cost.count import count
from nasplat.errors import InvalidInputError
from nasplat.nn.mobile import ConvNorm, InvertedResidual, SandglassBlock, make_divisible, sandglass_width


def spread_statistics(block: nn.Module) -> nn.Module:
    """Running statistics and affine parameters that no test can mistake for none."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return block.eval()


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    def per_channel(key: str) -> Tensor:
        return state[f"{name}.norm.{key}"].view(-1, 1, 1)

    centred = (x - per_channel("running_mean")) / torch.sqrt(per_channel("running_var") + 1e-5)
    return centred * per_channel("weight") + per_channel("bias")


def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Channel by channel."""
    padding = weight.shape[-1] // 2
    return torch.cat(
        [
            functional.conv2d(x[:, c : c + 1], weight[c : c + 1], stride=stride, padding=padding)
            for c in range(x.shape[1])
        ],
        dim=1,
    )


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, weight[:, :, 0, 0])


def relu6(x: Tensor) -> Tensor:
    return torch.clamp(x, 0, 6)


@pytest.mark.parametrize(
    ("channels", "rounded"),
    [(32 * 1.4, 48), (32 * 0.75, 24), (32 * 0.35, 16), (96 * 0.35, 32), (960 * 0.35, 336), (4, 8), (12, 16), (20, 24)],
)
def test_make_divisible(channels: float, rounded: int) -> None:
    assert make_divisible(channels) == rounded


def test_make_divisible_is_the_nearest_multiple_not_below_90_percent() -> None:
    for channels in range(1, 300):
        made = make_divisible(channels)
        assert made % 8 == 0
        assert made >= 0.9 * channels
        # The next lower multiple is either no nearer, or too low.
        lower = made - 8
        assert lower < 0.9 * channels or abs(lower - channels) >= abs(made - channels) or lower == 0


@pytest.mark.parametrize(
    ("sizes", "paper", "code"),
    [
        ((96, 96, 6), 16, 16),
        ((96, 144, 6), 16, 32),  # a sixth of 144 is 24, to a multiple of 16: 32
        ((96, 144, 4), 24, 24),
        ((960, 1280, 6), 160, 208),  # a sixth of 1280 is 213.3, up to 214, to a multiple of 16: 208, above 90%
        ((200, 200, 6), 33, 32),  # 33 is less than a sixth of 200
        ((4, 4, 6), 1, 16),
    ],
)
def test_sandglass_width(sizes: tuple[int, int, int], paper: int, code: int) -> None:
    assert sandglass_width(*sizes) == paper
    assert sandglass_width(*sizes, variant="code") == code


@pytest.mark.parametrize("identity", [1.0, 0.5, 0.3, 0.0])
@pytest.mark.parametrize(("out_channels", "stride"), [(12, 1), (12, 2), (8, 1)])
def test_sandglass_is_the_papers_formula(out_channels: int, stride: int, identity: float) -> None:
    torch.manual_seed(0)
    block = spread_statistics(
        SandglassBlock(12, out_channels, kernel_size=5, reduction=4, stride=stride, identity=identity)
    )
    state = block.state_dict()
    x = 3 * torch.randn(2, 12, 7, 6)
    y = relu6(norm(depthwise(x, state["first.conv.weight"], 1), state, "first"))
    y = norm(pointwise(y, state["reduce.conv.weight"]), state, "reduce")
    assert y.shape[1] == 3
    y = relu6(norm(pointwise(y, state["expand.conv.weight"]), state, "expand"))
    y = norm(depthwise(y, state["last.conv.weight"], stride), state, "last")
    if out_channels == 12 and stride == 1:
        shared = {1.0: 12, 0.5: 6, 0.3: 4, 0.0: 0}[identity]
        for channel in range(shared):
            y[:, channel] += x[:, channel]
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-4)
    assert y.shape[2:] == ((7, 6) if stride == 1 else (4, 3))


@pytest.mark.parametrize(("expansion", "out_channels", "stride"), [(3, 6, 1), (3, 6, 2), (3, 5, 1), (1, 6, 1)])
def test_inverted_residual_is_its_formula(expansion: int, out_channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = spread_statistics(InvertedResidual(6, out_channels, expansion=expansion, stride=stride))
    state = block.state_dict()
    x = 3 * torch.randn(2, 6, 7, 6)
    y = x
    if expansion > 1:
        y = relu6(norm(pointwise(y, state["expand.conv.weight"]), state, "expand"))
    assert y.shape[1] == 6 * expansion
    y = relu6(norm(depthwise(y, state["depthwise.conv.weight"], stride), state, "depthwise"))
    y = norm(pointwise(y, state["project.conv.weight"]), state, "project")
    if out_channels == 6 and stride == 1:
        y = y + x
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"in_channels": 16, "out_channels": 16}, "first reduce expand last"),
        ({"in_channels": 16, "out_channels": 24}, "reduce expand"),
        ({"in_channels": 16, "out_channels": 24, "stride": 2}, "reduce expand last"),
        ({"in_channels": 16, "out_channels": 24, "keep_depthwise": True}, "first reduce expand last"),
        ({"in_channels": 16, "out_channels": 24, "stride": 2, "keep_depthwise": True}, "first reduce expand last"),
        ({"in_channels": 16, "out_channels": 16, "transition": True}, "reduce expand"),
        ({"in_channels": 16, "out_channels": 16, "stride": 2}, "first reduce expand last"),
    ],
)
def test_variant_code_drops_depthwise_convolutions_where_channels_change(
    arguments: dict[str, int], layers: str
) -> None:
    code, paper = SandglassBlock(**arguments, variant="code"), SandglassBlock(**arguments)
    assert [name for name, layer in code.named_children() if isinstance(layer, ConvNorm)] == layers.split()
    assert all(isinstance(layer, ConvNorm) for layer in paper.children())
    whole = set(arguments) == {"in_channels", "out_channels"} and arguments["out_channels"] == 16
    for block in (code, paper):
        assert block.shortcut_channels == (16 if whole else 0)
        assert block(torch.randn(2, 16, 6, 6)).shape[2] == 6 // arguments.get("stride", 1)


def test_transition_takes_the_shortcut_away() -> None:
    block = InvertedResidual(6, 6, transition=True).eval()
    assert not block.shortcut
    assert InvertedResidual(6, 6).shortcut
    assert SandglassBlock(6, 6, transition=True).shortcut_channels == 0


def test_activations_are_where_the_paper_puts_them() -> None:
    relus = [
        [name for name, child in block.named_children() if isinstance(child[-1], nn.ReLU6)]
        for block in (SandglassBlock(8, 8), InvertedResidual(8, 8))
    ]
    assert relus == [["first", "expand"], ["expand", "depthwise"]]


@pytest.mark.parametrize("make", [SandglassBlock, InvertedResidual])
def test_affine(make: Callable[..., nn.Module]) -> None:
    affine = [m.affine for m in make(8, 8).modules() if isinstance(m, nn.BatchNorm2d)]
    plain = [m.affine for m in make(8, 8, affine=False).modules() if isinstance(m, nn.BatchNorm2d)]
    assert affine == [True] * len(affine)
    assert plain == [False] * len(affine)
    assert len(affine) >= 3


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (SandglassBlock, {"kernel_size": 4}, "SandglassBlock: kernel_size is 4; legal: an odd"),
        (SandglassBlock, {"stride": 3}, "SandglassBlock: stride is 3; legal: 1, 2"),
        (SandglassBlock, {"reduction": 0}, "reduction is 0; legal: from 1 up"),
        (SandglassBlock, {"identity": 1.5}, "identity is 1.5; legal: from 0 to 1"),
        (SandglassBlock, {"variant": "mine"}, "variant is 'mine'; legal: 'paper', 'code'"),
        (SandglassBlock, {"transition": False}, "transition is False with 8 channels in and 16 out; legal: True or"),
        (InvertedResidual, {"kernel_size": 0}, "InvertedResidual: kernel_size is 0; legal: an odd"),
        (InvertedResidual, {"stride": 0}, "InvertedResidual: stride is 0; legal: 1, 2"),
        (InvertedResidual, {"expansion": 0}, "expansion is 0; legal: from 1 up"),
    ],
)
def test_bad_arguments_say_what_is_legal(
    make: Callable[..., nn.Module], arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(8, 16, **arguments)


def test_identity_multiplier_saves_additions_and_nothing_else() -> None:
    full, half = (count(SandglassBlock(24, 24, identity=a), torch.randn(1, 24, 8, 8)) for a in (1.0, 0.5))
    assert (full.params, full.macs) == (half.params, half.macs)
    assert full.flops - half.flops == 12 * 8 * 8


# MobileNetV2 is no search space here, but its published size holds the inverted residual to account: expansion,
# channels, blocks, stride (arXiv:1801.04381, table 2).
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@pytest.mark.parametrize(("width", "published", "params"), [(1.0, 3.5, 3_504_872), (0.75, 2.6, 2_636_424)])
def test_mobilenet_v2_has_its_published_size(width: float, published: float, params: int) -> None:
    with torch.device("meta"):
        channels = make_divisible(32 * width)
        layers: list[nn.Module] = [ConvNorm(3, channels, 3, stride=2)]
        for expansion, base, blocks, stride in MOBILENET_V2:
            for index in range(blocks):
                out = make_divisible(base * width)
                layers.append(InvertedResidual(channels, out, expansion=expansion, stride=1 if index else stride))
                channels = out
        last = make_divisible(1280 * max(1.0, width))
        network = nn.Sequential(
            *layers, ConvNorm(channels, last, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 1000)
        )
        counts = count(network, torch.randn(1, 3, 224, 224))
    assert counts.params == params
    assert round(params / 1e6, 1) == published
