"""softmax(q k^T / sqrt(D)) v   ->   sla_attention(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, ..., "none")

SLA is sparse attention over the best key blocks of each query block, plus linear attention over all keys. It is another
function than softmax attention. This pass makes it in floating point, so that the attention pass, which quantizes it,
is measured against it. The recipe asks for SLA by `kind: sla`, or by `auto` on a checkpoint that has the projection of
the linear branch.
"""

from __future__ import annotations

import math
import warnings

from torch import fx
from turbocompile.kernels import ops

from turbocompile.ir.attention_ops import BHLD, BLHD
from turbocompile.ir.program import SHELL, dtype, module_path, shape
from turbocompile.ir.weights import RELATIVE, Expr, Load, Zeros
from turbocompile.recipe.options import PROJECTION, SlaOptions
from turbocompile.rewrite.attention_sites import (
    Operands,
    are_of_same_tokens,
    operands,
    permuted,
    reshaped,
    softmax_attentions,
)
from turbocompile.rewrite.facts import decided
from turbocompile.rewrite.match import Match, Pass, rewrite

UNTUNED = (
    "the checkpoint was not trained with SLA (it has no proj_l); "
    "allow_untuned: true does it all the same, and the picture suffers"
)


def projection_path(m: Match) -> str | None:
    """The local path of the site's projection in the checkpoint: under the attention's module, or one around it."""
    keys, prefixes = m.options.sla.projections, m.program.prefixes(m.graph)
    parts = module_path(m.root).split(".") if module_path(m.root) else []
    for depth in range(len(parts), -1, -1):
        path = ".".join([*parts[:depth], PROJECTION])
        if all(f"{prefix}{path}.weight" in keys for prefix in prefixes):
            return path
    return None


def refusal(m: Match, found: Operands) -> str | None:
    """Why the site cannot be an SLA; None where it can."""
    head_dim = shape(found.q)[-1]
    if found.mask is not None or found.is_causal:
        return "SLA has no mask"
    if not are_of_same_tokens(found.q, found.k):
        return "SLA is for self-attention, and these q and k are not seen to be projections of the same tokens"
    if shape(found.k) != shape(found.q) or shape(found.v) != shape(found.q):
        return "SLA needs as many heads and channels of k and v as of q"
    if not math.isclose(found.scale_value, head_dim**-0.5, rel_tol=1e-6):
        return f"SLA has the scale head_dim**-0.5, and this attention {found.scale_value:g}"
    if projection_path(m) is None and not m.options.sla.allow_untuned:
        return UNTUNED
    return None


def projection(m: Match, name: str, sizes: tuple[int, ...], like: fx.Node) -> fx.Node:
    """The weight or bias of the linear branch's projection; zeros, as before any tuning, where there is none."""
    path = projection_path(m)
    expr: Expr = Zeros(sizes, dtype(like))
    if path is not None:
        local = f"{path}.{name}"
        expr = Load(local if m.graph == SHELL else RELATIVE + local, sizes, dtype(like))
    else:
        path = ".".join(filter(None, [module_path(m.root), PROJECTION]))
    return m.weight(f"{path}.{name}", expr)


@rewrite(candidates=softmax_attentions)
def sparse(m: Match) -> fx.Node | str:
    if m.options.sla is None:
        return "the recipe does not ask for SLA"
    found = operands(m)
    reason = found if isinstance(found, str) else refusal(m, found)
    if isinstance(found, str) or reason is not None:
        return str(reason)
    why = "the checkpoint was trained with SLA: it has proj_l"
    if projection_path(m) is None:
        why = "the recipe asks for it (allow_untuned), though the checkpoint was not trained with SLA"
        warnings.warn(f"{m.site}: {UNTUNED}", stacklevel=2)
    head_dim = shape(found.q)[-1]
    q, k, v = (permuted(m, n, BHLD, BLHD) for n in (found.q, found.k, found.v))
    weight, bias = projection(m, "weight", (head_dim, head_dim), q), projection(m, "bias", (head_dim,), q)
    options: SlaOptions = m.options.sla
    blocks = (options.topk, options.block_q, options.block_k)
    attended = m.op(ops.sla_attention, q, k, v, weight, bias, *blocks, "softmax", "none")
    return reshaped(m, permuted(m, decided(attended, m.site, why), BLHD, BHLD), shape(m.root))


PASS = Pass("sla", "semantic", [sparse], section="attention", quiet=True)
