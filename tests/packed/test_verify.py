"""Verification: that it accepts what is right, and points at every kind of mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import drawn_network, images, with_history
from torch import nn

from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.nn import BinaryBlock, BinaryFactorisedReduce, ExpertBinaryConv2d
from nasplat.packed.capture import capture
from nasplat.packed.engine import Engine, Step
from nasplat.packed.graph import BinaryConv, Concat, Conv, Linear, Operation, Pool, Program
from nasplat.packed.interpreter import Interpreter
from nasplat.packed.verify import TOLERANCE, Verification, verify


@dataclass(frozen=True)
class Packed:
    """What verification uses of a packed program."""

    program: Program
    engine: Engine


def packed(program: Program) -> Packed:
    return Packed(program, Interpreter(program))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(BinaryBlock(8, 8, 3, groups=2), nn.AvgPool2d(2), nn.BatchNorm2d(8)),
        *(ExpertBinaryConv2d(8, 12, 3, squeeze_excite=True), nn.PReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    ]
    return with_history(nn.Sequential(*layers))


SHAPE = (3, 12, 10)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def program(model) -> Program:
    return capture(model, images(SHAPE))


def changed(program: Program, kind: type[Operation], **changes: Any) -> Program:
    """With other fields in the first operation of a kind; an array is given as a function of the old one."""
    operations = list(program.operations)
    index = next(index for index, operation in enumerate(operations) if isinstance(operation, kind))
    operation = operations[index]
    made = {
        name: change(getattr(operation, name).copy()) if callable(change) else change
        for name, change in changes.items()
    }
    operations[index] = replace(operation, **made)
    return program._replace(operations=tuple(operations))


@pytest.mark.parametrize("kind", ["bats", "growth"])
@pytest.mark.parametrize("seed", [100, 101, 102])
def test_accepts_what_is_right(kind, seed):
    model, shape = drawn_network(kind, seed)
    found = verify(model, packed(capture(model, images(shape))), images(shape, 3, seed=seed))
    assert found.ok and found.trunk_equal and found.run_equal and not found.bad and not found.unchecked
    assert found.rows == 3 and found.relative_difference < 1e-4 and found.argmax_agreement == 1
    assert found.rows_beyond_rounding == 0


def test_counts_and_kinds_of_steps(model, program):
    found = verify(model, packed(program), images(SHAPE, 3))
    assert [(step.name, step.exact) for step in found.steps] == [
        ("2", False),
        ("3.activation", True),
        ("add", True),
        ("4", True),
        ("6.pooled", False),
        ("6.means", False),
        ("6.gate", False),
        ("6.pick", True),
        ("6.excite.1", False),
        ("6.excite", False),
        ("7", True),
        ("8", False),
        ("10", False),
    ]
    compared = {step.name: step.compared for step in found.steps}
    # Three examples each.
    assert compared["2"] == 3 * 8 * 12 * 10 and compared["6.pick"] == 3 and compared["10"] == 15
    assert all(step.max_difference == 0 for step in found.steps if step.exact)
    assert all(step.max_difference < 5e-6 for step in found.steps)


def bit(array: np.ndarray) -> np.ndarray:
    array[0, 0] ^= 1
    return array


def little(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[1] += 1e-2 * np.abs(array).max()
    return array


def ulp(array: np.ndarray) -> np.ndarray:
    return np.nextafter(array, np.float32(np.inf))


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        (BinaryConv, {"weight": bit}, "3.activation"),
        (BinaryConv, {"scale": ulp}, "3.activation"),
        (BinaryConv, {"slope": ulp}, "3.activation"),
        (BinaryConv, {"threshold": little}, "3.activation"),
        (Conv, {"weight": little}, "2"),
        (Conv, {"shift": little}, "2"),
        (Conv, {"slope": None}, "2"),
        (Linear, {"weight": little}, "6.gate"),
        (Pool, {"mode": "max"}, "4"),
    ],
)
def test_points_at_the_step_that_is_wrong(model, program, kind, changes, name):
    found = verify(model, packed(changed(program, kind, **changes)), images(SHAPE, 8))
    # Every other step gets the model's own values, and is right.
    assert [step.name for step in found.bad] == [name]
    assert not found.ok
    assert found.trunk_equal == (kind in (Conv, Linear))
    assert f"Wrong: {name}." in found.explain() and "WRONG" in str(found)


def test_another_model_of_the_same_structure(model, program):
    other = network()
    with torch.no_grad():
        other[3].conv.weight.neg_()
    found = verify(other, packed(program), images(SHAPE))
    assert [step.name for step in found.bad] == ["3.activation"]
    assert found.relative_difference > 1e-3 and not found.equal


class Crooked(Interpreter):
    """Gives something else as a whole than step by step, as a buffer used twice would."""

    def run(self, x, threads=1):
        y = super().run(x, threads)
        y[-1] += 1e-6
        return y


def test_a_whole_that_is_not_its_steps(model, program):
    found = verify(model, Packed(program, Crooked(program)), images(SHAPE, 4))
    assert not found.bad and found.trunk_equal
    assert not found.run_equal and not found.ok
    assert "something else than its steps" in found.explain()


class Silent(Interpreter):
    """Hides what one step makes."""

    def __init__(self, program: Program, hidden: str) -> None:
        super().__init__(program)
        self.hidden = hidden
        self.real = self.steps
        self.steps = tuple(self._hide(step) for step in self.steps)

    def _hide(self, step: Step) -> Step:
        return step._replace(output=None) if step.name == self.hidden else step

    def trace(self, values: Mapping[str, np.ndarray]) -> Iterator[tuple[Step, Any]]:
        return ((self._hide(step), None if step.name == self.hidden else made) for step, made in super().trace(values))


def test_a_step_without_a_value_leaves_its_operation_unchecked(model, program):
    found = verify(model, Packed(program, Silent(program, "4")), images(SHAPE))
    assert found.unchecked == ("4",) and not found.ok
    assert "Not checked: 4." in found.explain()


class Fused:
    """Joins each sum to the operation before it, as a compiled engine does."""

    def __init__(self, program: Program) -> None:
        self.interpreter = Interpreter(program)
        self.run = self.interpreter.run
        joined: list[Step] = []
        for step in self.interpreter.steps:
            if step.kind == "add":
                before = joined.pop()
                inputs = dict.fromkeys((*before.inputs, *(name for name in step.inputs if name != before.output)))
                step = Step(step.name, "conv_add", tuple(inputs), step.output, (*before.operations, step.name))
            joined.append(step)
        self.steps = tuple(joined)

    def trace(self, values: Mapping[str, np.ndarray]) -> Iterator[tuple[Step, Any]]:
        by_output = {step.output: step for step in self.steps}
        # What lies within a step comes from the step itself.
        inside = {name for step in self.steps for name in step.operations[:-1]}
        given = {name: value for name, value in values.items() if name not in inside}
        for step, made in self.interpreter.trace(given):
            if step.output in by_output:
                yield by_output[step.output], made


def test_steps_of_several_operations(model, program):
    found = verify(model, Packed(program, Fused(program)), images(SHAPE))
    fused = [step for step in found.steps if step.kind == "conv_add"]
    assert len(fused) == 1 and fused[0].exact and found.ok
    wrong = changed(program, BinaryConv, weight=bit)
    assert [step.name for step in verify(model, Packed(wrong, Fused(wrong)), images(SHAPE)).bad] == [fused[0].name]


class Placing:
    """Joins values by where it puts them, without a step, as a compiled engine does."""

    def __init__(self, program: Program) -> None:
        self.interpreter = Interpreter(program)
        self.run = self.interpreter.run
        self.steps = tuple(step for step in self.interpreter.steps if step.kind != "concat")

    def trace(self, values: Mapping[str, np.ndarray]) -> Iterator[tuple[Step, Any]]:
        return ((step, made) for step, made in self.interpreter.trace(values) if step.kind != "concat")


def test_concatenations_that_are_no_steps():
    torch.manual_seed(0)
    model = with_history(nn.Sequential(BinaryFactorisedReduce(3, 8), BinaryBlock(8, 8, 3)))
    program = capture(model, images(SHAPE))
    assert verify(model, Packed(program, Placing(program)), images(SHAPE)).ok
    (parts,) = (operation.parts for operation in program.operations if isinstance(operation, Concat))
    wrong = changed(program, Concat, parts=parts[::-1])
    found = verify(model, Packed(program, Placing(wrong)), images(SHAPE))
    # Each step by itself is right: it is what they read of each other that is not.
    assert not found.bad and not found.unchecked
    assert not found.run_equal and not found.ok


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + x


def test_a_step_with_a_real_operation_is_not_exact():
    torch.manual_seed(0)
    model = Shortcut().eval()
    program = capture(model, images(SHAPE))
    (step,) = verify(model, Packed(program, Fused(program)), images(SHAPE)).steps
    assert step.kind == "conv_add" and not step.exact and step.ok


class Once(Interpreter):
    """Wrong in its first example alone."""

    wrong = True

    def trace(self, values: Mapping[str, np.ndarray]) -> Iterator[tuple[Step, Any]]:
        for step, made in super().trace(values):
            yield step, made + 1 if step.name == "4" and self.wrong else made
        self.wrong = False


def test_one_wrong_example_is_enough(model, program):
    found = verify(model, Packed(program, Once(program)), images(SHAPE, 3))
    assert [step.name for step in found.bad] == ["4"]


class Overflowing(Interpreter):
    """Makes NaN of large images."""

    def trace(self, values: Mapping[str, np.ndarray]) -> Iterator[tuple[Step, Any]]:
        large = np.abs(values["input"]).max() > 1e3
        return ((step, np.where(large, np.float32(np.nan), made)) for step, made in super().trace(values))

    def run(self, x, threads=1):
        return np.full_like(super().run(x, threads), np.nan)


def test_numbers_that_are_not_finite():
    """NaN in one example is a difference, not something that a comparison with the others' overlooks."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    program = capture(model, images((2, 4, 4)))
    batch = images((2, 4, 4)) * torch.tensor([1.0, 1e5]).view(2, 1, 1, 1)
    found = verify(model, Packed(program, Overflowing(program)), batch)
    assert [step.name for step in found.bad] == ["0", "1"] and not found.ok
    assert found.rows_beyond_rounding == 2
    record = json.loads(found.to_json())
    assert record["relative_difference"] is None and record["steps"][0]["max_difference"] is None


