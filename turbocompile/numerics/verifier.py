"""Verification: numbers, not shapes, say whether a rewrite is right.

Truth is the captured graph in float64. Two questions are asked of what is to be equal to rounding: the normal form of
each graph, each site of an exact pass, and each graph after such a pass.

* Is it the same function? Before and after are computed in float64 from the same inputs, with the weights of the first
  call and of the last, and may differ by TIGHT of the largest value: a fault is seen however small it is beside the
  rounding of the model's own dtype. Casts between floating types are widened in this, those of constants are not.
* Does it round no more? Both are run in the model's dtype, and the error after may be ALLOWED times the error before,
  which is measured at that very place, on the same inputs; and a floor, as an error before may be zero by luck.

A quantizing pass has a budget, relative L1 of each site in the engine's dtypes. What fails is left as it was: a site
by itself, a graph whose normal form differs as it was captured. A semantic pass (another function, meant so) sets a new
truth: the graph after it. The error of the output of the block, run as a whole, is a second figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbocompile.errors import VerificationError, brief
from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.execute import with_device
from turbocompile.ir.program import SHELL, Program, Subgraph, call, is_op
from turbocompile.ir.weights import AddLora, Cast, Cat, Constant, Expr, Mul, Permute, Reshape, Slice, is_relative
from turbocompile.kernels import ops
from turbocompile.recipe.options import CompileOptions, PassOptions
from turbocompile.rewrite.match import arguments, default_eps
from turbocompile.rewrite.results import Judgement, PassResult, Verdict

aten = torch.ops.aten
CPU = torch.device("cpu")
# Of the largest value, in float64: a result that has one right bit in float32 has a condition number below 2^23, and
# what is left of float64's 2^-53 is 2^-30.
TIGHT = 2.0**-30
# Errors before and after are both chance. Of equally many roundings the largest differs by less than 2 from one draw to
# another, and a rewrite may round in twice as many places. A narrower type is seen: bfloat16 for float16 rounds 8 times
# as much, a 16-bit type for float32 at least 2^13 times.
ALLOWED = 4.0
EXACT = 1e-5  # the floor in float32, of the largest true value: a few dozen roundings of 2^-24
STEP = 1 / 12  # one step of an 8-bit value, of the largest: 1 of 127, or e4m3's 32 of 448
HALF_STEP = 1 / 64  # the mean magnitude of a quarter of the largest value, and a half of 1 / 127 of it: relative L1
JITTERS = 3  # more inputs, a rounding apart, on which the rounding of a whole graph is measured
NATIVE = "native"


@dataclass(frozen=True)
class Error:
    """How far numbers are from the truth: cosine, relative L1 (sum|a-b| / sum|b|), and max|a-b| / max|b|."""

    cosine: float
    rel_l1: float
    max_abs: float
    max_rel: float

    def to_dict(self) -> dict[str, float]:
        return {"cosine": self.cosine, "rel_l1": self.rel_l1, "max_abs": self.max_abs}


def compare(found: torch.Tensor, truth: torch.Tensor) -> Error:
    """The error of `found`. A NaN or an infinity that the truth lacks makes every figure infinite.

    Where the truth is not finite `found` must be the same, and that place counts no further.
    """
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (found, truth))
    a, b = a.double().flatten(), b.double().flatten()
    finite = b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    if not bool((same | (finite & a.isfinite())).all()):
        return Error(0.0, math.inf, math.inf, math.inf)
    a, b = a[finite], b[finite]
    difference = (a - b).abs()
    total, top = float(b.abs().sum()), float(b.abs().max()) if b.numel() else 0.0
    norm = float(a.norm() * b.norm())
    equal = not bool(difference.any())
    rel_l1 = float(difference.sum()) / total if total else (0.0 if equal else math.inf)
    max_rel = float(difference.max()) / top if top else (0.0 if equal else math.inf)
    return Error(
        cosine=float(a @ b) / norm if norm else float(equal),
        rel_l1=rel_l1,
        max_abs=float(difference.max()) if a.numel() else 0.0,
        max_rel=max_rel,
    )


def floor_of(dtype: torch.dtype) -> Error:
    """What a value of a dtype may be off where the error before is none: one rounding, in float32 a few dozen."""
    if dtype.itemsize == 1:
        return Error(1.0, HALF_STEP, 0.0, STEP)
    if not dtype.is_floating_point:
        return Error(1.0, 0.0, 0.0, 0.0)
    size = TIGHT if dtype == torch.float64 else EXACT if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return Error(1.0, size, 0.0, size)


def differs(after: Error, dtype: torch.dtype, wide: torch.dtype | None) -> str:
    """How far a value computed in `wide` is from what it replaces, where it is not the same function; else empty.

    An 8-bit value may fall on the other side of a tie: rarely, and by one step.
    """
    bound = TIGHT if wide == torch.float64 else floor_of(wide or dtype).max_rel
    if dtype.itemsize == 1:
        right = after.rel_l1 <= 1e-4 and after.max_rel <= STEP
    else:
        right = after.max_rel <= bound
    where = str(wide or dtype).removeprefix("torch.")
    explained = f"and rounding explains {bound:.0e}"
    return (
        "" if right else f"in {where} the largest difference is {after.max_rel:.1e} of the largest value, {explained}"
    )


def rounds_more(after: Error, before: Sequence[Error], dtype: torch.dtype) -> str:
    """How much more a value in the engine's dtype is off than the values before, where it is too much; else empty."""
    floor = floor_of(dtype)
    name = str(dtype).removeprefix("torch.")
    for what in ("max_rel", "rel_l1"):
        found, own = getattr(after, what), max(getattr(e, what) for e in before)
        bound = ALLOWED * own + getattr(floor, what)
        if not found <= bound:
            figure = "the largest error" if what == "max_rel" else "the relative L1"
            return f"in {name} {figure} is {found:.1e}, and {own:.1e} before; rounding explains {bound:.1e}"
    return ""


