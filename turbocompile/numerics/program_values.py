"""The values of a whole Program: its weights, its shell, and the first call of each kind of block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import SHELL, Program, Subgraph
from turbocompile.ir.weights import (
    ADAPTERS,
    AddDiff,
    AddLora,
    Cast,
    Cat,
    Dora,
    Expr,
    Mul,
    Permute,
    Reshape,
    Slice,
    is_relative,
)
from turbocompile.numerics.interpreter import Interpreter, Uncomputed, Values, is_wide_float


class Weights:
    """The values of a Program's weights. A value is evaluated once for the first call of a graph, and then kept."""

    def __init__(self, evaluate: Evaluator) -> None:
        self.evaluate = evaluate
        self._kept: dict[Any, torch.Tensor] = {}

    def __call__(
        self, sub: Subgraph, prefix: str, wide: torch.dtype | None, keep: bool = True
    ) -> Callable[[fx.Node], torch.Tensor]:
        """The function that gives the value of a get_attr node of `sub` in the call with this weight prefix.

        wide: as for an Interpreter. keep: False for a later call, whose weights are read once.
        """

        def weight(node: fx.Node) -> torch.Tensor:
            expr = sub.weights[str(node.target)]
            exact = wide is not None and _scaled(expr)
            key = (expr, prefix if is_relative(expr) else "", exact)
            if key in self._kept:
                return self._kept[key]
            value = self._unrounded(expr, prefix) if exact else self.evaluate(expr, prefix)
            if keep:
                self._kept[key] = value
            return value

        return weight

    def _unrounded(self, expr: Expr, prefix: str) -> torch.Tensor:
        """A weight that a pass scaled or added to, in float64, because the function has no rounding of that weight."""
        match expr:
            case AddLora():
                of, a, b = (self._unrounded(part, prefix) for part in (expr.of, expr.a, expr.b))
                return of + expr.scale * (b @ a)
            case AddDiff():
                return self._unrounded(expr.of, prefix) + expr.scale * self._unrounded(expr.diff, prefix)
            case Dora():
                of, a, b, m = (self._unrounded(part, prefix) for part in (expr.of, expr.a, expr.b, expr.magnitude))
                v = of + expr.scale * (b @ a)
                length = torch.linalg.vector_norm(v, dim=1 if m.shape[1] == 1 else 0, keepdim=True)
                return v * torch.where(length > 0, m / length, 0.0)
            case Cast() if _scaled(expr):
                return self._unrounded(expr.of, prefix)
            case Mul():
                by = self._unrounded(expr.by, prefix) if isinstance(expr.by, Expr) else expr.by
                return self._unrounded(expr.of, prefix) * by
            case Reshape():
                return self._unrounded(expr.of, prefix).reshape(expr.shape)
            case Permute():
                return self._unrounded(expr.of, prefix).permute(expr.dims)
            case Slice():
                return self._unrounded(expr.of, prefix).narrow(expr.dim, expr.start, expr.stop - expr.start)
            case Cat():
                return torch.cat([self._unrounded(part, prefix) for part in expr.of], expr.dim)
        return self.evaluate(expr, prefix).double()


def _scaled(expr: Expr) -> bool:
    """Whether an expression multiplies or adds to a weight, and then only casts the result or lays it out anew."""
    if isinstance(expr, (*ADAPTERS, Mul)):
        return True
    return isinstance(expr, (Reshape, Permute, Slice, Cat, Cast)) and any(_scaled(part) for part in expr.parts())


