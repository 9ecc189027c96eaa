"""Programs as readable code."""

import re
import sys

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from turbocompile.capture.export import capture
from turbocompile.errors import TurbocompileError
from turbocompile.ir.printer import _expression, expression, print_program
from turbocompile.ir.program import call
from turbocompile.ir.weights import (
    AddDiff,
    AddLora,
    Cast,
    Cat,
    Constant,
    Dequantize,
    Dora,
    Load,
    Mul,
    Permute,
    Quantize,
    Reshape,
    Slice,
    Zeros,
)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y)


class Small(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 2) for _ in range(depth))
        self.register_buffer("table", torch.zeros(4, 8), persistent=False)

    def forward(self, x):
        x = -x[:, 1:] + self.table
        for block in self.blocks:
            x = block(x)
        return x.to(torch.bfloat16), x[..., ::2]


SMALL = '''\
def shell(
    self,
    input_0,  # x: 1x5x8 fp32
):
    self.table = constant('table')  # 4x8 fp32
    slice_1 = input_0[:, 1:]  # 1x4x8 fp32
    neg = -slice_1  # 1x4x8 fp32
    add = neg + self.table  # 1x4x8 fp32
    call_blocks_2 = add
    for i in range(3):
        call_blocks_2 = blocks(f"blocks.{i}.", call_blocks_2)  # 1x4x8 fp32
    to = aten.to(call_blocks_2, bf16)  # 1x4x8 bf16
    slice_2 = call_blocks_2[..., ::2]  # 1x4x4 fp32
    return (to, slice_2)

def blocks(
    self,
    input_0,  # 1x4x8 fp32
):
    """3 calls: blocks.0 to blocks.2"""
    layer_norm = aten.layer_norm(input_0, [8], self.norm.weight, self.norm.bias, 1e-05, False)  # 1x4x8 fp32 [norm]
    linear = aten.linear(layer_norm, self.qkv.weight, self.qkv.bias)  # 1x4x24 fp32 [qkv]
    unflatten = aten.unflatten(linear, -1, [3, 2, -1])  # 1x4x3x2x4 fp32
    permute = aten.permute(unflatten, [2, 0, 3, 1, 4])  # 3x1x2x4x4 fp32
    unbind = aten.unbind(permute)  # 1x2x4x4 fp32, 1x2x4x4 fp32, 1x2x4x4 fp32
    getitem = unbind[0]  # 1x2x4x4 fp32
    getitem_1 = unbind[1]  # 1x2x4x4 fp32
    getitem_2 = unbind[2]  # 1x2x4x4 fp32
    scaled_dot_product_attention = aten.scaled_dot_product_attention(getitem, getitem_1, getitem_2)  # 1x2x4x4 fp32
    transpose = aten.transpose(scaled_dot_product_attention, 1, 2)  # 1x4x2x4 fp32
    flatten = aten.flatten(transpose, 2)  # 1x4x8 fp32
    linear_1 = aten.linear(flatten, self.out.weight, self.out.bias)  # 1x4x8 fp32 [out]
    add_1 = input_0 + linear_1  # 1x4x8 fp32
    return (add_1,)
'''


@pytest.fixture(scope="module")
def small():
    return capture(Small(), (torch.randn(1, 5, 8),), {})


def test_a_program_reads_as_code(small):
    assert print_program(small) == SMALL


def test_one_graph_alone(small):
    assert print_program(small, "blocks") == SMALL[SMALL.index("def blocks") :]
    with pytest.raises(TurbocompileError, match=r"no graph 'block'; the program has shell, blocks"):
        print_program(small, "block")


def test_the_text_of_a_copy_is_the_same(small):
    assert print_program(small.copy()) == print_program(small)


def test_a_rewrite_changes_its_own_lines_only(small):
    rewritten = small.copy()
    graph = rewritten.graphs["blocks"].graph
    root = next(n for n in graph.nodes if n.name == "add_1")
    with graph.inserting_before(root):
        new = graph.call_function(torch.ops.aten.sub.Tensor, root.args)
    new.meta = dict(root.meta)
    root.replace_all_uses_with(new)
    graph.erase_node(root)
    before, after = print_program(small).splitlines(), print_program(rewritten).splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [
        ("    add_1 = input_0 + linear_1  # 1x4x8 fp32", "    sub_tensor = input_0 - linear_1  # 1x4x8 fp32"),
        ("    return (add_1,)", "    return (sub_tensor,)"),
    ]


