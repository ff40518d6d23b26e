"""A cell as a picture: nodes in columns from the inputs to the outputs, edges labelled by their operation.

Columns of nodes and columns of labels take turns. An edge has a place of its own in every column that it passes, and
changes its height between columns only, where nothing else is. So no line runs through a node or a text, and no text
lies on another, whatever the graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from nasplat.drawing.shapes import INK, PAPER, Box, Drawing, Line, Shape, Text, text_width
from nasplat.drawing.sketch import Graph


@dataclass(frozen=True)
class Kind:
    """A kind of operation, and the line that stands for it in colour and in black and white."""

    name: str
    pattern: str
    colour: str
    width: float
    dashes: tuple[float, ...] = ()

    def line(self, points: tuple[tuple[float, float], ...], arrow: bool = True) -> Line:
        """A curve of this kind."""
        return Line(points, self.colour, self.width, self.dashes, curved=True, arrow=arrow)


KINDS = (
    Kind("dilated convolution", "dil", "#a8450b", 1.8, (4.0, 1.2)),
    Kind("pool", "pool", "#14784a", 1.5, (1.2, 1.2)),
    Kind("skip", "skip|identity|shortcut", "#3f3f3f", 1.3),
    Kind("convolution", r"conv|kernel|sandglass|bottleneck|linear|dense|\d\s*x\s*\d", "#0a58a3", 1.8),
    Kind("other", "", "#7b3295", 1.3, (5.0, 1.2, 1.2, 1.2)),
)
"""The first whose pattern is found in an operation's name is its kind."""

PLAIN = Kind("", "", "#8a8a8a", 1.0)
"""An edge without an operation."""

INPUT, INNER, OUTPUT = "#c1e0c1", "#cfe3f2", "#f3e5ab"
NODE_WIDTH, NODE_HEIGHT, PORT, LABEL_SIZE, LABEL_HEIGHT = 34.0, 24.0, 6.0, 9.0, 13.0
SPACING = {"node": 14.0, "label": 5.0, "line": 4.0}
"""Free height around an item."""


def kind_of(operation: str) -> Kind:
    """How an operation is drawn, by its name."""
    if not operation:
        return PLAIN
    return next(kind for kind in KINDS if re.search(kind.pattern, operation.lower()))


@dataclass(eq=False)
class Item:
    """What has a place of its own in a column.

    Attributes:
        sort: ``node``, ``label`` or ``line`` (an edge passing by).
        text: Name or operation.
        column: From 0, on the left.
        width: In points.
        height: In points.
        before: What joins it to the column on its left.
        after: To the column on its right.
        y: Of its middle.
    """

    sort: str
    text: str
    column: int
    width: float = 0.0
    height: float = 2.0
    before: list[Link] = field(default_factory=list)
    after: list[Link] = field(default_factory=list)
    y: float = 0.0


@dataclass(eq=False)
class Link:
    """A piece of an edge between two columns; the ports are its heights at both ends, from the items' middles."""

    left: Item
    right: Item
    left_port: float = 0.0
    right_port: float = 0.0


@dataclass
class Layout:
    """Where everything in a cell is.

    Attributes:
        nodes: In the order of the graph.
        edges: Per edge of the graph its pieces, from node to node.
        columns: Items by column, from top to bottom.
        middles: ``x`` of each column's middle.
        widths: Of each column.
    """

    nodes: list[Item]
    edges: list[list[Link]]
    columns: list[list[Item]]
    middles: list[float]
    widths: list[float]

    def box(self, item: Item) -> Box:
        """The room that an item takes."""
        middle = self.middles[item.column]
        return Box(middle - 0.5 * item.width, item.y - 0.5 * item.height, item.width, item.height)

    def lines(self) -> list[tuple[tuple[float, float], ...]]:
        """Per edge the points of its curve; it is level inside of columns."""
        found = []
        for links in self.edges:
            points = [(self.box(links[0].left).right, links[0].left.y + links[0].left_port)]
            for link in links:
                for item, port, side in ((link.left, link.left_port, 0.5), (link.right, link.right_port, -0.5)):
                    points.append((self.middles[item.column] + side * self.widths[item.column], item.y + port))
            points.append((self.box(links[-1].right).x, points[-1][1]))
            found.append(tuple(point for index, point in enumerate(points) if not index or point != points[index - 1]))
        return found


def layout(graph: Graph) -> Layout:
    """Places for all nodes, labels and lines of a cell."""
    nodes, edges = _items(graph)
    columns: list[list[Item]] = [[] for _ in range(1 + max((node.column for node in nodes), default=0))]
    for item in [*nodes, *(link.right for links in edges for link in links[:-1])]:
        columns[item.column].append(item)
    columns = _ordered(columns)
    _set_ports(nodes, columns)
    _place(columns)
    widths = [max((item.width for item in column), default=0.0) for column in columns]
    middles = [0.5 * widths[0]]
    for index, column in enumerate(columns[:-1]):
        links = [link for item in column for link in item.after]
        climb = max((abs(link.left.y + link.left_port - link.right.y - link.right_port) for link in links), default=0.0)
        middles.append(middles[-1] + 0.5 * (widths[index] + widths[index + 1]) + min(max(20.0, 0.5 * climb), 64.0))
    return Layout(nodes, edges, columns, middles, widths)


