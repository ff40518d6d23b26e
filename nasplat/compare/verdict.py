"""A comparison in words, which never say more than its statistics carry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nasplat.compare.statistics import POWER, Outcome, Pair, Statistics


@dataclass(frozen=True)
class Verdict:
    """What a comparison shows, in sentences.

    Attributes:
        overall: One or a few sentences on all arms.
        arms: One sentence an arm, by name.
        outcomes: Of each arm against the baseline; empty without one.
        best: The arm that was shown to be better than every other; None where none was.
    """

    overall: str
    arms: Mapping[str, str]
    outcomes: Mapping[str, Outcome]
    best: str | None

    def __str__(self) -> str:
        return "\n".join([self.overall, *(f"  {sentence}" for sentence in self.arms.values())])


def verdict(statistics: Statistics) -> Verdict:
    """The verdict of :func:`~nasplat.compare.statistics.compare_arms`.

    An arm is called better or worse only where the corrected p is at most alpha; it is called the best only where it
    is so against every other arm. Everything else is "not distinguishable", with the interval of the difference and
    the difference that could have been detected; or, where no outcome whatever could have reached alpha, "too few
    seeds".

    Args:
        statistics: Of two arms or more; of one, the verdict says that there is nothing to compare.
    """
    against = {}
    if statistics.baseline is not None:
        against = {
            name: statistics.pair(name, statistics.baseline) for name in statistics.arms if name != statistics.baseline
        }
    best = _best(statistics)
    return Verdict(
        overall=_overall(statistics, against, best),
        arms={name: _arm_sentence(statistics, name, against.get(name)) for name in statistics.arms},
        outcomes={name: pair.outcome for name, pair in against.items()},
        best=best,
    )


def number(value: float) -> str:
    """A number to four significant digits."""
    if math.isnan(value):
        return "unknown"
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def probability(p: float) -> str:
    """``p = 0.012``, or ``p < 0.0001``."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last


def _best(statistics: Statistics) -> str | None:
    """The arm that is shown better than each other one."""
    if len(statistics.arms) < 2 or len(statistics.pairs) < math.comb(len(statistics.arms), 2):
        return None
    for name in statistics.arms:
        if all(statistics.pair(name, other).outcome == "better" for other in statistics.arms if other != name):
            return name
    return None


def _overall(statistics: Statistics, against: Mapping[str, Pair], best: str | None) -> str:
    metric, pairs = statistics.metric, statistics.pairs
    if len(statistics.arms) < 2:
        return f"There is only one arm, {next(iter(statistics.arms))}: nothing to compare."
    said = []
    outcomes = {pair.outcome for pair in pairs}
    seeds = max(pair.seeds for pair in pairs)
    tests = "1 test" if len(pairs) == 1 else f"{len(pairs)} tests corrected together"
    if seeds == 0:
        said.append(f"Nothing can be said on {metric}: no two arms have a seed in common.")
    elif outcomes <= {"too few seeds", "nothing paired"}:
        reachable = min(pair.reachable for pair in pairs)
        said.append(
            f"Too few seeds to show any difference in {metric}: with {seeds} "
            f"{'seed' if seeds == 1 else 'seeds'} and {tests} the smallest reachable p is {reachable:.2g}, above "
            f"{statistics.alpha:g}; at least {statistics.seeds_needed} seeds are needed."
        )
    elif best is not None:
        worst = max(statistics.pair(best, other).p_corrected for other in statistics.arms if other != best)
        if len(statistics.arms) == 2:
            other = next(name for name in statistics.arms if name != best)
            said.append(f"{best} is better in {metric} than {other} ({probability(worst)}, {seeds} seeds).")
        else:
            said.append(
                f"{best} is better in {metric} than each of the {len(statistics.arms) - 1} other arms (largest "
                f"corrected {probability(worst)}, {seeds} seeds)."
            )
    elif not outcomes & {"better", "worse", "mixed"}:
        which = "the two arms" if len(statistics.arms) == 2 else f"any two of the {len(statistics.arms)} arms"
        if len(pairs) < math.comb(len(statistics.arms), 2):
            which = f"{statistics.baseline} and any other arm"
        said.append(
            f"Not distinguishable: no difference in {metric} is shown between {which} with {seeds} seeds ({tests}, "
            f"alpha {statistics.alpha:g})."
        )
    else:
        said += _partly(statistics, against)
    if statistics.baseline is None:
        said.append("No random arm takes part, so nothing is said on whether any arm is better than random search.")
    return " ".join(said)


