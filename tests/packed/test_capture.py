"""From models to packed programs: every value compared with PyTorch's, and what is refused."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from networks import drawn_network, images, with_history
from torch import Tensor, nn
from torch.nn import functional

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn import BinaryBlock, BinaryConv2d, BinaryFactorisedReduce, ExpertBinaryConv2d, set_binarisation, sign
from nasplat.nn.prelu import PReLU
from nasplat.packed.capture import capture
from nasplat.packed.graph import (
    INPUT,
    PICK,
    Affine,
    BinaryConv,
    Conv,
    Linear,
    Pool,
    Program,
    array_fields,
    attributes,
    check_program,
)
from nasplat.packed.interpreter import Interpreter
from nasplat.packed.traced import Traced
from search_spaces import Bats, BinaryGrowth

REAL = {"conv", "linear", "mean"}


def check(model: nn.Module, x: Tensor) -> Program:
    """Capture, and compare each operation, given PyTorch's values of its inputs, with PyTorch's value."""
    program = capture(model, x)
    shapes = check_program(program)
    traced = Traced(model, program.input_shape)
    y, values = traced.run(x)
    with torch.no_grad():
        assert torch.equal(y, model(x))
    operations = {operation.name: operation for operation in program.operations}
    assert len(operations) == len(program.operations)
    engine = Interpreter(program)
    for index in range(len(x)):
        given = {name: value[index].numpy() for name, value in values.items()}
        assert all(given[name].shape == (() if shape == PICK else shape) for name, shape in shapes.items())
        for step, made in engine.trace(given):
            operation, wanted = operations[step.name], given[step.name]
            if step.kind in REAL or (isinstance(operation, Affine) and operation.scale is not None):
                size = float(np.sqrt(np.square(wanted, dtype=np.float64).mean()))
                # Values are sums of terms of about 1, which may cancel.
                assert float(np.abs(made - wanted).max()) <= 2e-5 * size + 1e-6, step
            else:
                assert np.array_equal(made, wanted), step
    # The program's own rounding of the stem and the classifier; the draws tip no sign.
    outputs = torch.from_numpy(engine.run(x.numpy()))
    assert torch.allclose(outputs[:, :, 0, 0] if program.flat else outputs, y, rtol=1e-4, atol=1e-4 * float(y.std()))
    return program


def kinds(program: Program) -> list[str]:
    return [operation.KIND for operation in program.operations]


def names(program: Program) -> list[str]:
    return [operation.name for operation in program.operations]


def equal(one: Program, other: Program) -> bool:
    if one._replace(operations=()) != other._replace(operations=()) or len(one.operations) != len(other.operations):
        return False
    for a, b in zip(one.operations, other.operations, strict=True):
        if type(a) is not type(b) or attributes(a) != attributes(b):
            return False
        for left, right in zip(array_fields(a).values(), array_fields(b).values(), strict=True):
            if (left is None) != (right is None) or (left is not None and not np.array_equal(left, right)):
                return False
    return True


# Every network that the binary spaces build.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["bats", "growth"])
def test_networks_of_the_binary_spaces(kind, seed):
    model, shape = drawn_network(kind, seed)
    check(model, images(shape))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 56))
@pytest.mark.parametrize("kind", ["bats", "growth"])
def test_many_networks_of_the_binary_spaces(kind, seed):
    model, shape = drawn_network(kind, seed)
    check(model, images(shape))


@pytest.mark.slow
def test_published_networks():
    bats = Bats.cifar(cells=8, auxiliary=True)
    check(with_history(bats.build(bats.paper_genes())), images((3, 32, 32), 1))
    imagenet = Bats.imagenet(cells=5)
    check(with_history(imagenet.build(imagenet.paper_genes())), images((3, 96, 96), 1))
    growth = BinaryGrowth.imagenet()
    model = growth.build(growth.topology("1242-2-4:4:16:32", experts=4, squeeze_excite=True))
    check(with_history(model), images((3, 64, 64), 1))


def test_every_operation_of_bats():
    """On each edge of both cells, with a shuffle; the drawn networks might miss one."""
    space = Bats.small(shuffle=4, channels=12, groups=3, cells=2)
    rng = np.random.default_rng(0)
    operations = [name for name in space.operations if name != "zero"]
    for name in operations:
        genes = dict(space.sample(rng).genes)
        genes = {edge: option if option == "zero" else name for edge, option in genes.items()}
        check(with_history(space.build(space.architecture(genes))), images((1, 13, 15)))


def test_the_auxiliary_classifier_is_left_out():
    space = Bats.small(channels=4, auxiliary=True)
    program = check(with_history(space.build(space.paper_genes())), images((1, 13, 15)))
    assert not any("auxiliary" in operation.name for operation in program.operations)


def test_growth_with_every_extra():
    space = BinaryGrowth.small(widths=(8, 16), stem="imagenet")
    model = space.build(space.topology("12-2-2:4", aggregation=True, experts=4, squeeze_excite=True))
    program = check(with_history(model), images((1, 29, 22), 4))
    layer = "stages.0.0.first"
    ours = [name.removeprefix(f"{layer}.") for name in names(program) if name.startswith(layer)]
    assert ours == [
        "conv.pooled",
        "conv.means",
        "conv.gate",
        "conv.pick",
        "conv.excite.1",
        "conv.excite",
        "activation",
        "shortcut.squeeze_activation",
        "shortcut.expand_activation",
    ]
    (conv,) = (operation for operation in program.operations if operation.name == f"{layer}.activation")
    assert isinstance(conv, BinaryConv) and conv.experts == 4 and conv.factor == f"{layer}.conv.excite"


def test_each_example_picks_for_itself():
    torch.manual_seed(0)
    conv = ExpertBinaryConv2d(6, 8, 3, experts=4)
    model = with_history(nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(6), conv=conv)))
    x = images((6, 7, 5), 16) + 3 * images((6, 1, 1), 16, seed=1)
    check(model, x)
    assert len(Traced(model, (6, 7, 5)).run(x)[1]["conv.pick"].unique()) == 4


@pytest.mark.parametrize("squeeze_excite", [False, True])
def test_single_expert_has_no_gate(squeeze_excite):
    torch.manual_seed(0)
    conv = ExpertBinaryConv2d(6, 8, 3, experts=4, squeeze_excite=squeeze_excite, padding=1, groups=2)
    model = with_history(nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(6), conv=conv)))
    gated = check(model, images((6, 7, 5)))
    conv.single = True
    single = check(model, images((6, 7, 5)))
    assert "argmax" in kinds(gated) and "argmax" not in kinds(single)
    assert single.operations[-1].weight.shape[0] == 8 and gated.operations[-1].weight.shape[0] == 32
    without_norm = check(nn.Sequential(conv).eval(), images((6, 7, 5)))
    assert names(without_norm) == (["0.means", "0.excite.1", "0.excite", "0"] if squeeze_excite else ["0"])


# Lowering, by hand.


def test_names_and_fused_chains():
    torch.manual_seed(0)
    block = with_history(BinaryBlock(6, 6, 3, groups=3, shuffle=2))
    program = check(block, images((6, 8, 8)))
    assert list(zip(names(program), kinds(program), strict=True)) == [
        ("activation", "binary_conv"),
        ("shuffle", "shuffle"),
        ("add", "add"),
    ]
    assert program.operations[0].inputs == (INPUT,) and program.operations[2].inputs == ("shuffle", INPUT)
    assert program.output == "add" and not program.flat


def test_weight_bits_by_hand():
    conv = BinaryConv2d(4, 2, (1, 2), groups=2)
    with torch.no_grad():
        # Output, channel of the group, row, column.
        conv.weight.copy_(torch.tensor([[[[1.0, -1.0]], [[0.0, -0.0]]], [[[-3.0, -1.0]], [[-1e-40, 2.0]]]]))
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    plain = capture(nn.Sequential(conv).eval(), torch.zeros(1, 4, 3, 3)).operations[0]
    # Bits tap by tap, in each the channels: + + - + and - - - +.
    assert plain.weight.tolist() == [[0b1011], [0b1000]]
    assert plain.threshold.tolist() == [0.0] * 4 and plain.slope is None
    flipped = capture(nn.Sequential(norm, conv).eval(), torch.zeros(1, 4, 3, 3)).operations[0]
    # The last channel is the second of the second group.
    assert flipped.weight.tolist() == [[0b1011], [0b1000 ^ 0b1010]]


def test_factorised_reduce_is_two_convolutions():
    torch.manual_seed(0)
    for height, width in ((6, 8), (7, 8), (6, 9), (7, 9), (2, 3)):
        model = with_history(nn.Sequential(BinaryFactorisedReduce(3, 5)))
        program = check(model, images((3, height, width)))
        assert names(program) == ["0.even", "0.odd", "0"]
        even, odd = program.operations[:2]
        assert (even.channels, odd.channels) == (2, 3)
        assert (even.window.padding, odd.window.padding) == ((0, 0), (-1, -1))
        assert even.window.size == odd.window.size == (-(-height // 2), -(-width // 2))


def test_a_layer_by_itself():
    torch.manual_seed(0)
    layers = (
        BinaryConv2d(5, 3, 3, stride=2, padding=2, dilation=2),
        ExpertBinaryConv2d(5, 4, 3, padding=1),
        BinaryFactorisedReduce(5, 4),
        nn.Conv2d(5, 4, 3),
    )
    for layer in layers:
        program = check(with_history(layer), images((5, 9, 8)))
        assert program.output == "model"


class Branches(nn.Module):
    """A normalisation that several layers read."""

    def __init__(self, first: nn.Module, *, real: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.BatchNorm2d(4)
        self.one = BinaryConv2d(4, 4, 3, padding=1)
        self.other = BinaryConv2d(4, 4, 1)
        self.real = real

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        y = self.one(x) + self.other(x)
        return y + x if self.real else y


def test_a_normalisation_that_only_signs_read_makes_thresholds_alone():
    torch.manual_seed(0)
    program = check(with_history(Branches(nn.Conv2d(3, 4, 1), real=False)), images((3, 6, 6)))
    assert kinds(program) == ["conv", "binary_conv", "binary_conv", "add"]
    assert program.operations[0].name == "first" and program.operations[0].scale is None
    assert program.operations[1].threshold.any()


def test_a_normalisation_behind_a_convolution_joins_it():
    torch.manual_seed(0)
    program = check(with_history(Branches(nn.Conv2d(3, 4, 1), real=True)), images((3, 6, 6)))
    assert kinds(program) == ["conv", "binary_conv", "binary_conv", "add", "add"]
    assert program.operations[0].name == "norm" and program.operations[0].scale is not None
    # The convolution makes the normalised value, so that its sign is taken as it is.
    assert not program.operations[1].threshold.any()


def test_a_normalisation_that_both_read_is_done_twice():
    torch.manual_seed(0)
    program = check(with_history(Branches(nn.MaxPool2d(2), real=True)), images((4, 6, 6)))
    assert kinds(program) == ["pool", "affine", "binary_conv", "binary_conv", "add", "add"]
    # The sign is exact: through the pool's value, not through what rounding made of the normalised one.
    assert program.operations[2].inputs == ("first",)


def test_a_convolution_with_all_that_follows_it():
    torch.manual_seed(0)
    for activation in (nn.ReLU(), nn.ReLU(inplace=True), nn.PReLU(), nn.PReLU(6), PReLU(6), nn.LeakyReLU(0.3)):
        layers = [nn.Conv2d(4, 6, (3, 2), 2, (1, 0), groups=2), nn.BatchNorm2d(6), activation, nn.MaxPool2d(2)]
        program = check(with_history(nn.Sequential(*layers)), images((4, 9, 8)))
        assert list(zip(names(program), kinds(program), strict=True)) == [("2", "conv"), ("3", "pool")]
        conv = program.operations[0]
        assert isinstance(conv, Conv) and conv.slope is not None and conv.slope.shape == (6,)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 4, padding="same"),
        nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2),
        nn.Conv2d(4, 6, 3, padding="valid", bias=False),
        nn.Conv2d(4, 6, (1, 3), dilation=(1, 2), padding=(0, 2)),
        nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        nn.MaxPool2d((2, 3), 2),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False, ceil_mode=True),
        nn.AvgPool2d((3, 1), 1, padding=(1, 0)),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        nn.ReLU(),
        nn.PReLU(),
        nn.ChannelShuffle(2),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.PReLU(3)),
    ],
    ids=str,
)
def test_real_layers(layer):
    torch.manual_seed(0)
    check(with_history(nn.Sequential(layer)), images((4, 10, 9)))


def test_averages_that_count_padding():
    def pool(**settings) -> Pool:
        program = check(nn.Sequential(nn.AvgPool2d(3, 2, **settings)).eval(), images((2, 9, 9)))
        assert isinstance(program.operations[0], Pool)
        return program.operations[0]

    assert pool(padding=1).count_padding
    assert not pool(padding=1, count_include_pad=False).count_padding
    # Without padding there is none to count, and what ceil_mode lets stand out never counts.
    assert not pool(ceil_mode=True).count_padding


class Calls(nn.Module):
    """The same things as functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = BinaryConv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = functional.relu(self.conv(x.contiguous()))
        x = sum([x, torch.add(x, x.relu()).add(torch.relu(x))])
        x = functional.channel_shuffle(self.drop(x), 2)
        x += x
        x = torch.concat((x, functional.dropout(x, 0.3, self.training)), -3)
        pooled = functional.adaptive_avg_pool2d(x, 1) + x.mean((3, 2), keepdim=True) + torch.mean(x, (-1, -2), True)
        return self.last(torch.flatten(pooled, 1) + x.mean(dim=[2, 3]))


