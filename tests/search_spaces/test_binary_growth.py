import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.cost.count import count
from nasplat.errors import ArchitectureError, InvalidInputError, UnsupportedError
from nasplat.nn import set_binarisation
from nasplat.nn.expert import ExpertBinaryConv2d, set_experts
from nasplat.space import SearchSpace
from nasplat.testing.drive import drive
from nasplat.testing.landscapes import Landscape
from nasplat.testing.space_contract import SpaceContract
from search_spaces.binary_growth import PUBLISHED, BinaryGrowth, _MixedConv, _Mixture
from strategies.greedy_growth import GreedyGrowth

TINY = BinaryGrowth(
    classes=5,
    in_channels=1,
    widths=(8, 16),
    stem="cifar",
    max_depth=2,
    expansion=(1, 2),
    groups=(1, 2, 4),
    experts=(1, 2),
    image_size=8,
)
LIMITED = replace(TINY, stem="imagenet", max_ops=20_000.0, image_size=16)


class TestBinaryGrowthContract(SpaceContract):
    samples = 8
    builds = 6

    @pytest.fixture
    def space(self) -> SearchSpace:
        return TINY

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class TestUnderABudgetContract(SpaceContract):
    samples = 8
    builds = 2

    @pytest.fixture
    def space(self) -> SearchSpace:
        return LIMITED

    @pytest.fixture
    def example(self) -> Tensor:
        return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def samples(space: BinaryGrowth, n: int, seed: int = 0) -> list[Architecture]:
    rng = np.random.default_rng(seed)
    return [space.sample(rng) for _ in range(n)]


# Published topologies and exact costs.


@pytest.mark.parametrize(
    ("topology", "bops", "billions"),
    [
        ("1242-2-4:4:16:32", 1_307_787_264, 1.308),
        ("1262-2-4:4:16:32", 1_526_153_216, 1.526),
        ("1282-2-4:4:16:32", 1_744_519_168, 1.745),
        ("1242-2-4:4:8:16", 1_575_124_992, 1.575),
        ("1262-2-4:4:8:16", 1_909_096_448, 1.909),
        ("1282-2-4:4:8:16", 2_243_067_904, 2.243),
        ("1262-2-4:8:8:16", 1_706_786_816, 1.707),
    ],
)
def test_binary_operations_of_published_topologies(topology: str, bops: int, billions: float) -> None:
    assert topology in PUBLISHED
    assert len(PUBLISHED) == 7
    space = BinaryGrowth.imagenet()
    architecture = space.topology(topology, experts=4)
    assert architecture.genes["aggregation"]
    with torch.device("meta"):
        counts = count(space.build(architecture), torch.empty(1, 3, 224, 224))
    assert counts.bops == bops
    assert round(bops / 1e9, 3) == billions
    assert counts.uncounted == ()
    assert counts.flops == pytest.approx(1.1e8, rel=0.05)
    assert counts.ops == space.ops(architecture)


def test_real_operations_by_part() -> None:
    space = BinaryGrowth.imagenet()
    with torch.device("meta"):
        model = space.build(space.topology(PUBLISHED[-1]))
        stem = count(model.stem, torch.empty(1, 3, 224, 224)).macs
        whole = count(model, torch.empty(1, 3, 224, 224)).conv_macs_real
    assert round(stem / 1e6, 1) == 44.6
    assert model.classifier.weight.numel() == 1_024_000
    assert round((whole - stem - 1_024_000) / 1e6, 1) == 38.5


@pytest.mark.parametrize(
    ("space", "sizes"),
    [
        (TINY, (8, 13)),
        (replace(TINY, stem_stride=2), (9,)),
        (replace(TINY, stem="imagenet"), (16, 21)),
        (BinaryGrowth.imagenet(max_ops=None), (224,)),
        (BinaryGrowth.small(), (8, 17)),
    ],
    ids=["tiny", "stride", "imagenet stem", "imagenet", "small"],
)
def test_closed_form_is_the_count(space: BinaryGrowth, sizes: tuple[int, ...]) -> None:
    for architecture in samples(space, 3):
        with torch.device("meta"):
            model = space.build(architecture)
            for size in sizes:
                counts = count(model, torch.empty(1, space.in_channels, size, size))
                assert space.ops(architecture, size) == counts.ops
                assert counts.uncounted == ()