class Joint(nn.Module):
    """A block with two streams and a condition that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x, y, t):
        for _ in range(2):
            y = y + F.gelu(self.a(x)) * t
        return x + F.silu(self.b(y)).mean(1, keepdim=True), y


class Streams(nn.Module):
    def __init__(self, swap_at: int | None = None, keep: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(4))
        self.swap_at = swap_at
        self.keep = keep

    def forward(self, x, y, t):
        kept = None
        for i, block in enumerate(self.blocks):
            x, y = block(y, x, t) if i == self.swap_at else block(x, y, t)
            if i == self.keep:
                kept = x
        return x + y if kept is None else x + y + kept


X, Y, T = torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 1, 8)


def streams(**changes) -> str:
    return print_program(capture(Streams(**changes), (X, Y, T), {}), "shell")


def test_streams_that_are_handed_on_are_one_loop():
    body = streams().split("\n):\n")[1]
    assert body == (
        "    call_blocks_3 = (input_1, input_0)\n"
        "    for i in range(4):\n"
        '        call_blocks_3 = blocks(f"blocks.{i}.", call_blocks_3[1], input_2, call_blocks_3[0])'
        "  # 1x5x8 fp32, 1x5x8 fp32\n"
        "    call_blocks_3_0 = call_blocks_3[0]  # 1x5x8 fp32\n"
        "    call_blocks_3_1 = call_blocks_3[1]  # 1x5x8 fp32\n"
        "    add_12 = call_blocks_3_1 + call_blocks_3_0  # 1x5x8 fp32\n"
        "    return (add_12,)\n"
    )


def test_a_call_that_continues_otherwise_ends_the_loop():
    text = streams(swap_at=2)  # block 2 takes the streams the other way round
    assert text.count("for i in range(2):") == 1
    assert text.count("for i in range(2, 4):") == 1
    assert "call_blocks_3 = (call_blocks_1_1, call_blocks_1_0)" in text


@pytest.mark.parametrize("changes", [{}, {"swap_at": 2}, {"swap_at": 1}, {"keep": 1}, {"keep": 3}], ids=str)
def test_the_printed_loops_compute_what_the_model_does(changes):
    model = Streams(**changes)

    def blocks(prefix, x, t, y):  # in the order in which the block's graph takes and gives them
        x, y = model.blocks[int(prefix.split(".")[1])](x, y, t)
        return y, x

    names = {"blocks": blocks}
    text = print_program(capture(model, (X, Y, T), {}), "shell")
    exec(text, names)
    with torch.no_grad():
        assert torch.equal(names["shell"](None, X, Y, T)[0], model(X, Y, T))


def test_a_result_that_is_read_elsewhere_ends_the_loop():
    text = streams(keep=1)
    assert text.count("for i in range(2):") == 1
    assert text.count("for i in range(2, 4):") == 1
    kept = re.search(r"(\w+) = call_blocks_1\[1\]", text)
    assert kept is not None
    assert text.count(kept[1]) >= 3  # made, handed to block 2, and added at the end


def test_what_stands_between_the_calls_is_printed_before_the_loop(small):
    program = small.copy()
    graph = program.shell.graph
    calls = [n for n in graph.nodes if n.target is call]
    with graph.inserting_before(calls[-1]):
        other = graph.call_function(torch.ops.aten.sin.default, (graph.find_nodes(op="placeholder")[0],))
    other.meta["val"] = torch.empty(1, 5, 8)
    lines = print_program(program, "shell").splitlines()
    loop = lines.index("    for i in range(3):")
    assert lines[loop - 2 : loop] == [
        "    sin_default = aten.sin(input_0)  # 1x5x8 fp32",
        "    call_blocks_2 = add",
    ]


def test_phases_are_named_and_kinds_of_blocks_apart(small):
    program = small.copy()
    for i, node in enumerate(n for n in program.shell.graph.nodes if n.target is call):
        if i == 0:
            node.args = (node.args[0], node.args[1], "prompt", *node.args[3:])
    text = print_program(program, "shell")
    assert "blocks('blocks.0.', add, phase='prompt')" in text
    assert "for i in range(1, 3):" in text


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("where", [(0, 2), (1, sys.maxsize), (None, None), (0, sys.maxsize, 2), (1, 3, 2), (-2, -1)])
def test_a_printed_slice_is_the_slice(dim, where):
    x = torch.arange(4 * 5 * 6).reshape(4, 5, 6)
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    sliced = graph.call_function(torch.ops.aten.slice.Tensor, (node, dim, *where))
    sliced.meta["val"] = expected = torch.ops.aten.slice.Tensor(x, dim, *where)
    assert torch.equal(eval(_expression(sliced), {"x": x}), expected)


A, B = Load(".a", (4, 6), torch.bfloat16), Load("b", (2, 6), torch.bfloat16)


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (A, ".a"),
        (Cat((A, B), 0), "cat([.a, b], 0)"),
        (Slice(A, 0, 1, 3), "slice(.a, 0, 1, 3)"),
        (Reshape(A, (24,)), "reshape(.a, [24])"),
        (Permute(A, (1, 0)), "permute(.a, [1, 0])"),
        (Cast(A, torch.float32), "to(.a, fp32)"),
        (Mul(A, 0.5), ".a * 0.5"),
        (Mul(A, B), ".a * b"),
        (Zeros((2, 3), torch.float32), "zeros([2, 3])"),
        (Constant("rope.cos", (2,), torch.float32), "constant('rope.cos')"),
        (AddLora(A, B, B, 0.5), ".a + 0.5 * b @ b"),
        (AddDiff(A, B, 0.5), ".a + 0.5 * b"),
        (Dora(A, B, B, A, 0.5), "dora(.a + 0.5 * b @ b, .a)"),
        (Quantize(Cat((A, B), 0), "int8", "scale"), "quantize(cat([.a, b], 0), 'int8').scale"),
        (Dequantize(A, B, "int8_block", torch.bfloat16), "dequantize(.a, b, 'int8_block')"),
    ],
)
def test_weight_expressions_read_as_code(expr, text):
    assert expression(expr) == text


def test_a_weight_that_is_made_is_explained(small):
    program = small.copy()
    program.graphs["blocks"].weights["qkv.weight"] = Quantize(
        Load(".qkv.weight", (24, 8), torch.float32), "int8", "data"
    )
    text = print_program(program, "blocks")
    assert "    self.qkv.weight = quantize(.qkv.weight, 'int8').data  # 24x8 i8\n" in text
    assert "self.out.weight =" not in text  # the checkpoint's own