def test_functions_and_methods():
    torch.manual_seed(0)
    program = check(with_history(Calls()), images((4, 6, 5)))
    assert names(program)[:2] == ["conv", "relu"]
    assert isinstance(program.operations[1], BinaryConv)
    assert program.output == "last" and program.flat


def test_a_module_called_twice_has_two_names():
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 4, 3, padding=1)
    program = check(with_history(nn.Sequential(conv, nn.MaxPool2d(2), conv)), images((4, 6, 5)))
    assert names(program) == ["0", "1", "0#2"]


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ExpertBinaryConv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


def test_parts_of_a_module_called_twice_have_two_names():
    torch.manual_seed(0)
    program = check(with_history(Same()), images((4, 6, 5)))
    assert names(program) == [
        *("conv.means", "conv.gate", "conv.pick", "conv"),
        *("conv#2.means", "conv#2.gate", "conv#2.pick", "conv#2"),
    ]


def test_a_network_without_binary_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    program = check(with_history(model), images((3, 9, 9)))
    assert kinds(program) == ["conv", "mean", "linear"]
    assert isinstance(program.operations[-1], Linear)


def test_signs_of_zeros_in_the_input():
    """Zero and minus zero are +1 in training, and a threshold of zero says so too."""
    conv = BinaryConv2d(1, 1, 1).eval()
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45]).view(1, 1, 1, 4)
    made = Interpreter(capture(conv, x)).run(x.numpy())
    weight = sign(conv.weight).item()
    assert made.ravel().tolist() == [weight, weight, weight, -weight]


