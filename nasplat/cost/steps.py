"""Latency of binary networks from the steps of their packed programs, each measured once on this machine.

A network's latency is no sum over its choices: edges that read one value share its packed bits, sums are fused into
what comes before them. It is nearly a sum over the steps that are left after that. A space has few different steps, and
all its networks are made of them.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor, nn

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.cost.accuracy import Accuracy
from nasplat.cost.bench import Bench
from nasplat.cost.deployed import in_evaluation
from nasplat.cost.machine import steady
from nasplat.cost.meter import CostMeter
from nasplat.cost.readings import Progress, Readings, WholeNetworks, silent, subject, table_facts
from nasplat.cost.step_estimates import StepEstimates
from nasplat.cost.table import HELD_OUT, CostTable, check_held_out
from nasplat.cost.table_file import read_table, write_table
from nasplat.errors import InvalidInputError, UnsupportedError
from nasplat.packed import PackedProgram, pack
from nasplat.packed.graph import Program
from nasplat.packed.steps import step_keys, step_kind, timed_steps
from nasplat.runtimes import PackedBits
from nasplat.space import SearchSpace

VERSION = 1

FITTED = 24
"""Whole networks that the scales are fitted to."""

LOOKED_AT = 10
"""Latest networks whose share of new steps says whether a space's steps are known."""

NEW = 0.03
"""That share below which they are."""

MOST = 300
"""Networks after which a space has too many steps."""

COLLECTED = 4
"""Networks packed after which memory is collected: tracing leaves each network in a cycle of references."""

ESTIMATED = 0.5
"""Share of a prediction that may come from steps that were not timed but estimated."""

ROUNDS = 5
"""How often each program is timed, some seconds apart: what disturbs at one time does not at another."""

AT_ONCE = 16
"""Programs that are timed while the bench is held once: a second's work or less."""

CONTEXTS = 3
"""Programs in which a step is timed: what it takes depends a little on what ran before it."""

TWICE = 2
"""Measurements of each whole network, some rounds apart; the least counts."""

PRIOR = 0.1
"""How far the scale of one kind of step may be from that of all, as a share, where the data do not say more."""

NOISE = 0.01
"""Relative error of a whole network's latency that is expected; what is much further off counts less."""


