"""Paired statistics of several arms over common seeds, on plain arrays: tests, correction, effect sizes.

An arm is whatever was run once with each seed: a strategy, another library, a setting. ``compare_arms`` takes one
number an arm and seed. Every pair of arms is tested by the Wilcoxon signed-rank test, paired by seed (with the random
numbers of one seed in common, or the same split of the data, pairing takes their share out of the difference), and all
tests of one call are corrected together (Holm 1979), so that the chance of even one false difference in the whole
answer is at most ``alpha``. The procedure follows Demšar (JMLR 7, 2006), with pairwise signed-rank tests in place of
post-hoc tests on mean ranks, whose outcome for two arms hangs on which others are compared (Benavoli et al., JMLR 17,
2016).

The p of the signed-rank test is exact, with ties and zeros too, up to :data:`EXACT` differences that are not zero;
the other p-values are SciPy's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from nasplat.checks import is_number, is_whole
from nasplat.errors import InvalidInputError

Floats: TypeAlias = NDArray[np.float64]
Centre: TypeAlias = Literal["mean", "median"]
Direction: TypeAlias = Literal["maximise", "minimise"]
Outcome: TypeAlias = Literal["better", "worse", "mixed", "not distinguishable", "too few seeds", "nothing paired"]

EXACT = 200
"""Up to so many differences that are not zero the signed-rank test is exact. Above, SciPy's normal approximation."""

POWER = 0.8
"""The chance of being found that "could have been detected" stands for."""

SIMULATED = 4000
"""Samples from which a detectable difference is found: its chance is then right to about 0.01."""


class Interval(NamedTuple):
    """A bootstrap interval, in the unit of what it belongs to; both NaN where there is none."""

    low: float
    high: float


@dataclass(frozen=True)
class Arm:
    """One arm's numbers over the seeds.

    Attributes:
        name: The arm.
        seeds: Seeds with a number.
        found_nothing: Seeds that ended without anything feasible; they rank as worst and are in no mean.
        missing: Seeds that were not run to the end; they are left out of every test.
        centre: Mean or median of the numbers; NaN where there is none.
        interval: Bootstrap interval of the centre.
        deviation: Standard deviation over seeds (n - 1); NaN below two.
        low: The smallest number.
        high: The largest number.
    """

    name: str
    seeds: int
    found_nothing: int
    missing: int
    centre: float
    interval: Interval
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """Arm ``a`` against arm ``b``, paired by seed.

    Attributes:
        a: One arm.
        b: The other.
        seeds: Pairs tested: seeds where neither is missing.
        wins: Seeds where ``a`` is better.
        ties: Seeds where both are equal.
        losses: Seeds where ``b`` is better.
        p: Two-sided p of the Wilcoxon signed-rank test, zeros by Pratt's method; NaN without pairs.
        p_corrected: The same after Holm's correction over all pairs of the call.
        reachable: The smallest corrected p that so many seeds can give, however large the difference.
        difference: Mean or median of ``a - b`` over seeds where both have a number, in the metric's unit.
        interval: Bootstrap interval of the difference, for this difference alone (not corrected).
        detectable: A difference that this test would find with a chance of :data:`POWER`, given the spread of the
            differences over seeds (of normal differences, at Bonferroni's level); infinite where none could be.
        a12: Vargha and Delaney's A: the chance that ``a`` is better than ``b`` with seeds drawn apart, ties half.
        rank_biserial: Matched-pairs rank-biserial correlation in [-1, 1]; 1: ``a`` is better with every seed.
        outcome: What is shown of ``a``: better or worse than ``b``; "mixed" where the ranks differ one way and the
            means the other.
    """

    a: str
    b: str
    seeds: int
    wins: int
    ties: int
    losses: int
    p: float
    p_corrected: float
    reachable: float
    difference: float
    interval: Interval
    detectable: float
    a12: float
    rank_biserial: float
    outcome: Outcome

    def seen_from(self, arm: str) -> Pair:
        """The same pair with this arm as ``a``.

        Raises:
            InvalidInputError: It is neither.
        """
        if arm == self.a:
            return self
        if arm != self.b:
            raise InvalidInputError(f"{arm!r} is not one of this pair, {self.a!r} and {self.b!r}")
        turned: dict[Outcome, Outcome] = {"better": "worse", "worse": "better"}
        return Pair(
            a=self.b,
            b=self.a,
            seeds=self.seeds,
            wins=self.losses,
            ties=self.ties,
            losses=self.wins,
            p=self.p,
            p_corrected=self.p_corrected,
            reachable=self.reachable,
            difference=-self.difference,
            interval=Interval(-self.interval.high, -self.interval.low),
            detectable=self.detectable,
            a12=1 - self.a12,
            rank_biserial=-self.rank_biserial,
            outcome=turned.get(self.outcome, self.outcome),
        )