# Parameters and choices.


def test_choices() -> None:
    space = BinaryGrowth.imagenet()
    assert dict(space.choices) == {
        **{f"stage{stage}/depth": (1, 2, 3, 4, 5, 6, 7, 8) for stage in range(4)},
        "expansion": (1, 2, 4),
        **{f"stage{stage}/groups": (1, 4, 8, 16, 32) for stage in range(4)},
        "aggregation": (False, True),
        "experts": (1, 4, 8),
        "squeeze_excite": (False, True),
    }
    assert space.size() == 8**4 * 3 * 5**4 * 2 * 3 * 2
    named = [name for names in space.interactions() for name in names]
    assert sorted(named) == sorted(space.choices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes is 0; legal: an integer from 1 up"),
        ({"max_depth": 10}, "max_depth is 10; legal: an integer from 1 to 9"),
        ({"widths": ()}, "widths is .*legal: one or more multiples of 4"),
        ({"widths": (6,)}, "multiples of 4"),
        ({"expansion": (2, 1)}, r"expansion is \(2, 1\); legal: ascending"),
        ({"experts": ()}, r"experts is \(\); legal: ascending"),
        ({"groups": (1, 3), "widths": (24, 16)}, r"groups offers \[3\].*legal: 1, 2, 4, 8"),
        ({"aggregation": (True, False)}, r"legal: \(False,\), \(True,\) or \(False, True\)"),
        ({"stem": "large"}, "stem is 'large'; legal: 'imagenet', 'cifar'"),
        ({"stem_stride": 3}, "stem_stride is 3; legal: 1, 2"),
        ({"max_ops": 1000.0}, "max_ops is 1000.0; legal: None, or at least [0-9]+, what the smallest network"),
        ({"max_ops": float("nan")}, "max_ops is nan"),
        ({"max_ops": "a"}, "max_ops is 'a'; legal: None, or at least"),
        ({"widths": 64}, "widths is 64; legal: a tuple or list"),
        ({"groups": 1}, "groups is 1; legal: a tuple or list"),
        ({"aggregation": (0, 1)}, r"aggregation is \(0, 1\); legal: \(False,\)"),
    ],
)
def test_bad_parameters_say_what_is_legal(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        BinaryGrowth(**arguments)  # type: ignore[arg-type]


def test_presets_sample_within_their_budget() -> None:
    space = BinaryGrowth.imagenet()
    assert all(space.ops(architecture) <= 1.6e8 for architecture in samples(space, 20))
    assert all(space.is_valid(space.topology(text, experts=4).genes) for text in PUBLISHED)
    rng = np.random.default_rng(0)
    draws = [{name: options[rng.integers(len(options))] for name, options in space.choices.items()} for _ in range(200)]
    # Drawing until it is valid is quick.
    assert sum(space.is_valid(genes) for genes in draws) > 40
    assert BinaryGrowth.small(classes=7).classes == 7


def test_aggregation_needs_groups() -> None:
    with pytest.raises(ArchitectureError):
        TINY.topology("11-1-1:1", aggregation=True)
    assert TINY.topology("11-1-1:2", aggregation=True) in TINY.enumerate()
    # Where it is always on it says nothing, and is let be.
    always = replace(TINY, aggregation=(True,))
    model = always.build(always.topology("11-1-1:1"))
    assert not [name for name, _ in model.named_modules() if "aggregate" in name]


def test_notation() -> None:
    space = BinaryGrowth.imagenet()
    assert space.notation(space.start()) == "2222-1-1:1:1:1"
    for text in PUBLISHED:
        assert space.notation(space.topology(text)) == text
    architecture = space.topology("1262-2-4:8:8:16", aggregation=False, experts=4, squeeze_excite=True)
    assert dict(architecture.genes) == {
        **{f"stage{stage}/depth": depth for stage, depth in enumerate((1, 2, 6, 2))},
        "expansion": 2,
        **{f"stage{stage}/groups": groups for stage, groups in enumerate((4, 8, 8, 16))},
        "aggregation": False,
        "experts": 4,
        "squeeze_excite": True,
    }
    assert not space.topology("2222-1-1:1:1:1").genes["aggregation"]
    for text in (
        "",
        "1262-2",
        "126-2-4:8:8:16",
        "1262-2-4:8:8",
        "1262-x-4:8:8:16",
        "12-62-2-4:8:8:16",
        "12²2-2-4:8:8:1",
    ):
        with pytest.raises(InvalidInputError, match=r"is no topology; legal: 4 digits.*'2222-1-1:1:1:1'"):
            space.topology(text)
    with pytest.raises(ArchitectureError, match=r"stage0/groups is 3; legal: 1, 4, 8, 16, 32"):
        space.topology("1262-2-3:8:8:16")


def test_a_tight_budget_starts_with_a_smaller_network() -> None:
    def cost(text: str) -> float:
        return TINY.ops(TINY.topology(text, aggregation=False))

    for at_most, starts in (("22-1-1:1", "22-1-1:1"), ("11-1-1:1", "11-1-1:1"), ("11-1-2:2", "11-1-2:2")):
        space = replace(TINY, max_ops=cost(at_most))
        assert space.notation(space.start()) == starts
        with pytest.raises(InvalidInputError, match=r"'nonsense' is no topology; legal: 2 digits.*'22-1-1:1'"):
            space.topology("nonsense")


@pytest.mark.parametrize("aggregation", [(False, True), (True,)])
@pytest.mark.parametrize("widths", [(8, 16), (4, 64)])
def test_the_least_budget_is_that_of_the_smallest_network(
    aggregation: tuple[bool, ...], widths: tuple[int, int]
) -> None:
    space = replace(TINY, widths=widths, aggregation=aggregation)
    least = min(map(space.ops, space.enumerate()))
    tight = replace(space, max_ops=least)
    assert tight.ops(tight.start()) == least
    with pytest.raises(InvalidInputError, match=f"or at least {least:.0f}"):
        replace(space, max_ops=least - 0.5)


def test_lists_become_tuples() -> None:
    lists = replace(TINY, widths=[8, 16], groups=[1, 2, 4], aggregation=[False, True])  # type: ignore[arg-type]
    assert lists == TINY
    assert lists.identity == TINY.identity


def test_sketch() -> None:
    space = BinaryGrowth.imagenet()
    (row,) = space.sketch(space.topology("1262-2-4:8:8:16", experts=4))
    assert row.title == "1262-2-4:8:8:16"
    assert [block.name for block in row.blocks] == ["stem", *(f"stage {i}" for i in range(4)), "classifier"]
    assert [(block.channels, block.repeats, block.stride) for block in row.blocks[1:-1]] == [
        (128, 1, 1),
        (256, 2, 2),
        (512, 6, 2),
        (1024, 2, 2),
    ]
    assert row.blocks[1].lines == ("4 groups", "1x1 aggregation", "4 experts")


# Moves.


def test_growth_from_the_start() -> None:
    space = BinaryGrowth.imagenet()
    grown = [space.notation(architecture) for architecture in space.growth(space.start())]
    # Twice the width without groups exceeds the budget; with four times the groups it does not.
    assert grown == [
        "3222-1-1:1:1:1",
        "2322-1-1:1:1:1",
        "2232-1-1:1:1:1",
        "2223-1-1:1:1:1",
        "2222-1-4:1:1:1",
        "2222-1-1:4:1:1",
        "2222-1-1:1:4:1",
        "2222-1-1:1:1:4",
        "2222-2-4:4:4:4",
        "1322-1-1:1:1:1",
        "1232-1-1:1:1:1",
        "1223-1-1:1:1:1",
        "3122-1-1:1:1:1",
        "2132-1-1:1:1:1",
        "2123-1-1:1:1:1",
        "3212-1-1:1:1:1",
        "2312-1-1:1:1:1",
        "2213-1-1:1:1:1",
        "3221-1-1:1:1:1",
        "2321-1-1:1:1:1",
        "2231-1-1:1:1:1",
    ]
    wide = replace(space, max_ops=None)
    assert "2222-2-1:1:1:1" in {wide.notation(architecture) for architecture in wide.growth(wide.start())}
    grouped = space.topology("2222-1-1:1:1:4", aggregation=False)
    assert {**grouped.genes, "aggregation": True} in [dict(move.genes) for move in space.growth(grouped)]


# 3 / 5 is not exact in floats: only integers lead back from 5 times the width to 3 times.
FIFTHS = BinaryGrowth(widths=(900,), max_depth=1, expansion=(3, 5), groups=(1, 9, 25), stem="cifar", experts=(1,))


@pytest.mark.parametrize("space", [TINY, LIMITED, FIFTHS], ids=["free", "budget", "fifths"])
def test_neighbours_are_symmetric_and_growth_is_among_them(space: BinaryGrowth) -> None:
    near = {architecture: space.neighbours(architecture) for architecture in space.enumerate()}
    assert len(near) < space.size()
    for architecture, others in near.items():
        assert len(set(others)) == len(others)
        assert all(other in near and architecture in near[other] for other in others)
        assert set(space.growth(architecture)) <= set(others)
        # Neither experts nor squeeze-and-excitation grow.
        for other in space.growth(architecture):
            assert (other.genes["experts"], other.genes["squeeze_excite"]) == (
                architecture.genes["experts"],
                architecture.genes["squeeze_excite"],
            )
    # All can be reached from the start.
    reached, new = {space.start()}, [space.start()]
    while new:
        new = [other for other in near[new.pop()] if other not in reached] + new
        reached |= set(new)
    assert reached == set(near)


def test_width_with_groups_keeps_the_binary_operations() -> None:
    space = BinaryGrowth.imagenet()
    bops = []
    for text in ("2222-1-1:1:1:1", "2222-2-4:4:4:4"):
        with torch.device("meta"):
            model = space.build(space.topology(text, aggregation=False))
            bops.append(count(model, torch.empty(1, 3, 224, 224)).bops)
    # But for the first convolution, whose input does not grow.
    first = 56 * 56 * 64 * 64 * 9
    assert bops[0] == bops[1] + first // 2


def test_mutation_is_even_over_kinds_of_step() -> None:
    space = replace(TINY, max_depth=4)
    parent = space.topology("22-1-1:2", aggregation=False)
    rng = np.random.default_rng(0)
    kinds: Counter[str] = Counter()
    for _ in range(1400):
        child = space.mutate(parent, rng)
        changed = [name for name, option in child.genes.items() if option != parent.genes[name]]
        kind = "expansion" if "expansion" in changed else changed[0].rpartition("/")[2]
        kinds["arrangement" if len(changed) == 2 and kind == "depth" else kind] += 1
    assert set(kinds) == {"depth", "arrangement", "expansion", "groups", "aggregation", "experts", "squeeze_excite"}
    assert all(140 < n < 260 for n in kinds.values())


def test_mutation_without_a_neighbour_says_so() -> None:
    alone = replace(
        TINY, max_depth=1, expansion=(1,), groups=(1,), aggregation=(False,), experts=(1,), squeeze_excite=(False,)
    )
    with pytest.raises(InvalidInputError, match="no step from 11-1-1:1"):
        alone.mutate(alone.start(), np.random.default_rng(0))


def test_discretise_gives_up_what_is_lost_least_until_the_budget_is_kept() -> None:
    weights = {name: torch.linspace(0.1, 1.0, len(options)) for name, options in LIMITED.choices.items()}
    free = replace(LIMITED, max_ops=None)
    strongest = free.discretise(weights)
    assert free.ops(strongest) > LIMITED.max_ops
    weights["stage1/depth"] = torch.tensor([0.99, 1.0])
    weights["expansion"] = torch.tensor([0.9, 1.0])
    found = LIMITED.discretise(weights)
    assert LIMITED.ops(found) <= LIMITED.max_ops
    assert found.genes["stage1/depth"] == 1
    # Aggregation that the groups leave without a meaning goes off.
    ungrouped = {**TINY.relax(TINY.start()), "aggregation": torch.tensor([0.4, 0.6])}
    assert TINY.discretise(ungrouped) == TINY.start()
    with pytest.raises(ArchitectureError, match="no weights for expansion"):
        TINY.discretise({name: weight for name, weight in weights.items() if name != "expansion"})


def test_is_grown_by_a_strategy() -> None:
    space = replace(LIMITED, max_ops=17_000.0)

    def value(architecture: Architecture) -> float:
        genes = architecture.genes
        grouped = sum(math.log(genes[f"stage{stage}/groups"]) for stage in range(2))
        deep = sum(math.log(genes[f"stage{stage}/depth"]) for stage in range(2))
        return deep + 3 * math.log(genes["expansion"]) - (0.1 if genes["aggregation"] else 0.3) * grouped

    def score(architecture: Architecture) -> dict[str, float]:
        return {"value": value(architecture), "ops": space.ops(architecture)}

    start = space.topology("11-1-1:1")
    run = drive(GreedyGrowth(start=start, budget=0.5), Landscape(space, score), 500, in_flight=4)
    last = run.history.trials[-1]
    assert last.proposal.notes["final"]
    assert value(last.architecture) > value(start)
    assert all(value(move) <= value(last.architecture) for move in space.growth(last.architecture))
    # Twice the width fits with four times the groups only.
    assert space.notation(last.architecture) == "22-2-4:4"


# Networks.


def test_what_a_network_is_made_of() -> None:
    space = BinaryGrowth.imagenet()
    with torch.device("meta"):
        model = space.build(space.topology("1211-2-1:4:8:16", experts=4, squeeze_excite=True))
    binary = {name: m for name, m in model.named_modules() if isinstance(m, ExpertBinaryConv2d)}
    real = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name not in binary}
    shapes = [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.groups, m.experts) for m in binary.values()
    ]
    assert shapes == [
        # An ungrouped stage has no 1x1 convolution.
        (64, 128, 3, 1, 1, 4),
        (128, 128, 3, 1, 1, 4),
        (128, 256, 3, 2, 4, 4),
        (256, 256, 3, 1, 4, 4),
        (256, 256, 1, 1, 1, 4),
        (256, 256, 3, 1, 4, 4),
        (256, 256, 3, 1, 4, 4),
        (256, 256, 1, 1, 1, 4),
        (256, 512, 3, 2, 8, 4),
        (512, 512, 3, 1, 8, 4),
        (512, 512, 1, 1, 1, 4),
        (512, 1024, 3, 2, 16, 4),
        (1024, 1024, 3, 1, 16, 4),
        (1024, 1024, 1, 1, 1, 4),
    ]
    assert all(m.excite is not None for m in binary.values())
    assert all(name.startswith(("stem.", "stages.")) for name in real)
    assert len([name for name in real if name.startswith("stem.")]) == 4
    squeezes = {name: model.get_submodule(name) for name in real if ".shortcut." in name}
    assert sorted((m.in_channels, m.out_channels) for m in squeezes.values()) == [
        (16, 128), (32, 256), (64, 16), (64, 512), (128, 32), (128, 1024), (256, 64), (512, 128)
    ]  # fmt: skip


