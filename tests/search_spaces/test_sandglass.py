import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nasplat.architecture import Architecture
from nasplat.cost.count import count
from nasplat.drawing import Stages
from nasplat.errors import ArchitectureError, InvalidInputError, UnsupportedError
from nasplat.identity import describe, restore, type_name
from nasplat.nn.mobile import ConvNorm, InvertedResidual, SandglassBlock
from nasplat.space import SearchSpace
from nasplat.testing.space_contract import SpaceContract
from search_spaces.sandglass import MOBILENEXT, Sandglass, Stage

TINY = Sandglass(
    stages=(Stage(16, 1, (2, 3), (2, 4)), Stage(32, 2, (1,), (2, 3))), stem=8, stem_stride=1, in_channels=1, classes=5
)
# Every case of the authors' code: the first block of all, a stage of one block at either stride, and longer ones.
CODE = Sandglass(
    stages=(
        Stage(16, 2, (1,), (2,)),
        Stage(48, 1, (1,), (2, 3)),
        Stage(32, 1, (2,), (2, 4)),
        Stage(48, 2, (2, 3), (2,)),
    ),
    variant="code",
    in_channels=1,
    classes=5,
)


class TestSandglassContract(SpaceContract):
    samples = 8
    builds = 3

    @pytest.fixture
    def space(self) -> SearchSpace:
        return TINY

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def example() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def mixed(space: Sandglass, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.softmax(torch.randn(len(options), generator=generator), 0).to(dtype)
        for name, options in space.choices.items()
    }


def with_genes(space: Sandglass, **genes: Any) -> Architecture:
    """The first option of each choice, but for those named, in every stage that offers them."""
    chosen = {name: options[0] for name, options in space.choices.items()}
    for name, option in genes.items():
        chosen.update({key: option for key in chosen if key.endswith(f"/{name}") and option in space.choices[key]})
    return space.architecture(chosen)


# The paper's network.


@pytest.mark.parametrize(
    ("width", "millions", "madds", "params", "macs"),
    [
        (1.4, 6.13, 588, 6_126_168, 588_319_256),
        (1.0, 3.54, 311, 3_535_416, 311_342_592),
        (0.75, 2.77, 208, 2_766_168, 207_926_720),
        (0.5, 2.15, 103, 2_152_304, 103_256_448),
        (0.35, 1.91, 75, 1_913_976, 75_141_032),
    ],
)
def test_mobilenext_has_its_stated_size(width: float, millions: float, madds: int, params: int, macs: int) -> None:
    space = Sandglass.imagenet(width)
    with torch.device("meta"):
        counts = count(space.build(space.mobilenext()), torch.randn(1, 3, 224, 224))
    assert (counts.params, counts.macs) == (params, macs)
    assert (round(params / 1e6, 2), round(macs / 1e6)) == (millions, madds)
    assert counts.uncounted == ()


def test_mobilenext_is_twenty_blocks_of_its_table() -> None:
    space = Sandglass.imagenet()
    architecture = space.mobilenext()
    with torch.device("meta"):
        network = space.build(architecture)
        blocks = [module for module in network.modules() if isinstance(module, SandglassBlock)]
        x = network.stem(torch.randn(1, 3, 224, 224))
        shapes = [tuple((x := stage(x)).shape[1:]) for stage in network.stages]
    assert len(blocks) == 20
    assert shapes == [
        (96, 56, 56),
        (144, 56, 56),
        (192, 28, 28),
        (288, 14, 14),
        (384, 14, 14),
        (576, 7, 7),
        (960, 7, 7),
        (1280, 7, 7),
    ]
    assert network.dropout.p == 0.2
    # Which blocks lack which depthwise convolution: the first of each longer stage, the strided ones keep the last.
    kept = [(isinstance(block.first, ConvNorm), isinstance(block.last, ConvNorm)) for block in blocks]
    dropped = {index: pair for index, pair in enumerate(kept) if pair != (True, True)}
    assert dropped == {2: (False, True), 5: (False, True), 8: (False, False), 12: (False, True), 16: (False, False)}
    shortcuts = [block.shortcut_channels for block in blocks]
    assert shortcuts == [0, 0, 0, 192, 192, 0, 288, 288, 0, *[384] * 3, 0, *[576] * 3, 0, 960, 960, 0]


