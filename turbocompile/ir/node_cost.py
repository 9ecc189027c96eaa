"""What one run of a node costs: operations by kind of arithmetic, and bytes that it reads and writes.

Operations are counted from the shapes in `meta["val"]`. A product (linear, matmul, convolution, attention) counts its
products alone, a multiply-add as two; softmax, scales and biases inside it are some percent and overlap with them.
Everything else counts operations per element. Bytes are what must cross the memory bus if every op reads its inputs and
writes its outputs once: views are free, and what an op keeps to itself (a quantized copy of q) is not counted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from turbocompile.ir.op_schema import argument_values, is_view, schema_name
from turbocompile.ir.program import call, walk_tensors

Work = dict[str, int]  # kind of arithmetic ("bf16", "fp8", "int8", "fp32") -> operations
KINDS = ("bf16", "fp8", "int8", "fp32")
_EMPTY = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_permuted", "aten::empty_strided")
_OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_")
_GATHERS = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index")

Rule = Callable[[fx.Node], Mapping[str, float]]
_RULES: dict[str, Rule] = {}


def node_cost(node: fx.Node) -> tuple[Work, int]:
    """Operations by kind, and bytes read and written, of one run of a node."""
    name = schema_name(node)
    if node.op != "call_function" or node.target in (call, operator.getitem) or name in _EMPTY or is_view(node):
        return {}, 0
    if next(walk_tensors(node.meta.get("val")), None) is None:  # assertions
        return {}, 0
    work = {k: int(n) for k, n in _RULES.get(name, _elementwise)(node).items()}
    return work, _bytes_moved(node, name)


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: along an expanded dimension (stride 0) there is one."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0]
    return math.prod(sizes) * tensor.dtype.itemsize


def _bytes_moved(node: fx.Node, name: str) -> int:
    written = sum(storage_bytes(t) for t in walk_tensors(node.meta["val"]))
    read = [t for n in node.all_input_nodes for t in walk_tensors(n.meta["val"])]
    if name in _OVERWRITE:
        return written + sum(storage_bytes(t) for t in read[1:])
    if name in _GATHERS:  # of the table, only the rows that are taken
        return 2 * written + sum(storage_bytes(t) for t in read[1:])
    return written + sum(storage_bytes(t) for t in read)


def _counts(*names: str) -> Callable[[Rule], Rule]:
    """Registers how the operations of ops are counted, by their schema names."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def arithmetic(dtype: torch.dtype) -> str:
    """The kind of arithmetic in which a product of such numbers runs."""
    if dtype.itemsize == 1:
        return "fp8" if dtype.is_floating_point else "int8"
    return "bf16" if dtype.itemsize == 2 and dtype.is_floating_point else "fp32"


def _elements(node: fx.Node) -> int:
    """Elements of the largest tensor that a node reads or makes: reductions work on what they read."""
    values = [node.meta["val"], *(n.meta["val"] for n in node.all_input_nodes)]
    return max((t.numel() for v in values for t in walk_tensors(v)), default=0)


# Operations per element of what is no product. Norms: centre, square, sums, scale. An affine, a modulation and a gated
# residual are two more each. Softmax: maximum, subtraction, exponential, sum, division. Quantization: absolute value,
# maximum, scale, rounding. Rotary: two products and a sum.
_LAYER, _RMS, _AFFINE, _QUANTIZE, _ROPE, _GELU = 5, 4, 2, 4, 3, 8
_PER_ELEMENT = {
    "aten::gelu": _GELU, "aten::silu": 4, "aten::sigmoid": 3, "aten::softmax": 5, "aten::_softmax": 5, "aten::var": 3,
    "aten::var_mean": 3, "aten::addcmul": 2, "aten::lerp": 3, "aten::linalg_vector_norm": 2,
    "turbocompile::rope": _ROPE, "turbocompile::quantize": _QUANTIZE, "turbocompile::gelu_quantize": _GELU + _QUANTIZE,
}  # fmt: skip
_MOVED = """
cat concat stack clone copy copy_ to _to_copy contiguous reshape reshape_as flatten type_as slice_scatter
select_scatter repeat repeat_interleave tile roll flip constant_pad_nd pad full full_like zeros zeros_like ones
ones_like fill_ zero_ arange new_zeros new_ones new_full scalar_tensor complex _unsafe_view pixel_shuffle
pixel_unshuffle
"""
_MOVES = tuple(f"aten::{name}" for name in _MOVED.split())


