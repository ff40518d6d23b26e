"""Whether a packed program computes what its model computes, layer by layer and from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasplat.errors import InvalidInputError
from nasplat.packed.engine import Engine
from nasplat.packed.graph import (
    INPUT,
    Add,
    Affine,
    Argmax,
    BinaryConv,
    Concat,
    Conv,
    Linear,
    Mean,
    Operation,
    Pool,
    Program,
    Shuffle,
    check_program,
)
from nasplat.packed.program import PackedProgram
from nasplat.packed.traced import Traced

TOLERANCE = 1e-4
"""Largest difference, relative to the size of a value, that summing in another order explains. Seen: about 2e-6."""


@dataclass(frozen=True)
class StepCheck:
    """What one step of the engine makes of the model's own values.

    Attributes:
        name: Of the step.
        kind: What it does.
        exact: Whether it has to give the very same numbers: everything but sums of products of real numbers.
        equal: Whether it gave them.
        max_difference: Largest absolute difference, relative to the size of the model's value: its root mean square, or
            that of the terms that it is the sum of, where they cancel. NaN where one side alone is NaN.
        compared: How many numbers were compared.
    """

    name: str
    kind: str
    exact: bool
    equal: bool
    max_difference: float
    compared: int

    @property
    def ok(self) -> bool:
        """Equal where it has to be, else within :data:`TOLERANCE`."""
        return self.equal or (not self.exact and self.max_difference <= TOLERANCE)


@dataclass(frozen=True)
class Verification:
    """How a packed program compares with its model.

    Attributes:
        steps: Each step of the engine by itself, fed with the model's own values.
        unchecked: Operations of the program that no step computes whose value could be compared; none, as it should be.
        rows: Examples compared.
        run_equal: Whether the program as it is run gives what its steps give one by one, each on what those before it
            made. A concatenation that is no step of its own, but a matter of where its parts are put, is compared here.
        equal: Whether the program's outputs are the model's, bit for bit.
        relative_difference: Largest absolute difference of an output, in standard deviations of the model's outputs.
        relative_rms: Root mean square difference, in the same unit.
        argmax_agreement: Share of examples with the same largest output, in [0, 1].
        rows_beyond_rounding: Examples with a difference above :data:`TOLERANCE` standard deviations: rounding in a
            real layer has tipped a sign, or the pick of an expert, next to its threshold.
    """

    steps: tuple[StepCheck, ...]
    unchecked: tuple[str, ...]
    rows: int
    run_equal: bool
    equal: bool
    relative_difference: float
    relative_rms: float
    argmax_agreement: float
    rows_beyond_rounding: int

    @property
    def trunk_equal(self) -> bool:
        """Whether every step that has to be exact is: all binary convolutions, pools, sums and moves."""
        return all(step.equal for step in self.steps if step.exact)

    @property
    def ok(self) -> bool:
        """Whether every step computes what the model does, and the whole what its steps do.

        The differences from end to end are then those of rounding, and of signs that it tips. How much they matter is
        the network's matter: see :attr:`argmax_agreement`.
        """
        return self.run_equal and not self.unchecked and all(step.ok for step in self.steps)

    def __bool__(self) -> bool:
        """:attr:`ok`."""
        return self.ok

    @property
    def bad(self) -> tuple[StepCheck, ...]:
        """The steps that do not compute what the model does."""
        return tuple(step for step in self.steps if not step.ok)

    def explain(self) -> str:
        """A few sentences for a person."""
        exact = [step for step in self.steps if step.exact]
        real = [step for step in self.steps if not step.exact]
        lines = [
            f"{sum(step.equal for step in exact)} of {len(exact)} exact steps equal the model's bit for bit; of "
            f"{len(real)} real ones the largest difference is {_largest(real):.2g} of the value's size "
            f"(allowed: {TOLERANCE:g})."
        ]
        if self.bad:
            lines.append(f"Wrong: {', '.join(step.name for step in self.bad)}.")
        if self.unchecked:
            lines.append(f"Not checked: {', '.join(self.unchecked)}.")
        if not self.run_equal:
            lines.append("Run as a whole, the program gives something else than its steps one by one.")
        if self.equal:
            lines.append(f"End to end, all outputs of {self.rows} examples are equal.")
        else:
            lines.append(
                f"End to end, {self.argmax_agreement:.2%} of {self.rows} examples keep their class; largest difference "
                f"{self.relative_difference:.2g}, rms {self.relative_rms:.2g} of the outputs' standard deviation."
            )
        if self.rows_beyond_rounding:
            lines.append(
                f"In {self.rows_beyond_rounding} examples rounding next to a threshold tipped a sign."
                if self.ok
                else f"{self.rows_beyond_rounding} examples differ by more than rounding."
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it as a JSON object. A number that is not finite becomes null."""
        record = asdict(self)
        for step, plain in zip(self.steps, record["steps"], strict=True):
            plain |= {"ok": step.ok}
        record |= {"trunk_equal": self.trunk_equal, "ok": self.ok, "tolerance": TOLERANCE, "summary": self.explain()}
        return json.dumps(_finite(record), indent=2, allow_nan=False)

    def __str__(self) -> str:
        width = max((len(step.name) for step in self.steps), default=4)
        kinds = max((len(step.kind) for step in self.steps), default=4)
        rows = [f"{'step':{width}}  {'kind':{kinds}}  {'compared':>10}  result"]
        for step in self.steps:
            result = "equal" if step.equal else f"{step.max_difference:.2g}" + ("" if step.ok else "  WRONG")
            rows.append(f"{step.name:{width}}  {step.kind:{kinds}}  {step.compared:>10}  {result}")
        return "\n".join([*rows, "", self.explain()])


