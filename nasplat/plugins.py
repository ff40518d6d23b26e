"""The one door for plug-ins: entry points. The project's own spaces and strategies come in through it too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nasplat.errors import UnknownPluginError

SPACES = "nasplat.search_spaces"
STRATEGIES = "nasplat.strategies"
EXPLORERS = "nasplat.explorers"
RUNTIMES = "nasplat.runtimes"
GROUPS = (SPACES, STRATEGIES, EXPLORERS, RUNTIMES)


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
