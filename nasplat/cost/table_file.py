"""Files of cost and step tables: JSON, with a key that says which and of which version."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nasplat.errors import InvalidInputError

T = TypeVar("T")


def write_table(path: str | Path, kind: str, version: int, record: Mapping[str, Any]) -> Path:
    """Write a table.

    Args:
        path: Its folder is made.
        kind: ``cost`` or ``step``.
        version: Of the format.
        record: JSON values by name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({f"nasplat_{kind}_table": version, **record}, indent=1))
    return path


def read_table(path: str | Path, kind: str, readable: Collection[int], make: Callable[[dict[str, Any]], T]) -> T:
    """Read a table.

    Args:
        path: Of the file.
        kind: As it was written.
        readable: Versions that can be read.
        make: The table of a record.

    Raises:
        InvalidInputError: The file is no such table, or of another version.
    """
    try:
        record = json.loads(Path(path).read_text())
        version = record.pop(f"nasplat_{kind}_table")
        if version not in readable:
            legal = ", ".join(map(str, readable))
            raise InvalidInputError(f"{path} is a {kind} table of version {version!r}; legal: {legal}")
        return make(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{path} is not a {kind} table: {type(error).__name__}: {error}") from error
