"""Boxes, lines and texts, and how they become SVG, PNG or PDF.

Lengths are points (1/72 inch), ``y`` goes down. SVG is written here, because matplotlib takes the form of its texts and
the salt of its ids from global settings only. PNG and PDF are matplotlib's, by figures that no global state knows of.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONT = "DejaVu Sans"
"""Comes with matplotlib, so widths are the same on every machine."""

INK, PAPER = "#222222", "#ffffff"


@dataclass(frozen=True)
class Box:
    """A rectangle from its left upper corner, round by ``radius``; an empty colour is not painted.

    Attributes:
        name: What it stands for, where a text in it is not that already; an SVG says it on hovering.
    """

    x: float
    y: float
    width: float
    height: float
    fill: str = ""
    edge: str = ""
    line_width: float = 1.0
    radius: float = 0.0
    name: str = ""

    def moved(self, x: float, y: float) -> Box:
        """The same elsewhere."""
        return replace(self, x=self.x + x, y=self.y + y)

    @property
    def right(self) -> float:
        """Of its right side."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Of its lower side."""
        return self.y + self.height


@dataclass(frozen=True)
class Line:
    """Points joined by straight lines, or by curves that leave and enter every point horizontally.

    Attributes:
        points: From first to last.
        dashes: Lengths on and off, in widths of the line; none for a solid one.
        curved: Whether two points of different height are joined by a curve.
        arrow: Whether it ends in an arrow head, which points along the last piece.
    """

    points: tuple[tuple[float, float], ...]
    colour: str = INK
    width: float = 1.0
    dashes: tuple[float, ...] = ()
    curved: bool = False
    arrow: bool = False

    def moved(self, x: float, y: float) -> Line:
        """The same elsewhere."""
        return replace(self, points=tuple((a + x, b + y) for a, b in self.points))

    @property
    def head(self) -> tuple[tuple[float, float], ...]:
        """Corners of the arrow head, its tip first; none where there is no arrow."""
        if not self.arrow:
            return ()
        (x0, y0), (x, y) = self.points[-2:]
        dx, dy = (1.0, 0.0) if self.curved else (x - x0, y - y0)
        length, long, half = math.hypot(dx, dy), 5.5 + self.width, 2.2 + 0.5 * self.width
        dx, dy = dx / length, dy / length
        x, y = x - long * dx, y - long * dy
        return (self.points[-1], (x - half * dy, y + half * dx), (x + half * dy, y - half * dx))

    @property
    def pieces(self) -> Sequence[Sequence[tuple[float, float]]]:
        """What each point but the first adds: itself, or two control points and itself for a curve."""
        points = list(self.points)
        if self.arrow:
            # A line as wide as the tip would blunt it.
            _, (ax, ay), (bx, by) = self.head
            points[-1] = (0.5 * (ax + bx), 0.5 * (ay + by))
        pieces = []
        for (x0, y0), (x1, y1) in pairwise(points):
            middle = 0.5 * (x0 + x1)
            pieces.append([(middle, y0), (middle, y1), (x1, y1)] if self.curved and y0 != y1 else [(x1, y1)])
        return pieces


@dataclass(frozen=True)
class Text:
    """One line of text; ``y`` is its middle, and ``anchor`` says whether ``x`` is its start, middle or end."""

    x: float
    y: float
    text: str
    size: float = 9.0
    colour: str = INK
    bold: bool = False
    anchor: str = "middle"

    def moved(self, x: float, y: float) -> Text:
        """The same elsewhere."""
        return replace(self, x=self.x + x, y=self.y + y)

    @property
    def width(self) -> float:
        """In points."""
        return text_width(self.text, self.size, self.bold)

    @property
    def left(self) -> float:
        """Of its first letter."""
        return self.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor] * self.width

    @property
    def baseline(self) -> float:
        """Half a capital's height (0.73 of the size) below the middle."""
        return self.y + 0.365 * self.size


Shape: TypeAlias = Box | Line | Text