# What it is taken from does not matter, and is not changed.


def test_only_the_shape_of_the_example_matters():
    model, shape = drawn_network("growth", 3)
    one = capture(model, images(shape, 1))
    assert equal(one, capture(model, torch.full((5, *shape), torch.nan)))
    with torch.inference_mode():
        assert equal(one, capture(model, images(shape)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(layer for layer in other.modules() if isinstance(layer, BinaryConv2d)).weight.mul_(-1)
    assert not equal(one, capture(other, images(shape, 1)))


def test_a_model_in_channels_last():
    model, shape = drawn_network("bats", 2)
    one = capture(model, images(shape))
    turned = model.to(memory_format=torch.channels_last)
    assert equal(one, check(turned, images(shape).to(memory_format=torch.channels_last)))


def test_the_model_is_not_changed():
    model = with_history(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), BinaryBlock(4, 4, 3))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, state = str(model), torch.get_rng_state()
    program = capture(model, images((3, 6, 6)))
    assert str(model) == text and model[2].inplace
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_hooks for layer in model.modules())
    # Nor does a later change of the model reach the program.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert program.operations[0].weight.any()


def test_from_several_threads_while_others_run_models():
    """Tracing replaces what calling a module does, in the whole process, and has to put it back."""
    model, shape = with_history(nn.Sequential(*(BinaryBlock(4, 4, 3) for _ in range(6)))), (4, 6, 6)
    expected, x = capture(model, images(shape)), images(shape)
    with torch.no_grad():
        y = model(x)
    called = nn.Module.__call__

    def run(index: int) -> bool:
        if index % 2:
            return equal(expected, capture(model, x))
        with torch.no_grad():
            return all(torch.equal(y, model(x)) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))
    assert nn.Module.__call__ is called


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.1)
        return x.relu()


