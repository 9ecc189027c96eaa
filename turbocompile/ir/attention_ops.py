"""The attention operators of a graph: how to recognize them, and the layouts of their operands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from turbocompile.ir.program import Subgraph, is_op
from turbocompile.kernels import ops

aten = torch.ops.aten

# (batch, heads, tokens, head_dim) is the layout of SDPA, (batch, tokens, heads, head_dim) the layout of our operators.
BHLD, BLHD = "bhld", "blhd"

# The quantized attentions by kind: the operator that reads k, and the operator that also norms and rotates k.
# The first and the third operand of each are q and v.
SAGE = (ops.sage_attention, ops.norm_sage_attention)
SLA = (ops.sla_attention, ops.norm_sla_attention)


def is_attention(node: Any) -> bool:
    """Whether node is a call of an attention operator."""
    return is_op(node, aten.scaled_dot_product_attention, *SAGE, *SLA)


def attentions(sub: Subgraph) -> Iterator[fx.Node]:
    """The attention operators of a graph, in order."""
    yield from (n for n in sub.graph.nodes if is_attention(n))


def attention_layout(node: fx.Node) -> str:
    """The layout of an attention's q and v, and of its k where it reads one: BHLD or BLHD."""
    return BHLD if is_op(node, aten.scaled_dot_product_attention) else BLHD
