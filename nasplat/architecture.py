"""An architecture as data: what is searched, logged, compared and rebuilt. Never a module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from nasplat.errors import ArchitectureError

SCHEMA_VERSION = 1
"""Version of the JSON form. A reader refuses a newer one by name."""


@dataclass(frozen=True)
class Architecture:
    """One point of a search space.

    Attributes:
        space: Name and canonical parameters of the space (``SearchSpace.identity``), so that the same genes in
            ``Bats(cells=3)`` and ``Bats(cells=20)`` are two architectures.
        genes: One option per choice of the space: JSON scalars, by the name of the choice. The order of the keys
            carries no meaning.
    """

    space: str
    genes: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "genes", MappingProxyType(dict(self.genes)))

    @cached_property
    def id(self) -> str:
        """Sixteen hexadecimal digits, the same on every machine: names the run, the folder, the cache entry."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()[:16]

    def _canonical(self) -> str:
        return json.dumps([self.space, dict(self.genes)], sort_keys=True, separators=(",", ":"))

    def to_json(self, indent: int | None = 2) -> str:
        """The architecture as JSON text, with its schema version and id."""
        return json.dumps(
            {"schema": SCHEMA_VERSION, "id": self.id, "space": self.space, "genes": dict(self.genes)},
            indent=indent,
        )

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read what :meth:`to_json` wrote.

        Raises:
            ArchitectureError: The text is not JSON, lacks a key, has a newer schema, or its id does not belong to
                its genes (somebody edited one and not the other).
        """
        try:
            record = json.loads(text)
            schema, space, genes = record["schema"], record["space"], record["genes"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ArchitectureError(
                f"not an architecture: expected a JSON object with schema, space and genes ({error!r})"
            ) from error
        if schema != SCHEMA_VERSION:
            raise ArchitectureError(f"architecture has schema {schema!r}; this nasplat reads schema {SCHEMA_VERSION}")
        if not isinstance(space, str) or not isinstance(genes, dict):
            raise ArchitectureError("not an architecture: space must be a string and genes an object")
        architecture = cls(space, genes)
        if record.get("id", architecture.id) != architecture.id:
            raise ArchitectureError(
                f"the id {record['id']!r} does not belong to these genes ({architecture.id!r} does); "
                "remove the id if the genes were edited on purpose"
            )
        return architecture

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self.id == other.id

    def __reduce__(self) -> tuple[type[Architecture], tuple[str, dict[str, Any]]]:
        # A mapping proxy cannot be pickled; its plain dict can.
        return (Architecture, (self.space, dict(self.genes)))
