"""A small model of two blocks, and passes that rewrite the products in it."""

from __future__ import annotations

import torch
from torch import nn

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import is_op
from turbocompile.numerics.program_values import Weights
from turbocompile.numerics.verifier import Verifier
from turbocompile.rewrite.match import Pass, rewrite, variables
from turbocompile.rewrite.normalize import normalize

aten = torch.ops.aten
x, y = variables("x y")


class Model(nn.Module):
    """Two linears, a product and a permuted sum: enough for a rewrite to go wrong in."""

    def __init__(self, dim=64, block=None):
        super().__init__()
        self.blocks = nn.ModuleList((block or Block)(dim) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x):
        n = self.norm(x)
        return x + (self.a(n) * self.b(n).sigmoid()).transpose(1, 2).contiguous().transpose(1, 2).relu()


def made(dtype=torch.float32, block=Block):
    """A model, its Program in normal form and as captured, and a Verifier."""
    torch.manual_seed(0)
    model = Model(block=block).eval().to(dtype)
    program = capture(model, (torch.randn(2, 12, 64, dtype=dtype),))
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Weights(Evaluator(ModuleTensors(model), program.constants)))
    return model, program, raw, verifier


def products(sub):
    return [n for n in sub.graph.nodes if is_op(n, aten.mul.Tensor)]


def product_pass(kind, change, name="product"):
    """A pass that rewrites the product by `change(m)`. name: of a built-in pass, it has the budget of that one."""

    @rewrite(x * y, candidates=products)
    def rule(m):
        return change(m)

    return Pass(name, kind, [rule])
