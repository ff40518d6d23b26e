import copy
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.errors import ArchitectureError, InvalidInputError
from nasplat.nn import BinaryConv2d, set_binarisation
from nasplat.nn.cell import Use, mix
from nasplat.space import SearchSpace
from nasplat.testing.space_contract import SpaceContract
from search_spaces import Bats
from search_spaces.bats import OPERATIONS, PAPER_GENES

TINY = Bats(cells=3, channels=4, groups=2, in_channels=1, classes=5, stem_stride=2)
MERGED = replace(TINY, supernet_form="merged")


class TestBatsContract(SpaceContract):
    samples = 8
    builds = 2

    @pytest.fixture
    def space(self) -> SearchSpace:
        return TINY

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


class TestMergedBatsContract(TestBatsContract):
    builds = 1
    samples = 2

    # Not of the supernet, and slow.
    test_same_id_in_another_process = None

    @pytest.fixture
    def space(self) -> SearchSpace:
        return MERGED


def test_choices_are_28_edges_of_8_operations() -> None:
    choices = TINY.choices
    assert len(choices) == 28
    assert all(tuple(options) == OPERATIONS for options in choices.values())
    assert list(choices)[:5] == [
        "normal/node2/from0",
        "normal/node2/from1",
        "normal/node3/from0",
        "normal/node3/from1",
        "normal/node3/from2",
    ]
    assert len(TINY.choice_groups) == 8
    assert {(group.pick, group.off) for group in TINY.choice_groups.values()} == {(2, "zero")}


def test_size() -> None:
    # Node j picks 2 of its j inputs, with 7 operations on each.
    assert TINY.size() == math.prod(math.comb(j, 2) * 49 for j in (2, 3, 4, 5)) ** 2


def test_temperatures_are_the_papers() -> None:
    temperatures = TINY.temperatures()
    assert list(temperatures) == list(TINY.choices)
    assert {value for name, value in temperatures.items() if name.startswith("normal")} == {0.2}
    assert {value for name, value in temperatures.items() if name.startswith("reduction")} == {0.15}


@pytest.mark.parametrize(
    ("cells", "reductions"), [(1, ()), (2, (1,)), (3, (1, 2)), (5, (1, 3)), (14, (4, 9)), (20, (6, 13))]
)
def test_reductions(cells: int, reductions: tuple[int, ...]) -> None:
    space = Bats(cells=cells, channels=4, groups=2)
    assert space.reductions() == reductions
    assert len(space.choices) == (28 if reductions else 14)
    network = space.build(space.paper_genes())
    assert network(torch.randn(1, 3, 8, 8)).shape == (1, 10)
    assert network.classifier.in_features == 4 * 4 * 2 ** len(reductions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 8, "groups": 3}, r"groups is 3.*legal: 1, 2, 4, 8"),
        ({"channels": 8, "groups": 2, "shuffle": 3}, r"shuffle is 3.*legal: 1, 2, 4, 8"),
        ({"channels": 9, "groups": 3}, "channels is 9; legal: an even number"),
        ({"cells": 0}, "cells is 0; legal"),
        ({"classes": True}, "classes is True; legal"),
        ({"supernet_form": "meta"}, "supernet_form is 'meta'; legal: 'paper', 'merged'"),
        ({"stem": "large"}, "stem is 'large'; legal: 'cifar', 'imagenet'"),
        ({"stem_stride": 3}, "stem_stride is 3; legal: 1, 2"),
        ({"cells": 2, "auxiliary": True}, "legal: cells from 3 up"),
        ({"auxiliary": 1}, "auxiliary is 1; legal: False, True"),
    ],
)
def test_bad_parameters_say_what_is_legal(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Bats(**arguments)  # type: ignore[arg-type]


def test_presets() -> None:
    assert Bats.cifar() == Bats(cells=20, channels=36, groups=12, in_channels=3)
    assert Bats.small() == Bats(cells=3, channels=8, groups=2, in_channels=1, stem_stride=2)
    assert Bats.small(in_channels=3, classes=100).classes == 100
    assert (Bats.imagenet().channels, Bats.imagenet().groups) == (80, 16)
    assert (Bats.imagenet(wide=True).channels, Bats.imagenet(wide=True).groups) == (120, 24)
    assert Bats.small().identity != Bats.cifar().identity


@pytest.mark.parametrize("side", [16, 28])
def test_paper_genes_build(side: int) -> None:
    space = Bats.small()
    architecture = space.paper_genes()
    assert {name: option for name, option in architecture.genes.items() if option != "zero"} == dict(PAPER_GENES)
    network = space.build(architecture).eval()
    assert network(torch.randn(2, 1, side, side)).shape == (2, 10)


def test_everything_in_the_cells_is_binary_and_nothing_else() -> None:
    network = TINY.build(TINY.paper_genes())
    binary = {name for name, m in network.named_modules() if isinstance(m, BinaryConv2d)}
    real = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and name not in binary}
    assert all(name.startswith("cells.") for name in binary)
    assert real == {"stem0.0"}
    assert all(m.is_binary for m in network.modules() if isinstance(m, BinaryConv2d))


