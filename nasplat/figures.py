"""Files of matplotlib figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasplat.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")


def check_picture(path: str | Path) -> Path:
    """The path of a picture.

    Raises:
        InvalidInputError: Its name ends in none of :data:`SUFFIXES`.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        legal = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise InvalidInputError(f"{path} is no picture's name; legal: a name in {legal}")
    return path


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format that the name ends with; folders that it lies in are made.

    Raises:
        InvalidInputError: The name ends in none of :data:`SUFFIXES`.
    """
    path = check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date in the file, so that equal pictures are equal bytes.
    dates: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, dpi=150, format=path.suffix.lower()[1:], metadata=dates.get(path.suffix.lower(), {}))
    return path
