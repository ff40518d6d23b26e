import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.cost import CostTable
from nasplat.cost.count import count
from nasplat.drawing import Stages
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn.meta_kernel import Nothing, SplitConv2d
from nasplat.space import SearchSpace
from nasplat.testing.space_contract import SpaceContract
from search_spaces.meta_kernel import MetaKernel

TINY = MetaKernel.small(
    stages=((4, 2, 1), (8, 1, 2)), stem_channels=4, first_channels=4, head_channels=8, expansions=(2, 3), classes=5
)


class TestMetaKernelContract(SpaceContract):
    samples = 8
    builds = 3

    @pytest.fixture
    def space(self) -> SearchSpace:
        return TINY

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class TestMetaKernelOfPartsContract(TestMetaKernelContract):
    """Every feature at once: parts, depth, masks on one kernel, candidates without weights."""

    silent_options = ("zero",)
    test_same_id_in_another_process = None  # The same code as above, and it costs a process.

    @pytest.fixture
    def space(self) -> SearchSpace:
        return MetaKernel.small(
            stages=((4, 2, 1), (8, 1, 2)),
            stem_channels=4,
            first_channels=4,
            head_channels=8,
            kernels=("conv_3x3", "dil_conv_3x3_d2", "conv_1x5", "identity", "avg_pool_3x3", "zero"),
            expansions=(2, 3),
            classes=5,
            parts=2,
            skip=True,
            weight_sharing="shared",
        )


def test_choices_of_the_imagenet_network() -> None:
    space = MetaKernel.imagenet()
    choices = space.choices
    assert len(choices) == 42
    assert list(choices)[:3] == ["layer00/kernel", "layer00/expansion", "layer01/kernel"]
    assert choices["layer20/kernel"] == ("conv_3x3", "conv_5x5", "conv_7x7")
    assert choices["layer20/expansion"] == (3, 6)
    assert space.size() == 6**21
    assert space.interactions() == [(f"layer{i:02d}/kernel", f"layer{i:02d}/expansion") for i in range(21)]


def test_depth_is_offered_where_there_is_a_shortcut() -> None:
    choices = MetaKernel.imagenet(skip=True).choices
    skippable = [name for name, options in choices.items() if 0 in options]
    # Not the first of a stage of six, which changes the channels.
    assert len(skippable) == 15
    assert "layer00/expansion" not in skippable
    assert choices["layer01/expansion"] == (0, 3, 6)


def test_parts_have_choices_of_their_own_and_interact() -> None:
    space = MetaKernel.small(parts=2, kernels=("conv_3x3", "identity"))
    assert list(space.choices)[:3] == ["layer00/kernel/part0", "layer00/kernel/part1", "layer00/expansion"]
    assert space.interactions()[:2] == [
        ("layer00/kernel/part0", "layer00/expansion"),
        ("layer00/kernel/part1", "layer00/expansion"),
    ]
    # Layer 2 halves the image.
    assert space.choices["layer02/kernel/part1"] == ("conv_3x3",)
    assert space.choices["layer03/kernel/part1"] == ("conv_3x3", "identity")


def layer_macs(space: MetaKernel, kernel_area: int, expansion: int, side: int) -> tuple[int, int]:
    """Multiply-accumulates and parameters of the searched layers, by the formula."""
    macs = params = 0
    width = space.first_channels
    for channels, repeats, first_stride in space.stages:
        for index in range(repeats):
            hidden = width * expansion
            out = side // first_stride if index == 0 else side
            macs += side**2 * width * hidden + out**2 * hidden * (kernel_area + channels)
            params += hidden * (width + kernel_area + channels) + 2 * (2 * hidden + channels)
            width, side = channels, out
    return macs, params