def _items(graph: Graph) -> tuple[list[Item], list[list[Link]]]:
    """Nodes by longest path from the inputs, and each edge's way through the columns, its label in one of them."""
    depth: dict[str, int] = {}
    for node in graph.nodes:
        depth[node] = max((depth[source] + 1 for source, target, _ in graph.edges if target == node), default=0)
    last = max(depth.values(), default=0)
    for output in set(graph.nodes) - {source for source, _, _ in graph.edges}:
        depth[output] = last if depth[output] else 0

    # Labels stand between nodes of depth d and d + 1. Short edges have no choice; a long one has its label where there
    # are fewest, and near its end.
    labels: list[list[int]] = [[] for _ in range(last)]

    def gaps(index: int) -> range:
        source, target, _ = graph.edges[index]
        return range(depth[source], depth[target])

    for index in sorted(range(len(graph.edges)), key=lambda index: len(gaps(index))):
        if graph.edges[index][2]:
            min((labels[gap] for gap in reversed(gaps(index))), key=len).append(index)

    # A column of labels is there only where there is a label.
    columns: list[tuple[int, bool]] = []
    for level in range(last + 1):
        columns += [(level, False), (level, True)] if level < last and labels[level] else [(level, False)]
    nodes = {name: Item("node", name, columns.index((depth[name], False)), NODE_WIDTH) for name in graph.nodes}
    edges = []
    for index, (source, target, operation) in enumerate(graph.edges):
        way = [nodes[source]]
        for column in range(nodes[source].column + 1, nodes[target].column):
            level, is_label = columns[column]
            if is_label and index in labels[level]:
                way.append(Item("label", operation, column, text_width(operation, LABEL_SIZE) + 8.0, LABEL_HEIGHT))
            else:
                way.append(Item("line", "", column))
        links = [Link(left, right) for left, right in pairwise([*way, nodes[target]])]
        for link in links:
            link.left.after.append(link)
            link.right.before.append(link)
        edges.append(links)
    for item in nodes.values():
        item.height = max(NODE_HEIGHT, PORT * max(len(item.before), len(item.after)) + 8.0)
        item.width = max(NODE_WIDTH, sum(text.width for text in _name(item.text, 0.0, 0.0)) + 10.0)
    return list(nodes.values()), edges


def _ordered(columns: list[list[Item]], sweeps: int = 24) -> list[list[Item]]:
    """Columns in an order with few crossings; the first keeps its own.

    Sweeps to and fro: each column by the mean rank of its neighbours on one side, then by swapping items that are next
    to each other. The best order of all sweeps counts.
    """
    best, fewest = columns, _crossings(columns)
    for sweep in range(sweeps):
        columns = [list(column) for column in columns]
        forward = sweep % 2 == 0
        for index in range(1, len(columns)) if forward else range(len(columns) - 2, 0, -1):
            ranks = _ranks(columns[index - 1 if forward else index + 1])
            means = _ranks(columns[index])
            for item in columns[index]:
                others = [link.left for link in item.before] if forward else [link.right for link in item.after]
                if others:
                    means[item] = sum(ranks[other] for other in others) / len(others)
            columns[index].sort(key=means.__getitem__)
        for index in range(1, len(columns)):
            _swap(columns, index)
        crossings = _crossings(columns)
        if crossings < fewest:
            best, fewest = columns, crossings
    return best


def _ranks(column: Sequence[Item]) -> dict[Item, float]:
    return {item: float(rank) for rank, item in enumerate(column)}


def _swap(columns: list[list[Item]], index: int) -> None:
    """Swap neighbours in a column as long as that saves a crossing."""
    column = columns[index]
    ranks = {item: rank for side in columns[index - 1 : index + 2 : 2] for item, rank in _ranks(side).items()}
    better = True
    while better:
        better = False
        for place, (upper, lower) in enumerate(pairwise(column)):
            sides = [([link.left for link in upper.before], [link.left for link in lower.before])]
            sides += [([link.right for link in upper.after], [link.right for link in lower.after])]
            pairs = [(ranks[a], ranks[b]) for uppers, lowers in sides for a in uppers for b in lowers]
            if sum(a > b for a, b in pairs) > sum(a < b for a, b in pairs):
                column[place : place + 2] = [lower, upper]
                better = True
                break


def _crossings(columns: list[list[Item]]) -> int:
    total = 0
    for left, right in pairwise(columns):
        ranks = _ranks(right)
        ends = [[ranks[link.right] for link in item.after] for item in left]
        total += sum(a > b for i, upper in enumerate(ends) for lower in ends[i + 1 :] for a in upper for b in lower)
    return total


