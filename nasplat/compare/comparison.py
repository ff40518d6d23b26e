"""Finished searches compared: tables, verdict, curves, costs; saved and loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from nasplat.checks import is_number
from nasplat.compare.budget import COST, Budget, evaluations
from nasplat.compare.curves import Band, SpeedUp, band, on_grid, speed_up, stack
from nasplat.compare.statistics import Centre, Statistics, compare_arms
from nasplat.compare.trace import Account, Terms, Trace, pick, score_curve, trace_of, with_held_out
from nasplat.compare.verdict import Verdict, listed, number, verdict
from nasplat.errors import FolderError, InvalidInputError
from nasplat.figures import save_figure
from nasplat.identity import canonical
from nasplat.objectives import Constraint, Objective
from nasplat.report import WIDTH, plain
from nasplat.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "comparison.json"
SCHEMA = 1

GRID = 200
"""Points of a curve against seconds."""

SHOWN = 4
"""Differences that a refusal names."""

Against = Literal["evaluations", "seconds"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several arms, each run with several seeds on the same terms within the same budget.

    Made by :func:`nasplat.compare`, :meth:`from_results` or :meth:`load`. Everything but the traces is computed when
    it is asked for, and comes out the same each time.

    Attributes:
        traces: Per arm its studies, by seed.
        terms: What all studies have in common.
        budget: What each study could spend.
        baseline: The random arm, that the others are held against; None where there is none.
        report: What to report of the pick besides the objective; None for nothing.
        reference: Worst point of the hypervolume, by objective; None with one objective.
        pairs: Whether all pairs are tested or those with the baseline.
        alpha: Chance of a false difference over all tests of one table.
        level: Of the intervals.
        centre: Whether means or medians are shown.
        remarks: What happened on the way: studies that failed or were left out.
    """

    traces: Mapping[str, Sequence[Trace]]
    terms: Terms
    budget: Budget
    baseline: str | None
    report: Objective | None = None
    reference: Sequence[float] | None = None
    pairs: Literal["all", "baseline"] = "all"
    alpha: float = 0.05
    level: float = 0.95
    centre: Centre = "mean"
    remarks: Sequence[str] = field(default=())

    # Making one.

    @classmethod
    def from_results(
        cls,
        results: Mapping[str, Iterable[Result]],
        *,
        budget: Budget | None = None,
        baseline: str | None = "random",
        report: str | Objective | None = None,
        reference: Sequence[float] | None = None,
        pairs: Literal["all", "baseline"] = "all",
        alpha: float = 0.05,
        level: float = 0.95,
        centre: Centre = "mean",
        remarks: Sequence[str] = (),
    ) -> Comparison:
        """Compare studies that were run already.

        Args:
            results: Per arm its results, one a seed: ``{"random": [load("runs/r0"), ...], "evolution": [...]}``.
            budget: What counts of each study; None: as many evaluations as every study has.
            baseline: The random arm's name; None where there is none.
            report: What to report of the pick besides the objective: ``"test_accuracy"`` beside ``val_accuracy``, or
                ``maximise("...")`` of any metric.
            reference: Worst point of the hypervolume, one number an objective in the metric's own unit and sign; where
                None, the worst value of each objective among all feasible trials of all arms.
            pairs: Test all pairs of arms, or those with the baseline only.
            alpha: Chance of a false difference over all tests of one table.
            level: Of the intervals.
            centre: Show means or medians.
            remarks: Printed with the comparison.

        Raises:
            InvalidInputError: The studies differ in space, task, objectives or constraints; an arm has no study or a
                seed twice; or an argument is outside what is legal.
        """
        given = {str(name): list(found) for name, found in results.items()}
        _check_arms(given)
        if baseline is not None and baseline not in given:
            raise InvalidInputError(f"baseline is {baseline!r}; there are {', '.join(given)}, or None for no baseline")
        terms = _common_terms(given)
        objectives, _ = terms.made()
        wanted = report_of(report, objectives)
        name_of_report = None if wanted is None else wanted.metric
        metrics = COST if budget is None else budget.metrics
        raw = {
            name: [trace_of(result, metrics=metrics, report=name_of_report) for result in found]
            for name, found in given.items()
        }
        for name, traces in raw.items():
            _check_seeds(name, traces)
        if budget is None:
            budget = _common_budget(raw)
        if wanted is not None:
            raw = {
                name: [
                    with_held_out(trace, result, budget, wanted.metric)
                    for trace, result in zip(traces, given[name], strict=True)
                ]
                for name, traces in raw.items()
            }
        ordered = {name: tuple(sorted(traces, key=lambda trace: trace.seed)) for name, traces in raw.items()}
        return cls(
            traces=ordered,
            terms=terms,
            budget=budget,
            baseline=baseline,
            report=wanted,
            reference=_reference(ordered, objectives, budget, reference),
            pairs=pairs,
            alpha=alpha,
            level=level,
            centre=centre,
            remarks=tuple(remarks),
        )

    # What was compared.

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Of every study."""
        return self.terms.made()[0]

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Of every study."""
        return self.terms.made()[1]

    @property
    def metric(self) -> str:
        """What the arms are compared by: the first objective's metric or, with several objectives, the hypervolume."""
        return "hypervolume" if self.reference is not None else self.objectives[0].metric

    @property
    def id(self) -> str:
        """Known by its studies: the same studies, compared again, have the same."""
        studies = sorted(trace.study for traces in self.traces.values() for trace in traces)
        return hashlib.sha256(canonical(studies).encode()).hexdigest()[:32]

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Of any arm."""
        return tuple(sorted({trace.seed for traces in self.traces.values() for trace in traces}))

    # Numbers.

    def per_seed(self) -> pd.DataFrame:
        """What each arm had found at the end of the budget: a row a seed, a column an arm.

        NaN: not run to the end. Infinity in the bad direction: run to the end, and nothing feasible found.
        """
        return self._by_seed(self._final)

    def held_out_per_seed(self) -> pd.DataFrame:
        """The pick's ``report`` metric: a row a seed, a column an arm; NaN where it is not known.

        Raises:
            InvalidInputError: No metric to report was named.
        """
        if self.report is None:
            raise InvalidInputError("no metric to report was named: compare(..., report='test_accuracy')")
        return self._by_seed(self._held_out)

    def _by_seed(self, value: Any) -> pd.DataFrame:
        table = pd.DataFrame(np.nan, index=pd.Index(self.seeds, name="seed"), columns=list(self.traces))
        for name, traces in self.traces.items():
            for trace in traces:
                if trace.complete(self.budget):
                    table.loc[trace.seed, name] = value(trace)
        return table

    def _final(self, trace: Trace) -> float:
        curve = score_curve(trace.within(self.budget), self.objectives, self.reference)
        if self.reference is not None:
            return float(curve[-1]) if len(curve) else 0.0
        found = float(curve[-1]) if len(curve) else float("nan")
        worst = -math.inf if self.objectives[0].direction == "maximise" else math.inf
        return worst if math.isnan(found) else found

    def _held_out(self, trace: Trace) -> float:
        rows = trace.within(self.budget)
        best = pick(rows, self.objectives[0])
        return float("nan") if best is None else float(rows["held_out"].iloc[best])

    @cached_property
    def statistics(self) -> Statistics:
        """Tests and effect sizes of what each arm had found at the end of the budget."""
        direction = "maximise" if self.reference is not None else self.objectives[0].direction
        return self._tested(self.per_seed(), direction, self.metric)

    @cached_property
    def held_out(self) -> Statistics | None:
        """Tests and effect sizes of the pick's ``report`` metric; None where none was named or no trial has it.

        Its tests are corrected among themselves.
        """
        if self.report is None:
            return None
        table = self.held_out_per_seed()
        if table.isna().all(axis=None):
            return None
        return self._tested(table, self.report.direction, self.report.metric)

    def _tested(self, table: pd.DataFrame, direction: Any, metric: str) -> Statistics:
        return compare_arms(
            {str(name): table[name].to_numpy() for name in table},
            baseline=self.baseline,
            direction=direction,
            pairs=self.pairs if self.baseline is not None else "all",
            alpha=self.alpha,
            level=self.level,
            centre=self.centre,
            metric=metric,
        )

    @cached_property
    def verdict(self) -> Verdict:
        """What the statistics carry, in words."""
        return verdict(self.statistics)

    def curves(self, against: Against = "evaluations") -> dict[str, Band]:
        """Anytime curves: what had been found, over seeds, with bootstrap intervals.

        Args:
            against: ``"evaluations"``, or ``"seconds"``: those charged (of the budget's metrics where it charges
                some, else of training and measuring), or of the clock for a budget of hours.

        Returns:
            By arm. A seed that was not run to the end is left out. A study that ended earlier is carried on with what
            it had found. An arm without a complete seed has no curve.
        """
        if against not in get_args(Against):
            raise InvalidInputError(f"against is {against!r}; legal: {', '.join(map(repr, get_args(Against)))}")
        return {
            name: band(table, places, centre=self.centre, level=self.level)
            for name, (table, places, _) in self._curves(against).items()
        }

    def _curves(self, against: Against) -> dict[str, tuple[Any, Any, list[int]]]:
        """Per arm ``(seeds, steps)``, ``(steps,)`` and the seeds. All arms share the steps."""
        whole = {
            name: [trace for trace in traces if trace.complete(self.budget)] for name, traces in self.traces.items()
        }
        rows = {name: [trace.within(self.budget) for trace in traces] for name, traces in whole.items() if traces}
        scores = {
            name: [score_curve(r, self.objectives, self.reference) for r in found] for name, found in rows.items()
        }
        if not rows:
            return {}
        counted = "evaluation" if against == "evaluations" else "ended" if self.budget.kind == "hours" else "charged"
        ends = [float(r[counted].iloc[-1]) for found in rows.values() for r in found if len(r)]
        last = max(ends, default=0.0)
        places = np.arange(1.0, last + 1) if counted == "evaluation" else np.linspace(0.0, last, GRID)
        if not len(places) or last == 0.0:
            return {}
        nothing = np.nan if self.reference is None else 0.0
        return {
            name: (
                np.nan_to_num(
                    stack([on_grid(r[counted], s, places) for r, s in zip(rows[name], scores[name], strict=True)]),
                    nan=nothing,
                ),
                places,
                [trace.seed for trace in whole[name]],
            )
            for name in rows
        }

    def speed_ups(self, against: Against = "evaluations") -> dict[str, SpeedUp]:
        """After how many evaluations (or seconds) each arm reaches what the baseline reaches at the end.

        Args:
            against: As for :meth:`curves`.

        Returns:
            By arm, over the seeds that the arm has in common with the baseline; arms without one are left out.
        """
        found = self._curves(against)
        if self.baseline is None or self.baseline not in found:
            return {}
        other, places, seeds = found[self.baseline]
        direction = "maximise" if self.reference is not None else self.objectives[0].direction
        ups = {}
        for name, (table, _, own) in found.items():
            common = [seed for seed in own if seed in seeds]
            if name != self.baseline and common:
                ups[name] = speed_up(
                    table[[own.index(seed) for seed in common]],
                    other[[seeds.index(seed) for seed in common]],
                    places,
                    direction=direction,
                    centre=self.centre,
                    level=self.level,
                )
        return ups

    def accounts(self) -> dict[str, list[Account]]:
        """Where the time of each study went, by arm, in the order of seeds."""
        return {name: [trace.account(self.budget) for trace in traces] for name, traces in self.traces.items()}

    # Tables.

    def table(self) -> pd.DataFrame:
        """A row an arm: its summary, the test against the baseline, how soon it reaches the baseline's end."""
        table = self.statistics.table()
        if self.baseline is not None:
            ups = self.speed_ups()
            rows = {name: (up.at, up.factor, *up.factor_interval) for name, up in ups.items()}
            columns = ("reaches_baseline_at", "speed_up", "speed_up_low", "speed_up_high")
            for index, column in enumerate(columns):
                table[column] = [rows[name][index] if name in rows else float("nan") for name in table.index]
        if self.report is not None and self.held_out is not None:
            for name in self.held_out.arms:
                arm = self.held_out.arms[name]
                table.loc[name, self.report.metric] = arm.centre
                table.loc[name, f"{self.report.metric}_low"] = arm.interval.low
                table.loc[name, f"{self.report.metric}_high"] = arm.interval.high
        return table

    def costs(self) -> pd.DataFrame:
        """A row an arm: evaluations and seconds over all its studies (:class:`Account`), within the budget."""
        rows = []
        for name, accounts in self.accounts().items():
            row: dict[str, Any] = {"arm": name, "studies": len(accounts)}
            for key in ("evaluations", "training", "measuring", "scheduling", "idle", "wall"):
                row[key] = sum(getattr(account, key) for account in accounts)
            row["workers"] = max((account.workers for account in accounts), default=0)
            row["simulated"] = any(account.simulated for account in accounts)
            rows.append(row)
        return pd.DataFrame(rows).set_index("arm")

    def curves_table(self, against: Against = "evaluations") -> pd.DataFrame:
        """The anytime curves as rows: arm, x, centre, low, high."""
        parts = [
            pd.DataFrame(
                {"arm": name, against: found.x, self.centre: found.centre, "low": found.low, "high": found.high}
            )
            for name, found in self.curves(against).items()
        ]
        columns = ["arm", against, self.centre, "low", "high"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    # Words.

    def notes(self) -> list[str]:
        """What one must know to read the tables."""
        said = list(self.remarks)
        for name, traces in self.traces.items():
            short = [trace for trace in traces if not trace.complete(self.budget)]
            if short:
                said.append(
                    f"{name}: {len(short)} of {len(traces)} studies did not use the budget up and are left out (seeds "
                    f"{listed(str(trace.seed) for trace in short)})."
                )
            ended = [trace for trace in traces if trace.exhausted and trace not in short]
            if ended:
                said.append(f"{name}: {len(ended)} studies ended by themselves: {ended[0].over}.")
            capped = [trace for trace in traces if trace.capped(self.budget) and not trace.used(self.budget)]
            if capped:
                counts = [trace.evaluations for trace in capped]
                seeds = listed(str(trace.seed) for trace in capped)
                said.append(
                    f"{name}: {len(capped)} of {len(traces)} studies (seeds {seeds}) did not use the budget up with "
                    f"{self.budget.proposals} candidates, and count with the {_range(counts)} evaluations that they "
                    "had; the other candidates were refused for a cheap cost, or were copies."
                )
        if self.budget.kind == "evaluations":
            for name, traces in self.traces.items():
                rows = [trace.within(self.budget)["whole"] for trace in traces]
                share = float(np.mean(pd.concat(rows))) if any(len(row) for row in rows) else 1.0
                if share < 1:
                    said.append(
                        f"{name}: {1 - share:.0%} of its trials train in part, or train a supernet, so equal "
                        "evaluations are not equal cost; charged(..., 'train_seconds') compares at equal cost."
                    )
        if self.reference is not None:
            point = ", ".join(
                f"{objective.metric} {number(value)}"
                for objective, value in zip(self.objectives, self.reference, strict=True)
            )
            said.append(f"Hypervolume is that of the feasible front so far, up to the reference point {point}.")
        if self.report is None and self.objectives[0].metric.startswith("val_"):
            said.append(
                f"The best of many {self.objectives[0].metric} is optimistic for every arm; report='test_accuracy' "
                "shows the picks on data that chose nothing."
            )
        if self.report is not None and self.held_out is None:
            said.append(f"No pick has {self.report.metric}, so it is not reported.")
        slots = {trace.workers for traces in self.traces.values() for trace in traces}
        if len(slots) > 1:
            said.append(f"Studies ran with different numbers of workers ({listed(map(str, sorted(slots)))}).")
        simulated = [str(name) for name, row in self.costs().iterrows() if row["simulated"]]
        if simulated:
            said.append(
                f"train_seconds of {listed(simulated)} are more than the trials took: a table's, not this machine's."
            )
        return said

    def __repr__(self) -> str:
        return f"<Comparison of {listed(self.traces)} over {len(self.seeds)} seeds, {self.budget}>"

    def __str__(self) -> str:
        wishes = ", ".join(map(str, (*self.objectives, *self.constraints)))
        parts = [
            f"{len(self.traces)} {'arm' if len(self.traces) == 1 else 'arms'}, {len(self.seeds)} "
            f"{'seed' if len(self.seeds) == 1 else 'seeds'}, {self.budget} for each study; {wishes}",
            str(self.verdict),
        ]
        if self.report is not None and self.held_out is not None:
            parts.append(f"The picks by {self.report.metric}: {verdict(self.held_out)}")
        parts += [self._arms_text(), self._costs_text()]
        if len(self.statistics.pairs) > 1:
            parts.insert(-1, self._pairs_text())
        if notes := self.notes():
            parts.append("\n".join(f"Note: {note}" for note in notes))
        return "\n\n".join(parts)

    def _arms_text(self) -> str:
        table, rows = self.table(), []
        for name, row in table.iterrows():
            cells = [str(name), str(row["seeds"]), number(row[self.centre]), _span(row["low"], row["high"])]
            if self.report is not None and self.held_out is not None:
                cells.append(number(row[self.report.metric]))
            if self.baseline is not None and str(name) != self.baseline:
                at = row["reaches_baseline_at"]
                cells += [
                    _p(row["p_corrected"]),
                    f"{row['a12']:.2f}",
                    "" if math.isnan(at) else "never" if math.isinf(at) else number(at),
                    "" if math.isnan(at) else _speed(row),
                ]
            rows.append(cells)
        headers = ["arm", "seeds", self.centre, f"{self.level:.0%} interval"]
        if self.report is not None and self.held_out is not None:
            headers.append(self.report.metric)
        legend = f"{self.centre}: of {self.metric} over seeds"
        if self.baseline is not None:
            headers += ["p", "A12", "reaches at", "speed-up"]
            legend += (
                f"; p: against {self.baseline}, corrected (Holm); A12: chance of being better than {self.baseline}; "
                f"reaches at: evaluations after which the {self.centre} is what {self.baseline} ends with"
            )
        rows = [[*cells, *[""] * (len(headers) - len(cells))] for cells in rows]
        return f"{_text(headers, rows)}\n{textwrap.fill(legend, WIDTH)}"

    def _pairs_text(self) -> str:
        rows = [
            [
                f"{pair.a} - {pair.b}",
                number(pair.difference),
                _span(*pair.interval),
                f"{pair.wins}/{pair.ties}/{pair.losses}",
                _p(pair.p_corrected),
                pair.outcome,
            ]
            for pair in self.statistics.pairs
        ]
        return _text(["pair", "difference", "interval", "wins/ties/losses", "p (Holm)", "outcome"], rows)

    def _costs_text(self) -> str:
        keys = ("training", "measuring", "scheduling", "idle", "wall")
        rows = [
            [str(name), str(row["evaluations"]), *(number(round(row[key], 2)) for key in keys)]
            for name, row in self.costs().iterrows()
        ]
        return _text(["arm", "evaluations", *(f"{key} [s]" for key in keys)], rows)

    def figure(self) -> Figure:
        """The anytime curves against evaluations and seconds, and the numbers by seed, as a matplotlib figure."""
        from nasplat.compare.figure import draw

        return draw(self)

    # Keeping.

    def save(self, folder: str | Path) -> Path:
        """Write ``comparison.json`` (all that :meth:`load` needs), tables as CSV, the figure, the text.

        Args:
            folder: Made where it is missing; files of an earlier comparison are replaced, others left alone.

        Returns:
            The folder.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        record = {
            "schema": SCHEMA,
            "terms": asdict(self.terms),
            "budget": asdict(self.budget),
            "report": None if self.report is None else asdict(self.report),
            "traces": {name: [trace.to_json() for trace in traces] for name, traces in self.traces.items()},
            **{name: getattr(self, name) for name in _PLAIN},
        }
        tables = {
            "arms": self.table(),
            "pairs": self.statistics.pairs_table().set_index(["a", "b"]),
            "seeds": self.per_seed(),
            "costs": self.costs(),
            "curves": self.curves_table().set_index("arm"),
            "curves_seconds": self.curves_table("seconds").set_index("arm"),
        }
        if self.report is not None:
            tables["held_out"] = self.held_out_per_seed()
        for name, table in tables.items():
            _write(path / f"{name}.csv", table.to_csv())
        _write(path / "verdict.txt", f"{self}\n")
        self._save_figure(path)
        # Last: what load looks for is there only when everything is.
        _write(path / FILE, json.dumps(record, allow_nan=False))
        return path

    def _save_figure(self, folder: Path) -> None:
        figure = self.figure()
        for suffix in (".svg", ".png"):
            save_figure(figure, folder / f"figure{suffix}")

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """The comparison that :meth:`save` wrote.

        Raises:
            FolderError: There is none, or its schema is newer than this nasplat.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FolderError(f"no comparison in {folder}: it has no {FILE}")
        try:
            record = json.loads(path.read_text())
            if record["schema"] != SCHEMA:
                raise FolderError(f"{path} has schema {record['schema']!r}; this nasplat reads schema {SCHEMA}")
            return cls(
                traces={name: tuple(map(Trace.from_json, traces)) for name, traces in record["traces"].items()},
                terms=Terms(**record["terms"]),
                budget=Budget(**record["budget"]),
                report=None if record["report"] is None else Objective(**record["report"]),
                **{name: record[name] for name in _PLAIN},
            )
        except (LookupError, TypeError, ValueError) as error:
            raise FolderError(f"{path} is no comparison that this nasplat wrote: {error!r}") from error


_PLAIN = ("baseline", "reference", "pairs", "alpha", "level", "centre", "remarks")


def report_of(report: str | Objective | None, objectives: Sequence[Objective]) -> Objective | None:
    """What to report, with its direction: that of the objective of the same name on another split.

    Raises:
        InvalidInputError: A plain name, and no objective says whether it is better large or small.
    """
    if report is None or isinstance(report, Objective):
        return report
    if not isinstance(report, str) or not report:
        raise InvalidInputError(f"report is {report!r}; a metric's name, maximise('...') or minimise('...') is needed")
    stem = report.rpartition("_")[2]
    for objective in objectives:
        if objective.metric == report or objective.metric.rpartition("_")[2] == stem:
            return Objective(report, objective.direction)
    raise InvalidInputError(
        f"report is {report!r}, and no objective ({listed(map(str, objectives))}) says whether it is better large or "
        f"small: give maximise({report!r}) or minimise({report!r})"
    )


def _check_arms(given: Mapping[str, Sequence[Result]]) -> None:
    if not given:
        raise InvalidInputError("there is no arm to compare; a mapping of at least one name to results is needed")
    for name, found in given.items():
        if not found or not all(isinstance(result, Result) for result in found):
            raise InvalidInputError(f"the arm {name!r} is {found!r}; at least one nasplat.Result is needed")


def _check_seeds(name: str, traces: Sequence[Trace]) -> None:
    by_seed: dict[int, str] = {}
    for trace in traces:
        if trace.seed in by_seed:
            raise InvalidInputError(
                f"{name} has seed {trace.seed} twice, in {by_seed[trace.seed]} and {trace.folder}: a seed counts once"
            )
        by_seed[trace.seed] = trace.folder


def _common_terms(given: Mapping[str, Sequence[Result]]) -> Terms:
    """The terms of all studies.

    Raises:
        InvalidInputError: They differ; the message says in what, and which folders.
    """
    first: tuple[Terms, Path] | None = None
    for found in given.values():
        for result in found:
            terms = Terms.of(result)
            if first is None:
                first = terms, result.folder
            said = list(_differences(asdict(first[0]), asdict(terms)))
            if said:
                more = "" if len(said) <= SHOWN else f"; and {len(said) - SHOWN} more"
                raise InvalidInputError(
                    f"{first[1]} and {result.folder} cannot be compared, since they differ in {'; '.join(said[:SHOWN])}"
                    f"{more}"
                )
    assert first is not None
    return first[0]


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """In what two descriptions differ, leaf by leaf."""
    if isinstance(there, dict) and isinstance(here, dict) and set(there) == set(here):
        for name in there:
            # "fields" is how a dataclass is described, and says nothing to a reader.
            inner = path if name == "fields" else f"{path}.{name}" if path else str(name)
            yield from _differences(there[name], here[name], inner)
    elif canonical(there) != canonical(here):
        yield f"{path} ({_short(there)} and {_short(here)})"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _common_budget(traces: Mapping[str, Sequence[Trace]]) -> Budget:
    """As many evaluations as every study has that did not end by itself."""
    counts = [trace.evaluations for found in traces.values() for trace in found if not trace.exhausted]
    fewest = min(counts, default=max(trace.evaluations for found in traces.values() for trace in found))
    return evaluations(max(1, fewest))


def _reference(
    traces: Mapping[str, Sequence[Trace]],
    objectives: Sequence[Objective],
    budget: Budget,
    given: Sequence[float] | None,
) -> tuple[float, ...] | None:
    if given is not None:
        if len(given) != len(objectives) or not all(is_number(value) for value in given):
            raise InvalidInputError(
                f"reference is {given!r}; one number for each of {', '.join(map(str, objectives))} is needed"
            )
        if len(objectives) == 1:
            raise InvalidInputError(f"there is one objective, {objectives[0]}, and no hypervolume; leave reference out")
        return tuple(float(value) for value in given)
    if len(objectives) == 1:
        return None
    columns = [f"objective.{objective.metric}" for objective in objectives]
    values = pd.concat([trace.within(budget)[columns] for found in traces.values() for trace in found]).dropna()
    if values.empty:
        return tuple(0.0 for _ in objectives)
    return tuple(
        float(values[column].min() if objective.direction == "maximise" else values[column].max())
        for column, objective in zip(columns, objectives, strict=True)
    )


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _span(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.2g}"


def _speed(row: pd.Series[Any]) -> str:
    """A factor with its interval; 0 stands for "not reached", so below 1."""

    def shown(value: float) -> str:
        return "<1" if value == 0 else f"{value:.2g}"

    text = f"{shown(row['speed_up'])}"
    return (
        text
        if math.isnan(row["speed_up_low"])
        else (f"{text} [{shown(row['speed_up_low'])}, {shown(row['speed_up_high'])}]")
    )


def _text(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return plain(table)


def _write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
