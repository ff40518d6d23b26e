"""How well inherited weights rank networks, against the same networks trained by themselves.

A search over a supernet's paths is as good as the order that it sees. That order is compared with the one after full
training by Kendall's tau, whose interval says how much so few networks can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from nasplat.errors import InvalidInputError
from nasplat.strategy import History, Trial

NETWORK = "fidelity_network"
"""The note of a trial that says which of the compared networks it evaluates: 0, 1, ..."""

WEIGHTS = "fidelity_weights"
"""The note that says by which weights: ``inherited``, ``recalibrated`` or ``own``."""

INHERITED, RECALIBRATED, OWN = "inherited", "recalibrated", "own"

RESAMPLES = 2_000
"""Bootstrap samples of an interval."""


class Searched(Protocol):
    """What :func:`ranking_fidelity` reads: a study's result."""

    @property
    def history(self) -> History:
        """Every trial."""
        ...


@dataclass(frozen=True)
class Agreement:
    """How far two orders of the same networks agree.

    Attributes:
        tau: Kendall's tau-b, in [-1, 1]: 1 is the same order, 0 no relation. 0 also where all values of one are equal.
        interval: Its bootstrap interval over networks (percentiles).
        spearman: Spearman's rank correlation, in [-1, 1].
        n: Number of networks.
    """

    tau: float
    interval: tuple[float, float]
    spearman: float
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


@dataclass(frozen=True)
class Fidelity:
    """What :func:`ranking_fidelity` found.

    Attributes:
        metric: Which metric was compared.
        inherited: With the weights of the supernet as they were trained.
        recalibrated: With batch-norm statistics estimated anew; None where that was not evaluated.
        confidence: Of the intervals, in (0, 1).
        table: A row per network: architecture, and the metric by ``inherited``, ``recalibrated`` and ``own`` weights.
    """

    metric: str
    inherited: Agreement
    recalibrated: Agreement | None
    confidence: float
    table: pd.DataFrame

    def __str__(self) -> str:
        lines = [
            f"{self.metric} of {self.inherited.n} networks, by inherited weights against networks trained by themselves"
        ]
        parts = [("inherited as trained", self.inherited)]
        if self.recalibrated is not None:
            parts.append(("inherited, recalibrated", self.recalibrated))
        for name, agreement in parts:
            low, high = agreement.interval
            lines.append(
                f"  {name}: Kendall tau {agreement.tau:.2f}, {self.confidence:.0%} interval {low:.2f} to {high:.2f}, "
                f"Spearman {agreement.spearman:.2f}"
            )
            if not agreement.is_clear:
                lines.append(f"    The interval includes 0: {agreement.n} networks do not show that the orders agree.")
            elif high < 0:
                lines.append("    The orders are opposed: what scores better with inherited weights trains worse.")
        return "\n".join(lines)


def ranking_fidelity(
    result: Searched, metric: str | None = None, *, confidence: float = 0.95, seed: int = 0
) -> Fidelity:
    """Compare the trials of a study with the strategy ``RankingFidelity``.

    Networks of which an evaluation failed, or is still to come, are left out.

    Args:
        result: ``study.run(...)`` or ``nasplat.load(folder)``.
        metric: What to compare; None takes the first objective.
        confidence: Of the intervals, in (0, 1).
        seed: Of the bootstrap.

    Raises:
        InvalidInputError: Fewer than 3 networks were evaluated by inherited and by their own weights.
    """
    history = result.history
    metric = history.objectives[0].metric if metric is None else metric
    if not 0 < confidence < 1:
        raise InvalidInputError(f"confidence is {confidence}; legal: between 0 and 1")
    networks: dict[int, dict[str, Trial]] = {}
    for trial in history.trials:
        notes = trial.proposal.notes
        if NETWORK in notes and trial.state == "complete" and metric in trial.metrics:
            networks.setdefault(notes[NETWORK], {})[notes[WEIGHTS]] = trial
    kinds = [INHERITED, OWN]
    if any(RECALIBRATED in trials for trials in networks.values()):
        kinds.insert(1, RECALIBRATED)
    whole = {number: trials for number, trials in sorted(networks.items()) if all(kind in trials for kind in kinds)}
    if len(whole) < 3:
        raise InvalidInputError(
            f"{len(whole)} networks have {metric} by {', '.join(kinds)} weights; at least 3 are needed to rank them. "
            "Such trials are those of a study with the strategy RankingFidelity"
        )
    table = _table(whole, kinds, metric)
    own = table[OWN].to_numpy()
    agreements = [agreement(table[kind].to_numpy(), own, confidence=confidence, seed=seed) for kind in kinds[:-1]]
    return Fidelity(metric, agreements[0], agreements[1] if len(agreements) > 1 else None, confidence, table)


def agreement(
    a: Sequence[float] | NDArray[np.float64],
    b: Sequence[float] | NDArray[np.float64],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Kendall's tau of two lists of values with its bootstrap interval, and Spearman's correlation.

    Args:
        a: A value per network, shape ``(n,)``.
        b: Another, in the same order.
        confidence: Of the interval, in (0, 1).
        seed: Of the 2,000 resamples, each of n networks with replacement.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # How often each network is in each resample.
    counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=RESAMPLES).astype(np.float64)
    low, high = np.quantile(_taus(x, y, counts), [(1 - confidence) / 2, (1 + confidence) / 2])
    if any((values == values[0]).all() for values in (x, y)):
        return Agreement(0.0, (float(low), float(high)), 0.0, len(x))
    tau, spearman = (float(measure(x, y).statistic) for measure in (stats.kendalltau, stats.spearmanr))
    return Agreement(tau, (float(low), float(high)), spearman, len(x))


def _taus(x: NDArray[np.float64], y: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kendall's tau-b of many resamples at once, 0 where one ranks nothing (it may hold one network only).

    Of n networks, tau-b is the sum over pairs of the product of both signs, over the geometric mean of the numbers of
    untied pairs. A network that is drawn c times counts c times in each of its pairs, and is tied with itself.
    """
    signs = [np.sign(values[:, None] - values[None, :]) for values in (x, y)]

    def total(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = ((counts @ pairs) * counts).sum(axis=1)
        return found

    untied = np.sqrt(total(signs[0] ** 2) * total(signs[1] ** 2))
    agreeing = total(signs[0] * signs[1])
    return np.divide(agreeing, untied, out=np.zeros_like(untied), where=untied > 0)


def _table(networks: Mapping[int, Mapping[str, Trial]], kinds: Sequence[str], metric: str) -> pd.DataFrame:
    rows = []
    for number, trials in networks.items():
        architecture = trials[OWN].architecture
        assert architecture is not None
        rows.append(
            {
                "network": number,
                "architecture": architecture.id,
                **{kind: trials[kind].metrics[metric] for kind in kinds},
            }
        )
    return pd.DataFrame(rows).set_index("network")
