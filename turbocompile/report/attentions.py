"""The attentions of an engine, one row a site: what each became and why, how sparse it is, what it costs.

The passes leave the reason and the site's name in the facts of the attention nodes that they make; the rest
is read off the rewritten graph, so that a row says what runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from turbocompile.hardware import AttentionChoice
from turbocompile.ir.attention_ops import BHLD, SAGE, SLA, attention_layout, attentions
from turbocompile.ir.cost import OpCost, natural
from turbocompile.ir.node_cost import node_cost
from turbocompile.ir.node_text import describe
from turbocompile.ir.op_schema import argument_values, op_name
from turbocompile.ir.program import Program, Subgraph, is_op, module_path
from turbocompile.ir.weights import Zeros
from turbocompile.kernels.attention.sla_attention import count_blocks, kept_blocks
from turbocompile.rewrite.attention_sites import are_of_same_tokens
from turbocompile.rewrite.facts import facts

if TYPE_CHECKING:
    from turbocompile.rewrite.results import PassResult

PASSES = ("sla", "attention")  # the ones that decide, the last word last


@dataclass(frozen=True)
class Sparsity:
    """How much of the keys an SLA reads: each block of block_q queries `kept` of the `blocks` blocks of block_k keys.

    tuned: whether the checkpoint has the projection of the linear branch, so that it was trained with SLA.
    """

    topk: float
    block_q: int
    block_k: int
    kept: int
    blocks: int
    tuned: bool

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sparsity:
        """The inverse of `asdict`. Raises KeyError, TypeError or ValueError for other data."""
        block_q, block_k, kept, blocks = (natural(data[k]) for k in ("block_q", "block_k", "kept", "blocks"))
        return cls(float(data["topk"]), block_q, block_k, kept, blocks, bool(data["tuned"]))


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a graph: `count` of them in a forward of the model.

    kind: native, sage or sla. role: self or cross. heads: of the queries, of one item of the batch. pv: the format of
    the product with V, None for native. cost: of all `count`. seconds: measured, of all `count`; None where nothing was
    measured.
    """

    site: str
    count: int
    kind: str
    role: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    pv: str | None
    why: str
    cost: OpCost
    sparsity: Sparsity | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **{k: getattr(self, k) for k in _TEXTS + _COUNTS}, "pv": self.pv, "seconds": self.seconds,
            "sparsity": asdict(self.sparsity) if self.sparsity is not None else None, "cost": self.cost.to_dict(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionSite:
        """The inverse of `to_dict`. Raises KeyError, TypeError, AttributeError or ValueError for other data."""
        pv, seconds, sparsity = data["pv"], data["seconds"], data["sparsity"]
        if seconds is not None and not (isinstance(seconds, (int, float)) and 0 <= seconds < 1e12):
            raise ValueError(f"{str(seconds)[:20]!r} is no time")
        plain: dict[str, Any] = {**{k: str(data[k]) for k in _TEXTS}, **{k: natural(data[k]) for k in _COUNTS}}
        return cls(
            **plain, pv=None if pv is None else str(pv), cost=OpCost.from_dict(data["cost"]),
            sparsity=None if sparsity is None else Sparsity.from_dict(sparsity),
            seconds=None if seconds is None else float(seconds),
        )  # fmt: skip


_TEXTS = ("site", "kind", "role", "why")
_COUNTS = ("count", "batch", "queries", "keys", "heads", "head_dim")


def attention_sites(program: Program, results: Sequence[PassResult] = ()) -> tuple[AttentionSite, ...]:
    """The attention operators of a Program, in order. results: of the passes, for why some were left alone."""
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
    """What each site that is no SLA became, by its name: sage where it is that in any of the Programs."""
    found: dict[str, AttentionChoice] = {}
    for program in programs:
        for graph, sub in program.graphs.items():
            for site, node in named_attentions(graph, sub):
                choice = AttentionChoice(_kind(node), facts(node).reason)
                if choice.kind == "sage" or (choice.kind == "native" and site not in found):
                    found[site] = choice
    return found


def untuned(sites: Iterable[AttentionSite]) -> list[str]:
    """The sites that are an SLA which the checkpoint was not trained with."""
    return [s.site for s in sites if s.sparsity is not None and not s.sparsity.tuned]


def with_times(sites: Iterable[AttentionSite], seconds: Mapping[str, float]) -> tuple[AttentionSite, ...]:
    """The rows with the measured seconds of one run, by site, times their runs."""
    return tuple(replace(s, seconds=seconds[s.site] * s.count) if s.site in seconds else s for s in sites)
