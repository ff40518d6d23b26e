"""Search guided by a predictor: a model of what was evaluated says which architecture to try next.

The frame is that of BANANAS (White, Neiswanger, Savani 2021, arXiv:1910.11858, section 3 and algorithm 1): a predictor
with uncertainty is fitted to the evaluated architectures, candidates are mutants of the best ones, and Thompson
sampling picks one of them. Where the paper has an ensemble of neural networks, the predictor here is a Gaussian
process, which needs fewer evaluations and no training of its own worth the name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from nasplat.architecture import Architecture
from nasplat.checks import is_whole
from nasplat.errors import InvalidInputError
from nasplat.objectives import Constraint, Objective
from nasplat.strategy import Evaluate, History, Trial

Array: TypeAlias = NDArray[np.float64]

MORE_STEPS = 1 / 3
"""Probability that a mutant is mutated once more."""

MAX_STEPS = 4
"""Mutations of one mutant at most."""

REFIT_GROWTH = 1.5
"""The predictor's own parameters are fitted anew each time that there are so many times more results."""

MAX_FITTED = 200
"""Results at most that the predictor's own parameters are fitted to."""

MAX_RESULTS = 400
"""Results at most that a prediction rests on: half of them the most telling, the rest the latest."""

AUGMENTED = 0.05
"""Share of the weighted sum in the augmented Tchebycheff scalarisation (Knowles 2006, ParEGO, equation 2)."""


@dataclass(frozen=True)
class PredictorSearch:
    """Proposes the candidate that looks best to a predictor, in one draw of what the predictor holds possible.

    It begins with random architectures. From then on a Gaussian process over ``space.encode`` predicts each objective.
    It is fitted to the ranks of the results, as normal scores, so that neither the metric's scale nor a few networks
    that hardly train matter. Candidates are mutants of the best architectures so far and random ones, none proposed
    before. The objectives of all candidates are drawn at once from the prediction (joint Thompson sampling): where it
    is uncertain a candidate may come out best, so exploration needs no constant, and many proposals that wait for
    results at the same time differ by themselves (Kandasamy et al. 2018, arXiv:1705.09236).

    With several objectives, each has its predictor, and each proposal weighs them anew at random by the augmented
    Tchebycheff function (ParEGO, Knowles 2006), so that the proposals spread over the front. Each hard limit has a
    predictor of the excess over it: candidates that keep all limits in the draw come before those that do not, and a
    smaller violation before a larger one. Trials refused for a cheap cost teach these predictors too. Failed trials,
    and trials trained on a smaller budget, teach none.

    A prediction rests on 400 results at most, and its own parameters on 200, so what it costs is bounded.

    Attributes:
        initial: Number of results, random architectures, before the first prediction.
        parents: Number of best architectures that are mutated.
        mutants: Candidates that are mutants: of one mutation mostly, sometimes of up to four.
        draws: Candidates drawn at random from the whole space. A space with no more architectures than mutants and
            draws together is predicted whole.
    """

    initial: int = 10
    parents: int = 10
    mutants: int = 100
    draws: int = 100

    def __post_init__(self) -> None:
        for name, least in (("initial", 2), ("parents", 1), ("mutants", 0), ("draws", 0)):
            if not is_whole(getattr(self, name), least):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; a whole number from {least} up is needed")
        if self.mutants + self.draws < 1:
            raise InvalidInputError("mutants and draws are both 0; one candidate at least is needed")

    def propose(self, history: History, rng: np.random.Generator) -> Evaluate | None:
        """The best candidate of one draw; a random architecture before there are results; None on exhaustion.

        Args:
            history: All trials so far. Running ones are not proposed again.
            rng: The only source of randomness.
        """
        results = _Results.of(history)
        if len(results.trials) >= self.initial:
            chosen = self._guided(history, results, rng)
            if chosen is not None:
                return chosen
        architecture = history.draw_new(rng)
        return None if architecture is None else Evaluate(architecture)

    def _guided(self, history: History, results: _Results, rng: np.random.Generator) -> Evaluate | None:
        weights = rng.dirichlet(np.ones(len(history.objectives)))
        candidates = self._candidates(history, results, results.best(weights, self.parents), rng)
        if not candidates:
            return None
        codes = np.array([history.space.encode(candidate) for candidate, _ in candidates], dtype=np.float64)
        violation = np.zeros(len(candidates))
        for limit in results.limits:
            violation += limit.draw_excess(codes, rng)
        keeps = violation <= 0.0
        if not keeps.any():
            at = int(np.argmin(violation))
        else:
            codes = codes[keeps]
            utilities = np.stack([goal.draw(codes, rng) for goal in results.goals])
            at = int(np.flatnonzero(keeps)[np.argmax(_scalarise(utilities, weights))])
        architecture, parent = candidates[at]
        return Evaluate(architecture, notes={} if parent is None else {"parents": [parent]})

    def _candidates(
        self, history: History, results: _Results, parents: Sequence[Trial], rng: np.random.Generator
    ) -> list[tuple[Architecture, int | None]]:
        """Architectures that were not proposed before, each with the trial that it is a mutant of."""
        space = history.space
        if space.size() <= self.mutants + self.draws:
            return [(architecture, None) for architecture in space.enumerate() if not history.of(architecture)]
        found: dict[frozenset[Any], tuple[Architecture, int | None]] = {}
        for _ in range(self.mutants if parents else 0):
            parent = parents[int(rng.integers(len(parents)))]
            assert parent.architecture is not None
            try:
                mutant = space.mutate(parent.architecture, rng)
                for _ in range(MAX_STEPS - 1):
                    if rng.random() >= MORE_STEPS:
                        break
                    mutant = space.mutate(mutant, rng)
            except InvalidInputError:  # is_valid left an architecture without a neighbour
                continue
            found.setdefault(frozenset(mutant.genes.items()), (mutant, parent.number))
        for _ in range(self.draws):
            drawn = space.sample(rng)
            found.setdefault(frozenset(drawn.genes.items()), (drawn, None))
        # Cheaper than history.of, which needs the id of each candidate.
        proposed = results.proposed(history)
        return [candidate for genes, candidate in found.items() if genes not in proposed]


