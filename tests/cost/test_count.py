import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nasplat.cost import Bench, Count
from nasplat.cost.count import count, count_modules
from nasplat.errors import InvalidInputError, NasplatWarning, UnsupportedError
from nasplat.nn import BinaryConv2d, set_binarisation
from nasplat.nn.expert import ExpertBinaryConv2d, set_experts
from search_spaces import Bats, BinaryGrowth, DartsCell, MetaKernel, NasBench201, Sandglass


class ResNet18(nn.Module):
    """ResNet-18 for 224x224 images, binary but for its first convolution, its classifier and, maybe, its shortcuts."""

    class Block(nn.Module):
        def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Callable[..., nn.Module]) -> None:
            super().__init__()
            self.conv1 = BinaryConv2d(in_channels, channels, 3, stride=stride, padding=1)
            self.conv2 = BinaryConv2d(channels, channels, 3, padding=1)
            self.shortcut = (
                nn.Identity() if stride == 1 else nn.Sequential(shortcut(in_channels, channels, 1, stride=stride))
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x)) + self.shortcut(x)

    def __init__(self, shortcut: Callable[..., nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for channels, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
            layers.append(self.Block(width, channels, stride, shortcut))
            width = channels
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean((2, 3)))


def bats(*, wide: bool) -> nn.Module:
    space = Bats.imagenet(wide=wide)
    return space.build(space.paper_genes())


@pytest.mark.parametrize(
    ("build", "bops", "conv_macs_real"),
    [
        (lambda: ResNet18(BinaryConv2d), 1_695_547_392, 118_525_952),
        (lambda: ResNet18(nn.Conv2d), 1_676_279_808, 118_525_952 + 19_267_584),
        (lambda: bats(wide=False), 1_149_657_600, 48_696_320),
        (lambda: bats(wide=True), 2_157_254_400, 73_044_480),
    ],
    ids=["resnet18", "resnet18-real-shortcuts", "bats", "bats-wide"],
)
def test_multiply_accumulates_of_published_networks(
    build: Callable[[], nn.Module], bops: int, conv_macs_real: int
) -> None:
    with torch.device("meta"):
        model, example = build(), torch.empty(1, 3, 224, 224)
    counts = count(model, example)
    assert counts.bops == bops
    assert counts.conv_macs_real == conv_macs_real
    assert counts.macs == bops + conv_macs_real
    assert counts.uncounted == ()


@pytest.mark.parametrize(("wide", "published"), [(False, 0.805e8), (True, 1.210e8)])
def test_flops_of_published_bats(wide: bool, published: float) -> None:
    with torch.device("meta"):
        model, example = bats(wide=wide), torch.empty(1, 3, 224, 224)
    counts = count(model, example)
    assert counts.flops == pytest.approx(published, rel=0.015)
    assert counts.ops == counts.flops + counts.bops / 64


def test_parameters_of_bats_on_cifar() -> None:
    space = Bats.cifar()
    counts = count(space.build(space.paper_genes()), torch.zeros(1, 3, 32, 32))
    assert round(counts.params / 1e6, 2) == 3.49


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3), (1, 4, 10), 6 * 8 * 4 * 3),
        (nn.Conv2d(4, 6, 3, padding=1), (1, 4, 5, 5), 6 * 25 * 4 * 9),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (1, 8, 5, 5), 8 * 25 * 9),
        (nn.Conv2d(8, 12, 3, groups=4, stride=2, padding=1, dilation=1), (1, 8, 6, 6), 12 * 9 * 2 * 9),
        (nn.Conv3d(2, 3, 3, padding=1), (1, 2, 4, 4, 4), 3 * 64 * 2 * 27),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 7), 4 * 7 * 3 * 3),
        (nn.Linear(10, 3), (1, 10), 30),
        (nn.Linear(10, 3, bias=False), (1, 7, 10), 210),
    ],
)
def test_layers(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    counts = count(layer, torch.zeros(shape))
    assert (counts.macs, counts.conv_macs_real, counts.flops, counts.bops) == (macs, macs, macs, 0)
    assert counts.params == sum(p.numel() for p in layer.parameters())
    assert counts.uncounted == ()


@pytest.mark.parametrize(
    ("layer", "shape", "one", "two"),
    [
        (nn.BatchNorm2d(3), (1, 3, 4, 4), 48, 96),
        (nn.LayerNorm(8), (1, 5, 8), 40, 80),
        (nn.GroupNorm(2, 8), (1, 8, 5), 40, 80),
        (nn.ReLU(inplace=True), (1, 9), 9, 18),
        (nn.PReLU(3), (1, 3, 4, 4), 48, 96),
        (nn.GELU(), (1, 9), 9, 18),
        (nn.Hardswish(), (1, 9), 9, 18),
        (nn.Softmax(1), (1, 9), 9, 18),
        (nn.MaxPool2d(3, 2, padding=1), (1, 2, 8, 8), 2 * 16 * 9, 2 * 16 * 9),
        (nn.AvgPool2d((1, 2)), (1, 2, 8, 8), 2 * 32 * 2, 2 * 32 * 2),
        (nn.MaxPool1d(2), (1, 2, 8), 16, 16),
        (nn.AdaptiveAvgPool2d(1), (1, 2, 8, 8), 128, 128),
        (nn.Identity(), (1, 9), 0, 0),
        (nn.Flatten(), (1, 3, 3), 0, 0),
        (nn.ChannelShuffle(2), (1, 4, 3, 3), 0, 0),
        (nn.Dropout(), (1, 9), 0, 0),
        (nn.ZeroPad2d(1), (1, 2, 3, 3), 0, 0),
    ],
)
def test_element_wise_work(layer: nn.Module, shape: tuple[int, ...], one: int, two: int) -> None:
    counts = [count(layer, torch.zeros(shape), elementwise=n) for n in (0, 1, 2)]
    assert [c.flops for c in counts] == [2 * one - two, one, two]
    assert all(c.macs == 0 and c.uncounted == () for c in counts)


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, x.new_ones(4, 2, 3, 3), padding=1)  # 4 * 25 * 18 = 1800
        y = y.flatten(2) @ y.flatten(2).transpose(1, 2)  # 4 * 25 * 4 = 400
        return torch.einsum("bij,bkj->bik", y, y).sum(2) + 1  # 4 * 4 * 4 = 64, then 16 and 4


