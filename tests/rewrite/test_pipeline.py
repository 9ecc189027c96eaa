"""The driver: every site ends rewritten or with a reason, named alike at any shape, counted over the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from turbocompile.capture.export import capture
from turbocompile.errors import TurbocompileError
from turbocompile.ir.program import is_op
from turbocompile.ir.weights import Load
from turbocompile.recipe.options import PassOptions, resolve
from turbocompile.recipe.schema import Settings
from turbocompile.rewrite.match import Pass, op, rewrite, variables
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import PASSES, load_pass, ordered, run_passes
from turbocompile.rewrite.results import Judgement, Verdict
from turbocompile.rewrite.run_pass import run_pass, sort

aten = torch.ops.aten
x, y = variables("x y")
gelu = op(aten.gelu.default)


ON = PassOptions(True)


def options(passes=None, target="cpu"):
    return resolve(Settings.from_dict({"target": target, "passes": passes or {}}))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)) + F.gelu(self.gate(x) * 2)) + torch.sin(x)


class Model(nn.Module):
    """Four blocks with two GELUs each, and one around them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.act = nn.GELU()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.act(x)


def program(tokens=6):
    made = capture(Model(), (torch.randn(2, tokens, 8),))
    normalize(made)
    assert made.count("blocks") == 4
    return made


@rewrite(gelu(x))
def to_tanh(m):
    return m.op(aten.tanh.default, m.x)


@rewrite(gelu(x * y))
def of_products(m):
    return m.op(aten.tanh.default, m.root.args[0])


