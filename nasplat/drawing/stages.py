"""A network as a picture: a row of blocks, in as many lines as it takes."""

from __future__ import annotations

import math

from nasplat.drawing.shapes import INK, Box, Drawing, Line, Shape, Text
from nasplat.drawing.sketch import Block, Stages

FILL, STRIDED, MUTED = "#dbe9f4", "#f6dcc8", "#555555"
ROW = 620.0
"""Width after which a new line is begun."""

PADDING, GAP, HEADING, LINE, SHADOW = 8.0, 20.0, 16.0, 12.5, 3.5
DOUBLING, MOST = 9.0, 54.0
"""Height that a block gains with each doubling of channels, and at most in one picture."""


def _lines(block: Block) -> list[Text]:
    """What stands in a block, from top to bottom, around x = 0."""
    texts = [Text(0.0, 0.0, block.name, 9.5, bold=True)]
    texts += [Text(0.0, 0.0, line, 9.0) for line in block.lines]
    if block.stride > 1:
        texts.append(Text(0.0, 0.0, f"stride {block.stride}", 9.0, "#9a3c00"))
    if block.channels:
        texts.append(Text(0.0, 0.0, f"{block.channels} channels", 8.0, MUTED))
    return texts


def _extra(stages: Stages) -> list[float]:
    """Height that each block has for its channels, above the narrowest."""
    channels = [block.channels for block in stages.blocks if block.channels]
    least, most = min(channels, default=1), max(channels, default=1)
    doubling = min(DOUBLING, MOST / max(math.log2(most / least), 1.0))
    return [doubling * math.log2(max(block.channels, least) / least) for block in stages.blocks]


def draw_stages(stages: Stages) -> Drawing:
    """The blocks, without their title. All are of one width; a block of more channels is taller."""
    if not stages.blocks:
        return Drawing(0.0, 0.0, ())
    texts = [_lines(block) for block in stages.blocks]
    width = max(40.0, *(text.width for lines in texts for text in lines)) + 2 * PADDING
    least = max(HEADING + LINE * (len(lines) - 1) for lines in texts) + PADDING
    heights = [least + extra for extra in _extra(stages)]
    step = width + GAP
    rows = math.ceil(len(texts) / max(1, int((ROW + GAP) // step)))
    in_row = math.ceil(len(texts) / rows)  # no line with a lone block
    shapes: list[Shape] = []
    top = above = 0.0
    for start in range(0, len(texts), in_row):
        row = range(start, min(start + in_row, len(texts)))
        repeated = any(stages.blocks[index].repeats > 1 for index in row)
        tallest = max(heights[index] for index in row)
        if repeated:
            top += 2 * SHADOW + 8.0
        middle = top + 0.5 * tallest
        if start:
            # From the end of the row above to the beginning of this one.
            last, turn = (in_row - 1) * step + width, top - (11.0 + (2 * SHADOW + 8.0 if repeated else 0.0))
            shapes.append(
                Line(
                    (
                        (last, above),
                        (last + 10.0, above),
                        (last + 10.0, turn),
                        (-16.0, turn),
                        (-16.0, middle),
                        (0.0, middle),
                    ),
                    arrow=True,
                )
            )
        for index in row:
            x = (index - start) * step
            if index > start:
                behind = 2 * SHADOW if stages.blocks[index - 1].repeats > 1 else 0.0
                shapes.append(Line(((x - GAP + behind, middle), (x, middle)), arrow=True))
            shapes += _block(stages.blocks[index], texts[index], x, middle, width, heights[index])
        above, top = middle, top + tallest + 24.0
    right = (min(in_row, len(texts)) - 1) * step + width + (10.0 if len(texts) > in_row else 2 * SHADOW)
    left = 16.0 if len(texts) > in_row else 0.0
    return Drawing(left + right, top - 24.0, tuple(shape.moved(left, 0.0) for shape in shapes))


def _block(block: Block, texts: list[Text], x: float, middle: float, width: float, height: float) -> list[Shape]:
    y = middle - 0.5 * height
    fill = STRIDED if block.stride > 1 else FILL
    shapes: list[Shape] = []
    if block.repeats > 1:
        for shift in (2 * SHADOW, SHADOW):
            shapes.append(Box(x + shift, y - shift, width, height, fill, INK, 0.8, 4.0))
        shapes.append(
            Text(x + width + 2 * SHADOW, y - 2 * SHADOW - 6.0, f"x {block.repeats}", 9.0, bold=True, anchor="end")
        )
    shapes.append(Box(x, y, width, height, fill, INK, 1.0, 4.0))
    if block.stride > 1:
        # A bar that shows in black and white, too: from here on the image is smaller.
        shapes.append(Box(x, y + 4.0, 3.5, height - 8.0, fill="#9a3c00"))
    lines = HEADING + LINE * (len(texts) - 1)
    line = middle - 0.5 * lines + 0.5 * HEADING
    for text in texts:
        shapes.append(text.moved(x + 0.5 * width, line))
        line += LINE
    return shapes
