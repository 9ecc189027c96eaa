"""linear(norm(x) * (1 + scale) + shift, W)   ->   linear(norm(x) / s * (1 + scale) + shift / s, W * s)
linear(attention(q, k, v), W)                ->   linear(attention(q, k, v / s), W * s), with v / s from v's own linear

SmoothQuant (Xiao et al. 2023): where some channels of an activation are much larger than the others, the scale of 8
bits leaves few bits to the others, so that size moves from the activation into the weight. 1 / s goes into a norm's
weight (and into a shift behind it), or into the rows of v's weight, because attention is linear in v. Calibration chose
s, a power of two for each channel and layer, so that no product is rounded that was exact. Linears that share an input
share s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import dtype, is_op, shape
from turbocompile.ir.weights import Cast, Cat, Expr, Mul, Reshape, Slice
from turbocompile.recipe.options import W8A8Options
from turbocompile.rewrite.attention_sites import as_norm
from turbocompile.rewrite.facts import give_place, hand_on
from turbocompile.rewrite.linears import all_linears, first_weight, given_weights, held
from turbocompile.rewrite.match import Match, Pass, is_cast, rewrite, uncast
from turbocompile.rewrite.scale_folding import Fold, between, fold_of, has_norm, path_of_v

aten = torch.ops.aten
NOT_ASKED = "calibration did not ask for it"


@rewrite(candidates=all_linears, count=held)
def smooth(m: Match) -> dict[fx.Node, fx.Node] | str:
    options: W8A8Options = m.options
    if m.site not in options.smoothed:
        wide = f"the linear stays wide: {options.off_reason}" if options.format == "off" else NOT_ASKED
        return options.unsmoothed.get(m.site, wide)
    fold = fold_of(m.root, m.sub)
    if isinstance(fold, str):
        return fold
    under = uncast(m.root.args[0])
    replaced: dict[fx.Node, fx.Node] = {}
    x = smaller(m, fold, under) if fold.attention is None else attended(m, fold, under, replaced)
    for linear in fold.linears:
        weight, *bias = linear.args[1:]
        expr = m.expr(weight)
        assert expr is not None  # as fold_of found
        wide = m.weight(f"{local(weight)}smooth_weight", Mul(expr, fold.vector("smooth")))
        replaced[linear] = remade(m, linear, recast(m, linear.args[0], x), wide, *bias)
    return replaced


def local(weight: Any) -> str:
    """The start of a weight's local name, as in "attn1.to_q."."""
    return str(first_weight(weight).target).removesuffix("weight").removesuffix("bias")


def remade(m: Match, old: fx.Node, *args: Any) -> fx.Node:
    """The node with other arguments, with its place in the model and its facts."""
    made = m.op(old.target, *args, **old.kwargs)
    give_place(made, old)
    hand_on(old, made)
    return made


def recast(m: Match, node: Any, x: fx.Node) -> fx.Node:
    """x with the casts of node."""
    return remade(m, node, recast(m, node.args[0], x), *node.args[1:]) if is_cast(node) else x


def unsmooth(m: Match, fold: Fold, wanted: torch.dtype) -> fx.Node:
    """1 / s as a weight of that dtype, which holds it exactly."""
    vector = fold.vector("unsmooth")
    name = f"{fold.base}unsmooth"
    if wanted == vector.dtype:
        return m.weight(name, vector)
    return m.weight(f"{name}_{str(wanted).removeprefix('torch.')}", Cast(vector, wanted))


def smaller(m: Match, fold: Fold, node: Any) -> fx.Node:
    """node / s, where node is a norm, scaled, shifted and cast."""
    if is_cast(node):
        return remade(m, node, smaller(m, fold, node.args[0]), *node.args[1:])
    if as_norm(node) is not None:
        return smaller_norm(m, fold, node)
    inner = next(n for n in node.args if has_norm(n))
    other = next(n for n in node.args if n is not inner)
    if is_op(node, aten.add.Tensor):
        other = m.op(aten.mul.Tensor, other, unsmooth(m, fold, dtype(other)))
    return remade(m, node, smaller(m, fold, inner), other)


def smaller_norm(m: Match, fold: Fold, node: fx.Node) -> fx.Node:
    x, sizes, weight, *rest = arguments(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    scale, gain = fold.vector("unsmooth"), m.expr(weight)
    less = unsmooth(m, fold, dtype(x)) if gain is None else m.weight(f"{fold.base}norm_weight", Mul(gain, scale))
    if is_op(node, aten.rms_norm.default):
        return remade(m, node, x, sizes, less, *rest)
    bias = m.expr(rest[0])
    shift = None if bias is None else m.weight(f"{fold.base}norm_bias", Mul(bias, scale))
    return remade(m, node, x, sizes, less, shift, rest[1])


def attended(m: Match, fold: Fold, node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    """node / s, where node has the heads of an attention side by side.

    replaced: gets what else v's linear gives (q and k, where they are of one linear).
    """
    attention: Any = fold.attention
    *layout, base = path_of_v(attention)[1:]
    v = smaller_v(m, fold, base, replaced)
    for step in reversed(layout):
        v = remade(m, step, v, *step.args[1:])
    made = remade(m, attention, *attention.args[:2], v, *attention.args[3:])
    for step in reversed(between(node, attention)):
        made = remade(m, step, made, *step.args[1:])
    return made


def smaller_v(m: Match, fold: Fold, base: Any, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    """base / s, where base is a linear or a slice of one."""
    whole = not is_op(base, aten.slice.Tensor)
    linear = base if whole else base.args[0]
    start, stop = 0, shape(linear)[-1]
    if not whole:
        _, _, *ends, _ = arguments(aten.slice.Tensor, base.args, base.kwargs)
        start, stop, _ = slice(*ends).indices(stop)
    weights = []
    for weight, name in zip(given_weights(linear), ("less_weight", "less_bias"), strict=False):
        expr = m.expr(weight)
        assert expr is not None  # as fold_of found
        weights.append(m.weight(f"{local(weight)}{name}", rows_scaled(expr, start, stop, fold.vector("unsmooth"))))
    wide = remade(m, linear, linear.args[0], *weights)
    if whole:
        return wide
    made = {part: remade(m, part, wide, *part.args[1:]) for part in list(linear.users)}
    replaced |= {part: new for part, new in made.items() if part is not base}
    return made[base]


def rows_scaled(expr: Expr, start: int, stop: int, by: Expr) -> Expr:
    """A weight or bias whose rows from start to stop are multiplied by the vector `by`."""
    column = Reshape(by, (*by.shape, *(1 for _ in expr.shape[1:])))
    if (start, stop) == (0, expr.shape[0]):
        return Mul(expr, column)
    if isinstance(expr, Cat) and expr.dim == 0:
        parts, at = [], 0
        for part in expr.of:
            parts.append(Mul(part, column) if (at, at + part.shape[0]) == (start, stop) else part)
            at += part.shape[0]
        if any(a is not b for a, b in zip(parts, expr.of, strict=True)):
            return Cat(tuple(parts), 0)
    pieces: list[Expr] = [Slice(expr, 0, 0, start)] if start else []
    pieces.append(Mul(Slice(expr, 0, start, stop), column))
    pieces += [Slice(expr, 0, stop, expr.shape[0])] if stop < expr.shape[0] else []
    return Cat(tuple(pieces), 0)


PASS = Pass("smooth", "exact", [smooth], section="w8a8", quiet=True)