def worst(errors: list[Error]) -> Error | None:
    """The error of the worst site, by relative L1."""
    return max(errors, key=lambda e: (e.rel_l1, e.max_rel), default=None)


Values = dict[str, Any]


class Evaluation:
    """Runs one graph, recording every node's value.

    weight: a weight's value, on `device`. wide: a floating dtype in which everything is computed (float64 for truth,
    float32 for an exact rewrite of a bf16 model); None runs the graph as it is. Casts between floating types are
    dropped when wide, but for those of constants: what is computed from constants alone is computed wide too, and
    rounded where it has 16 bits: a table cast to bf16 is meant so.
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
        """The nodes that depend on stored constants alone, and so do the tensors that are written into."""
        varying: set[fx.Node] = set()
        size = -1
        while len(varying) != size:  # a write makes varying what was made before it
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
        """Values by node name. given: values that are taken as they are (inputs, and nodes already known).

        calls: what a call of another graph gives. keep: the nodes whose values are wanted; all where nothing is said.
        """
        with torch.no_grad():
            run = self.steps(given, keep)
            try:
                node, args = next(run)
                while True:
                    node, args = run.send(calls(node, args) if calls is not None else node.target(*args))  # type: ignore[operator]
            except StopIteration as done:
                return done.value

    def steps(
        self, given: Mapping[str, Any], keep: Container[str] | None = None
    ) -> Generator[tuple[fx.Node, Any], Any, Values]:
        """As `__call__`, one call of another graph at a time: yields it, with its arguments, and is sent its value."""
        values: Values = {}
        left = {n: len(n.users) for n in self.sub.graph.nodes}
        for node in self.sub.graph.nodes:
            if node.op == "output":
                continue
            if node.name in given:
                values[node.name] = self._own(given[node.name])
            elif node.op == "get_attr":
                if any(u.name not in given for u in node.users):
                    values[node.name] = self.parameter(node)
            else:
                args = fx.map_arg(node.args, lambda n: values[n.name])
                kwargs = fx.map_arg(dict(node.kwargs), lambda n: values[n.name])
                values[node.name] = (yield node, args) if node.target is call else self._run(node, args, kwargs)
            for used in node.all_input_nodes:
                left[used] -= 1
                if keep is not None and not left[used] and used.name not in keep:
                    values.pop(used.name, None)
        return values

    def reach(self, targets: Iterable[str], given: Mapping[str, Any]) -> Values:
        """The values of the named nodes, and of what is computed on the way to them from what is given."""
        nodes = {n.name: n for n in self.sub.graph.nodes}
        needed: set[str] = set()
        todo = list(targets)
        while todo:
            name = todo.pop()
            if name not in needed:
                needed.add(name)
                todo += [] if name in given else [n.name for n in nodes[name].all_input_nodes]
        values: Values = {}
        with torch.no_grad():
            for name, node in nodes.items():
                if name not in needed:
                    continue
                if name in given:
                    values[name] = self._own(given[name])
                elif node.op == "get_attr":
                    values[name] = self.parameter(node)
                else:
                    args = fx.map_arg(node.args, lambda n: values[n.name])
                    kwargs = fx.map_arg(dict(node.kwargs), lambda n: values[n.name])
                    values[name] = self._run(node, args, kwargs)
        return values

    def _own(self, value: Any) -> Any:
        """A copy of a tensor where the graph writes into tensors: it must not write into what it was given."""
        return (
            fx.node.map_aggregate(value, lambda t: t.clone() if isinstance(t, torch.Tensor) else t)
            if self.writes
            else value
        )

    def parameter(self, node: fx.Node) -> torch.Tensor:
        """A weight in the dtype that is computed in."""
        value = self._own(self.weight(node))
        return self._constant(node, value) if node in self.constant else self._widen(value)

    def _constant(self, node: fx.Node, value: Any) -> Any:
        """A constant's value, wide, and rounded to the 16 bits that its node has; a wider one is left so."""
        own = getattr(node.meta["val"], "dtype", None)
        if self.wide is None or not isinstance(value, torch.Tensor) or not _is_wide_float(value.dtype):
            return value
        if node in self.views and own is not None and own.itemsize == 2:  # what is written, where it stands
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
            return self._constant(node, args[0]) if constant else self._widen(args[0])
        args, kwargs = _with_limits(node, args, kwargs)
        widen = self._promote_argument if constant else self._widen_argument
        args, kwargs = (fx.node.map_aggregate(x, widen) for x in (args, kwargs))
        value = node.target(*args, **with_device(node, kwargs, self.device))  # type: ignore[operator]
        if constant:
            return self._constant(node, value)
        made = isinstance(value, torch.Tensor) and not node.all_input_nodes  # in the default type, where none is named
        return self._widen(value) if made else value

    def _widen(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.wide) if self.wide is not None and _is_wide_float(value.dtype) else value

    def _widen_argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_complex() and self.wide is torch.float64:
                return value.to(torch.complex128)
            return self._widen(value)
        if isinstance(value, torch.dtype) and value.is_complex and self.wide is torch.float64:
            return torch.complex128
        if isinstance(value, torch.dtype) and _is_wide_float(value):
            return self.wide
        return value

    def _promote_argument(self, value: Any) -> Any:
        """As `_widen_argument`, for a constant: what is wider stays so."""
        wider = isinstance(value, (torch.Tensor, torch.dtype)) and self.wide is torch.float32
        name = value.dtype if isinstance(value, torch.Tensor) else value
        return value if wider and name in (torch.float64, torch.complex128) else self._widen_argument(value)


