import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from nasplat.cost.count import count
from nasplat.nn import BinaryConv2d, set_binarisation, sign
from nasplat.nn.expert import ExpertBinaryConv2d, hard_gate, set_experts

SHAPES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
    {"kernel_size": 1, "groups": 4},
]


def layer(**arguments: object) -> ExpertBinaryConv2d:
    torch.manual_seed(0)
    made = ExpertBinaryConv2d(8, 16, **{"kernel_size": 3, "padding": 1, "experts": 4, **arguments})
    with torch.no_grad():
        made.scale.uniform_(0.5, 1.5)
    return made


def batch(n: int = 12, seed: int = 1) -> Tensor:
    # Channel means far apart, so that the examples pick different experts.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, 5, 5, generator=generator) + 2 * torch.randn(n, 8, 1, 1, generator=generator)


def picks(conv: ExpertBinaryConv2d, x: Tensor) -> list[int]:
    return conv.gate(x.mean(dim=(2, 3))).argmax(dim=1).tolist()


def expert(conv: ExpertBinaryConv2d, index: int) -> BinaryConv2d:
    """One expert as a layer of its own."""
    alone = BinaryConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        stride=conv.stride[0],
        padding=conv.padding[0],
        groups=conv.groups,
        binary_weights=conv.binary_weights,
    )
    alone.load_state_dict({"weight": conv.weight[index], "scale": conv.scale})
    return alone


def test_hard_gate_is_one_hot() -> None:
    logits = torch.tensor([[0.1, 3.0, -1.0], [2.0, 2.0, 1.0], [-5.0, -4.0, -3.0]], requires_grad=True)
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(hard_gate(logits), expected)
    assert torch.equal(hard_gate(logits.detach()), expected)


