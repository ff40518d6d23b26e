"""The command that measures a space once, so that costs can be predicted."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from nasplat import plugins
from nasplat.cli.app import INTERRUPTED, Quiet, app, say
from nasplat.cli.asking import SpaceName, SpaceParams
from nasplat.cli.values import TASKS, assignments, plugin_of, task_of
from nasplat.cost import CostMeter, CostTable, Count, Latency, StepTable, load_table
from nasplat.cost.readings import Progress as Told
from nasplat.cost.readings import silent
from nasplat.cost.steps import FITTED
from nasplat.errors import InvalidInputError
from nasplat.runtimes.choose import choose
from nasplat.space import SearchSpace
from nasplat.study import ON_DEMAND

DEFAULT_TASK = "fashion-mnist"
"""Whose inputs are meant where none are named: grey images of 28x28, which the small presets take."""


class Kind(StrEnum):
    """What is added up."""

    AUTO = "auto"
    STEPS = "steps"
    CHOICES = "choices"


@app.command("profile-space")
def profile_space(
    space: SpaceName,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table to write, JSON. Default: SPACE-RUNTIME.json.", show_default=False),
    ] = None,
    runtime: Annotated[
        str, typer.Option(metavar="NAME", help="Where networks are deployed: `nasplat runtimes` lists them, or auto.")
    ] = "auto",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"Task whose inputs are meant: {', '.join(TASKS)}.", show_default=DEFAULT_TASK
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input", metavar="CxHxW", help="Shape of an input instead: 3x32x32.", show_default=False),
    ] = None,
    space_param: SpaceParams = None,
    task_param: Annotated[
        list[str] | None, typer.Option("--task-param", "-t", metavar="KEY=VALUE", help="Parameter of the task: size.")
    ] = None,
    metric: Annotated[str, typer.Option(metavar="METRIC", help="What to predict.")] = "latency_ms",
    kind: Annotated[
        Kind,
        typer.Option(
            help="steps: the steps of packed programs, which predicts best. choices: whole networks, as a sum over "
            "the space's choices, which any runtime has and a differentiable search needs."
        ),
    ] = Kind.AUTO,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=8,
            help="Whole networks to fit to. Default: 24 for steps; for choices at least twice the free entries.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        int, typer.Option(metavar="N", min=20, help="Networks besides, that the table is judged on.")
    ] = 20,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads that compute.")] = 1,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the sampled networks.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Measure a space once on this machine, and write a table that predicts costs of its networks.

    The table says how well it predicts networks that it was not fitted to. Every measurement is kept beside FILE until
    the table is there: after Ctrl-C the same command goes on.

        nasplat profile-space --space bats --runtime packed --task fashion-mnist --out bats.json

        nasplat profile-space --space nasbench201 --runtime onnxruntime --input 3x32x32
            --kind choices --out nasbench201.json
    """
    made = plugin_of(plugins.SPACES, space, assignments(space_param, "--space-param"))
    out = out or Path(f"{space.replace(':', '-')}-{runtime}.json")
    if task is None and input_shape is None:
        task = DEFAULT_TASK
    example = _example(task, input_shape, assignments(task_param, "--task-param"))
    meter = _meter(metric, runtime, threads)
    readings = out.with_name(f"{out.name}.readings.jsonl")
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"would lie in {out.parent}, which is no folder"
        raise InvalidInputError(f"{out} {what}; a file in a folder that is there is needed")
    if readings.exists():
        say(f"Going on from the measurements in {readings}")
    by_steps = kind is Kind.STEPS or (kind is Kind.AUTO and _packs(made, example, meter, metric, runtime))
    begin = time.monotonic()
    try:
        with _shown(quiet) as progress:
            shared: dict[str, Any] = {"seed": seed, "held_out": held_out, "readings": readings, "progress": progress}
            table: CostTable | StepTable
            if by_steps:
                table = StepTable.measured(made, example, meter, metric, fitted=samples or FITTED, **shared)
            else:
                table = CostTable.measured(made, example, meter, metric, samples=samples, **shared)
    except KeyboardInterrupt as interrupt:
        kept = (
            f"what was measured is in {readings}, and the same command goes on from there"
            if readings.exists()
            else "nothing was measured yet, so the same command begins anew"
        )
        say(f"Interrupted after {time.monotonic() - begin:.0f} s: {kept}")
        raise typer.Exit(INTERRUPTED) from interrupt
    table.save(out)
    readings.unlink(missing_ok=True)
    _report(table, out, made, meter)


