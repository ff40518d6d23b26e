import io
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nasplat import SearchSpace, space_from
from nasplat.drawing import Block, Graph, Picture, Stages
from nasplat.drawing.cells import KINDS, Layout, kind_of, layout
from nasplat.drawing.shapes import Box, Text
from nasplat.drawing.stages import draw_stages
from nasplat.errors import ArchitectureError, InvalidInputError
from nasplat.result import RecordedSpace

NODES = ("c_{k-2}", "c_{k-1}", "0", "1", "2", "3", "c_{k}")
OPERATIONS = ("max_pool_3x3", "identity", "gconv_5x5", "dil_gconv_3x3", "squeeze")


def cell(rng: np.random.Generator, title: str = "normal cell") -> Graph:
    """Four nodes of two edges each, as in DARTS; all are concatenated. Sources may be the same."""
    edges = [
        (NODES[source], NODES[node], str(rng.choice(OPERATIONS)))
        for node in range(2, 6)
        for source in rng.integers(node, size=2)
    ]
    return Graph(title, NODES, (*edges, *((node, "c_{k}", "") for node in NODES[2:6])))


def tangle(rng: np.random.Generator, nodes: int = 12, edges: int = 24) -> Graph:
    """Any graph: several inputs and outputs, lone nodes, several edges between two nodes, names of any length."""
    names = tuple(f"{'node' * int(rng.integers(0, 4))}{index}" for index in range(nodes))
    pairs = [sorted(rng.choice(nodes, size=2, replace=False)) for _ in range(edges)]
    return Graph("tangle", names, tuple((names[a], names[b], "conv " * int(rng.integers(0, 4))) for a, b in pairs))


MOBILE = Stages(
    "a network",
    (
        Block("stem", ("3x3 convolution",), 32, stride=2),
        *(Block(f"stage {i}", (f"kernel {i}", "reduction 6"), 24 * i, 1 + i % 4, 1 + i % 2) for i in range(1, 20)),
        Block("classifier <10 & more>"),
    ),
)


@pytest.fixture
def picture() -> Picture:
    rng = np.random.default_rng(0)
    return Picture((cell(rng), cell(rng, "reduction cell"), Stages("a network", MOBILE.blocks[16:])))


Placed = list[tuple[Graph, Layout]]


@pytest.fixture(scope="module")
def placed() -> Placed:
    """30 cells and 6 graphs without any order, laid out."""
    rng = np.random.default_rng(1)
    graphs = [cell(rng) for _ in range(30)] + [tangle(rng) for _ in range(6)]
    return [(graph, layout(graph)) for graph in graphs]


def boxes_of(places: Layout, *sorts: str) -> list[Box]:
    return [places.box(item) for column in places.columns for item in column if item.sort in sorts]


def overlap(a: Box, b: Box) -> bool:
    """By more than rounding."""
    return a.x + 1e-6 < b.right and b.x + 1e-6 < a.right and a.y + 1e-6 < b.bottom and b.y + 1e-6 < a.bottom


# Cells.


def test_no_label_lies_on_another_or_on_a_node(placed: Placed) -> None:
    for graph, places in placed:
        assert len(boxes_of(places, "node")) == len(graph.nodes)
        assert len(boxes_of(places, "label")) == sum(bool(operation) for *_, operation in graph.edges)
        boxes = boxes_of(places, "node", "label")
        assert not [(a, b) for a, b in combinations(boxes, 2) if overlap(a, b)]


def test_texts_have_room(placed: Placed) -> None:
    for _, places in placed[:10]:
        for item in (item for column in places.columns for item in column if item.text):
            assert places.box(item).width >= Text(0, 0, re.sub(r"[_{}]", "", item.text), 9.0).width


def test_no_line_runs_through_a_node_or_a_text(placed: Placed) -> None:
    """But through the text that is its own."""
    for graph, places in placed:
        for (_, _, operation), points in zip(graph.edges, places.lines(), strict=True):
            hit = []
            for (x0, y0), (x1, y1) in pairwise(points):
                assert x0 < x1 + 1e-6
                # A curve stays between the heights of its ends.
                piece = Box(x0, min(y0, y1) - 0.5, x1 - x0, abs(y1 - y0) + 1.0)
                hit += [box for box in boxes_of(places, "node", "label") if overlap(piece, box)]
            assert len(hit) == bool(operation)