def _elementwise(node: fx.Node) -> Mapping[str, float]:
    """One operation per element where the tables above say nothing else."""
    return {"fp32": _PER_ELEMENT.get(schema_name(node), 1) * _elements(node)}


@_counts(*_MOVES, *_GATHERS)
def _moves(node: fx.Node) -> Mapping[str, float]:
    return {}


@_counts("aten::linear")
def _linear(node: fx.Node) -> Mapping[str, float]:
    weight = argument_values(node)["weight"]
    return {arithmetic(weight.dtype): 2 * node.meta["val"].numel() * weight.shape[-1]}


@_counts("aten::matmul", "aten::mm", "aten::bmm", "aten::mv")
def _matmul(node: fx.Node) -> Mapping[str, float]:
    left, out = argument_values(node)["self"], node.meta["val"]
    return {arithmetic(left.dtype): 2 * out.numel() * left.shape[-1]}


@_counts("aten::dot", "aten::outer")
def _vectors(node: fx.Node) -> Mapping[str, float]:
    return {arithmetic(node.meta["val"].dtype): 2 * _elements(node)}


@_counts("aten::addmm", "aten::baddbmm")
def _addmm(node: fx.Node) -> Mapping[str, float]:
    a = argument_values(node)
    left = a.get("mat1", a.get("batch1"))
    return {arithmetic(left.dtype): 2 * node.meta["val"].numel() * left.shape[-1]}  # type: ignore[union-attr]


@_counts("aten::einsum")
def _einsum(node: fx.Node) -> Mapping[str, float]:
    """Every combination of the indices once; an ellipsis stands for the leading dimensions of the output."""
    a = argument_values(node)
    letters = a["equation"].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for names, tensor in zip(letters, a["tensors"], strict=True):
        named = names.replace("...", "")
        rest = tensor.dim() - len(named)
        head = names.index("...") if "..." in names else 0
        dims = list(tensor.shape)
        sizes["..."] = max(sizes.get("...", 1), math.prod(dims[head : head + rest]))
        sizes.update(zip(named, dims[:head] + dims[head + rest :], strict=True))
    return {arithmetic(node.meta["val"].dtype): 2 * math.prod(sizes.values())}


