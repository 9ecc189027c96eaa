"""Measures from which length on Sage is faster than SDPA, by whole calls of self- and cross-attention.

Calls are timed in CUDA graphs, as an engine runs them, because a call from Python of less than some 0.3 ms takes as
long as its launches. If the time of a call from Python differs by more than a tenth, it follows in brackets.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import milliseconds, replayed
from torch.nn.attention import SDPBackend, sdpa_kernel
from turbocompile.kernels import ops

LENGTHS = (256, 512, 1024, 2304, 4096, 8192, 16384, 32760)
CROSS = (257, 512)  # keys of a cross-attention: Wan's image tokens, and Wan's text tokens
# (heads, head_dim, largest length) of wan-mini, of a model of 12 heads, and of Wan2.1 1.3B and 14B.
MODELS = ((4, 64, 4096), (12, 64, 32760), (12, 128, 32760), (40, 128, 32760))
PLAIN = 1.0  # milliseconds; only shorter calls are timed from Python, too, because longer calls hide their launches
SETTLE, SPAN = (
    1.0,
    5.0,
)  # milliseconds of a turn before timing and while timing; short, because there are some 100 graphs
BACKENDS = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Size:
    """The size of one attention, for one video."""

    queries: int
    keys: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Row:
    """The median milliseconds of the calls at a size: in CUDA graphs, and from Python for the calls that are so
    timed.
    """

    size: Size
    graph: dict[str, float]
    plain: dict[str, float]

    def speedup(self, call: str) -> float:
        """The time of the fastest SDPA divided by the time of a call."""
        return min(t for name, t in self.graph.items() if name.startswith("SDPA")) / self.graph[call]


def sizes() -> list[Size]:
    """The sizes of all models: self-attentions, then cross-attentions."""
    wanted = (
        Size(queries, keys or queries, heads, head_dim)
        for heads, head_dim, longest in MODELS
        for keys in (None, *CROSS)
        for queries in LENGTHS
        if queries <= longest
    )
    return list(dict.fromkeys(wanted))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend | None = None) -> torch.Tensor:
    """Dense attention of q, k, v (B, L, H, D), by one backend, or by the backend that torch chooses."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def calls(size: Size) -> dict[str, Callable[[], object]]:
    """All calls by name, on the same inputs of N(0, 1)."""
    q, k, v = (
        torch.randn(1, tokens, size.heads, size.head_dim, device="cuda").bfloat16()
        for tokens in (size.queries, size.keys, size.keys)
    )
    scale = size.head_dim**-0.5
    return {
        "SDPA": lambda: sdpa(q, k, v),
        **{name: lambda backend=backend: sdpa(q, k, v, backend) for name, backend in BACKENDS.items()},
        "Sage fp8": lambda: ops.sage_attention(q, k, v, scale, False, "fp8"),
        "Sage fp16": lambda: ops.sage_attention(q, k, v, scale, False, "fp16"),
    }


def measure(size: Size) -> Row:
    """Measures a size: its row of the table."""
    made = calls(size)
    graph = {k: statistics.median(t) for k, t in replayed({k: [c] for k, c in made.items()}, SETTLE, SPAN).items()}
    short = {k: c for k, c in made.items() if graph[k] < PLAIN}
    return Row(size, graph, {k: statistics.median(t) for k, t in milliseconds(short, 5).items()} if short else {})


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    names = list(rows[0].graph)
    head = ["queries x keys", "heads", *names, "fp8 over SDPA", "fp16 over SDPA"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        s = row.size
        cells = [f"{s.queries:,} x {s.keys:,}", f"{s.heads} x {s.head_dim}"]
        cells += [_cell(row.graph[name], row.plain.get(name)) for name in names]
        cells += [f"{row.speedup(f'Sage {pv}'):.2f}" for pv in ("fp8", "fp16")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(graph: float, plain: float | None) -> str:
    differs = plain is not None and abs(plain - graph) > 0.1 * graph
    return f"{graph:.4f}" + (f" ({plain:.3f})" if differs else "")


def speeds(rows: Sequence[Row], target: str, source: str) -> list[dict[str, Any]]:
    """The speedups in the form of turbocompile/speeds.json."""
    made = []
    for pv in ("fp8", "fp16"):
        for heads, head_dim, _ in MODELS:
            same = [r for r in rows if (r.size.heads, r.size.head_dim) == (heads, head_dim)]
            points = [[r.size.queries, r.size.keys, round(r.speedup(f"Sage {pv}"), 2)] for r in same]
            of = {"target": target, "source": source, "pv": pv, "heads": heads, "head_dim": head_dim}
            made += [{**of, "speedups": points}] if points else []
    return made


def write_speeds(path: Path, made: Sequence[dict[str, Any]]) -> None:
    """Replaces a target's speedups in turbocompile/speeds.json."""
    data = json.loads(path.read_text(encoding="utf-8"))
    targets = {group["target"] for group in made}
    groups = [*(g for g in data["attentions"] if g["target"] not in targets), *made]
    groups.sort(key=lambda group: int(group["target"].removeprefix("sm")))
    linears = json.dumps(data["linears"], indent=1).replace("\n", "\n ")
    lines = ",\n".join("  " + json.dumps(group) for group in groups)
    path.write_text(f'{{\n "linears": {linears},\n "attentions": [\n{lines}\n ]\n}}\n', encoding="utf-8")