@dataclass(frozen=True)
class StepTable:
    """Milliseconds of the steps of one space's packed programs, and how they add up. Made by :meth:`measured`.

    A network's latency is ``constant + sum of scale[kind of step] * time of step``. Constant and scales are fitted to
    whole networks: they say what steps take that run without a clock between them.

    Attributes:
        metric: What is given: ``latency_ms``.
        space: Identity of the space that it belongs to.
        steps: Milliseconds of each step by its key (``nasplat.packed.steps``).
        constant: Milliseconds that every network takes.
        scales: Factor per kind of step.
        accuracy: On networks that neither steps nor scales were fitted to.
        facts: How it was made: runtime, versions, threads, processor, date, seconds; ``covered`` is the share of new
            samples' time that is of steps among them.
    """

    metric: str
    space: str
    steps: tuple[tuple[str, float], ...] = field(repr=False)
    constant: float
    scales: tuple[tuple[str, float], ...]
    accuracy: Accuracy
    facts: Mapping[str, str | int | float] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        numbers = [self.constant, *(value for _, value in (*self.steps, *self.scales))]
        if not all(math.isfinite(value) and value >= 0 for value in numbers):
            raise InvalidInputError(f"step table of {self.metric}: every time and scale must be finite and at least 0")
        lacking = {step_kind(key) for key, _ in self.steps} - {kind for kind, _ in self.scales}
        if lacking:
            raise InvalidInputError(f"step table of {self.metric}: no scale for {', '.join(sorted(lacking))}")

    # Making one.

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
        fitted: int = FITTED,
        held_out: int = HELD_OUT,
        readings: str | Path | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Measure the steps of a space on this machine: ``StepTable.measured(space, x, Latency("packed"))``.

        Architectures are sampled, built and packed until they bring hardly any new step. Each step is then timed in
        several programs and rounds, and some whole networks are measured.

        Args:
            space: Of binary networks.
            example: One input ``(1, channels, height, width)``.
            meter: Measures a built network on packed bits. Its metric is what the table gives.
            metric: One of the meter's.
            bench: Where measuring is exclusive; None takes this machine's.
            seed: Of the architectures.
            fitted: Whole networks that the scales are fitted to, 8 or more.
            held_out: Whole networks besides, that the table is judged on, 20 or more.
            readings: See :meth:`nasplat.cost.table.CostTable.measured`.
            progress: Told of each network that was packed, each round of timing, each network that was measured.

        Raises:
            UnsupportedError: The space's networks cannot be packed or bring ever more steps, or Numba is not installed.
            InvalidInputError: No such metric, too few networks, or ``readings`` are those of something else.
        """
        check_held_out(held_out)
        if getattr(meter, "runtime", "packed") not in ("packed", "auto", PackedBits()):
            raise InvalidInputError(f"steps are those of packed programs, and {meter!r} measures another runtime")
        if not is_whole(fitted, 8):
            raise InvalidInputError(f"fitted is {fitted!r}; legal: an integer from 8 up")
        bench = bench or Bench()
        kept = Readings(Path(readings) if readings else None, subject("steps", space, example, meter, metric))
        whole = WholeNetworks(space, example, meter, metric, bench, kept)
        rng = np.random.default_rng(seed)
        packing = _Packing(space, example, bench)
        packing.explore(rng, progress)
        chosen = [space.sample(rng) for _ in range(fitted)]
        found = [packing.keys(architecture) for architecture in chosen]
        packing.prune()
        held = [space.sample(rng) for _ in range(held_out)]
        asked_for = [packing.keys(architecture, keep=False) for architecture in held]
        architectures = [*chosen, *held]
        # Whole networks between the rounds, so that both see the machine at the same times.
        asked = list(range(len(architectures))) * TWICE
        found_costs: dict[int, list[float]] = {}
        for turn, part in enumerate(np.array_split(asked, ROUNDS)):
            _time(packing, bench, kept, turn + 1, progress)
            for number in part.tolist():
                progress("networks", sum(map(len, found_costs.values())), len(asked))
                found_costs.setdefault(number, []).append(whole(architectures[number]))
        progress("networks", len(asked), len(asked))
        costs = [min(found_costs[number]) for number in range(len(architectures))]
        steps = _step_times(kept, packing)
        constant, scales = _fit(found, costs[:fitted], steps)
        table = cls(
            metric,
            space.identity,
            tuple(sorted(steps.items())),
            constant,
            tuple(sorted(scales.items())),
            Accuracy.of([1.0, 1.0], [1.0, 1.0]),
        )
        predicted = [table._sum(keys) for keys in asked_for]
        pairs = [(p, cost) for p, cost in zip(predicted, costs[fitted:], strict=True) if p is not None]
        if len(pairs) < held_out / 2:
            raise UnsupportedError(
                f"of {held_out} networks of {space.name} only {len(pairs)} can be predicted from the steps of "
                f"{packing.tried} others. CostTable.measured adds up choices instead"
            )
        every = [(key, table._time(key)) for keys in asked_for for key in keys]
        covered = sum(time for key, time in every if key in steps) / sum(time for _, time in every)
        return replace(
            table,
            accuracy=Accuracy.of(*zip(*pairs, strict=True)),
            facts={
                **table_facts(kept, example, whole.calls, whole.suspect),
                "steps": len(steps),
                "covered": round(covered, 4),
            },
        )

    # Using one.

    def predict(self, architecture: Architecture, model: nn.Module, example: Tensor) -> float | None:
        """Milliseconds of a built network; None where too much of it is not in the table.

        A step that is not, is estimated from those of its kind by its sizes, as long as no more than
        :data:`ESTIMATED` of the sum comes from such steps.

        Args:
            architecture: Of the network.
            model: The network; it is left as it is.
            example: One input ``(1, channels, height, width)``.

        Raises:
            InvalidInputError: The architecture is of another space, or the table of another input.
        """
        if architecture.space != self.space:
            raise InvalidInputError(f"a step table of {self.space} has no times for {architecture.space}")
        shape = "x".join(map(str, example.shape[1:]))
        if self.facts.get("input", shape) != shape:
            raise InvalidInputError(f"the step table was made for inputs {self.facts['input']}; this one is {shape}")
        return self._sum(step_keys(_packed(model, example)))

    def table(self, space: SearchSpace, example: Tensor, seed: int = 0, progress: Progress = silent) -> CostTable:
        """The additive table nearest to this one: the expected latency of mixtures, for a loss.

        Nothing is measured, but some hundreds of networks are built and packed. How much is lost by adding up choices
        instead of steps is the new table's ``accuracy``, which is against this one.

        Args:
            space: The table's.
            example: As the table was made with.
            seed: Of the architectures.
            progress: Told of each network.
        """

        def cost(architecture: Architecture) -> float:
            with torch.random.fork_rng(devices=[]):
                keys = step_keys(_packed(space.build(architecture).eval(), example))
            return self.constant + sum(self._time(key) for key in keys)

        if space.identity != self.space:
            raise InvalidInputError(f"a step table of {self.space} has no times for {space.identity}")
        made = CostTable.fit(space, self.metric, cost, np.random.default_rng(seed), oversampling=2.0, progress=progress)
        return replace(made, facts={**self.facts, "of": "step table"})

    @cached_property
    def _times(self) -> dict[str, float]:
        """Milliseconds of each step that was timed, to scale."""
        scales = dict(self.scales)
        return {key: scales[step_kind(key)] * milliseconds for key, milliseconds in self.steps}

    @cached_property
    def _estimates(self) -> StepEstimates:
        return StepEstimates(self._times)

    def _time(self, key: str) -> float:
        """Milliseconds of a step, timed or estimated."""
        return self._times[key] if key in self._times else self._estimates(key)

    def _sum(self, keys: Sequence[str]) -> float | None:
        """Milliseconds of a network; None where too much of it would be estimated."""
        total = self.constant + sum(map(self._time, keys))
        estimated = sum(self._time(key) for key in keys if key not in self._times)
        return total if estimated <= ESTIMATED * total else None

    # Files.

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON."""
        return write_table(path, "step", VERSION, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> StepTable:
        """Read a table that :meth:`save` wrote.

        Raises:
            InvalidInputError: The file is not a step table of a version that this nasplat reads.
        """

        def make(record: dict[str, Any]) -> StepTable:
            for name in ("steps", "scales"):
                record[name] = tuple((str(key), float(value)) for key, value in record[name])
            record["accuracy"] = Accuracy.from_json(record["accuracy"])
            return cls(**record)

        return read_table(path, "step", (VERSION,), make)


def _packed(model: nn.Module, example: Tensor) -> PackedProgram:
    with torch.no_grad():
        return pack(in_evaluation(model), example[:1].cpu())


class _Packing:
    """Packs networks of a space, and keeps some programs for each step that it came across.

    Attributes:
        programs: Those that are to be timed and the keys of their steps, by architecture.
        tried: Networks that were sampled.
    """

    def __init__(self, space: SearchSpace, example: Tensor, bench: Bench) -> None:
        self.programs: dict[str, tuple[Program, frozenset[str]]] = {}
        self.tried = 0
        self._space, self._example, self._bench = space, example, bench
        self._known: Counter[str] = Counter()  # in how many of the programs
        self._keys: dict[str, tuple[str, ...]] = {}

    def keys(self, architecture: Architecture, keep: bool = True) -> tuple[str, ...]:
        """Keys of a network's steps; if it may be kept, it is where one of them is in too few programs."""
        if architecture.id in self._keys:
            return self._keys[architecture.id]
        with self._bench.training(), torch.random.fork_rng(devices=[]):
            program = _packed(self._space.build(architecture).eval(), self._example)
            keys = step_keys(program)
        if keep and any(self._known[key] < CONTEXTS for key in keys):
            # Without what runs it, which takes as much memory again.
            self.programs[architecture.id] = program.program, frozenset(keys)
            self._known.update(frozenset(keys))
        self._keys[architecture.id] = keys
        if len(self._keys) % COLLECTED == 0:
            gc.collect()
        return keys

    def explore(self, rng: np.random.Generator, progress: Progress) -> None:
        """Sample until networks bring hardly any new step.

        Raises:
            UnsupportedError: There are too many steps.
        """
        new: list[float] = []
        while len(new) < LOOKED_AT or statistics.fmean(new[-LOOKED_AT:]) > NEW:
            progress("programs", self.tried, None)
            if self.tried >= MOST:
                raise UnsupportedError(
                    f"{self.tried} networks of {self._space.name} had {len(self._known)} different steps, and there "
                    "are still many new ones: too many to time each. CostTable.measured adds up choices instead"
                )
            before = set(self._known)
            keys = self.keys(self._space.sample(rng))
            new.append(sum(key not in before for key in keys) / len(keys))
            self.tried += 1

    def prune(self) -> None:
        """Let programs go whose steps are all in enough others."""
        for name, (_, keys) in list(self.programs.items()):
            if all(self._known[key] > CONTEXTS for key in keys):
                del self.programs[name]
                self._known.subtract(keys)


def _time(packing: _Packing, bench: Bench, kept: Readings, turns: int, progress: Progress) -> None:
    """Bring each step of each program to so many readings."""
    wanted = [
        (name, program)
        for name, (program, keys) in packing.programs.items()
        if any(len(kept[_reading(name, key)]) < turns for key in keys)
    ]
    done = len(packing.programs) - len(wanted)
    for first in range(0, len(wanted), AT_ONCE):
        progress(f"steps, round {turns} of {ROUNDS}", done + first, len(packing.programs))
        ready = []
        for name, program in wanted[first : first + AT_ONCE]:
            with bench.training():
                ready.append((name, PackedProgram(program)))
                ready[-1][1].engine  # noqa: B018  laid out now, not while the bench is held
        with bench.measuring(1) as processors, steady(1, processors):
            timed = [(name, timed_steps(program)) for name, program in ready]
        for name, times in timed:
            for key, milliseconds in times.items():
                if len(kept[_reading(name, key)]) < turns:
                    kept.add(_reading(name, key), milliseconds)


def _step_times(kept: Readings, packing: _Packing) -> dict[str, float]:
    """Milliseconds of each step: the least of the rounds in a program, and the median of the programs."""
    found: dict[str, list[float]] = {}
    for name, (_, keys) in packing.programs.items():
        for key in keys:
            found.setdefault(key, []).append(min(kept[_reading(name, key)]))
    return {key: statistics.median(values) for key, values in found.items()}


def _reading(name: str, key: str) -> str:
    """Name of the readings of a step in the program of an architecture."""
    return f"program {name}: {key}"


def _fit(
    found: Sequence[Sequence[str]], costs: Sequence[float], steps: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """Constant, and scale per kind: robust relative least squares, with all scales near that of the whole."""
    kinds = sorted({step_kind(key) for key in steps})
    sums: NDArray[np.float64] = np.zeros((len(found), len(kinds)))
    for row, keys in zip(sums, found, strict=True):
        for key, count in Counter(keys).items():
            row[kinds.index(step_kind(key))] += count * steps[key]
    measured = np.asarray(costs)
    scale = float(np.median(measured / sums.sum(1)))

    def errors(x: NDArray[np.float64]) -> NDArray[Any]:
        data = ((x[0] * measured.min() + sums @ (scale * x[1:])) / measured - 1) / NOISE
        return np.concatenate([data, [x[0] / PRIOR], (x[1:] - 1) / PRIOR])

    start = np.concatenate([[0.0], np.ones(len(kinds))])
    best = least_squares(errors, start + 1e-6, bounds=(0.0, np.inf), loss="soft_l1").x
    constant = float(best[0] * measured.min())
    return constant, {kind: float(scale * x) for kind, x in zip(kinds, best[1:], strict=True)}