def test_report(model, program):
    found = verify(model, packed(program), images(SHAPE, 3))
    lines = str(found).splitlines()
    assert lines[0].split() == ["step", "kind", "compared", "result"]
    assert lines[2].split()[:3] == ["3.activation", "binary_conv", str(3 * 8 * 12 * 10)]
    assert lines[2].endswith("equal")
    assert str(found).endswith(found.explain())
    assert "5 of 5 exact steps" in found.explain()
    record = json.loads(found.to_json())
    assert record["ok"] and record["trunk_equal"] and record["tolerance"] == TOLERANCE
    assert [step["name"] for step in record["steps"]] == [step.name for step in found.steps]


def test_a_tipped_sign_is_no_mistake(model, program):
    """A row far off, with every step right: rounding before a threshold, which is reported and not refused."""
    found = verify(model, packed(program), images(SHAPE))
    tipped = replace(found, equal=False, rows_beyond_rounding=1, relative_difference=0.3)
    assert isinstance(tipped, Verification) and tipped.ok
    assert "tipped a sign" in tipped.explain()


def test_leaves_the_model_as_it_is(model, program):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verify(model, packed(program), images(SHAPE))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(
    "batch",
    [
        images((3, 12, 11)),
        images((1, 12, 10)),
        images(SHAPE)[0],
        images(SHAPE)[:0],
        images(SHAPE).double(),
        images(SHAPE).numpy(),
    ],
)
def test_refuses_such_a_batch(model, program, batch):
    with pytest.raises(InvalidInputError, match=r"legal: torch.float32 \(n, 3, 12, 10\)"):
        verify(model, packed(program), batch)


def test_refuses_another_model(program):
    other = nn.Sequential(nn.Conv2d(3, 8, 3), BinaryBlock(8, 8, 3)).eval()
    with pytest.raises(InvalidInputError, match="the model has no value"):
        verify(other, packed(program), images(SHAPE))
    torch.manual_seed(0)
    wider = network()
    wider[10] = nn.Linear(12, 6)
    with pytest.raises(InvalidInputError, match=r"value '10' has shape \(6, 1, 1\), and the program's \(5, 1, 1\)"):
        verify(wider.eval(), packed(program), images(SHAPE))


def test_refuses_a_model_in_training_mode(program):
    with pytest.raises(UnsupportedError, match="training mode"):
        verify(network().train(), packed(program), images(SHAPE))
