"""Operations and bytes of one node, counted from shapes."""

from __future__ import annotations

import pytest
import torch
import turbocompile.kernels  # noqa: F401 (registers the ops)
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from turbocompile.ir.node_cost import kept_keys, node_cost
from turbocompile.ir.op_schema import is_view

aten = torch.ops.aten
ours = torch.ops.turbocompile
BF16, F32 = torch.bfloat16, torch.float32


def node_of(target, *args, **kwargs) -> fx.Node:
    """A node of one op; tensors among the arguments become inputs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = fx.Graph()

    def given(value):
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder("x")
        with mode:
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return node

    args, kwargs = (fx.node.map_aggregate(a, given) for a in (args, kwargs))
    node = graph.call_function(target, args, kwargs)
    with mode:
        node.meta["val"] = target(
            *fx.node.map_aggregate(args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a),
            **fx.node.map_aggregate(kwargs, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a),
        )
    return node


def empty(*shape, dtype=F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


PRODUCTS = {
    "linear": (aten.linear.default, empty(2, 5, 8), empty(7, 8), empty(7)),
    "matmul": (aten.matmul.default, empty(3, 2, 4, 8), empty(2, 8, 5)),
    "mm": (aten.mm.default, empty(4, 8), empty(8, 5)),
    "bmm": (aten.bmm.default, empty(3, 4, 8), empty(3, 8, 5)),
    "addmm": (aten.addmm.default, empty(5), empty(4, 8), empty(8, 5)),
    "baddbmm": (aten.baddbmm.default, empty(3, 4, 5), empty(3, 4, 8), empty(3, 8, 5)),
    "einsum": (aten.einsum.default, "bhqd, bhkd -> bhqk", [empty(2, 3, 4, 8), empty(2, 3, 5, 8)]),
    "einsum with an ellipsis": (aten.einsum.default, "...qd,...kd->...qk", [empty(2, 3, 4, 8), empty(2, 3, 5, 8)]),
    "conv3d": (aten.conv3d.default, empty(1, 4, 3, 8, 8), empty(6, 4, 1, 2, 2), empty(6), [1, 2, 2]),
    "conv2d in groups": (aten.conv2d.default, empty(1, 4, 8, 8), empty(8, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], 2),
    "attention": (aten.scaled_dot_product_attention.default, *(empty(2, 3, n, 8) for n in (6, 5, 5))),
}


@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_products_count_what_torch_counts(case):
    target, *args = case
    with FlopCounterMode(display=False) as counter:
        target(*args)
    work, _ = node_cost(node_of(target, *args))
    assert work == {"fp32": counter.get_total_flops()}
    assert counter.get_total_flops() > 0


def test_a_product_runs_in_the_arithmetic_of_its_operands():
    for dtype, kind in ((BF16, "bf16"), (torch.float16, "bf16"), (F32, "fp32"), (torch.float64, "fp32")):
        work, _ = node_cost(node_of(aten.linear.default, empty(3, 8, dtype=dtype), empty(4, 8, dtype=dtype)))
        assert work == {kind: 2 * 3 * 4 * 8}


def test_causal_attention_counts_the_pairs_it_sees():
    for queries, keys in ((6, 6), (4, 7), (7, 4)):
        q, k, v = empty(1, 2, queries, 8), empty(1, 2, keys, 8), empty(1, 2, keys, 8)
        work, _ = node_cost(node_of(aten.scaled_dot_product_attention.default, q, k, v, is_causal=True))
        seen = int(torch.ones(queries, keys).tril().sum())  # query i sees keys 0 to i
        assert work["fp32"] == 2 * 2 * seen * (8 + 8)


def test_an_op_reads_its_inputs_and_writes_its_output_once():
    node = node_of(aten.linear.default, empty(2, 5, 8, dtype=BF16), empty(7, 8, dtype=BF16), empty(7, dtype=BF16))
    assert node_cost(node)[1] == 2 * (2 * 5 * 8 + 7 * 8 + 7 + 2 * 5 * 7)
    x = empty(4, 8)
    graph = fx.Graph()
    a = graph.placeholder("x")
    a.meta["val"] = x
    square = graph.call_function(aten.mul.Tensor, (a, a))
    square.meta["val"] = x
    assert node_cost(square)[1] == 4 * (32 + 32)  # read once, though named twice


def test_an_expanded_input_counts_its_distinct_elements():
    node = node_of(aten.add.Tensor, empty(2, 6, 8), empty(2, 1, 8).expand(2, 6, 8))
    assert node_cost(node)[1] == 4 * (2 * 6 * 8 + 2 * 8 + 2 * 6 * 8)


def test_of_an_embedding_only_the_rows_taken_are_read():
    node = node_of(aten.embedding.default, empty(1000, 8), empty(5, dtype=torch.int64))
    assert node_cost(node) == ({}, 5 * 8 * 4 * 2 + 5 * 8)


@pytest.mark.parametrize(
    ("target", "args"),
    [(aten.permute.default, (empty(2, 3, 4), [0, 2, 1])), (aten.reshape.default, (empty(2, 3, 4), [6, 4])),
     (aten.slice.Tensor, (empty(2, 3, 4), 1, 0, 2)), (aten.expand.default, (empty(2, 1, 4), [2, 3, 4])),
     (aten.to.dtype, (empty(2), F32)), (aten.dropout.default, (empty(2), 0.5, False)),
     (aten.chunk.default, (empty(4, 2), 2)), (aten.empty_like.default, (empty(2, 3),))],
)  # fmt: skip
def test_views_are_free(target, args):
    assert node_cost(node_of(target, *args)) == ({}, 0)


@pytest.mark.parametrize(
    ("target", "args", "moved"),
    [(aten.reshape.default, (empty(2, 3, 4).permute(0, 2, 1), [2, 12]), 2 * 24 * 4),  # strides do not allow a view
     (aten.contiguous.default, (empty(2, 3).t(),), 2 * 6 * 4),
     (aten.to.dtype, (empty(6), BF16), 6 * 4 + 6 * 2),
     (aten.cat.default, ([empty(2, 3), empty(2, 5)], 1), 2 * 16 * 4),
     (aten.copy_.default, (empty(6), empty(6, dtype=BF16)), 6 * 2 + 6 * 4)],
)  # fmt: skip
def test_copies_move_bytes_and_compute_nothing(target, args, moved):
    node = node_of(target, *args)
    assert not is_view(node)
    assert node_cost(node) == ({}, moved)


# ---------------------------------------------------------------------------------------------------------- our ops


def operations(target, *args) -> dict[str, int]:
    return node_cost(node_of(target, *args))[0]


def test_w8a8_linear_runs_in_its_format():
    for format, dtype, scales in (
        ("int8", torch.int8, ((2, 256, 1), (128, 1))),
        ("fp8", torch.float8_e4m3fn, ((2, 256, 1), (128, 1))),
        ("int8_block", torch.int8, ((4, 3), (1, 3))),
    ):
        x, weight = empty(2, 256, 384, dtype=dtype), empty(128, 384, dtype=dtype)
        row, column = (empty(*s) for s in scales)
        work = operations(ours.w8a8_linear.default, x, row, weight, column, None, format, BF16)
        assert work == {format.removesuffix("_block"): 2 * 2 * 256 * 128 * 384}


def test_sage_attention_multiplies_in_int8_and_in_its_pv_format():
    q, k = empty(1, 256, 4, 64, dtype=BF16), empty(1, 192, 2, 64, dtype=BF16)
    each = 2 * 4 * 256 * 192 * 64  # all query heads: GQA repeats k and v
    assert operations(ours.sage_attention.default, q, k, k, 0.125, False, "fp8") == {"int8": each, "fp8": each}
    assert operations(ours.sage_attention.default, q, k, k, 0.125, False, "fp16") == {"int8": each, "bf16": each}


def test_sla_attention_counts_the_kept_blocks_and_the_linear_branch():
    length, heads, dim = 32760, 12, 128  # Wan 1.3B at 480p: 512 key blocks of 64, of which a tenth is kept
    assert kept_keys(length, 0.1, 64) == 51 * 64
    x = empty(1, length, heads, dim, dtype=BF16)
    proj = (empty(dim, dim, dtype=BF16), empty(dim, dtype=BF16))
    sparse = 4 * length * 51 * 64 * dim * heads
    linear = (4 * length * dim**2 + 2 * dim**3) * heads
    work = operations(ours.sla_attention.default, x, x, x, *proj, 0.1, 128, 64, "softmax", "fp8")
    assert work == {"int8": sparse // 2, "fp8": sparse // 2, "bf16": linear}
    work = operations(ours.sla_attention.default, x, x, x, *proj, 0.1, 128, 64, "softmax", "none")
    assert work == {"bf16": sparse + linear}


def test_an_attention_that_makes_its_k_counts_as_the_two_ops_that_it_is():
    q, x, v = empty(1, 6, 4, 8), empty(1, 6, 16), empty(1, 6, 2, 8)
    keys = (empty(16), 1e-6, [empty(6, 4)], [empty(6, 4)], [6])
    made = operations(ours.qk_norm_rope.default, x, *keys[:2], False, 2, *keys[2:], True)
    apart = operations(ours.sage_attention.default, q, v, v, 0.3, False, "fp8")
    assert operations(ours.norm_sage_attention.default, q, x, v, *keys, 0.3, False, "fp8") == apart | made
    options = (empty(8, 8), empty(8), 0.5, 2, 2, "softmax", "fp8")
    work = operations(ours.norm_sla_attention.default, v, x, v, *keys, *options)
    apart = operations(ours.sla_attention.default, v, v, v, *options)
    assert work == apart | {"fp32": made["fp32"] + apart["fp32"]}


def test_sla_keeps_a_block_at_least_and_no_more_keys_than_there_are():
    assert kept_keys(100, 0.01, 64) == 64
    assert kept_keys(100, 1.0, 64) == 100


X = empty(2, 6, 8)
ROW = empty(2, 1, 8)


def test_fusing_saves_bytes_and_no_operations():
    def parts(*nodes):
        return sum(sum(node_cost(n)[0].values()) for n in nodes), sum(node_cost(n)[1] for n in nodes)

    fused = parts(node_of(ours.adaln.default, X, ROW, ROW, None, None, 1e-6))
    apart = parts(
        node_of(aten.layer_norm.default, X, [8]), node_of(aten.mul.Tensor, X, ROW), node_of(aten.add.Tensor, X, ROW)
    )
    assert fused[0] == apart[0]
    assert fused[1] == 4 * (2 * X.numel() + 2 * ROW.numel())
    assert fused[1] < apart[1]


def test_a_fused_quantize_costs_what_it_costs_alone():
    alone = operations(ours.quantize.default, X, "int8")["fp32"]
    pairs = (
        (operations(ours.adaln_quantize.default, X, ROW, ROW, None, None, 1e-6, "int8"),
         operations(ours.adaln.default, X, ROW, ROW, None, None, 1e-6)),
        (operations(ours.gelu_quantize.default, X, "tanh", "fp8"), operations(aten.gelu.default, X)),
        (operations(ours.norm_quantize.default, X, empty(8), None, 1e-6, "rms", "int8"),
         operations(aten.rms_norm.default, X, [8], empty(8))),
        (operations(ours.residual_norm_quantize.default, X, X, ROW, None, None, None, None, 1e-6, "layer", "int8"),
         operations(ours.residual_norm.default, X, X, ROW, None, None, None, None, 1e-6, "layer")),
    )  # fmt: skip
    for fused, plain in pairs:
        assert fused["fp32"] == plain["fp32"] + alone


def test_residual_norm_counts_what_it_is_given():
    def each(*rest):
        return operations(ours.residual_norm.default, X, X, *rest)["fp32"] // X.numel()

    bare = each(None, None, None, None, None, 1e-6, "layer")
    assert each(ROW, None, None, None, None, 1e-6, "layer") == bare + 1
    assert each(None, ROW, ROW, None, None, 1e-6, "layer") == bare + 2
    assert each(None, None, None, empty(8), empty(8), 1e-6, "layer") == bare + 2
    assert each(None, None, None, None, None, 1e-6, "rms") < bare
    assert operations(ours.gated_residual.default, X, X, ROW)["fp32"] == 2 * X.numel()


def test_qk_norm_rope_counts_rotary_where_there_are_tables():
    x = empty(1, 6, 16)
    tables = ([empty(6, 4)], [empty(6, 4)], [6], True)
    plain = operations(ours.qk_norm_rope.default, x, empty(16), 1e-6, False, 2, [], [], [], True)
    turned = operations(ours.qk_norm_rope.default, x, empty(16), 1e-6, False, 2, *tables)
    alone = operations(ours.rope.default, empty(1, 6, 2, 8), *tables)
    assert turned["fp32"] == plain["fp32"] + alone["fp32"]