def _scalarise(utilities: Array, weights: Array) -> Array:
    """Augmented Tchebycheff value per candidate, the greater the better, of utilities ``(objectives, n)``."""
    ideal = utilities.max(axis=1, keepdims=True)
    short = weights[:, None] * (utilities - ideal)
    value: Array = short.min(axis=0) + AUGMENTED * short.sum(axis=0)
    return value


def normal_scores(losses: Array) -> Array:
    """What the predictor is fitted to: 0 for the median loss, the greater the smaller the loss; ties are equal.

    The standard normal quantile of ``(rank - 1/2) / n``.
    """
    _, inverse, counts = np.unique(-losses, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2 + 0.5  # mean rank of equal values, from 1/2 up
    quantile = NormalDist().inv_cdf
    scores: Array = np.array([quantile(rank / len(losses)) for rank in middle])[inverse]
    return scores


@dataclass
class _Predictor:
    """A Gaussian process for one metric.

    Attributes:
        codes: Encodings of the results that have the metric, ``(n, length)``, in the order of ending.
        targets: What is predicted, ``(n,)``.
        telling: How much each result says about what is sought, ``(n,)``: the greater, the longer it is kept.
        kernel: Of the process; None where all targets are equal.
        noise: Variance of the targets that the encoding does not explain.
    """

    codes: Array
    targets: Array
    telling: Array
    kernel: Any
    noise: float
    _process: Any = field(default=None, repr=False)

    def draw(self, codes: Array, rng: np.random.Generator) -> Array:
        """One joint sample of the targets of candidates ``(m, length)``: ``(m,)``, without observation noise."""
        normal = rng.standard_normal(len(codes))
        if self.kernel is None:
            return np.full(len(codes), self.targets.mean() if len(self.targets) else 0.0)
        if self._process is None:
            kept = np.arange(len(self.targets))
            if len(kept) > MAX_RESULTS:
                telling = np.argsort(-self.telling, kind="stable")[: MAX_RESULTS // 2]
                latest = np.setdiff1d(kept, telling)[-(MAX_RESULTS - MAX_RESULTS // 2) :]
                kept = np.sort(np.concatenate([telling, latest]))
            process = GaussianProcessRegressor(self.kernel, alpha=self.noise, optimizer=None)
            self._process = process.fit(self.codes[kept], self.targets[kept])
        mean, covariance = self._process.predict(codes, return_cov=True)
        root = np.linalg.cholesky(covariance + 1e-6 * np.eye(len(codes)))
        sample: Array = mean + root @ normal
        return sample


@dataclass
class _Limit(_Predictor):
    """The predictor of a relative excess over a limit, on a logarithmic scale to both sides of it."""

    middle: float = 0.0
    spread: float = 1.0

    def draw_excess(self, codes: Array, rng: np.random.Generator) -> Array:
        """One joint sample of how far candidates break the limit; 0 where they keep it."""
        return np.maximum(self.middle + self.spread * self.draw(codes, rng), 0.0)


class _Results:
    """What the trials that ended say, and the predictors fitted to them: a function of these trials alone."""

    def __init__(self, history: History) -> None:
        self._objectives = history.objectives  # not the history itself, which would then never be let go
        self._codes: dict[int, Array] = {}
        self._kernels: dict[tuple[Objective | Constraint, int], tuple[Any, float]] = {}
        self._proposed: set[frozenset[Any]] = set()
        self._booked = 0
        self._seen = -1
        self.trials: list[Trial] = []
        self.goals: list[_Predictor] = []
        self.limits: list[_Limit] = []

    @classmethod
    def of(cls, history: History) -> _Results:
        """The results of a history, up to date."""
        results = _RESULTS.get(history)
        if results is None:
            results = _RESULTS[history] = cls(history)
        ended = len(history) - len(history.running)
        if results._seen != ended:
            results._update(history)
            results._seen = ended
        return results

    def _update(self, history: History) -> None:
        # In the order of ending, so that the first so many results never change.
        self.trials = [trial for trial in history.finished() if _tells(trial, history)]
        for trial in self.trials:
            if trial.number not in self._codes:
                assert trial.architecture is not None
                self._codes[trial.number] = history.space.encode(trial.architecture).astype(np.float64)
        self.goals = [self._goal(objective) for objective in history.objectives]
        limits = [self._limit(limit) for limit in history.constraints]
        self.limits = [limit for limit in limits if len(limit.targets)]
        self._violations = np.array([history.violation(trial) for trial in self.trials])
        self._complete = np.array([trial.state == "complete" for trial in self.trials])

    def proposed(self, history: History) -> set[frozenset[Any]]:
        """The genes of all architectures proposed so far."""
        for trial in history.trials[self._booked :]:
            if trial.architecture is not None:
                self._proposed.add(frozenset(trial.architecture.genes.items()))
        self._booked = len(history)
        return self._proposed

    def best(self, weights: Array, count: int) -> list[Trial]:
        """The best trials at these weights of the objectives: those within the limits first, then by violation.

        As long as no trial has all objectives, those that were refused, by their violation.
        """
        rows = np.flatnonzero(self._complete) if self._complete.any() else np.arange(len(self.trials))
        value = np.zeros(len(rows))
        if self._complete.any():
            losses = [[objective.loss(self.trials[row].metrics) for row in rows] for objective in self._objectives]
            value = _scalarise(np.stack([normal_scores(np.array(some)) for some in losses]), weights)
        order = np.lexsort((-value, self._violations[rows]))
        return [self.trials[rows[at]] for at in order[:count]]

    def _rows(self, metric: str) -> list[Trial]:
        return [trial for trial in self.trials if math.isfinite(trial.metrics.get(metric, math.nan))]

    def _goal(self, objective: Objective) -> _Predictor:
        trials = self._rows(objective.metric)
        losses = np.array([objective.loss(trial.metrics) for trial in trials])
        codes = self._stack(trials)
        targets = normal_scores(losses)
        first = _first(len(trials))
        return _Predictor(codes, targets, targets, *self._kernel(objective, codes, normal_scores(losses[:first])))

    def _limit(self, limit: Constraint) -> _Limit:
        trials = self._rows(limit.metric)
        sign = 1.0 if limit.sense == "at_most" else -1.0
        excess = np.array([sign * (trial.metrics[limit.metric] - limit.bound) for trial in trials])
        excess = excess / max(abs(limit.bound), 1e-12)
        excess = np.sign(excess) * np.log1p(np.abs(excess))
        codes = self._stack(trials)
        first = excess[: _first(len(trials))]
        kernel = self._kernel(limit, codes, (first - first.mean()) / (first.std() or 1.0) if len(first) else first)
        middle, spread = (float(excess.mean()), float(excess.std()) or 1.0) if len(excess) else (0.0, 1.0)
        return _Limit(codes, (excess - middle) / spread, -np.abs(excess), *kernel, middle=middle, spread=spread)

    def _stack(self, trials: Sequence[Trial]) -> Array:
        return np.array([self._codes[trial.number] for trial in trials])

    def _kernel(self, what: Objective | Constraint, codes: Array, targets: Array) -> tuple[Any, float]:
        """Kernel and noise fitted to the first results, as many as there are targets; kept for the next proposals."""
        key = (what, len(targets))
        if key not in self._kernels:
            self._kernels[key] = _fit(codes[: len(targets)], targets)
        return self._kernels[key]


_RESULTS: WeakKeyDictionary[History, _Results] = WeakKeyDictionary()


def _tells(trial: Trial, history: History) -> bool:
    """Whether a trial that ended says something about its architecture, and nothing that another trial has said."""
    if not trial.full or trial.copy_of is not None:
        return False
    if trial.state == "complete":
        return all(math.isfinite(trial.metrics.get(o.metric, math.nan)) for o in history.objectives)
    return trial.state == "infeasible"


def _first(count: int) -> int:
    """How many of so many results the predictor's own parameters are fitted to."""
    first = fitted = min(count, 8)
    while first <= min(count, MAX_FITTED):
        fitted = first
        first = math.ceil(first * REFIT_GROWTH) if first else count + 1
    return fitted


def _fit(codes: Array, targets: Array) -> tuple[Any, float]:
    """Kernel and noise by the maximum of the marginal likelihood; no kernel where all targets are equal."""
    if len(targets) < 2 or np.ptp(targets) == 0.0:
        return None, 1.0
    kernel = ConstantKernel(1.0, (0.05, 20.0)) * RBF(1.5, (0.3, 30.0)) + WhiteKernel(0.1, (1e-4, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound is what the bound is for
        fitted = GaussianProcessRegressor(kernel, random_state=0).fit(codes, targets).kernel_
    return fitted.k1, float(fitted.k2.noise_level)