def test_every_convolution_has_a_shortcut() -> None:
    torch.manual_seed(0)
    model = TINY.build(TINY.topology("22-2-1:2")).eval()
    layers = [m for m in model.modules() if type(m).__name__ == "_Layer"]
    assert len(layers) == 4 + 6
    for layer in layers:
        x = torch.randn(2, layer.conv.in_channels, 6, 6)
        expected = layer.activation(layer.conv(layer.norm(x))) + layer.shortcut(x)
        assert torch.equal(layer(x), expected)
        assert isinstance(layer.activation, nn.PReLU)
        keeps = layer.conv.in_channels == layer.conv.out_channels and layer.conv.stride == (1, 1)
        assert isinstance(layer.shortcut, nn.Identity) == keeps


def test_transfer_points_are_the_stages_after_the_first() -> None:
    space = BinaryGrowth.small()
    model = space.build(space.start()).eval()
    assert model.transfer_points == ("stages.1", "stages.2", "stages.3")
    seen: dict[str, torch.Size] = {}
    for name in model.transfer_points:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.update({name: _[2].shape}))
    model(torch.randn(2, 1, 16, 16))
    assert list(seen.values()) == [(2, 16, 4, 4), (2, 32, 2, 2), (2, 64, 1, 1)]


def test_build_refuses_genes_of_another_space() -> None:
    with pytest.raises(ArchitectureError):
        TINY.build(BinaryGrowth.small().start())


