"""The command line: a thin layer over the same calls that Python users make."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import socket
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer
import typer.core
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import nasplat
from nasplat import journal, plugins, report
from nasplat.errors import FolderError, InvalidInputError, NasplatError, NasplatWarning, SearchInterrupted
from nasplat.objectives import Constraint, Objective, at_least, at_most, maximise, minimise
from nasplat.result import Candidate, Result, load
from nasplat.study import Study, recorded_tracker
from nasplat.task import Recipe, Task

FAILED, NOTHING_FOUND, INTERRUPTED = 1, 3, 130

DEFAULT_PRESET = "small"
"""The preset that a plug-in's plain name takes, where it has one: what runs on a laptop."""

PLUGIN_ANNOTATIONS = {"SearchSpace": plugins.SPACES, "Strategy": plugins.STRATEGIES, "Explorer": plugins.EXPLORERS}
"""Parameters of these types are plug-ins themselves, named on the command line."""

TASKS: Mapping[str, Callable[..., Task]] = {"fashion-mnist": Task.fashion_mnist, "digits": Task.digits}

EPILOG = """\
**Exit codes**

- 0: done
- 1: nasplat refused or failed; the reason is on stderr
- 2: the command line is wrong
- 3: the study ended without a candidate that was trained in full and keeps the limits
- 130: interrupted with Ctrl-C; nothing is lost, and stderr says how to go on

Tables and answers go to stdout, progress and warnings to stderr.
"""


