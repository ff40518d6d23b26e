"""A cost of architectures as a table: a constant, and an entry for each combination of choices that cost together.

Looking a cost up takes microseconds where building and counting takes a tenth of a second, and in a relaxed
architecture the table gives the expected cost, which has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.cost.accuracy import Accuracy
from nasplat.cost.bench import Bench
from nasplat.cost.counter import Count
from nasplat.cost.meter import CostMeter
from nasplat.cost.readings import Progress, Readings, WholeNetworks, silent, subject, table_facts
from nasplat.cost.table_file import read_table, write_table
from nasplat.errors import InvalidInputError
from nasplat.space import Group, Option, Relaxed, SearchSpace

Term: TypeAlias = tuple[tuple[str, ...], tuple[float, ...]]
"""Names of choices, and a cost per combination of their options, the last choice's options varying first."""

HELD_OUT = 20
"""Architectures that a table is not fitted to, and judged on, at least."""

VERSION = 2

READABLE = (1, 2)
"""Versions of files that can be read. The first had neither accuracy nor facts."""


@dataclass(frozen=True)
class CostTable:
    """Costs of one space's architectures.

    Made by :meth:`counted`, :meth:`measured` or :meth:`fit`, or read by :meth:`load`.

    Attributes:
        metric: What is given, unit in the name: ``macs``, ``ops``, ``latency_ms``.
        space: Identity of the space that it belongs to.
        constant: Cost of what every architecture has.
        choices: Names of all choices with their options.
        terms: What is added for the options of each set of choices.
        error: Greatest relative error on architectures that it was not fitted to. Near 0: the cost is a sum over the
            terms.
        accuracy: On the same architectures; None where a file of an earlier nasplat does not say.
        facts: How it was made: of a measured table the runtime, its versions, threads, processor, date, seconds.
    """

    metric: str
    space: str
    constant: float
    choices: tuple[tuple[str, tuple[Option, ...]], ...] = field(repr=False)
    terms: tuple[Term, ...] = field(repr=False)
    error: float
    accuracy: Accuracy | None = None
    facts: Mapping[str, str | int | float] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        options = {name: len(some) for name, some in self.choices}
        for names, values in self.terms:
            unknown = [name for name in names if name not in options]
            if unknown or len(values) != math.prod(options.get(name, 0) for name in names):
                raise InvalidInputError(
                    f"cost table of {self.metric}: the term {names} has {len(values)} values; needed: one per "
                    f"combination of options of the choices {', '.join(options)}"
                )
        if not all(math.isfinite(value) for _, values in self.terms for value in (self.constant, *values)):
            raise InvalidInputError(f"cost table of {self.metric}: every cost must be finite")

    # Making one.

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        metric: str,
        cost: Callable[[Architecture], float],
        rng: np.random.Generator,
        *,
        oversampling: float = 1.0,
        samples: int | None = None,
        held_out: int = HELD_OUT,
        progress: Progress = silent,
    ) -> Self:
        """The table that explains the costs of sampled architectures best (least squares).

        Samples are drawn until many in a row tell nothing new about the terms, and those that do are costed. So the
        table is exact where costs are sums over the terms of ``space.interactions()``, but for combinations that the
        space hardly ever draws: those get the greatest cost of their term. In a group, options cost what they cost more
        than the cheapest one of the group, and ``off`` is free.

        Args:
            space: As many of its samples are costed as the table has independent entries, and 20 to judge it on.
            metric: Name of the cost.
            cost: Of one architecture, finite.
            rng: Draws the architectures.
            oversampling: Samples per independent entry at least. 1 does for costs that are sums over the terms; what
                is no such sum, and noise, averages out with more.
            samples: Architectures to fit to at least, whatever ``oversampling`` says.
            held_out: Architectures besides that it is judged on, 20 or more.
            progress: Told of each architecture that was costed.

        Raises:
            InvalidInputError: A cost is not finite, or ``held_out`` is less than 20.
        """
        check_held_out(held_out)
        choices = {name: tuple(options) for name, options in space.choices.items()}
        names = [tuple(term) for term in space.interactions()]
        shapes = [tuple(len(choices[name]) for name in term) for term in names]
        offsets = np.cumsum([1, *(math.prod(shape) for shape in shapes)])

        def row(architecture: Architecture) -> np.ndarray[Any, np.dtype[np.float64]]:
            features = np.zeros(int(offsets[-1]))
            features[0] = 1.0
            for term, shape, offset in zip(names, shapes, offsets, strict=False):
                at = [choices[name].index(architecture.genes[name]) for name in term]
                features[offset + np.ravel_multi_index(at, shape)] = 1.0
            return features

        # The rarest combination of a term is one of so many: wait until it would have come.
        patience = max(25, 5 * max(map(math.prod, shapes)))
        basis = np.zeros((0, int(offsets[-1])))
        fitted: list[Architecture] = []
        seen = np.zeros(int(offsets[-1]), dtype=bool)
        known = 0
        least = samples or 0
        while known < patience or len(fitted) < max(least, oversampling * len(basis)):
            architecture = space.sample(rng)
            features = row(architecture)
            # Twice, against rounding: what is left of the features outside of what earlier samples span.
            rest = features - basis.T @ (basis @ features)
            rest = rest - basis.T @ (basis @ rest)
            if np.linalg.norm(rest) > 1e-6:
                basis = np.vstack([basis, rest / np.linalg.norm(rest)])
                known = 0
            else:
                known += 1
                if len(fitted) >= max(least, oversampling * len(basis)):
                    continue
            fitted.append(architecture)
            seen |= features > 0
        held = [space.sample(rng) for _ in range(held_out)]
        costs = np.zeros(len(fitted) + len(held))
        for number, architecture in enumerate((*fitted, *held)):
            progress("networks", number, len(costs))
            costs[number] = float(cost(architecture))
        progress("networks", len(costs), len(costs))
        if not np.isfinite(costs).all():
            raise InvalidInputError(f"cost table of {metric}: an architecture of {space.name} has no finite cost")
        solution = np.linalg.lstsq(np.array([row(a) for a in fitted]), costs[: len(fitted)], rcond=None)[0]
        for start, end in pairwise(offsets):
            # What no sample had is never the cheapest: at least as dear as all that were seen.
            values, known_ones = solution[start:end], seen[start:end]
            values[~known_ones] = values[known_ones].max()
        tables = [
            solution[start:end].reshape(shape) for start, end, shape in zip(offsets, offsets[1:], shapes, strict=False)
        ]
        constant = float(solution[0]) + _anchor(tables, names, choices, list(space.choice_groups.values()))
        table = cls(
            metric,
            space.identity,
            constant,
            tuple(choices.items()),
            tuple((term, tuple(values.ravel().tolist())) for term, values in zip(names, tables, strict=True)),
            0.0,
        )
        true = costs[len(fitted) :]
        given = np.array([table.cost(architecture) for architecture in held])
        error = float(np.max(np.abs(given - true) / np.maximum(np.abs(true), 1e-12)))
        return replace(table, error=error, accuracy=Accuracy.of(given.tolist(), true.tolist()))

    @classmethod
    def counted(cls, space: SearchSpace, example: Tensor, metric: str = "macs", seed: int = 0) -> Self:
        """A table of counted costs; no network is trained or timed.

        Args:
            space: Some hundreds of its architectures are built and counted, which takes seconds to minutes.
            example: One input ``(1, ...)``.
            metric: ``params``, ``macs``, ``bops``, ``flops``, ``ops`` or ``model_bytes`` (``nasplat.cost.count``).
            seed: Of the architectures.

        Raises:
            InvalidInputError: No such metric.
        """
        meter = Count()
        whole = WholeNetworks(space, example, meter, metric, Bench(), Readings(None, {}))
        return cls.fit(space, metric, whole, np.random.default_rng(seed))

    @classmethod
    def measured(
        cls,
        space: SearchSpace,
        example: Tensor,
        meter: CostMeter,
        metric: str = "latency_ms",
        *,
        bench: Bench | None = None,
        seed: int = 0,
        oversampling: float = 2.0,
        samples: int | None = None,
        held_out: int = HELD_OUT,
        readings: str | Path | None = None,
        progress: Progress = silent,
    ) -> Self:
        """A table of what a meter measures, on this machine: ``CostTable.measured(space, example, Latency())``.

        Whole networks are measured, so what happens between layers is part of the cost. The meter's noise is in the
        table; ``accuracy`` shows it, besides what is no sum over the terms.

        Args:
            space: Twice as many of its architectures as the table has independent entries are built and measured.
            example: One input ``(1, ...)``.
            meter: Measures a built network that was not trained.
            metric: One of the meter's.
            bench: Where measuring is exclusive; None takes this machine's.
            seed: Of the architectures.
            oversampling: See :meth:`fit`.
            samples: See :meth:`fit`.
            held_out: See :meth:`fit`.
            readings: File for the single measurements. Called again with the same file after an interrupt, it goes on
                from them; it is left where it is. None keeps none.
            progress: See :meth:`fit`.

        Raises:
            InvalidInputError: No such metric, or ``readings`` are those of something else.
        """
        kept = Readings(Path(readings) if readings else None, subject("table", space, example, meter, metric))
        whole = WholeNetworks(space, example, meter, metric, bench or Bench(), kept)
        rng = np.random.default_rng(seed)
        table = cls.fit(
            space, metric, whole, rng, oversampling=oversampling, samples=samples, held_out=held_out, progress=progress
        )
        return replace(table, facts=table_facts(kept, example, whole.calls, whole.suspect))

    # Using one.

    def cost(self, architecture: Architecture) -> float:
        """Cost of one architecture.

        Raises:
            InvalidInputError: The architecture is of another space.
        """
        if architecture.space != self.space:
            raise InvalidInputError(f"a cost table of {self.space} has no costs for {architecture.space}")
        options = dict(self.choices)
        total = self.constant
        for names, values in self.terms:
            at = [options[name].index(architecture.genes[name]) for name in names]
            total += values[int(np.ravel_multi_index(at, [len(options[name]) for name in names]))]
        return total

    def predict(self, architecture: Architecture, model: nn.Module, example: Tensor) -> float:
        """:meth:`cost`, which needs neither the network nor an input."""
        return self.cost(architecture)

    def expected(self, relaxed: Relaxed) -> Tensor:
        """Expected cost where each choice takes its options with the weights of ``relaxed``: a differentiable scalar.

        A choice whose weights do not sum to 1 counts in proportion.

        Args:
            relaxed: Per choice a weight per option.
        """
        device = next(iter(relaxed.values())).device
        alone, alone_values, joint = self._tensors
        total = torch.tensor(self.constant, device=device)
        if alone:
            total = total + torch.cat([relaxed[name] for name in alone]) @ alone_values.to(device)
        for names, values in joint:
            part = values.to(device)
            for name in names:
                part = torch.tensordot(relaxed[name], part, dims=1)
            total = total + part
        return total

    @cached_property
    def _tensors(self) -> tuple[list[str], Tensor, list[tuple[tuple[str, ...], Tensor]]]:
        """Choices that cost by themselves, with all their values in a row, and the terms of several choices."""
        options = dict(self.choices)
        alone = [(names[0], values) for names, values in self.terms if len(names) == 1]
        joint = [
            (names, torch.tensor(values).view([len(options[name]) for name in names]))
            for names, values in self.terms
            if len(names) > 1
        ]
        return [name for name, _ in alone], torch.tensor([value for _, values in alone for value in values]), joint

    # Files.

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON."""
        return write_table(path, "cost", VERSION, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read a table that :meth:`save` wrote.

        Raises:
            InvalidInputError: The file is not a cost table of a version that this nasplat reads.
        """

        def make(record: dict[str, Any]) -> CostTable:
            record["choices"] = tuple((str(name), tuple(options)) for name, options in record["choices"])
            record["terms"] = tuple((tuple(names), tuple(map(float, values))) for names, values in record["terms"])
            if record.get("accuracy") is not None:
                record["accuracy"] = Accuracy.from_json(record["accuracy"])
            return cls(**record)

        return read_table(path, "cost", READABLE, make)