def _partly(statistics: Statistics, against: Mapping[str, Pair]) -> list[str]:
    """Some differences are shown, but no single best."""
    metric, said = statistics.metric, []
    beaten = {
        loser
        for pair in statistics.pairs
        for loser in ([pair.b] if pair.outcome == "better" else [pair.a] if pair.outcome == "worse" else [])
    }
    for outcome, words in (("better", "better in {} than {}"), ("worse", "worse in {} than {}")):
        names = [name for name, pair in against.items() if pair.outcome == outcome]
        if names:
            what = words.format(metric, statistics.baseline)
            said.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} {what}.")
    open_ = [name for name in statistics.arms if name not in beaten]
    if len(statistics.pairs) == math.comb(len(statistics.arms), 2):
        if len(open_) > 1:
            said.append(f"No single best: {listed(open_)} are not shown to be worse than any other arm.")
        else:
            said.append("No single best: no arm is shown to be better than every other.")
    elif len(against) > 1:
        said.append("The arms were tested against the baseline only, so none of them is named the best.")
    if not any(pair.outcome in ("better", "worse", "mixed") for pair in against.values()) and against:
        said.append(f"No arm is distinguishable from {statistics.baseline}.")
    return said


def _arm_sentence(statistics: Statistics, name: str, pair: Pair | None) -> str:
    arm, metric = statistics.arms[name], statistics.metric
    seeds = f"{arm.seeds} {'seed' if arm.seeds == 1 else 'seeds'}"
    sentence = f"{name}: {statistics.centre} {metric} {number(arm.centre)}"
    if not math.isnan(arm.interval.low):
        sentence += f" [{number(arm.interval.low)}, {number(arm.interval.high)}]"
    sentence += f" over {seeds}"
    if arm.found_nothing:
        sentence += f"; nothing feasible with {arm.found_nothing} more"
    if arm.missing:
        sentence += f"; {arm.missing} missing"
    if name == statistics.baseline:
        return f"{sentence}; the baseline."
    if pair is None:
        return f"{sentence}."
    return f"{sentence}; {_against(statistics, pair)}."


def _against(statistics: Statistics, pair: Pair) -> str:
    """What is shown of an arm against the baseline."""
    other, sure = pair.b, f"{statistics.level:.0%}"
    interval = f"[{number(pair.interval.low)}, {number(pair.interval.high)}]"
    difference = f"difference {number(pair.difference)}, {sure} interval {interval}"
    if math.isnan(pair.interval.low):
        difference = f"difference {number(pair.difference)}"
    match pair.outcome:
        case "better" | "worse":
            return (
                f"{pair.outcome} than {other} ({difference}; {pair.outcome} with "
                f"{pair.wins if pair.outcome == 'better' else pair.losses} of {pair.seeds} seeds, "
                f"corrected {probability(pair.p_corrected)}, A12 {pair.a12:.2f})"
            )
        case "mixed":
            return (
                f"different from {other} by ranks (corrected {probability(pair.p_corrected)}) but not in the same "
                f"direction by {statistics.centre} ({difference}), so neither is called better"
            )
        case "too few seeds":
            return (
                f"against {other}, {pair.seeds} common {'seed' if pair.seeds == 1 else 'seeds'} cannot show any "
                f"difference (smallest reachable p {pair.reachable:.2g}); {difference}"
            )
        case "nothing paired":
            return f"no seed in common with {other}"
    detect = ""
    if math.isfinite(pair.detectable) and pair.detectable > 0:
        detect = (
            f"; with {pair.seeds} seeds a difference of about {number(pair.detectable)} would have been shown "
            f"{round(10 * POWER)} times in 10"
        )
    return f"not distinguishable from {other} ({difference}; corrected {probability(pair.p_corrected)}){detect}"