def test_an_edge_leads_from_its_source_to_its_target_and_has_its_own_ends(placed: Placed) -> None:
    for graph, places in placed:
        boxes = {item.text: places.box(item) for item in places.nodes}
        lines = places.lines()
        for (source, target, _), points in zip(graph.edges, lines, strict=True):
            assert points[0][0] == boxes[source].right and boxes[source].y < points[0][1] < boxes[source].bottom
            assert points[-1][0] == boxes[target].x and boxes[target].y < points[-1][1] < boxes[target].bottom
        assert len({points[0] for points in lines}) == len({points[-1] for points in lines}) == len(lines)


def test_a_label_stands_on_its_own_edge(placed: Placed) -> None:
    for graph, places in placed:
        for (_, _, operation), links, points in zip(graph.edges, places.edges, places.lines(), strict=True):
            labels = [link.right for link in links if link.right.sort == "label"]
            assert [label.text for label in labels] == [operation] * bool(operation)
            for label in labels:
                middle = places.middles[label.column]
                assert any(x0 < middle < x1 and y0 == y1 == label.y for (x0, y0), (x1, y1) in pairwise(points))


def test_nodes_stand_in_columns_by_their_longest_path() -> None:
    edges = (("a", "x", "conv"), ("b", "y", "conv"), ("x", "y", "conv"), ("x", "out", ""), ("y", "out", ""))
    places = layout(Graph("chain", ("a", "b", "x", "y", "out"), edges))
    left = {item.text: places.box(item).x for item in places.nodes}
    assert left["a"] == left["b"] == 0.0
    assert left["a"] < left["x"] < left["y"] < left["out"]


def test_lines_that_need_not_cross_do_not() -> None:
    edges = (("a", "x", "conv"), ("b", "y", "conv"), ("c", "z", "conv"))
    places = layout(Graph("apart", ("a", "b", "c", "z", "y", "x"), edges))
    heights = {item.text: item.y for item in places.nodes}
    assert heights["a"] < heights["b"] < heights["c"]
    assert heights["x"] < heights["y"] < heights["z"]


def test_a_lone_edge_is_straight() -> None:
    places = layout(Graph("lone", ("a", "b", "c"), (("a", "b", "conv"), ("b", "c", ""))))
    assert len({y for points in places.lines() for _, y in points}) == 1


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("gconv_3x3", "convolution"),
        ("sep_conv_5x5", "convolution"),
        ("sandglass_3x3", "convolution"),
        ("dil_gconv_5x5", "dilated convolution"),
        ("max_pool_3x3", "pool"),
        ("skip_connect", "skip"),
        ("identity", "skip"),
        ("squeeze", "other"),
        ("", ""),
    ],
)
def test_kinds_of_operation(operation: str, kind: str) -> None:
    assert kind_of(operation).name == kind