def test_strides_and_groups_follow_the_cell() -> None:
    network = TINY.build(TINY.paper_genes())
    for cell in network.cells:
        for edge, operations in cell.edges.items():
            (operation,) = operations.values()
            conv = getattr(operation, "conv", None)
            stride = conv.stride if conv is not None else operation.stride
            halves = cell.kind == "reduction" and edge.endswith(("from0", "from1"))
            assert stride in ((2, (2, 2)) if halves else (1, (1, 1)))
            if conv is not None:
                assert conv.groups == 2
                assert operation.shortcut == (not halves)
    assert [cell.kind for cell in network.cells] == ["normal", "reduction", "reduction"]


def test_state_of_a_path_is_part_of_the_supernets() -> None:
    shapes = {name: tensor.shape for name, tensor in TINY.supernet().state_dict().items()}
    rng = np.random.default_rng(0)
    for _ in range(3):
        network = TINY.build(TINY.sample(rng))
        affine = {
            f"{prefix}.{name}"
            for prefix, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d) and prefix.startswith("cells.")
            for name in ("weight", "bias")
        }
        state = network.state_dict()
        assert {name: t.shape for name, t in state.items() if name not in affine}.items() <= shapes.items()
        assert not affine & set(shapes)


@pytest.mark.parametrize("space", [TINY, MERGED], ids=lambda space: space.supernet_form)
def test_path_equals_built_network(space: Bats) -> None:
    torch.manual_seed(0)
    supernet = space.supernet().double()
    _randomise(supernet)
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    rng = np.random.default_rng(0)
    for architecture in (space.paper_genes(), space.sample(rng), space.sample(rng)):
        network = space.inherit(space.build(architecture).double(), None, supernet.state_dict())
        set_binarisation(network, weights=False)
        relaxed = {name: weights.double() for name, weights in space.relax(architecture).items()}
        torch.testing.assert_close(network.train()(x), supernet.train()(x, relaxed))


def _randomise(supernet: nn.Module) -> None:
    """Scales and slopes away from their first values."""
    with torch.no_grad():
        for name, parameter in supernet.named_parameters():
            if name.endswith(("scale", "activation.weight")):
                parameter.normal_()