def test_mobilenext_of_the_papers_block_is_smaller() -> None:
    # With the plain formula no middle has a floor.
    space = Sandglass.imagenet(variant="paper")
    with torch.device("meta"):
        counts = count(space.build(space.mobilenext()), torch.randn(1, 3, 224, 224))
    assert counts.params == 3_305_720


def test_mobilenext_is_refused_elsewhere() -> None:
    with pytest.raises(InvalidInputError, match="needs the stages of MobileNeXt"):
        TINY.mobilenext()
    with pytest.raises(InvalidInputError, match=r"has the kernel 3 in stage1, this space offers \(5, 7\)"):
        Sandglass.imagenet(kernels=(5, 7)).mobilenext()


@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (0.35, [16, 32, 48, 64, 104, 136, 200, 336, 1280, 0]),
        (1.4, [48, 136, 200, 272, 400, 536, 808, 1344, 1792, 0]),
    ],
)
def test_last_stage_is_not_shrunk(width: float, channels: list[int]) -> None:
    space = Sandglass.imagenet(width)
    assert [block.channels for block in sketch_blocks(space, space.mobilenext())] == channels


# Choices.


def test_choices_are_named_by_stage() -> None:
    assert TINY.choices == {
        "stage1/block": ("sandglass", "sandglass_id0.5", "inverted_residual"),
        "stage1/kernel": (3, 5),
        "stage1/reduction": (2, 4),
        "stage1/depth": (2, 3),
        "stage1/width": (0.5, 1.0),
        # One block: no shortcut, so no identity multiplier, and no choice of depth.
        "stage2/block": ("sandglass", "inverted_residual"),
        "stage2/kernel": (3, 5),
        "stage2/reduction": (2, 3),
        "stage2/width": (0.5, 1.0),
    }
    assert TINY.size() == 48 * 16


def test_interactions_are_the_choices_of_a_stage() -> None:
    assert [name for names in TINY.interactions() for name in names] == list(TINY.choices)
    assert [len(names) for names in TINY.interactions()] == [5, 4]


def test_presets() -> None:
    assert Sandglass.small() == Sandglass(in_channels=1)
    assert Sandglass.small(classes=7).classes == 7
    assert Sandglass.imagenet(width=1) == Sandglass.imagenet()
    assert Sandglass.imagenet(width=1).identity == Sandglass.imagenet().identity
    assert Sandglass.imagenet(0.5).width_multiplier == 0.5
    assert Sandglass.imagenet().choices["stage5/depth"] == (3, 4, 5)
    assert "stage1/reduction" not in Sandglass.imagenet().choices
    assert [(stage.channels, stage.stride) for stage in Sandglass.imagenet().stages] == [
        (channels, stride) for _, channels, _, stride in MOBILENEXT
    ]