def run_all(
    program: Program,
    weights: Weights,
    inputs: Sequence[torch.Tensor],
    wide: torch.dtype | None,
    keep: Mapping[str, set[str]] | None = None,
) -> dict[str, Values]:
    """The values of the shell's nodes and of the nodes of each block, by graph; a block is run for its first call.

    inputs: the tensors of a call, in the order of the Program's inputs. The results of a block's first call stand for
    those of its later calls. keep: graph -> the nodes whose values are wanted beside the graph's results; None gives
    the values of all nodes that are no weights. Raises as `Interpreter.steps`.
    """
    found: dict[str, Values] = {}

    def kept(graph: str) -> set[str] | None:
        return None if keep is None else keep[graph].union(n.name for n in program.graphs[graph].outputs())

    def run_call(node: fx.Node, args: Any) -> Any:
        name, prefix = args[:2]
        sub = program.graphs[name]
        if name not in found:
            given = {n.name: v for n, v in zip(sub.inputs(), args[3:], strict=True)}
            found[name] = Interpreter(sub, weights(sub, prefix, wide), wide)(given, keep=kept(name))
        outputs = tuple(found[name][n.name] for n in sub.outputs())
        return outputs[0] if len(outputs) == 1 else outputs

    shell = program.shell
    run = Interpreter(shell, weights(shell, "", wide), wide)
    given = {n.name: run.widen(t) for n, t in zip(shell.inputs(), inputs, strict=True)}
    found[SHELL] = run(given, run_call, kept(SHELL))
    return found


def run_widest(
    program: Program,
    weights: Weights,
    inputs: Sequence[torch.Tensor],
    keep: Mapping[str, set[str]] | None = None,
) -> tuple[dict[str, Values], torch.dtype | None]:
    """The values as `run_all` gives them, and the widest dtype in which all operators of the Program can be computed.

    That is float64, else float32, else None for the Program's own dtypes. Raises as `Interpreter.steps`.
    """
    for wide in (torch.float64, torch.float32):
        try:
            return run_all(program, weights, inputs, wide, keep), wide
        except Uncomputed as failed:
            if isinstance(failed.__cause__, IndexError):  # the inputs are at fault, in every dtype
                raise
    return run_all(program, weights, inputs, None, keep), None


def first_and_last(program: Program, graph: str) -> list[str]:
    """The weight prefixes of a graph's first call and of its last; one prefix where the graph is called once.

    A rewrite that reads the weights of one layer by their full names is right in the first call and wrong in the last.
    """
    prefixes = program.prefixes(graph) or [""]
    return list(dict.fromkeys((prefixes[0], prefixes[-1])))


def given_to(program: Program, graph: str) -> list[fx.Node]:
    """The nodes whose values a graph is given: its inputs, and in the shell also the calls of blocks."""
    return program.graphs[graph].inputs() + ([c.node for c in program.calls()] if graph == SHELL else [])


def results_of(program: Program, graph: str) -> list[fx.Node]:
    """The nodes whose values a graph gives: its outputs, and in the shell also the arguments of the calls of blocks."""
    read = [n for c in program.calls() for n in c.node.args[3:]] if graph == SHELL else []
    return program.graphs[graph].outputs() + read  # type: ignore[operator]


def told_apart(program: Program, graph: str, given: Values) -> Values:
    """`given`, the values that a graph is given, with random values in place of the results of later calls of blocks.

    The calls of a block all have the results of the first one otherwise, and a rewrite that reads the result of the
    wrong call would make no difference. The random values have the root mean square of the result.
    """
    calls = program.calls() if graph == SHELL else []
    made = dict(given)
    for number, use in enumerate(calls[1:], 1):
        generator = torch.Generator().manual_seed(number)

        def moved(t: Any, generator: torch.Generator = generator) -> Any:
            if not isinstance(t, torch.Tensor) or not is_wide_float(t.dtype):
                return t
            size = t.double().square().mean().sqrt()
            return (t.double() + size * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t.dtype)

        made[use.node.name] = fx.node.map_aggregate(made[use.node.name], moved)
    return made


def widened(values: Mapping[str, Any], wide: torch.dtype | None) -> Values:
    """The values with their floating tensors of 16 bits or more in the dtype `wide`; None leaves them as they are."""
    return {
        name: fx.node.map_aggregate(v, lambda t: _cast(t, wide or t.dtype) if isinstance(t, torch.Tensor) else t)
        for name, v in values.items()
    }


def as_engine(value: Any, node: fx.Node) -> Any:
    """A true value of a node, rounded to the dtype that the node has in the engine."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, t.dtype) for v, t in zip(value, node.meta["val"], strict=True))
    return _cast(value, node.meta["val"].dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype.itemsize == 1:
        return value
    return value.to(dtype)


def is_float64(sub: Subgraph) -> bool:
    """Whether a graph takes a float64 tensor, so that nothing narrower can be its truth."""
    return any(
        n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dtype == torch.float64
        for n in sub.graph.nodes
    )