def names(sub):
    return [n.target._opname for n in sub.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


def test_every_site_is_rewritten_and_counted_over_the_model():
    made = program()
    result = run_pass(made, Pass("p", "exact", [to_tanh]), ON)
    assert (result.sites, result.rewritten, result.skipped) == (9, 9, ())
    assert {(r.graph, r.site) for r in result.rewrites} == {
        ("shell", "shell:act"),
        ("blocks", "blocks:"),
        ("blocks", "blocks:#2"),
    }
    assert all("gelu" not in names(sub) for sub in made.graphs.values())


def test_what_does_not_match_is_skipped_with_its_reason_and_count():
    made = program()

    def gelus(sub):
        return [n for n in sub.graph.nodes if is_op(n, aten.gelu)]

    @rewrite(gelu(x * y), candidates=gelus)
    def picky(m):
        return m.op(aten.tanh.default, m.root.args[0]) if m.y == 2 else "is not doubled"

    result = run_pass(made, Pass("p", "exact", [picky]), ON)
    assert result.sites == result.rewritten + sum(count for _, _, count in result.skipped) == 9
    assert result.rewritten == 4
    assert sorted(result.skipped) == [
        ("blocks:", "does not have the form gelu((x * y))", 4),
        ("shell:act", "does not have the form gelu((x * y))", 1),
    ]


def test_a_refusal_is_the_reason_and_leaves_nothing_behind():
    made = program()
    before = {g: str(sub.graph) for g, sub in made.graphs.items()}

    @rewrite(gelu(x))
    def undecided(m):
        m.op(aten.tanh.default, m.op(aten.sin.default, m.x))
        m.weight("extra", Load("extra", (3,), torch.float32))
        return "changed its mind"

    result = run_pass(made, Pass("p", "exact", [undecided]), ON)
    assert {reason for _, reason, _ in result.skipped} == {"changed its mind"}
    assert {g: str(sub.graph) for g, sub in made.graphs.items()} == before
    assert all("extra" not in sub.weights for sub in made.graphs.values())


def test_a_site_of_two_rules_is_one_site():
    made = program()

    @rewrite(gelu(x))
    def never(m):
        return "never"

    result = run_pass(made, Pass("p", "exact", [never, of_products]), ON)
    assert (result.sites, result.rewritten) == (9, 4)
    reasons = {reason for _, reason, _ in result.skipped}
    assert reasons == {"never; does not have the form gelu((x * y))"}


def test_sites_count_as_many_as_the_rule_says():
    result = run_pass(program(), Pass("p", "exact", [rewrite(gelu(x), count=lambda node: 3)(to_tanh.function)]), ON)
    assert (result.sites, result.rewritten) == (27, 27)


def test_sites_have_the_same_names_at_another_shape():
    found = [run_pass(program(tokens), Pass("p", "exact", [to_tanh]), ON) for tokens in (6, 10)]
    assert [(r.graph, r.site, r.replaced) for r in found[0].rewrites] == [
        (r.graph, r.site, r.replaced) for r in found[1].rewrites
    ]


def test_old_and_new_nodes_are_told_by_name():
    made = program()
    before = {n.name for n in made.graphs["blocks"].graph.nodes if is_op(n, aten.gelu)}
    result = run_pass(made, Pass("p", "exact", [to_tanh]), ON)
    after = {n.name for n in made.graphs["blocks"].graph.nodes if is_op(n, aten.tanh)}
    pairs = dict(pair for r in result.rewrites if r.graph == "blocks" for pair in r.replaced)
    assert set(pairs) == before
    assert set(pairs.values()) == after
    raw, _ = result.raw["blocks"]
    assert after <= {n.name for n in raw.graph.nodes}


def test_equal_new_nodes_are_merged_and_both_sites_point_to_the_one():
    made = program()

    @rewrite(gelu(x))
    def input_only(m):
        return m.op(aten.tanh.default, m.sub.inputs()[0])

    result = run_pass(made, Pass("p", "exact", [input_only]), ON)
    block = made.graphs["blocks"]
    assert names(block).count("tanh") == 1
    new = {new for r in result.rewrites if r.graph == "blocks" for _, new in r.replaced}
    assert len(new) == 1
    assert new <= {n.name for n in block.graph.nodes}


def test_a_vetoed_site_keeps_its_name_and_tells_why():
    made = program()
    result = run_pass(made, Pass("p", "exact", [to_tanh]), ON, {"blocks:#2": "over its budget"})
    assert result.skipped == (("blocks:#2", "over its budget", 4),)
    assert result.rewritten == 5
    assert names(made.graphs["blocks"]).count("gelu") == 1


def test_a_pass_that_is_switched_off_lists_its_sites():
    made = program()
    before = {g: str(sub.graph) for g, sub in made.graphs.items()}
    off = options({"adaln": {"enabled": False}})
    (result,) = run_passes(made, off, passes=[Pass("adaln", "exact", [to_tanh])])
    assert (result.sites, result.rewritten) == (9, 0)
    assert {reason for _, reason, _ in result.skipped} == {"switched off in the recipe (enabled: false)"}
    assert {g: str(sub.graph) for g, sub in made.graphs.items()} == before


def test_a_pass_sees_its_options():
    """By its name, or by the section that it names; a pass of another package has none but that it runs."""
    seen = []

    @rewrite(gelu(x))
    def look(m):
        seen.append(m.options)
        return "looked"

    asked = options({"w8a8": {"format": "int8"}}, "sm90")
    passes = [
        Pass("w8a8", "exact", [look]),
        Pass("p", "exact", [look], section="attention"),
        Pass("q", "exact", [look]),
    ]
    run_passes(program(), asked, passes=passes)
    assert list(dict.fromkeys(map(id, seen)))[:2] == [id(asked.w8a8), id(asked.attention)]
    assert seen[-1] == ON


def test_several_roots_are_replaced_at_once_wherever_they_stand():
    """Both linears of x become halves of one, which must then stand before either is read."""
    made = program()

    def second_linears(sub):
        return [n for n in sub.graph.nodes if is_op(n, aten.gelu) and is_op(n.args[0], aten.mul)]

    @rewrite(candidates=second_linears)
    def together(m):
        block_input = m.sub.inputs()[0]
        linears = [n for n in m.sub.graph.nodes if is_op(n, aten.linear) and n.args[0] is block_input]
        both = m.op(aten.cat.default, [n.args[1] for n in linears], 0)
        bias = m.op(aten.cat.default, [n.args[2] for n in linears], 0)
        wide = m.op(aten.linear.default, block_input, both, bias)
        return {n: m.op(aten.slice.Tensor, wide, 2, 8 * i, 8 * i + 8) for i, n in enumerate(linears)}

    result = run_pass(made, Pass("p", "exact", [together]), ON)
    block = made.graphs["blocks"]
    assert [len(r.replaced) for r in result.rewrites] == [2]
    assert names(block).count("linear") == 2  # the wide one, and the one after the GELUs
    block.graph.lint()


def test_a_narrower_result_takes_the_place_of_the_casts_that_follow():
    class Cast(nn.Module):
        def forward(self, x):
            return F.gelu(x.float()).to(torch.bfloat16)

    made = capture(Cast(), (torch.randn(4, 8, dtype=torch.bfloat16),))
    normalize(made)

    @rewrite(gelu(x))
    def narrow(m):
        return m.op(aten.tanh.default, m.narrow(m.x))

    result = run_pass(made, Pass("p", "exact", [narrow]), ON)
    assert names(made.shell) == ["tanh"]
    assert made.shell.outputs()[0].meta["val"].dtype == torch.bfloat16
    assert [new for _, new in result.rewrites[0].replaced] == [made.shell.outputs()[0].name]


def test_a_narrower_result_that_is_read_wide_is_cast_back():
    class Wide(nn.Module):
        def forward(self, x):
            return F.gelu(x.float()) * 3

    made = capture(Wide(), (torch.randn(4, 8, dtype=torch.bfloat16),))
    normalize(made)

    @rewrite(gelu(x))
    def narrow(m):
        return m.op(aten.tanh.default, m.x.args[0])

    run_pass(made, Pass("p", "exact", [narrow]), ON)
    assert names(made.shell) == ["tanh", "to", "mul"]


def test_a_rewrite_of_another_shape_is_an_error_that_names_the_site():
    @rewrite(gelu(x))
    def wrong(m):
        return m.op(aten.sum.dim_IntList, m.x, [0])

    with pytest.raises(TurbocompileError, match=r"shell:act: the rewrite of gelu .* has shape \(6, 8\)"):
        run_pass(program(), Pass("p", "exact", [wrong]), ON)


def test_what_an_earlier_rewrite_took_in_is_no_site():
    class Twice(nn.Module):
        def forward(self, x):
            return F.gelu(F.gelu(x))

    made = capture(Twice(), (torch.randn(4),))
    normalize(made)

    def outer_first(sub):
        return reversed([n for n in sub.graph.nodes if is_op(n, aten.gelu)])

    @rewrite(gelu(gelu(x)), candidates=outer_first)
    def both(m):
        return m.op(aten.tanh.default, m.x)

    result = run_pass(made, Pass("p", "exact", [both]), ON)
    assert (result.sites, result.rewritten) == (1, 1)


class Recorder:
    """A verifier that refuses given sites once it sees them rewritten."""

    def __init__(self, bad):
        self.bad, self.calls = bad, []

    def after(self, program, before, result):
        self.calls.append(result.name)
        assert sum("gelu" in names(sub) for sub in before.graphs.values()) == 2
        refused = {r.site: "relative L1 0.5" for r in result.rewrites if r.site in self.bad}
        return Judgement(Verdict(error={"rel_l1": 0.0}, site_errors=dict.fromkeys(refused, (0.5, 0.1))), refused)


def test_a_site_that_the_verifier_refuses_is_left_alone():
    made = program()
    verifier = Recorder({"blocks:"})
    (result,) = run_passes(made, options(), verifier, passes=[Pass("p", "quantizing", [to_tanh])])
    assert result.skipped == (("blocks:", "relative L1 0.5", 4),)
    assert result.site_errors == {"blocks:": (0.5, 0.1)}
    assert result.vetoed == {"blocks:": "relative L1 0.5"}
    assert (result.sites, result.rewritten) == (9, 5)
    assert names(made.graphs["blocks"]).count("gelu") == 1
    assert names(made.shell) == ["tanh"]
    assert verifier.calls == ["p", "p"]
    assert result.error == {"rel_l1": 0.0}


def test_a_verifier_that_refuses_what_was_left_alone_is_an_error():
    class Stubborn(Recorder):
        def after(self, program, before, result):
            return Judgement(refused={"shell:act": "no"})

    with pytest.raises(TurbocompileError, match="vetoed and rewritten again"):
        run_passes(program(), options(), Stubborn(set()), passes=[Pass("p", "quantizing", [to_tanh])])


# ------------------------------------------------------------------------------------------------------------ order


def named(name, **more):
    return Pass(name, "exact", [to_tanh], **more)


BUILT_IN = [named("a", provides=("norm",)), named("b"), named("c", needs=("norm",))]


def test_built_in_passes_keep_their_order_and_others_go_where_they_are_needed():
    late, early = named("late"), named("early", provides=("early thing",))
    user = named("user", needs=("early thing", "norm"))
    assert [p.name for p in ordered(BUILT_IN)] == ["a", "b", "c"]
    assert [p.name for p in ordered(BUILT_IN, [late])] == ["a", "b", "c", "late"]
    assert [p.name for p in ordered(BUILT_IN, [user, early])] == ["a", "b", "c", "early", "user"]
    before_c = named("x", needs=("b",), provides=("norm",))
    assert [p.name for p in ordered(BUILT_IN, [before_c])] == ["a", "b", "x", "c"]
    assert [p.name for p in ordered(BUILT_IN, [named("x", before=("b",))])] == ["a", "x", "b", "c"]
    assert [p.name for p in ordered(BUILT_IN[:1], [named("x", before=("b",))])] == ["a", "x"]  # as `story` up to a pass


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([named("d", needs=("nothing",))], "pass 'd' needs 'nothing', which no pass provides"),
        ([named("a")], "two passes are named 'a'"),
        ([named("d", needs=("e",)), named("e", needs=("d",))], "in a circle: d -> e"),
        ([named("d", needs=("c",), provides=("norm",))], "in a circle"),
        ([named("d", needs=("c",), before=("a",))], "in a circle"),
    ],
)
def test_an_impossible_order_is_an_error(extra, message):
    with pytest.raises(TurbocompileError, match=message):
        ordered(BUILT_IN, extra)


def test_the_built_in_passes_are_named_after_their_files_and_fit_each_other():
    passes = [load_pass(name) for name in PASSES]
    assert [p.name for p in passes] == list(PASSES)
    assert [p.name for p in ordered(passes)] == list(PASSES)


def test_sorting_moves_as_little_as_it_must():
    made = program()
    graph = made.graphs["blocks"].graph
    before = [n.name for n in graph.nodes]
    sort(graph)
    assert [n.name for n in graph.nodes] == before
    first = next(n for n in graph.nodes if is_op(n, aten.linear))
    first.append(first.args[1])  # its weight, behind it
    sort(graph)
    graph.lint()
    assert sorted(n.name for n in graph.nodes) == sorted(before)
