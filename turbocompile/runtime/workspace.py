"""The memory that an operator's GPU kernels allocate beside the results, and free before it returns.

Quantized attentions hold K and V in 8 bits, and what chooses the blocks of an SLA. The sizes are those of the tensors
that the launchers in kernels/ allocate; what is left out is below a hundredth of them (scales, sums).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.node_cost import kept_keys, storage_bytes
from turbocompile.ir.op_schema import argument_values, schema_name
from turbocompile.ir.program import is_op

CUBLAS = 64 << 20  # bytes that cuBLAS and cuBLASLt keep for a stream, on the cards where they keep the most


def workspace_bytes(node: fx.Node) -> int:
    """Bytes of the workspace of a node of a Program on a GPU; 0 for an op that has none or a small one."""
    if is_op(node, *SAGE):
        return _sage(argument_values(node))
    if is_op(node, *SLA):
        return _sla(argument_values(node))
    rule = _RULES.get(schema_name(node)) if node.op == "call_function" else None
    return rule(node) if rule is not None else 0


def _padded(dim: int) -> int:
    """The channels of a head as the kernels hold them."""
    return max(16, 1 << (dim - 1).bit_length())


def _quantized_kv(a: dict[str, Any], block_k: int) -> int:
    """K in INT8 and V in FP8 or FP16, in blocks of block_k tokens."""
    batch, length, heads, dim = a["v"].shape
    tokens = -(-length // block_k) * block_k
    return batch * heads * tokens * _padded(dim) * (1 + (1 if a["pv"] == "fp8" else 2))


def _sage(a: dict[str, Any]) -> int:
    """SageAttention's blocks have 64 or 128 keys."""
    return _quantized_kv(a, 128)


def _sla(a: dict[str, Any]) -> int:
    batch, length, heads, dim = a["q"].shape
    itemsize, lines = a["q"].dtype.itemsize, batch * heads * -(-length // a["block_q"])
    blocks = -(-length // a["block_k"])
    kept = kept_keys(length, a["topk"], a["block_k"]) // a["block_k"]
    chosen = lines * (4 * blocks + 4 * max(kept, 1)) + batch * heads * blocks * _padded(dim) * itemsize
    if a["pv"] == "none":
        return chosen
    k = storage_bytes(a["x"].new_empty(a["x"].shape)) if "x" in a else 0  # the linear branch reads k itself
    return chosen + _quantized_kv(a, a["block_k"]) + k


def _convolution(node: fx.Node) -> int:
    """cuDNN changes the layout of the output, and back."""
    return storage_bytes(node.meta["val"])


_RULES: dict[str, Callable[[fx.Node], int]] = {
    "aten::conv3d": _convolution,
    "aten::conv2d": _convolution,
    "aten::convolution": _convolution,
}