def test_description_restores_the_space() -> None:
    description = json.loads(json.dumps(describe(CODE)))
    again = restore(description, {type_name(kind): kind for kind in (Sandglass, Stage)})
    assert again == CODE
    assert again.identity == CODE.identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": ()}, r"stages is \(\); legal: one or more Stage"),
        ({"stages": ((16, 1, (2,)),)}, "legal: one or more Stage"),
        ({"kernels": (3, 4)}, "kernels is .*legal: odd"),
        ({"kernels": (3, 3)}, "kernels is .*all different"),
        ({"widths": ()}, "widths is .*one or more"),
        ({"widths": (0.9, 1.0)}, r"give stage1 the channels \[16, 16\].*legal: widths further apart"),
        ({"widths": (-1.0, 1.0)}, "legal: widths above 0"),
        ({"identities": (0.0, 1.0)}, "legal: above 0 up to 1"),
        ({"variant": "both"}, "variant is 'both'; legal: 'paper', 'code'"),
        ({"stem": 0}, "stem is 0; legal: an integer from 1 up"),
        ({"classes": True}, "classes is True; legal"),
        ({"stem_stride": 4}, "stem_stride is 4; legal: 1, 2"),
        ({"dropout": 1.0}, "dropout 1.0; legal.*below 1"),
        ({"width_multiplier": 0.0}, "width_multiplier is 0.0"),
        ({"stages": 5}, "stages is 5; legal: a tuple or list"),
        ({"kernels": 3}, "kernels is 3; legal: a tuple or list"),
        ({"kernels": ("3",)}, "kernels is .*legal: one or more numbers"),
        ({"kernels": (3.0,)}, "kernels is .*legal: odd integers"),
        ({"widths": ("1",)}, "widths is .*legal: one or more numbers"),
        ({"dropout": "a"}, "dropout 'a'; legal"),
    ],
)
def test_bad_parameters_say_what_is_legal(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(TINY, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 3, (2,)), "stride 3; legal"),
        ((0, 1, (2,)), "channels is 0"),
        ((16, 1, (1, 2)), r"depths is \(1, 2\); legal: \(1,\), or different integers from 2 up"),
        ((16, 1, ()), r"depths is \(\)"),
        ((16, 1, 2), "depths is 2; legal: a tuple or list"),
        ((16.5, 1, (2,)), "channels is 16.5"),
        ((16, 1, (2.5, 3)), r"depths is \(2.5, 3\); legal"),
        ((16, 1, (2,), (1, 2)), r"reductions is \(1, 2\); legal: different integers from 2 up"),
    ],
)
def test_bad_stages_say_what_is_legal(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Stage(*arguments)


# Built networks.


def test_genes_are_what_is_built() -> None:
    genes = {name: options[-1] for name, options in TINY.choices.items()} | {"stage1/block": "sandglass_id0.5"}
    network = TINY.build(TINY.architecture(genes))
    first, second, third = (m for m in network.modules() if isinstance(m, SandglassBlock))
    (last,) = (m for m in network.modules() if isinstance(m, InvertedResidual))
    assert [block.shortcut_channels for block in (first, second, third)] == [0, 8, 8]
    assert [tuple(block.reduce.conv.weight.shape[:2]) for block in (first, second)] == [(2, 8), (4, 16)]
    assert second.last.conv.kernel_size == (5, 5)
    assert (last.depthwise.conv.in_channels, last.depthwise.conv.stride, last.shortcut) == (48, (2, 2), False)
    assert network.classifier.in_features == 32


def test_first_block_of_a_stage_has_no_shortcut_even_at_equal_width() -> None:
    # The stem, and so the input of the first stage, is as wide as the narrow first stage.
    for option in ("sandglass", "inverted_residual"):
        network = TINY.build(with_genes(TINY, block=option))
        blocks = [m for m in network.modules() if isinstance(m, SandglassBlock | InvertedResidual)]
        flags = [bool(getattr(block, "shortcut_channels", 0) or getattr(block, "shortcut", 0)) for block in blocks]
        assert flags == [False, True, False]


def test_build_refuses_genes_of_another_space() -> None:
    with pytest.raises(ArchitectureError):
        TINY.build(with_genes(CODE))


def sketch_blocks(space: Sandglass, architecture: Architecture) -> list[Any]:
    (stages,) = space.sketch(architecture)
    assert isinstance(stages, Stages)
    return list(stages.blocks)


def test_sketch() -> None:
    genes = with_genes(TINY, block="sandglass_id0.5", width=1.0, depth=3).genes
    blocks = sketch_blocks(TINY, TINY.architecture({**genes, "stage2/block": "inverted_residual"}))
    assert [block.name for block in blocks] == ["stem", "stage 1", "stage 2", "classifier"]
    assert blocks[1].lines == ("sandglass", "kernel 3x3", "reduction 2", "identity 0.5", "width 1")
    assert (blocks[1].channels, blocks[1].repeats, blocks[1].stride) == (16, 3, 1)
    assert blocks[2].lines == ("inverted residual", "kernel 3x3", "expansion 2", "width 1")
    assert (blocks[2].channels, blocks[2].repeats, blocks[2].stride) == (32, 1, 2)


def test_trains() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 5
    images = torch.randn(5, 1, 8, 8)[labels] + 0.3 * torch.randn(64, 1, 8, 8)
    network = TINY.build(with_genes(TINY, width=1.0))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_torch_export_takes_any_batch() -> None:
    torch.manual_seed(0)
    network = TINY.build(with_genes(TINY, block="sandglass_id0.5")).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), network(x))


