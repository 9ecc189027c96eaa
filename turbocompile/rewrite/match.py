"""Patterns over normal-form graphs, and the rules that use them.

A pattern is written with the operators of the graph, and passes through the same normal table: `1 + scale` is
`add(scale, 1)`, `a - b` is `add(a, neg(b))`, `a / b` is `mul(a, pow(b, -1))`. Matching is commutative where the op is,
looks through casts between floating types and through nothing else, and backtracks. An argument that a pattern does not
name (an axis, an index, keepdim) must have the op's default.

    x, scale, shift, weight, bias, eps = variables("x scale shift weight bias eps")
    ADALN = layer_norm(x, LAST, weight, bias, eps) * (1 + scale) + shift
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from turbocompile.errors import TurbocompileError
from turbocompile.ir.arguments import arguments, parameters
from turbocompile.ir.program import Program, Subgraph, infer, is_op
from turbocompile.ir.weights import Expr
from turbocompile.rewrite.facts import give_place
from turbocompile.rewrite.linears import weight_expr

aten = torch.ops.aten
COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)

# ---------------------------------------------------------------------------------------------------------- patterns


class Pattern:
    """A part of a graph. Build one from `variables`, the op builders below, and Python's operators."""

    def __add__(self, other: Any) -> Pattern:
        return Op(aten.add.Tensor, (self, other))

    def __sub__(self, other: Any) -> Pattern:
        return self + (-other)

    def __rsub__(self, other: Any) -> Pattern:
        return -self + other

    def __mul__(self, other: Any) -> Pattern:
        if isinstance(self, Op) and self.target is aten.neg.default:
            return -(self.args[0] * other)
        if isinstance(other, Op) and other.target is aten.neg.default:
            return -(self * other.args[0])
        if other is self:
            return self**2
        return Op(aten.mul.Tensor, (self, other))

    def __truediv__(self, other: Any) -> Pattern:
        return self * (other**-1)

    def __rtruediv__(self, other: Any) -> Pattern:
        return self**-1 * other

    def __pow__(self, exponent: float) -> Pattern:
        return Op(aten.pow.Tensor_Scalar, (self, exponent))

    def __neg__(self) -> Pattern:
        if isinstance(self, Op) and self.target is aten.neg.default:
            return self.args[0]
        return Op(aten.neg.default, (self,))

    def __matmul__(self, other: Any) -> Pattern:
        return Op(aten.matmul.default, (self, other))

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """Stands for anything: a node, or a plain value (None, a float). Used twice, it stands for the same thing twice.

    of: the types that it stands for alone; empty: all.
    """

    name: str
    of: tuple[type, ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Op(Pattern):
    """A call of `target` on arguments that are patterns or plain values; arguments not given have their defaults.

    A last argument `...` stands for whatever other arguments a call has.
    """

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def wanted(self) -> list[Any]:
        """The arguments in the order of the schema, defaults filled in; of an open pattern, those before the `...`."""
        if self.args and self.args[-1] is ...:
            return list(self.args[:-1])
        return arguments(self.target, self.args, self.kwargs)

    def __str__(self) -> str:
        sign = {aten.add.Tensor: " + ", aten.mul.Tensor: " * ", aten.pow.Tensor_Scalar: "**"}.get(self.target)
        if sign:
            left, right = map(str, self.args)
            return f"({left} - {right[1:]})" if sign == " + " and right.startswith("-") else f"({left}{sign}{right})"
        if self.target is aten.neg.default:
            return f"-{self.args[0]}"
        given = [str(a) for a in self.args] + [f"{k}={v}" for k, v in self.kwargs.items()]
        return f"{self.target._schema.name.split('::')[1]}({', '.join(given)})"


class _Last:
    """The last axis alone: as a dimension, a list of one dimension, or a normalized shape of one size."""

    def __str__(self) -> str:
        return "LAST"

    __repr__ = __str__


LAST = _Last()


def variables(names: str) -> tuple[Var, ...]:
    """Variables by their names, separated by spaces."""
    return tuple(Var(n) for n in names.split())


def tensors(names: str) -> tuple[Var, ...]:
    """Variables that stand for nodes alone."""
    return tuple(Var(n, (fx.Node,)) for n in names.split())


def numbers(names: str) -> tuple[Var, ...]:
    """Variables that stand for Python numbers alone."""
    return tuple(Var(n, (int, float, complex)) for n in names.split())


def op(target: torch._ops.OpOverload) -> Callable[..., Op]:
    """A builder of patterns for any overload: `op(aten.gelu.default)(x, approximate="tanh")`."""
    return lambda *args, **kwargs: Op(target, args, kwargs)


linear = op(aten.linear.default)
layer_norm = op(aten.layer_norm.default)
rms_norm = op(aten.rms_norm.default)
scaled_dot_product_attention = op(aten.scaled_dot_product_attention.default)
gelu = op(aten.gelu.default)
silu = op(aten.silu.default)
softmax = op(aten.softmax.int)
matmul = op(aten.matmul.default)
mean = op(aten.mean.dim)
permute = op(aten.permute.default)
reshape = op(aten.reshape.default)
cat = op(aten.cat.default)
narrow = op(aten.slice.Tensor)

# ---------------------------------------------------------------------------------------------------------- matching


def is_cast(node: Any) -> bool:
    """Whether node casts from one floating type to another."""
    if not is_op(node, aten.to.dtype):
        return False
    source = node.args[0].meta["val"].dtype
    return source.is_floating_point and node.meta["val"].dtype.is_floating_point


def uncast(value: Any) -> Any:
    """The value under its floating casts."""
    while is_cast(value):
        value = value.args[0]
    return value


def exact(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether each value of the floating type `narrow` is a value of `wide`."""
    if not (narrow.is_floating_point and wide.is_floating_point):
        return False
    a, b = torch.finfo(narrow), torch.finfo(wide)
    return a.eps >= b.eps and a.max <= b.max and a.smallest_normal * a.eps >= b.smallest_normal * b.eps


def default_eps(dtype: torch.dtype) -> float:
    """The eps of an RMSNorm that names none: PyTorch takes that of the type it computes in, float32 for 16 bits."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def unwiden(value: Any) -> Any:
    """The value under casts that lose no bit."""
    while is_cast(value) and exact(value.args[0].meta["val"].dtype, value.meta["val"].dtype):
        value = value.args[0]
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two bound values are the same node or the same plain value, floating casts aside."""
    a, b = uncast(a), uncast(b)
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return a is b or (a.op == b.op == "get_attr" and a.target == b.target)
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return False
    return isinstance(a, bool) == isinstance(b, bool) and a == b


Bound = dict[str, Any]


def matches(pattern: Any, value: Any, bound: Bound | None = None, blind: bool = True) -> Iterator[Bound]:
    """All ways in which `value` (a node or a plain value) has the form of `pattern`, as variable -> value.

    blind: whether to look through casts between floating types, as passes do and rules of the normal form do not.
    """
    bound = {} if bound is None else bound
    if isinstance(pattern, Var):
        if pattern.of and not isinstance(value, pattern.of):
            return
        if pattern.name not in bound:
            yield {**bound, pattern.name: value}
        elif same(bound[pattern.name], value) if blind else _identical(bound[pattern.name], value):
            yield bound
    elif isinstance(pattern, Op):
        while isinstance(value, fx.Node):
            if value.op == "call_function" and value.target is pattern.target:
                yield from _match_call(pattern, value, bound, blind)
            if not blind or not is_cast(value):
                return
            value = value.args[0]
    elif isinstance(pattern, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _match_all(pattern, value, bound, blind)
    elif not isinstance(value, fx.Node) and same(pattern, value):
        yield bound


def _identical(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, fx.Node) and same(a, b))


def _match_call(pattern: Op, node: fx.Node, bound: Bound, blind: bool) -> Iterator[Bound]:
    wanted = list(pattern.wanted)
    given = arguments(pattern.target, node.args, node.kwargs)[: len(wanted)]
    for i, (name, _, _) in enumerate(parameters(pattern.target)[: len(wanted)]):
        if wanted[i] is LAST or (isinstance(wanted[i], (list, tuple)) and list(wanted[i]) == [LAST]):
            if not _is_last(name, given[i], node):
                return
            wanted[i] = given[i]
    yield from _match_all(wanted, given, bound, blind)
    if pattern.target in COMMUTATIVE and wanted[2:] in ([], [1]):  # a + alpha * b is no b + alpha * a
        yield from _match_all([wanted[1], wanted[0], *wanted[2:]], given, bound, blind)


def _match_all(patterns: Sequence[Any], values: Sequence[Any], bound: Bound, blind: bool) -> Iterator[Bound]:
    if not patterns:
        yield bound
        return
    for found in matches(patterns[0], values[0], bound, blind):
        yield from _match_all(patterns[1:], values[1:], found, blind)


def _is_last(name: str, value: Any, node: fx.Node) -> bool:
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            return False
        value = value[0]
    if name == "normalized_shape":
        return True
    measured = node.args[0] if isinstance(node.args[0], fx.Node) else node  # cat and stack: their own last axis
    return value in (-1, measured.meta["val"].dim() - 1)


# ------------------------------------------------------------------------------------------------------------- rules


@dataclass
class Match:
    """One site: where it is, what the variables stand for (as attributes), and how to build its replacement.

    root: the node that is replaced. graph: the name of its graph; site: its name in the report, as in "blocks:attn1".
    options: of the pass. bound: variable -> what it stands for. made: the nodes that `op` and `weight` added.
    """

    root: fx.Node
    graph: str
    site: str
    program: Program
    options: Any
    bound: Bound
    made: list[fx.Node] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["bound"][name]
        except KeyError:
            raise AttributeError(f"the pattern has no variable {name!r}") from None

    @property
    def sub(self) -> Subgraph:
        return self.program.graphs[self.graph]

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call before the root, with the root's place in the model; its shape and dtype are inferred."""
        target = getattr(target, "default", target) if isinstance(target, torch._ops.OpOverloadPacket) else target
        with self.sub.graph.inserting_before(self.root):
            name = getattr(target, "_opname", target.__name__).strip("_")
            node = self.sub.graph.create_node("call_function", target, args, kwargs, name=name)
        give_place(node, self.root)
        node.meta["val"] = infer(target, node.args, node.kwargs, self.program.fake_mode)
        self.made.append(node)
        return node

    def weight(self, name: str, expr: Expr) -> fx.Node:
        """The get_attr of a weight, added under its local name where the graph has none of that name yet.

        Raises TurbocompileError where the graph has another weight of that name.
        """
        known = self.sub.weights.setdefault(name, expr)
        if known != expr:
            raise TurbocompileError(f"{self.site}: the graph {self.graph!r} already has another weight {name!r}")
        for node in self.sub.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        first = next(n for n in self.sub.graph.nodes if n.op != "placeholder")
        with self.sub.graph.inserting_before(first):
            node = self.sub.graph.create_node("get_attr", name)
        with self.program.fake_mode:
            node.meta["val"] = torch.empty(expr.shape, dtype=expr.dtype)
        self.made.append(node)
        return node

    def expr(self, node: Any) -> Expr | None:
        """The node as an expression over checkpoint tensors; None where it is more than a weight in another layout."""
        return weight_expr(node, self.sub)

    def constant_along_tokens(self, *values: Any) -> bool:
        """Whether each value, broadcast to the root's (batch, ..., channels), is the same for all tokens."""
        rank = self.root.meta["val"].dim()
        tokens = range(1, rank - 1) if rank > 2 else range(rank - 1)
        for value in values:
            if isinstance(value, fx.Node):
                sizes = tuple(value.meta["val"].shape)
                sizes = (1,) * (rank - len(sizes)) + sizes
                if len(sizes) > rank or any(sizes[d] != 1 for d in tokens):
                    return False
        return True

    def result_dtype(self) -> torch.dtype:
        """The dtype that all readers of the root, behind layout changes, cast it to; its own where they disagree."""
        own, found = self.root.meta["val"].dtype, set()
        readers = list(self.root.users)
        while readers:
            node = readers.pop()
            if is_op(node, aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.expand.default):
                readers += node.users
            else:
                found.add(node.meta["val"].dtype if is_cast(node) else own)
        return found.pop() if len(found) == 1 else own

    def narrow(self, value: Any) -> Any:
        """The value without its exact up-cast, where the result is rounded to the narrow type anyway.

        An op that computes inside in float32 then reads and writes the narrow type: nothing is rounded that was not.
        """
        under = unwiden(value)
        if isinstance(under, fx.Node) and under is not value and under.meta["val"].dtype == self.result_dtype():
            return under
        return value


Outcome: TypeAlias = fx.Node | dict[fx.Node, fx.Node] | str


@dataclass(frozen=True)
class Rule:
    """A function from a match to its replacement, with the nodes that it looks at and the patterns that it wants.

    candidates: the sites of a graph. count: how many sites of the model a node counts as. reason: the text for a site
    where no pattern fits.
    """

    function: Callable[[Match], Outcome]
    patterns: tuple[Pattern, ...]
    candidates: Callable[[Subgraph], Iterable[fx.Node]]
    count: Callable[[fx.Node], int]
    reason: Callable[[Match], str]

    @property
    def name(self) -> str:
        return self.function.__name__

    def apply(self, make: Callable[[Bound], Match], root: fx.Node) -> tuple[Match, Outcome]:
        """The outcome at one candidate: the first match that is rewritten, else the reason of the first match."""
        if not self.patterns:
            match = make({})
            return match, self.function(match)
        refused: tuple[Match, Outcome] | None = None
        for bound in itertools.chain.from_iterable(matches(p, root) for p in self.patterns):
            match = make(bound)
            outcome = self.function(match)
            if not isinstance(outcome, str):
                return match, outcome
            refused = refused or (match, outcome)
        match = make({})
        return refused or (match, self.reason(match))


def rewrite(
    pattern: Pattern | Sequence[Pattern] | None = None,
    candidates: Callable[[Subgraph], Iterable[fx.Node]] | None = None,
    count: Callable[[fx.Node], int] | None = None,
    reason: Callable[[Match], str] | None = None,
) -> Callable[[Callable[[Match], Outcome]], Rule]:
    """Makes a rule of a function that gets a Match and returns a node, {old: new}, or the reason why not.

    candidates: which nodes are sites; looser than the pattern, so that a site that stays shows with its reason. count:
    how many sites a node counts as (a fused linear is several). reason: the text for a site where no pattern fits.
    Raises TurbocompileError where there is neither a pattern nor candidates.
    """
    patterns = (pattern,) if isinstance(pattern, Pattern) else tuple(pattern or ())
    roots = tuple(p.target for p in patterns if isinstance(p, Op))

    def by_target(sub: Subgraph) -> Iterable[fx.Node]:
        return [n for n in sub.graph.nodes if is_op(n, *roots)]

    def no_match(match: Match) -> str:
        return "does not have the form " + " or ".join(str(p) for p in patterns)

    if not patterns and candidates is None:
        raise TurbocompileError("a rewrite needs a pattern or candidates, else it has no sites")
    return lambda function: Rule(
        function, patterns, candidates or by_target, count or (lambda node: 1), reason or no_match
    )


@dataclass(frozen=True)
class Pass:
    """A named list of rules.

    kind: "exact" (the same function to rounding), "quantizing" (within a budget) or "semantic" (another function); or a
    function of the pass's options that says which.
    needs: the names of passes, or of what they provide, that run before it. provides: further names that other passes
    may need. before: the names of passes that run after it. They place a third-party pass; where they leave a choice,
    it runs as late as they allow.
    section: the recipe section whose options the pass gets, where that is not its own name.
    quiet: whether the report leaves the pass out where it finds no site.
    """

    name: str
    kind: str | Callable[[Any], str]
    rules: Sequence[Rule]
    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    section: str = ""
    quiet: bool = False
    before: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.kind):
            self._check(self.kind)

    def kind_of(self, options: Any) -> str:
        """The kind under the options."""
        return self._check(self.kind(options)) if callable(self.kind) else self.kind

    def _check(self, kind: str) -> str:
        if kind not in ("exact", "quantizing", "semantic"):
            raise TurbocompileError(f"pass {self.name!r}: kind is exact, quantizing or semantic, not {kind!r}")
        return kind
