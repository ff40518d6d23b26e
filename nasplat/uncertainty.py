"""How sure a metric, a comparison and a front are: standard errors from what was recorded, probabilities, ties.

Each value is taken as normally distributed about what was measured, with its standard error, independently of the
others (a flat prior). What decides between candidates is then a probability, and a difference within the noise is a
tie. Losses are smaller-is-better, as in :mod:`nasplat.objectives`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri
from torch.utils.data import DataLoader

from nasplat import objectives
from nasplat.cost.counter import Count
from nasplat.data.sources import LoaderSource
from nasplat.errors import InvalidInputError
from nasplat.objectives import Objective
from nasplat.strategy import History, Trial
from nasplat.task import Task

TEST_RETEST = 0.01
"""Least relative standard error of a measured time.

Blocks of one measurement share a process, its memory layout and the machine's state, which the next measurement of the
same file has not; measured again later, the median differs by about this share.
"""

SUSPECT = 0.1
"""Least relative standard error of a time that was measured while the machine was disturbed (``_suspect``)."""

CONFIDENCE = 0.95
"""Where none is given."""

DRAWS = 10_000
"""Monte Carlo draws of a front: a probability of one half has a standard error of 0.005."""

SD_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

NEGLIGIBLE = 1e-6
"""A candidate that another dominates with at least 1 minus this probability is not drawn."""

Floats: TypeAlias = NDArray[np.float64]
Origin: TypeAlias = Literal["exact", "replicates", "blocks", "examples", "prediction", "unknown"]
Samples: TypeAlias = Callable[[Trial], Mapping[str, Sequence[float]]]


# What is known of one value.


@dataclass(frozen=True)
class Estimate:
    """A metric of a candidate, and how far it may be off.

    Attributes:
        value: In the metric's unit; the mean where the candidate was trained several times.
        error: Standard error in the same unit; 0 is exact, None is not known.
        origin: What the error comes from: ``exact`` (counted), ``replicates`` (several trials of the architecture),
            ``blocks`` (of a measurement), ``examples`` (of the validation split), ``prediction`` (from a table of
            costs, which knows how far it was off), ``unknown``.
    """

    value: float
    error: float | None
    origin: Origin

    def __str__(self) -> str:
        return f"{self.value:.6g}" + (f" ± {self.error:.2g}" if self.error else "")


def binomial_error(share: float, examples: int) -> float:
    """Standard error of a share of correct answers among independent examples.

    With two right and two wrong answers added (Agresti and Coull, The American Statistician 52, 1998), so that a share
    of 0 or 1 is not taken as exact. That of drawing the examples; the seed of the training adds its own.

    Args:
        share: In [0, 1].
        examples: At least 1.
    """
    if not 0 <= share <= 1 or examples < 1:
        raise InvalidInputError(f"share is {share}, examples is {examples}; legal: [0, 1], and at least 1")
    centre = (share * examples + 2) / (examples + 4)
    return math.sqrt(centre * (1 - centre) / (examples + 4))


def median_error(block_medians: Sequence[float]) -> float:
    """Standard error of a median by the medians of blocks of readings, in their unit; 0 with one block.

    The asymptotic one of a normal sample, ``sqrt(pi / 2) * sd / sqrt(n)``: readings within a block are no independent
    ones.
    """
    n = len(block_medians)
    return math.sqrt(math.pi / 2 / n) * statistics.stdev(block_medians) if n > 1 else 0.0


def estimate(metric: str, trials: Sequence[Trial], samples: Samples, examples: int | None) -> Estimate:
    """What is known of a metric of one architecture.

    Args:
        metric: Its name.
        trials: Trials of the architecture that have it, at least one.
        samples: The single readings of a trial by name (``samples.json``); empty where none were kept.
        examples: Size of the validation split; None where it is not known.
    """
    single = [_of_one(metric, trial, samples(trial), examples) for trial in trials]
    if len(single) == 1:
        return single[0]
    n = len(single)
    values = [one.value for one in single]
    value, spread = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    if len(set(values)) == 1:
        value, spread = values[0], 0.0
    kinds = {one.origin for one in single}
    if kinds == {"prediction"}:  # one prediction, however often it is made
        return single[0]
    if kinds & {"blocks", "prediction"}:  # two or three that agree by chance are no better than the measurements are
        own = math.sqrt(sum((one.error or 0.0) ** 2 for one in single)) / n
        return Estimate(value, max(spread, own), "replicates")
    if "examples" in kinds:  # all replicates answered the same examples, so that part does not shrink
        assert examples is not None
        return Estimate(value, math.hypot(spread, binomial_error(value, examples)), "replicates")
    return Estimate(value, spread, "exact" if kinds == {"exact"} and spread == 0 else "replicates")


def _of_one(
    metric: str, trial: Trial, samples: Mapping[str, Sequence[float]], examples: int | None
) -> Estimate:  # fmt: skip
    value = trial.metrics[metric]
    if metric in Count().metrics:
        return Estimate(value, 0.0, "exact")
    if metric == "val_accuracy" and examples is not None and 0 <= value <= 1:
        return Estimate(value, binomial_error(value, examples), "examples")
    if "_speedup_" in metric:  # a ratio of two times: the relative errors add in quadrature
        stem, _, twin = metric.partition("_speedup_")
        parts = [_relative(name, trial, samples) for name in (stem, f"{stem}_{twin}")]
        if None not in parts:
            return Estimate(value, abs(value) * math.hypot(*(part or 0.0 for part in parts)), "blocks")
    if is_predicted(metric, trial) and (deviation := trial.metrics.get(f"{metric}_mad")) is not None:
        return Estimate(value, SD_PER_MAD * deviation, "prediction")
    relative = _relative(metric, trial, samples)
    return Estimate(value, None, "unknown") if relative is None else Estimate(value, abs(value) * relative, "blocks")


def _relative(metric: str, trial: Trial, samples: Mapping[str, Sequence[float]]) -> float | None:
    """Relative standard error of a measured time; None where the metric is none."""
    value, deviation = trial.metrics.get(metric), trial.metrics.get(f"{metric}_block_sd")
    blocks = _block_medians(samples.get(metric, ()), samples.get(f"{metric}_block", ()))
    if not blocks:  # readings that stand for themselves
        blocks = list(samples.get(metric, ()))
    if not value or (deviation is None and not blocks):
        return None
    # Without the readings the number of blocks is not known: the deviation itself is an upper bound.
    error = median_error(blocks) if blocks else deviation or 0.0
    return max(error / abs(value), SUSPECT if is_suspect(metric, trial) else TEST_RETEST)


def _block_medians(readings: Sequence[float], blocks: Sequence[float]) -> list[float]:
    of_block: dict[float, list[float]] = {}
    if len(readings) == len(blocks):
        for reading, block in zip(readings, blocks, strict=True):
            of_block.setdefault(block, []).append(reading)
    return [statistics.median(block) for block in of_block.values()]


def is_suspect(metric: str, trial: Trial) -> bool:
    """Whether the machine was disturbed while this metric was measured."""
    facts = trial.facts.get(metric)
    return trial.metrics.get(f"{metric}_suspect", 0.0) > 0 or (
        isinstance(facts, Mapping) and bool(facts.get("suspect"))
    )


def is_predicted(metric: str, trial: Trial) -> bool:
    """Whether this metric was predicted from a table of costs and not measured."""
    return f"{metric}_predicted" in trial.metrics and f"{metric}_prediction_error" not in trial.metrics


def validation_examples(task: Task | None) -> int | None:
    """How many examples a task validates on; None where that is not known without going through them."""
    if task is None or task.data is None:
        return None
    source = task.load().validation
    if isinstance(source, LoaderSource):
        loader = source.loader
        if isinstance(loader, DataLoader) and not loader.drop_last and isinstance(loader.sampler, Sized):
            return len(loader.sampler)
        return None
    return len(source) if isinstance(source, Sized) else None


# Of two candidates.


def probability_better(a: float, b: float, error_a: float = 0.0, error_b: float = 0.0) -> float:
    """Probability that the loss of ``a`` is smaller than that of ``b``; one half where both are exact and equal.

    Args:
        a: Loss, smaller is better.
        b: As ``a``.
        error_a: Standard error of ``a``, at least 0.
        error_b: As ``error_a``.
    """
    if error_a == error_b == 0 and a == b:
        return 0.5
    return float(_no_worse(np.asarray(a), np.asarray(b), np.asarray(error_a), np.asarray(error_b)))


def probability_dominates(
    a: Sequence[float], b: Sequence[float], errors_a: Sequence[float], errors_b: Sequence[float]
) -> float:
    """Probability that losses ``a`` are nowhere worse and somewhere better than losses ``b``.

    The product over the objectives, which are taken as independent. An objective that is exact and equal for both is
    nowhere worse and nowhere better.

    Args:
        a: ``(objectives,)``, smaller is better.
        b: As ``a``.
        errors_a: ``(objectives,)``, standard errors of ``a``, at least 0; 0 is exact.
        errors_b: As ``errors_a``.
    """
    first, second, spread_a, spread_b = (_table([row])[0] for row in (a, b, errors_a, errors_b))
    if not len(first) == len(second) == len(spread_a) == len(spread_b):
        raise InvalidInputError("losses and errors must be of one length, the number of objectives")
    return float(_dominates(first, second, spread_a, spread_b))


def tied(a: float, b: float, error_a: float, error_b: float, confidence: float = CONFIDENCE) -> bool:
    """Whether two values are equal within their noise: a two-sided test does not tell them apart.

    Args:
        a: A value.
        b: Another.
        error_a: Standard error of ``a``, at least 0.
        error_b: As ``error_a``.
        confidence: Of a difference that counts as one, in (0, 1).
    """
    check_confidence(confidence)
    return a == b or abs(a - b) <= float(ndtri((1 + confidence) / 2)) * math.hypot(error_a, error_b)


def tie_groups(
    values: Sequence[float], errors: Sequence[float], confidence: float = CONFIDENCE
) -> list[tuple[int, ...]]:
    """Sets of at least two values in which each is tied with each, as indices by rising value.

    Neighbours in value; as large as they can be. Ties are not transitive, so that a value may be in two sets.

    Args:
        values: ``(n,)``.
        errors: ``(n,)``, standard errors.
        confidence: As of :func:`tied`.
    """
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    groups: list[tuple[int, ...]] = []
    reached = 0
    for start in range(len(order)):
        end = start + 1
        while end < len(order) and all(
            tied(values[order[end]], values[member], errors[order[end]], errors[member], confidence)
            for member in order[start:end]
        ):
            end += 1
        if end - start > 1 and end > reached:
            groups.append(tuple(order[start:end]))
        reached = max(reached, end)
    return groups


def check_confidence(confidence: float) -> None:
    """Raise InvalidInputError unless it is in (0, 1)."""
    if not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise InvalidInputError(f"confidence is {confidence!r}; legal: a number in (0, 1), such as 0.95")


def _no_worse(a: Floats, b: Floats, error_a: Floats, error_b: Floats) -> Floats:
    """P(A <= B), element by element."""
    spread, difference = np.hypot(error_a, error_b), b - a
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found: Floats = np.where(spread > 0, ndtr(difference / spread), difference >= 0)
    return found


def _dominates(a: Floats, b: Floats, errors_a: Floats, errors_b: Floats) -> Floats:
    """P(A dominates B) over the last axis."""
    equal = (np.hypot(errors_a, errors_b) == 0) & (a == b)
    found: Floats = np.prod(_no_worse(a, b, errors_a, errors_b), axis=-1) - equal.all(axis=-1)
    return found


# Of many candidates.


def front_probability(losses: ArrayLike, errors: ArrayLike, draws: int = DRAWS) -> Floats:
    """Probability of each candidate that no other of them dominates it.

    By Monte Carlo from a fixed generator. Candidates with equal rows get equal probabilities, and the order of the rows
    does not matter. Without any error it is 1 on :func:`nasplat.objectives.front` and 0 elsewhere.

    Args:
        losses: ``(n, objectives)``, smaller is better.
        errors: ``(n, objectives)``, standard errors, at least 0; 0 is exact.
        draws: Each of all losses; a probability ``p`` has the standard error ``sqrt(p * (1 - p) / draws)``.

    Returns:
        ``(n,)``, in [0, 1].

    Raises:
        InvalidInputError: The shapes differ, or a number is not legal.
    """
    table, spread = _table(losses), _table(errors)
    if table.shape != spread.shape:
        raise InvalidInputError(f"losses have shape {table.shape} and errors {spread.shape}; equal ones are needed")
    if (spread < 0).any() or draws < 1:
        raise InvalidInputError(f"errors are at least 0, and draws (got {draws}) at least 1")
    if not len(table):
        return np.zeros(0)
    rows, place = np.unique(np.hstack((table, spread)), axis=0, return_inverse=True)
    counts = np.bincount(place.reshape(-1))
    found = np.zeros(len(rows))
    width = table.shape[1]
    values, deviations = rows[:, :width], rows[:, width:]
    # What is dominated for sure changes nothing for others: what it dominates, its dominator dominates too.
    kept = np.ones(len(rows), dtype=bool)
    for index in objectives.front(values.tolist()):
        sure = _dominates(values[index], values, deviations[index], deviations) >= 1 - NEGLIGIBLE
        kept &= ~sure
    drawn = np.repeat(np.flatnonzero(kept), counts[kept])  # equal rows are several candidates
    hits = np.zeros(len(drawn))
    rng = np.random.default_rng(0)
    step = max(1, 2_000_000 // (len(drawn) * width))
    for begin in range(0, draws, step):
        noise = rng.standard_normal((min(step, draws - begin), len(drawn), width))
        hits += (~_dominated(values[drawn] + deviations[drawn] * noise)).sum(axis=0)
    np.add.at(found, drawn, hits / draws)
    return np.asarray((found / counts)[place.reshape(-1)])


def _dominated(drawn: Floats) -> NDArray[np.bool_]:
    """Which candidates another one dominates, in each draw: ``(draws, n, objectives)`` to ``(draws, n)``."""
    if drawn.shape[2] == 1:
        return np.asarray(drawn[..., 0] > drawn[..., 0].min(axis=1, keepdims=True))
    if drawn.shape[2] == 2:
        return _dominated_in_two(drawn[..., 0], drawn[..., 1])
    found = np.empty(drawn.shape[:2], dtype=bool)
    for index in range(drawn.shape[1]):
        own = drawn[:, index : index + 1]
        no_worse, better = (drawn <= own).all(axis=2), (drawn < own).any(axis=2)
        found[:, index] = np.any(no_worse & better, axis=1)
    return found


def _dominated_in_two(first: Floats, second: Floats) -> NDArray[np.bool_]:
    """As :func:`_dominated`, by one sort: each ``(draws, n)``."""
    order = np.lexsort((second, first), axis=-1)
    x, y = np.take_along_axis(first, order, 1), np.take_along_axis(second, order, 1)
    before = np.full_like(y, np.inf)  # the least of the second objective among the earlier ones
    np.minimum.accumulate(y[:, :-1], axis=1, out=before[:, 1:])
    # Where it was first reached, and so with the least first objective.
    records = np.where(y < before, np.arange(y.shape[1]), 0)
    at = np.zeros_like(records)
    np.maximum.accumulate(records[:, :-1], axis=1, out=at[:, 1:])
    dominated = (before < y) | ((before == y) & (np.take_along_axis(x, at, 1) < x))
    found = np.empty_like(dominated)
    np.put_along_axis(found, order, dominated, 1)
    return np.asarray(found)


def _table(rows: ArrayLike) -> Floats:
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 and table.size:
        raise InvalidInputError(f"an array of shape {table.shape}; (n, objectives) is needed")
    if not np.isfinite(table).all():
        raise InvalidInputError("losses and errors must be finite")
    return table if table.ndim == 2 else np.zeros((0, 1))


# Of a study.


@dataclass(frozen=True)
class Member:
    """A candidate that is on the front, or may be.

    Attributes:
        trial: The first trial of its architecture, with the means of all metrics over the replicates.
        replicates: Numbers of all trials of the architecture that count.
        estimates: Of each objective, by metric.
        probability: That no other candidate dominates it.
        on_front: Whether none does by the values as measured.
        ties: Numbers of the members that it is tied with, by metric of the objective; only where there are any.
    """

    trial: Trial
    replicates: tuple[int, ...]
    estimates: Mapping[str, Estimate]
    probability: float
    on_front: bool
    ties: Mapping[str, tuple[int, ...]]

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number


@dataclass(frozen=True)
class UncertainFront:
    """A front whose values have errors.

    Attributes:
        objectives: What is wanted.
        members: What is on the front by the values as measured, and what is on it with a probability of at least
            ``1 - confidence``; the best in the first objective first.
        others: The other feasible candidates: metrics (means over replicates) by trial.
        confidence: At which a difference counts, in (0, 1).
        draws: Of the Monte Carlo.
    """

    objectives: tuple[Objective, ...]
    members: tuple[Member, ...]
    others: tuple[Trial, ...]
    confidence: float
    draws: int

    @property
    def uncertain(self) -> bool:
        """Whether any objective of any member has an error that is known and not 0."""
        return any(found.error for member in self.members for found in member.estimates.values())

    def groups(self, metric: str) -> list[tuple[int, ...]]:
        """Numbers of the members that are tied in an objective, all with all, best first (:func:`tie_groups`)."""
        found = [member.estimates[metric] for member in self.members]
        best_first = next(objective for objective in self.objectives if objective.metric == metric)
        groups = tie_groups(
            [best_first.loss({metric: one.value}) for one in found],
            [one.error or 0.0 for one in found],
            self.confidence,
        )
        return [tuple(self.members[index].number for index in group) for group in groups]


def uncertain_front(
    history: History, samples: Samples, examples: int | None, confidence: float = CONFIDENCE
) -> UncertainFront:
    """The front of a study with what is known of its errors.

    Candidates are the complete, full evaluations. Those of one architecture are one candidate with the mean of each
    metric. Limits are held against the values as measured. An error that is not known is taken as 0.

    Args:
        history: All trials.
        samples: The single readings of a trial by name.
        examples: Size of the validation split; None where it is not known.
        confidence: At which a difference counts, in (0, 1).
    """
    check_confidence(confidence)
    alike: dict[str, list[Trial]] = {}
    for trial in history.scored():
        if trial.full and trial.copy_of is None and trial.architecture is not None:
            alike.setdefault(trial.architecture.id, []).append(trial)
    groups = [sorted(group, key=lambda trial: trial.number) for group in alike.values()]
    averaged = [(_mean(group), group) for group in groups]
    feasible = [(mean, group) for mean, group in averaged if history.violation(mean) == 0.0]
    names = [objective.metric for objective in history.objectives]
    found = [
        {name: estimate(name, group, samples, examples) for name in names} for _, group in feasible
    ]  # fmt: skip
    losses = [history.losses(mean) for mean, _ in feasible]
    errors = [[one[name].error or 0.0 for name in names] for one in found]
    plain = set(objectives.front(losses))
    chances = front_probability(losses, errors) if losses else np.zeros(0)
    chosen = [index for index in range(len(feasible)) if index in plain or chances[index] >= 1 - confidence]
    chosen.sort(key=lambda index: (losses[index], feasible[index][0].number))
    members = []
    for index in chosen:
        ties = {}
        for name in names:
            own = found[index][name]
            same = tuple(
                feasible[other][0].number
                for other in chosen
                if other != index
                and tied(
                    own.value, found[other][name].value, own.error or 0.0, found[other][name].error or 0.0, confidence
                )
            )
            if same:
                ties[name] = same
        mean, group = feasible[index]
        numbers = tuple(trial.number for trial in group)
        members.append(Member(mean, numbers, found[index], float(chances[index]), index in plain, ties))
    others = tuple(feasible[index][0] for index in range(len(feasible)) if index not in set(chosen))
    return UncertainFront(history.objectives, tuple(members), others, confidence, DRAWS)


def _mean(trials: Sequence[Trial]) -> Trial:
    if len(trials) == 1:
        return trials[0]
    names = dict.fromkeys(name for trial in trials for name in trial.metrics)
    metrics = {}
    for name in names:
        values = [trial.metrics[name] for trial in trials if name in trial.metrics]
        metrics[name] = values[0] if len(set(values)) == 1 else statistics.fmean(values)
    return replace(trials[0], metrics=metrics)