def verify(model: nn.Module, program: PackedProgram, batch: Tensor) -> Verification:
    """Compare a packed program with its model.

    Each step of the program's engine gets the model's own values as inputs, and what it makes is compared with the
    model's value: bit for bit, except where real numbers are multiplied and summed, in another order than PyTorch does.
    Then both are run from end to end. There such rounding may tip a sign next to its threshold, which no runtime that
    sums in another order can avoid; the steps show that nothing else differs.

    Args:
        model: The model that the program was packed from, in evaluation mode. It is not changed.
        program: What to verify.
        batch: ``(n, channels, height, width)``, float32, n >= 1. Examples are compared one at a time.

    Raises:
        InvalidInputError: The batch is not what the program takes, or the program was not packed from such a model.
        UnsupportedError: The model could not be packed.
    """
    logical = program.program
    _check_batch(batch, logical)
    traced = Traced(model, logical.input_shape)
    check = _Check(program.engine, logical)
    x = batch.detach().cpu().contiguous()
    outputs, references = program.engine.run(x.numpy()), []
    for example, output in zip(x, outputs, strict=True):
        reference, values = traced.run(example[None])
        check.match(reference, values)
        check.example({name: value[0].numpy() for name, value in values.items()})
        check.whole(output, example.numpy())
        references.append(reference)
    return Verification(
        steps=tuple(check.steps()),
        unchecked=check.unchecked,
        rows=len(batch),
        run_equal=check.run_equal,
        **_end_to_end(torch.from_numpy(outputs).flatten(1), torch.cat(references).flatten(1)),
    )


