"""The command that looks ahead: what a search will cost, and whether its limits can be met."""

from __future__ import annotations

from typing import Annotated

import typer

from nasplat.cli.app import NOTHING_FOUND, app, say
from nasplat.cli.asking import Trials, Workers, asks_for_a_study
from nasplat.study import Study


@app.command()
@asks_for_a_study
def preflight(
    study: Study,
    trials: Trials = 20,
    workers: Workers = 0,
    samples: Annotated[int, typer.Option(metavar="N", help="Networks to sample, build and measure.", min=1)] = 30,
    seconds: Annotated[float, typer.Option(metavar="T", help="Time for it all.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="JSON in place of tables.")] = False,
) -> None:
    """Say what a search will meet, before it: costs of the space, whether limits can be met, time, disk.

    Takes the options of `nasplat search`. Samples the space, builds and measures the networks, trains a few of them
    for a few steps, and writes nothing. Exits with 3 where no sampled network keeps the limits.

        nasplat preflight --space bats --task digits --constraint 'latency_ms<=2'
            --trials 100 --folder runs/a
    """
    found = study.preflight(samples, seconds, max_trials=trials, workers=workers)
    typer.echo(found.to_json() if json else str(found))
    if not found.can_be_met:
        say("No sampled network keeps the limits." if found.measured else "No sampled network could be measured.")
        raise typer.Exit(NOTHING_FOUND)
