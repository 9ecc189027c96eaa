"""Patterns: written like the graph, commutative where the op is, blind to floating casts only, backtracking."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from turbocompile.errors import TurbocompileError
from turbocompile.ir.program import SHELL, Program, Signature, Subgraph, infer
from turbocompile.ir.weights import Cast, Load, Permute, Slice
from turbocompile.rewrite.linears import weight_expr
from turbocompile.rewrite.match import (
    LAST,
    Match,
    Pass,
    cat,
    layer_norm,
    linear,
    matches,
    mean,
    op,
    permute,
    rewrite,
    rms_norm,
    softmax,
    unwiden,
    variables,
)

aten = torch.ops.aten
x, y, z, a, b, eps = variables("x y z a b eps")


class Graph:
    """Builds a graph node by node: `g.input(2, 3)`, `g(aten.add.Tensor, p, q)`."""

    def __init__(self):
        self.sub = Subgraph(fx.Graph())
        signature = Signature((), (), {}, {"kind": "tensor", "index": 0})
        self.program = Program({SHELL: self.sub}, signature)

    def input(self, *shape, dtype=torch.float32):
        node = self.sub.graph.placeholder(f"input_{len(self.sub.inputs())}")
        with self.program.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def weight(self, name, *shape, dtype=torch.float32):
        self.sub.weights[name] = Load(name, shape, dtype)
        node = self.sub.graph.create_node("get_attr", name)
        with self.program.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def __call__(self, target, *args, **kwargs):
        node = self.sub.graph.call_function(target, args, kwargs)
        node.meta["val"] = infer(target, args, kwargs, self.program.fake_mode)
        return node

    def add(self, p, q):
        return self(aten.add.Tensor, p, q)

    def mul(self, p, q):
        return self(aten.mul.Tensor, p, q)

    def neg(self, p):
        return self(aten.neg.default, p)

    def to(self, p, dtype):
        return self(aten.to.dtype, p, dtype)

    def match(self, root, bound=None):
        return Match(root, SHELL, "shell:", self.program, {}, bound or {})


@pytest.fixture
def g():
    return Graph()


def first(pattern, node):
    return next(matches(pattern, node), None)


def test_written_order_does_not_matter(g):
    p, q, r = g.input(2, 4, 8), g.input(2, 1, 8), g.input(2, 1, 8)
    norm = g(aten.layer_norm.default, p, [8], None, None, 1e-6)
    patterns = [
        layer_norm(x, LAST, None, None, eps) * (1 + y) + z,
        z + (y + 1) * layer_norm(x, LAST, None, None, eps),
        z - -(layer_norm(x, LAST, None, None, eps) * (y + 1)),
    ]
    graphs = [g.add(g.mul(norm, g.add(q, 1)), r), g.add(r, g.mul(g.add(q, 1), norm))]
    for pattern in patterns:
        for root in graphs:
            assert first(pattern, root) == {"x": p, "y": q, "z": r, "eps": 1e-6}


def test_operators_pass_through_the_normal_table():
    assert str(x - y) == "(x - y)"
    assert (x - y).args[1].target is aten.neg.default
    assert str(1 - x) == "(-x + 1)"
    assert str(x / y) == "(x * (y**-1))"
    assert str(x / 4) == "(x * 0.25)"
    assert str(2 / x) == "((x**-1) * 2)"
    negative = -x
    assert -negative is x
    assert str(-x * y) == str(x * -y) == "-(x * y)"
    assert str(x * x) == "(x**2)"


def test_it_looks_through_casts_between_floats(g):
    p = g.input(2, 4, dtype=torch.bfloat16)
    q = g.input(2, 4)
    root = g.to(g.mul(g.to(p, torch.float32), g.to(g.add(q, 1), torch.float64)), torch.bfloat16)
    found = first(x * (y + 1), root)
    assert found["x"].target is aten.to.dtype  # a variable takes the value as it is read
    assert found["x"].args[0] is p
    assert found["y"] is q


def test_it_does_not_look_through_a_cast_to_integers(g):
    root = g.mul(g.to(g.to(g.add(g.input(4), 1), torch.int64), torch.float32), g.input(4))
    assert first((x + 1) * y, root) is None
    assert first(x * y, root) is not None


@pytest.mark.parametrize("wrap", ["clone", "reshape", "relu"])
def test_it_looks_through_nothing_else(g, wrap):
    inner = g.add(g.input(4), 1)
    wrapped = {
        "clone": lambda: g(aten.clone.default, inner),
        "reshape": lambda: g(aten.reshape.default, inner, [4]),
        "relu": lambda: g(aten.relu.default, inner),
    }[wrap]()
    assert first((x + 1) * y, g.mul(wrapped, g.input(4))) is None


def test_it_backtracks_into_the_other_order_of_an_inner_op(g):
    p, q, r = g.input(4), g.input(4), g.input(4)
    # In (p + q) * (p + r) the first order binds x to p; the second product fits only for some orders of both sums.
    root = g.mul(g.add(q, p), g.add(p, r))
    assert first((x + y) * (x + z), root) == {"x": p, "y": q, "z": r}
    assert first((x + x) * (y + z), root) is None


def test_a_variable_used_twice_is_one_thing(g):
    p, q = g.input(4), g.input(4)
    assert first(x * (x + 1), g.mul(p, g.add(p, 1))) == {"x": p}
    assert first(x * (x + 1), g.mul(p, g.add(q, 1))) is None
    same_but_cast = g.mul(g.to(p, torch.float64), g.add(p, 1))
    assert first(x * (x + 1), same_but_cast) is not None
    assert first((x + eps) * (y + eps), g.mul(g.add(p, 2), g.add(q, 2)))["eps"] == 2
    assert first((x + eps) * (y + eps), g.mul(g.add(p, 2), g.add(q, 3))) is None


def test_all_matches_are_found(g):
    p, q = g.input(4), g.input(4)
    assert {found["x"] for found in matches(x * y, g.mul(p, q))} == {p, q}


def test_numbers_must_be_equal_and_of_one_kind(g):
    p = g.input(4, 4)
    assert first(x + 1, g.add(p, 1.0)) is not None
    assert first(x + 1, g.add(p, 2)) is None
    assert first(mean(x, LAST, True), g(aten.mean.dim, p, [1], True)) is not None
    assert first(mean(x, LAST, True), g(aten.mean.dim, p, [1], False)) is None
    assert first(mean(x, LAST), g(aten.mean.dim, p, [1], True)) is None  # what is not said has its default


def test_the_last_axis_is_the_last_axis_alone(g):
    p = g.input(2, 4, 4)
    assert first(softmax(x, LAST), g(aten.softmax.int, p, 2)) is not None
    assert first(softmax(x, LAST), g(aten.softmax.int, p, -1)) is not None
    assert first(softmax(x, LAST), g(aten.softmax.int, p, 1)) is None
    assert first(mean(x, LAST, True), g(aten.mean.dim, p, [1, 2], True)) is None
    assert first(rms_norm(x, LAST, a, eps), g(aten.rms_norm.default, p, [4], None, 1e-6))["a"] is None
    assert first(rms_norm(x, LAST, a, eps), g(aten.rms_norm.default, p, [4, 4], None, 1e-6)) is None
    q = g.input(2, 4, 4)
    assert first(cat([x, y], LAST), g(aten.cat.default, [p, q], 2)) == {"x": p, "y": q}
    assert first(cat([x, y], LAST), g(aten.cat.default, [p, q], 1)) is None
    assert first(cat([x, y], LAST), g(aten.cat.default, [p, q, q], 2)) is None


def test_arguments_may_be_named_or_left_at_their_default(g):
    p, w = g.input(2, 8), g.weight("w", 4, 8)
    assert first(linear(x, a, b), g(aten.linear.default, p, w)) == {"x": p, "a": w, "b": None}
    gelu = op(aten.gelu.default)
    assert first(gelu(x, approximate="tanh"), g(aten.gelu.default, p, approximate="tanh")) == {"x": p}
    assert first(gelu(x), g(aten.gelu.default, p, approximate="tanh")) is None
    assert first(permute(x, [1, 0]), g(aten.permute.default, p, [1, 0])) == {"x": p}
    assert first(permute(x, [1, 0]), g(aten.permute.default, g.input(2, 2), [0, 1])) is None


def test_a_missing_argument_is_an_error(g):
    with pytest.raises(TurbocompileError, match="lacks its argument 'weight'"):
        first(linear(x), g(aten.linear.default, g.input(2, 8), g.weight("w", 4, 8)))


def test_only_exact_casts_are_taken_off(g):
    p = g.input(4, dtype=torch.bfloat16)
    wide = g.to(p, torch.float32)
    assert unwiden(wide) is p
    lossy = g.to(g.input(4), torch.bfloat16)
    assert unwiden(lossy) is lossy
    assert unwiden(g.to(g.to(p, torch.float64), torch.float32)).target is aten.to.dtype
    half = g.to(p, torch.float16)  # bfloat16 reaches further, float16 is finer: neither holds the other
    assert unwiden(half) is half


def test_narrow_takes_off_an_upcast_only_where_the_result_is_rounded(g):
    p = g.input(4, dtype=torch.bfloat16)
    wide = g.to(p, torch.float32)
    root = g.mul(wide, 2)
    reshaped = g(aten.reshape.default, root, [2, 2])
    g.to(reshaped, torch.bfloat16)
    assert g.match(root).narrow(wide) is p
    g.add(root, 1)  # a reader in float32
    assert g.match(root).narrow(wide) is wide


@pytest.mark.parametrize(
    ("shape", "constant"),
    [((2, 1, 8), True), ((1, 1, 8), True), ((8,), True), ((2, 4, 8), False), ((4, 8), False), ((1, 4, 1), False)],
)
def test_constant_along_tokens_reads_the_broadcast_shape(g, shape, constant):
    root = g.mul(g.input(2, 4, 8), g.input(*shape))
    assert g.match(root).constant_along_tokens(root.args[1]) is constant


def test_a_weight_in_another_layout_is_an_expression(g):
    w = g.weight("w", 4, 8)
    load = Load("w", (4, 8), torch.float32)
    assert weight_expr(w, g.sub) == load
    assert weight_expr(g(aten.permute.default, w, [1, 0]), g.sub) == Permute(load, (1, 0))
    narrowed = g.to(g(aten.slice.Tensor, w, 1, 2, 6), torch.bfloat16)
    assert weight_expr(narrowed, g.sub) == Cast(Slice(load, 1, 2, 6), torch.bfloat16)
    assert weight_expr(g.mul(w, 2), g.sub) is None
    assert weight_expr(g.input(4), g.sub) is None


def test_a_made_node_has_a_value_and_the_place_of_the_root(g):
    root = g.mul(g.input(2, 4), 2)
    root.meta["nn_module_stack"] = {"m": ("attn.norm", "Norm")}
    match = g.match(root, {"x": root.args[0]})
    made = match.op(aten.add.Tensor, match.x, 1)
    assert tuple(made.meta["val"].shape) == (2, 4)
    assert made.meta["nn_module_stack"] == root.meta["nn_module_stack"]
    assert list(g.sub.graph.nodes).index(made) < list(g.sub.graph.nodes).index(root)
    with pytest.raises(AttributeError, match="'shift'"):
        _ = match.shift


def test_a_weight_is_added_once_and_never_changed(g):
    root = g.mul(g.input(2, 4), 2)
    match = g.match(root)
    made = match.weight("w.scale", Load("w.scale", (4,), torch.float32))
    assert match.weight("w.scale", Load("w.scale", (4,), torch.float32)) is made
    with pytest.raises(TurbocompileError, match="already has another weight"):
        match.weight("w.scale", Load("w.scale", (5,), torch.float32))


def test_a_rule_needs_sites_and_a_pass_a_known_kind():
    with pytest.raises(TurbocompileError, match="needs a pattern or candidates"):
        rewrite()
    with pytest.raises(TurbocompileError, match="not 'nice'"):
        Pass("p", "nice", [])
