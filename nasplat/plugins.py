"""The one door for plug-ins: entry points. The project's own spaces and strategies come in through it too."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nasplat import architecture, joint_space, objectives, phases, ranges, task, teacher
from nasplat.cost import counter, latency, resource, table, zero_cost
from nasplat.data import sources
from nasplat.errors import UnknownPluginError
from nasplat.identity import type_name
from nasplat.weight_sharing import bilevel, eigenvalue

SPACES = "nasplat.search_spaces"
STRATEGIES = "nasplat.strategies"
EXPLORERS = "nasplat.explorers"
GROUPS = (SPACES, STRATEGIES, EXPLORERS)


@cache
def installed(group: str) -> Mapping[str, EntryPoint]:
    """The plug-ins of one group by name.

    Raises:
        UnknownPluginError: Two packages claim one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise UnknownPluginError(
                f"two installed packages claim {point.name!r} in {group}: {other.value} and {point.value}; "
                "uninstall one"
            )
    return dict(sorted(found.items()))


def load(group: str, name: str) -> Any:
    """The class that a plug-in name stands for.

    Raises:
        UnknownPluginError: No installed package claims the name; the message lists those that are claimed.
    """
    points = installed(group)
    if name not in points:
        kind = group.rpartition(".")[2].replace("_", " ")
        raise UnknownPluginError(f"no plug-in {name!r} among the {kind}; installed: {', '.join(points) or 'none'}")
    return points[name].load()


@cache
def restorable() -> Mapping[str, Any]:
    """What a study's folder may name: nasplat's own dataclasses, and those of modules that hold a plug-in."""
    modules: list[Any] = [architecture, objectives, task, phases, teacher, sources]
    modules += [counter, latency, resource, table, zero_cost]
    modules += [ranges, joint_space]
    modules += [bilevel, eigenvalue]
    for group in GROUPS:
        for point in installed(group).values():
            point.load()
            modules.append(sys.modules[point.module])
    allowed: dict[str, Any] = {"nasplat.task:cross_entropy": task.cross_entropy}
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                allowed[type_name(value)] = value
    return allowed
