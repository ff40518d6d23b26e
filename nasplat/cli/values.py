"""From the text of the command line to objects: plug-ins with their parameters, tasks, objectives, limits."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import typer

from nasplat import plugins
from nasplat.architecture import Architecture
from nasplat.errors import InvalidInputError
from nasplat.objectives import Constraint, Objective, RelativeConstraint, at_least, at_most, maximise, minimise
from nasplat.task import Recipe, Task

DEFAULT_PRESET = "small"
"""The preset that a plug-in's plain name takes, where it has one: what runs on a laptop."""

PLUGIN_ANNOTATIONS = {
    "SearchSpace": plugins.SPACES,
    "Strategy": plugins.STRATEGIES,
    "Explorer": plugins.EXPLORERS,
    "Runtime": plugins.RUNTIMES,
}
"""Parameters of these types are plug-ins themselves, named on the command line."""

TASKS: Mapping[str, Callable[..., Task]] = {"fashion-mnist": Task.fashion_mnist, "digits": Task.digits}


def assignments(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    """Texts ``KEY=VALUE`` by key."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{text!r}; a KEY=VALUE is needed", param_hint=option)
        found[name.strip()] = value
    return found


def objective_of(text: str) -> Objective:
    """The objective that ``max:METRIC`` or ``min:METRIC`` stands for."""
    sense, _, metric = text.partition(":")
    makers = {"max": maximise, "min": minimise}
    if sense not in makers or not metric:
        raise typer.BadParameter(f"{text!r}; max:METRIC or min:METRIC is needed", param_hint="--objective")
    return makers[sense](metric)


def constraint_of(text: str) -> Constraint | RelativeConstraint:
    """The limit that ``METRIC<=X`` or ``METRIC>=X`` stands for; X is a number, ``60%`` or ``60% of NAME``."""
    match = re.fullmatch(r"\s*([\w\-./ ]+?)\s*(<=|>=)\s*(\S.*?)\s*", text)
    try:
        if match is None:
            raise ValueError(text)
        make = at_most if match[2] == "<=" else at_least
        if "%" not in match[3]:
            return make(match[1], float(match[3]))
        share = re.fullmatch(r"([^%]+%)(?:\s*of\s+(\S.*))?", match[3])
        if share is None:
            raise ValueError(text)
        return make(match[1], share[1], share[2] or "")
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r}; 'METRIC<=NUMBER' or 'METRIC>=NUMBER' is needed, or a positive percentage of a baseline: "
            "'METRIC<=60%', 'METRIC<=60% of NAME'",
            param_hint="--constraint",
        ) from error


def baseline_of(name: str, text: str) -> Architecture | dict[str, Any]:
    """The baseline of ``NAME=FILE`` or ``NAME=GENES``: an architecture as exports write it, or genes as JSON."""
    try:
        if text.lstrip().startswith("{"):
            held = json.loads(text)
            return Architecture.from_json(text) if {"space", "genes"} <= set(held) else dict(held)
        path = Path(text)
        if path.is_dir() and (path / "architecture.json").exists():
            path = path / "architecture.json"
        return Architecture.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{name}={text}: {error}. The file architecture.json of an export is needed, or genes as JSON: "
            f'{name}={{"channels": 8}}',
            param_hint="--baseline",
        ) from error


def task_of(name: str, given: Mapping[str, str]) -> Task:
    """A task by its name, with its parameters."""
    if name not in TASKS:
        raise InvalidInputError(f"no task {name!r} on the command line; there are: {', '.join(TASKS)}")
    legal = annotations_of(TASKS[name]) | {field.name: hints_of(Recipe)[field.name] for field in fields_of(Recipe)}
    return TASKS[name](**values_of(given, legal, f"the task {name}"))


def plugin_of(group: str, reference: str, given: Mapping[str, str]) -> Any:
    """The object that ``name`` or ``name:preset`` and its parameters stand for."""
    name, _, preset = reference.partition(":")
    kind = plugins.load(group, name)
    presets = presets_of(kind)
    if preset and preset not in presets:
        raise InvalidInputError(f"{name} has no preset {preset!r}; there are: {', '.join(presets) or 'none'}")
    if not preset and DEFAULT_PRESET in presets:
        preset = DEFAULT_PRESET
    make: Callable[..., Any] = getattr(kind, preset) if preset else kind
    legal = {field.name: hints_of(kind).get(field.name, Any) for field in fields_of(kind)}
    if preset:
        own = annotations_of(make)
        legal = {**legal, **own} if _takes_anything(make) else own
    required = [
        field.name
        for field in fields_of(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    values = values_of(given, legal, name)
    missing = [] if preset else [field for field in required if field not in values]
    if missing:
        raise InvalidInputError(f"{name} needs {', '.join(f'{field}=...' for field in missing)}")
    return make(**values)


def values_of(given: Mapping[str, str], legal: Mapping[str, Any], what: str) -> dict[str, Any]:
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
            values[name] = plugin_of(group, text, inner)
        else:
            values[name] = parse(text, legal[name], f"{name} of {what}")
    return values


def _group(annotation: Any) -> str | None:
    """The plug-in group of a parameter's type, optional or not; None where it is a plain value."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return _group(kinds[0]) if len(kinds) == 1 else None
    return PLUGIN_ANNOTATIONS.get(getattr(annotation, "__name__", str(annotation)))


_BAD = object()


def parse(text: str, annotation: Any, what: str) -> Any:
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
        return objective_of(text) if re.fullmatch(r"(max|min):[^,]+", text) else _BAD
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


def hints_of(kind: Any) -> dict[str, Any]:
    """Types of a class's fields or a function's parameters; as text where a name cannot be found."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return dict(getattr(kind, "__annotations__", {}))


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Named parameters of a function and their types."""
    hints = hints_of(function)
    return {parameter.name: hints.get(parameter.name, Any) for parameter in named_parameters(function)}


def named_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters of a preset that have names."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter for parameter in inspect.signature(function).parameters.values() if parameter.kind in named]


def _takes_anything(function: Callable[..., Any]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def presets_of(kind: Any) -> dict[str, Callable[..., Any]]:
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


def fields_of(kind: Any) -> list[dataclasses.Field[Any]]:
    """Fields of a dataclass that its constructor takes."""
    return [field for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else []
