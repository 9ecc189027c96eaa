"""sage_attention(q, qk_norm_rope(x), v)   ->   norm_sage_attention(q, x, v)
sla_attention(q, qk_norm_rope(x), v)    ->   norm_sla_attention(q, x, v)

A k that the attention alone reads is normed, rotated and quantized by one kernel. A site is a quantized attention with
a rotated k. The k of cross-attention has no rotary and is short, so that attention is no site.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from turbocompile.kernels import ops
from turbocompile.kernels.attention.keys import HEAD_DIMS

from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.rewrite.match import Match, Pass, rewrite

WITH_NORM = {
    ops.sage_attention.default: ops.norm_sage_attention.default,
    ops.sla_attention.default: ops.norm_sla_attention.default,
}


def rotated(sub: Subgraph) -> Iterator[fx.Node]:
    """Quantized attentions whose k is a qk_norm_rope with tables."""
    for node in sub.graph.nodes:
        if is_op(node, *WITH_NORM) and node.args[-1] != "none":
            k: Any = node.args[1]
            if is_op(k, ops.qk_norm_rope) and k.args[5]:
                yield node


@rewrite(candidates=rotated)
def norm_attention(m: Match) -> fx.Node | str:
    k: Any
    q, k, v, *options = m.root.args
    x, weight, eps, per_head, heads, cos, sin, grid, interleaved = k.args
    if len(k.users) > 1 or k in (q, v):
        return "something else reads k, too"
    if per_head and heads > 1:
        return "the norm of k is over each head, and not over all channels"
    if not interleaved:
        return "the rotary of k turns the halves of a head, and not neighbouring channels"
    if shape(k)[-1] not in HEAD_DIMS:
        return f"the heads have {shape(k)[-1]} channels, and the kernel takes {' or '.join(map(str, HEAD_DIMS))}"
    return m.op(WITH_NORM[m.root.target], q, x, v, weight, eps, cos, sin, grid, *options)  # type: ignore[index]


PASS = Pass("norm_attention", "exact", [norm_attention], needs=("attention", "qk_norm_rope"))
