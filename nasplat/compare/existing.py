"""Studies that lie in folders, grouped into arms by their strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nasplat import journal, plugins
from nasplat.compare.comparison import Comparison
from nasplat.compare.run import RANDOM
from nasplat.errors import FolderError
from nasplat.identity import canonical, describe
from nasplat.result import Result, header_of, load


def compare_folders(folders: Sequence[str | Path], **arguments: Any) -> Comparison:
    """Compare the studies of some folders; studies of one strategy, with all its parameters, are one arm.

    Args:
        folders: Each a study's, or one that studies lie in.
        arguments: Of :meth:`Comparison.from_results`; ``baseline=None`` looks for random search.

    Raises:
        FolderError: There is no study in a folder.
        InvalidInputError: The studies cannot be compared; the message says in what they differ.
    """
    arms: dict[str, list[Result]] = {}
    strategies: dict[str, Any] = {}
    for folder in studies_in(folders):
        strategy = header_of(journal.read(folder)[0], folder)["strategy"]
        key = canonical(strategy)
        strategies[key] = strategy
        arms.setdefault(key, []).append(load(folder))
    names = names_of(strategies)
    if arguments.get("baseline") is None:
        arguments["baseline"] = next((names[key] for key in arms if _is_random(strategies[key])), None)
    return Comparison.from_results({names[key]: results for key, results in arms.items()}, **arguments)


def studies_in(folders: Sequence[str | Path]) -> list[Path]:
    """The study folders among some folders and right below them, each once.

    Raises:
        FolderError: One holds no study.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        own = [folder] if (folder / journal.FILE).exists() else []
        below = sorted(path.parent for path in folder.glob(f"*/{journal.FILE}"))
        if not own and not below:
            raise FolderError(f"no study in {folder} or in a folder right below it: there is no {journal.FILE}")
        for path in own or below:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def names_of(strategies: Mapping[str, Any]) -> dict[str, str]:
    """A short name for each strategy: its class, and the parameters in which it differs from others of that class.

    Those whose names would be the same all the same are numbered.

    Args:
        strategies: Descriptions (:func:`nasplat.identity.describe`) by any key.
    """
    names = {}
    for key, strategy in strategies.items():
        fields, kind = _fields(strategy), _kind(strategy)
        others = [_fields(other) for rest, other in strategies.items() if rest != key and _kind(other) == kind]
        own = {
            name: value
            for name, value in fields.items()
            if any(canonical(other.get(name)) != canonical(value) for other in others)
        }
        shown = ", ".join(
            f"{name}={value if isinstance(value, str) else canonical(value)}" for name, value in own.items()
        )
        names[key] = f"{kind}({shown})" if own else kind
    # Classes of one name in two modules, or 1 and "1", read the same.
    alike = {name: [key for key in names if names[key] == name] for name in names.values()}
    for name, keys in alike.items():
        for index, key in enumerate(keys if len(keys) > 1 else [], start=1):
            names[key] = f"{name} ({index})"
    return names


def _kind(strategy: Any) -> str:
    named = strategy.get("type") if isinstance(strategy, dict) else None
    return str(named).rpartition(":")[2] if named else canonical(strategy)


def _fields(strategy: Any) -> dict[str, Any]:
    return dict(strategy.get("fields", {})) if isinstance(strategy, dict) else {}


def _is_random(strategy: Any) -> bool:
    installed = plugins.installed(plugins.STRATEGIES)
    return RANDOM in installed and canonical(strategy) == canonical(describe(installed[RANDOM].load()()))