def _is_wide_float(dtype: torch.dtype) -> bool:
    """Whether a dtype is floating and has more than 8 bits: what is widened."""
    return dtype.is_floating_point and dtype.itemsize > 1


def writes(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, or changes its shape in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written(node: fx.Node) -> set[fx.Node]:
    """The nodes whose tensors a node writes into, with the views through which it does so."""
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
    """The arguments, with those that PyTorch derives from the type of x: of the type that x has in the graph."""
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
    """What a quantized attention stands for, in the dtype of its arguments."""
    dtype = args[0].dtype
    if is_op(node, *SLA):  # in float64: rounding would choose another block than the truth does where two are near
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
    """Attention over (B, L, H, D) without quantization."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    made = aten.scaled_dot_product_attention(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=True)
    return made.transpose(1, 2)


# ------------------------------------------------------------------------------------------------- values of a Program


class Weights:
    """The values of weights, by what they are: those of the first calls are kept."""

    def __init__(self, evaluate: Evaluator) -> None:
        self.evaluate = evaluate
        self._kept: dict[Any, torch.Tensor] = {}

    def __call__(self, sub: Subgraph, prefix: str, wide: torch.dtype | None, keep: bool = True) -> Any:
        """A function that gives the value of a get_attr of the graph, as a call with this prefix reads it."""

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
        """A weight that a pass scaled or added to, in float64: its rounding to its dtype is no part of the function."""
        match expr:
            case AddLora():
                of, a, b = (self._unrounded(part, prefix) for part in (expr.of, expr.a, expr.b))
                return of + expr.scale * (b @ a)
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
    """Whether a weight is, or is laid out or cast from, one that is multiplied by something or added to."""
    if isinstance(expr, (AddLora, Mul)):
        return True
    return isinstance(expr, (Reshape, Permute, Slice, Cat, Cast)) and any(_scaled(part) for part in expr.parts())


def run_all(
    program: Program, weights: Weights, inputs: Sequence[torch.Tensor], wide: torch.dtype | None
) -> dict[str, Values]:
    """Values of the shell and of the first call of each graph; later calls of a kind stand for the first."""
    found: dict[str, Values] = {}

    def run_call(node: fx.Node, args: Any) -> Any:
        name, prefix = args[:2]
        sub = program.graphs[name]
        if name not in found:
            given = {n.name: v for n, v in zip(sub.inputs(), args[3:], strict=True)}
            found[name] = Evaluation(sub, weights(sub, prefix, wide), wide)(given)
        outputs = tuple(found[name][n.name] for n in sub.outputs())
        return outputs[0] if len(outputs) == 1 else outputs

    shell = program.shell
    evaluation = Evaluation(shell, weights(shell, "", wide), wide)
    given = {n.name: evaluation._widen(t) for n, t in zip(shell.inputs(), inputs, strict=True)}
    found[SHELL] = evaluation(given, run_call)
    return found


def run_widest(
    program: Program, weights: Weights, inputs: Sequence[torch.Tensor]
) -> tuple[dict[str, Values], torch.dtype | None]:
    """The Program's values in float64, and that type; in float32, then as it is, where an operator has no other."""
    for wide in (torch.float64, torch.float32):
        try:
            return run_all(program, weights, inputs, wide), wide
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):  # what PyTorch raises for a type that an operator does not take
            continue
    return run_all(program, weights, inputs, None), None


def first_and_last(program: Program, graph: str) -> list[str]:
    """The weight prefixes of the first call of a graph and of the last: what reads a layer by name differs there."""
    prefixes = program.prefixes(graph) or [""]
    return list(dict.fromkeys((prefixes[0], prefixes[-1])))