@pytest.mark.parametrize(("kernel", "expansion"), [("dil_conv_3x3_d2", 3), ("conv_7x7", 6)])
def test_counts_of_the_imagenet_network(kernel: str, expansion: int) -> None:
    space = MetaKernel.imagenet(kernels=("conv_7x7", "dil_conv_3x3_d2"))
    genes = {name: kernel if name.endswith("kernel") else expansion for name in space.choices}
    with torch.device("meta"):
        counts = count(space.build(space.architecture(genes)), torch.empty(1, 3, 224, 224))
    macs, params = layer_macs(space, 49 if kernel == "conv_7x7" else 9, expansion, 112)
    # Stem; first block; head; classifier.
    macs += 112**2 * (27 * 32 + 9 * 32 + 32 * 16) + 7**2 * 320 * 1280 + 1280 * 1000
    params += 27 * 32 + 64 + 9 * 32 + 64 + 32 * 16 + 32 + 320 * 1280 + 2560 + 1280 * 1000 + 1000
    assert (counts.macs, counts.params) == (macs, params)
    assert not counts.uncounted


def test_a_built_network_holds_what_was_chosen_and_nothing_else() -> None:
    space = MetaKernel.small(
        parts=2, skip=True, kernels=("conv_3x3", "dil_conv_3x3_d2", "identity", "avg_pool_3x3", "zero")
    )
    genes = {name: "conv_3x3" if "kernel" in name else 3 for name in space.choices}
    genes |= {"layer00/kernel/part1": "dil_conv_3x3_d2", "layer01/expansion": 0, "layer02/kernel/part0": "zero"}
    genes |= {"layer03/kernel/part0": "identity", "layer03/kernel/part1": "avg_pool_3x3"}
    network = space.build(space.architecture(genes))
    assert isinstance(network.layers[1], nn.Identity)
    mixed = network.layers[0].depthwise.conv
    assert isinstance(mixed, SplitConv2d)
    assert [branch.dilation for branch in mixed.branches] == [(1, 1), (2, 2)]
    assert [tuple(branch.weight.shape) for branch in mixed.branches] == [(12, 1, 3, 3)] * 2
    assert isinstance(network.layers[2].depthwise.conv.branches[0], Nothing)
    assert [type(branch) for branch in network.layers[3].depthwise.conv.branches] == [nn.Identity, nn.AvgPool2d]
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_costs_are_sums_over_the_layers() -> None:
    space = MetaKernel.small(
        stages=((4, 2, 1),),
        stem_channels=4,
        first_channels=4,
        head_channels=4,
        parts=2,
        expansions=(2, 4),
        skip=True,
        kernels=("conv_3x3", "conv_1x5"),
    )
    table = CostTable.counted(space, torch.randn(1, 1, 4, 4), "macs")
    assert table.error < 1e-9
    assert [names for names, _ in table.terms] == [tuple(names) for names in space.interactions()]


def multi_path(space: MetaKernel, supernet: nn.Module, x: Tensor, relaxed: dict[str, Tensor]) -> Tensor:
    """Without normalisations: every path of every layer by itself, outputs mixed by the products of the weights."""
    x = supernet.first(supernet.stem(x))
    for index, layer in enumerate(supernet.layers):
        kernels, expansions = relaxed[f"layer{index:02d}/kernel"], relaxed[f"layer{index:02d}/expansion"]
        total = x if layer.shortcut else torch.zeros(())
        for kernel_weight, option in zip(kernels, layer.depthwise.options, strict=True):
            for weight, expansion in zip(expansions, layer.expansions, strict=True):
                hidden = x.shape[1] * expansion
                conv = nn.functional.conv2d(
                    nn.functional.conv2d(x, layer.expand.weight[:hidden]),
                    layer.depthwise.kernels[option][:hidden],
                    stride=x.shape[-1] // layer_size(x, index, space),
                    padding=int(option[-1]) // 2,
                    groups=hidden,
                )
                total = total + kernel_weight * weight * nn.functional.conv2d(conv, layer.project.weight[:, :hidden])
        x = total
    return supernet.classify(x)


def layer_size(x: Tensor, index: int, space: MetaKernel) -> int:
    strides = [s if i == 0 else 1 for _, repeats, s in space.stages for i in range(repeats)]
    return x.shape[-1] // strides[index]