class _Commands(typer.core.TyperGroup):
    """Turns nasplat's own errors into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except SearchInterrupted as interrupt:
            _say(str(interrupt)[:1].upper() + str(interrupt)[1:])
            raise typer.Exit(INTERRUPTED) from interrupt
        except NasplatError as error:
            _say(f"Error: {error}")
            raise typer.Exit(FAILED) from error


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    if issubclass(category, NasplatWarning):
        _say(f"Warning: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _say(message: str) -> None:
    """One message for the user, on stderr."""
    typer.echo(message, err=True)


app = typer.Typer(
    name="nasplat",
    cls=_Commands,
    help="Search for neural network architectures, and look at what was found.\n\n"
    "A study joins a search space, a strategy and a task in a folder. It can be stopped at any moment and resumed.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``nasplat`` command."""
    app(prog_name="nasplat")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nasplat {nasplat.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


class Record(StrEnum):
    """Where to record a study."""

    MLFLOW = "mlflow"
    NONE = "none"


# Options that several commands share.

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder.", show_default=False)]
Hours = Annotated[
    float | None, typer.Option(metavar="H", help="Stop after so many hours of searching, over all runs of the study.")
]
Which = Annotated[int | None, typer.Option(metavar="N", help="Which trial. Default: the best.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


# What is installed.


@app.command()
def spaces() -> None:
    """List the installed search spaces with their presets, parameters and defaults."""
    _list(plugins.SPACES)


@app.command()
def strategies() -> None:
    """List the installed strategies and explorers with their presets, parameters and defaults.

    An explorer trains a supernet; the strategy one_shot runs it: -p explorer=darts -p explorer.epochs=5
    """
    _list(plugins.STRATEGIES)
    typer.echo("\nExplorers, for strategies that have a parameter of that name:\n")
    _list(plugins.EXPLORERS)


def _list(group: str) -> None:
    points = plugins.installed(group)
    if not points:
        typer.echo(f"none installed (entry-point group {group})")
    console = Console(width=report.WIDTH, highlight=False)
    for index, (name, point) in enumerate(points.items()):
        if index:
            console.print()
        try:
            kind = point.load()
        except Exception as error:  # of any kind: one broken package must not hide the others
            console.print(Text(f"{name}  ({point.value}) cannot be loaded: {type(error).__name__}: {error}"))
            continue
        console.print(Text.assemble((name, "bold"), f"  {point.value}"))
        console.print(Text(f"  {_first_line(kind)}"))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
        for header in ("  parameter", "type", "default", "meaning"):
            table.add_column(header, overflow="fold")
        meanings = _meanings(kind)
        for field in _fields(kind):
            shown = (f"  {field.name}", _type_text(field), _default_text(field), meanings.get(field.name, ""))
            table.add_row(*map(Text, shown))
        if table.row_count:
            console.print(table)
        presets = Table.grid(padding=(0, 2, 0, 0))
        for preset, function in _presets(kind).items():
            own = ", ".join(f"{p.name}={p.default!r}" for p in _named(function))
            presets.add_row(Text(f"  {name}:{preset}"), Text(_first_line(function) + (f" ({own})" if own else "")))
        if presets.row_count:
            console.print(presets)


def _first_line(documented: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split()).replace("``", "")


def _meanings(kind: type) -> dict[str, str]:
    """The first sentence on each attribute in the docstrings (Google style) of a class and of what it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(owner.__doc__ or ""), re.MULTILINE)
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE):
            found[name] = re.split(r"(?<=\.)\s", " ".join(text.split()))[0].replace("``", "")
    return found


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else []


def _type_text(field: dataclasses.Field[Any]) -> str:
    text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return re.sub(r"\bLiteral\[(.*)\]", lambda match: match[1].replace(", ", " | "), text)


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(required)"


# Searching.


@app.command()
def search(
    space: Annotated[
        str,
        typer.Option(
            metavar="NAME[:PRESET]",
            help=f"Search space. A plain name takes the preset '{DEFAULT_PRESET}' where the space has one.",
            show_default=False,
        ),
    ],
    task: Annotated[str, typer.Option(metavar="NAME", help=f"Task: {', '.join(TASKS)}.", show_default=False)],
    folder: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The study's folder; made, or gone on with if it holds the same study."),
    ],
    strategy: Annotated[str, typer.Option(metavar="NAME[:PRESET]", help="Strategy.")] = "regularized_evolution",
    space_param: Annotated[
        list[str] | None, typer.Option("--space-param", "-s", metavar="KEY=VALUE", help="Parameter of the space.")
    ] = None,
    strategy_param: Annotated[
        list[str] | None, typer.Option("--strategy-param", "-p", metavar="KEY=VALUE", help="Parameter of the strategy.")
    ] = None,
    task_param: Annotated[
        list[str] | None,
        typer.Option("--task-param", "-t", metavar="KEY=VALUE", help="Parameter of the task: epochs, size, lr, ..."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="max:METRIC",
            help="Or min:METRIC; may be repeated, the first names the best. Default: max:val_accuracy.",
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(metavar="'METRIC<=X'", help="Hard limit, or 'METRIC>=X'; may be repeated."),
    ] = None,
    trials: Annotated[int, typer.Option(metavar="N", help="Trials over all runs of the study.")] = 20,
    hours: Hours = None,
    workers: Annotated[int, typer.Option(metavar="W", help="Trials at a time, on Ray; 0: one by one, here.")] = 0,
    seed: Annotated[int, typer.Option(metavar="S", help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to train and measure: cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of torch for each trial.")] = 1,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A trial that takes longer has failed.")
    ] = None,
    tracker: Annotated[Record, typer.Option(help="Where to record, beside the folder.")] = Record.MLFLOW,
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="MLflow experiment. Default: nasplat.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Search a space with a strategy on a task.

    The same command again goes on with the study; with more --trials it adds to it. Parameters, operations and bytes
    of every network are counted; latency is measured where an objective or a constraint names latency_ms.

    Values of -s, -p and -t follow the parameter's type, or are JSON. A parameter that is a plug-in itself is named, and
    its own parameters follow a dot. The commands `nasplat spaces` and `nasplat strategies` list what there is.

    A small search on two workers:

        nasplat search --space bats --task fashion-mnist -t epochs=3 -t size=16
            --trials 8 --workers 2 --folder runs/a

    Accurate and fast, with a limit on the size:

        nasplat search --space bats:small -s cells=2 --task digits
            --objective max:val_accuracy --objective min:latency_ms
            --constraint 'params<=1e5' --folder runs/b

    By gradient, in a supernet:

        nasplat search --space bats --strategy one_shot -p explorer=bats_search
            -p explorer.epochs=5 -p explorer.warmup=2
            --task fashion-mnist -t size=16 --trials 2 --folder runs/c
    """
    study = Study(
        space=_plugin(plugins.SPACES, space, _assignments(space_param, "--space-param")),
        strategy=_plugin(plugins.STRATEGIES, strategy, _assignments(strategy_param, "--strategy-param")),
        task=_task(task, _assignments(task_param, "--task-param")),
        objectives=[_objective(text) for text in objective or ["max:val_accuracy"]],
        constraints=[_constraint(text) for text in constraint or []],
        seed=seed,
        folder=folder,
        tracker=_tracker(tracker, experiment),
        device=device,
        threads=threads,
        time_limit_s=time_limit,
        progress=not quiet,
    )
    if not quiet:
        _say(f"Searching {study.space!r} with {study.strategy!r}")
    _finish(study.run(trials, max_hours=hours, workers=workers))


@app.command()
def resume(
    folder: Folder,
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Trials over all runs of the study. Default: as in the last run.", show_default=False
        ),
    ] = None,
    hours: Hours = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="W",
            help="Trials at a time, on Ray; 0: one by one, here. Default: as in the last run.",
            show_default=False,
        ),
    ] = None,
    tracker: Annotated[
        Record | None,
        typer.Option(help="Where to record. Default: as in the last run.", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Go on with a study: finish what was interrupted, or add trials.

    Works where space, strategy and task are installed plug-ins or nasplat's own. Where they live in a script, run
    that script again.
    """
    events, _ = journal.read(folder)
    runs = [event["run"] for event in events if event["event"] == "session" and "max_trials" in event["run"]]
    last: Mapping[str, Any] = runs[-1] if runs else {}
    if trials is None:
        if events and not last:
            raise typer.BadParameter("the study was never run, so say how many trials: --trials N")
        trials = int(last.get("max_trials", 0))
    changes = {} if tracker is None else {"tracker": _tracker(tracker, None)}
    study = Study.resume(folder, progress=not quiet, **changes)
    result = study.run(
        trials,
        max_hours=last.get("max_hours") if hours is None else hours,
        workers=int(last.get("workers", 0)) if workers is None else workers,
        cpus_per_trial=last.get("cpus_per_trial", 1.0),
        gpus_per_trial=last.get("gpus_per_trial"),
        max_proposals=last.get("max_proposals"),
    )
    _finish(result)


def _tracker(record: Record, experiment: str | None) -> Any:
    if record is Record.NONE:
        return None
    if experiment is None:
        return "mlflow"
    from nasplat.mlflow_tracker import MlflowTracker

    return MlflowTracker(experiment=experiment)


def _finish(result: Result) -> None:
    """Show what a search found, and where it is."""
    _show(result, limit=10)
    if where := report.record(result.folder):
        typer.echo(f"\n{where}")
    if not result.history.front():
        _say("No candidate was trained in full and keeps the limits.")
        raise typer.Exit(NOTHING_FOUND)
    typer.echo(f"\nTo export the best: nasplat export {shlex.quote(str(result.folder))} --to OUT")


# Looking.


@app.command()
def show(
    folder: Folder,
    limit: Annotated[int, typer.Option(metavar="N", help="Rows of the leaderboard.", min=1)] = 10,
    csv: Annotated[bool, typer.Option("--csv", help="All trials, genes and metrics as CSV instead.")] = False,
) -> None:
    """Show a study: the leaderboard, the front, what failed and why, where it stands. Also while it runs."""
    result = load(folder)
    if csv:
        typer.echo(result.table().to_csv(), nl=False)
        return
    typer.echo(f"{folder}: {report.status(folder)}")
    history = result.history
    typer.echo(f"{history.space.name}, {_wishes(history.objectives, history.constraints)}")
    _show(result, limit)
    where = report.record(folder)
    typer.echo(f"\n{where}" if where else "\nNo MLflow record.")


def _wishes(objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> str:
    return ", ".join(map(str, (*objectives, *constraints)))


def _show(result: Result, limit: int) -> None:
    typer.echo(report.counts(result))
    typer.echo(f"\n{report.leaderboard(result, limit)}")
    if len(result.history.objectives) > 1 and result.history.front():
        typer.echo(f"\nPareto front\n\n{report.front(result)}")


@app.command()
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Folders of studies, or folders that studies lie in.", show_default=False
        ),
    ],
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Evaluations of each study that count. Default: as many as all have.",
            show_default=False,
        ),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(metavar="H", help="Hours of searching that count, instead.", show_default=False)
    ] = None,
    train_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds of training that count, instead.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Arm that the others are held against. Default: random search."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--report",
            metavar="METRIC",
            help="Of the picks, besides: test_accuracy, or max:METRIC.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(metavar="A", help="Chance of a false difference over all tests.")] = 0.05,
    to: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Folder for tables (CSV), figure and text as well.", show_default=False),
    ] = None,
) -> None:
    """Compare strategies over studies that were run: what each found within equal cost, tests, a verdict in words.

    Studies of one strategy with different seeds are one arm; arms are paired by seed. Studies must agree in space,
    task, objectives and constraints. Without a study of random search, nothing is said against it.

    The studies of three strategies, ten seeds each:

        nasplat compare runs/random-* runs/evolution-* runs/tpe-*
    """
    from nasplat.compare import existing
    from nasplat.compare.budget import Budget, charged, evaluations
    from nasplat.compare.budget import hours as hours_of

    budgets: list[Budget] = []
    budgets += [evaluations(trials)] if trials is not None else []
    budgets += [hours_of(hours)] if hours is not None else []
    budgets += [charged(train_seconds, "train_seconds")] if train_seconds is not None else []
    wanted = _objective(metric) if metric is not None and ":" in metric else metric
    if len(budgets) > 1:
        raise typer.BadParameter("--trials, --hours and --train-seconds are one budget; give one of them")
    comparison = existing.compare_folders(
        folders, budget=budgets[0] if budgets else None, baseline=baseline, report=wanted, alpha=alpha
    )
    typer.echo(str(comparison))
    if to is not None:
        typer.echo(f"\nTables, figure and text: {comparison.save(to)}")


@app.command()
def export(
    folder: Folder,
    to: Annotated[Path, typer.Option(metavar="OUT", help="Folder to write; new, empty, or an earlier export.")],
    trial: Which = None,
) -> None:
    """Write the best network as architecture.json, safetensors, torch.export, ONNX and, if it is binary, packed bits.

    Each file is loaded again and compared with the network on real inputs, and the network is scored on the test
    split, which the search never saw.
    """
    typer.echo(report.exported(_candidate(folder, trial).export(to)))


@app.command()
def draw(
    folder: Folder,
    to: Annotated[Path, typer.Option("--to", "-o", metavar="FILE", help="A name in .svg, .png or .pdf.")],
    trial: Which = None,
) -> None:
    """Draw the best architecture: its cells as graphs, its stages as blocks."""
    candidate = _candidate(folder, trial)
    written = candidate.draw().save(to)
    typer.echo(f"{written}: trial {candidate.trial.number}, architecture {candidate.architecture.id}")


def _candidate(folder: Path, trial: int | None) -> Candidate:
    result = load(folder)
    return result.best if trial is None else result.candidate(trial)


@app.command()
def ui(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="A study's folder, or the folder that studies lie in. Default: here, or runs/."
        ),
    ] = None,
    port: Annotated[int, typer.Option(metavar="PORT", help="Port on this machine.", min=1, max=65535)] = 5000,
) -> None:
    """Open the record in MLflow's own user interface, until Ctrl-C.

    A study's folder names its own record; without one it is that of MLFLOW_TRACKING_URI, else an mlflow.db.
    """
    uri = _record_uri(folder)
    if uri.startswith(("http://", "https://")):
        typer.echo(f"The record is on a server: open {uri} with a browser.")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InvalidInputError(f"port {port} is taken ({error.strerror}); choose another with --port") from error
    typer.echo(f"Opening {uri}\nThe address is http://127.0.0.1:{port} (Ctrl-C ends it)")
    sys.stdout.flush()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    os.execv(sys.executable, [*command, "--port", str(port), "--workers", "1"])


def _record_uri(folder: Path | None) -> str:
    """The record of a study's folder, or of the folder that studies lie in."""
    from nasplat.mlflow_tracker import MlflowTracker

    events = [] if folder is None else journal.read(folder)[0]
    if folder is not None and events:
        tracker = recorded_tracker(events)
        if not isinstance(tracker, MlflowTracker):
            raise FolderError(f"{folder} was run without an MLflow record; nasplat show {shlex.quote(str(folder))}")
        return tracker.location(folder)[0]
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    places = [folder] if folder is not None else [Path(), Path("runs")]
    for place in places:
        if (place / "mlflow.db").exists():
            return MlflowTracker().location(place / "study")[0]
    looked = ", ".join(str(place / "mlflow.db") for place in places)
    raise FolderError(f"no record found (looked for {looked}); name a study's folder, or set MLFLOW_TRACKING_URI")


# From text to objects.


def _assignments(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{text!r}; a KEY=VALUE is needed", param_hint=option)
        found[name.strip()] = value
    return found


def _objective(text: str) -> Objective:
    sense, _, metric = text.partition(":")
    makers = {"max": maximise, "min": minimise}
    if sense not in makers or not metric:
        raise typer.BadParameter(f"{text!r}; max:METRIC or min:METRIC is needed", param_hint="--objective")
    return makers[sense](metric)


def _constraint(text: str) -> Constraint:
    match = re.fullmatch(r"\s*([\w\-./ ]+?)\s*(<=|>=)\s*(\S+)\s*", text)
    try:
        if match is None:
            raise ValueError(text)
        bound = float(match[3])
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r}; 'METRIC<=NUMBER' or 'METRIC>=NUMBER' is needed", param_hint="--constraint"
        ) from error
    return at_most(match[1], bound) if match[2] == "<=" else at_least(match[1], bound)


def _task(name: str, given: Mapping[str, str]) -> Task:
    if name not in TASKS:
        raise InvalidInputError(f"no task {name!r} on the command line; there are: {', '.join(TASKS)}")
    legal = _annotations(TASKS[name]) | {field.name: _hints(Recipe)[field.name] for field in _fields(Recipe)}
    return TASKS[name](**_values(given, legal, f"the task {name}"))


def _plugin(group: str, reference: str, given: Mapping[str, str]) -> Any:
    """The object that ``name`` or ``name:preset`` and its parameters stand for."""
    name, _, preset = reference.partition(":")
    kind = plugins.load(group, name)
    presets = _presets(kind)
    if preset and preset not in presets:
        raise InvalidInputError(f"{name} has no preset {preset!r}; there are: {', '.join(presets) or 'none'}")
    if not preset and DEFAULT_PRESET in presets:
        preset = DEFAULT_PRESET
    make: Callable[..., Any] = getattr(kind, preset) if preset else kind
    legal = {field.name: _hints(kind).get(field.name, Any) for field in _fields(kind)}
    if preset:
        own = _annotations(make)
        legal = {**legal, **own} if _takes_anything(make) else own
    required = [
        field.name
        for field in _fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    values = _values(given, legal, name)
    missing = [] if preset else [field for field in required if field not in values]
    if missing:
        raise InvalidInputError(f"{name} needs {', '.join(f'{field}=...' for field in missing)}")
    return make(**values)


def _values(given: Mapping[str, str], legal: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Arguments from text; ``a.b=1`` is the parameter ``b`` of the plug-in ``a``."""
    unknown = [name for name in given if name.partition(".")[0] not in legal]
    if unknown:
        raise InvalidInputError(
            f"{what} has no parameter {', '.join(unknown)}; there are: {', '.join(legal) or 'none'}"
        )
    values: dict[str, Any] = {}
    for name, text in given.items():
        if "." in name:
            owner = name.partition(".")[0]
            if owner not in given:
                raise InvalidInputError(f"{name}: say first which plug-in {owner} is, {owner}=NAME")
            if _group(legal[owner]) is None:
                raise InvalidInputError(f"{name}: {owner} of {what} is no plug-in and has no parameters")
            continue
        group = _group(legal[name])
        if group is not None:
            inner = {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}
            values[name] = _plugin(group, text, inner)
        else:
            values[name] = _parse(text, legal[name], f"{name} of {what}")
    return values


def _group(annotation: Any) -> str | None:
    """The plug-in group of a parameter's type, optional or not; None where it is a plain value."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return _group(kinds[0]) if len(kinds) == 1 else None
    return PLUGIN_ANNOTATIONS.get(getattr(annotation, "__name__", str(annotation)))


_BAD = object()


def _parse(text: str, annotation: Any, what: str) -> Any:
    """A value of a parameter's type.

    Raises:
        InvalidInputError: The text is no such value.
    """
    value = _coerce(text, annotation)
    if value is _BAD:
        shown = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
        raise InvalidInputError(f"{what} is {text!r}; {shown or str(annotation).replace('typing.', '')} is needed")
    return value


def _coerce(text: str, annotation: Any) -> Any:
    """The text as a value of the type, or ``_BAD``."""
    try:
        value = json.loads(text)
    except ValueError:
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return _fit(value, text, annotation)


def _fit(value: Any, text: str, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        # Text last: anything is a text.
        ordered = sorted(arguments, key=lambda option: option is str)
        return next((fit for option in ordered if (fit := _fit(value, text, option)) is not _BAD), _BAD)
    if origin is Literal:
        return next((option for option in arguments if option == value or str(option) == text), _BAD)
    if annotation is None or annotation is type(None):
        return None if value is None else _BAD
    if annotation is bool:
        return value if isinstance(value, bool) else _BAD
    if annotation is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else _BAD
    if annotation is float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _BAD
    if annotation is str:
        return value if isinstance(value, str) else text
    if annotation is Objective:
        return _objective(text) if re.fullmatch(r"(max|min):[^,]+", text) else _BAD
    plain = origin or annotation
    if plain is tuple or plain is list or plain is Sequence:
        items = value if isinstance(value, list) else text.split(",")
        inner = [argument for argument in arguments if argument is not Ellipsis]
        fixed = plain is tuple and arguments and Ellipsis not in arguments
        kinds = inner if fixed else (inner or [Any]) * len(items)
        if len(kinds) != len(items):
            return _BAD
        fitted = [
            _coerce(item.strip(), kind) if isinstance(item, str) else _fit(item, json.dumps(item), kind)
            for item, kind in zip(items, kinds, strict=True)
        ]
        return _BAD if any(item is _BAD for item in fitted) else tuple(fitted)
    if plain is dict or plain is Mapping:
        return value if isinstance(value, dict) else _BAD
    if plain is type:
        return _BAD
    return value


def _hints(kind: Any) -> dict[str, Any]:
    """Types of a class's fields or a function's parameters; as text where a name cannot be found."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return dict(getattr(kind, "__annotations__", {}))


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Named parameters of a function and their types."""
    hints = _hints(function)
    return {parameter.name: hints.get(parameter.name, Any) for parameter in _named(function)}


def _named(function: Callable[..., Any]) -> list[inspect.Parameter]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter for parameter in inspect.signature(function).parameters.values() if parameter.kind in named]


def _takes_anything(function: Callable[..., Any]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _presets(kind: Any) -> dict[str, Callable[..., Any]]:
    """Public class methods that return the class and need no arguments."""
    found = {}
    for name in vars(kind):
        if name.startswith("_") or not isinstance(inspect.getattr_static(kind, name), classmethod):
            continue
        method = getattr(kind, name)
        signature = inspect.signature(method)
        returned = getattr(signature.return_annotation, "__name__", str(signature.return_annotation)).strip("'\"")
        needed = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        if returned in ("Self", "typing.Self", kind.__name__) and not needed:
            found[name] = method
    return found


if __name__ == "__main__":
    main()