def given_to(program: Program, graph: str) -> list[fx.Node]:
    """What a graph is given: its inputs, and for the shell what the calls give."""
    return program.graphs[graph].inputs() + ([c.node for c in program.calls()] if graph == SHELL else [])


def results_of(program: Program, graph: str) -> list[fx.Node]:
    """What a graph gives: its outputs, and for the shell what the calls read."""
    read = [n for c in program.calls() for n in c.node.args[3:]] if graph == SHELL else []
    return program.graphs[graph].outputs() + read  # type: ignore[operator]


def told_apart(program: Program, graph: str, given: Values) -> Values:
    """What a graph is given, where each call in it gives something of its own.

    A later call of a kind stands for the first: with one value for all, who reads which would make no difference.
    """
    calls = program.calls() if graph == SHELL else []
    made = dict(given)
    for number, use in enumerate(calls[1:], 1):
        generator = torch.Generator().manual_seed(number)

        def moved(t: Any, generator: torch.Generator = generator) -> Any:
            if not isinstance(t, torch.Tensor) or not _is_wide_float(t.dtype):
                return t
            size = t.double().square().mean().sqrt()
            return (t.double() + size * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t.dtype)

        made[use.node.name] = fx.node.map_aggregate(made[use.node.name], moved)
    return made


def widened(values: Mapping[str, Any], wide: torch.dtype | None) -> Values:
    """Values of an engine's dtypes in the dtype that is computed in."""
    return {
        name: fx.node.map_aggregate(v, lambda t: _cast(t, t.dtype, wide) if isinstance(t, torch.Tensor) else t)
        for name, v in values.items()
    }


def explained(error: Exception) -> Exception:
    """The error, if it says something of a graph; raises it where the machine is too small."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        raise error
    return error


# ------------------------------------------------------------------------------------------------------- normal forms


def wrong_forms(
    captured: Program, normal: Program, evaluate: Evaluator, inputs: Sequence[torch.Tensor], seed: int = 0
) -> dict[str, str]:
    """The graphs whose normal form is not what was captured -> by how much it differs.

    Each graph is run by itself, on the true values of its inputs. Raises VerificationError where a graph as captured is
    not finite in float64 and is in its own dtype: then nothing is known.
    """
    weights = Weights(evaluate)
    truth, wide = run_widest(captured, weights, inputs)
    found = {}
    for graph in truth:
        pairs = list(zip(given_to(captured, graph), given_to(normal, graph), strict=True))
        values = {old.name: as_engine(truth[graph][old.name], old) for old, _ in pairs}
        values = told_apart(captured, graph, values)
        given = {(old.name, new.name): values[old.name] for old, new in pairs}
        forms = _Forms(captured, normal, graph, given, weights, wide)
        reason = forms.differ() or forms.round_more(seed)
        if reason:
            found[graph] = reason
    return found


@dataclass
class _Forms:
    """A graph as captured and in normal form, and what both are given, in the engine's dtypes, by both its names."""

    captured: Program
    normal: Program
    graph: str
    given: Mapping[tuple[str, str], Any]
    weights: Weights
    wide: torch.dtype | None

    def run(self, program: Program, prefix: str, wide: torch.dtype | None, given: Mapping[tuple[str, str], Any]) -> Any:
        """The results of one of the two."""
        sub, form = program.graphs[self.graph], int(program is self.normal)
        first = prefix in program.prefixes(self.graph)[:1]
        evaluation = Evaluation(sub, self.weights(sub, prefix, wide, first), wide)
        named = widened({names[form]: v for names, v in given.items()}, wide)
        values = evaluation(named, lambda node, args: named[node.name])
        return [values[n.name] for n in results_of(program, self.graph)]

    def differ(self) -> str:
        """How far the two are apart in the widest dtype; empty where they are one function."""
        for prefix in first_and_last(self.captured, self.graph):
            true = self.run(self.captured, prefix, self.wide, self.given)
            try:
                found = self.run(self.normal, prefix, self.wide, self.given)
            except Exception as error:
                return f"its normal form cannot be computed ({brief(explained(error))})"
            for node, a, b in zip(results_of(self.captured, self.graph), found, true, strict=True):
                reason = differs(compare(a, b), node.meta["val"].dtype, self.wide)
                if reason:
                    return f"its normal form is another function: {reason}"
        return ""

    def round_more(self, seed: int) -> str:
        """How much more the normal form rounds than what was captured; empty where it does not."""
        prefix = first_and_last(self.captured, self.graph)[0]
        true = self.run(self.captured, prefix, self.wide, self.given)
        own = self.run(self.captured, prefix, None, self.given)
        found = self.run(self.normal, prefix, None, self.given)
        reason = ""
        for i, node in enumerate(results_of(self.captured, self.graph)):
            dtype = node.meta["val"].dtype
            if bool((own[i].isfinite() & ~true[i].isfinite()).any()):
                raise VerificationError(
                    f"the graph {self.graph!r} is not finite in float64 where it is in {dtype}, so that nothing can be "
                    "measured; build with verify: off"
                )
            after, before = compare(found[i], true[i]), [compare(own[i], true[i])]
            if rounds_more(after, before, dtype):  # by luck, where few roundings make the error?
                before += [compare(again[i], true[i]) for again in self.jittered(prefix, seed)]
            reason = reason or rounds_more(after, before, dtype)
        return reason and f"its normal form rounds more: {reason}"

    def jittered(self, prefix: str, seed: int) -> Iterator[Any]:
        """The results of what was captured on inputs that are a rounding apart."""
        generator = torch.Generator().manual_seed(seed)

        def moved(t: Any) -> Any:
            if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype.itemsize == 1:
                return t
            up = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (t.double() * (1 + torch.finfo(t.dtype).eps * up)).to(t.dtype)

        for _ in range(JITTERS):
            given = {names: fx.node.map_aggregate(value, moved) for names, value in self.given.items()}
            yield self.run(self.captured, prefix, None, given)


