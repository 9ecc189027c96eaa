"""x * sigmoid(1.702 * x)   ->   quick_gelu(x)"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from turbocompile.passes import Match, Pass, Subgraph, is_op, op, rewrite, variables

aten = torch.ops.aten


@torch.library.custom_op("quick_gelu_pass::quick_gelu", mutates_args=())
def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 * x), in the dtype of x; a kernel of your own would stand here."""
    return x * torch.sigmoid(1.702 * x)


@quick_gelu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


(x,) = variables("x")
QUICK_GELU = x * op(aten.sigmoid.default)(x * 1.702)


def gates(sub: Subgraph) -> Iterator[fx.Node]:
    """Products with a sigmoid: every node that a user would expect this pass to look at."""
    for node in sub.graph.nodes:
        if is_op(node, aten.mul.Tensor) and any(is_op(n, aten.sigmoid.default) for n in node.all_input_nodes):
            yield node


@rewrite(QUICK_GELU, candidates=gates)
def to_quick_gelu(m: Match) -> fx.Node | str:
    if not m.x.meta["val"].is_floating_point():
        return "the input is no floating-point tensor"
    return m.op(torch.ops.quick_gelu_pass.quick_gelu.default, m.x)


# Before residual_norm, because that pass may read a sum of two gates as x + gate * y.
PASS = Pass("quick_gelu", "exact", [to_quick_gelu], needs=("norms",), before=("residual_norm",))