# The supernet.


@pytest.mark.parametrize("space", [TINY, CODE], ids=["paper", "code"])
def test_path_equals_built_network(space: Sandglass) -> None:
    torch.manual_seed(0)
    supernet = space.supernet()
    rng = np.random.default_rng(0)
    x = example()
    for _ in range(5):
        architecture = space.sample(rng)
        network = space.inherit(space.build(architecture), None, supernet.state_dict())
        # Both with statistics of the batch, and no affine parameters away from 1 and 0.
        torch.testing.assert_close(
            supernet.train()(x, space.relax(architecture)), network.train()(x), rtol=1e-4, atol=1e-5
        )
        assert all(name in supernet.state_dict() or "norm" in name for name in network.state_dict())


def test_inherits_first_channels_and_centres_of_kernels() -> None:
    state = TINY.supernet().state_dict()
    small = with_genes(TINY)
    network = TINY.inherit(TINY.build(small), None, state)
    own = network.state_dict()
    prefix = "stages.0.sandglass.1"
    assert state[f"{prefix}.last.conv.weight"].shape == (16, 1, 5, 5)
    assert torch.equal(own[f"{prefix}.last.conv.weight"], state[f"{prefix}.last.conv.weight"][:8, :, 1:4, 1:4])
    assert torch.equal(own[f"{prefix}.reduce.conv.weight"], state[f"{prefix}.reduce.conv.weight"][:4, :8])
    assert torch.equal(own["classifier.weight"], state["classifier.weight"][:, :16])
    part = {name: tensor for name, tensor in state.items() if not name.startswith("stages.0.sandglass.1")}
    with pytest.raises(InvalidInputError, match="missing"):
        TINY.inherit(TINY.build(small), None, part)
    with pytest.raises(InvalidInputError, match=r"stages.0.sandglass.0.expand.conv.weight .*: has"):
        TINY.inherit(TINY.build(with_genes(TINY, width=1.0)), small, TINY.build(small).state_dict())


def test_one_feature_map_however_many_options() -> None:
    """Each convolution of the largest network runs once, whatever is mixed."""
    supernet = TINY.supernet().eval()
    seen: list[str] = []
    for name, module in supernet.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "stages" in name:
            layer = supernet.get_submodule(name.rpartition(".")[0])
            layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    supernet(example(), mixed(TINY))
    assert len(seen) == len(set(seen)) == (4 + 3) * (3 + 1)
    seen.clear()
    supernet(example(), TINY.relax(with_genes(TINY)))
    assert len(seen) == 4 * (2 + 1)


ONE_STAGE = Sandglass(
    stages=(Stage(16, 2, (2, 3), (2, 4)),), stem=8, stem_stride=1, in_channels=1, classes=3, kernels=(1, 3)
)