@dataclass(frozen=True)
class Friedman:
    """Friedman's test over three arms or more: is there any difference at all? Nothing in the verdict hangs on it.

    Attributes:
        seeds: Seeds where no arm is missing.
        statistic: Chi-squared with ``arms - 1`` degrees of freedom, corrected for ties.
        p: Its p; conservative with few seeds.
        ranks: Mean rank of each arm over seeds, 1 is best.
    """

    seeds: int
    statistic: float
    p: float
    ranks: Mapping[str, float]


@dataclass(frozen=True)
class Statistics:
    """What the numbers of several arms carry.

    Attributes:
        arms: Summaries by name, in the order given.
        pairs: All pairs that were tested.
        friedman: With three arms or more and at least two common seeds, else None.
        baseline: The arm that the others are held against; None where there is none.
        direction: Whether larger or smaller numbers are better.
        alpha: Chance of a false difference, over all pairs together.
        level: Of the intervals.
        centre: Whether means or medians are shown.
        metric: What the numbers are.
    """

    arms: Mapping[str, Arm]
    pairs: tuple[Pair, ...]
    friedman: Friedman | None
    baseline: str | None
    direction: Direction
    alpha: float
    level: float
    centre: Centre
    metric: str

    def pair(self, a: str, b: str) -> Pair:
        """The pair of two arms, seen from the first.

        Raises:
            InvalidInputError: They were not tested against each other.
        """
        for pair in self.pairs:
            if {pair.a, pair.b} == {a, b} and a != b:
                return pair.seen_from(a)
        tested = ", ".join(f"{pair.a} and {pair.b}" for pair in self.pairs) or "none"
        raise InvalidInputError(f"{a!r} and {b!r} were not tested against each other; tested: {tested}")

    @property
    def seeds_needed(self) -> int:
        """The fewest seeds with which this many tests can show any difference at this ``alpha``."""
        return seeds_needed(len(self.pairs), self.alpha)

    def table(self) -> pd.DataFrame:
        """One row an arm: its summary and, where there is a baseline, the pair with the baseline."""
        rows = []
        for name, arm in self.arms.items():
            row: dict[str, Any] = {
                "arm": name,
                "seeds": arm.seeds,
                "found_nothing": arm.found_nothing,
                "missing": arm.missing,
                self.centre: arm.centre,
                "low": arm.interval.low,
                "high": arm.interval.high,
                "deviation": arm.deviation,
            }
            if self.friedman is not None:
                row["rank"] = self.friedman.ranks[name]
            if self.baseline is not None:
                row |= dict.fromkeys(_AGAINST, float("nan")) | {"against": "", "outcome": "baseline"}
                if name != self.baseline:
                    row |= {"against": self.baseline} | _row(self.pair(name, self.baseline))
            rows.append(row)
        return pd.DataFrame(rows).set_index("arm")

    def pairs_table(self) -> pd.DataFrame:
        """One row a pair: all of :class:`Pair`."""
        columns = ["a", "b", "seeds", "wins", "ties", "losses", "reachable", *_AGAINST, "outcome"]
        rows = [{name: getattr(pair, name) for name in columns[:7]} | _row(pair) for pair in self.pairs]
        return pd.DataFrame(rows, columns=columns)