def test_two_tracings_at_once_leave_modules_as_they_were():
    """The first one in would be the first one out, and the second would put back what the first one had put in."""
    called = nn.Module.__call__

    def late(delay: float) -> Program:
        time.sleep(delay)
        return capture(Slow().eval(), images((1, 2, 2)))

    with ThreadPoolExecutor(2) as pool:
        assert all(kinds(program) == ["affine"] for program in pool.map(late, (0.0, 0.04)))
    assert nn.Module.__call__ is called


# Refusals.


def binary_off() -> nn.Module:
    model = nn.Sequential(OrderedDict(block=BinaryBlock(4, 4, 3)))
    set_binarisation(model, weights=False)
    return model


def binary_tanh() -> nn.Module:
    model = nn.Sequential(OrderedDict(block=BinaryBlock(4, 4, 3)))
    set_binarisation(model, activations="tanh")
    return model


def reflecting() -> nn.Module:
    conv = BinaryConv2d(4, 4, 3, padding=1)
    conv.padding_mode = "reflect"
    return conv


def hooked() -> nn.Module:
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda module, args, y: -y)
    return model


def with_number(name: str, value: float) -> nn.Module:
    conv = BinaryConv2d(4, 4, 3)
    with torch.no_grad():
        getattr(conv, name).view(-1)[3] = value
    return nn.Sequential(OrderedDict(body=nn.Sequential(conv)))


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def hidden_in_place(self: Function, x: Tensor) -> Tensor:
    x = x.relu()
    y = x
    y += 1.0 * y.relu() if False else y
    return x + y


