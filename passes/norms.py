"""(x - mean(x)) * rsqrt(mean((x - mean(x))**2) + eps) * weight + bias   ->   layer_norm(x, weight, bias, eps)
x * rsqrt(mean(x**2) + eps) * weight                                     ->   rms_norm(x, weight, eps)

Over the last axis, in any arrangement: the weight on either factor, a division by a square root, casts in between. A
site is the reciprocal root of a mean; the pass looks for the norm in the products and sums that read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from turbocompile.ir.program import Subgraph, dtype, is_op, shape
from turbocompile.rewrite.match import (
    LAST,
    Match,
    Pass,
    Pattern,
    is_cast,
    layer_norm,
    matches,
    mean,
    rewrite,
    rms_norm,
    uncast,
    unwiden,
    variables,
)

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types too widely to read them
x, weight, bias, eps = variables("x weight bias eps")


def average(value: Pattern) -> Pattern:
    """The mean over the last axis, which is kept."""
    return mean(value, [LAST], True)


def affine(factor: Pattern, root: Pattern) -> list[Pattern]:
    """factor * root with weight and bias, most first; the weight may sit on either factor."""
    scaled = [factor * root * weight, factor * weight * root, factor * (root * weight)]
    return [s + bias for s in scaled] + scaled + [factor * root + bias, factor * root]


def inverse_roots(value: Pattern) -> list[Pattern]:
    """The ways to write 1 / sqrt(value + eps). Where a cast lies in between, the normal form leaves two powers."""
    return [(value + eps) ** -0.5, ((value + eps) ** 0.5) ** -1]


CENTRED = x - average(x)
VARIANCES = [average(CENTRED**2), average(x**2) - average(x) ** 2]
LAYER_NORM = [p for v in VARIANCES for r in inverse_roots(v) for p in affine(CENTRED, r)]
RMS_NORM = [p for r in inverse_roots(average(x**2)) for p in affine(x, r)]
FORM = "(x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) or x / sqrt(mean(x**2) + eps) over the last axis"


def reciprocal_roots(sub: Subgraph) -> Iterator[Node]:
    """Negative powers of a mean, as a norm multiplies with, whatever lies between the mean and the power."""
    for node in sub.graph.nodes:
        if is_op(node, aten.pow.Tensor_Scalar) and node.args[1] in (-0.5, -1) and _of_mean(node.args[0], 5):
            yield node


def _of_mean(node: Node, depth: int) -> bool:
    through = (aten.add.Tensor, aten.mul.Tensor, aten.neg.default, aten.pow.Tensor_Scalar, aten.to.dtype)
    if is_op(node, aten.mean.dim, aten.reshape.default):
        return is_op(node, aten.mean.dim) or _of_mean(node.args[0], depth)
    return depth > 0 and is_op(node, *through) and any(_of_mean(n, depth - 1) for n in node.all_input_nodes)


def constant(node: Node) -> bool:
    """Whether node depends on weights alone."""
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n.op == "placeholder" or (n.op == "call_function" and not isinstance(n.target, torch._ops.OpOverload)):
            return False
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return True


def upwards(node: Node) -> list[Node]:
    """The products and sums that node feeds through one reader each, outermost first; its direct readers last."""
    readers = [n for u in node.users for n in (u.users if is_cast(u) else [u])]
    found = [n for n in readers if is_op(n, aten.mul.Tensor)]
    for top in found:
        while len(top.users) == 1:
            (top,) = top.users
            if is_op(top, aten.mul.Tensor, aten.add.Tensor):
                found.append(top)
            elif not is_cast(top):
                break
            if len(found) > 6:
                break
    return found[::-1]


@rewrite(candidates=reciprocal_roots)
def written_out(m: Match) -> dict[Node, Node] | str:
    done: dict[Node, Node] = {}
    for root in upwards(m.root):
        if any(_above(root, other) for other in done):
            continue
        for patterns, target in ((LAYER_NORM, aten.layer_norm.default), (RMS_NORM, aten.rms_norm.default)):
            for pattern in patterns:
                found = next((b for b in matches(pattern, root) if _fits(b, root)), None)
                if found is not None and root not in done:
                    done[root] = norm(m, root, target, found["x"], found.get("weight"), found.get("bias"), found["eps"])
    return done or f"does not have the form {FORM}"


def _above(node: Node, other: Node) -> bool:
    """Whether `other`, already rewritten, is a product or sum above node."""
    while len(node.users) == 1:
        (node,) = node.users
        if node is other:
            return True
    return False


def _fits(bound: dict[str, object], root: Node) -> bool:
    """x has the root's shape, eps is a number, weight and bias are constant vectors of the last axis."""
    size, source = shape(root)[-1], bound["x"]
    if not isinstance(source, fx.Node) or shape(source) != shape(root) or not isinstance(bound["eps"], (int, float)):
        return False
    vectors = [bound[n] for n in ("weight", "bias") if n in bound]
    return all(isinstance(v, fx.Node) and _is_vector(v, size) and constant(v) for v in vectors)