def test_kinds_differ_without_colour() -> None:
    assert len({(kind.width, kind.dashes) for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        (("a", "b"), (("a", "c", "conv"),), "from 'a' to 'c'; legal: from an earlier to a later one of a, b"),
        (("a", "b"), (("b", "a", "conv"),), "from 'b' to 'a'"),
        (("a", "b"), (("a", "a", "conv"),), "from 'a' to 'a'"),
        (("a", "a"), (), "different names"),
    ],
)
def test_a_graph_that_cannot_be_drawn_is_refused(
    nodes: tuple[str, ...], edges: tuple[tuple[str, str, str], ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        Graph("bad", nodes, edges)


# Stages.


def holds(box: Box, text: Text) -> bool:
    return box.x < text.x < box.right and box.y < text.y < box.bottom


def blocks_of(stages: Stages) -> dict[str, Box]:
    """The front of each block, by the heading that stands in it."""
    shapes = draw_stages(stages).shapes
    names = {block.name for block in stages.blocks}
    boxes = [shape for shape in shapes if isinstance(shape, Box) and shape.line_width == 1.0 and shape.edge]
    texts = [shape for shape in shapes if isinstance(shape, Text) and shape.text in names]
    found = {text.text: box for text in texts for box in boxes if holds(box, text)}
    assert len(found) == len(boxes) == len(names)
    return found


def test_blocks_are_in_reading_order_and_apart() -> None:
    boxes = list(blocks_of(MOBILE).values())
    assert not [(a, b) for a, b in combinations(boxes, 2) if overlap(a, b)]
    rows = sorted({round(box.y + 0.5 * box.height, 3) for box in boxes})
    assert 1 < len(rows) <= 6
    places = [(rows.index(round(box.y + 0.5 * box.height, 3)), box.x) for box in boxes]
    assert places == sorted(places)
    assert draw_stages(MOBILE).width < 720


def test_texts_are_inside_of_their_blocks() -> None:
    boxes = blocks_of(MOBILE)
    texts = [shape for shape in draw_stages(MOBILE).shapes if isinstance(shape, Text)]
    for block in MOBILE.blocks:
        box = boxes[block.name]
        held = [text for text in texts if holds(box, text)]
        assert {text.text for text in held} >= {block.name, *block.lines}
        for text in held:
            assert box.x < text.left and text.left + text.width < box.right
            assert box.y < text.y - 0.5 * text.size and text.y + 0.5 * text.size < box.bottom
        for upper, lower in pairwise(held):
            assert lower.y - upper.y > upper.size


def test_more_channels_are_a_taller_block() -> None:
    boxes = blocks_of(Stages("s", tuple(Block(str(c), ("same",), c) for c in (8, 16, 64, 4096))))
    heights = [box.height for box in boxes.values()]
    assert heights == sorted(heights) and len(set(heights)) == 4
    # Logarithmic: two doublings are twice one.
    assert heights[2] - heights[1] == pytest.approx(2 * (heights[1] - heights[0]))
    assert heights[3] < 3 * heights[0]


def test_strides_and_repeats_are_said() -> None:
    svg = Picture((Stages("s", (Block("once", channels=7), Block("many", repeats=3, stride=2))),)).svg()
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert "x 3" in texts and "stride 2" in texts and "7 channels" in texts
    assert not {"x 1", "stride 1", "0 channels"} & set(texts)


@pytest.mark.parametrize("wrong", [{"channels": -1}, {"repeats": 0}, {"stride": 0}])
def test_a_block_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=f"'bad' has {next(iter(wrong))} .*; legal: from"):
        Block("bad", **wrong)  # type: ignore[arg-type]


# Pictures.


def test_svg_holds_every_name_as_text(picture: Picture) -> None:
    root = ElementTree.fromstring(picture.svg())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {element.text for element in root.iter() if element.text and element.text.strip()}
    for part in picture.sketch:
        assert part.title in texts
        if isinstance(part, Graph):
            assert texts >= {*part.nodes, *(operation for *_, operation in part.edges if operation)}
        else:
            assert texts >= {text for block in part.blocks for text in (block.name, *block.lines)}
    used = {kind_of(op).name for part in picture.sketch if isinstance(part, Graph) for *_, op in part.edges if op}
    assert used == {kind.name for kind in KINDS} & texts


def test_everything_is_on_the_page(placed: Placed) -> None:
    for graph, _ in placed[::7]:
        root = ElementTree.fromstring(Picture((graph, MOBILE)).svg())
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root:
            if element.tag.endswith("rect"):
                x, y = float(element.attrib.get("x", 0)), float(element.attrib.get("y", 0))
                assert x >= 0 and x + float(element.attrib["width"]) <= width
                assert y >= 0 and y + float(element.attrib["height"]) <= height
            elif element.tag.endswith("text"):
                assert float(element.attrib["x"]) + float(element.attrib["textLength"]) <= width
            elif element.tag.endswith("path"):
                numbers = [float(number) for number in re.findall(r"-?[\d.]+", element.attrib["d"])]
                assert min(numbers) >= 0 and max(numbers[::2]) <= width and max(numbers[1::2]) <= height


@pytest.mark.parametrize("dpi", [60, 150])
def test_png_is_of_the_size_of_the_page(picture: Picture, dpi: float) -> None:
    width, height = (float(number) for number in re.findall(r'="([\d.]+)pt"', picture.svg()))
    image = Image.open(io.BytesIO(picture.png(dpi=dpi)))
    assert image.size == pytest.approx((width * dpi / 72, height * dpi / 72), abs=1)
    colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None and max(colours)[1] == (255, 255, 255) and len(colours) > 20


def test_png_shows_each_box_where_the_svg_has_it(picture: Picture) -> None:
    image = Image.open(io.BytesIO(picture.png(dpi=144))).convert("RGB")
    rectangles = [e.attrib for e in ElementTree.fromstring(picture.svg()).iter() if e.tag.endswith("rect")][1:]
    for box in [box for box in rectangles if box.get("stroke-width") == "1" and box["stroke"] != "none"]:
        # In the left lower corner are neither texts nor ports.
        x, y = float(box["x"]) + 5.5, float(box["y"]) + float(box["height"]) - 3.0
        assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((round(2 * x), round(2 * y)))) == box["fill"]