class _Plain(Bats):
    """Every operation by itself, with a BatchNorm of its own."""

    def mix(self, x: Tensor, uses: Mapping[int, Sequence[Use]]) -> Mapping[int, Tensor]:
        return mix(x, uses)

    def tie(self, operations: Sequence[nn.Module]) -> None:
        pass


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shuffle", "partial", "keep"), [(1, 1, False), (2, 2, False), (1, 1, True)])
def test_supernet_computes_what_the_plain_one_does(
    shuffle: int, partial: int, keep: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    # 15 pixels: odd, so that the factorised reduces pad.
    settings = {"cells": 3, "channels": 8, "groups": 2, "in_channels": 1, "classes": 5, "shuffle": shuffle}
    spaces = Bats(**settings), _Plain(**settings)  # type: ignore[arg-type]
    x, labels = torch.randn(4, 1, 15, 15, dtype=torch.float64).contiguous(memory_format=layout), torch.arange(4)
    logits = {name: torch.randn(8, dtype=torch.float64) for name in spaces[0].choices}
    kept = {name: OPERATIONS[i % 3 :: 2] for i, name in enumerate(logits)} if keep else {}
    alive = {name: torch.tensor([o in kept.get(name, OPERATIONS) for o in OPERATIONS]) for name in logits}
    supernets = [space.supernet(kept, partial).double().to(memory_format=layout) for space in spaces]  # type: ignore[call-overload]
    _randomise(supernets[0])
    supernets[1].load_state_dict(supernets[0].state_dict())
    for training in (True, False):
        results = []
        for supernet in supernets:
            alphas = {name: alpha.clone().requires_grad_() for name, alpha in logits.items()}
            relaxed = {name: torch.softmax(alpha, 0) * alive[name] for name, alpha in alphas.items()}
            output = supernet.train(training)(x, relaxed)
            supernet.zero_grad()
            nn.functional.cross_entropy(output, labels).backward()
            results.append(
                (
                    output,
                    {name: parameter.grad for name, parameter in supernet.named_parameters()},
                    {name: alpha.grad for name, alpha in alphas.items()},
                    dict(supernet.named_buffers(remove_duplicate=False)),
                )
            )
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_merged_supernet_has_one_slope_an_edge_under_every_name() -> None:
    supernet = MERGED.supernet()
    assert list(supernet.state_dict()) == list(TINY.supernet().state_dict())
    saved = sum(p.numel() for p in TINY.supernet().parameters()) - sum(p.numel() for p in supernet.parameters())
    # Three of four slopes per channel, on 14 edges of cells of 4, 8 and 16 channels.
    assert saved == 3 * 14 * (4 + 8 + 16)
    supernet.load_state_dict(TINY.supernet().state_dict())
    twin = copy.deepcopy(supernet)
    edge = twin.cells[0].edges["node2_from0"]
    assert edge["gconv_3x3"].activation is edge["dil_gconv_5x5"].activation
    assert edge["gconv_3x3"].activation is not twin.cells[0].edges["node3_from0"]["gconv_3x3"].activation
    assert edge["gconv_3x3"].norm is twin.cells[0].edges["node5_from0"]["dil_gconv_5x5"].norm


def test_merged_is_another_mixture() -> None:
    torch.manual_seed(0)
    supernets = TINY.supernet(), MERGED.supernet()
    supernets[1].load_state_dict(supernets[0].state_dict())
    even = {name: torch.full((8,), 1 / 8) for name in TINY.choices}
    x = torch.randn(2, 1, 16, 16)
    paper, merged = (supernet(x, even) for supernet in supernets)
    assert not torch.allclose(paper, merged)


def test_supernet_is_binary_in_activations_only() -> None:
    supernet = TINY.supernet()
    layers = [m for m in supernet.modules() if isinstance(m, BinaryConv2d)]
    assert layers
    assert all(m.binary_activations and not m.binary_weights for m in layers)
    cells = [m for name, m in supernet.named_modules() if isinstance(m, nn.BatchNorm2d) and name.startswith("cells")]
    assert cells
    assert not any(m.affine for m in cells)


def test_supernet_mixes_by_weight() -> None:
    torch.manual_seed(0)
    supernet = TINY.supernet().eval()
    x = torch.randn(2, 1, 16, 16)
    relaxed = TINY.relax(TINY.paper_genes())
    halves = {name: torch.full((8,), 1 / 8) for name in relaxed}
    assert not torch.allclose(supernet(x, relaxed), supernet(x, halves))
    # What has no weight is not computed, and so gets no gradient.
    supernet(x, relaxed).sum().backward()
    learnt = {name for name, p in supernet.named_parameters() if name.endswith("conv.weight") and p.grad is not None}
    assert {name for name in learnt if ".edges." in name} == {
        f"cells.{index}.edges.{node}_{source}.{option}.conv.weight"
        for index, cell in enumerate(supernet.cells)
        for (kind, node, source), option in ((name.split("/"), option) for name, option in PAPER_GENES.items())
        if kind == cell.kind and "gconv" in option
    }


def test_supernet_with_a_node_that_has_no_edge() -> None:
    supernet = TINY.supernet().eval()
    relaxed = {name: torch.eye(8)[0] for name in TINY.choices}
    assert torch.isfinite(supernet(torch.randn(2, 1, 14, 14), relaxed)).all()


def test_keep_drops_weights_and_refuses_to_use_them() -> None:
    names = list(TINY.choices)
    part = TINY.supernet(keep={name: ("zero", "identity") for name in names})
    assert not [name for name in part.state_dict() if "gconv" in name]
    x = torch.randn(2, 1, 16, 16)
    assert part(x, {name: torch.eye(8)[3] for name in names}).shape == (2, 5)
    with pytest.raises(InvalidInputError, match=r"normal/node2/from0 gives weight to gconv_3x3.*keeps zero, identity"):
        part(x, {name: torch.eye(8)[4] for name in names})
    with pytest.raises(InvalidInputError, match="lacks weights for reduction/node5/from4"):
        part(x, {name: torch.eye(8)[3] for name in names[:-1]})


def test_supernet_arguments_are_checked() -> None:
    with pytest.raises(InvalidInputError, match=r"partial is 4; legal: 1, 2 \(channels=4\)"):
        TINY.supernet(partial=4)
    with pytest.raises(InvalidInputError, match="keep names 'normal'"):
        TINY.supernet(keep={"normal": ("zero",)})
    with pytest.raises(InvalidInputError, match="legal: one or more of zero"):
        TINY.supernet(keep={"normal/node2/from0": ("conv",)})


def test_inherit_refuses_another_architecture() -> None:
    rng = np.random.default_rng(0)
    a, b = TINY.sample(rng), TINY.sample(rng)
    with pytest.raises(InvalidInputError, match="missing"):
        TINY.inherit(TINY.build(a), b, TINY.build(b).state_dict())
    twin = TINY.inherit(TINY.build(a), a, (state := TINY.build(a).state_dict()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in twin.state_dict().items())


def test_build_refuses_genes_of_another_space() -> None:
    with pytest.raises(ArchitectureError):
        TINY.build(Bats(cells=1, channels=4, groups=2).paper_genes())


def test_auxiliary_classifier_lives_in_training_only() -> None:
    space = Bats.small(auxiliary=True, channels=4)
    torch.manual_seed(0)
    network = space.build(space.paper_genes())
    x = torch.randn(2, 1, 16, 16)
    assert network.eval()(x).shape == (2, 10)
    assert network.auxiliary == ()
    logits = network.train()(x)
    assert [extra.shape for extra in network.auxiliary] == [(2, 10)]
    assert network.auxiliary_weight == 0.4
    (logits.sum() + network.auxiliary_weight * network.auxiliary[0].sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin.auxiliary == ()
    # The supernet has no auxiliary classifier: the built network keeps its own.
    own = network.auxiliary_head.classifier.weight.detach().clone()
    space.inherit(network, None, space.supernet().state_dict())
    assert torch.equal(network.auxiliary_head.classifier.weight, own)


def test_trains() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 5
    images = torch.randn(5, 1, 16, 16)[labels] + 0.3 * torch.randn(40, 1, 16, 16)
    network = TINY.build(TINY.paper_genes()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("shuffle", [1, 2])
def test_torch_export_takes_any_batch(shuffle: int) -> None:
    space = Bats.small(cells=2, channels=4, shuffle=shuffle)
    torch.manual_seed(0)
    network = space.build(space.paper_genes()).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.randn(2, 1, 16, 16),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(program.module()(x), network(x))


def test_onnx_export_computes_the_same(tmp_path: object) -> None:
    import onnxruntime

    torch.manual_seed(0)
    space = Bats.small(cells=2, channels=4, stem_stride=1)
    # With an identity at stride 2: on the 7 pixels of a side it pads.
    genes = {**PAPER_GENES, "reduction/node2/from0": "identity"}
    network = space.build(space.published(genes)).eval()
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network, (torch.randn(2, 1, 7, 7),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    file = f"{tmp_path}/bats.onnx"
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 1, 7, 7)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(x).detach(), rtol=1e-3, atol=1e-3)
