"""Runs every arm with every seed within the same budget, random search always among them, and compares them."""

from __future__ import annotations

import inspect
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from nasplat import journal, plugins
from nasplat.checks import is_whole
from nasplat.compare.budget import UNLIMITED, Budget, budget_of
from nasplat.compare.comparison import Comparison, report_of
from nasplat.compare.statistics import Centre
from nasplat.compare.trace import Terms, trace_of
from nasplat.compare.verdict import listed, number
from nasplat.errors import FolderMismatchError, InvalidInputError, NasplatWarning, SearchInterrupted, UnsupportedError
from nasplat.identity import canonical, describe
from nasplat.mlflow_tracker import MlflowTracker
from nasplat.objectives import Constraint, Objective
from nasplat.result import Result
from nasplat.space import SearchSpace
from nasplat.strategy import Evaluate, Strategy
from nasplat.study import Study
from nasplat.task import Task
from nasplat.tracking import Tracker

RANDOM = "random_search"
"""The plug-in among the strategies that is the random arm."""

NAME = "random"
"""What the random arm is called where it is added."""

ArmSource: TypeAlias = Strategy | Study | Callable[[int], Study]


def compare(
    arms: Mapping[str, ArmSource],
    *,
    budget: Budget | int,
    folder: str | Path,
    seeds: Iterable[int] = range(10),
    space: SearchSpace | None = None,
    task: Task | None = None,
    objectives: Sequence[Objective] | None = None,
    constraints: Sequence[Constraint] = (),
    report: str | Objective | None = None,
    reference: Sequence[float] | None = None,
    pairs: Literal["all", "baseline"] = "all",
    alpha: float = 0.05,
    level: float = 0.95,
    centre: Centre = "mean",
    workers: int = 0,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float | None = None,
    tracker: Tracker | Literal["mlflow"] | None = "mlflow",
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Run every arm with every seed within the same budget, and compare what they found.

    Example::

        comparison = nasplat.compare(
            {"evolution": RegularizedEvolution(population=20), "tpe": OptunaSearch("tpe")},
            space=Bats.small(), task=Task.fashion_mnist(), objectives=[maximise("val_accuracy")],
            budget=evaluations(100), seeds=range(10), folder="runs/strategies")
        print(comparison)

    Random search always takes part: where no arm is the plug-in ``random_search`` with its defaults, one named
    ``random`` is added, with the first arm's space, task, objectives and settings.

    Every study has a folder of its own, ``folder/<arm>-seed-<n>`` (a function that makes studies chooses for itself).
    Called again after a kill, what had ended is kept and the rest goes on; with more seeds, arms or budget it adds to
    what is there. Studies run one after the other, all arms of one seed before the next seed, each seed beginning with
    another arm, so that a machine that becomes slower meets all arms alike.

    Args:
        arms: By name: a strategy (with ``space``, ``task`` and ``objectives`` below), a :class:`~nasplat.Study` (its
            seed and folder are replaced), or a function ``(seed) -> Study``.
        budget: What each study may spend: ``evaluations(200)`` or 200, ``hours(2)``, ``charged(3600,
            "train_seconds")``.
        folder: Where studies and comparison are kept.
        seeds: Whole numbers, each once. The same for every arm: the tests are paired by seed. Two arms need at least 6
            to show anything at an alpha of 0.05, five arms with all pairs 9.
        space: Of arms that are strategies.
        task: Likewise.
        objectives: Likewise; the first is compared. With several, the hypervolume is.
        constraints: Likewise.
        report: A metric of the pick to report besides: ``"test_accuracy"`` beside ``val_accuracy``, or
            ``maximise("...")`` of any. Recorded by the trials, or for ``test_...`` scored with the pick's weights.
        reference: Worst point of the hypervolume, by objective; None: the worst feasible values of all arms.
        pairs: ``"all"``: test all pairs; ``"baseline"``: each arm against random search only.
        alpha: Chance of a false difference over all tests together.
        level: Of the intervals.
        centre: Show ``"mean"`` or ``"median"`` over seeds.
        workers: Trials at a time, on Ray; 0 runs them one by one in this process.
        cpus_per_trial: Processors that Ray sets aside for a trial.
        gpus_per_trial: GPUs, likewise; None is 1 on a CUDA device.
        tracker: Records the comparison, and the studies of arms that are strategies: ``"mlflow"``, a tracker, or None.
        progress: A line a study on stderr.
        options: Further arguments of :class:`~nasplat.Study` for arms that are strategies: meters, device, threads,
            time_limit_s, keep_weights, retrain_duplicates.

    Returns:
        The comparison, which was also saved in ``folder``.

    Raises:
        InvalidInputError: An argument is outside what is legal, or arms differ in space, task, objectives or
            constraints.
        FolderMismatchError: A study's folder holds another study: an arm of this name had other parameters, or the
            comparison other objectives or constraints.
        SearchInterrupted: Ctrl-C. The same call goes on.
    """
    budget = budget_of(budget)
    chosen = _seeds(seeds)
    home = Path(folder)
    shared = {"space": space, "task": task, "objectives": objectives}
    makers = _makers(arms, shared, {"constraints": constraints, "tracker": tracker, **options}, home)
    made = {name: maker(chosen[0]) for name, maker in makers.items()}
    _check_alike(made)
    report = report_of(report, made[next(iter(made))].objectives)
    baseline = _with_random(makers, made, home)
    run = {"workers": workers, "cpus_per_trial": cpus_per_trial, "gpus_per_trial": gpus_per_trial}
    results, remarks = _run_all(makers, chosen, budget, run, progress)
    comparison = Comparison.from_results(
        results,
        budget=budget,
        baseline=baseline,
        report=report,
        reference=reference,
        pairs=pairs,
        alpha=alpha,
        level=level,
        centre=centre,
        remarks=remarks,
    )
    comparison.save(home)
    if tracker is not None:
        _record(comparison, home, tracker)
    return comparison


# The arms.

_Maker: TypeAlias = Callable[[int], Study]


def _seeds(seeds: Iterable[int]) -> list[int]:
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Iterable):
        raise InvalidInputError(f"seeds is {seeds!r}; whole numbers are needed: range(10), [0, 1, 2]")
    chosen = list(seeds)
    wrong = [seed for seed in chosen if not is_whole(seed, least=0)]
    if not chosen or wrong or len(set(chosen)) < len(chosen):
        raise InvalidInputError(f"seeds is {chosen!r}; at least one whole number from 0, each once, is needed")
    return chosen


def _makers(
    arms: Mapping[str, ArmSource], shared: Mapping[str, Any], options: Mapping[str, Any], home: Path
) -> dict[str, _Maker]:
    if not isinstance(arms, Mapping) or not arms:
        raise InvalidInputError(
            f"arms is {arms!r}; a mapping of names to strategies, studies or functions (seed) -> Study is needed"
        )
    makers: dict[str, _Maker] = {}
    for name, source in arms.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w\-+][\w\-+. ]*", name):
            raise InvalidInputError(
                f"an arm is named {name!r}; letters, digits, '_', '-', '+', '.' and spaces are legal"
            )
        makers[name] = _maker(name, source, shared, options, home)
    if not any(isinstance(source, Strategy) and not isinstance(source, type) for source in arms.values()):
        given = [part for part, value in shared.items() if value is not None]
        given += [part for part, value in options.items() if part != "tracker" and value not in (None, ())]
        if given:
            raise InvalidInputError(
                f"{listed(given)} {'is' if len(given) == 1 else 'are'} for arms that are strategies, and here all arms "
                "are studies, which have their own"
            )
    return makers


def _maker(name: str, source: ArmSource, shared: Mapping[str, Any], options: Mapping[str, Any], home: Path) -> _Maker:
    if isinstance(source, type):
        raise InvalidInputError(f"the arm {name!r} is the class {source.__name__}; make one: {source.__name__}()")
    if isinstance(source, Study):
        return lambda seed: _copied(source, seed=seed, folder=_place(home, name, seed), progress=False)
    if isinstance(source, Strategy):
        missing = [part for part, value in shared.items() if value is None]
        if missing:
            raise InvalidInputError(f"the arm {name!r} is a strategy, which needs {listed(missing)}")
        return lambda seed: Study(
            strategy=source, **shared, **{"progress": False, **options}, seed=seed, folder=_place(home, name, seed)
        )
    if not callable(source):
        raise InvalidInputError(
            f"the arm {name!r} is {source!r}; a strategy, a Study, or a function (seed) -> Study is needed"
        )

    def make(seed: int) -> Study:
        study = source(seed)
        if not isinstance(study, Study):
            raise InvalidInputError(f"the arm {name!r} made {study!r} of seed {seed}; a Study is needed")
        if study.seed != seed:
            raise InvalidInputError(f"the arm {name!r} made a study with seed {study.seed} of seed {seed}")
        return study

    return make


def _place(home: Path, name: str, seed: int) -> Path:
    return home / f"{name}-seed-{seed:04d}"


def _copied(study: Study, **changes: Any) -> Study:
    """The same study with other arguments.

    Of the meters only those that were given: what the study's own strategy asked for is no cost of another's.
    """
    arguments = {name: getattr(study, name) for name in inspect.signature(Study).parameters}
    return Study(**arguments | {"meters": study.given_meters} | changes)


def _check_alike(made: Mapping[str, Study]) -> None:
    """Refuse arms that cannot be compared before anything runs."""
    (first, one), *others = made.items()
    for study in made.values():
        if waiting := study.limits()[1]:
            raise UnsupportedError(
                f"{waiting[0]}: each study would measure the baseline for itself, and arms would be held to different "
                "limits. Give all of them one limit in numbers: result.history.constraints of a study that measured it"
            )
    for name, study in others:
        for part in ("space", "task", "objectives", "constraints", "device", "threads", "time_limit_s"):
            there, here = getattr(one, part), getattr(study, part)
            if canonical(describe(there)) != canonical(describe(here)):
                raise InvalidInputError(
                    f"the arms {first!r} and {name!r} cannot be compared, since they differ in {part}: {there!r} and "
                    f"{here!r}"
                )


def _with_random(makers: dict[str, _Maker], made: Mapping[str, Study], home: Path) -> str:
    """The name of the random arm, which is added where there is none."""
    random = plugins.load(plugins.STRATEGIES, RANDOM)
    for name, study in made.items():
        if study.strategy == random():
            return name
    if NAME in makers:
        raise InvalidInputError(
            f"the arm {NAME!r} is {made[NAME].strategy!r}; random search is added under that name, so use another"
        )
    first = next(iter(makers.values()))
    makers[NAME] = lambda seed: _copied(
        first(seed), strategy=random(), seed=seed, folder=_place(home, NAME, seed), progress=False
    )
    return NAME


# Running.


def _run_all(
    makers: Mapping[str, _Maker],
    seeds: Sequence[int],
    budget: Budget,
    run: Mapping[str, Any],
    progress: bool,
) -> tuple[dict[str, list[Result]], list[str]]:
    results: dict[str, list[Result]] = {name: [] for name in makers}
    remarks, folders, names, count = [], set[Path](), list(makers), 0
    for turn, seed in enumerate(seeds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            count += 1
            begin = time.monotonic()
            try:
                study = makers[name](seed)
                if study.folder.resolve() in folders:
                    raise InvalidInputError(f"the arm {name!r} has the folder {study.folder} for two studies")
                folders.add(study.folder.resolve())
                result = run_study(study, budget, **run)
            except SearchInterrupted as interrupt:
                raise SearchInterrupted(
                    f"interrupted in {name}, seed {seed} ({count} of {len(names) * len(seeds)} studies); everything "
                    "finished is kept, and the same call goes on"
                ) from interrupt
            except FolderMismatchError:
                raise  # a mistake in the call, with whichever seed it shows
            except Exception as error:
                # An arm that has never worked is a mistake in the call; a seed that fails later is a result.
                if not results[name]:
                    raise
                remarks.append(f"{name}: seed {seed} failed and is missing ({type(error).__name__}: {error}).")
                warnings.warn(remarks[-1], NasplatWarning, stacklevel=3)
                continue
            results[name].append(result)
            if progress:
                _say(f"[{count} of {len(names) * len(seeds)}] {name}, seed {seed}: {_found(result)}", begin)
    return results, remarks


def run_study(study: Study, budget: Budget, **run: Any) -> Result:
    """Run, or go on with, one study until a budget is used up or it ends by itself. Does nothing where it has.

    Args:
        study: What to run.
        budget: What it may spend.
        run: Further arguments of :meth:`nasplat.Study.run`.

    Raises:
        FolderMismatchError: What is in the folder was run for other objectives or constraints.
        InvalidInputError: A training has none of the metrics that the budget charges, or none was charged anything.
    """
    while True:
        result = _so_far(study)
        trace = None if result is None else trace_of(result, metrics=budget.metrics)
        if result is not None and trace is not None and trace.complete(budget):
            return result
        if budget.kind == "evaluations":
            return study.run(int(budget.amount), max_proposals=budget.proposals, **run)
        if budget.kind == "hours":
            return study.run(UNLIMITED, max_hours=budget.amount, max_proposals=budget.proposals, **run)
        done, spent = (0, 0.0) if trace is None else (trace.evaluations, trace.spent)
        if result is not None:
            _check_charged(result, budget, spent)
        # In parts, since what a trial costs is known afterwards: a little less than seems to be left, but never more
        # than twice what is known. A strategy may begin with trials that cost nothing.
        least = max(1, int(run.get("workers", 0)))
        more = max(int(0.9 * (budget.amount - spent) * done / spent), least) if spent else UNLIMITED
        study.run(done + min(more, done + least), max_proposals=budget.proposals, **run)


def _so_far(study: Study) -> Result | None:
    """What is in the folder; None where nothing was run yet.

    Raises:
        FolderMismatchError: It was run for other objectives or constraints.
    """
    if not (study.folder / journal.FILE).exists():
        return None
    result = study.result()
    # A study by itself may go on with others. Here those that had ended would keep the old ones beside it.
    objectives, constraints = Terms.of(result).made()
    for part, same, there, here in (
        ("objectives", objectives == study.objectives, objectives, study.objectives),
        (
            "constraints",
            [limit.wish for limit in constraints] == [limit.wish for limit in study.constraints],
            constraints,
            study.constraints,
        ),
    ):
        if not same:
            was, now = (", ".join(map(str, wishes)) or "none" for wishes in (there, here))
            raise FolderMismatchError(
                f"{study.folder} was run with other {part}. There: {was}. Here: {now}. Use another folder, or the same "
                f"{part}; nothing was changed"
            )
    return result


def _check_charged(result: Result, budget: Budget, spent: float) -> None:
    """Refuse a budget that training does not use up."""
    trained = [
        trial
        for trial in result.history.finished()
        if trial.state == "complete"
        and isinstance(trial.proposal, Evaluate)
        and trial.proposal.budget > 0
        and trial.copy_of is None
    ]
    lacking = [trial for trial in trained if not any(name in trial.metrics for name in budget.metrics)]
    if lacking:
        raise InvalidInputError(
            f"{len(lacking)} of {len(trained)} trainings in {result.folder} (first: trial {lacking[0].number}) have "
            f"no {' or '.join(budget.metrics)}, which the budget charges"
        )
    if trained and not spent:
        raise InvalidInputError(
            f"none of {len(trained)} trainings in {result.folder} has {listed(budget.metrics)}, which the budget "
            "charges, above 0"
        )


def _found(result: Result) -> str:
    best, objective = result.history.best(), result.history.objectives[0]
    said = f"{result.worked} evaluations, "
    return said + (
        "nothing feasible" if best is None else f"{objective.metric} {number(best.metrics[objective.metric])}"
    )


def _say(line: str, begin: float) -> None:
    sys.stderr.write(f"{line} ({time.monotonic() - begin:.1f} s)\n")
    sys.stderr.flush()


def _record(comparison: Comparison, home: Path, tracker: Tracker | Literal["mlflow"]) -> None:
    """Record the comparison. A record that cannot be written is worth a warning; the comparison is in its folder."""
    recorder = MlflowTracker() if isinstance(tracker, str) else tracker
    if not isinstance(recorder, MlflowTracker):
        return
    try:
        record(comparison, home, recorder)
    except Exception as error:
        warnings.warn(
            f"the comparison in {home} is not recorded ({type(error).__name__}: {error}); the same call tries again",
            NasplatWarning,
            stacklevel=3,
        )


def record(comparison: Comparison, folder: str | Path, tracker: MlflowTracker | None = None) -> str:
    """Record a saved comparison in MLflow as one run, and tag the runs of its studies with its id.

    Args:
        comparison: What to record.
        folder: Where it was saved: its files become the run's artifacts.
        tracker: Where to record; None as for a study in that folder.

    Returns:
        The id of the MLflow run. Recorded again, the comparison's run is written anew.
    """
    home = Path(folder).resolve()
    statistics = comparison.statistics
    metrics: dict[str, float] = {}
    for name, row in comparison.table().iterrows():
        metrics |= {f"{name}/{column}": float(value) for column, value in row.items() if _is_number(value)}
    for name, row in comparison.costs().iterrows():
        metrics |= {f"{name}/{column}_seconds": float(row[column]) for column in _SECONDS}
    return (tracker or MlflowTracker()).record_comparison(
        id=comparison.id,
        folder=home,
        files=[path for path in sorted(home.iterdir()) if path.suffix in (".json", ".csv", ".txt", ".svg", ".png")],
        parameters={
            "arms": ", ".join(comparison.traces),
            "baseline": str(comparison.baseline),
            "budget": str(comparison.budget),
            "seeds": ", ".join(map(str, comparison.seeds)),
            "space": comparison.terms.space,
            "objectives": ", ".join(map(str, comparison.objectives)),
            "constraints": ", ".join(map(str, comparison.constraints)),
            "alpha": str(comparison.alpha),
            "pairs": comparison.pairs,
        },
        metrics=metrics,
        tags={"verdict": comparison.verdict.overall, "best": str(comparison.verdict.best)}
        | {f"outcome.{name}": outcome for name, outcome in comparison.verdict.outcomes.items()}
        | {"metric": statistics.metric},
        studies=[trace.study for traces in comparison.traces.values() for trace in traces],
    )


_SECONDS = ("training", "measuring", "scheduling", "idle", "wall")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
