"""The normal form: one form for each way of writing, the same numbers, the same names of weights and modules."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import call, is_op, module_path
from turbocompile.ir.weights import Constant
from turbocompile.numerics.interpreter import Interpreter
from turbocompile.rewrite.match import exact
from turbocompile.rewrite.normalize import clean, normalize

aten = torch.ops.aten


class Written(nn.Module):
    """A function of two tensors, with a linear and a vector for those that want weights."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.linear = nn.Linear(8, 12)
        self.vector = nn.Parameter(torch.randn(8))
        self.register_buffer("table", torch.randn(6, 8), persistent=False)
        self.register_buffer("two", torch.tensor(2.0), persistent=False)

    def forward(self, *inputs):
        return self.form(*inputs, self)


def run(program, model, inputs):
    """The first output of a program, calls of blocks included, computed as it is."""
    evaluate = Evaluator(ModuleTensors(model), program.constants)

    def graph(name, prefix, given):
        sub = program.graphs[name]
        evaluation = Interpreter(sub, lambda node: evaluate(sub.weights[node.target], prefix), None)
        values = evaluation(
            {n.name: v for n, v in zip(sub.inputs(), given, strict=True)},
            lambda node, args: graph(args[0], args[1], args[3:]),
        )
        outputs = tuple(values[n.name] for n in sub.outputs())
        return outputs[0] if len(outputs) == 1 else outputs

    found = graph("shell", "", inputs)
    return found[0] if isinstance(found, tuple) else found


def normal(form, *inputs):
    """(program, model) of a function in normal form; its numbers are checked on the way."""
    torch.manual_seed(0)
    model = Written(form).requires_grad_(False)
    program = capture(model, inputs)
    assert normalize(program) == {}
    expected = model(*inputs)
    found = run(program, model, inputs)
    assert found.dtype == expected.dtype
    # Quotients, roots and variances are computed in another order: a few roundings of 2^-24 each.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    return program, model


def text(program, graph="shell"):
    """A graph as lines of `name = op(args)`, weights and inputs left out; equal for equal graphs."""
    names, lines = {}, []
    for node in program.graphs[graph].graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = str(node.target)
        elif node.op == "call_function":
            names[node] = f"v{len(lines)}"
            args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Text(names[n]))
            operation = getattr(node.target, "_opname", node.target.__name__)
            lines.append(f"{names[node]} = {operation}{args[0]}{args[1] or ''}")
        else:
            lines.append(f"return {', '.join(names[n] for n in node.args[0])}")
    return "\n".join(lines)


class _Text:
    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


def data(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (2, 6, 8)), generator=torch.Generator().manual_seed(3)).to(dtype)


def one_in_place(x, y, m):
    out = x * 1.5
    out[..., :4] = y[..., :4]
    return out


def two_strided(x, y, m):
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = x[..., :4], y[..., 4:]
    return out


def viewed_writes(x, y, m):
    out = torch.zeros_like(x)
    pairs = out.view(2, 6, 4, 2)
    pairs[..., 0] = x[..., :4]
    pairs[..., 1] = y[..., 4:]
    return out


def accumulated(x, y, m):
    total = x.clone()
    total += y
    total.mul_(2)
    return total