# ------------------------------------------------------------------------------------------------------- exact passes


class Rewritten:
    """A graph before and after an exact pass, computed from what the graph is given, in the widest dtype there is.

    What the new nodes of a site read of the old graph is given them, so that each site is judged by itself.
    """

    def __init__(
        self,
        before: Program,
        after: Subgraph,
        graph: str,
        replaced: Mapping[str, str],
        given: Values,
        weights: Weights,
        wide: torch.dtype | None,
    ) -> None:
        """before, after: with the pass's new nodes, not yet cleaned up. replaced: old node -> new node, by name."""
        self.old, self.after, self.weights, self.wide = before.graphs[graph], after, weights, wide
        self.prefixes = first_and_last(before, graph)
        self.nodes = {n.name: n for n in self.old.graph.nodes}
        self.given = given
        self.known, self.changed = self._same(replaced)
        wide_given = widened(given, wide)
        self.values = [
            self._evaluation(self.old, prefix, wide)(wide_given, lambda node, args: wide_given[node.name])
            for prefix in self.prefixes
        ]

    def _evaluation(self, sub: Subgraph, prefix: str, wide: torch.dtype | None) -> Evaluation:
        return Evaluation(sub, self.weights(sub, prefix, wide, keep=prefix == self.prefixes[0]), wide)

    def _same(self, replaced: Mapping[str, str]) -> tuple[set[str], list[str]]:
        """The nodes that the pass left as they were; and those that it changed in place."""
        known, changed = set(self.given), []
        for node in self.after.graph.nodes:
            old = self.nodes.get(node.name)
            if old is None or node.op in ("placeholder", "output") or node.name in self.given:
                continue
            if old.op == node.op == "get_attr":
                if self.old.weights[str(old.target)] != self.after.weights[str(node.target)]:
                    changed.append(node.name)
            elif old.target is not node.target or self._named(old, replaced) != self._named(node, {}):
                changed.append(node.name)
            else:
                known.add(node.name)
        return known, changed

    @staticmethod
    def _named(node: fx.Node, replaced: Mapping[str, str]) -> str:
        """The arguments of a node as text, with the names of nodes as they are after the pass."""
        return repr(fx.map_arg((node.args, dict(node.kwargs)), lambda n: replaced.get(n.name, n.name)))

    def judge(self, pairs: Sequence[tuple[str, str]]) -> tuple[Error | None, str]:
        """The error of new nodes in the widest dtype, and why they do not equal the old ones; empty where they do.

        A new node that a later rewrite of the pass took in is judged with that one's.
        """
        there = {n.name for n in self.after.graph.nodes}
        pairs = [(o, n) for o, n in pairs if n in there and isinstance(self.values[0].get(o), torch.Tensor)]
        read = set(self.given) | self._read([new for _, new in pairs])
        errors: list[Error] = []
        for prefix, values in zip(self.prefixes, self.values, strict=True):
            found = self._differ(pairs, {name: values[name] for name in read}, values, prefix)
            if isinstance(found, str):
                return worst(errors), found
            errors += found
        return worst(errors), self._round_more(pairs, read)

    def _read(self, names: Sequence[str]) -> set[str]:
        """The known nodes that the named new ones are computed from."""
        after = {n.name: n for n in self.after.graph.nodes}
        found: set[str] = set()
        seen: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name in self.known:
                found.add(name)
            elif name not in seen:
                seen.add(name)
                todo += [n.name for n in after[name].all_input_nodes]
        return found

    def _aside(self, read: set[str]) -> set[str]:
        """The known nodes that are computed from none of those that the new nodes read."""
        behind: set[str] = set()
        for name, node in self.nodes.items():
            if any(n.name in behind or n.name in read for n in node.all_input_nodes):
                behind.add(name)
        return {n for n in self.known - behind if self.nodes[n].op != "get_attr"}

    def _differ(self, pairs: Sequence[tuple[str, str]], given: Values, true: Values, prefix: str) -> list[Error] | str:
        """The errors in the widest dtype, or how far they are too large."""
        try:
            found = self._evaluation(self.after, prefix, self.wide).reach([new for _, new in pairs], given)
        except Exception as error:
            return f"the rewritten site cannot be computed ({brief(explained(error))})"
        errors = [compare(found[new], true[old]) for old, new in pairs]
        for (old, _), off in zip(pairs, errors, strict=True):
            reason = differs(off, self.nodes[old].meta["val"].dtype, self.wide)
            if reason:
                return f"changes the numbers: {reason}"
        return errors

    def _round_more(self, pairs: Sequence[tuple[str, str]], read: set[str]) -> str:
        """How much more the new nodes round than the old ones in the engine's dtypes; empty where they do not."""
        true, prefix = self.values[0], self.prefixes[0]
        given = {n: as_engine(true[n], self.nodes[n]) for n in read | self._aside(read - set(self.given))}
        own = self._evaluation(self.old, prefix, None).reach([old for old, _ in pairs], given)
        try:
            found = self._evaluation(self.after, prefix, None).reach([new for _, new in pairs], given)
        except Exception as error:
            return f"the rewritten site cannot be computed ({brief(explained(error))})"
        for old, new in pairs:
            after, before = (compare(value, true[old]) for value in (found[new], own[old]))
            reason = rounds_more(after, [before], found[new].dtype)
            if reason:
                return f"rounds more than what it replaces: {reason}"
        return ""

    def whole(self, program: Program, graph: str, results: Sequence[fx.Node]) -> str:
        """How far a cleaned-up graph is another function than the one before; empty where it is the same.

        results: what the graph before gives.
        """
        given = widened(self.given, self.wide)
        try:
            evaluation = self._evaluation(program.graphs[graph], self.prefixes[0], self.wide)
            values = evaluation(given, lambda node, args: given[node.name])
        except Exception as error:
            return f"it cannot be computed ({brief(explained(error))})"
        for old, new in zip(results, results_of(program, graph), strict=True):
            off = compare(values[new.name], self.values[0][old.name])
            reason = differs(off, old.meta["val"].dtype, self.wide)
            if reason:
                return f"changes the numbers: {reason}"
        return ""