def test_functions_count_like_modules() -> None:
    counts = count(Functional(), torch.zeros(1, 2, 5, 5))
    assert counts.macs == 1800 + 400 + 64
    assert counts.flops == counts.macs + 16 + 4
    assert counts.uncounted == ()


def test_attention_counts_its_products() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    fast_path = torch.backends.mha.get_fastpath_enabled()
    counts = count(Attention(), torch.zeros(1, 5, 8))
    # Four projections of 5 tokens, then queries with keys and weights with values.
    assert counts.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert counts.uncounted == ()
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_what_has_no_rule_is_listed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Upsample(scale_factor=2, mode="bilinear")

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(self.inner(x))

    counts = count(Odd(), torch.ones(1, 1, 4, 4))
    assert "inner: aten.upsample_bilinear2d" in counts.uncounted
    assert any(name.startswith("Odd: aten.") for name in counts.uncounted)


def test_binary_layer_is_binary_while_both_flags_are_on() -> None:
    layer = BinaryConv2d(4, 6, 3, padding=1, groups=2)
    example = torch.zeros(1, 4, 5, 5)
    macs, scale = 6 * 25 * 2 * 9, 6 * 25
    counts = count(layer, example)
    assert (counts.bops, counts.conv_macs_real, counts.flops) == (macs, 0, scale)
    assert counts.ops == scale + macs / 64
    # 108 weights in 14 bytes, six scales of four.
    assert counts.model_bytes == 14 + 24
    set_binarisation(layer, weights=False)
    counts = count(layer, example)
    assert (counts.bops, counts.conv_macs_real, counts.flops) == (0, macs, macs + scale)
    assert counts.model_bytes == 108 * 4 + 24


def test_experts_are_stored_all_and_computed_once() -> None:
    layer = ExpertBinaryConv2d(4, 6, 3, experts=3, squeeze_excite=True, padding=1, groups=2)
    example = torch.zeros(1, 4, 5, 5)
    macs, gate, squeeze = 6 * 25 * 2 * 9, 4 * 3, 4 * 1 + 1 * 6
    # Scale and excitation of the output, channel means of the input, ReLU and sigmoid.
    elements = 2 * 6 * 25 + 4 * 25 + 1 + 6
    counts = count(layer, example)
    assert (counts.bops, counts.conv_macs_real, counts.flops) == (macs, gate + squeeze, gate + squeeze + elements)
    assert counts.uncounted == ()
    # 324 weights in 41 bytes; six scales, gate and squeeze of four.
    assert counts.model_bytes == 41 + 4 * (6 + gate + squeeze)
    set_experts(layer, single=True)
    counts = count(layer, example)
    assert (counts.bops, counts.conv_macs_real) == (macs, squeeze)
    set_binarisation(layer, weights=False)
    counts = count(layer, example)
    assert (counts.bops, counts.conv_macs_real) == (0, macs + squeeze)
    assert counts.model_bytes == 4 * (324 + 6 + gate + squeeze)


def test_model_bytes_take_buffers_and_share_what_is_shared() -> None:
    norm = nn.BatchNorm1d(5)
    assert count(norm, torch.zeros(1, 5, 2)).model_bytes == 4 * 5 * 4 + 8
    linear = nn.Linear(4, 4)
    twice = count(nn.Sequential(linear, linear), torch.zeros(1, 4))
    assert (twice.model_bytes, twice.params, twice.macs) == (20 * 4, 20, 32)
    assert count(nn.Linear(4, 4).half(), torch.zeros(1, 4, dtype=torch.float16)).model_bytes == 40


