"""Runs one graph node by node and gives the values of its nodes, in the graph's own dtypes or in a wider one."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from turbocompile.errors import TurbocompileError, brief
from turbocompile.ir.arguments import arguments
from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.execute import with_device
from turbocompile.ir.program import Subgraph, call, is_op
from turbocompile.ir.weights import Constant
from turbocompile.kernels import ops
from turbocompile.rewrite.match import default_eps

aten = torch.ops.aten
CPU = torch.device("cpu")
Values = dict[str, Any]  # the values of a graph's nodes, by the names of the nodes


class Uncomputed(RuntimeError):
    """A node whose operator refuses the values that it is given, as an embedding refuses an index out of its range.

    node: the name of the node. reason: the operator's error in a few words. Errors of this package's own code and
    too little memory are no such refusal, and are raised as they are.
    """

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(str(error))
        self.node, self.reason = node, brief(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. On a CPU torch raises a RuntimeError that is told by its words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


class Interpreter:
    """Runs one graph and gives the values of its nodes.

    weight: gives the value of a get_attr node, on `device`. wide: the floating dtype in which everything is computed
    (float64 for the truth, float32 for an exact rewrite of a bfloat16 model); None computes in the graph's own dtypes.

    A wide run drops the casts between floating dtypes, except the casts of constants: a value that depends on constants
    alone is computed wide, too, and is then rounded where its node has 16 bits, because a model that casts a table to
    bfloat16 is defined with the rounded table.
    """

    def __init__(
        self,
        sub: Subgraph,
        weight: Callable[[fx.Node], torch.Tensor],
        wide: torch.dtype | None,
        device: torch.device = CPU,
    ) -> None:
        self.sub, self.weight, self.wide, self.device = sub, weight, wide, device
        writing = [n for n in sub.graph.nodes if writes(n)]
        self.writes = bool(writing)
        self.views = {n: written(n) for n in writing}
        self.aliases = {n for bases in self.views.values() for n in bases}
        self.constant = self._constants()

    def _constants(self) -> set[fx.Node]:
        """The nodes that depend on stored constants alone, and into whose tensors only such nodes are written."""
        varying: set[fx.Node] = set()
        size = -1
        while len(varying) != size:  # a write makes the node varying that made the tensor earlier
            size = len(varying)
            for node in self.sub.graph.nodes:
                if node.op == "get_attr":
                    own = not isinstance(self.sub.weights[str(node.target)], Constant)
                else:
                    own = node.op != "call_function" or node.target is call
                if own or any(n in varying for n in node.all_input_nodes):
                    varying |= {node, *self.views.get(node, ())}
        return {n for n in self.sub.graph.nodes if n not in varying}

    def __call__(
        self,
        given: Mapping[str, Any],
        calls: Callable[[fx.Node, Any], Any] | None = None,
        keep: Container[str] | None = None,
    ) -> Values:
        """Runs the whole graph; see `steps`. calls: gives the result of a call of another graph, from its arguments."""
        with torch.no_grad():
            run = self.steps(given, keep)
            try:
                node, args = next(run)
                while True:
                    node, args = run.send(calls(node, args) if calls is not None else node.target(*args))  # type: ignore[operator]
            except StopIteration as done:
                return done.value

    def steps(
        self, given: Mapping[str, Any], keep: Container[str] | None = None, only: Container[str] | None = None
    ) -> Generator[tuple[fx.Node, Any], Any, Values]:
        """Runs the graph up to its next call of another graph: yields the call with its arguments, and is sent its
        result. Returns the values of the nodes in `keep`.

        given: node -> a value that is taken instead of being computed (inputs, and nodes whose values are known).
        keep: the names of the nodes whose values are returned; every other value is freed after its last reader. None
        keeps all values, of weights only those that the graph returns. only: the names of the nodes to run; None runs
        all of them.

        Raises Uncomputed for an operator that refuses its arguments, torch.OutOfMemoryError where memory runs out.
        """
        nodes = [n for n in self.sub.graph.nodes if n.op != "output" and (only is None or n.name in only)]
        readers = dict.fromkeys(nodes, 0)
        for node in nodes:
            for read in node.all_input_nodes if node.name not in given else ():
                readers[read] += 1

        def is_kept(node: fx.Node) -> bool:
            if keep is not None:
                return node.name in keep
            return node.op != "get_attr" or any(user.op == "output" for user in node.users)

        values: Values = {}
        for node in nodes:
            wanted = bool(readers[node]) or is_kept(node)
            if node.name in given:
                if wanted:
                    values[node.name] = self._own(given[node.name])
                continue
            if node.op == "get_attr":
                if wanted:
                    values[node.name] = self.parameter(node)
                continue
            args = fx.map_arg(node.args, lambda n: values[n.name])
            kwargs = fx.map_arg(dict(node.kwargs), lambda n: values[n.name])
            value = (yield node, args) if node.target is call else self.run_node(node, args, kwargs)
            if wanted:
                values[node.name] = value
            del args, kwargs, value
            for read in node.all_input_nodes:
                readers[read] -= 1
                if not readers[read] and not is_kept(read):
                    del values[read.name]
        return values

    def reach(self, targets: Iterable[str], given: Mapping[str, Any]) -> Values:
        """The values of the named nodes, for which no more nodes are run than `given` leaves open.

        Raises as `steps`; the nodes between `given` and the targets must call no other graph.
        """
        targets = set(targets)
        with torch.no_grad():
            try:
                next(self.steps(given, targets, needed_for(self.sub, targets, given)))
            except StopIteration as done:
                return done.value
        raise AssertionError("a site holds a call of another graph")

    def parameter(self, node: fx.Node) -> torch.Tensor:
        """The value of a weight, in the dtype of the run. Raises as `steps`."""
        value = self._own(self._computed(node, lambda: self.weight(node)))
        return self._constant(node, value) if node in self.constant else self.widen(value)

    def run_node(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The value of one operator for these arguments, in the dtype of the run. Raises as `steps`."""
        return self._computed(node, lambda: self._run(node, args, kwargs))

    def widen(self, value: torch.Tensor) -> torch.Tensor:
        """A floating tensor in the dtype of the run; any other tensor as it is."""
        return value.to(self.wide) if self.wide is not None and is_wide_float(value.dtype) else value

    @staticmethod
    def _computed(node: fx.Node, value: Callable[[], Any]) -> Any:
        try:
            return value()
        except TurbocompileError:  # says in its own words what is wrong, as of a weight that a checkpoint lacks
            raise
        except Exception as error:  # an operator may raise anything
            if is_out_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise Uncomputed(node.name, error) from error

    def _own(self, value: Any) -> Any:
        """A copy of a tensor where the graph writes into tensors, because the caller's tensor must stay as it is."""
        return (
            fx.node.map_aggregate(value, lambda t: t.clone() if isinstance(t, torch.Tensor) else t)
            if self.writes
            else value
        )

    def _constant(self, node: fx.Node, value: Any) -> Any:
        """The wide value of a constant node, rounded where the node has 16 bits."""
        own = getattr(node.meta["val"], "dtype", None)
        if self.wide is None or not isinstance(value, torch.Tensor) or not is_wide_float(value.dtype):
            return value
        if node in self.views and own is not None and own.itemsize == 2:  # in place, because other nodes view it
            return value.copy_(value.to(own))
        if node in self.aliases and node.all_input_nodes:
            return value
        value = value.to(own) if own is not None and own.itemsize == 2 else value
        return value.to(torch.promote_types(value.dtype, self.wide))

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if self.wide is None:
            return node.target(*args, **with_device(node, kwargs, self.device))  # type: ignore[operator]
        constant = node in self.constant
        if is_op(node, *SAGE, *SLA):
            return _unquantized(node, fx.node.map_aggregate(args, self._widen_argument))
        if is_op(node, aten.to.dtype) and node.meta["val"].dtype.is_floating_point and args[0].is_floating_point():
            return self._constant(node, args[0]) if constant else self.widen(args[0])
        args, kwargs = _with_limits(node, args, kwargs)
        widen = self._promote_argument if constant else self._widen_argument
        args, kwargs = (fx.node.map_aggregate(x, widen) for x in (args, kwargs))
        value = node.target(*args, **with_device(node, kwargs, self.device))  # type: ignore[operator]
        if constant:
            return self._constant(node, value)
        made = isinstance(value, torch.Tensor) and not node.all_input_nodes  # in torch's default dtype, unless named
        return self.widen(value) if made else value

    def _widen_argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_complex() and self.wide is torch.float64:
                return value.to(torch.complex128)
            return self.widen(value)
        if isinstance(value, torch.dtype) and value.is_complex and self.wide is torch.float64:
            return torch.complex128
        if isinstance(value, torch.dtype) and is_wide_float(value):
            return self.wide
        return value

    def _promote_argument(self, value: Any) -> Any:
        """As `_widen_argument`, for an argument of a constant node: a dtype wider than `wide` stays."""
        wider = isinstance(value, (torch.Tensor, torch.dtype)) and self.wide is torch.float32
        name = value.dtype if isinstance(value, torch.Tensor) else value
        return value if wider and name in (torch.float64, torch.complex128) else self._widen_argument(value)


