"""Rows of a report as data: a pass, the sites that it left alone, a shape of the engine.

Rows are read from folders that anyone may have made, so `from_dict` checks every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from turbocompile.ir.cost import OpCost, natural
from turbocompile.ir.site_errors import SiteError, finite


@dataclass(frozen=True)
class Skip:
    """A site that a pass left alone, and why. count: how many sites of the whole model have this name."""

    site: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class PassReport:
    """What one pass did. Counts are over the whole model.

    kind: exact, quantizing or semantic. error: cosine, relative L1 and largest absolute error of the worst site;
    error_output: the same at the output of the block. error_reason: why one of the two errors is None. seconds: how
    long the pass took. site_errors: the errors of a quantizing pass's sites, the largest error over budget first.
    inputs: the inputs on which every layer was measured; empty if only the first layer was.
    """

    kind: str
    sites: int
    rewritten: int
    skipped: tuple[Skip, ...] = ()
    error: dict[str, float] | None = None
    error_output: dict[str, float] | None = None
    error_reason: str | None = None
    seconds: float = 0.0
    site_errors: tuple[SiteError, ...] = ()
    inputs: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "sites": self.sites, "rewritten": self.rewritten,
            "skipped": [{"site": s.site, "reason": s.reason, "count": s.count} for s in self.skipped],
            "error": self.error, "error_output": self.error_output, "error_reason": self.error_reason,
            "seconds": self.seconds, "site_errors": [e.to_dict() for e in self.site_errors], "inputs": self.inputs,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassReport:
        skipped = tuple(Skip(str(s["site"]), str(s["reason"]), natural(s.get("count", 1))) for s in data["skipped"])
        reason = data.get("error_reason")
        return cls(
            str(data["kind"]), natural(data["sites"]), natural(data["rewritten"]), skipped, finite(data["error"]),
            finite(data.get("error_output")), None if reason is None else str(reason), read_seconds(data["seconds"]),
            tuple(SiteError.from_dict(e) for e in data.get("site_errors", ())), str(data.get("inputs", "")),
        )  # fmt: skip


@dataclass(frozen=True)
class ShapeReport:
    """One shape of the engine: the shapes of its inputs, and of one forward the operations, the bytes moved, and the
    largest number of bytes of activations that are alive at once.
    """

    name: str
    inputs: dict[str, tuple[int, ...]]
    flops: int
    bytes: int
    activation_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "inputs": {k: list(v) for k, v in self.inputs.items()}, "flops": self.flops,
            "bytes": self.bytes, "activation_bytes": self.activation_bytes,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShapeReport:
        inputs = {str(k): tuple(natural(n) for n in v) for k, v in data["inputs"].items()}
        counts = (natural(data[k]) for k in ("flops", "bytes", "activation_bytes"))
        return cls(str(data["name"]), inputs, *counts)


def read_seconds(value: Any) -> float:
    """A time in seconds. Raises ValueError for anything else."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        raise ValueError(f"{str(value)[:20]!r} is no time")
    return float(value)


@dataclass(frozen=True)
class Sparsity:
    """How many keys an SLA reads: each block of block_q queries reads `kept` of the `blocks` blocks of block_k keys.

    tuned: whether the checkpoint was trained with SLA, which shows in that it has the linear branch's projection.
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

    kind: native, sage or sla. role: self or cross. heads: the query heads of one item of the batch. pv: the format of
    the product with V, None for native. why: why the attention is of this kind. cost: of all `count` runs together.
    seconds: the measured time of all `count` runs together; None if nothing was measured.
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
