"""The command that shows what a found network costs, module by module, and where its time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from nasplat.cli.app import Folder, Which, app, say
from nasplat.cost.breakdown import breakdown as measured
from nasplat.cost.count import count_modules
from nasplat.errors import UnsupportedError
from nasplat.figures import check_picture
from nasplat.result import load


@app.command()
def breakdown(
    folder: Folder,
    trial: Which = None,
    runtime: Annotated[
        str, typer.Option(metavar="NAME", help="Where it is deployed: packed, onnxruntime, onnxruntime_int8, torch.")
    ] = "auto",
    threads: Annotated[int, typer.Option(metavar="N", help="Threads that compute.", min=1)] = 1,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A picture of the parts: a name in .svg, .png or .pdf.", show_default=False),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="The table as CSV, with all its columns.")] = False,
) -> None:
    """Show what the best network costs module by module: what was counted, and where the time of a pass goes.

    A runtime does several modules at once: the time of a normalisation is with the convolution before it. What belongs
    to no one module, and what is in no part, have rows of their own.
    """
    if plot is not None:
        check_picture(plot)
    result = load(folder)
    candidate = result.best if trial is None else result.candidate(trial)
    model = candidate.model()
    if result.task is None:
        raise UnsupportedError(
            "the study's task lives in the script that made it, so there is no example to compute with"
        )
    example = result.task.example()
    counts = count_modules(model, example)
    found = measured(model, example, runtime, threads=threads)
    table = found.with_counts(counts)
    typer.echo(table.to_csv(index=False) if csv else f"{_text(table)}\n\n{found.summary()}", nl=not csv)
    if "latency_ms" in candidate.metrics and not csv:
        typer.echo(f"The study's own measurement: latency_ms {candidate.metrics['latency_ms']:.3f}")
    if left_out := sorted({name for names in counts["uncounted"] for name in names.split()}):
        say(f"Not counted, because there is no rule for it: {', '.join(left_out)}")
    if plot is not None:
        say(f"{found.save(plot)}: trial {candidate.trial.number}")


def _text(table: pd.DataFrame) -> str:
    """The columns that tell most, and the sums."""
    columns = ("module", "type", "output", "params", "macs", "bops", "ops", "model_bytes", "ms", "share")
    numbers = ("params", "macs", "bops", "ops", "model_bytes")
    sums: dict[Any, Any] = {name: table[name].sum() for name in (*numbers, "ms", "share")}
    rows = [[*columns]]
    records: list[dict[Any, Any]] = [*table.to_dict("records"), {"module": "total", **sums}]
    for row in records:
        cells = [row["module"] or "(itself)", _plain(row.get("type")), _shape(row.get("output"))]
        cells += ["" if pd.isna(row[name]) else f"{row[name]:,.0f}" for name in numbers]
        rows.append([*cells, *("" if pd.isna(row[name]) else form.format(row[name]) for name, form in _TIMES.items())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


_TIMES = {"ms": "{:.4f}", "share": "{:.1%}"}


def _plain(value: object) -> str:
    return value if isinstance(value, str) else ""


def _shape(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else ""
