"""What merged into what: exactly the nodes that a new one computes instead of, at any number of passes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from turbocompile.build.compile import compile_programs
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.errors import EngineError
from turbocompile.ir.graph_view import CALL, INPUT, GraphView, read_views
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Recipe, Settings
from turbocompile.rewrite.facts import facts
from turbocompile.rewrite.lineage import begin, follow, graph_views
from turbocompile.rewrite.match import Pass, op, rewrite, variables
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import run_passes

aten = torch.ops.aten
F = nn.functional
(x,) = variables("x")


class Block(nn.Module):
    """A modulated norm, whose norm is read twice, and a gated residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, scale, shift, gate):
        norm = F.layer_norm(x, (32,))
        y = norm * (1 + scale) + shift
        return x + gate * self.down(F.gelu(self.up(y), approximate="tanh")) + torch.sin(norm)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.modulation = nn.Linear(8, 96)

    def forward(self, x, c):
        scale, shift, gate = self.modulation(c).unsqueeze(1).chunk(3, dim=-1)
        for block in self.blocks:
            x = block(x, scale, shift, gate)
        return x


def views_of(model: nn.Module, args=(), kwargs=None, target="cpu", passes=None) -> dict[str, GraphView]:
    recipe = Recipe.from_dict({"model": {"preset": "wan-tiny"}, "target": target, "passes": passes or {}})
    programs = {"call": capture(model, args, kwargs or {})}
    return compile_programs("m", programs, ModuleTensors(model), resolve(recipe)).views