@dataclass(frozen=True)
class Drawing:
    """Shapes on a page, later ones on top."""

    width: float
    height: float
    shapes: tuple[Shape, ...]


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of one line of text in points."""
    return _unit_width(text, bold) * size


@lru_cache(maxsize=4096)
def _unit_width(text: str, bold: bool) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(family=FONT, weight="bold" if bold else "normal", size=100)
    # The last letter's own margin does not count as ink; a twelfth of the size is more than that.
    width: float = TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]
    return width / 100 + 0.08


def svg(drawing: Drawing, title: str) -> str:
    """The drawing as an SVG document.

    Args:
        drawing: What to write.
        title: What it is, for those who cannot see it.
    """
    width, height = _number(drawing.width), _number(drawing.height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}pt" height="{height}pt" '
        f'viewBox="0 0 {width} {height}" font-family="{FONT}, Verdana, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    for shape in drawing.shapes:
        match shape:
            case Box():
                lines.append(
                    f'<rect x="{_number(shape.x)}" y="{_number(shape.y)}" width="{_number(shape.width)}" '
                    f'height="{_number(shape.height)}" rx="{_number(shape.radius)}" fill="{shape.fill or "none"}" '
                    f'stroke="{shape.edge or "none"}" stroke-width="{_number(shape.line_width)}"'
                    + (f"><title>{escape(shape.name)}</title></rect>" if shape.name else "/>")
                )
            case Line():
                dashes = " ".join(_number(length * shape.width) for length in shape.dashes)
                lines.append(
                    f'<path d="{_path(shape)}" fill="none" stroke="{shape.colour}" '
                    f'stroke-width="{_number(shape.width)}"'
                    + (f' stroke-dasharray="{dashes}"' if dashes else "")
                    + "/>"
                )
                if shape.arrow:
                    corners = " ".join(f"{_number(x)},{_number(y)}" for x, y in shape.head)
                    lines.append(f'<polygon points="{corners}" fill="{shape.colour}"/>')
            case Text():
                # The width holds where another font stands in, too.
                lines.append(
                    f'<text x="{_number(shape.left)}" y="{_number(shape.baseline)}" font-size="{_number(shape.size)}" '
                    f'textLength="{_number(shape.width)}" lengthAdjust="spacingAndGlyphs" fill="{shape.colour}"'
                    + (' font-weight="bold"' if shape.bold else "")
                    + f">{escape(shape.text)}</text>"
                )
    return "\n".join([*lines, "</svg>", ""])


def png(drawing: Drawing, dpi: float) -> bytes:
    """The drawing as a PNG image of ``dpi`` pixels an inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(drawing, dpi)
    # No version of matplotlib in the file, so that equal drawings are equal bytes.
    return _written(lambda out: FigureCanvasAgg(figure).print_png(out, metadata={"Software": None}))  # type: ignore[no-untyped-call]


def pdf(drawing: Drawing) -> bytes:
    """The drawing as a PDF page of its own size."""
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    figure = _figure(drawing, 72)
    return _written(lambda out: FigureCanvasPdf(figure).print_pdf(out, metadata={"CreationDate": None}))  # type: ignore[no-untyped-call]


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def _figure(drawing: Drawing, dpi: float) -> Figure:
    from matplotlib import patches, path
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text as FigureText
    from matplotlib.transforms import Affine2D

    figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), dpi=dpi, facecolor=PAPER, edgecolor=PAPER)
    points = Affine2D().scale(1 / 72, -1 / 72).translate(0, drawing.height / 72) + figure.dpi_scale_trans
    for order, shape in enumerate(drawing.shapes):
        match shape:
            case Box():
                style = patches.BoxStyle.Round(pad=0, rounding_size=shape.radius) if shape.radius else "square,pad=0"
                added: list[patches.Patch | FigureText] = [
                    patches.FancyBboxPatch(
                        (shape.x, shape.y),
                        shape.width,
                        shape.height,
                        boxstyle=style,
                        facecolor=shape.fill or "none",
                        edgecolor=shape.edge or "none",
                        linewidth=shape.line_width,
                    )
                ]
            case Line():
                vertices, codes = [shape.points[0]], [path.Path.MOVETO]
                for piece in shape.pieces:
                    vertices += piece
                    codes += [path.Path.CURVE4] * 3 if len(piece) == 3 else [path.Path.LINETO]
                added = [
                    patches.PathPatch(
                        path.Path(vertices, codes),
                        facecolor="none",
                        edgecolor=shape.colour,
                        linewidth=shape.width,
                        linestyle=(0, shape.dashes) if shape.dashes else "solid",
                    )
                ]
                if shape.arrow:
                    added.append(patches.Polygon(shape.head, facecolor=shape.colour, edgecolor="none"))
            case Text():
                font = FontProperties(family=FONT, size=shape.size, weight="bold" if shape.bold else "normal")
                added = [
                    FigureText(
                        shape.left,
                        shape.baseline,
                        shape.text,
                        color=shape.colour,
                        fontproperties=font,
                        horizontalalignment="left",
                        verticalalignment="baseline",
                        usetex=False,
                        parse_math=False,
                    )
                ]
        for artist in added:
            artist.set_transform(points)
            artist.set_zorder(order)
            figure.add_artist(artist)
    return figure


def _path(line: Line) -> str:
    parts = ["M" + _pair(line.points[0])]
    parts += [("C" if len(piece) == 3 else "L") + " ".join(map(_pair, piece)) for piece in line.pieces]
    return "".join(parts)


def _pair(point: tuple[float, float]) -> str:
    return f"{_number(point[0])},{_number(point[1])}"


def _number(value: float) -> str:
    """Two decimals, as short as can be; -0 is 0."""
    return f"{round(value, 2) + 0.0:g}" if abs(value) < 1e4 else f"{value:.2f}"