def test_hard_gate_has_the_gradient_of_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    towards = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    (hard_gate(logits) * towards).sum().backward()
    step, differences = 1e-6, torch.zeros(3, 4, dtype=torch.float64)
    for index in range(3):
        for which in range(4):
            values = []
            for shift in (step, -step):
                moved = logits.detach().clone()
                moved[index, which] += shift
                values.append((torch.softmax(moved, dim=1) * towards).sum())
            differences[index, which] = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(logits.grad, differences, rtol=1e-7, atol=1e-9)
    assert (logits.grad != 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_each_example_goes_through_the_expert_that_it_picks(shape: dict[str, int], training: bool) -> None:
    conv, x = layer(**shape).train(training), batch()
    picked = picks(conv, x)
    assert len(set(picked)) > 1
    y = conv(x)
    for index, which in enumerate(picked):
        alone = expert(conv, which)(x[index : index + 1])
        torch.testing.assert_close(y[index : index + 1], alone)
        torch.testing.assert_close(conv(x[index : index + 1]), alone)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("binary_weights", [True, False])
def test_gate_learns_from_what_every_expert_would_have_done(shape: dict[str, int], binary_weights: bool) -> None:
    conv, x = layer(**shape, binary_weights=binary_weights).double(), batch().double()
    y = conv(x)
    towards = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (y * towards).sum().backward()

    means = x.mean(dim=(2, 3))
    # How much each expert's output agrees with the direction, for each example.
    worth = torch.stack([(expert(conv, k).double()(x) * towards).sum(dim=(1, 2, 3)) for k in range(4)], dim=1).detach()

    def soft(weight: Tensor) -> Tensor:
        return (torch.softmax(means @ weight.T, dim=1) * worth).sum()

    step, weight = 1e-6, conv.gate.weight.detach()
    differences = torch.zeros_like(weight)
    for k in range(4):
        for channel in range(8):
            shift = torch.zeros_like(weight)
            shift[k, channel] = step
            differences[k, channel] = (soft(weight + shift) - soft(weight - shift)) / (2 * step)
    torch.testing.assert_close(conv.gate.weight.grad, differences, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_expert_can_learn_from_the_examples_that_picked_it_alone(shape: dict[str, int]) -> None:
    conv, x = layer(**shape), batch().requires_grad_()
    conv.learning = "picked"
    y = conv(x)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * towards).sum().backward()
    picked = torch.tensor(picks(conv, x))
    scale = torch.zeros(16)
    for k in range(4):
        mine = picked == k
        alone, part = expert(conv, k), x.detach()[mine].requires_grad_()
        (alone(part) * towards[mine]).sum().backward()
        torch.testing.assert_close(conv.weight.grad[k], alone.weight.grad, rtol=1e-4, atol=1e-4)
        scale += alone.scale.grad
        # The input's gradient: through the convolution and through the gate.
        means = x.detach().mean(dim=(2, 3)).requires_grad_()
        worth = torch.stack([(expert(conv, j)(x.detach()) * towards).sum(dim=(1, 2, 3)) for j in range(4)], dim=1)
        (torch.softmax(conv.gate(means), dim=1) * worth.detach()).sum().backward()
        expected = part.grad + means.grad[mine][:, :, None, None] / 25
        torch.testing.assert_close(x.grad[mine], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.scale.grad, scale, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("binary_weights", [True, False])
def test_all_experts_learn_in_proportion_to_softmax(shape: dict[str, int], binary_weights: bool) -> None:
    conv, x = layer(**shape, binary_weights=binary_weights), batch()
    y = conv(x)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * towards).sum().backward()
    soft = torch.softmax(conv.gate(x.mean(dim=(2, 3))), dim=1).detach()
    for k in range(4):
        alone = expert(conv, k)
        (alone(x) * towards * soft[:, k, None, None, None]).sum().backward()
        torch.testing.assert_close(conv.weight.grad[k], alone.weight.grad, rtol=1e-4, atol=1e-4)
        assert conv.weight.grad[k].count_nonzero() > 0


def test_all_experts_learn_from_a_single_example() -> None:
    conv, x = layer(), batch(1)
    conv(x).pow(2).sum().backward()
    assert all(conv.weight.grad[k].count_nonzero() > 0 for k in range(4))
    assert (conv.gate.weight.grad != 0).all()
    conv.zero_grad()
    conv.learning = "picked"
    conv(x).pow(2).sum().backward()
    assert [k for k in range(4) if conv.weight.grad[k].any()] == picks(conv, x)
    assert (conv.gate.weight.grad != 0).all()


def test_copies_of_one_expert_are_driven_apart() -> None:
    conv, x = layer(binary_weights=False), batch(64)
    conv.single = True
    set_experts(conv, single=False)
    target = expert(layer(), 1)(x).detach() * torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(conv.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = F.mse_loss(conv(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert min(float((conv.weight[a] - conv.weight[b]).abs().max().detach()) for a in range(4) for b in range(a)) > 0


class Convolutions(TorchDispatchMode):
    """Shapes of the kernels of all convolutions that run, and of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is torch.ops.aten.convolution:
            self.seen.append((tuple(args[1].shape), len(args[0])))
        return func(*args, **(kwargs or {}))


def test_inference_computes_the_picked_expert_alone() -> None:
    conv, x = layer().eval(), batch()
    with torch.no_grad(), Convolutions() as one:
        conv(x[:1])
    assert one.seen == [((16, 8, 3, 3), 1)]
    with torch.no_grad(), Convolutions() as many:
        conv(x)
    assert sum(n for _, n in many.seen) == len(x)
    assert {shape for shape, _ in many.seen} == {(16, 8, 3, 3)}
    counts = count(conv, x[:1])
    assert counts.bops == 16 * 8 * 9 * 25
    assert counts.conv_macs_real == 8 * 4


def test_squeeze_excite_scales_the_output() -> None:
    conv, x = layer(squeeze_excite=True).eval(), batch()
    assert [tuple(p.shape) for p in conv.excite.parameters()] == [(2, 8), (16, 2)]
    means = x.mean(dim=(2, 3))
    factor = torch.sigmoid(torch.relu(means @ conv.excite[0].weight.T) @ conv.excite[2].weight.T)
    plain = copy.deepcopy(conv)
    plain.excite = None
    torch.testing.assert_close(conv(x), plain(x) * factor[:, :, None, None])
    # The channel means are those of the real input.
    assert not torch.allclose(means, sign(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("way", ["single", "real activations"])
def test_first_expert_alone(way: str) -> None:
    conv, x = layer(squeeze_excite=True), batch()
    if way == "single":
        set_experts(conv, single=True)
    else:
        set_binarisation(conv, activations=False)
    alone = expert(conv, 0)
    alone.binary_activations = conv.binary_activations
    y = conv(x)
    torch.testing.assert_close(y, alone(x) * conv.excite(x.mean(dim=(2, 3)))[:, :, None, None])
    y.pow(2).sum().backward()
    assert conv.gate.weight.grad is None
    assert conv.weight.grad[0].count_nonzero() > 0
    assert conv.weight.grad[1:].count_nonzero() == 0


def test_set_experts_copies_the_first_into_all_others() -> None:
    model = nn.Sequential(layer(), nn.ReLU(), nn.Conv2d(16, 4, 1), layer(kernel_size=1, padding=0))
    drawn = [conv.weight.detach().clone() for conv in (model[0], model[3])]
    assert all((weight[0] != weight[k]).any() for weight in drawn for k in (1, 2, 3))
    # Nothing to copy where no training of one expert comes before.
    set_experts(model, single=False)
    assert torch.equal(model[0].weight, drawn[0])
    set_experts(model, single=True)
    assert model[0].single
    assert model[3].single
    with torch.no_grad():
        model[0].weight[0] += 1
    set_experts(model, single=False)
    assert not model[3].single
    for conv, weight, plus in zip((model[0], model[3]), drawn, (1, 0), strict=True):
        assert all(torch.equal(conv.weight[k], weight[0] + plus) for k in range(4))
    # A second time changes nothing.
    with torch.no_grad():
        model[0].weight[2] += 1
    set_experts(model, single=False)
    assert not torch.equal(model[0].weight[2], model[0].weight[0])
    set_experts(nn.Linear(2, 2), single=True)


def test_one_expert_is_a_binary_convolution() -> None:
    conv, x = layer(experts=1), batch()
    assert conv.gate is None
    assert torch.equal(conv(x), expert(conv, 0)(x))


def test_flags_of_binary_convolutions_work() -> None:
    conv, x = layer(), batch()
    assert conv.is_binary
    set_binarisation(conv, weights=False)
    assert not conv.is_binary
    index = picks(conv, x)[0]
    expected = F.conv2d(sign(x[:1]), conv.weight[index], padding=1) * conv.scale[:, None, None]
    torch.testing.assert_close(conv(x)[:1], expected)
    set_binarisation(conv, activations="tanh")
    expected = F.conv2d(torch.tanh(x), conv.weight[0], padding=1) * conv.scale[:, None, None]
    torch.testing.assert_close(conv(x), expected)
    assert "experts=4" in repr(conv)


def test_kernels_start_like_those_of_a_convolution() -> None:
    conv = layer(groups=2)
    bound = 1 / math.sqrt(4 * 9)
    for kernel in conv.weight:
        assert 0.9 * bound < float(kernel.detach().abs().max()) <= bound
    assert conv.weight.shape == (4, 16, 4, 3, 3)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_torch_export_takes_any_batch(shape: dict[str, int]) -> None:
    conv, x = layer(**shape, squeeze_excite=True).eval(), batch()
    program = torch.export.export(conv, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), conv(x))
    torch.testing.assert_close(program.module()(x[:1]), conv(x[:1]))