def _report(table: CostTable | StepTable, out: Path, space: SearchSpace, meter: CostMeter) -> None:
    facts, accuracy = load_table(out).facts, table.accuracy
    assert accuracy is not None
    if isinstance(table, StepTable):
        what = f"{len(table.steps)} steps of packed programs; {facts['covered']:.0%} of new networks have no others"
    else:
        what = f"{len(table.terms)} terms of choices, {sum(len(values) for _, values in table.terms)} entries"
    doubt = f", {facts['suspect']} of them on a disturbed machine" if facts["suspect"] else ""
    typer.echo(
        f"{out}: {table.metric} of {space.name}\n"
        f"  what       {what}\n"
        f"  measured   {facts['candidates']} networks{doubt}, on {facts.get('runtime', 'no runtime')}, "
        f"{facts['processor']}\n"
        f"  building   {facts['build_seconds']:.0f} s\n"
        f"  accuracy   {accuracy}\n"
        "\n"
        "To predict in a study, and measure 5 % of the networks as well:\n"
        "  from nasplat.cost import Latency, Predicted\n"
        f"  Study(..., meters=[Predicted({meter!r}, {str(out)!r}, checked=0.05)])"
    )
    if isinstance(table, CostTable):
        typer.echo(
            "To pull a differentiable search towards a cost:\n"
            "  from nasplat.cost import CostTable, Resource\n"
            f"  Darts(..., resource=Resource(CostTable.load({str(out)!r}), target={table.constant:.3g}))"
        )


def _example(task: str | None, shape: str | None, given: dict[str, str]) -> Tensor:
    if (task is None) == (shape is None):
        raise typer.BadParameter("one of --task NAME and --input CxHxW is needed")
    if task is not None:
        return task_of(task, given).example()
    if given:
        raise typer.BadParameter("-t belongs to --task")
    assert shape is not None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise typer.BadParameter(f"{shape!r}; sizes as in 3x32x32 are needed", param_hint="--input")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *map(int, shape.split("x")), generator=generator)


def _meter(metric: str, runtime: str, threads: int) -> CostMeter:
    """The meter that gives a metric, with what the command line says of it."""
    meters = [meter for meter in (Latency(), *ON_DEMAND, Count()) if isinstance(meter, CostMeter) and not meter.trained]
    for meter in meters:
        if metric in meter.metrics:
            own = {field.name for field in fields(meter)}  # type: ignore[arg-type]
            wanted = {"runtime": runtime, "threads": threads, "twins": False}
            return replace(meter, **{name: value for name, value in wanted.items() if name in own})  # type: ignore[type-var]
    legal = dict.fromkeys(name for meter in meters for name in meter.metrics)
    raise InvalidInputError(f"no meter gives {metric!r}; there are: {', '.join(legal)}")


def _packs(space: SearchSpace, example: Tensor, meter: CostMeter, metric: str, runtime: str) -> bool:
    """Whether it is the latency of packed programs that is asked for."""
    if not isinstance(meter, Latency) or metric != meter.metric:
        return False
    with torch.random.fork_rng(devices=[]):
        model = space.build(space.sample(np.random.default_rng(0)))
    return choose(runtime, model, example).name == "packed"


@contextmanager
def _shown(quiet: bool) -> Iterator[Told]:
    """A bar on a terminal, a line every few seconds elsewhere, or nothing."""
    console = Console(file=sys.stderr, highlight=False)
    if quiet:
        yield silent
    elif console.is_terminal:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
            tasks: dict[str, Any] = {}

            def show(what: str, done: int, total: int | None) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total, count="")
                count = f"{done}" if total is None else f"{done}/{total}"
                bar.update(tasks[what], completed=done, total=total, count=count)

            yield show
    else:
        said: list[Any] = ["", 0.0]

        def tell(what: str, done: int, total: int | None) -> None:
            if what != said[0] or time.monotonic() - said[1] >= 5:
                said[:] = what, time.monotonic()
                say(f"{what}: {done}" + ("" if total is None else f" of {total}"))

        yield tell
