"""The application: what every command shares, messages and exit codes."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

import nasplat
from nasplat.errors import NasplatError, NasplatWarning, SearchInterrupted

FAILED, NOTHING_FOUND, INTERRUPTED = 1, 3, 130

EPILOG = """\
**Exit codes**

- 0: done
- 1: nasplat refused or failed; the reason is on stderr
- 2: the command line is wrong
- 3: the study ended without a candidate that was trained in full and keeps the limits; a pre-flight: no sampled
  network keeps them
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
            say(str(interrupt)[:1].upper() + str(interrupt)[1:])
            raise typer.Exit(INTERRUPTED) from interrupt
        except NasplatError as error:
            say(f"Error: {error}")
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
        say(f"Warning: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def say(message: str) -> None:
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
