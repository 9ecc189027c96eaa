"""softmax(q k^T * scale + mask) v   ->   scaled_dot_product_attention(q, k, v)     kind: native, exact
                                     ->   sage_attention(q, k, v, scale)           kind: sage, quantizing
   sla_attention(q, k, v, ..., "none")  ->   sla_attention(q, k, v, ..., pv)          kind: sla, quantizing

The attention may be written as SDPA or as products around a softmax, with grouped heads or without. `auto` chooses for
each site by its size and the target (turbocompile/hardware.py). In an SLA model, an attention that cannot be sparse
(cross-attention) gets the form that `auto` gives it in other models. The facts of each attention node hold the reason
for its form, for the report.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import fx
from turbocompile.kernels import ops
from turbocompile.passes import sla

from turbocompile.hardware import AttentionChoice, AttentionShape, choose_attention
from turbocompile.ir.attention_ops import BHLD, BLHD
from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.recipe.options import AttentionOptions
from turbocompile.rewrite.attention_sites import Operands, operands, permuted, reshaped, softmax_attentions
from turbocompile.rewrite.facts import decided, facts
from turbocompile.rewrite.match import Match, Pass, rewrite

aten = torch.ops.aten
MAX_HEAD_DIM = 128  # of the 8-bit kernels


def kind_of(options: AttentionOptions) -> str:
    """Whether the pass quantizes under these options. The sla pass, before it, makes an SLA another function."""
    return "quantizing" if options.quantizes else "exact"


def choose(m: Match, found: Operands) -> AttentionChoice:
    """native or sage: for an attention that is no SLA."""
    options: AttentionOptions = m.options
    if options.others is not None:
        return options.others
    (batch, heads, length, head_dim), keys = shape(found.q), shape(found.k)[-2]
    chosen = choose_attention(options.target, AttentionShape(length, keys, batch * heads, head_dim), options.pv)
    # A twin has the choices of the engine's shapes, because what is measured on it must be what the engine runs, even
    # where another choice is faster at the twin's own size.
    return options.choices.get(m.site, chosen)


def refusal(found: Operands) -> str | None:
    """Why the site cannot be a SageAttention; None where it can."""
    (_, heads, length, head_dim), (_, groups, keys, _) = shape(found.q), shape(found.k)
    if found.mask is not None:
        return "SageAttention has no mask"
    if head_dim > MAX_HEAD_DIM or shape(found.v)[-1] != head_dim:
        return f"SageAttention needs one head_dim of at most {MAX_HEAD_DIM}, and this one is {head_dim}"
    if found.is_causal and length != keys:
        return "a causal SageAttention needs as many keys as queries"
    if heads % groups or shape(found.v)[1] != groups:
        return f"{heads} heads do not divide among {groups} groups"
    return None


def native(m: Match, found: Operands, why: str) -> fx.Node:
    """SDPA in one spelling: an argument that has its default is not given."""
    options = {
        "attn_mask": found.mask,
        "is_causal": found.is_causal or None,
        "scale": found.scale,
        "enable_gqa": (shape(found.k)[1] != shape(found.q)[1]) or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    attended = m.op(aten.scaled_dot_product_attention.default, found.q, found.k, found.v, **given)
    return reshaped(m, decided(attended, m.site, why), shape(m.root))


def sage(m: Match, found: Operands, why: str) -> fx.Node:
    """SageAttention, with q, k and v in its layout (batch, tokens, heads, head_dim)."""
    q, k, v = (permuted(m, n, BHLD, BLHD) for n in (found.q, found.k, found.v))
    attended = m.op(ops.sage_attention, q, k, v, float(found.scale_value), found.is_causal, m.options.pv)
    return reshaped(m, permuted(m, decided(attended, m.site, why), BLHD, BHLD), shape(m.root))


def all_attentions(sub: Subgraph) -> Iterator[fx.Node]:
    """Attentions in any writing, and the SLAs that the sla pass made."""
    yield from softmax_attentions(sub)
    yield from (n for n in sub.graph.nodes if is_op(n, ops.sla_attention))


@rewrite(candidates=all_attentions)
def attention(m: Match) -> fx.Node | str:
    if is_op(m.root, ops.sla_attention):
        made = m.op(m.root.target, *m.root.args[:-1], m.options.sla.pv)
        return decided(made, m.site, facts(m.root).reason)
    found = operands(m)
    if isinstance(found, str):
        return found
    if m.options.sla is not None and m.options.sla.named and sla.refusal(m, found) == sla.UNTUNED:
        warnings.warn(f"{m.site}: no SLA, since {sla.UNTUNED}", stacklevel=2)
        return sla.UNTUNED
    choice = choose(m, found)
    if choice.kind == "native":
        return native(m, found, choice.why)
    reason = refusal(found)
    if reason is None:
        return sage(m, found, choice.why)
    asked = m.options.others is not None and is_op(m.root, aten.scaled_dot_product_attention)
    return reason if asked else native(m, found, reason)  # products around a softmax are worse than SDPA in any case


PASS = Pass("attention", kind_of, [attention])