_AGAINST = ("difference", "difference_low", "difference_high", "p", "p_corrected", "detectable", "a12", "rank_biserial")


def _row(pair: Pair) -> dict[str, Any]:
    return {
        "difference": pair.difference,
        "difference_low": pair.interval.low,
        "difference_high": pair.interval.high,
        "p": pair.p,
        "p_corrected": pair.p_corrected,
        "detectable": pair.detectable,
        "a12": pair.a12,
        "rank_biserial": pair.rank_biserial,
        "outcome": pair.outcome,
    }


def compare_arms(
    finals: Mapping[str, ArrayLike],
    *,
    baseline: str | None = "random",
    direction: Direction = "maximise",
    pairs: Literal["all", "baseline"] = "all",
    alpha: float = 0.05,
    level: float = 0.95,
    centre: Centre = "mean",
    resamples: int = 9999,
    metric: str = "value",
) -> Statistics:
    """Test arms against each other, paired by seed.

    Example::

        statistics = compare_arms({"random": r, "evolution": e}, metric="val_accuracy")
        print(statistics.table())
        print(verdict(statistics))  # nasplat.compare.verdict

    Args:
        finals: Per arm one number a seed, ``(seeds,)``, the same seed at the same place in each. NaN: the seed is
            missing, and is left out of that arm's tests. Infinity in the bad direction (``-inf`` to maximise, ``inf``
            to minimise): run to the end and nothing feasible found, which ranks below every number.
        baseline: The arm that the others are held against; None for none.
        direction: ``"maximise"`` or ``"minimise"``.
        pairs: Test all pairs, or only those with the baseline. Fewer tests need fewer seeds; choose before looking.
        alpha: Chance of a false difference over all tests together, in (0, 1).
        level: Of the bootstrap intervals, in (0, 1).
        centre: Show ``"mean"`` or ``"median"``. The tests go by ranks whichever is shown.
        resamples: Of the bootstrap; 0 for no intervals, where many comparisons are simulated.
        metric: What the numbers are, for tables and words.

    Returns:
        Summaries, tests and effect sizes. The same input gives the same output.

    Raises:
        InvalidInputError: No arm, unequal numbers of seeds, infinity in the good direction, an unknown baseline, or
            another argument outside what is legal.
    """
    _check_options(direction, alpha, level, centre, resamples)
    if pairs not in ("all", "baseline"):
        raise InvalidInputError(f"pairs is {pairs!r}; legal: 'all', 'baseline'")
    table = _table_of(finals, direction)
    if baseline is not None and baseline not in table:
        raise InvalidInputError(f"baseline is {baseline!r}; there are {', '.join(table)}, or None for no baseline")
    if pairs == "baseline" and baseline is None:
        raise InvalidInputError("pairs='baseline' needs a baseline; got None")
    sign = 1.0 if direction == "maximise" else -1.0
    chosen = [(a, b) for a, b in combinations(table, 2) if pairs == "all" or baseline in (a, b)]
    # With the baseline as b, so that a difference reads "arm minus baseline".
    chosen = [(b, a) if a == baseline else (a, b) for a, b in chosen]
    tested = [_signed_rank(table[a], table[b]) for a, b in chosen]
    corrected = holm([test.p for test in tested])
    return Statistics(
        arms={name: _summary(name, values, sign, centre, level, resamples) for name, values in table.items()},
        pairs=tuple(
            _pair(a, b, table[a], table[b], sign, test, p, len(chosen), alpha, level, centre, resamples)
            for (a, b), test, p in zip(chosen, tested, corrected, strict=True)
        ),
        friedman=_friedman(table),
        baseline=baseline,
        direction=direction,
        alpha=alpha,
        level=level,
        centre=centre,
        metric=metric,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected by Holm's step-down procedure, in the order given (Holm, Scand. J. Stat. 6, 1979).

    The k-th smallest of m is multiplied by ``m - k + 1``; each is at least the one before it and at most 1. A NaN
    stays and counts among the m: a test that was planned and could not be made.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)  # NaN last
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in corrected]


