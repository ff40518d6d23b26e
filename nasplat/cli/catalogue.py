"""Commands that list what is installed."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nasplat import plugins, report
from nasplat.cli.app import app
from nasplat.cli.values import fields_of, named_parameters, presets_of


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


@app.command()
def runtimes() -> None:
    """List the installed runtimes, where latency is measured, with their parameters and what they find on this machine.

    Latency is measured on one by its name: Latency("onnxruntime_int8")
    """
    _list(plugins.RUNTIMES, lambda kind: ", ".join(f"{name} {value}" for name, value in kind().facts().items()))


def _list(group: str, here: Callable[[Any], str] | None = None) -> None:
    """Print the plug-ins of a group.

    Args:
        group: Entry-point group.
        here: What a class finds on this machine.
    """
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
        if here is not None:
            try:
                console.print(Text(f"  here: {here(kind)}"))
            except Exception as error:  # likewise
                console.print(Text(f"  here: {type(error).__name__}: {error}"))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
        for header in ("  parameter", "type", "default", "meaning"):
            table.add_column(header, overflow="fold")
        meanings = _meanings(kind)
        for field in fields_of(kind):
            shown = (f"  {field.name}", _type_text(field), _default_text(field), meanings.get(field.name, ""))
            table.add_row(*map(Text, shown))
        if table.row_count:
            console.print(table)
        presets = Table.grid(padding=(0, 2, 0, 0))
        for preset, function in presets_of(kind).items():
            own = ", ".join(f"{p.name}={p.default!r}" for p in named_parameters(function))
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


def _type_text(field: dataclasses.Field[Any]) -> str:
    text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return re.sub(r"\bLiteral\[(.*)\]", lambda match: match[1].replace(", ", " | "), text)


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(required)"