def check_held_out(held_out: int) -> None:
    """Refuse to judge on too few.

    Raises:
        InvalidInputError: They are fewer than 20.
    """
    if not is_whole(held_out, HELD_OUT):
        raise InvalidInputError(f"held_out is {held_out!r}; legal: an integer from {HELD_OUT} up")


def _anchor(
    tables: Sequence[np.ndarray[Any, np.dtype[np.float64]]],
    names: Sequence[tuple[str, ...]],
    choices: Mapping[str, tuple[Option, ...]],
    groups: Sequence[Group],
) -> float:
    """Make ``off`` free and the cheapest option of each group free, in place; gives what the constant gains.

    As many members of a group are on in every architecture, so samples cannot tell the cost of being on from the
    constant. Where a member of a group costs together with other choices, nothing is done.
    """
    alone = {term[0]: table for term, table in zip(names, tables, strict=True) if len(term) == 1}
    gained = 0.0
    for group in groups:
        if not all(name in alone for name in group.names):
            continue
        on: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        for name in group.names:
            off = choices[name].index(group.off)
            gained += float(alone[name][off])
            alone[name] -= alone[name][off]
            on.append(np.delete(alone[name], off))
        least = float(min(values.min() for values in on))
        for name in group.names:
            alone[name] -= least
            alone[name][choices[name].index(group.off)] = 0.0
        gained += group.pick * least
    return gained