class Doubled(BinaryConv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(OrderedDict(body=nn.Sequential(nn.GELU()))),
            r"module 'body\.0' \(.*GELU\): no packed operation",
        ),
        (nn.Sequential(nn.Sigmoid()), r"Sigmoid"),
        (nn.Sequential(Doubled(4, 4, 3)), r"module '0' \(.*Doubled\)"),
        (nn.Sequential(nn.GroupNorm(2, 4)), "GroupNorm"),
        (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "module '0': .*no running statistics"),
        (
            nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), BinaryConv2d(4, 4, 3)),
            "module '0': .*statistics",
        ),
        (Function(lambda self, x: torch.sigmoid(x)), r"function .*sigmoid"),
        (Function(lambda self, x: functional.gelu(x)), r"function .*gelu"),
        (Function(lambda self, x: x.tanh()), r"method 'tanh'"),
        (Function(lambda self, x: x[:, 1:]), r"getitem"),
        (Function(lambda self, x: x * 2), r"mul"),
        (Function(lambda self, x: x + 2), r"adds 2"),
        (Function(lambda self, x: torch.add(x, x, alpha=3)), r"alpha"),
        (Function(lambda self, x: x + x.mean((2, 3), True)), r"equal shapes"),
        (Function(lambda self, x: x.mean(1)), r"dim is 1"),
        (Function(lambda self, x: x.mean()), r"dim is None"),
        (Function(lambda self, x: torch.cat([x, x])), r"along dimension 0"),
        (Function(lambda self, x: x.flatten(1)), r"flattens \(1, 4, 8, 8\)"),
        (Function(lambda self, x: x.view(x.size(0), -1)), r"method 'size'.*value is int"),
        (Function(lambda self, x: x.argmax(1)), r"method 'argmax'.*int64"),
        (Function(lambda self, x: (x, x)), r"returns a tuple"),
        (Function(lambda self, x: x if x.sum() > 0 else -x), r"control flow"),
        (Function(lambda self, x: self.relu(x) + x), r"module 'relu' .*changes in place what is used again"),
        (Function(hidden_in_place), r"something else than the calls"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), "padding_mode is 'circular'"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, stride=(1, 2))), r"stride is \(1, 2\)"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, dilation=(1, 2))), r"dilation is"),
        (nn.Sequential(nn.MaxPool2d(3, dilation=2)), r"dilation is 2"),
        (nn.Sequential(nn.MaxPool2d((2, 3))), r"stride is \(2, 3\)"),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=3)), "divisor_override"),
        (nn.Sequential(nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)), "stands out"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2)), "output_size is 2"),
        (nn.Sequential(nn.Linear(8, 3)), r"2 dimensions"),
        (nn.Sequential(nn.Conv2d(4, 4, 3)).double(), "weight of module '0' .*float64"),
        (nn.Sequential(nn.Conv2d(4, 4, 3)).half(), "float16"),
        (binary_off(), r"module 'block\.conv' .*binary_weights is False"),
        (binary_tanh(), r"module 'block\.conv' .*binary_activations is False"),
        (reflecting(), "padding_mode is 'reflect'"),
        (hooked(), "module '0' .* forward hooks"),
        (with_number("weight", torch.nan), r"module 'body\.0' .*weight holds NaN"),
        (with_number("scale", torch.nan), r"scale holds numbers that are not finite"),
        (with_number("scale", torch.inf), r"scale holds numbers that are not finite"),
    ],
)
def test_refuses(model, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        capture(model.eval(), images((4, 8, 8)))
    assert str(caught.value)


def test_refuses_training_mode():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), BinaryBlock(4, 4, 3)).eval()
    model[1].norm.train()
    with pytest.raises(UnsupportedError, match=r"module '1\.norm' \(BatchNorm2d\) is in training mode"):
        capture(model, images((4, 8, 8)))


