import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.errors import ArchitectureError, InvalidInputError
from nasplat.nn import BinaryConv2d, set_binarisation
from nasplat.space import SearchSpace
from nasplat.testing.space_contract import SpaceContract
from search_spaces import Bats
from search_spaces.bats import OPERATIONS, PAPER_GENES

TINY = Bats(cells=3, channels=4, groups=2, in_channels=1, classes=5, stem_stride=2)


class TestBatsContract(SpaceContract):
    samples = 8
    builds = 2

    @pytest.fixture
    def space(self) -> SearchSpace:
        return TINY

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


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


def test_path_equals_built_network_exactly() -> None:
    torch.manual_seed(0)
    supernet = TINY.supernet()
    x = torch.randn(3, 1, 28, 28)
    rng = np.random.default_rng(0)
    for architecture in (TINY.paper_genes(), TINY.sample(rng), TINY.sample(rng)):
        network = TINY.inherit(TINY.build(architecture), None, supernet.state_dict())
        set_binarisation(network, weights=False)
        assert torch.equal(network.train()(x), supernet.train()(x, TINY.relax(architecture)))


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
    seen: list[str] = []
    for name, module in supernet.named_modules():
        if name.rpartition(".")[2] in OPERATIONS:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    supernet(x, relaxed)
    assert len(seen) == 3 * 8
    assert all(f"{name.rpartition('.')[2]}" in PAPER_GENES.values() for name in seen)


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
    labels = torch.arange(64) % 5
    images = torch.randn(5, 1, 16, 16)[labels] + 0.3 * torch.randn(64, 1, 16, 16)
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
    space = Bats.small(channels=4, shuffle=shuffle)
    torch.manual_seed(0)
    network = space.build(space.paper_genes()).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.randn(2, 1, 16, 16),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(program.module()(x), network(x))


def test_onnx_export_computes_the_same(tmp_path: object) -> None:
    import onnxruntime

    torch.manual_seed(0)
    space = Bats.small(channels=4, stem_stride=1)
    network = space.build(space.paper_genes()).eval()
    batch = torch.export.Dim("batch")
    # 14 pixels: odd after the first reduction, so the factorised reduce pads.
    program = torch.onnx.export(
        network, (torch.randn(2, 1, 14, 14),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    file = f"{tmp_path}/bats.onnx"
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 1, 14, 14)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(x).detach(), rtol=1e-3, atol=1e-3)