def test_search_without_norms_learns_the_alphas_of_a_multi_path_supernet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without normalisations and activations inside the layers a mixture of paths is the meta block's, exactly, so both
    # supernets see the same gradients, step after step, and end at the same architecture.
    monkeypatch.setattr("nasplat.nn.leading.LeadingBatchNorm2d.forward", lambda norm, x: x)
    monkeypatch.setattr("nasplat.nn.meta_kernel.F.relu6", lambda x, inplace: x)
    found = []
    for forward in (lambda net, x, relaxed: net(x, relaxed), lambda *arguments: multi_path(TINY, *arguments)):
        torch.manual_seed(0)
        supernet = TINY.supernet().double()
        alphas = {
            name: torch.zeros(len(options), dtype=torch.float64, requires_grad=True)
            for name, options in TINY.choices.items()
        }
        x, y = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(5, (16,))
        optimiser = torch.optim.Adam([*supernet.parameters(), *alphas.values()], 0.02)
        for _ in range(8):
            optimiser.zero_grad()
            relaxed = {name: torch.softmax(alpha, 0) for name, alpha in alphas.items()}
            nn.functional.cross_entropy(forward(supernet, x, relaxed), y).backward()
            optimiser.step()
        found.append((TINY.discretise(alphas), alphas))
    assert found[0][0] == found[1][0]
    for name in TINY.choices:
        torch.testing.assert_close(found[0][1][name], found[1][1][name], rtol=1e-5, atol=1e-7)
    assert max(float(alpha.detach().abs().max()) for alpha in found[0][1].values()) > 0.01


@pytest.mark.parametrize("weight_sharing", ["separate", "shared"])
def test_inherits_from_a_supernet_of_fewer_options(weight_sharing: str) -> None:
    space = MetaKernel.small(
        parts=2, skip=True, kernels=("conv_3x3", "conv_5x5", "identity"), weight_sharing=weight_sharing
    )
    keep = {
        "layer00/kernel/part0": ("conv_5x5",),
        "layer00/kernel/part1": ("identity", "conv_5x5"),
        "layer01/expansion": (0,),
        "layer03/expansion": (0, 3),
    }
    torch.manual_seed(0)
    supernet = space.supernet(keep).eval()
    assert supernet.layers[3].expand.out_channels == 48
    genes = {name: keep.get(name, options)[-1] for name, options in space.choices.items()}
    architecture = space.architecture(genes)
    model = space.inherit(space.build(architecture), None, supernet.state_dict()).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(x), supernet(x, space.relax(architecture)))

    wide = space.build(space.architecture({**genes, "layer03/expansion": 6}))
    with pytest.raises(InvalidInputError, match="dropped expansion 6 of layer03"):
        space.inherit(wide, None, supernet.state_dict())
    if weight_sharing == "separate":
        other = space.build(space.architecture({**genes, "layer00/kernel/part0": "conv_3x3"}))
        with pytest.raises(InvalidInputError, match="no candidate 'conv_3x3'; legal: conv_5x5, identity"):
            space.inherit(other, None, supernet.state_dict())


def test_inherit_leaves_the_generator_and_the_supernet_alone() -> None:
    supernet = TINY.supernet()
    architecture = TINY.sample(np.random.default_rng(0))
    model = TINY.build(architecture)
    state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    generator = torch.get_rng_state()
    TINY.inherit(model, None, supernet.state_dict())
    assert torch.get_rng_state().equal(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(tensor.equal(state[name]) for name, tensor in supernet.state_dict().items())


def test_inherit_refuses_what_is_not_of_the_space() -> None:
    architecture = TINY.sample(np.random.default_rng(0))
    with pytest.raises(InvalidInputError, match="legal: what build made"):
        TINY.inherit(nn.Linear(1, 1), None, TINY.supernet().state_dict())
    with pytest.raises(InvalidInputError, match="not that of its supernet"):
        TINY.inherit(TINY.build(architecture), None, {})
    model = TINY.build(architecture)
    twin = TINY.build(architecture)
    TINY.inherit(twin, architecture, model.state_dict())
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in twin.state_dict().items())