def test_the_refusal_says_what_is_legal():
    with pytest.raises(UnsupportedError, match=r"legal: BinaryConv2d, ExpertBinaryConv2d, .*Conv2d, .*Sigmoid after"):
        capture(nn.Sequential(nn.Softmax(1)).eval(), images((4, 8, 8)))


@pytest.mark.parametrize(
    "example", [torch.zeros(4, 8, 8), torch.zeros(0, 4, 8, 8), torch.zeros(1, 4, 8, 8).double(), "images", None]
)
def test_refuses_such_an_example(example):
    with pytest.raises(InvalidInputError, match="legal: a float32 tensor"):
        capture(nn.Sequential(nn.ReLU()).eval(), example)


def test_refuses_an_example_that_the_model_does_not_take():
    with pytest.raises(InvalidInputError, match=r"does not take an example of shape \(3, 8, 8\)"):
        capture(nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), torch.zeros(1, 3, 8, 8))


def test_refuses_what_is_no_module():
    with pytest.raises(InvalidInputError, match=r"legal: a torch\.nn\.Module"):
        capture(torch.relu, torch.zeros(1, 3, 8, 8))


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x


def test_refuses_a_model_of_two_inputs():
    with pytest.raises(UnsupportedError, match="takes x, y; legal: one tensor"):
        capture(Two().eval(), torch.zeros(1, 3, 8, 8))
