"""quantize(gelu(x))         ->   gelu_quantize(x)
quantize(layer_norm(x))   ->   norm_quantize(x), and so for rms_norm

The quantize of a linear's input joins the GELU or the norm that makes that input. The passes adaln and residual_norm
have joined it to modulated norms and to norms behind a residual.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from turbocompile.kernels import ops

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import Subgraph, is_op
from turbocompile.rewrite.attention_sites import as_norm, in_result_dtype, lone_quantize, readers, replaced_items
from turbocompile.rewrite.match import Match, Pass, rewrite

aten = torch.ops.aten


def before_quantize(sub: Subgraph, *targets: torch._ops.OpOverload) -> Iterator[fx.Node]:
    """Nodes of these operators that a quantize reads."""
    for node in sub.graph.nodes:
        if is_op(node, *targets) and any(is_op(reader, ops.quantize) for reader in readers(node)):
            yield node


def gelus(sub: Subgraph) -> Iterator[fx.Node]:
    """GELUs that a quantize reads."""
    yield from before_quantize(sub, aten.gelu.default)


def norms(sub: Subgraph) -> Iterator[fx.Node]:
    """Norms that a quantize reads."""
    yield from before_quantize(sub, aten.layer_norm.default, aten.rms_norm.default)


@rewrite(candidates=gelus)
def gelu(m: Match) -> dict[fx.Node, fx.Node] | str:
    quantize = lone_quantize(m.root)
    if quantize is None:
        return "something else than one quantize reads it"
    x, approximate = arguments(m.root.target, m.root.args, m.root.kwargs)  # type: ignore[arg-type]
    made = m.op(ops.gelu_quantize, in_result_dtype(m, m.root, x), approximate, quantize.args[1])
    return replaced_items(quantize, made, m)


@rewrite(candidates=norms)
def norm(m: Match) -> dict[fx.Node, fx.Node] | str:
    quantize, found = lone_quantize(m.root), as_norm(m.root)
    if quantize is None:
        return "something else than one quantize reads it"
    if found is None:
        return "it normalizes more than the last axis"
    x = in_result_dtype(m, m.root, found.x)
    made = m.op(ops.norm_quantize, x, found.weight, found.bias, found.eps, found.kind, quantize.args[1])
    return replaced_items(quantize, made, m)


PASS = Pass("gelu_quant", "exact", [gelu, norm], needs=("w8a8",))