def is_wide_float(dtype: torch.dtype) -> bool:
    """Whether a dtype is floating and has more than 8 bits, so that a wide run widens its tensors."""
    return dtype.is_floating_point and dtype.itemsize > 1


def needed_for(sub: Subgraph, targets: Iterable[str], given: Container[str]) -> set[str]:
    """The names of the targets and of all nodes that they are computed from, back to the nodes in `given`."""
    nodes = {n.name: n for n in sub.graph.nodes}
    needed: set[str] = set()
    todo = list(targets)
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += [] if name in given else [n.name for n in nodes[name].all_input_nodes]
    return needed


def writes(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, or changes the shape of a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written(node: fx.Node) -> set[fx.Node]:
    """The nodes into whose tensors a node writes, and the views through which it does so."""
    if torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
        return set()
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found: set[fx.Node] = set()
    todo = [a for s, a in zip(schema, node.args, strict=False) if s.alias_info is not None and s.alias_info.is_write]
    todo = [n for a in todo for n in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(n, fx.Node)]
    while todo:
        base = todo.pop()
        found.add(base)
        operation = isinstance(base.target, torch._ops.OpOverload)
        if operation and any(a.alias_info is not None for a in base.target._schema.arguments):
            todo += [n for n in base.all_input_nodes if n not in found]
    return found


def _with_limits(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a wide run, with the defaults that PyTorch derives from x's dtype: from its dtype in the graph.

    rms_norm's eps and the limits of nan_to_num are such defaults.
    """
    if not is_op(node, aten.rms_norm.default, aten.nan_to_num.default):
        return args, kwargs
    given = arguments(node.target, args, kwargs)  # type: ignore[arg-type]
    own = node.meta["val"].dtype
    if is_op(node, aten.rms_norm.default):
        given[3] = default_eps(own) if given[3] is None else given[3]
    elif own.is_floating_point:
        limits = torch.finfo(own)
        given[2:] = [
            v if v is not None else limit for v, limit in zip(given[2:], (limits.max, limits.min), strict=True)
        ]
    return tuple(given), {}


def _unquantized(node: fx.Node, args: Any) -> torch.Tensor:
    """The result of a quantized attention without its quantization, in the dtype of the arguments."""
    dtype = args[0].dtype
    if is_op(node, *SLA):  # in float64, because a rounding may choose another block where two scores are nearly equal
        args = fx.node.map_aggregate(args, lambda t: t.double() if isinstance(t, torch.Tensor) else t)
    q, k, v, *rest = args
    if is_op(node, ops.norm_sage_attention, ops.norm_sla_attention):
        weight, eps, cos, sin, grid, *rest = rest
        k = ops.qk_norm_rope(k, weight, eps, False, v.shape[2], cos, sin, grid, True)
    if is_op(node, *SAGE):
        scale, is_causal, _ = rest
        return _attention(q, k, v, scale, is_causal)
    return ops.sla_attention(q, k, v, *rest[:-1], "none").to(dtype)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """Attention over q, k, v (B, L, H, D) without quantization; (B, L, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    made = aten.scaled_dot_product_attention(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=True)
    return made.transpose(1, 2)