def _is_vector(node: Node, size: int) -> bool:
    return shape(node)[-1:] == (size,) and node.meta["val"].numel() == size


def norm(
    m: Match,
    root: Node,
    target: torch._ops.OpOverload,
    source: Node,
    scale: Node | None,
    shift: Node | None,
    epsilon: float,
) -> Node:
    """The op, in the type of x where the result is used in that type, else in the widest type involved.

    The op computes in float32 inside and rounds once: never more often than what it replaces.
    """
    narrow, used = dtype(unwiden(source)), {dtype(u) if is_cast(u) else dtype(root) for u in root.users}
    vectors = [v for v in (scale, shift) if v is not None]
    wide = dtype(root)
    for node in (source, *vectors):
        wide = torch.promote_types(wide, dtype(node))
    chosen = narrow if used == {narrow} and all(dtype(unwiden(v)) == narrow for v in vectors) else wide
    size = shape(root)[-1]

    def as_chosen(node: Node | None) -> Node | None:
        if node is None:
            return None
        node = uncast(node) if dtype(uncast(node)) == chosen else node
        node = node if dtype(node) == chosen else m.op(aten.to.dtype, node, chosen)
        return (
            node
            if node is source or shape(node) in (shape(root), (size,))
            else m.op(aten.reshape.default, node, [size])
        )

    arguments = (as_chosen(source), [size], as_chosen(scale))
    if target is aten.layer_norm.default:
        return m.op(target, *arguments, as_chosen(shift), float(epsilon))
    normed = m.op(target, *arguments, float(epsilon))
    return normed if shift is None else m.op(aten.add.Tensor, normed, as_chosen(shift))


# The op followed by its weight: F.layer_norm(x, size) * weight + bias.
PLAIN = layer_norm(x, LAST, None, None, eps)
PLAIN_RMS = rms_norm(x, LAST, None, eps)


def plain_norms(sub: Subgraph) -> Iterable[Node]:
    """Norms without a weight that one constant vector multiplies."""
    for node in sub.graph.nodes:
        plain = is_op(node, aten.layer_norm.default, aten.rms_norm.default) and (
            len(node.args) < 3 or node.args[2] is None
        )
        for user in upwards_of_norm(node) if plain else ():
            others = [n for n in user.all_input_nodes if uncast(n) is not node]
            if is_op(user, aten.mul.Tensor) and any(_is_vector(n, shape(node)[-1]) and constant(n) for n in others):
                yield node
                break


def upwards_of_norm(node: Node) -> list[Node]:
    """The product and the sum that alone read a norm, outermost first."""
    found: list[Node] = []
    while len(node.users) == 1 and len(found) < 2:
        (node,) = node.users
        if is_op(node, aten.mul.Tensor, aten.add.Tensor):
            found.append(node)
        elif not is_cast(node):
            break
    return found[::-1]


@rewrite(candidates=plain_norms)
def weight_after(m: Match) -> dict[Node, Node] | str:
    for plain, target in ((PLAIN, aten.layer_norm.default), (PLAIN_RMS, aten.rms_norm.default)):
        patterns = [plain * weight + bias, plain * weight] if plain is PLAIN else [plain * weight]
        for root in upwards_of_norm(m.root):
            for pattern in patterns:
                for b in matches(pattern, root):
                    if _fits(b, root):
                        return {root: norm(m, root, target, b["x"], b["weight"], b.get("bias"), b["eps"])}
    return "is multiplied by something else than one constant vector of the last axis"


PASS = Pass("norms", "exact", [written_out, weight_after], provides=("layer_norm", "rms_norm"))