class _Check:
    """Compares step by step, over several examples."""

    def __init__(self, engine: Engine, program: Program) -> None:
        self.engine = engine
        self.program = program
        self.shapes = check_program(program)
        self.run_equal = True
        self.operations = {operation.name: operation for operation in program.operations}
        self.compared = [step for step in engine.steps if step.output is not None]
        self.joined = self._joined()
        count = len(self.compared)
        self.differences = [0.0] * count
        self.squares, self.numbers, self.terms = [0.0] * count, [0] * count, [0.0] * count
        self.equal = [True] * count

    def _joined(self) -> set[str]:
        """Concatenations that no step makes, of values that steps make."""
        made = {INPUT} | {str(step.output) for step in self.compared}
        joined: set[str] = set()
        for operation in self.program.operations:
            if isinstance(operation, Concat) and operation.name not in made and made.issuperset(operation.parts):
                joined.add(operation.name)
                made.add(operation.name)
        return joined

    @property
    def unchecked(self) -> tuple[str, ...]:
        """The operations that are part of no step whose value can be compared, and are not joined by their place."""
        checked = {name for step in self.compared for name in step.operations} | self.joined
        return tuple(name for name in self.operations if name not in checked)

    def match(self, output: Tensor, values: Mapping[str, Tensor]) -> None:
        """Refuse a model that does not have the program's values."""
        wanted = dict(self.shapes)
        names = [name for name in wanted if name not in values]
        if names:
            raise InvalidInputError(
                f"the model has no value {', '.join(map(repr, names[:3]))}, which the program computes; legal: the "
                "model that the program was packed from"
            )
        for name, shape in wanted.items():
            found = tuple(values[name].shape[1:])
            if found != (() if name in self._picks() else shape):
                raise InvalidInputError(
                    f"the model's value {name!r} has shape {found}, and the program's {shape}; legal: the model that "
                    "the program was packed from"
                )
        shape = self.shapes[self.program.output]
        expected = shape[:1] if self.program.flat else shape
        if tuple(output.shape[1:]) != expected:
            raise InvalidInputError(f"the model returns {tuple(output.shape[1:])} and the program {expected}")

    def _picks(self) -> set[str]:
        return {name for name, operation in self.operations.items() if isinstance(operation, Argmax)}

    def example(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Run every step on the model's values of one example."""
        index = 0
        for step, made in self.engine.trace(values):
            if step.output is None:
                continue
            assert made is not None
            self._compare(index, made, values[step.output])
            terms = [_terms(self.operations[name], values) for name in step.operations]
            self.terms[index] = max(self.terms[index], *terms)
            index += 1

    def whole(self, output: NDArray[Any], example: NDArray[Any]) -> None:
        """Compare what the whole program gives with what its steps give, each on what those before it made."""
        own: dict[str, NDArray[Any]] = {INPUT: example}
        for step, made in self.engine.trace({INPUT: example}):
            if step.output is not None and made is not None:
                own[step.output] = made
        # What an engine joins by where it puts the parts shows in the steps that read it.
        for operation in self.program.operations:
            if operation.name in self.joined and isinstance(operation, Concat):
                own[operation.name] = np.concatenate([own[part] for part in operation.parts])
        again = all(
            made is None or np.array_equal(made, own[str(step.output)], equal_nan=True)
            for step, made in self.engine.trace(own)
        )
        last = own.get(self.program.output, np.empty(0))
        self.run_equal = self.run_equal and again and np.array_equal(output, last, equal_nan=True)

    def _compare(self, index: int, made: NDArray[Any], value: NDArray[Any]) -> None:
        if made.shape != value.shape:
            raise InvalidInputError(
                f"step {self.compared[index].name!r} makes shape {made.shape}; the model's value has {value.shape}"
            )
        self.equal[index] &= np.array_equal(made, value, equal_nan=True)
        wanted = value.astype(np.float64)
        same = (made == value) | (np.isnan(made) & np.isnan(value))
        with np.errstate(invalid="ignore"):
            differences = np.where(same, 0.0, np.abs(made - wanted))
        # Not Python's max, which loses a NaN.
        self.differences[index] = float(np.maximum(self.differences[index], differences.max()))
        self.squares[index] += _mean_square(value) * value.size
        self.numbers[index] += value.size

    def steps(self) -> Iterator[StepCheck]:
        """What was found."""
        for index, step in enumerate(self.compared):
            size = max(math.sqrt(self.squares[index] / self.numbers[index]), self.terms[index])
            yield StepCheck(
                name=step.name,
                kind=step.kind,
                exact=all(_is_exact(self.operations[name]) for name in step.operations),
                equal=self.equal[index],
                # A value of nothing but zeros has no size of its own.
                max_difference=self.differences[index] / (size or 1.0),
                compared=self.numbers[index],
            )


def _is_exact(operation: Operation) -> bool:
    if isinstance(operation, Affine):
        return operation.scale is None and operation.shift is None
    return isinstance(operation, (BinaryConv, Pool, Add, Concat, Shuffle, Argmax))


def _terms(operation: Operation, values: Mapping[str, NDArray[Any]]) -> float:
    """How large the terms are that a real operation sums, about: rounding is relative to them."""
    if isinstance(operation, Mean):
        return math.sqrt(_mean_square(values[operation.x]))
    if not isinstance(operation, (Conv, Linear, Affine)):
        return 0.0
    size = math.sqrt(_mean_square(values[operation.x]))
    factors = np.ones(1)
    if not isinstance(operation, Affine):
        rows = operation.weight.reshape(operation.channels, -1).astype(np.float64)
        factors = np.sqrt(np.square(rows).sum(axis=1))
    if not isinstance(operation, Linear) and operation.scale is not None:
        factors = factors * np.abs(operation.scale)
    shift = 0.0 if operation.shift is None else float(np.abs(operation.shift).max())
    return float(factors.max()) * size + shift


def _mean_square(value: NDArray[Any]) -> float:
    """Of the finite numbers."""
    finite = value[np.isfinite(value)].astype(np.float64)
    return float(np.square(finite).mean()) if finite.size else 0.0


def _check_batch(batch: Tensor, program: Program) -> None:
    shape = program.input_shape
    if (
        not isinstance(batch, Tensor)
        or batch.dtype != torch.float32
        or tuple(batch.shape[1:]) != shape
        or len(batch) == 0
    ):
        got = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise InvalidInputError(f"batch is {got}; legal: torch.float32 (n, {', '.join(map(str, shape))}), n >= 1")


def _end_to_end(outputs: Tensor, references: Tensor) -> dict[str, Any]:
    """The figures of a comparison of outputs ``(n, k)``."""
    differences = (outputs.double() - references.double()).abs()
    # Outputs that are all the same have no scale of their own.
    scale = float(references.double().std(correction=0)) or 1.0
    return {
        "equal": torch.equal(outputs, references),
        "relative_difference": float(differences.max()) / scale,
        "relative_rms": float(differences.square().mean().sqrt()) / scale,
        "argmax_agreement": float((outputs.argmax(dim=1) == references.argmax(dim=1)).double().mean()),
        # Written so that NaN, which compares as false, counts as beyond.
        "rows_beyond_rounding": int((~(differences.amax(dim=1) <= TOLERANCE * scale)).sum()),
    }


def _largest(steps: list[StepCheck]) -> float:
    return float(np.max([0.0, *(step.max_difference for step in steps)]))


def _finite(value: Any) -> Any:
    """With null for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
