"""What makes two objects "the same" across processes, and how a folder names the objects that it was made with.

Spaces, strategies, tasks, meters and objectives are known by their dataclass fields, a function by its qualified name,
a tensor by the hash of its content. ``describe`` turns an object into such a JSON description; ``restore`` goes back,
for dataclasses of nasplat itself and of modules that an installed plug-in lives in, and for nothing else: a folder
is untrusted input, so no name in it is ever imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from nasplat.errors import InvalidInputError, UnsupportedError

JSON: TypeAlias = Any
"""A value that ``json.dumps`` takes."""


def type_name(kind: type) -> str:
    """``module:qualname`` of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def describe(value: Any) -> JSON:
    """A JSON description by which a value is known.

    Args:
        value: JSON values, tuples, mappings, dataclasses of such, functions, tensors and arrays; or any object with
            a ``describe()`` method of its own.

    Raises:
        InvalidInputError: The value has no stable description (an object known only by its address).
    """
    if isinstance(value, type):
        return {"class": type_name(value)}
    if hasattr(value, "describe"):
        return value.describe()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return {"tensor": content_hash(value)}
    if isinstance(value, np.ndarray):
        return {"tensor": content_hash(torch.from_numpy(np.ascontiguousarray(value)))}
    if dataclasses.is_dataclass(value):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return {"type": type_name(type(value)), "fields": fields}
    if inspect.isroutine(value) or inspect.isclass(value):
        return {"function": f"{value.__module__}:{value.__qualname__}"}
    raise InvalidInputError(
        f"{value!r} cannot be told apart from another {type(value).__name__} in a later process: "
        "pass a dataclass, a function, a tensor, or an object with a describe() method that returns JSON"
    )


def source_hash(value: Any) -> str | None:
    """A hash of a function's or class's source text, or None where Python cannot find it.

    A changed source does not make another study, but is worth a warning.
    """
    try:
        return hashlib.sha256(inspect.getsource(value).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def content_hash(tensor: torch.Tensor) -> str:
    """A hash of a tensor's dtype, shape and content."""
    # Copied, since a row of length 0 or 1 may have any stride, which cannot be viewed as bytes.
    flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if len(flat):
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def canonical(description: JSON) -> str:
    """The one text of a description: equal descriptions, equal texts."""
    return json.dumps(description, sort_keys=True, separators=(",", ":"))


def restore(description: JSON, allowed: Mapping[str, Any]) -> Any:
    """The object of a description.

    Args:
        description: What :func:`describe` returned.
        allowed: Dataclasses that may be made and functions that may be named, by their ``module:qualname``.

    Raises:
        UnsupportedError: The description needs something that is not in ``allowed``, or a function, tensor or loader
            of the user's own, which only the script that made it can provide.
    """
    if isinstance(description, list):
        return tuple(restore(item, allowed) for item in description)
    if not isinstance(description, dict):
        return description
    if set(description) == {"type", "fields"}:
        kind = allowed.get(description["type"])
        if kind is None:
            raise UnsupportedError(
                f"{description['type']} is neither nasplat's own nor part of an installed plug-in: "
                "run the script that made the study again, with the same folder"
            )
        names = {f.name for f in dataclasses.fields(kind) if f.init}
        fields = {key: restore(item, allowed) for key, item in description["fields"].items() if key in names}
        return kind(**fields)
    for key in ("function", "tensor", "class", "loader"):
        if key in description:
            if isinstance(description[key], str) and description[key] in allowed:
                return allowed[description[key]]
            raise UnsupportedError(
                f"the {key} {description[key]} lives in the script that made the study: "
                "run that script again, with the same folder"
            )
    return {key: restore(item, allowed) for key, item in description.items()}