# Each group is one computation: all its spellings must give the same graph.
SAME = {
    "modulation": [
        lambda x, y, m: x * (1 + y) + m.vector,
        lambda x, y, m: m.vector + (y + 1.0) * x,
        lambda x, y, m: torch.addcmul(m.vector, x, y.add(1)),
        lambda x, y, m: torch.add(m.vector, (torch.ones_like(y) + y).mul(x)),
    ],
    "difference": [
        lambda x, y, m: x - y,
        lambda x, y, m: x + (-y),
        lambda x, y, m: torch.sub(x, y),
        lambda x, y, m: x + y * -1,
        lambda x, y, m: torch.rsub(y, x),
        lambda x, y, m: x.clone().sub_(y),
    ],
    "scalar difference": [lambda x, y, m: 1 - x, lambda x, y, m: -x + 1, lambda x, y, m: torch.rsub(x, 1)],
    "quotient": [lambda x, y, m: x / (y * y + 1), lambda x, y, m: x * (y.square() + 1).reciprocal()],
    "quotient by a number": [lambda x, y, m: x / 4, lambda x, y, m: x * 0.25, lambda x, y, m: 0.25 * x],
    "a number first": [
        lambda x, y, m: (x * 3 + 2) * (2 / y.exp()),
        lambda x, y, m: torch.add(2.0, torch.mul(3.0, x)) * torch.div(2.0, y.exp()),
        lambda x, y, m: torch.add(2, x, alpha=3) * (y.exp().reciprocal() * 2),
    ],
    "root": [
        lambda x, y, m: torch.rsqrt(y**2 + 1),
        lambda x, y, m: 1 / torch.sqrt(y * y + 1),
        lambda x, y, m: (y.pow(2) + 1) ** -0.5,
        lambda x, y, m: (y.square() + 1).sqrt().reciprocal(),
    ],
    "mean": [
        lambda x, y, m: x - x.mean(-1, keepdim=True),
        lambda x, y, m: x - x.mean(2)[..., None],
        lambda x, y, m: x - x.sum(-1, keepdim=True) / 8,
        lambda x, y, m: x - torch.mean(x, dim=-1).unsqueeze(-1),
    ],
    "variance": [
        lambda x, y, m: x.var(-1, keepdim=True, unbiased=False),
        lambda x, y, m: (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True),
        lambda x, y, m: torch.var_mean(x, dim=-1, correction=0, keepdim=True)[0],
    ],
    "transposed": [
        lambda x, y, m: x.transpose(1, 2),
        lambda x, y, m: x.permute(0, 2, 1),
        lambda x, y, m: x.mT,
        lambda x, y, m: x.movedim(2, 1).contiguous(),
        lambda x, y, m: x.permute(2, 1, 0).permute(2, 0, 1),
    ],
    "heads": [
        lambda x, y, m: x.view(2, 6, 2, 4),
        lambda x, y, m: x.unflatten(-1, (2, -1)),
        lambda x, y, m: x.reshape(2, 6, 8, 1).reshape(2, 6, 2, 4),
        lambda x, y, m: x.flatten(1).view(2, 6, 2, 4).clone(),
    ],
    "chunks": [
        lambda x, y, m: m.linear(x).chunk(3, -1)[1],
        lambda x, y, m: m.linear(x).split(4, dim=-1)[1],
        lambda x, y, m: m.linear(x).split([4, 4, 4], dim=2)[1],
        lambda x, y, m: m.linear(x)[..., 4:8],
        lambda x, y, m: m.linear(x).unflatten(-1, (3, 4)).unbind(2)[1],
        lambda x, y, m: m.linear(x).reshape(2, 6, 3, 4).permute(2, 0, 1, 3)[1],
        lambda x, y, m: m.linear(x).narrow(-1, 4, 4),
        lambda x, y, m: torch.tensor_split(m.linear(x), 3, -1)[1],
    ],
    "heads of a fused projection": [
        lambda x, y, m: m.linear(x).chunk(3, -1)[2].unflatten(-1, (2, 2)).transpose(1, 2),
        lambda x, y, m: m.linear(x).reshape(2, 6, 3, 2, 2).permute(2, 0, 3, 1, 4)[2],
        lambda x, y, m: m.linear(x).view(2, 6, 3, 2, 2)[:, :, 2].permute(0, 2, 1, 3),
    ],
    "interleaved": [
        two_strided,
        viewed_writes,
        lambda x, y, m: torch.stack([x[..., :4], y[..., 4:]], -1).flatten(2),
        lambda x, y, m: torch.cat([x[..., :4, None], y[..., 4:].unsqueeze(-1)], -1).reshape(2, 6, 8),
    ],
    "every other": [
        lambda x, y, m: x[..., 1::2],
        lambda x, y, m: x.unflatten(-1, (4, 2)).unbind(-1)[1],
        lambda x, y, m: x.reshape(2, 6, 4, 2)[..., 1],
    ],
    "written part": [one_in_place, lambda x, y, m: torch.cat([y[..., :4], (x * 1.5)[..., 4:]], -1)],
    "in place": [accumulated, lambda x, y, m: (x + y) * 2],
    "linear": [
        lambda x, y, m: m.linear(x),
        lambda x, y, m: x @ m.linear.weight.t() + m.linear.bias,
        lambda x, y, m: torch.matmul(x, m.linear.weight.transpose(0, 1)).add(m.linear.bias),
    ],
    "products of heads": [
        lambda x, y, m: torch.einsum("bqd,bkd->bqk", x, y),
        lambda x, y, m: x @ y.transpose(1, 2),
        lambda x, y, m: torch.bmm(x, y.mT),
        lambda x, y, m: torch.baddbmm(torch.empty(2, 6, 6), x, y.mT, beta=0),
    ],
    "softmax": [
        lambda x, y, m: x.softmax(-1),
        lambda x, y, m: F.softmax(x, dim=2),
        lambda x, y, m: torch.softmax(x, -1, dtype=torch.float32),
    ],
    "silu": [lambda x, y, m: F.silu(x), lambda x, y, m: x * torch.sigmoid(x), lambda x, y, m: torch.sigmoid(x) * x],
    "complex product": [
        lambda x, y, m: torch.view_as_real(
            torch.view_as_complex(x.view(2, 6, 4, 2)) * torch.view_as_complex(y.view(2, 6, 4, 2))
        ),
        lambda x, y, m: torch.stack(
            [
                x[..., 0::2] * y[..., 0::2] - x[..., 1::2] * y[..., 1::2],
                x[..., 0::2] * y[..., 1::2] + x[..., 1::2] * y[..., 0::2],
            ],
            -1,
        ),
    ],
    "a modulation's axis": [
        lambda x, y, m: x[:, None] * (1 + y[:, 0])[:, None, None],
        lambda x, y, m: x[:, None] * (1 + y[:, 0, None])[:, None],
        lambda x, y, m: x.unsqueeze(1) * (y[:, 0].view(2, 1, 1, 8) + 1),
    ],
    "nothing": [
        lambda x, y, m: x + 0.5,
        lambda x, y, m: F.dropout(x.float().contiguous(), 0.5, training=False).detach().view_as(x) * 1 + 0.5,
        lambda x, y, m: x.double().float().permute(0, 1, 2)[:, :].expand(2, 6, 8).type_as(y) + 0.5,
    ],
}  # fmt: skip