def a12(a: ArrayLike, b: ArrayLike) -> float:
    """Vargha and Delaney's A: the chance that a number of ``a`` is larger than one of ``b``, ties counted half.

    Args:
        a: ``(n,)``.
        b: ``(m,)``.

    Returns:
        In [0, 1]; 0.5 is no difference. NaN where one is empty.

    Source: Vargha and Delaney, J. Educ. Behav. Stat. 25, 2000.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not x.size or not y.size:
        return float("nan")
    return float(((x[:, None] > y) + 0.5 * (x[:, None] == y)).mean())


def smallest_p(seeds: int) -> float:
    """The smallest two-sided p of the signed-rank test with so many pairs: all differences on one side, 2 / 2**n."""
    return min(1.0, 2.0 ** (1 - seeds))


def seeds_needed(tests: int, alpha: float = 0.05) -> int:
    """The fewest seeds with which so many tests, corrected together, can show any difference at all.

    Args:
        tests: Pairs that are tested together.
        alpha: In (0, 1).
    """
    seeds = 1
    while smallest_p(seeds) * max(tests, 1) > alpha:
        seeds += 1
    return seeds


def centre_interval(
    values: ArrayLike, *, centre: Centre = "mean", level: float = 0.95, resamples: int = 9999
) -> tuple[float, Interval]:
    """The mean or median of a sample and its bootstrap interval (BCa; percentile where BCa does not exist).

    Args:
        values: ``(n,)``, finite.
        centre: ``"mean"`` or ``"median"``.
        level: In (0, 1).
        resamples: Of the bootstrap, seeded by a constant; 0 for no interval.

    Returns:
        The centre, NaN for an empty sample; the interval, NaN below two values.
    """
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    function = np.mean if centre == "mean" else np.median
    nothing = Interval(float("nan"), float("nan"))
    if not sample.size:
        return float("nan"), nothing
    middle = float(function(sample))
    if sample.size < 2 or not resamples:
        return middle, nothing
    if np.ptp(sample) == 0:
        return middle, Interval(middle, middle)
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                (sample,),
                function,
                confidence_level=level,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return middle, Interval(float(found.low), float(found.high))


# Details. Everything below sees numbers with their sign turned so that larger is better.


def _check_options(direction: Any, alpha: Any, level: Any, centre: Any, resamples: Any) -> None:
    for name, value, legal in (
        ("direction", direction, get_args(Direction)),
        ("centre", centre, get_args(Centre)),
    ):
        if value not in legal:
            raise InvalidInputError(f"{name} is {value!r}; legal: {', '.join(map(repr, legal))}")
    for name, value in (("alpha", alpha), ("level", level)):
        if not is_number(value) or not 0 < value < 1:
            raise InvalidInputError(f"{name} is {value!r}; a number in (0, 1) is needed")
    if resamples != 0 and not is_whole(resamples, least=100):
        raise InvalidInputError(f"resamples is {resamples!r}; a whole number of at least 100, or 0, is needed")


def _table_of(finals: Mapping[str, ArrayLike], direction: Direction) -> dict[str, Floats]:
    if not isinstance(finals, Mapping) or not finals:
        raise InvalidInputError(f"finals is {finals!r}; a mapping of at least one arm to its numbers is needed")
    sign = 1.0 if direction == "maximise" else -1.0
    table = {}
    for name, values in finals.items():
        numbers = np.asarray(values, dtype=np.float64) * sign
        if numbers.ndim != 1 or not numbers.size:
            raise InvalidInputError(f"{name}: shape {numbers.shape}; one number a seed, (seeds,), is needed")
        if np.isposinf(numbers).any():
            raise InvalidInputError(
                f"{name} has {sign * math.inf}, which would be perfect; to {direction}, only {-sign * math.inf} "
                "(nothing feasible found) and NaN (missing) are legal beside numbers"
            )
        table[str(name)] = numbers
    lengths = {name: len(values) for name, values in table.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidInputError(
            f"arms have {lengths} numbers; they are paired by seed, so give NaN where a seed is missing"
        )
    return table


def _summary(name: str, values: Floats, sign: float, centre: Centre, level: float, resamples: int) -> Arm:
    numbers = sign * values[np.isfinite(values)]
    middle, interval = centre_interval(numbers, centre=centre, level=level, resamples=resamples)
    return Arm(
        name=name,
        seeds=len(numbers),
        found_nothing=int(np.isneginf(values).sum()),
        missing=int(np.isnan(values).sum()),
        centre=middle,
        interval=interval,
        deviation=float(numbers.std(ddof=1)) if len(numbers) > 1 else float("nan"),
        low=float(numbers.min()) if len(numbers) else float("nan"),
        high=float(numbers.max()) if len(numbers) else float("nan"),
    )


class _Test(NamedTuple):
    differences: Floats  # of all pairs; finite, a seed where one found nothing beyond every other
    p: float
    rank_biserial: float


def _signed_rank(a: Floats, b: Floats) -> _Test:
    """Wilcoxon's signed-rank test of paired numbers, exact where that can be had."""
    from scipy import stats

    both = ~(np.isnan(a) | np.isnan(b))
    d = _differences(a[both], b[both])
    if not d.size:
        return _Test(d, float("nan"), float("nan"))
    if not d.any():
        return _Test(d, 1.0, 0.0)
    sizes, signs = np.abs(d), np.sign(d)
    # Pratt's method: zeros take part in the ranking and fall out of both sums.
    ranks = stats.rankdata(sizes)
    plus, minus = float(ranks[signs > 0].sum()), float(ranks[signs < 0].sum())
    if np.count_nonzero(d) <= EXACT:
        # scipy.stats.wilcoxon is exact without ties and zeros only.
        p = 2 * _tail(ranks[signs != 0])[round(2 * max(plus, minus))]
    else:
        p = stats.wilcoxon(d, zero_method="pratt", correction=True, method="asymptotic").pvalue
    return _Test(d, min(1.0, float(p)), (plus - minus) / (plus + minus))


