"""A node's tensors in short text."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from turbocompile.capture.export import capture
from turbocompile.ir.node_text import describe
from turbocompile.ir.program import is_op

aten = torch.ops.aten


def described(model, *tensors, op) -> str:
    """The description of the only node of an op."""
    (node,) = (n for n in capture(model, tensors, {}).shell.graph.nodes if is_op(n, op))
    return describe(node)


def test_equal_inputs_are_described_once():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return functional.scaled_dot_product_attention(q, k, v)

    q = torch.randn(1, 2, 6, 8, dtype=torch.bfloat16)
    found = described(Attention(), q, q.clone(), q.clone(), op=aten.scaled_dot_product_attention)
    assert found == "3 of 1x2x6x8 bf16 -> 1x2x6x8 bf16"


def test_small_tensors_are_not_described():
    found = described(nn.Linear(64, 32), torch.randn(1, 4096, 64), op=aten.linear)
    assert found == "1x4096x64 fp32, 32x64 fp32 -> 1x4096x32 fp32"
