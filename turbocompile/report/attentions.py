"""The attentions of an engine, one row for each site: what the attention became and why, its sparsity, its cost.

The passes write the reason and the site's name into the facts of the attention nodes that they make. All other figures
are read from the rewritten graph, so that a row describes the attention that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from turbocompile.hardware import AttentionChoice
from turbocompile.ir.attention_ops import BHLD, SAGE, SLA, attention_layout, attentions
from turbocompile.ir.cost import OpCost
from turbocompile.ir.node_cost import node_cost
from turbocompile.ir.node_text import describe
from turbocompile.ir.op_schema import argument_values, op_name
from turbocompile.ir.program import Program, Subgraph, is_op, module_path
from turbocompile.ir.weights import Zeros
from turbocompile.kernels.attention.sla_attention import count_blocks, kept_blocks
from turbocompile.report.rows import AttentionSite, Sparsity
from turbocompile.rewrite.attention_sites import are_of_same_tokens
from turbocompile.rewrite.facts import facts

if TYPE_CHECKING:
    from turbocompile.rewrite.results import PassResult

PASSES = ("sla", "attention")  # the passes that decide on an attention; a later pass has the last word


def attention_sites(program: Program, results: Sequence[PassResult] = ()) -> tuple[AttentionSite, ...]:
    """The attention operators of a Program, in order. results: the passes' results, for why sites were left alone."""
    left = {site: reason for r in results if r.name in PASSES for site, reason, _ in r.skipped}
    found = []
    for graph, sub in program.graphs.items():
        if count := program.count(graph):
            for site, node in named_attentions(graph, sub):
                why = facts(node).reason or left.get(site) or "no pass looked at it"
                found.append(_row(graph, sub, node, site, why, count))
    return tuple(found)


def named_attentions(graph: str, sub: Subgraph) -> Iterator[tuple[str, fx.Node]]:
    """The attention nodes of a graph with the names of their sites."""
    for node in attentions(sub):
        yield facts(node).site or f"{graph}:{module_path(node)}", node


def _row(graph: str, sub: Subgraph, node: fx.Node, site: str, why: str, count: int) -> AttentionSite:
    a = argument_values(node)
    q, v = (a["query"], a["value"]) if _kind(node) == "native" else (a["q"], a["v"])
    tokens, heads = (2, 1) if attention_layout(node) == BHLD else (1, 2)
    work, moved = node_cost(node)
    all_work = {kind: n * count for kind, n in work.items()}
    return AttentionSite(
        site, count, _kind(node), "self" if are_of_same_tokens(*node.args[:2]) else "cross",  # type: ignore[arg-type]
        q.shape[0], q.shape[tokens], v.shape[tokens], q.shape[heads], q.shape[-1], a.get("pv"), why,
        OpCost(op_name(node), graph, (module_path(node),), describe(node), count, all_work, moved * count),
        _sparsity(sub, node, a) if is_op(node, *SLA) else None,
    )  # fmt: skip


def _kind(node: fx.Node) -> str:
    return "sla" if is_op(node, *SLA) else "sage" if is_op(node, *SAGE) else "native"


def _sparsity(sub: Subgraph, node: fx.Node, a: Mapping[str, Any]) -> Sparsity:
    blocks = count_blocks(a["v"].shape[1], a["block_k"])
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    weight: Any = node.args[names.index("proj_weight")]
    tuned = not isinstance(sub.weights.get(str(weight.target)), Zeros)
    return Sparsity(a["topk"], a["block_q"], a["block_k"], kept_blocks(a["topk"], blocks), blocks, tuned)


def chosen(programs: Iterable[Program]) -> dict[str, AttentionChoice]:
    """What each site that is no SLA became, by its name: sage if it became sage in any of the Programs."""
    found: dict[str, AttentionChoice] = {}
    for program in programs:
        for graph, sub in program.graphs.items():
            for site, node in named_attentions(graph, sub):
                choice = AttentionChoice(_kind(node), facts(node).reason)
                if choice.kind == "sage" or (choice.kind == "native" and site not in found):
                    found[site] = choice
    return found


def untuned(sites: Iterable[AttentionSite]) -> list[str]:
    """The names of the sites that became SLA although the checkpoint was not trained with SLA."""
    return [s.site for s in sites if s.sparsity is not None and not s.sparsity.tuned]


def with_times(sites: Iterable[AttentionSite], seconds: Mapping[str, float]) -> tuple[AttentionSite, ...]:
    """The rows with their measured seconds. seconds: of one run, by site; a row has the sum of all its runs."""
    return tuple(replace(s, seconds=seconds[s.site] * s.count) if s.site in seconds else s for s in sites)
