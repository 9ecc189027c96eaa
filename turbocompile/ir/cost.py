"""What a Program costs on paper: operations, bytes, memory, and the time that they take at the very least.

Every figure is a floor (`node_cost` says what is counted), and so is the roofline time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from turbocompile.hardware import Gpu
from turbocompile.ir.memory import activation_bytes, parameter_bytes
from turbocompile.ir.node_cost import KINDS, Work, node_cost
from turbocompile.ir.node_text import describe
from turbocompile.ir.op_schema import op_name
from turbocompile.ir.program import Program, module_path

MEMORY = "memory"
_MOST = 1 << 80  # a larger count in a file is a mistake or an attack


def natural(value: Any) -> int:
    """A count that a file holds. Raises ValueError unless it is a whole number from 0 to 2^80."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
        raise ValueError(f"{str(value)[:20]!r} is no count")
    return value


@dataclass(frozen=True)
class OpCost:
    """The cost of equal ops of one graph in one forward of the model, summed over all calls of the graph.

    name: as in "aten.linear". where: paths of the modules that the ops come from. shapes: as in
    "1x32760x1536 bf16, 8960x1536 bf16 -> 1x32760x8960 bf16". count: how often they run. work: operations by kind.
    """

    name: str
    graph: str
    where: tuple[str, ...]
    shapes: str
    count: int
    work: Work
    bytes: int

    @property
    def flops(self) -> int:
        return sum(self.work.values())

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each resource is busy at its full rate, by kind of arithmetic, and "memory".

        Raises UnsupportedError where the card lacks the arithmetic.
        """
        return {**{k: n / gpu.rate(k) for k, n in self.work.items() if n}, MEMORY: self.bytes / gpu.bandwidth}

    def seconds(self, gpu: Gpu) -> float:
        """The roofline time of all `count` runs: that of the slowest of tensor cores, ordinary cores and memory."""
        times = self.times(gpu)
        tensor = sum(t for kind, t in times.items() if kind not in ("fp32", MEMORY))  # one unit: its formats take turns
        return max(tensor, times.get("fp32", 0.0), times[MEMORY])

    def bound(self, gpu: Gpu) -> str:
        """The resource that takes longest: "memory", or a kind of arithmetic."""
        times = self.times(gpu)
        if times[MEMORY] >= self.seconds(gpu):
            return MEMORY
        return max((k for k in times if k != MEMORY), key=times.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "count": self.count, "flops": self.flops, "bytes": self.bytes, "graph": self.graph,
            "where": list(self.where), "shapes": self.shapes, "work": dict(self.work),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpCost:
        """The inverse of `to_dict`. Raises KeyError, TypeError, AttributeError or ValueError for other data."""
        work = {str(k): natural(v) for k, v in data["work"].items()}
        if not set(work) <= set(KINDS):
            raise ValueError(f"unknown arithmetic {sorted(set(work) - set(KINDS))[0]!r}")
        return cls(
            str(data["name"]), str(data["graph"]), tuple(str(w) for w in data["where"]), str(data["shapes"]),
            natural(data["count"]), work, natural(data["bytes"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One forward of a Program. Parameters and activations in bytes: see `parameter_bytes` and `activation_bytes`."""

    ops: tuple[OpCost, ...]
    parameters: int
    activations: int

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.ops)

    def seconds(self, gpu: Gpu) -> float:
        """The sum of the ops' roofline times: they run one after the other."""
        return sum(op.seconds(gpu) for op in self.ops)


def cost(program: Program) -> Cost:
    """The cost of one forward of the program, at the shape of the capture."""
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for graph, sub in program.graphs.items():
        calls = program.count(graph)
        for node in sub.graph.nodes:
            work, moved = node_cost(node)
            if calls and (any(work.values()) or moved):
                row = rows.setdefault((graph, *_alike(node, work, moved)), [work, moved, 0, []])
                row[2] += calls
                if (path := module_path(node)) not in row[3]:
                    row[3].append(path)
    ops = [
        OpCost(name, graph, tuple(paths), shapes, n, {k: v * n for k, v in work.items()}, moved * n)
        for (graph, name, shapes, _, _), (work, moved, n, paths) in rows.items()
    ]
    return Cost(tuple(ops), parameter_bytes([program]), activation_bytes(program))


def _alike(node: fx.Node, work: Work, moved: int) -> tuple[Any, ...]:
    return (op_name(node), describe(node), tuple(sorted(work.items())), moved)


def alike(node: fx.Node) -> tuple[Any, ...] | None:
    """The key that nodes of one `OpCost` share within their graph; None for a node that costs nothing."""
    work, moved = node_cost(node)
    return _alike(node, work, moved) if any(work.values()) or moved else None