def test_a_supernet_holds_one_feature_map_for_all_candidates() -> None:
    def saved(space: MetaKernel) -> int:
        supernet = space.supernet()
        own = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
        held: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        relaxed = {n: torch.softmax(torch.zeros(len(o)), 0).requires_grad_() for n, o in space.choices.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            supernet(torch.randn(8, 1, 8, 8), relaxed)
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    few = MetaKernel.small(kernels=("conv_5x5",), expansions=(6,))
    many = MetaKernel.small(
        kernels=("conv_5x5", "conv_3x3", "conv_1x5", "dil_conv_3x3_d2", "avg_pool_3x3"), expansions=(2, 3, 6)
    )
    assert saved(many) <= 1.01 * saved(few)


def test_keep_and_partial_are_checked() -> None:
    with pytest.raises(UnsupportedError, match="partial is 2; legal: 1"):
        TINY.supernet(partial=2)
    with pytest.raises(InvalidInputError, match="keep names 'layer09/kernel'"):
        TINY.supernet(keep={"layer09/kernel": ("conv_3x3",)})
    with pytest.raises(InvalidInputError, match="legal: one or more of 2, 3"):
        TINY.supernet(keep={"layer00/expansion": (6,)})
    part = TINY.supernet(keep={"layer00/kernel": ("conv_3x3",)})
    even = {name: torch.full((len(options),), 1 / len(options)) for name, options in TINY.choices.items()}
    with pytest.raises(InvalidInputError, match=r"gives weight to conv_5x5, conv_7x7; this supernet keeps conv_3x3"):
        part(torch.randn(2, 1, 8, 8), even)
    with pytest.raises(InvalidInputError, match="lacks weights for layer00/kernel"):
        part(torch.randn(2, 1, 8, 8), {name: weights for name, weights in even.items() if name != "layer00/kernel"})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"kernels": ("conv_3x3", "max_pool_3x3")}, UnsupportedError, "maximum is not linear"),
        ({"kernels": ("conv_3x3", "gconv_3x3_g2")}, UnsupportedError, "multiple of the layer's"),
        ({"kernels": ()}, InvalidInputError, "one or more different names"),
        ({"kernels": ("identity",)}, InvalidInputError, "layer02 has stride 2, and no kernel is left"),
        ({"expansions": (6, 3)}, InvalidInputError, "rising from 2 up"),
        ({"expansions": (1, 3)}, InvalidInputError, "rising from 2 up"),
        ({"stages": ()}, InvalidInputError, "one or more of each"),
        ({"stages": ((8, 0, 1),)}, InvalidInputError, r"legal: \(channels, layers, stride\)"),
        ({"parts": 3}, InvalidInputError, "does not divide the 8 channels that layer00 gets"),
        ({"parts": 0}, InvalidInputError, "an integer from 1 up"),
        ({"stages": 5}, InvalidInputError, "stages is 5; legal: a tuple or list"),
        ({"stages": (5,)}, InvalidInputError, "a stage is 5; legal: a tuple or list"),
        ({"stages": ((8.5, 1, 1),)}, InvalidInputError, "integers from 1 up"),
        ({"expansions": 6}, InvalidInputError, "expansions is 6; legal: a tuple or list"),
        ({"expansions": ("3",)}, InvalidInputError, "expansions integers rising from 2 up"),
        ({"expansions": (2.5,)}, InvalidInputError, "expansions integers rising from 2 up"),
        ({"kernels": (3, 5)}, InvalidInputError, r"kernels is \(3, 5\); legal: one or more different names"),
        ({"kernels": "conv_3x3"}, InvalidInputError, "kernels is 'conv_3x3'; legal: a tuple or list"),
        ({"skip": 3}, InvalidInputError, "skip is 3; legal: True, False"),
        ({"stem_stride": 4}, InvalidInputError, "stem_stride is 4"),
        ({"weight_sharing": "both"}, InvalidInputError, "legal: 'separate', 'shared'"),
    ],
)
def test_wrong_parameters_are_refused(overrides: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MetaKernel.small(**overrides)


def test_sketch_shows_the_layers_that_are_there() -> None:
    space = MetaKernel.small(skip=True, parts=2)
    genes = {name: "conv_3x3" if "kernel" in name else 6 for name in space.choices}
    genes |= {"layer01/expansion": 0, "layer02/kernel/part1": "conv_5x5"}
    (stages,) = space.sketch(space.architecture(genes))
    assert isinstance(stages, Stages)
    assert [block.name for block in stages.blocks] == ["stem", "first", "layer00", "layer02", "layer03", "head"]
    assert stages.blocks[2].lines == ("conv_3x3", "expansion 6")
    assert stages.blocks[3].lines == ("conv_3x3 | conv_5x5", "expansion 6")
    assert (stages.blocks[3].channels, stages.blocks[3].stride) == (16, 2)
