"""A drawn architecture, to look at or to save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nasplat.drawing.cells import KINDS, draw_graph, draw_legend, kind_of
from nasplat.drawing.shapes import Drawing, Shape, Text, pdf, png, svg
from nasplat.drawing.sketch import Graph, Stages
from nasplat.drawing.stages import draw_stages
from nasplat.errors import InvalidInputError

MARGIN, TITLE, APART = 14.0, 24.0, 22.0


@dataclass(frozen=True, repr=False)
class Picture:
    """A drawn sketch; a notebook shows it. Equal sketches give equal bytes.

    Attributes:
        sketch: Its parts, drawn below each other.
    """

    sketch: tuple[Graph | Stages, ...]

    @property
    def title(self) -> str:
        """The titles of its parts."""
        return ", ".join(part.title for part in self.sketch)

    def __repr__(self) -> str:
        return f"<Picture of {self.title}>"

    def svg(self) -> str:
        """The picture as an SVG document; its texts are texts."""
        return svg(self._drawing(), self.title)

    def png(self, dpi: float = 150) -> bytes:
        """The picture as a PNG image.

        Args:
            dpi: Pixels an inch; a letter is about a tenth of an inch high.

        Raises:
            InvalidInputError: ``dpi`` is not positive.
        """
        if not dpi > 0:
            raise InvalidInputError(f"dpi is {dpi}; legal: a number above 0")
        return png(self._drawing(), dpi)

    def save(self, path: str | Path) -> Path:
        """Write the picture in the format that the name ends with: ``.svg``, ``.png`` or ``.pdf``.

        Args:
            path: The file; folders that it lies in are made.

        Returns:
            The file.

        Raises:
            InvalidInputError: The name ends otherwise.
        """
        path = Path(path)
        match path.suffix.lower():
            case ".svg":
                written = self.svg().encode()
            case ".png":
                written = self.png()
            case ".pdf":
                written = pdf(self._drawing())
            case _:
                raise InvalidInputError(
                    f"a picture cannot be saved as {path.name!r}; legal: a name in .svg, .png or .pdf"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written)
        return path

    def _repr_svg_(self) -> str:
        return self.svg()

    def _drawing(self) -> Drawing:
        shapes: list[Shape] = []
        width, y = 0.0, MARGIN

        def add(part: Drawing) -> None:
            nonlocal width, y
            shapes.extend(shape.moved(MARGIN, y) for shape in part.shapes)
            width, y = max(width, part.width), y + part.height + APART

        for part in self.sketch:
            title = Text(MARGIN, y + 6.0, part.title, 11.0, bold=True, anchor="start")
            shapes.append(title)
            width, y = max(width, title.width), y + TITLE
            add(draw_graph(part) if isinstance(part, Graph) else draw_stages(part))
        used = {kind_of(operation) for part in self.sketch if isinstance(part, Graph) for _, _, operation in part.edges}
        if legend := [kind for kind in KINDS if kind in used]:
            add(draw_legend(legend))
        return Drawing(width + 2 * MARGIN, max(y - APART, MARGIN) + MARGIN, tuple(shapes))
