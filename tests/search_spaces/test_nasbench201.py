import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.cost.count import count
from nasplat.drawing import Graph
from nasplat.errors import ArchitectureError, InvalidInputError
from nasplat.space import SearchSpace
from nasplat.testing.space_contract import SpaceContract
from search_spaces.nasbench201 import EDGES, OPERATIONS, Cell, CellNetwork, NasBench201, ResidualReduction

TINY = NasBench201(cells=1, channels=4, in_channels=1, classes=5)
PAPER = NasBench201()

# Best of the benchmark by mean test accuracy on CIFAR-10: architecture 6111.
BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"

# Source: the public NAS-Bench-201 (v1.0), number of the architecture, operations on the edges 0-1, 0-2, 1-2, 0-3, 1-3,
# 2-3 as numbers of OPERATIONS, parameters with 10 classes. Numbers 10, 12 and 74 join input and output by no path.
PUBLISHED = [
    (0, (4, 2, 1, 2, 1, 1), 129_306),
    (1, (3, 3, 4, 1, 3, 1), 802_426),
    (2, (4, 3, 3, 4, 4, 4), 559_386),
    (10, (3, 3, 3, 0, 0, 0), 802_426),
    (12, (0, 0, 0, 0, 3, 4), 316_346),
    (74, (3, 0, 0, 0, 0, 2), 344_346),
    (100, (3, 3, 0, 3, 4, 1), 802_426),
    (1459, (3, 2, 3, 1, 2, 3), 858_426),
    (1462, (3, 3, 3, 3, 3, 3), 1_531_546),
    (5111, (3, 2, 3, 1, 2, 2), 643_386),
    (6111, (3, 3, 3, 1, 3, 2), 1_073_466),
    (15624, (2, 0, 2, 0, 2, 2), 185_306),
]


def cell(space: NasBench201, *codes: int):
    return space.architecture({f"{s}-{t}": OPERATIONS[code] for (s, t), code in zip(EDGES, codes, strict=True)})


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class TestNasBench201Contract(SpaceContract):
    samples = 8
    builds = 3
    silent_options = ("none",)
    # Edges that do not lead to the output are held and not computed; see test_every_edge_learns.
    idle_parameters = (r"^layers\.\d+\.edges\.",)

    @pytest.fixture
    def space(self) -> SearchSpace:
        return TINY

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_size_and_edges() -> None:
    assert PAPER.size() == 15_625
    assert list(PAPER.choices) == ["0-1", "0-2", "1-2", "0-3", "1-3", "2-3"]
    assert set(PAPER.choices.values()) == {OPERATIONS}
    assert len(PAPER.neighbours(PAPER.from_string(BEST))) == 24


@pytest.mark.parametrize(("index", "codes", "published"), PUBLISHED)
def test_parameters_are_the_benchmarks(index: int, codes: tuple[int, ...], published: int) -> None:
    assert parameters(PAPER.build(cell(PAPER, *codes))) == published


def test_parameters_with_other_classes() -> None:
    # 64 channels at the end: 65 parameters a class more.
    hundred = NasBench201(classes=100)
    assert parameters(hundred.build(cell(hundred, *PUBLISHED[0][1]))) == 129_306 + 90 * 65


def test_presets() -> None:
    assert NasBench201() == NasBench201(cells=5, channels=16, in_channels=3, classes=10)
    assert NasBench201.small(classes=3) == NasBench201(cells=1, channels=8, in_channels=1, classes=3)
    network = PAPER.build(PAPER.from_string(BEST))
    assert [type(layer) for layer in network.layers] == [
        *[Cell] * 5, ResidualReduction, *[Cell] * 5, ResidualReduction, *[Cell] * 5
    ]  # fmt: skip
    assert network.transfer_points == ("layers.4", "layers.10", "layers.16")


