"""Commands that run studies and look at them."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nasplat import journal, report
from nasplat.cli.app import NOTHING_FOUND, Folder, Hours, Quiet, Record, Which, app, say
from nasplat.cli.asking import Trials, Workers, asks_for_a_study, tracker_of
from nasplat.cli.values import objective_of
from nasplat.errors import FolderError, InvalidInputError
from nasplat.objectives import Constraint, Objective
from nasplat.result import Candidate, Result, load
from nasplat.study import Study, recorded_tracker

# Searching.


@app.command()
@asks_for_a_study
def search(
    study: Study,
    trials: Trials = 20,
    hours: Hours = None,
    workers: Workers = 0,
    quiet: Quiet = False,
) -> None:
    """Search a space with a strategy on a task.

    The same command again goes on with the study; with more --trials it adds to it. Parameters, operations and bytes
    of every network are counted; latency is measured where an objective or a constraint names latency_ms.

    Values of -s, -p and -t follow the parameter's type, or are JSON. A parameter that is a plug-in itself is named, and
    its own parameters follow a dot. The commands `nasplat spaces` and `nasplat strategies` list what there is.

    A limit may be a share of a baseline network, which is measured before the search:
    --baseline reference=architecture.json --constraint 'latency_ms<=60% of reference'. What an export writes as
    architecture.json is one; so are genes, --baseline 'reference={"channels": 8}'.

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
    study.progress = not quiet
    if not quiet:
        say(f"Searching {study.space!r} with {study.strategy!r}")
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
    changes = {} if tracker is None else {"tracker": tracker_of(tracker, None)}
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


def _finish(result: Result) -> None:
    """Show what a search found, and where it is."""
    _show(result, limit=10)
    if where := report.record(result.folder):
        typer.echo(f"\n{where}")
    if not result.history.front():
        say("No candidate was trained in full and keeps the limits.")
        raise typer.Exit(NOTHING_FOUND)
    typer.echo(f"\nTo export the best: nasplat export {shlex.quote(str(result.folder))} --to OUT")


# Looking.


@app.command()
def show(
    folder: Folder,
    limit: Annotated[int, typer.Option(metavar="N", help="Rows of the leaderboard.", min=1)] = 10,
    csv: Annotated[bool, typer.Option("--csv", help="All trials, genes and metrics as CSV instead.")] = False,
    trial: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="All of one trial instead: genes, metrics with their errors, how each was measured.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the front, with errors and ties: a name in .svg, .png or .pdf.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show a study: the leaderboard, the front, what failed and why, where it stands. Also while it runs."""
    result = load(folder)
    if csv:
        typer.echo(result.table().to_csv(), nl=False)
        return
    if trial is not None:
        typer.echo(report.trial(result, trial))
        return
    if plot is not None:
        typer.echo(f"{result.plot_front(plot)}: the front of {folder}")
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
    wanted = objective_of(metric) if metric is not None and ":" in metric else metric
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