def _tail(ranks: Floats) -> Floats:
    """Chances that the ranks with a positive sign sum to at least so much, where each sign is a fair coin.

    Args:
        ranks: ``(n,)``, whole or half.

    Returns:
        ``(2 * ranks.sum() + 1,)``: at index ``k`` the chance of a sum of at least ``k / 2``. The distribution is built
        rank by rank, as the convolution of the two outcomes of each sign.
    """
    doubled = np.rint(2 * ranks).astype(int)
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(chances)
        shifted[rank:] = chances[:-rank]
        chances = (chances + shifted) / 2
    tail: Floats = np.cumsum(chances[::-1])[::-1]  # from the small end: no digits of a small tail are lost
    return tail


def _differences(a: Floats, b: Floats) -> Floats:
    """``a - b``; where only one found nothing, beyond every finite difference; where both did, 0."""
    known = np.isfinite(a) & np.isfinite(b)
    d = np.zeros_like(a)
    d[known] = a[known] - b[known]
    # Equal differences of decimal metrics (0.91 - 0.90, 0.81 - 0.80) differ in their last bits: those are ties.
    scale = max(np.abs(a[known]).max(initial=0.0), np.abs(b[known]).max(initial=0.0))
    if scale > 0:
        d = np.round(d / scale, 12) * scale
    beyond = 2 * np.abs(d).max(initial=0.0) + 1.0
    d[np.isfinite(a) & ~np.isfinite(b)] = beyond
    d[~np.isfinite(a) & np.isfinite(b)] = -beyond
    return d


