"""What a study's folder may name. A folder is untrusted input: nothing else is ever made of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from nasplat import architecture, joint_space, objectives, phases, plugins, ranges, task, teacher
from nasplat.cost import (
    accuracy,
    counter,
    energy,
    latency,
    memory,
    predicted,
    resource,
    steps,
    table,
    throughput,
    timing,
    zero_cost,
)
from nasplat.data import sources
from nasplat.identity import type_name
from nasplat.weight_sharing import bilevel, eigenvalue


@cache
def restorable() -> Mapping[str, Any]:
    """What a study's folder may name: nasplat's own dataclasses, and those of modules that hold a plug-in."""
    modules: list[Any] = [architecture, objectives, task, phases, teacher, sources]
    modules += [counter, energy, latency, memory, resource, table, throughput, timing, zero_cost]
    modules += [accuracy, predicted, steps]
    modules += [ranges, joint_space]
    modules += [bilevel, eigenvalue]
    for group in plugins.GROUPS:
        for point in plugins.installed(group).values():
            point.load()
            modules.append(sys.modules[point.module])
    allowed: dict[str, Any] = {"nasplat.task:cross_entropy": task.cross_entropy}
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                allowed[type_name(value)] = value
    return allowed
