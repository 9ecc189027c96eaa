"""layer_norm(x) * (1 + scale) + shift             ->   adaln(x, scale, shift)
quantize(layer_norm(x) * (1 + scale) + shift)   ->   adaln_quantize(x, scale, shift)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from turbocompile.kernels import ops

from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.rewrite.attention_sites import in_result_dtype, lone_quantize, replaced_items, token_layout
from turbocompile.rewrite.match import LAST, Match, Pass, layer_norm, rewrite, uncast, variables

aten = torch.ops.aten
x, scale, shift, gain, bias, eps = variables("x scale shift gain bias eps")
ADALN = layer_norm(x, LAST, gain, bias, eps) * (1 + scale) + shift


def modulated_norms(sub: Subgraph) -> Iterator[fx.Node]:
    """Sums, one term of which is a product with a LayerNorm."""
    for node in sub.graph.nodes:
        products = [uncast(n) for n in node.args] if is_op(node, aten.add.Tensor) else []
        factors = [uncast(n) for p in products if is_op(p, aten.mul.Tensor) for n in p.args]
        if any(is_op(n, aten.layer_norm.default) for n in factors):
            yield node


@rewrite(ADALN, candidates=modulated_norms)
def adaln(m: Match) -> fx.Node | dict[fx.Node, fx.Node] | str:
    if shape(m.x) != shape(m.root):
        return f"the norm {list(shape(m.x))} is broadcast to {list(shape(m.root))}"
    reason = token_layout(m, m.scale, m.shift)
    if reason is not None:
        return reason
    arguments = (in_result_dtype(m, m.root, m.x), m.scale, m.shift, m.gain, m.bias, float(m.eps))
    quantize = lone_quantize(m.root)
    if quantize is None:
        return m.op(ops.adaln, *arguments)
    return replaced_items(quantize, m.op(ops.adaln_quantize, *arguments, quantize.args[1]), m)


PASS = Pass("adaln", "exact", [adaln], needs=("layer_norm",))