def _pair(
    a: str,
    b: str,
    of_a: Floats,
    of_b: Floats,
    sign: float,
    test: _Test,
    p_corrected: float,
    tests: int,
    alpha: float,
    level: float,
    centre: Centre,
    resamples: int,
) -> Pair:
    known = np.isfinite(of_a) & np.isfinite(of_b)
    gains = of_a[known] - of_b[known]
    gain, interval = centre_interval(gains, centre=centre, level=level, resamples=resamples)
    reachable = min(1.0, tests * smallest_p(len(test.differences)))
    outcome: Outcome = "not distinguishable"
    if not test.differences.size:
        outcome = "nothing paired"
    elif reachable > alpha:
        outcome = "too few seeds"
    elif p_corrected <= alpha:
        direction = np.sign(test.rank_biserial)
        # The ranks carry the test; where the shown difference points the other way, no arm is named.
        agree = math.isnan(gain) or np.sign(gain) in (0.0, direction)
        outcome = "mixed" if not agree or direction == 0 else "better" if direction > 0 else "worse"
    low, high = (interval.low, interval.high) if sign > 0 else (-interval.high, -interval.low)
    return Pair(
        a=a,
        b=b,
        seeds=len(test.differences),
        wins=int((test.differences > 0).sum()),
        ties=int((test.differences == 0).sum()),
        losses=int((test.differences < 0).sum()),
        p=test.p,
        p_corrected=p_corrected,
        reachable=reachable,
        difference=sign * gain,
        interval=Interval(low, high),
        detectable=_detectable(gains, alpha / max(tests, 1)) if reachable <= alpha else float("inf"),
        a12=a12(of_a[~np.isnan(of_a)], of_b[~np.isnan(of_b)]),
        rank_biserial=test.rank_biserial,
        outcome=outcome,
    )


def _detectable(gains: Floats, alpha: float) -> float:
    """The mean difference that this test at this level finds with a chance of :data:`POWER`; NaN below two."""
    if len(gains) < 2:
        return float("nan")
    return _detectable_shift(len(gains), alpha) * float(gains.std(ddof=1))


@lru_cache(maxsize=1024)
def _detectable_shift(n: int, alpha: float) -> float:
    """The mean, in standard deviations, at which ``n`` normal differences are shown to be positive, 8 times in 10."""
    from scipy import stats

    if n > 100:  # the signed-rank test is as good as the t test of 3 / pi as many differences
        return float(stats.norm.ppf([1 - alpha / 2, POWER]).sum() / math.sqrt(n * 3 / math.pi))
    shown = np.flatnonzero(2 * _tail(np.arange(1.0, n + 1)) <= alpha)
    if not shown.size:
        return math.inf
    # The sum of the positive ranks is the number of pairs (i <= j) with a positive mean (Walsh averages), so a sample
    # is shown to be positive from that shift on which makes enough of them positive.
    least = (int(shown[0]) + 1) // 2
    i, j = np.triu_indices(n)
    samples = np.random.default_rng(0).standard_normal((SIMULATED, n))
    needed = [-np.partition((x[i] + x[j]) / 2, len(i) - least)[len(i) - least] for x in samples]
    return float(np.quantile(needed, POWER))


def _friedman(table: Mapping[str, Floats]) -> Friedman | None:
    from scipy import stats

    values = np.stack(list(table.values()), axis=1)
    values = values[~np.isnan(values).any(axis=1)]
    if values.shape[1] < 3 or len(values) < 2:
        return None
    ranks = stats.rankdata(-values, axis=1)
    means = dict(zip(table, ranks.mean(axis=0).tolist(), strict=True))
    if not np.ptp(ranks, axis=1).any():  # all arms equal with every seed
        return Friedman(len(values), 0.0, 1.0, means)
    test = stats.friedmanchisquare(*(-ranks).T)
    return Friedman(len(values), float(test.statistic), float(test.pvalue), means)