@_counts("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
def _convolution(node: fx.Node) -> Mapping[str, float]:
    """weight (C_out, C_in / groups, *kernel): every output element is a product over one row of it."""
    weight = argument_values(node)["weight"]
    return {arithmetic(weight.dtype): 2 * node.meta["val"].numel() * math.prod(weight.shape[1:])}


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs of query and key that count; query i sees keys 0 to i when causal."""
    if not causal:
        return queries * keys
    triangle = min(queries, keys)
    return triangle * (triangle + 1) // 2 + max(0, queries - keys) * keys


@_counts("aten::scaled_dot_product_attention")
def _attention(node: fx.Node) -> Mapping[str, float]:
    """q (..., H, Lq, D), k and v (..., Hkv, Lk, D): 2 Lq Lk D operations a head for each of QK and PV."""
    a = argument_values(node)
    q, k, v = a["query"], a["key"], a["value"]
    pairs = math.prod(q.shape[:-2]) * _pairs(q.shape[-2], k.shape[-2], a["is_causal"])
    return {arithmetic(q.dtype): 2 * pairs * (q.shape[-1] + v.shape[-1])}


def _add(*parts: tuple[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, n in parts:
        found[kind] = found.get(kind, 0) + n
    return found


def _pv(pv: str, dtype: torch.dtype) -> str:
    return {"fp8": "fp8", "fp16": "bf16"}.get(pv, arithmetic(dtype))


@_counts("turbocompile::sage_attention", "turbocompile::norm_sage_attention")
def _sage(node: fx.Node) -> Mapping[str, float]:
    """q (B, L, H, D): QK in INT8, PV in FP8 or FP16, and k's norm and rotary where it makes k."""
    a = argument_values(node)
    b, length, heads, dim = a["q"].shape
    one = 2 * b * heads * dim * _pairs(length, a["v"].shape[1], a["is_causal"])
    return _add(("int8", one), (_pv(a["pv"], a["q"].dtype), one), *_norm_and_rotary(a))


def kept_keys(length: int, topk: float, block_k: int) -> int:
    """Keys that each query of a sparse-linear attention sees: max(1, floor(topk * blocks)) blocks of block_k."""
    blocks = -(-length // block_k)
    return min(length, min(blocks, max(1, int(topk * blocks))) * block_k)


@_counts("turbocompile::sla_attention", "turbocompile::norm_sla_attention")
def _sla(node: fx.Node) -> Mapping[str, float]:
    """A head: 4 L K block_k D for the K kept key blocks, 4 L D^2 for the linear branch, 2 D^3 to fold proj_l into it.

    k's norm and rotary besides, where it makes k. The block map (pooled scores) is block_q * block_k times smaller than
    the full scores, and left out.
    """
    a = argument_values(node)
    b, length, heads, dim = a["q"].shape
    kind = arithmetic(a["q"].dtype)
    half = 2 * b * heads * length * kept_keys(length, a["topk"], a["block_k"]) * dim
    linear = b * heads * (4 * length * dim**2 + 2 * dim**3)
    products = ((kind if a["pv"] == "none" else "int8", half), (_pv(a["pv"], a["q"].dtype), half), (kind, linear))
    return _add(*products, *_norm_and_rotary(a))


@_counts("turbocompile::w8a8_linear")
def _w8a8(node: fx.Node) -> Mapping[str, float]:
    weight = argument_values(node)["weight"]
    return {arithmetic(weight.dtype): 2 * node.meta["val"].numel() * weight.shape[-1]}


@_counts("aten::layer_norm", "aten::native_layer_norm", "aten::group_norm", "aten::native_group_norm", "aten::rms_norm")
def _norm(node: fx.Node) -> Mapping[str, float]:
    norm = "rms" if "rms" in schema_name(node) else "layer"
    return {"fp32": _norm_operations(norm, argument_values(node)) * _elements(node)}


def _norm_operations(norm: str, a: Mapping[str, Any]) -> int:
    """Operations per element of a norm, with the affine and the modulation that it has."""
    affine = 1 * (a.get("weight") is not None) + 1 * (a.get("bias") is not None)
    return (_RMS if norm == "rms" else _LAYER) + affine + _AFFINE * (a.get("scale") is not None)


@_counts("turbocompile::qk_norm_rope")
def _qk_norm_rope(node: fx.Node) -> Mapping[str, float]:
    return _add(*_norm_and_rotary(argument_values(node)))


def _norm_and_rotary(a: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """RMSNorm and rotary of x; nothing for an attention that reads its k."""
    if "x" not in a:
        return ()
    return (("fp32", (_norm_operations("rms", {"weight": a["weight"]}) + _ROPE * bool(a["cos"])) * a["x"].numel()),)


@_counts(
    "turbocompile::adaln", "turbocompile::adaln_quantize", "turbocompile::residual_norm",
    "turbocompile::residual_norm_quantize", "turbocompile::norm_quantize", "turbocompile::gated_residual",
)  # fmt: skip
def _fused_norm(node: fx.Node) -> Mapping[str, float]:
    name, a = schema_name(node), argument_values(node)
    each = 0
    if "residual" in name:
        each += 1 + (a["gate"] is not None)
    if name != "turbocompile::gated_residual":
        each += _norm_operations(a.get("norm", "layer"), a)
    if name.endswith("_quantize"):
        each += _QUANTIZE
    return {"fp32": each * a["x"].numel()}