def test_trains_one_expert_then_all() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 5
    images = torch.randn(5, 1, 8, 8)[labels] + 0.3 * torch.randn(64, 1, 8, 8)
    model = TINY.build(TINY.topology("11-2-2:4", experts=2))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for single, binary in ((True, False), (False, False), (False, True)):
        set_experts(model, single)
        set_binarisation(model, weights=binary)
        for _ in range(12):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.3
    assert losses[-1] < 0.7


# The supernet.


def test_paths_equal_built_networks_in_training_too() -> None:
    torch.manual_seed(0)
    supernet = TINY.supernet().train()
    x = torch.randn(4, 1, 8, 8)
    for text, options in (
        ("11-1-1:1", {}),
        ("21-1-4:1", {"aggregation": False}),
        ("12-2-1:4", {}),
        ("22-2-2:4", {"experts": 2, "squeeze_excite": True}),
    ):
        architecture = TINY.topology(text, **options)
        model = TINY.inherit(TINY.build(architecture), None, supernet.state_dict()).train()
        for binary in (False, True):
            # The flags of binary layers work in the supernet as well.
            for network in (model, supernet):
                set_binarisation(network, weights=binary)
            torch.testing.assert_close(model(x), supernet(x, TINY.relax(architecture)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("binary_activations", [True, False])
def test_a_mixed_convolution_is_the_sum_of_its_options(binary_activations: bool) -> None:
    torch.manual_seed(0)
    conv = _MixedConv(16, 32, 3, experts=2, squeeze_excite=True, stride=2, padding=1, binary_weights=False)
    conv.binary_activations = binary_activations
    x = torch.randn(6, 16, 5, 5) + torch.randn(6, 16, 1, 1)
    shares = {"expansion": (0.2, 0.8), "groups": (0.5, 0.2, 0.3), "experts": (0.6, 0.4), "excite": (0.3, 0.7)}
    options = {"expansion": (1, 2), "groups": (1, 2, 4), "experts": (1, 2), "excite": (False, True)}

    def mixture(**picked: int) -> _Mixture:
        used = {
            name: [
                (option, torch.tensor(shares[name][index]) if name not in picked else torch.tensor(1.0))
                for index, option in enumerate(options[name])
                if picked.get(name, index) == index
            ]
            for name in options
        }
        one = [(1, torch.tensor(1.0))]
        return _Mixture(
            (8, 16),
            1,
            {
                "stage1/depth": one,
                "aggregation": one,
                "expansion": used["expansion"],
                "stage1/groups": used["groups"],
                "experts": used["experts"],
                "squeeze_excite": used["excite"],
            },
        )

    def output(**picked: int) -> Tensor:
        mixed = mixture(**picked)
        # A narrow option sees the leading channels; what it makes of means of other channels is no part of it.
        return conv.mixed(x[:, : mixed.first.in_channels], mixed.first, mixed)

    for expansion in (0, 1):
        whole = output(expansion=expansion)
        total = torch.zeros_like(whole)
        for groups in range(3):
            for experts in range(2):
                for excite in range(2):
                    share = shares["groups"][groups] * shares["experts"][experts] * shares["excite"][excite]
                    total += share * output(expansion=expansion, groups=groups, experts=experts, excite=excite)
        torch.testing.assert_close(whole, total)
    # Widths: the narrow one ends in half of the channels. Gates and squeezes of a mixture look at all channels.
    narrow, wide = (output(expansion=index, experts=0, excite=0) for index in (0, 1))
    both = 0.8 * wide
    both[:, :16] += 0.2 * narrow
    torch.testing.assert_close(output(experts=0, excite=0), both)


def test_keep_makes_a_smaller_supernet_and_refuses_what_it_dropped() -> None:
    keep = {"expansion": (1,), "stage0/depth": (1,), "stage1/groups": (1,), "experts": (1,), "squeeze_excite": (False,)}
    part, x = TINY.supernet(keep=keep), torch.randn(2, 1, 8, 8)
    names = list(part.state_dict())
    assert not [name for name in names if ".gate." in name or ".excite." in name]
    assert not [name for name in names if name.startswith(("stages.0.1", "stages.1.0.aggregate"))]
    assert max(tensor.shape[1] for name, tensor in part.state_dict().items() if name.endswith("conv.weight")) == 16
    assert part(x, TINY.relax(TINY.topology("12-1-2:1"))).shape == (2, 5)
    with pytest.raises(InvalidInputError, match="expansion gives weight to 2; this supernet keeps 1"):
        part(x, TINY.relax(TINY.topology("12-2-2:1")))
    relaxed = TINY.relax(TINY.start())
    with pytest.raises(InvalidInputError, match="lacks weights for experts"):
        part(x, {name: weight for name, weight in relaxed.items() if name != "experts"})
    with pytest.raises(InvalidInputError, match="experts gives weight to nothing"):
        part(x, {**relaxed, "stage0/depth": torch.tensor([1.0, 0.0]), "experts": torch.zeros(2)})


def test_supernet_arguments_are_checked() -> None:
    with pytest.raises(UnsupportedError, match="partial is 4; legal: 1"):
        TINY.supernet(partial=4)
    with pytest.raises(InvalidInputError, match="keep names 'depth'"):
        TINY.supernet(keep={"depth": (1,)})
    with pytest.raises(InvalidInputError, match=r"keep\['expansion'\] is \(3,\); legal: one or more of 1, 2"):
        TINY.supernet(keep={"expansion": (3,)})


def test_inherit_refuses_another_architecture_and_too_small_a_supernet() -> None:
    a, b = TINY.topology("11-1-1:1"), TINY.topology("22-2-2:4")
    with pytest.raises(InvalidInputError, match="cannot inherit"):
        TINY.inherit(TINY.build(b), a, TINY.build(a).state_dict())
    with pytest.raises(InvalidInputError, match="cannot inherit"):
        TINY.inherit(TINY.build(b), None, TINY.supernet(keep={"expansion": (1,)}).state_dict())
    state = TINY.build(a).state_dict()
    twin = TINY.inherit(TINY.build(a), a, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in twin.state_dict().items())


# Export.


def test_onnx_export_computes_the_same(tmp_path: object) -> None:
    import onnxruntime

    space = replace(TINY, stem="imagenet")
    torch.manual_seed(0)
    model = space.build(space.topology("11-2-1:4", aggregation=False, experts=2)).eval()
    # 13 pixels: odd sides are halved upwards, by pools too.
    program = torch.onnx.export(
        model,
        (torch.randn(2, 1, 13, 13),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    file = f"{tmp_path}/growth.onnx"
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 1, 13, 13) + torch.randn(3, 1, 1, 1)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_supernet_mixes_in_the_type_of_its_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    relaxed = {name: torch.full((len(some),), 1 / len(some), dtype=dtype) for name, some in TINY.choices.items()}
    logits = TINY.supernet().to(dtype)(torch.randn(2, 1, 8, 8, dtype=dtype), relaxed)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
