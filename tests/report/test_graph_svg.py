"""The drawing of a graph before and after the passes: data flows down, nothing overlaps, halves stand side by side."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from turbocompile.ir.graph_view import GraphView, NodeView
from turbocompile.report.graph_svg import draw

SVG = "{http://www.w3.org/2000/svg}"


def node(name, op="aten.mul", reads=(), origins=(), passes=(), flops=1, module=""):
    return NodeView(name, op, f"{name} = {op}", "2x3 fp32", module, flops, flops, tuple(reads), tuple(origins), passes)


@pytest.fixture(scope="module")
def view() -> GraphView:
    """layer_norm(x) * scale + shift, on its way around a linear, becomes adaln."""
    before = (
        node("x", "input"), node("scale", "input"), node("shift", "input"),
        node("norm", "aten.layer_norm", [0]), node("mul", reads=[3, 1]), node("look", "aten.reshape", [2], flops=0),
        node("add", "aten.add", [4, 5]), node("linear", "aten.linear", [6], module="ffn.net.0.proj"),
        node("sum", "aten.add", [7, 0]), node("output", "output", [8]),
    )  # fmt: skip
    after = (
        node("x", "input", [], [0]), node("scale", "input", [], [1]), node("shift", "input", [], [2]),
        node("adaln", "turbocompile.adaln", [0, 1, 2], [3, 4, 6], ("norms", "adaln")),
        node("linear", "aten.linear", [3], [7], module="ffn.net.0.proj"),
        node("sum", "aten.add", [4, 0], [8]), node("output", "output", [5], [9]),
    )  # fmt: skip
    return GraphView(3, before, after)


def drawn(view: GraphView) -> ElementTree.Element:
    return ElementTree.fromstring(draw(view, "k", lambda n: 1 if n.passes else None, lambda side, i: f"{side}{i}"))


def box(element) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a node."""
    if (rect := element.find(f"{SVG}rect")) is not None:
        x, y, width, height = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
        return x, y, x + width, y + height
    circle = element.find(f"{SVG}circle")
    x, y, r = (float(circle.get(k)) for k in ("cx", "cy", "r"))
    return x - r, y - r, x + r, y + r


def nodes(svg) -> dict[str, ElementTree.Element]:
    return {g.get("id"): g for g in svg.iter(f"{SVG}g")}


def test_every_node_is_there_once_and_within_the_picture(view):
    svg = drawn(view)
    found = nodes(svg)
    assert set(found) == {f"k-b{i}" for i in range(10)} | {f"k-a{i}" for i in range(7)}
    _, _, width, height = map(float, svg.get("viewBox").split())
    for element in found.values():
        left, top, right, bottom = box(element)
        assert left >= -1
        assert top >= 0
        assert right <= width + 1
        assert bottom <= height + 1


def test_data_flows_down(view):
    found = nodes(drawn(view))
    for side, half in (("b", view.before), ("a", view.after)):
        for i, one in enumerate(half):
            for read in one.reads:
                assert box(found[f"k-{side}{read}"])[3] < box(found[f"k-{side}{i}"])[1], one.name


def test_nothing_overlaps(view):
    for one, other in itertools.combinations(map(box, nodes(drawn(view)).values()), 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


def test_what_was_made_stands_beside_the_last_of_what_it_replaced(view):
    found = nodes(drawn(view))
    assert box(found["k-a3"])[1] == box(found["k-b6"])[1]  # adaln beside the add
    assert box(found["k-a4"])[1] == box(found["k-b7"])[1]  # the linear beside itself


def test_peers_and_colors_are_mutual_and_what_is_gone_is_marked(view):
    found = nodes(drawn(view))
    peers = {name: set(g.get("data-peers").split()) for name, g in found.items()}
    for name, others in peers.items():
        assert all(name in peers[other] for other in others)
    assert peers["k-a3"] == {"k-b3", "k-b4", "k-b6"}
    assert [n for n, g in found.items() if "p1" in g.get("class").split()] == ["k-b3", "k-b4", "k-b6", "k-a3"]
    assert [n for n, g in found.items() if "gone" in g.get("class").split()] == ["k-b5"]
    assert "3" in [t.text for t in found["k-a3"].iter(f"{SVG}text")]  # how many it stands for


def test_nothing_is_markup():
    evil = '</title><script>alert(1)</script>"'
    one = NodeView(evil, evil, evil, evil, evil, 1, 1, ())
    svg = draw(GraphView(1, (one,), ()), "k", lambda n: None, lambda side, i: evil)
    assert "<script" not in svg
    assert next(ElementTree.fromstring(svg).iter(f"{SVG}title")).text == evil
    assert not re.search(r"<[^>]*\sstyle=", svg)  # which the page's policy would not allow


def test_the_empty_graph_is_a_picture_too():
    assert nodes(drawn(GraphView(1, (), ()))) == {}


def test_a_long_chain_with_a_line_around_it_is_drawn_soon():
    """A model without repeated blocks: 1,500 nodes, each read by the next one and by the last."""
    chain = [node("x", "input"), *(node(f"n{i}", reads=[i]) for i in range(1_400))]
    last = node("end", reads=[0, *range(700, 720), 1400])
    found = nodes(drawn(GraphView(1, (*chain, last), ())))
    assert len(found) == 1402