@pytest.mark.parametrize("group", SAME)
def test_spellings_of_one_computation_have_one_form(group):
    inputs = data(), data().flip(0)
    forms = [text(normal(form, *inputs)[0]) for form in SAME[group]]
    assert len(forms) > 1
    for form in forms[1:]:
        assert _in_any_order(form) == _in_any_order(forms[0])


def _in_any_order(form):
    """The lines of a graph with values in place of names, so that the order of independent lines does not matter."""
    values = {}
    for line in form.split("\n")[:-1]:
        name, right = line.split(" = ", 1)
        for known in sorted(values, key=len, reverse=True):
            right = right.replace(known, values[known])
        if right.startswith(("add(", "mul(")):
            right = "".join(sorted(right))  # commutative: compare the letters
        values[name] = f"<{right}>"
    return values.get(form.split("\n")[-1].removeprefix("return "))


def test_the_form_in_writing():
    def form(x, y, m):
        out = torch.empty_like(x)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        out[..., 0::2] = a - b / 2
        out[..., 1::2] = torch.addcmul(b, a, 1 + a)
        return out.type_as(y)

    program, _ = normal(form, data(), data())
    assert text(program) == "\n".join(
        [
            "v0 = reshape(input_0, [2, 6, 4, 2])",
            "v1 = slice(v0, 3, 0, 1)",
            "v2 = slice(v0, 3, 1, 2)",
            "v3 = reshape(v1, [2, 6, 4])",
            "v4 = reshape(v2, [2, 6, 4])",
            "v5 = mul(v4, -0.5)",
            "v6 = add(v3, v5)",
            "v7 = add(v3, 1)",
            "v8 = mul(v3, v7)",
            "v9 = add(v4, v8)",
            "v10 = stack([v6, v9], 3)",
            "v11 = reshape(v10, [2, 6, 8])",
            "return v11",
        ]
    )