def _set_ports(nodes: Sequence[Item], columns: Sequence[Sequence[Item]]) -> None:
    """Where edges meet their nodes: apart, in the order of what they lead to."""
    ranks = {item: rank for column in columns for item, rank in _ranks(column).items()}
    for node in nodes:
        for place, link in enumerate(sorted(node.before, key=lambda link: ranks[link.left])):
            link.right_port = PORT * (place - 0.5 * (len(node.before) - 1))
        for place, link in enumerate(sorted(node.after, key=lambda link: ranks[link.right])):
            link.left_port = PORT * (place - 0.5 * (len(node.after) - 1))


def _place(columns: list[list[Item]], sweeps: int = 60) -> None:
    """Heights: edges as level as can be, items in order and without overlap; the highest box begins at 0.

    A column's heights are the least-squares ones that keep the distances (pool adjacent violators), given the columns
    beside it. Pieces of one line pull at each other most, so that long lines are straight.
    """
    for column in columns:
        offsets = _offsets(column)
        for item, offset in zip(column, offsets, strict=True):
            item.y = offset - 0.5 * offsets[-1]
    for sweep in range(sweeps):
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            wanted, weights = [], []
            for item in column:
                pull = [(link.left.y + link.left_port - link.right_port, link.left) for link in item.before]
                pull += [(link.right.y + link.right_port - link.left_port, link.right) for link in item.after]
                pull = pull or [(item.y, item)]
                strengths = [1.0 if "node" in (item.sort, other.sort) else 6.0 for _, other in pull]
                weights.append(sum(strengths))
                wanted.append(sum(y * strength for (y, _), strength in zip(pull, strengths, strict=True)) / weights[-1])
            offsets = _offsets(column)
            heights = _isotonic([y - offset for y, offset in zip(wanted, offsets, strict=True)], weights)
            for item, height, offset in zip(column, heights, offsets, strict=True):
                item.y = height + offset
    top = min((item.y - 0.5 * item.height for column in columns for item in column), default=0.0)
    for item in (item for column in columns for item in column):
        item.y -= top


def _offsets(column: Sequence[Item]) -> list[float]:
    """Least distance of each item from the first."""
    offsets = [0.0] if column else []
    for upper, lower in pairwise(column):
        free = max(SPACING[upper.sort], SPACING[lower.sort])
        offsets.append(offsets[-1] + 0.5 * (upper.height + lower.height) + free)
    return offsets


def _isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The numbers that never fall and are closest to ``values`` in weighted least squares."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, total, count = pools.pop()
            weight = total + pool[1]
            pool = ((mean * total + pool[0] * pool[1]) / weight, weight, count + pool[2])
        pools.append(pool)
    return [mean for mean, _, count in pools for _ in range(count)]


def draw_graph(graph: Graph) -> Drawing:
    """The cell, without its title."""
    places = layout(graph)
    shapes: list[Shape] = []
    joined = zip(graph.edges, places.lines(), strict=True)
    # Plain lines below those that say something.
    for (_, _, operation), points in sorted(joined, key=lambda pair: bool(pair[0][2])):
        shapes.append(kind_of(operation).line(points))
    for item in (item for column in places.columns for item in column if item.sort == "label"):
        box = places.box(item)
        shapes.append(Box(box.x, box.y, box.width, box.height, fill=PAPER, radius=3.0))
        shapes.append(Text(places.middles[item.column], item.y, item.text, LABEL_SIZE, kind_of(item.text).colour))
    for node in places.nodes:
        box = places.box(node)
        fill = INNER if node.before and node.after else OUTPUT if node.before else INPUT
        shapes.append(Box(box.x, box.y, box.width, box.height, fill, INK, 1.0, 4.0, node.text))
        shapes += _name(node.text, places.middles[node.column], node.y)
    width = places.middles[-1] + 0.5 * places.widths[-1]
    return Drawing(
        width, max((item.y + 0.5 * item.height for c in places.columns for item in c), default=0.0), tuple(shapes)
    )


def _name(name: str, x: float, y: float) -> list[Text]:
    """A node's name in its middle; ``c_{k-1}`` with a subscript."""
    match = re.fullmatch(r"(.+)_\{(.+)\}", name)
    if match is None:
        return [Text(x, y, name, 10.0)]
    base, sub = match.groups()
    text, below = Text(x, y, base, 10.0), Text(x, y + 3.0, sub, 7.5)
    left = x - 0.5 * (text.width + below.width)
    return [
        Text(left, y, base, 10.0, anchor="start"),
        Text(left + text.width, y + 3.0, sub, 7.5, anchor="start"),
    ]


def draw_legend(kinds: Sequence[Kind]) -> Drawing:
    """The lines that stand for these kinds of operation."""
    shapes: list[Shape] = []
    x = 0.0
    for kind in kinds:
        shapes.append(kind.line(((x, 6.0), (x + 26.0, 6.0)), arrow=False))
        text = Text(x + 31.0, 6.0, kind.name, 8.0, kind.colour, anchor="start")
        shapes.append(text)
        x = text.x + text.width + 16.0
    return Drawing(max(x - 16.0, 0.0), 12.0, tuple(shapes))