def test_equal_sketches_are_equal_bytes(picture: Picture, tmp_path: Path) -> None:
    again = Picture(tuple(picture.sketch))
    for suffix in (".svg", ".png", ".pdf"):
        first, second = picture.save(tmp_path / f"a{suffix}"), again.save(tmp_path / f"b{suffix}")
        assert first.read_bytes() == second.read_bytes()
    cell = Picture(picture.sketch[:1])
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: (cell.svg(), cell.png()), range(4)))) == 1


def test_save_by_suffix(picture: Picture, tmp_path: Path) -> None:
    starts = {"best.svg": b"<svg", "best.PNG": b"\x89PNG", "best.pdf": b"%PDF"}
    for name, start in starts.items():
        assert picture.save(tmp_path / "new" / name) == tmp_path / "new" / name
        assert (tmp_path / "new" / name).read_bytes().startswith(start)
    assert (tmp_path / "new" / "best.svg").read_text() == picture.svg() == picture._repr_svg_()
    for name in ("best.jpg", "best"):
        with pytest.raises(InvalidInputError, match=rf"'{name}'; legal: a name in \.svg, \.png or \.pdf"):
            picture.save(tmp_path / "other" / name)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InvalidInputError, match="dpi is 0"):
        picture.png(dpi=0)


def test_what_has_nothing_in_it_is_drawn() -> None:
    parts = (Graph("no nodes", (), ()), Graph("no edges", ("a", "b"), ()), Stages("no blocks", ()))
    for picture in (Picture(()), Picture(parts)):
        ElementTree.fromstring(picture.svg())
        Image.open(io.BytesIO(picture.png())).verify()


def test_texts_are_taken_as_they_are() -> None:
    """No mathematics, no markup."""
    odd = Picture((Graph("$x_1$ & <b>", ("$a$", "<c>"), (("$a$", "<c>", '"$\\frac{1}{2}$"'),)),))
    texts = {element.text for element in ElementTree.fromstring(odd.svg()).iter()}
    assert texts >= {"$x_1$ & <b>", "$a$", "<c>", '"$\\frac{1}{2}$"'}
    assert odd.png()


def test_nothing_global_changes(picture: Picture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import matplotlib

    def state() -> object:
        # To read the backend is to choose one.
        settings = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
        return settings, list(warnings.filters)

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it is an error
    before = state()
    assert picture.svg() and picture.png() and picture.save(tmp_path / "a.pdf")
    assert state() == before


def test_a_users_settings_do_not_change_the_layout(picture: Picture) -> None:
    import matplotlib

    plain = picture.svg()
    with matplotlib.rc_context({"font.size": 30.0, "font.family": "serif", "text.usetex": True}):
        assert Picture(tuple(picture.sketch)).svg() == plain
        assert picture.png()


# By a space.


def test_a_space_draws_its_choices_as_blocks() -> None:
    space: SearchSpace = space_from(lambda genes: None, {f"layer{i}/width": (8, 16) for i in range(40)})  # type: ignore[arg-type, return-value]
    architecture = space.sample(np.random.default_rng(0))
    picture = space.draw(architecture)
    assert repr(picture) == f"<Picture of {space.name}>"
    texts = [element.text for element in ElementTree.fromstring(picture.svg()).iter() if element.text]
    assert texts.count("8") + texts.count("16") == 40
    assert set(texts) >= set(architecture.genes)
    assert len(blocks_of(picture.sketch[0])) == 40  # type: ignore[arg-type]
    other = space_from(lambda genes: None, {"a": (1, 2)})  # type: ignore[arg-type, return-value]
    with pytest.raises(ArchitectureError, match="cannot draw"):
        other.draw(architecture)


def test_what_only_a_folder_knows_is_drawn_too() -> None:
    space = RecordedSpace('Gone{"width":3}')
    picture = space.draw(space.architecture({"layer": "conv", "depth": 2}))
    assert repr(picture) == "<Picture of Gone>"
    texts = {element.text for element in ElementTree.fromstring(picture.svg()).iter()}
    assert texts >= {"layer", "conv", "depth", "2"}