def test_operations_of_the_keep_list_stay_whole():
    def form(x, y, m):
        q, k = (t.view(2, 6, 2, 4).transpose(1, 2) for t in (x, y))
        out = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
        out = F.rms_norm(F.layer_norm(out, (8,), m.vector), (8,), m.vector, 1e-6)
        return F.silu(F.gelu(m.linear(out), approximate="tanh")).softmax(-1)

    program, _ = normal(form, data(), data())
    names = [n.target._opname for n in program.shell.graph.nodes if n.op == "call_function"]
    assert [n for n in names if n not in ("reshape", "permute")] == [
        "scaled_dot_product_attention", "layer_norm", "rms_norm", "linear", "gelu", "silu", "softmax",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- casts


def test_an_exact_upcast_that_is_undone_is_dropped():
    program, _ = normal(lambda x, m: x.float().reshape(2, 48).to(torch.bfloat16) * 2, data(dtype=torch.bfloat16))
    assert text(program) == "v0 = reshape(input_0, [2, 48])\nv1 = mul(v0, 2)\nreturn v1"


def test_a_cast_that_rounds_is_kept():
    program, _ = normal(lambda x, m: x.to(torch.bfloat16).float() * m.table.to(torch.bfloat16), data())
    casts = [n for n in program.shell.graph.nodes if is_op(n, aten.to.dtype)]
    assert len(casts) == 3


def test_float16_and_bfloat16_do_not_hold_each_other():
    program, _ = normal(lambda x, m: x.to(torch.float16).to(torch.bfloat16) + 1, data(dtype=torch.bfloat16))
    assert sum(is_op(n, aten.to.dtype) for n in program.shell.graph.nodes) == 2


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_exact_is_what_a_round_trip_shows(narrow, wide):
    """All 16-bit patterns, and for float32 those with the ends of its range and precision."""
    if narrow.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(narrow)
    else:
        info = torch.finfo(narrow)
        values = torch.tensor(
            [1 + info.eps, info.max, info.smallest_normal, info.smallest_normal * info.eps], dtype=narrow
        )
    values = values[torch.isfinite(values)]
    assert exact(narrow, wide) == bool((values.to(wide).to(narrow) == values).all())


def test_a_quotient_of_bfloat16_rounds_once():
    x, y = data(dtype=torch.bfloat16), data(dtype=torch.bfloat16).flip(0).abs() + 0.5
    torch.manual_seed(0)
    model = Written(lambda x, y, m: x / y).requires_grad_(False)
    program = capture(model, (x, y))
    normalize(program)
    truth = x.double() / y.double()
    # float32 inside, one rounding to 8 bits: half a unit, 2^-8 of the value, and a hair for float32.
    assert ((run(program, model, (x, y)).double() - truth).abs() <= 2.0**-8 * 1.001 * truth.abs()).all()


# ------------------------------------------------------------------------------------------------------- near misses

DIFFERENT = {
    "another axis": (lambda x, y, m: x.mean(-1, keepdim=True), lambda x, y, m: x.mean(1, keepdim=True)),
    "another half": (lambda x, y, m: x[..., :4], lambda x, y, m: x[..., 4:]),
    "pairs and halves": (lambda x, y, m: x[..., 0::2], lambda x, y, m: x[..., :4]),
    "fused in another order": (
        lambda x, y, m: m.linear(x).unflatten(-1, (3, 4))[..., 1, :],
        lambda x, y, m: m.linear(x).unflatten(-1, (4, 3))[..., 1],
    ),
    "written in another order": (
        two_strided,
        lambda x, y, m: torch.stack([y[..., 4:], x[..., :4]], -1).flatten(2),
    ),
    "sample and population": (lambda x, y, m: x.var(-1), lambda x, y, m: x.var(-1, unbiased=False)),
    "a sum that is no mean": (lambda x, y, m: x.sum(-1) / 6, lambda x, y, m: x.mean(-1)),
    "a root of a square": (lambda x, y, m: (x**2) ** 0.5, lambda x, y, m: x + 0.0),
}  # fmt: skip


@pytest.mark.parametrize("pair", DIFFERENT)
def test_different_computations_keep_different_forms(pair):
    """And each keeps its numbers, which `normal` checks."""
    first, second = (text(normal(form, data(), data().flip(0))[0]) for form in DIFFERENT[pair])
    assert first != second


def test_a_write_after_a_read_does_not_reach_back():
    def form(x, y, m):
        out = x * 1.0 + y
        before = out * 2
        out[:, 0] = 0
        return before + out

    normal(form, data(), data())


FILLED = {
    "pad_sequence": lambda x, y, m: aten.pad_sequence([x[0], y[0, :3]], True, 0.5),
    "block_diag": lambda x, y, m: torch.block_diag(x[0], y[0]),
    "circular padding": lambda x, y, m: F.pad(x, (2, 3), mode="circular"),
    "diag_embed": lambda x, y, m: torch.diag_embed(x, offset=1),
    "combinations of both": lambda x, y, m: torch.cartesian_prod(x[0, :, 0], y[0, 0]),
}


@pytest.mark.parametrize("form", FILLED.values(), ids=FILLED.keys())
def test_what_an_operation_makes_and_fills_itself_is_filled(form):
    """The writes of a composite operation into a tensor of its own making are in the form, by numbers and by name."""
    program, _ = normal(form, data(2, 6, 8), data(2, 6, 8))
    nodes = [n for n in program.shell.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not [n for n in nodes if n.target._schema.is_mutable]


def test_a_graph_in_which_a_write_stays_is_left_as_it_was_captured(monkeypatch):
    program = capture(Written(one_in_place), (data(2, 6, 8), data(2, 6, 8)))
    before = str(program.shell.graph)
    monkeypatch.setattr(torch.func, "functionalize", lambda function, remove: function)
    assert "writes into a tensor" in normalize(program)["shell"]
    assert "writes into a tensor" in program.shell.left
    assert str(program.shell.graph) == before


def test_a_tensor_that_is_written_after_a_block_read_it_is_not_changed_for_the_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(x))) * 0.5 + torch.sin(x) * torch.cos(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            x = x * 2
            y = self.blocks[0](x)
            x += 1
            return self.blocks[2](self.blocks[1](y) + x)

    torch.manual_seed(0)
    model, x = Model().requires_grad_(False), data()
    program = capture(model, (x,))
    assert len(program.calls()) == 3
    normalize(program)
    assert torch.allclose(run(program, model, (x,)), model(x), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- what is carried along


def test_complex_constants_become_pairs_and_no_complex_value_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cis", torch.randn(6, 4, dtype=torch.complex64), persistent=False)

        def forward(self, x):
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(z * self.cis[:4].conj()).flatten(-2)

    model, x = Model(), data(2, 4, 8)
    program = capture(model, (x,))
    normalize(program)
    assert torch.allclose(run(program, model, (x,)), model(x), rtol=1e-5, atol=1e-6)
    assert not any(t.is_complex() for t in program.constants.values())
    assert not any(n.meta["val"].is_complex() for n in program.shell.graph.nodes if n.op != "output")
    assert all(isinstance(e, Constant) and e.key in program.constants for e in program.shell.weights.values())


def test_wan_keeps_names_places_and_bits(wan, wan_call):
    model, inputs = wan(), wan_call()
    program = capture(model, (), inputs)
    weights = {g: set(sub.weights) for g, sub in program.graphs.items()}
    calls = [(c.graph, c.prefix, c.phase) for c in program.calls()]
    places = {module_path(n) for n in program.graphs["blocks"].graph.nodes if is_op(n, aten.linear)}
    normalize(program)
    assert {g: set(sub.weights) for g, sub in program.graphs.items()} == weights
    assert [(c.graph, c.prefix, c.phase) for c in program.calls()] == calls
    block = program.graphs["blocks"].graph
    linears = [n for n in block.nodes if is_op(n, aten.linear)]
    assert {module_path(n) for n in linears} == places
    assert all("stack_trace" in n.meta for n in linears)
    tensors = [inputs[i.path].to(i.dtype) for i in program.signature.inputs]
    assert torch.equal(run(program, model, tensors), model(**inputs, return_dict=False)[0])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_of_both_head_sizes_is_bit_equal(wan, wan_call, head_dim, dtype):
    """Nothing in it is a tensor quotient or a variance, so not even the order of roundings changes."""
    model, inputs = wan(attention_head_dim=head_dim).to(dtype), wan_call(dtype=dtype)
    program = capture(model, (), inputs)
    normalize(program)
    tensors = [inputs[i.path].to(i.dtype) for i in program.signature.inputs]
    assert torch.equal(run(program, model, tensors), model(**inputs, return_dict=False)[0])


def test_nothing_is_left_that_is_not_of_the_normal_form(wan, wan_call):
    program = capture(wan(), (), wan_call())
    normalize(program)
    gone = (
        aten.view, aten.unsqueeze, aten.squeeze, aten.transpose, aten.t, aten.select, aten.unbind, aten.split,
        aten.clone, aten.split_with_sizes, aten.chunk, aten.unflatten, aten.sub, aten.rsub, aten.div, aten.sqrt,
        aten.rsqrt, aten.var, aten.addcmul, aten.slice_scatter, aten.copy_, aten.copy, aten.type_as, aten._to_copy,
        aten.mm, aten.bmm,
        aten.detach, aten.alias, aten._unsafe_view, aten.contiguous, aten.empty_like, aten._assert_tensor_metadata,
    )  # fmt: skip
    for sub in program.graphs.values():
        nodes = [n for n in sub.graph.nodes if n.op == "call_function" and n.target is not call]
        assert not [n for n in nodes if is_op(n, *gone)]
        assert not [n for n in nodes if n.target is operator.getitem]
        assert not [n for n in nodes if n.target._schema.is_mutable]
        assert not [n for n in nodes if not n.users]


def test_values_are_those_of_the_graph_as_it_is(wan, wan_call):
    """Shape, dtype and strides of each recorded value are what the node computes from its recorded inputs."""
    program = capture(wan(), (), wan_call())
    normalize(program)
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
                with program.fake_mode:
                    value = node.target(*args, **kwargs)
                assert (value.shape, value.dtype, value.stride()) == (
                    node.meta["val"].shape,
                    node.meta["val"].dtype,
                    node.meta["val"].stride(),
                )


def test_normalizing_twice_changes_nothing(wan, wan_call):
    program = capture(wan(), (), wan_call())
    normalize(program)
    before = {g: text(program, g) for g in program.graphs}
    normalize(program)
    for graph, form in before.items():
        assert text(program, graph) == form


def test_cleaning_merges_equal_nodes_and_drops_dead_ones_and_their_weights():
    program, _ = normal(lambda x, y, m: m.linear(x) + m.linear(y), data(), data())
    sub = program.shell
    add = sub.outputs()[0]
    with sub.graph.inserting_before(add):
        again = sub.graph.call_function(add.args[0].target, add.args[0].args)
        again.meta["val"] = add.args[0].meta["val"]
    add.replace_input_with(add.args[1], again)
    first = add.args[0].name
    moved = clean(sub, program.fake_mode)
    assert moved == {again.name: first}
    assert [n.target._opname for n in sub.graph.nodes if n.op == "call_function"] == ["linear", "add"]
    (linear,) = [n for n in sub.graph.nodes if is_op(n, aten.linear)]
    linear.args = linear.args[:2]
    clean(sub, program.fake_mode)
    assert set(sub.weights) == {"linear.weight"}