def test_lazy_layers_are_counted_and_stay_lazy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    assert count(model, torch.zeros(1, 2, 5)).params == 33
    assert isinstance(model[1].weight, nn.UninitializedParameter)


class Careless(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.linear(self.norm(x)) + torch.rand(2)
        return self.last


def test_model_is_left_as_it_was() -> None:
    model = Careless().train()
    model.linear.eval()
    model(torch.randn(3, 4)).sum().backward()
    model.last = None
    model.register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    torch.manual_seed(0)
    generators = torch.get_rng_state(), np.random.get_state()[2], random.getstate()  # noqa: NPY002
    assert count(model, torch.zeros(1, 4)) == count(model, torch.zeros(1, 4))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[2], random.getstate()) == generators[1:]  # noqa: NPY002
    assert [m.training for m in model.modules()] == [True, True, False]
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert model.last is None
    assert torch.is_grad_enabled()


def test_refuses_what_it_cannot_count() -> None:
    with pytest.raises(InvalidInputError, match=r"got shape \(2, 4\); legal: \(1, ...\)"):
        count(nn.Linear(4, 2), torch.zeros(2, 4))
    with pytest.raises(InvalidInputError, match="elementwise is -1"):
        count(nn.Linear(4, 2), torch.zeros(1, 4), elementwise=-1)
    model = nn.Linear(4, 2)
    model.grown = model.weight * 2  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="deepcopy"):
        count(model, torch.zeros(1, 4))


def test_generators_are_back_after_a_failure() -> None:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count(nn.Linear(4, 2), torch.zeros(1, 5))
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.is_grad_enabled()


# Module by module.

SUMMED = ("params", "macs", "bops", "conv_macs_real", "flops", "ops", "model_bytes")


def check_sums(model: nn.Module, example: Tensor) -> pd.DataFrame:
    table, counts = count_modules(model, example, elementwise=2), count(model, example, elementwise=2)
    assert {name: table[name].sum() for name in SUMMED} == {name: getattr(counts, name) for name in SUMMED}
    of_modules = {
        f"{row['module'] or type(model).__name__}: {name}"
        for _, row in table.iterrows()
        for name in row["uncounted"].split()
    }
    assert of_modules == set(counts.uncounted)
    return table.set_index("module")


SPACES = [
    Bats.small(),
    BinaryGrowth.small(),
    DartsCell.small(),
    MetaKernel.small(),
    NasBench201.small(),
    Sandglass.small(),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_modules_add_up_to_the_network(space: Any) -> None:
    model = space.build(space.sample(np.random.default_rng(1)))
    table = check_sums(model, torch.zeros(1, space.in_channels, 16, 16))
    assert len(table) > 3
    assert set(table.index) <= {name for name, _ in model.named_modules()}


def test_modules_say_what_they_do_themselves() -> None:
    conv = BinaryConv2d(4, 6, 3, padding=1)
    model = nn.Sequential(nn.Sequential(conv), nn.Flatten(), nn.Linear(6 * 25, 3))
    table = check_sums(model, torch.zeros(1, 4, 5, 5))
    assert list(table.index) == ["0.0", "1", "2"]
    assert table.loc["0.0", ["type", "output", "calls", "bops"]].tolist() == [
        "BinaryConv2d", (1, 6, 5, 5), 1, 6 * 25 * 4 * 9,
    ]  # fmt: skip
    assert table.loc["0.0", "model_bytes"] == count(conv, torch.zeros(1, 4, 5, 5)).model_bytes
    assert table.loc["2", ["params", "macs", "model_bytes"]].tolist() == [453, 450, 4 * 453]


def test_a_module_that_is_shared_is_one_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.again(self.first(x))) + x

    table = check_sums(Twice(), torch.zeros(1, 4))
    assert list(table.index) == ["", "first", "tied"]
    assert table["calls"].tolist() == [1, 2, 1]
    assert table["macs"].tolist() == [0, 32, 16]
    assert table["params"].tolist() == [0, 20, 0]
    assert table["model_bytes"].tolist() == [0, 80, 0]
    assert table.loc["", "flops"] == 4


class WithoutRule(nn.Module):
    """Sorts, which there is no rule for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1)[0]


def test_what_is_not_counted_is_a_metric_and_a_warning(tmp_path: Path) -> None:
    model, example = nn.Sequential(nn.Linear(4, 4), WithoutRule()), torch.zeros(1, 4)
    table = check_sums(model, example)
    assert table.loc["1", "uncounted"] == "aten.sort"
    with pytest.warns(NasplatWarning, match=r"leave out aten\.sort"):
        found = Count().measure(model, example, Bench(tmp_path))
    assert found.values["uncounted_ops"] == 1
    assert found.facts == {"uncounted": ["1: aten.sort"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Count().measure(model[0], example, Bench(tmp_path)).values["uncounted_ops"] == 0
    assert set(found.values) == set(Count().metrics)