def merges(view: GraphView) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What passes made: name -> (names before, passes)."""
    made = [n for n in view.after if n.passes and not n.free]
    return {n.name: (tuple(view.before[o].name for o in n.origins), n.passes) for n in made}


@pytest.fixture(scope="module")
def views():
    return views_of(Model().eval(), (torch.randn(2, 6, 32), torch.randn(2, 8)))


def test_a_new_node_stands_for_all_that_the_old_one_was_computed_by(views):
    """And no more: the norm, which sin reads too, is computed on, and stands for itself besides."""
    view = views["blocks"]
    assert merges(view) == {
        "adaln": (("layer_norm", "add", "mul", "add_1"), ("adaln",)),
        "gated_residual": (("mul_1", "add_2"), ("residual_norm",)),
    }
    norm = next(n for n in view.after if n.name == "layer_norm")
    assert ([view.before[o].name for o in norm.origins], norm.passes) == (["layer_norm"], ())


def test_what_no_pass_touched_stands_for_itself(views):
    for view in views.values():
        for node in view.after:
            if not node.passes and not node.free:
                assert node.name in {view.before[o].name for o in node.origins}


def test_through_several_passes_it_stands_for_what_was_there_first(wan, wan_call):
    view = views_of(wan(), kwargs=wan_call(), target="sm90", passes={"attention": "sage", "w8a8": "fp8"})["blocks"]
    found = merges(view)
    before = {n.name: n for n in view.before}
    op_of = {n.name: n.op for n in view.after}
    turned = [(origins, passes) for name, (origins, passes) in found.items() if op_of[name].endswith(".qk_norm_rope")]
    assert len(turned) == 3
    for origins, passes in turned:
        kinds = {before[o].op for o in origins}
        assert "aten.rms_norm" in kinds
        assert {"aten.linear", "aten.scaled_dot_product_attention", "aten.layer_norm"}.isdisjoint(kinds)
        assert passes[-1] == "qk_norm_rope"
        assert ("aten.stack" in kinds) == ("rope" in passes)
    (whole,) = [merged for name, merged in found.items() if op_of[name].endswith(".norm_sage_attention")]
    assert {before[o].op for o in whole[0]} >= {"aten.scaled_dot_product_attention", "aten.rms_norm", "aten.stack"}
    assert whole[1][-1] == "norm_attention"
    assert set(whole[1]) == {"attention", "rope", "qk_norm_rope", "norm_attention"}
    wide = [origins for name, (origins, passes) in found.items() if passes == ("fuse_qkv", "w8a8")]
    assert sorted(len(o) for o in wide if o) == [2, 3]
    assert {before[o].op for origins in wide for o in origins} == {"aten.linear"}
    # A quantization of activations is new work; what quantizes within a norm stands for the norm.
    assert {origins for name, (origins, _) in found.items() if op_of[name] == "turbocompile.quantize"} == {()}


def test_nothing_that_cost_something_gets_lost(wan, wan_call):
    """Before the passes it is computed; after them something stands for it."""
    for target, passes in (("cpu", {}), ("sm90", {"attention": "sage", "w8a8": "fp8"})):
        for view in views_of(wan(), kwargs=wan_call(), target=target, passes=passes).values():
            stood_for = {o for n in view.after for o in n.origins}
            assert {n.name for i, n in enumerate(view.before) if not n.free and i not in stood_for} == set()


def test_calls_of_a_block_in_a_row_are_one_node(views):
    shell = views["shell"]
    for nodes in (shell.before, shell.after):
        (call,) = [n for n in nodes if n.op == CALL]
        assert call.code == "blocks x 3: blocks.0. to blocks.2."
    assert views["blocks"].calls == 3
    assert [n.module for n in shell.before if n.op == INPUT] == ["x", "c"]
    assert list(views) == ["blocks", "shell"]


def test_without_passes_every_node_stays_itself():
    recipe = Recipe.from_dict({"model": {"preset": "wan-tiny"}, "target": "cpu", "passes": "off"})
    model = Model().eval()
    programs = {"call": capture(model, (torch.randn(2, 6, 32), torch.randn(2, 8)), {})}
    made = compile_programs("m", programs, ModuleTensors(model), resolve(recipe))
    for view in made.views.values():
        assert [n.name for n in view.before] == [n.name for n in view.after]
        assert [n.origins for n in view.after] == [(i,) for i in range(len(view.after))]


def test_a_rewrite_to_a_node_that_is_there_hands_its_work_on():
    class Twice(nn.Module):
        def forward(self, x):
            return torch.tanh(torch.abs(torch.abs(x)))

    @rewrite(op(aten.abs.default)(op(aten.abs.default)(x)))
    def once(m):
        return m.root.args[0]

    program = capture(Twice(), (torch.randn(4),))
    normalize(program)
    before = program.copy()
    run_passes(program, resolve(Settings.from_dict({"target": "cpu"})), passes=[Pass("once", "exact", [once])])
    view = graph_views(before, program)["shell"]
    kept = next(n for n in view.after if n.op == "aten.abs")
    assert [view.before[o].name for o in kept.origins] == ["abs_1", "abs_2"]


def test_following_asks_nothing_of_nodes_that_were_never_marked():
    program = capture(Model().eval(), (torch.randn(2, 6, 32), torch.randn(2, 8)))
    nodes = [n for n in program.shell.graph.nodes if n.op == "call_function"]
    follow("p", nodes[:1], [(nodes[0], nodes[0])])
    begin(program)
    assert all(facts(n).origins == {n.name} for n in nodes)


# ---------------------------------------------------------------------------------------------------------------- data


def test_it_survives_json(views):
    data = json.loads(json.dumps({k: v.to_dict() for k, v in views.items()}, allow_nan=False))
    assert read_views(data) == views


def node(**changes):
    return {"name": "a", "op": "input", "code": "a", "shape": "", "module": "", "flops": 0, "bytes": 0, **changes}


GOOD = {"calls": 1, "before": [node()], "after": [node(origins=[0]), node(name="b", op="aten.sin", reads=[0])]}
DAMAGED = [
    ("after", node(reads=[0])),
    ("after", node(reads=[-1])),
    ("after", node(reads="0")),
    ("after", node(reads=3)),
    ("after", node(origins=[1])),
    ("before", node(origins=[0])),
    ("after", node(passes=[3])),
    ("after", node(flops=-1)),
    ("after", node(flops=1.5)),
    ("after", node(bytes=10**60)),
    ("after", node(name="a" * 100_000)),
    ("after", node(code=None)),
    ("after", {"name": "a"}),
    ("after", "a"),
]


@pytest.mark.parametrize(("side", "bad"), DAMAGED, ids=[str(d)[:60] for d in DAMAGED])
def test_damaged_data_is_refused_in_one_sentence(side, bad):
    assert GraphView.from_dict(GOOD)
    data = copy.deepcopy(GOOD)
    data[side][0] = bad
    with pytest.raises(EngineError, match=r"graphs are damaged.*build the engine again") as caught:
        GraphView.from_dict(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "x", {"blocks": None}, {"blocks": {}}, {"blocks": {"calls": 1}}], ids=str)
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(EngineError, match="graphs are damaged"):
        read_views(data)