def reference(supernet: nn.Module, x: Tensor, relaxed: dict[str, Tensor]) -> Tensor:
    """The mixture of ``ONE_STAGE`` in evaluation mode, written out option by option and channel by channel."""
    space = ONE_STAGE
    state = supernet.state_dict()
    weights = {
        name.partition("/")[2]: list(zip(options, relaxed[name], strict=True))
        for name, options in space.choices.items()
    }
    channels = {0.5: 8, 1.0: 16}

    def at_least(sizes: list[tuple[int, Tensor]], length: int) -> Tensor:
        return torch.stack([sum((w for size, w in sizes if c < size), x.new_zeros(())) for c in range(length)])

    def layer(x: Tensor, name: str, mask: Tensor, *, stride: int = 1, relu: bool = True) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        if weight.shape[-1] == 3:
            # The 1x1 kernel in a 3x3 one is its centre; the two are mixed as kernels.
            centre = torch.zeros_like(weight)
            centre[:, :, 1, 1] = weight[:, :, 1, 1]
            weight = sum(w * (centre if k == 1 else weight) for k, w in weights["kernel"])
        groups = weight.shape[0] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
        y = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        mean, variance = (state[f"{name}.norm.running_{kind}"].view(-1, 1, 1) for kind in ("mean", "var"))
        y = (y - mean) / torch.sqrt(variance + 1e-5)
        return (y.clamp(0, 6) if relu else y) * mask.view(-1, 1, 1)

    x = supernet.stem(x)
    blocks = dict(weights["block"])
    out = at_least([(channels[w], p) for w, p in weights["width"]], 16)
    result = torch.zeros(())
    for position in range(3):
        stride = 2 if position == 0 else 1
        inputs = x.new_ones(8) if position == 0 else out
        narrow, wide = [], []
        for w, p in weights["width"]:
            before = 8 if position == 0 else channels[w]
            narrow += [(before // t, p * q) for t, q in weights["reduction"]]
            wide += [(before * t, p * q) for t, q in weights["reduction"]]
        prefix = f"stages.0.sandglass.{position}"
        y = layer(x, f"{prefix}.first", inputs)
        middle = at_least(narrow, state[f"{prefix}.reduce.conv.weight"].shape[0])
        y = layer(layer(y, f"{prefix}.reduce", middle, relu=False), f"{prefix}.expand", out)
        sandglass = layer(y, f"{prefix}.last", out, stride=stride, relu=False)
        prefix = f"stages.0.inverted_residual.{position}"
        middle = at_least(wide, state[f"{prefix}.expand.conv.weight"].shape[0])
        y = layer(layer(x, f"{prefix}.expand", middle), f"{prefix}.depthwise", middle, stride=stride)
        residual = layer(y, f"{prefix}.project", out, relu=False)
        y = (blocks["sandglass"] + blocks["sandglass_id0.5"]) * sandglass + blocks["inverted_residual"] * residual
        if position:
            # Of the channels that are there, those whose shortcut is.
            half = at_least([(channels[w] // 2, p) for w, p in weights["width"]], 16) / out.clamp(min=1e-9)
            share = blocks["sandglass"] + blocks["inverted_residual"] + blocks["sandglass_id0.5"] * half
            y = y + x * share.view(-1, 1, 1)
        x = y
        result = result + dict(weights["depth"]).get(position + 1, 0.0) * x
    return supernet.classifier(result.mean((2, 3)))


def one_stage_supernet() -> nn.Module:
    torch.manual_seed(0)
    supernet = ONE_STAGE.supernet().double()
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 1.0)
    return supernet.eval()


def test_mixture_is_what_its_masks_say() -> None:
    supernet, x = one_stage_supernet(), example().double()
    for seed in range(3):
        relaxed = mixed(ONE_STAGE, seed, torch.float64)
        torch.testing.assert_close(supernet(x, relaxed), reference(supernet, x, relaxed))
    # Zeros among the weights: what they belong to is not computed.
    relaxed["stage1/block"] = torch.tensor([0.0, 0.6, 0.4]).double()
    relaxed["stage1/kernel"] = torch.tensor([1.0, 0.0]).double()
    relaxed["stage1/reduction"] = torch.tensor([1.0, 0.0]).double()
    relaxed["stage1/width"] = torch.tensor([1.0, 0.0]).double()
    torch.testing.assert_close(supernet(x, relaxed), reference(supernet, x, relaxed))


def test_gradients_of_the_weights_of_options() -> None:
    supernet, x = one_stage_supernet(), example().double()[:2]
    relaxed = mixed(ONE_STAGE, 5, torch.float64)

    def logits(*weights: Tensor) -> Tensor:
        return supernet(x, dict(zip(relaxed, weights, strict=True)))

    assert torch.autograd.gradcheck(logits, [weight.requires_grad_() for weight in relaxed.values()], atol=1e-6)


@pytest.mark.parametrize("space", [TINY, CODE], ids=["paper", "code"])
def test_a_path_changes_the_statistics_of_what_it_uses_alone(space: Sandglass) -> None:
    supernet = space.supernet().train()
    norms = {n: m for n, m in supernet.named_modules() if isinstance(m, nn.BatchNorm2d) and n.startswith("stages")}
    assert not any(norm.affine for norm in norms.values())
    path = with_genes(space, reduction=4)
    supernet(example(), space.relax(path))
    held = space.inherit(space.build(path), None, supernet.state_dict()).state_dict()
    for name, norm in norms.items():
        used = len(held.get(f"{name}.running_mean", ()))
        assert (norm.running_var[:used] != 1).all()
        assert (norm.running_var[used:] == 1).all()


def test_keep_drops_weights_and_refuses_to_use_them() -> None:
    part = TINY.supernet(keep={"stage1/block": ("sandglass",), "stage1/width": (0.5,), "stage1/kernel": (3,)})
    state = part.state_dict()
    assert not [name for name in state if name.startswith("stages.0.inverted_residual")]
    assert state["stages.0.sandglass.0.last.conv.weight"].shape == (8, 1, 3, 3)
    assert state["stages.1.sandglass.0.first.conv.weight"].shape == (8, 1, 5, 5)
    kept = with_genes(TINY)
    assert part(example(), TINY.relax(kept)).shape == (4, 5)
    TINY.inherit(TINY.build(kept), None, state)
    with pytest.raises(InvalidInputError, match=r"stage1/width gives weight to 1.0; this supernet keeps 0.5"):
        part(example(), TINY.relax(with_genes(TINY, width=1.0)))


def test_supernet_arguments_are_checked() -> None:
    with pytest.raises(UnsupportedError, match="partial is 4; legal: 1"):
        TINY.supernet(partial=4)
    with pytest.raises(InvalidInputError, match="keep names 'stage1/size'"):
        TINY.supernet(keep={"stage1/size": (1,)})
    with pytest.raises(InvalidInputError, match=r"keep\['stage1/kernel'\] is \(7,\); legal: one or more of 3, 5"):
        TINY.supernet(keep={"stage1/kernel": (7,)})
    relaxed = TINY.relax(with_genes(TINY))
    with pytest.raises(InvalidInputError, match="lacks weights for stage2/width"):
        TINY.supernet()(example(), {name: weight for name, weight in relaxed.items() if name != "stage2/width"})
    with pytest.raises(InvalidInputError, match="stage1/kernel gives weight to nothing"):
        TINY.supernet()(example(), {**relaxed, "stage1/kernel": torch.zeros(2)})


def test_supernet_of_the_paper_size_holds_mobilenext() -> None:
    space = Sandglass.imagenet()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in space.supernet().state_dict().items()}
        network = space.build(space.mobilenext())
    for name, tensor in network.state_dict().items():
        if not name.startswith("stages") or "norm" not in name or "running" in name:
            assert all(have >= want for have, want in zip(shapes[name], tensor.shape, strict=True)), name
