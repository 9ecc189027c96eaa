"""linear(x, weight, bias)   ->   data, scale = quantize(x); w8a8_linear(data, scale, quantized weight, its scale, bias)

8-bit weights and activations. The quantize is a node of its own, so that linears with one input share it, and so that
later passes can join it to a norm or a GELU. Linears outside the blocks, and linears that do not act on tokens
(modulation), stay.
"""

from __future__ import annotations

import operator
import re
from typing import Any

from torch import fx
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import ALIGNED, BLOCK

from turbocompile.hardware import linear_speedup
from turbocompile.ir.program import SHELL, dtype, shape
from turbocompile.ir.weights import Cat, Expr, Quantize
from turbocompile.recipe.options import W8A8Options
from turbocompile.rewrite.attention_sites import is_of_heads
from turbocompile.rewrite.linears import all_linears, dequantized, first_weight, held, rows
from turbocompile.rewrite.match import Match, Pass, rewrite

_ADAPTER = re.compile(r"(^|\.)lora_[AB]\.")


def format_of(options: W8A8Options, expr: Expr | None) -> str:
    """The format of a linear with this weight: the checkpoint's own where that is kept and the target has it, else that
    of the options.
    """
    own = {d.format for d in dequantized(expr)} if options.keeps_own else set()
    if len(own) != 1 or linear_speedup(options.target, next(iter(own))) is None:
        return options.format
    return own.pop()


def refusal(m: Match, x: fx.Node, weight: fx.Node, expr: Expr | None, format: str) -> str | None:
    """Why the linear stays; None where it need not."""
    if format == "off":
        return m.options.off_reason
    if m.graph == SHELL:
        return (
            "it is outside the blocks" if m.program.calls() else "no repeated blocks were found, and only they change"
        )
    if not acts_on_tokens(m, x):
        return f"it does not act on tokens (its input is {list(shape(x))})"
    if expr is None:
        return "its weight is computed in the graph"
    if _ADAPTER.search(str(first_weight(weight).target)):
        return "it is a factor of an adapter, which stays wide"
    if m.site in m.options.keep:
        return m.options.keep[m.site]
    channels_out, channels_in = shape(weight)
    if format == "int8_block" and (channels_in % BLOCK or channels_out % 8):
        return f"int8_block needs K % {BLOCK} == 0 and N % 8 == 0, and this weight is {list(shape(weight))}"
    if m.options.target != "cpu" and channels_in % ALIGNED:
        return f"the kernels need K % {ALIGNED} == 0, and this weight is {list(shape(weight))}"
    return None


def acts_on_tokens(m: Match, x: fx.Node) -> bool:
    """Whether x has more vectors than the batch has samples, each a token's: (batch, tokens, channels), or with more
    axes of tokens (frames, rows, columns, windows). Those of heads have a further axis, too.
    """
    batch = min((shape(n)[0] for n in m.sub.inputs() if len(shape(n)) > 1), default=1)
    return rows(x) > batch and (len(shape(x)) <= 3 or not is_of_heads(x))


def quantized(expr: Expr, format: str) -> tuple[Expr, Expr]:
    """(data, scale) of a weight; those of the checkpoint where it has them in this format."""
    own = dequantized(expr)
    whole = format != "int8_block" or all(d.shape[0] % BLOCK == 0 for d in own[:-1])
    if own and whole and all(d.format == format for d in own):
        if len(own) == 1:
            return own[0].data, own[0].scale
        return Cat(tuple(d.data for d in own), 0), Cat(tuple(d.scale for d in own), 0)
    return Quantize(expr, format, "data"), Quantize(expr, format, "scale")


@rewrite(candidates=all_linears, count=held)
def w8a8(m: Match) -> fx.Node | str:
    given: Any = (*m.root.args, None)
    x, weight, bias = given[:3]
    expr = m.expr(weight)
    format = format_of(m.options, expr)
    reason = refusal(m, x, weight, expr, format)
    if reason is not None or expr is None:
        return str(reason)
    name = str(first_weight(weight).target).removesuffix("weight")
    data_expr, scale_expr = quantized(expr, format)
    data, scale = m.weight(f"{name}{format}_weight", data_expr), m.weight(f"{name}{format}_scale", scale_expr)
    activation = m.op(ops.quantize, x, format)
    parts = [m.op(operator.getitem, activation, i) for i in range(2)]
    return m.op(ops.w8a8_linear, *parts, data, scale, bias, format, dtype(m.root))


PASS = Pass("w8a8", "quantizing", [w8a8])