class _Uncomputed(Exception):
    """A new node that could not be computed. node: its name; reason: in a few words."""

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(node)
        self.node, self.reason = node, f"the rewritten site cannot be computed ({brief(error)})"


def refused(sites: list[str], reason: str) -> Judgement:
    """The judgement that refuses all sites for one reason."""
    return Judgement(refused=dict.fromkeys(sites, reason))


class Verifier:
    """Judges passes on a Program (the twin at a small shape); the hook of `pipeline.run_passes`.

    evaluate: the weights' values. inputs: tensors of the call in the Program's dtypes; random by default. The shell and
    the first call of each kind of block are run, the block fed by the shell's own values.
    """

    def __init__(
        self,
        program: Program,
        evaluate: Evaluator,
        options: CompileOptions | None = None,
        inputs: list[torch.Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.options = options
        self.inputs = inputs or random_inputs(program, seed)
        self.weights = Weights(evaluate)
        self.learned: dict[str, Values] = {}
        self._rebase(program)

    def after(self, program: Program, before: Program, result: PassResult) -> Judgement:
        """Measures a pass; returns its verdict, and the sites to leave alone with the reasons."""
        everything = [r.site for _, rewrites in result.raw.values() for r in rewrites]
        if result.kind == "semantic":
            try:
                self._rebase(program)
            except Exception as error:
                return refused(everything, f"the rewritten graph cannot be computed ({brief(explained(error))})")
            return Judgement(Verdict(error_reason="another function by intent; later passes are measured against it"))
        self.learned = {}
        if result.kind == "exact":
            errors, bad = self._exact(program, before, result)
            site_errors: dict[str, tuple[Error, float]] = {}
        else:
            errors, bad, site_errors = self._quantized(program, before, result)
        if bad:
            return Judgement(Verdict(site_errors=site_errors), bad)
        try:
            output = self._output_error(program, result)
        except Exception as error:
            return refused(everything, f"the rewritten graph cannot be computed ({brief(explained(error))})")
        self._adopt(program)
        error = worst(errors)
        figures = (error.to_dict(), output.to_dict()) if error else (None, output.to_dict(), "no site left to measure")
        return Judgement(Verdict(*figures, site_errors=site_errors))

    # ------------------------------------------------------------------------------------------------ values

    def _weight(
        self, program: Program, graph: str, wide: torch.dtype | None = None
    ) -> Callable[[fx.Node], torch.Tensor]:
        return self.weights(program.graphs[graph], first_and_last(program, graph)[0], wide)

    def _true_inputs(self, program: Program, graph: str) -> Values:
        """True values of what a graph is given, in the engine's dtypes."""
        return {n.name: as_engine(self.truth[graph][n.name], n) for n in given_to(program, graph)}

    def _rebase(self, program: Program) -> None:
        """Takes the Program's float64 values as the truth."""
        self.truth, self.wide = run_widest(program, self.weights, self.inputs)
        self.outputs = {g: [self.truth[g][n.name] for n in program.graphs[g].outputs()] for g in self.truth}

    def _output_error(self, program: Program, result: Any) -> Error:
        """The error of the rewritten graphs' outputs, each run as a whole in the engine's dtypes, from exact inputs."""
        errors = []
        for graph in result.raw:
            if graph not in self.truth:
                continue
            sub = program.graphs[graph]
            values = Evaluation(sub, self._weight(program, graph), None)(*self._as_given(program, graph, None))
            pairs = zip(sub.outputs(), self.outputs[graph], strict=True)
            errors += [compare(values[n.name], true) for n, true in pairs]
        return worst(errors) or Error(1.0, 0.0, 0.0, 0.0)

    def _as_given(self, program: Program, graph: str, wide: torch.dtype | None) -> tuple[Values, Callable[..., Any]]:
        """What an Evaluation of a whole graph takes: its inputs, and what the calls in it give."""
        given = widened(self._true_inputs(program, graph), wide)
        return given, lambda node, args: given[node.name]

    # ------------------------------------------------------------------------------------------------- sites

    def _exact(self, program: Program, before: Program, result: Any) -> tuple[list[Error], dict[str, str]]:
        """The errors of an exact pass's sites, and those that it got wrong -> why."""
        errors: list[Error] = []
        bad: dict[str, str] = {}
        for graph, (sub, rewrites) in result.raw.items():
            if graph not in self.truth:
                continue
            replaced = {old: new for r in rewrites for old, new in r.replaced}
            given = told_apart(before, graph, self._true_inputs(before, graph))
            rewritten = Rewritten(before, sub, graph, replaced, given, self.weights, self.wide)
            wrong: dict[str, str] = {}
            for rewrite in rewrites:
                error, reason = rewritten.judge(rewrite.replaced)
                errors += [error] if error is not None else []
                wrong |= {rewrite.site: reason} if reason else {}
            if not wrong:
                _, reason = rewritten.judge([(name, name) for name in rewritten.changed])
                reason = reason or rewritten.whole(program, graph, results_of(before, graph))
                wrong = {r.site: f"the graph as a whole: {reason}" for r in rewrites} if reason else {}
            bad |= wrong
            for node in sub.graph.nodes:
                old = next((old for old, new in replaced.items() if new == node.name), None)
                if old in self.truth[graph]:
                    self._learn(graph, node, self.truth[graph][old])
        return errors, bad

    def _quantized(
        self, program: Program, before: Program, result: PassResult
    ) -> tuple[list[Error], dict[str, str], dict[str, tuple[Error, float]]]:
        """The errors of a quantizing pass's sites; those over their budget -> by how much; each (error, budget)."""
        options = PassOptions(True) if self.options is None else self.options.of(result.name)
        errors: list[Error] = []
        bad: dict[str, str] = {}
        site_errors: dict[str, tuple[Error, float]] = {}
        for graph, (sub, rewrites) in result.raw.items():
            if graph not in self.truth:
                continue
            try:
                found = self._graph_sites(program, graph, sub, rewrites)
            except _Uncomputed as failed:
                sites = [r.site for r in rewrites if failed.node in _made_for(sub, r)]
                bad |= dict.fromkeys(sites or [r.site for r in rewrites], failed.reason)
                continue
            for rewrite in rewrites:
                error = worst([found[new] for _, new in rewrite.replaced if new in found])
                if error is None:
                    continue
                errors.append(error)
                formats = _formats(sub, rewrite)
                budget = options.budget(formats)
                if formats != {NATIVE}:  # an attention that stayed in floating point is no quantized site
                    site_errors[rewrite.site] = (error, budget)
                if not error.rel_l1 <= budget:
                    bad[rewrite.site] = f"relative L1 {error.rel_l1:.4f} is over its budget of {budget:g}"
        return errors, bad, site_errors

    def _graph_sites(self, program: Program, graph: str, sub: Subgraph, rewrites: list[Any]) -> dict[str, Error]:
        """Runs the new nodes on true inputs, in order; a measured node hands on the truth, not what it computed."""
        truth = self.truth[graph]
        was = {new: old for rewrite in rewrites for old, new in rewrite.replaced}
        evaluation = Evaluation(sub, self.weights(sub, first_and_last(program, graph)[0], None), None)
        errors: dict[str, Error] = {}
        values: Values = {}
        for node in sub.graph.nodes:
            measured = node.name in was and was[node.name] in truth
            if node.op == "output":
                continue
            if not measured and node.name in truth and node.op != "get_attr":
                values[node.name] = as_engine(truth[node.name], node)
            elif node.op == "get_attr":
                if any(u.name in was or u.name not in truth for u in node.users):
                    values[node.name] = evaluation.parameter(node)
            else:
                args, kwargs = self._arguments(node, values)
                try:
                    with torch.no_grad():
                        values[node.name] = evaluation._run(node, args, kwargs)
                except Exception as error:
                    raise _Uncomputed(node.name, explained(error)) from error
            if measured:
                true = truth[was[node.name]]
                self._learn(graph, node, true)
                if isinstance(true, torch.Tensor):
                    errors[node.name] = compare(values[node.name], true)
                values[node.name] = as_engine(true, node)
        return errors

    def _learn(self, graph: str, node: fx.Node, true: Any) -> None:
        """Notes a new node's true value, and that of the new nodes which it only lays out anew or casts.

        Clean-up may remove the last permute of a site; the op under it must still be known to hold the truth, else the
        next pass would be charged with this one's error.
        """
        learned = self.learned.setdefault(graph, {})
        while True:
            learned[node.name] = true
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source.op != "call_function" or source.name in self.truth[graph]:
                return
            if is_op(node, aten.permute):
                order = [d % true.dim() for d in node.args[1]]  # type: ignore[union-attr]
                true = true.permute([order.index(d) for d in range(true.dim())])
            elif is_op(node, aten.reshape):
                true = true.reshape(source.meta["val"].shape)
            elif not is_op(node, aten.to.dtype):
                return
            node = source

    def _arguments(self, node: fx.Node, values: Values) -> tuple[Any, Any]:
        return (
            fx.map_arg(node.args, lambda n: values[n.name]),
            fx.map_arg(dict(node.kwargs), lambda n: values[n.name]),
        )

    def _adopt(self, program: Program) -> None:
        """Gives the nodes that a pass made their true values, so that the next pass finds exact inputs."""
        for graph in list(self.truth):
            sub, truth = program.graphs[graph], self.truth[graph]
            truth |= self.learned.get(graph, {})
            known = {n.name: truth[n.name] for n in sub.graph.nodes if n.name in truth and n.op != "get_attr"}
            if graph == SHELL:
                self.truth[graph] = self._run_shell(program, known)
            else:
                self.truth[graph] = Evaluation(sub, self._weight(program, graph, self.wide), self.wide)(known)

    def _run_shell(self, program: Program, known: Values) -> Values:
        evaluation = Evaluation(program.shell, self._weight(program, SHELL, self.wide), self.wide)
        return evaluation(known, lambda node, args: known[node.name])


def as_engine(value: Any, node: fx.Node, wide: torch.dtype | None = None) -> Any:
    """A true value in the dtype that the node has in the engine."""
    if isinstance(value, (tuple, list)):
        vals = node.meta["val"]
        return type(value)(_cast(v, t.dtype, wide) for v, t in zip(value, vals, strict=True))
    return _cast(value, node.meta["val"].dtype, wide)


def _cast(value: Any, dtype: torch.dtype, wide: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype.itemsize == 1:
        return value
    return value.to(wide if wide is not None and dtype.is_floating_point else dtype)


def is_float64(sub: Subgraph) -> bool:
    return any(
        n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dtype == torch.float64
        for n in sub.graph.nodes
    )


def _made_for(sub: Subgraph, rewrite: Any) -> set[str]:
    """The nodes that a site's new nodes are computed by."""
    todo, found = [n for n in sub.graph.nodes if n.name in {new for _, new in rewrite.replaced}], set()
    while todo:
        node = todo.pop()
        if node.name not in found:
            found.add(node.name)
            todo += node.all_input_nodes
    return found


def _formats(sub: Subgraph, rewrite: Any) -> set[str]:
    """The quantization formats named by a site's new nodes and what feeds them."""
    names = {n.name: n for n in sub.graph.nodes}
    found: set[str] = set()
    for _, new in rewrite.replaced:
        todo, depth = [names[new]] if new in names else [], 0
        while todo and depth < 8:
            node = todo.pop()
            depth += 1
            if is_op(node, *SAGE, *SLA):
                found.add(f"sage_{node.args[-1]}")
            elif is_op(node, aten.scaled_dot_product_attention):
                found.add(NATIVE)
            elif is_op(node, ops.w8a8_linear):
                found |= {a for a in node.args if isinstance(a, str)}
            elif node.op == "call_function":
                todo += node.all_input_nodes
    return found


def random_inputs(
    program: Program, seed: int = 0, example: Sequence[torch.Tensor] = (), *, zeros: bool = False
) -> list[torch.Tensor]:
    """Random tensors of the Program's inputs: N(0, 1), timesteps in (0, 1000), ones for masks and integers.

    example: the tensors of a call of these shapes. Its masks and integers are taken as they are, for what they may be
    is the model's own: indices, lengths, classes. One that is all zeros becomes ones unless `zeros` says otherwise: a
    mask of zeros would take every key away, and positions of zero would rotate nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k, i in enumerate(program.signature.inputs):
        if i.number and k < len(example):
            value = example[k].detach().cpu()
        elif i.cast:
            value = torch.rand(i.shape, generator=generator) * 999.0 + 0.5
        elif i.dtype.is_floating_point:
            value = torch.randn(i.shape, generator=generator)
        else:
            given = example[k].detach().cpu() if k < len(example) and example[k].device.type != "meta" else None
            value = given if given is not None and (zeros or bool(given.any())) else torch.ones(i.shape)
        made.append(value.to(i.dtype))
    return made