def test_macs_of_the_best_cell() -> None:
    # By hand, 32x32: stem, five cells of four 3x3 and one 1x1 convolution at 16, 32, 64 channels on 32, 16, 8 pixels
    # a side (equal work in each stage), and per residual block two 3x3 and one 1x1 convolution.
    def block(channels: int, side: int) -> int:
        return side * side * (9 * channels // 2 * channels + 9 * channels * channels + channels // 2 * channels)

    cells = 3 * 5 * 32 * 32 * 16 * 16 * (4 * 9 + 1)
    expected = 32 * 32 * 3 * 16 * 9 + cells + block(32, 16) + block(64, 8) + 640
    assert count(PAPER.build(PAPER.from_string(BEST)), torch.randn(1, 3, 32, 32)).macs == expected


def test_bad_parameters_say_what_is_legal() -> None:
    for name in ("cells", "channels", "in_channels", "classes"):
        with pytest.raises(InvalidInputError, match=f"{name} is 0; legal: an integer from 1 up"):
            NasBench201(**{name: 0})
    with pytest.raises(InvalidInputError, match="partial is 3; legal: 1, 2, 4 "):
        TINY.supernet(partial=3)


def test_notation_of_the_paper() -> None:
    best = PAPER.from_string(BEST)
    assert best == cell(PAPER, 3, 3, 3, 1, 3, 2)
    assert PAPER.to_string(best) == BEST
    # Printed in the benchmark's own documentation.
    printed = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
    assert PAPER.from_string(printed) == cell(PAPER, 3, 3, 4, 1, 3, 1)
    assert PAPER.from_string("|none~0|+|none~1|skip_connect~0|+|none~2|none~0|none~1|").genes["0-2"] == "skip_connect"
    rng = np.random.default_rng(0)
    for architecture in (TINY.sample(rng) for _ in range(50)):
        assert TINY.from_string(TINY.to_string(architecture)) == architecture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is no cell, because of ''.*legal: \|op~0\|"),
        ("|none~0|", "missing: 0-2, 1-2, 0-3, 1-3, 2-3"),
        (BEST.replace("skip_connect~0", "skip_connect~3"), "because of 'skip_connect~3' at node 3"),
        (BEST.replace("skip_connect~0", "skip_connect~1"), "because of 'nor_conv_3x3~1' at node 3"),
        (BEST.replace("skip_connect", "dil_conv"), "0-3 is 'dil_conv'; legal: 'none', 'skip_connect'"),
        (BEST + "+|none~0|", "because of 'none~0' at node 4"),
    ],
)
def test_bad_notation_says_what_is_legal(text: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        PAPER.from_string(text)


def test_connected() -> None:
    assert sum(not TINY.connected(architecture) for architecture in TINY.enumerate()) == 341
    assert not TINY.connected(cell(TINY, 3, 3, 3, 0, 0, 0))
    assert not TINY.connected(cell(TINY, 0, 0, 0, 0, 3, 4))
    assert TINY.connected(cell(TINY, 3, 0, 4, 0, 0, 1))


def test_cell_computes_its_graph() -> None:
    torch.manual_seed(0)
    network = TINY.build(cell(TINY, 3, 2, 4, 1, 0, 3)).eval()
    layer = network.layers[0]
    x = torch.randn(2, 4, 6, 6)

    def edge(name: str, y: Tensor) -> Tensor:
        (operation,) = layer.edges[name].values()
        conv, norm = operation.conv, operation.norm
        y = nn.functional.conv2d(y.clamp(min=0), conv.weight, padding=conv.kernel_size[0] // 2)
        return y / (1 + norm.eps) ** 0.5

    pool = nn.functional.avg_pool2d(nn.functional.pad(edge("0-1", x), [1] * 4), 3, 1) * 9
    pool /= nn.functional.avg_pool2d(nn.functional.pad(torch.ones_like(x), [1] * 4), 3, 1) * 9
    expected = x + edge("2-3", edge("0-2", x) + pool)
    torch.testing.assert_close(layer(x, network._mixture), expected)


def test_what_leads_nowhere_is_held_but_not_computed() -> None:
    # 0-1 and 1-2 end at a node without a way on.
    dead, alone = cell(TINY, 3, 2, 3, 3, 0, 0), cell(TINY, 0, 0, 0, 3, 0, 0)
    held, lean = TINY.build(dead), TINY.build(alone)
    assert parameters(held) - parameters(lean) == sum(2 * (9 * c * c + 2 * c) + c * c + 2 * c for c in (4, 8, 16))
    lean.load_state_dict({name: tensor for name, tensor in held.state_dict().items() if name in lean.state_dict()})
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(held.eval()(x), lean.eval()(x), rtol=0, atol=0)
    example = torch.randn(1, 1, 8, 8)
    assert count(held, example).macs == count(lean, example).macs


@pytest.mark.parametrize("codes", [(0, 0, 0, 0, 0, 0), (3, 3, 3, 0, 0, 0), (0, 0, 0, 0, 3, 4)])
def test_disconnected_cells_ignore_the_image(codes: tuple[int, ...]) -> None:
    network = TINY.build(cell(TINY, *codes)).eval()
    logits = network(torch.randn(3, 1, 8, 8))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, logits[:1].expand(3, -1))
    assert count(network, torch.randn(1, 1, 8, 8)).params == parameters(network)


def test_every_edge_learns() -> None:
    network = TINY.build(cell(TINY, 3, 2, 3, 2, 3, 3)).train()
    nn.functional.cross_entropy(network(torch.randn(6, 1, 8, 8)), torch.arange(6) % 5).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_supernet_norms() -> None:
    supernet = TINY.supernet()
    affine = {
        name.split(".")[2] if "edges" in name else name.split(".")[0]: module.affine
        for name, module in supernet.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert affine == {"stem": True, "layers": True, "edges": False, "norm": True}


def test_keep_and_partial() -> None:
    names = list(TINY.choices)
    part = TINY.supernet(keep={name: ("none", "skip_connect", "nor_conv_1x1") for name in names})
    assert {name.split(".")[4] for name in part.state_dict() if ".edges." in name} == {"nor_conv_1x1"}
    x = torch.randn(2, 1, 8, 8)
    weights = torch.tensor([0.2, 0.4, 0.4, 0.0, 0.0])
    assert part(x, dict.fromkeys(names, weights)).shape == (2, 5)
    with pytest.raises(InvalidInputError, match="gives weight to nor_conv_3x3"):
        part(x, dict.fromkeys(names, torch.full((5,), 0.2)))
    half = TINY.supernet(partial=2)
    assert half(x, dict.fromkeys(names, torch.full((5,), 0.2))).shape == (2, 5)
    assert {m.conv.in_channels for m in half.layers[0].modules() if hasattr(m, "conv")} == {2}


def test_partial_passes_channels_by() -> None:
    space = NasBench201(cells=1, channels=4, in_channels=1, classes=2)
    layer = Cell({name: ("skip_connect",) for name in space.choices}, 4, affine=False, partial=2)
    x = torch.arange(4.0).reshape(1, 4, 1, 1)
    half = torch.tensor(0.5)
    only = {edge: ([("skip_connect", half)] if edge == (0, 3) else []) for edge in EDGES}
    # Channels 0, 1 through the skip and 2, 3 past it, all by a half, shuffled: 0, 2, 1, 3.
    assert layer(x, only).flatten().tolist() == [0.0, 1.0, 0.5, 1.5]


def test_inherits_from_the_supernet_only_what_fits() -> None:
    architecture = cell(TINY, 3, 2, 4, 1, 0, 3)
    supernet = TINY.supernet()
    network = TINY.inherit(TINY.build(architecture), None, supernet.state_dict())
    own, theirs = network.state_dict(), supernet.state_dict()
    name = "layers.0.edges.0-1.nor_conv_3x3.conv.weight"
    assert torch.equal(own[name], theirs[name])
    with pytest.raises(InvalidInputError, match="cannot inherit"):
        TINY.inherit(TINY.build(architecture), None, TINY.supernet(partial=2).state_dict())
    with pytest.raises(InvalidInputError, match="missing"):
        TINY.inherit(TINY.build(architecture), cell(TINY, 0, 0, 0, 0, 0, 0), {})


@pytest.mark.parametrize("side", [7, 8, 13])
def test_image_sizes(side: int) -> None:
    for architecture in (cell(TINY, 3, 2, 4, 1, 0, 3), cell(TINY, 0, 0, 0, 0, 0, 0)):
        assert TINY.build(architecture)(torch.randn(2, 1, side, side)).shape == (2, 5)


def test_trains() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 5
    images = torch.randn(5, 1, 8, 8)[labels] + 0.3 * torch.randn(64, 1, 8, 8)
    network = TINY.build(TINY.from_string(BEST))
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_sketch() -> None:
    (graph,) = TINY.sketch(cell(TINY, 3, 0, 4, 1, 0, 2))
    assert isinstance(graph, Graph)
    assert graph.nodes == ("input", "1", "2", "output")
    assert graph.edges == (
        ("input", "1", "nor_conv_3x3"),
        ("1", "2", "avg_pool_3x3"),
        ("input", "output", "skip_connect"),
        ("2", "output", "nor_conv_1x1"),
    )
    assert "nor_conv_3x3" in TINY.draw(cell(TINY, 3, 0, 4, 1, 0, 2)).svg()


def test_torch_export_takes_any_batch() -> None:
    torch.manual_seed(0)
    network = TINY.build(TINY.from_string(BEST)).eval()
    assert isinstance(network, CellNetwork)
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), network(x))
