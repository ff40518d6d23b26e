import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.errors import InvalidInputError
from nasplat.nn.cell import mix
from nasplat.nn.mobile import SandglassBlock
from nasplat.nn.separable import DilatedConv, FactorisedReduce, NormedPool, ReluConvNorm, SeparableConv
from nasplat.space import SearchSpace, Supernet
from nasplat.testing.space_contract import SpaceContract
from search_spaces.darts_cell import FIRST_ORDER_GENES, OPERATIONS, SECOND_ORDER_GENES, DartsCell

TINY = DartsCell(cells=3, channels=4, in_channels=1, classes=5, stem_stride=2)
ADDED = DartsCell(cells=3, channels=4, in_channels=1, classes=5, stem_stride=2, sandglass="added")


class TestDartsCellContract(SpaceContract):
    samples = 6
    builds = 2

    @pytest.fixture
    def space(self) -> SearchSpace:
        return ADDED

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def neutralise(self, supernet: Supernet) -> None:
        neutralise_pools(supernet)


def neutralise_pools(supernet: nn.Module) -> None:
    """Built networks have no BatchNorm after a pool, as in the public code."""
    for pool in (m for m in supernet.modules() if isinstance(m, NormedPool)):
        assert pool.norm.running_mean is not None and pool.norm.running_var is not None
        pool.norm.running_mean.zero_()
        pool.norm.running_var.fill_(1 - pool.norm.eps)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_operations() -> None:
    eight = (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
    sandglass = ("sandglass_3x3", "sandglass_5x5")
    assert TINY.operations == eight
    assert ADDED.operations == eight + sandglass
    assert DartsCell(sandglass="replaced").operations == (*eight[:4], *sandglass, *eight[6:])
    for space in (TINY, ADDED):
        assert len(space.choices) == 28
        assert all(tuple(options) == space.operations for options in space.choices.values())
        assert {(group.pick, group.off) for group in space.choice_groups.values()} == {(2, "none")}
    assert TINY.identity != ADDED.identity
    assert set(OPERATIONS) == {"none", "added", "replaced"}


def test_size() -> None:
    assert TINY.size() == math.prod(math.comb(j, 2) * 49 for j in (2, 3, 4, 5)) ** 2
    assert ADDED.size() == math.prod(math.comb(j, 2) * 81 for j in (2, 3, 4, 5)) ** 2


def test_bad_parameters_say_what_is_legal() -> None:
    with pytest.raises(InvalidInputError, match="sandglass is 'yes'; legal: 'none', 'added', 'replaced'"):
        DartsCell(sandglass="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="legal: 'none', 'added', 'replaced'"):
        DartsCell(sandglass=["none"])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="channels is 7; legal: an even number"):
        DartsCell(channels=7)


def test_presets() -> None:
    assert DartsCell.cifar() == DartsCell(cells=20, channels=36, in_channels=3, classes=10)
    assert DartsCell.search() == DartsCell(cells=8, channels=16)
    assert DartsCell.imagenet() == DartsCell(cells=14, channels=48, classes=1000, stem="imagenet")
    assert DartsCell.small(classes=3) == DartsCell(cells=3, channels=8, in_channels=1, stem_stride=2, classes=3)


def test_published_genes() -> None:
    for architecture, genes in (
        (TINY.first_order_genes(), FIRST_ORDER_GENES),
        (TINY.second_order_genes(), SECOND_ORDER_GENES),
    ):
        assert {name: option for name, option in architecture.genes.items() if option != "none"} == dict(genes)
    assert set(ADDED.second_order_genes().genes) == set(ADDED.choices)


def test_parameters_of_the_published_networks() -> None:
    # Published: 3.3 M for CIFAR-10, 4.7 M for ImageNet (arXiv:1806.09055; the authors' code counts without the
    # auxiliary classifier).
    assert parameters(DartsCell.cifar().build(DartsCell.cifar().second_order_genes())) == 3_349_342
    imagenet = DartsCell.imagenet()
    assert parameters(imagenet.build(imagenet.second_order_genes())) == 4_718_752


def test_parameters_of_the_search_network() -> None:
    # By hand, per edge of c channels at stride 1: both separable and both dilated convolutions.
    def edge(c: int, stride: int) -> int:
        depthwise = 2 * 9 * c + 2 * 25 * c + 9 * c + 25 * c
        return depthwise + 6 * c * c + (c * c if stride == 2 else 0)

    stem = 3 * 48 * 9 + 2 * 48
    total, inputs, c = stem, (48, 48), 16
    for index in range(8):
        reduction = index in (2, 5)
        c *= 2 if reduction else 1
        total += (inputs[0] + inputs[1]) * c
        total += 8 * edge(c, 2 if reduction else 1) + 6 * edge(c, 1)
        inputs = (inputs[1], 4 * c)
    total += inputs[1] * 10 + 10
    assert parameters(DartsCell.search().supernet()) == total


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("search", [False, True])
def test_operations_are_the_public_codes(stride: int, search: bool) -> None:
    c = 6
    made = {name: ADDED.operation(name, c, stride, search=search) for name in ADDED.operations[1:]}
    per_norm = 0 if search else 2 * c
    for size, k in (("3x3", 3), ("5x5", 5)):
        separable, dilated = made[f"sep_conv_{size}"], made[f"dil_conv_{size}"]
        assert isinstance(separable, SeparableConv)
        assert isinstance(dilated, DilatedConv)
        assert [stage.depthwise.stride[0] for stage in separable] == [stride, 1]
        assert [stage.depthwise.dilation[0] for stage in (*separable, dilated)] == [1, 1, 2]
        assert {stage.depthwise.groups for stage in (*separable, dilated)} == {c}
        assert parameters(separable) == 2 * (k * k * c + c * c + per_norm)
        assert parameters(dilated) == k * k * c + c * c + per_norm
        sandglass = made[f"sandglass_{size}"]
        assert isinstance(sandglass, SandglassBlock)
        # 6 channels: a middle of 6 // 4.
        assert parameters(sandglass) == 2 * k * k * c + 2 * c * 1 + (0 if search else 2 * (3 * c + 1))
        assert sandglass.shortcut_channels == (c if stride == 1 else 0)
    skip = made["skip_connect"]
    assert isinstance(skip, nn.Identity if stride == 1 else FactorisedReduce)
    assert parameters(skip) == (0 if stride == 1 else c * c + per_norm)
    for name, kind in (("max_pool_3x3", nn.MaxPool2d), ("avg_pool_3x3", nn.AvgPool2d)):
        pool = made[name]
        assert isinstance(pool, NormedPool) == search
        assert isinstance(getattr(pool, "pool", pool), kind)
        assert parameters(pool) == 0
    # Padding does not count in an average.
    average = DartsCell().operation("avg_pool_3x3", c, stride, search=False)
    torch.testing.assert_close(average(torch.ones(1, c, 5, 5)), torch.ones(1, c, *[-(-5 // stride)] * 2))
    x = torch.randn(2, c, 9, 12)
    for operation in made.values():
        assert operation(x).shape == (2, c, *((9, 12) if stride == 1 else (5, 6)))


def test_sandglass_reduction_depends_on_the_channels() -> None:
    middle = {}
    for channels in (16, 22, 24, 36):
        block = ADDED.operation("sandglass_3x3", channels, 1, search=True)
        assert isinstance(block, SandglassBlock)
        middle[channels] = block.reduce.conv.out_channels
    assert middle == {16: 4, 22: 5, 24: 4, 36: 6}


def test_cells_are_preprocessed_and_strided() -> None:
    network = TINY.build(TINY.first_order_genes())
    assert [type(cell.preprocess0) for cell in network.cells] == [ReluConvNorm, ReluConvNorm, FactorisedReduce]
    for cell in network.cells:
        for edge, operations in cell.edges.items():
            (operation,) = operations.values()
            if isinstance(operation, nn.MaxPool2d | nn.AvgPool2d):
                assert operation.stride == (2 if edge.endswith(("from0", "from1")) else 1)


def test_supernet_norms_have_no_affine_parameters() -> None:
    supernet = ADDED.supernet()
    norms = [m for name, m in supernet.named_modules() if isinstance(m, nn.BatchNorm2d) and name.startswith("cells")]
    assert norms and not any(norm.affine for norm in norms)


def test_supernet_equals_the_plain_one() -> None:
    # Both ways to convolve: 10x10, then 5x5 and 3x3 pixels a state.
    space = DartsCell(cells=3, channels=2, in_channels=1, classes=5, sandglass="added")
    torch.manual_seed(0)
    ours = space.supernet().double()
    plain = copy.deepcopy(ours)
    for cell in plain.cells:
        cell._mix = mix
    x = torch.randn(14, 1, 10, 10, dtype=torch.double)
    generator = torch.Generator().manual_seed(1)
    alphas = {
        name: torch.randn(len(options), generator=generator, dtype=torch.double).requires_grad_()
        for name, options in space.choices.items()
    }
    results = []
    for supernet in (ours, plain):
        logits = supernet(x, {name: torch.softmax(alpha, 0) for name, alpha in alphas.items()})
        loss = logits.square().sum()
        results.append([logits, *torch.autograd.grad(loss, [*alphas.values(), *supernet.parameters()])])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)
    for (name, one), two in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


def test_path_equals_built_network() -> None:
    torch.manual_seed(0)
    supernet = TINY.supernet()
    neutralise_pools(supernet)
    x = torch.randn(3, 1, 28, 28)
    rng = np.random.default_rng(0)
    for architecture in (TINY.second_order_genes(), TINY.sample(rng)):
        network = TINY.inherit(TINY.build(architecture), None, supernet.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(
                network.eval()(x), supernet.eval()(x, TINY.relax(architecture)), rtol=1e-4, atol=1e-5
            )


def test_keep_and_partial() -> None:
    names = list(TINY.choices)
    part = TINY.supernet(keep={name: ("none", "skip_connect", "dil_conv_3x3") for name in names})
    held = {name.split(".")[4] for name in part.state_dict() if ".edges." in name}
    assert held == {"skip_connect", "dil_conv_3x3"}
    x = torch.randn(2, 1, 16, 16)
    weights = torch.zeros(8)
    weights[3] = weights[6] = 0.5
    assert part(x, dict.fromkeys(names, weights)).shape == (2, 5)
    assert TINY.supernet(partial=2)(x, dict.fromkeys(names, torch.full((8,), 1 / 8))).shape == (2, 5)


def test_trains() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 5
    images = torch.randn(5, 1, 16, 16)[labels] + 0.3 * torch.randn(64, 1, 16, 16)
    network = ADDED.build(ADDED.second_order_genes()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_torch_export_takes_any_batch() -> None:
    torch.manual_seed(0)
    architecture = TINY.sample(np.random.default_rng(0))
    network = TINY.build(architecture).eval()
    batch = torch.export.Dim("batch")
    # 14 pixels: odd after the first reduction, so the factorised reduce pads.
    program = torch.export.export(network, (torch.randn(2, 1, 14, 14),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 14, 14)
    torch.testing.assert_close(program.module()(x), network(x))
