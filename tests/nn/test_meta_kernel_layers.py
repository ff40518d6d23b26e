import re
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn import BinaryConv2d
from nasplat.nn.embedding import AveragePool, Identity, Kernel, LayerShape, candidate_of, parse
from nasplat.nn.meta_kernel import MetaConv2d, MetaInvertedResidual, Nothing, SplitConv2d, plain
from nasplat.nn.mobile import InvertedResidual

DENSE = (
    "conv_3x3",
    "conv_5x5",
    "conv_1x1",
    "dil_conv_3x3_d2",
    "dil_conv_3x3_d3",
    "conv_1x5",
    "conv_7x1",
    "dil_conv_1x3_d2",
    "gconv_3x3_g2",
    "gconv_5x5_g4",
    "dil_gconv_3x3_d2_g2",
    "avg_pool_3x3",
    "avg_pool_5x5",
    "zero",
)
DEPTHWISE = ("conv_3x3", "conv_5x5", "conv_7x7", "dil_conv_3x3_d2", "conv_1x3", "avg_pool_3x3", "zero")


def reference(option: str, x: Tensor, weight: Tensor | None, stride: int, groups: int) -> Tensor:
    """One candidate by itself, written down without the module under test."""
    if option == "identity":
        return x
    if option == "zero":
        return torch.zeros_like(x[:, :, ::stride, ::stride])  # As many channels as the input.
    if option.startswith("avg_pool"):
        side = int(option[-1])
        return F.avg_pool2d(x, side, stride, padding=side // 2)
    assert weight is not None
    height, width = map(int, re.findall(r"(\d)x(\d)", option)[0])
    dilation = int((re.findall(r"_d(\d)", option) or ["1"])[0])
    own = int((re.findall(r"_g(\d)", option) or [groups])[0])
    padding = ((height - 1) * dilation // 2, (width - 1) * dilation // 2)
    return F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation, groups=own)


def masked(meta: MetaConv2d, option: str, groups: int) -> Tensor | None:
    """The kernel of a candidate on a shared kernel, tap by tap."""
    if "conv" not in option:
        return None
    shared = meta.kernel
    assert shared is not None
    height, width = map(int, re.findall(r"(\d)x(\d)", option)[0])
    dilation = int((re.findall(r"_d(\d)", option) or ["1"])[0])
    own = int((re.findall(r"_g(\d)", option) or [groups])[0])
    columns = shared.shape[1] * groups // own
    rows, middle = shared.shape[0] // own, (shared.shape[2] // 2, shared.shape[3] // 2)
    kernel = torch.zeros(shared.shape[0], columns, height, width, dtype=shared.dtype)
    for o in range(shared.shape[0]):
        first = (o // rows) % (own // groups) * columns
        for i in range(height):
            for j in range(width):
                at = middle[0] + (i - height // 2) * dilation, middle[1] + (j - width // 2) * dilation
                kernel[o, :, i, j] = shared[o, first : first + columns, at[0], at[1]]
    return kernel


@pytest.mark.parametrize("weight_sharing", ["separate", "shared"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("options", "stride", "groups", "out_channels"),
    [
        *[((option,), stride, 1, 4) for option in DENSE for stride in (1, 2) if option != "zero"],
        (("identity",), 1, 1, 4),
        ((*DENSE, "identity"), 1, 1, 4),
        (DENSE, 2, 1, 4),
        (("conv_3x3", "gconv_5x5_g4", "identity", "avg_pool_3x3"), 1, 2, 4),
        (("conv_3x3", "gconv_5x5_g2", "dil_gconv_3x3_d2_g4"), 2, 1, 8),
        ((*DEPTHWISE, "identity"), 1, 4, 4),
        (DEPTHWISE, 2, 4, 4),
        (("conv_3x3", "dil_conv_3x3_d2"), 1, 4, 8),
    ],
)
def test_one_convolution_equals_the_sum_of_all(
    options: Sequence[str], stride: int, groups: int, out_channels: int, parts: int, weight_sharing: str
) -> None:
    torch.manual_seed(0)
    meta = MetaConv2d(4, out_channels, options, stride=stride, groups=groups, weight_sharing=weight_sharing).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    shape = (len(options),) if parts == 1 else (parts, len(options))
    weights = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(meta(x, weights))

    rows = weights.expand(2, -1) if parts == 1 else weights
    expected = torch.zeros_like(target)
    for index, option in enumerate(options):
        kernel = meta.kernels.get(option)
        if meta.kernel is not None:
            kernel = masked(meta, option, groups)
        one = reference(option, x, kernel, stride, groups)
        expected = expected + one * rows[:, index].repeat_interleave(out_channels // 2)[:, None, None]
    inputs = [x, weights, *meta.parameters()]
    want = torch.autograd.grad((expected * target).sum(), inputs, allow_unused=True)
    output = meta(x, weights)
    got = torch.autograd.grad((output * target).sum(), inputs, allow_unused=True)
    torch.testing.assert_close(output, expected)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    meta = MetaConv2d(2, 2, ("conv_3x3", "dil_conv_3x3_d2", "identity", "avg_pool_3x3")).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, dtype=torch.float64, requires_grad=True)
    kernel = meta.kernels["dil_conv_3x3_d2"]
    assert torch.autograd.gradcheck(lambda x, weights, _: meta(x, weights), (x, weights, kernel))


def test_candidates_of_weight_zero_cost_nothing() -> None:
    meta = MetaConv2d(4, 4, ("conv_3x3", "conv_1x5", "conv_7x7", "zero"), groups=4)
    x = torch.randn(1, 4, 8, 8)
    shapes = {
        (1.0, 0.0, 0.0, 0.0): (3, 3),
        (0.0, 0.5, 0.0, 0.5): (1, 5),
        (0.5, 0.5, 0.0, 0.0): (3, 5),
        (0.5, 0.0, 0.5, 0.0): (7, 7),
        (0.0, 0.0, 0.0, 1.0): (1, 1),
    }
    for weights, shape in shapes.items():
        assert tuple(meta.meta_kernel(torch.tensor(weights)).shape) == (4, 1, *shape)
    meta(x, torch.tensor([0.5, 0.5, 0.0, 0.0])).sum().backward()
    assert meta.kernels["conv_3x3"].grad is not None
    assert meta.kernels["conv_1x5"].grad is not None
    assert meta.kernels["conv_7x7"].grad is None
    assert meta(x, torch.tensor([0.0, 0.0, 0.0, 1.0])).abs().sum() == 0


def saved_bytes(options: Sequence[str], weight_sharing: str) -> int:
    meta = MetaConv2d(8, 8, options, weight_sharing=weight_sharing)
    own = {parameter.untyped_storage().data_ptr() for parameter in meta.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    weights = torch.full((len(options),), 1 / len(options), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        meta(x, weights)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_what_autograd_keeps_does_not_grow_with_the_candidates() -> None:
    options = ("conv_7x7", "conv_3x3", "conv_5x5", "conv_1x7", "conv_7x1", "dil_conv_3x3_d2", "dil_conv_3x3_d3")
    one = saved_bytes(options[:1], "separate")
    # The input and the summed kernel; besides them a few scalars.
    assert one == pytest.approx(4 * (4 * 8 * 16 * 16 + 8 * 8 * 49), abs=64)
    assert saved_bytes(options, "separate") == pytest.approx(one, abs=64)
    # Besides those the mask.
    assert saved_bytes(options, "shared") == pytest.approx(one, abs=4 * 49 + 128)


@pytest.mark.parametrize("weight_sharing", ["separate", "shared"])
@pytest.mark.parametrize(
    ("options", "groups", "kind"),
    [
        ("conv_3x3", 1, nn.Conv2d),
        ("dil_conv_3x3_d2", 4, nn.Conv2d),
        ("gconv_3x3_g4", 2, nn.Conv2d),
        ("identity", 1, nn.Identity),
        ("avg_pool_3x3", 1, nn.AvgPool2d),
        ("zero", 1, Nothing),
        (("conv_5x5", "conv_5x5"), 8, nn.Conv2d),
        (("conv_3x3", "conv_5x5"), 8, SplitConv2d),
        (("conv_3x3", "dil_conv_3x3_d2"), 1, SplitConv2d),
        (("zero", "gconv_3x3_g4"), 1, SplitConv2d),
        (("identity", "conv_3x3", "avg_pool_3x3", "conv_3x3"), 8, SplitConv2d),
        (("identity", "conv_3x3", "avg_pool_3x3", "zero"), 1, SplitConv2d),
    ],
)
def test_derived_layer_equals_the_one_hot_mixture(
    options: str | Sequence[str], groups: int, kind: type, weight_sharing: str
) -> None:
    torch.manual_seed(0)
    names = tuple(dict.fromkeys([options] if isinstance(options, str) else options))
    offered = (*names, *(name for name in ("conv_7x7", "conv_1x3") if name not in names))
    meta = MetaConv2d(8, 8, offered, groups=groups, weight_sharing=weight_sharing)
    chosen = [options] if isinstance(options, str) else options
    weights = torch.tensor([[float(name == option) for name in offered] for option in chosen], requires_grad=True)
    x = torch.randn(2, 8, 7, 6, requires_grad=True)
    derived = meta.derive(options)
    assert type(derived) is kind
    held = sum(parameter.numel() for parameter in derived.parameters())
    torch.testing.assert_close(derived(x), meta(x, weights[0] if len(chosen) == 1 else weights))
    meta(x, weights[0] if len(chosen) == 1 else weights).square().sum().backward()
    assert sum(int(p.grad.count_nonzero()) for p in meta.parameters() if p.grad is not None) == held


def test_a_derived_layer_shares_nothing_with_the_mixture() -> None:
    meta = MetaConv2d(4, 4, ("conv_3x3", "conv_5x5"))
    derived = meta.derive("conv_3x3")
    with torch.no_grad():
        derived.weight.zero_()
    assert meta.kernels["conv_3x3"].abs().sum() > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_layers_without_weights_have_the_size_of_a_convolution(stride: int) -> None:
    x = torch.randn(1, 4, 7, 10)
    shape = plain(("conv_3x3",), 4, 4, stride=stride)(x).shape
    assert plain(("zero",), 4, 4, stride=stride)(x).shape == shape
    assert plain(("avg_pool_5x5",), 4, 4, stride=stride)(x).shape == shape


@pytest.mark.parametrize(
    ("option", "candidate"),
    [
        ("conv_3x3", Kernel((3, 3))),
        ("conv_1x5", Kernel((1, 5))),
        ("dil_conv_3x3_d2", Kernel((3, 3), 2)),
        ("gconv_5x5_g4", Kernel((5, 5), 1, 4)),
        ("dil_gconv_3x1_d3_g2", Kernel((3, 1), 3, 2)),
        ("identity", Identity()),
        ("avg_pool_3x3", AveragePool(3)),
    ],
)
def test_names_are_read(option: str, candidate: object) -> None:
    assert parse(option) == candidate


@pytest.mark.parametrize(
    ("option", "error", "reason"),
    [
        ("max_pool_3x3", UnsupportedError, "maximum is not linear"),
        ("sep_conv_3x3", UnsupportedError, "normalisation or nonlinearity of its own"),
        ("dil_sep_conv_3x3", UnsupportedError, "normalisation or nonlinearity of its own"),
        ("conv_3x3_relu", UnsupportedError, "normalisation or nonlinearity of its own"),
        ("conv_4x4", UnsupportedError, "no centre"),
        ("avg_pool_2x2", UnsupportedError, "no centre"),
        ("avg_pool_3x5", UnsupportedError, "square"),
        ("dil_conv_3x3", InvalidInputError, "legal: conv_HxW, dil_conv_HxW_dN"),
        ("conv_3x3_d2", InvalidInputError, "unknown candidate 'conv_3x3_d2'"),
        ("dil_conv_3x3_d0", InvalidInputError, "from 1 up"),
        ("attention", InvalidInputError, "unknown candidate 'attention'"),
    ],
)
def test_what_cannot_be_embedded_is_refused(option: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=re.escape(reason)):
        MetaConv2d(4, 4, ("conv_3x3", option))


@pytest.mark.parametrize(
    ("option", "channels", "stride", "groups", "reason"),
    [
        ("identity", (4, 4), 2, 1, "identity has stride 1, the layer has 2"),
        ("identity", (4, 8), 1, 1, "makes 8 of 4"),
        ("avg_pool_3x3", (4, 8), 1, 1, "makes 8 of 4"),
        ("gconv_3x3_g3", (4, 4), 1, 1, "divide its 4 and 4 channels"),
        ("gconv_3x3_g2", (4, 4), 1, 4, "multiple of the layer's 4"),
    ],
)
def test_what_does_not_fit_the_layer_is_refused(
    option: str, channels: tuple[int, int], stride: int, groups: int, reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        LayerShape(*channels, stride, groups).candidate(option)


@pytest.mark.parametrize(
    ("module", "stride"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, bias=False), 1),
        (nn.Conv2d(4, 4, 5, padding=4, dilation=2, stride=2, bias=False), 2),
        (nn.Conv2d(4, 4, (1, 5), padding="same", groups=2, bias=False), 1),
        (nn.AvgPool2d(3, 2, padding=1), 2),
        (nn.Identity(), 1),
    ],
)
def test_a_module_that_is_embeddable_is_recognised(module: nn.Module, stride: int) -> None:
    candidate = candidate_of(module, stride)
    x = torch.randn(1, 4, 8, 8)
    match candidate:
        case Kernel():
            expected = reference(
                f"conv_{candidate.size[0]}x{candidate.size[1]}_d{candidate.dilation}_g{candidate.groups}",
                x,
                module.weight,
                stride,
                1,
            )
        case AveragePool():
            expected = reference(f"avg_pool_{candidate.size}x{candidate.size}", x, None, stride, 1)
        case _:
            expected = x
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("module", "stride", "reason"),
    [
        (nn.MaxPool2d(3, 1, padding=1), 1, "maximum is not linear"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)), 1, "of its own"),
        (nn.ReLU(), 1, "of its own"),
        (nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False), 1, r"its stride is \(2, 2\), the layer's is 1"),
        (nn.AvgPool2d(3, 2, padding=1), 1, "its stride is 2, the layer's is 1"),
        (nn.Identity(), 2, "its stride is 1, the layer's is 2"),
        (nn.Conv2d(4, 4, 3, padding=1), 1, "bias=False"),
        (nn.Conv2d(4, 4, 3, bias=False), 1, "padding="),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False), 1, "zeros as padding"),
        (nn.Conv2d(4, 4, 3, padding=(1, 2), dilation=(1, 2), bias=False), 1, "same in both directions"),
        (nn.Conv2d(4, 4, 2, bias=False), 1, "no centre"),
        (nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), 1, "counts the padding"),
        (nn.AvgPool2d(3, 1), 1, "padding 1"),
        (BinaryConv2d(4, 4, 3, padding=1), 1, "more than a plain convolution"),
    ],
)
def test_a_module_that_is_not_embeddable_is_refused(module: nn.Module, stride: int, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        candidate_of(module, stride)


def test_wrong_arguments_are_refused() -> None:
    meta = MetaConv2d(4, 4, ("conv_3x3", "identity"))
    x = torch.randn(1, 4, 8, 8)
    for weights in (torch.ones(3), torch.ones(3, 2), torch.ones(1, 1, 2), torch.ones(0, 2)):
        with pytest.raises(InvalidInputError, match=r"legal: \(2,\), or \(parts, 2\)"):
            meta(x, weights)
    with pytest.raises(InvalidInputError, match="no candidate 'conv_5x5'; legal: conv_3x3, identity"):
        meta.derive("conv_5x5")
    with pytest.raises(InvalidInputError, match="3 parts of 4 -> 4 channels"):
        meta.derive(("conv_3x3", "identity", "conv_3x3"))
    with pytest.raises(UnsupportedError, match="cut the 2 groups"):
        MetaConv2d(4, 4, ("gconv_3x3_g2", "identity")).derive(["gconv_3x3_g2", "identity", "identity", "identity"])
    with pytest.raises(InvalidInputError, match="different names"):
        MetaConv2d(4, 4, ("conv_3x3", "conv_3x3"))
    with pytest.raises(InvalidInputError, match="legal: 'separate', 'shared'"):
        MetaConv2d(4, 4, ("conv_3x3",), weight_sharing="both")
    with pytest.raises(InvalidInputError, match="groups that divide both"):
        MetaConv2d(4, 6, ("conv_3x3",), groups=4)


# The block.


def mixed_by_hand(
    block: MetaInvertedResidual, x: Tensor, kernels: Tensor, expansions: Sequence[Tensor], parts: Sequence[int]
) -> Tensor:
    """A block of expansions (2, 4) in evaluation mode: kernels one by one, the mask on the depthwise output."""

    def norm(y: Tensor, module: nn.BatchNorm2d) -> Tensor:
        assert module.running_mean is not None and module.running_var is not None
        return (y - module.running_mean[:, None, None]) / (module.running_var[:, None, None] + module.eps).sqrt()

    y = norm(F.conv2d(x, block.expand.weight), block.expand_norm).clamp(0, 6)
    options = block.depthwise.options
    rows = kernels[list(parts)]
    y = sum(
        reference(option, y, block.depthwise.kernels[option], 1, y.shape[1]) * rows[:, index][:, None, None]
        for index, option in enumerate(options)
    )
    y = norm(y, block.depthwise_norm).clamp(0, 6)
    half = y.shape[1] // 2
    mask = torch.cat([(expansions[0] + expansions[1]).repeat(half), expansions[1].repeat(half)])
    return x + norm(F.conv2d(y * mask[:, None, None], block.project.weight), block.project_norm)


def test_block_is_one_path_with_a_mask() -> None:
    torch.manual_seed(0)
    block = MetaInvertedResidual(4, 4, ("conv_3x3", "conv_5x5"), (2, 4), parts=2).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    kernels = torch.softmax(torch.randn(2, 2, dtype=torch.float64), 1).requires_grad_()
    expansions = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        block(x, kernels, expansions)
    block.eval()
    # 8 channels of expansion 2 in two parts, and the 8 more of expansion 4 in two parts.
    parts = [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    expected = mixed_by_hand(block, x, kernels, expansions.unbind(), parts)
    output = block(x, kernels, expansions)
    torch.testing.assert_close(output, expected)
    inputs = [x, kernels, expansions, *block.parameters()]
    target = torch.randn_like(output)
    want = torch.autograd.grad((expected * target).sum(), inputs)
    got = torch.autograd.grad((output * target).sum(), inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_expansion_zero_leaves_the_block_out() -> None:
    torch.manual_seed(0)
    block = MetaInvertedResidual(4, 4, ("conv_3x3",), (0, 2, 4)).eval()
    x = torch.randn(2, 4, 6, 6)
    one = torch.ones(1)
    assert block(x, one, torch.tensor([1.0, 0.0, 0.0])) is x
    whole = block(x, one, torch.tensor([0.0, 1.0, 0.0])) - x
    # Half as wide a mask comes on top of half of the block.
    scaled = MetaInvertedResidual(4, 4, ("conv_3x3",), (2, 4)).eval()
    scaled.load_state_dict(block.state_dict())
    half = scaled(x, one, torch.tensor([0.5, 0.0])) - x
    torch.testing.assert_close(block(x, one, torch.tensor([0.5, 0.5, 0.0])) - x, 0.5 * half)
    torch.testing.assert_close(half, 0.5 * whole)


def test_hidden_channels_of_weight_zero_are_not_computed() -> None:
    block = MetaInvertedResidual(4, 8, ("conv_3x3", "conv_5x5"), (2, 4), stride=2)
    x = torch.randn(2, 4, 6, 6)
    before = block.expand_norm.running_mean.clone()
    y = block(x, torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    assert y.shape == (2, 8, 3, 3)
    y.square().sum().backward()
    for gradient in (block.expand.weight.grad, block.depthwise.kernels["conv_3x3"].grad):
        assert gradient is not None and gradient[:8].ne(0).any() and gradient[8:].eq(0).all()
    assert block.expand_norm.running_mean[:8].ne(before[:8]).all()
    assert block.expand_norm.running_mean[8:].equal(before[8:])


@pytest.mark.parametrize("weight_sharing", ["separate", "shared"])
@pytest.mark.parametrize("expansion", [2, 4])
def test_a_derived_block_is_the_path(expansion: int, weight_sharing: str) -> None:
    torch.manual_seed(0)
    options = ("conv_3x3", "identity", "conv_5x5")
    meta = MetaInvertedResidual(4, 4, options, (2, 4), parts=2, weight_sharing=weight_sharing)
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        meta(x, torch.full((2, 3), 1 / 3), torch.tensor([0.5, 0.5]))
    block = InvertedResidual(4, 4, expansion=expansion)
    hidden = 4 * expansion
    block.depthwise.conv = plain(("conv_5x5", "identity"), hidden, hidden, groups=hidden)
    meta.load_into(block, ("conv_5x5", "identity"), expansion)
    weights = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    one_hot = torch.tensor([float(e == expansion) for e in (2, 4)])
    torch.testing.assert_close(block.eval()(x), meta.eval()(x, weights, one_hot))


def test_blocks_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="changes channels or size"):
        MetaInvertedResidual(4, 8, ("conv_3x3",), (0, 2))
    with pytest.raises(InvalidInputError, match="different integers from 2 up"):
        MetaInvertedResidual(4, 4, ("conv_3x3",), (1, 2))
    with pytest.raises(InvalidInputError, match=r"each expansion adds, \[8, 8\]"):
        MetaInvertedResidual(4, 4, ("conv_3x3",), (2, 4), parts=3)
    block = MetaInvertedResidual(4, 4, ("conv_3x3",), (2, 4))
    with pytest.raises(InvalidInputError, match="weight 0"):
        block(torch.randn(2, 4, 4, 4), torch.ones(1), torch.zeros(2))
    with pytest.raises(InvalidInputError, match="weights for 2 parts; legal: 1"):
        block(torch.randn(2, 4, 4, 4), torch.ones(2, 1), torch.ones(2))
