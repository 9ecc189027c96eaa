"""The story of a compilation: the passes in order, and the driver that runs one."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import networkx as nx
import torch
from torch import fx

from turbocompile.errors import RecipeError, TurbocompileError, UnsupportedError, brief
from turbocompile.ir.program import Program, Subgraph, drop_unread, module_path
from turbocompile.ir.weights import Cast, is_adapted
from turbocompile.numerics.layers import SiteError
from turbocompile.recipe.options import CompileOptions
from turbocompile.rewrite import lineage
from turbocompile.rewrite.match import Match, Outcome, Pass, is_cast
from turbocompile.rewrite.normalize import clean

aten = torch.ops.aten

# One module of turbocompile.passes each, with its PASS, in the order they run: adapters join the linears beside which
# they run before anyone looks at linears, norms are one op before anyone looks at what multiplies them, rotary before
# gated residuals (x * cos + ... looks like one), attention before what feeds it, and last what takes that in.
PASSES = (
    "lora",
    "norms",
    "rope",
    "sla",
    "attention",
    "fuse_qkv",
    "smooth",
    "w8a8",
    "qk_norm_rope",
    "adaln",
    "residual_norm",
    "gelu_quant",
    "norm_attention",
)


@dataclass(frozen=True)
class Rewrite:
    """A site that was rewritten: for each old node, the new node that gives the same value (both by name)."""

    graph: str
    site: str
    replaced: tuple[tuple[str, str], ...]


@dataclass
class PassResult:
    """What a pass did. Counts are over the whole model: a site in a block that is called n times counts n.

    skipped: (site, reason, count). raw: each rewritten graph before clean-up, with its rewrites by the names there:
    what a verifier measures, since clean-up may take in a site's last node. error and error_output are filled by a
    verifier; error_reason says why they are not. site_errors: of a quantizing pass, site -> (error, budget), those
    that were refused for it included. vetoed: the sites that a verifier refused, or where the pass failed -> why.
    layers: where calibration decided, each site's errors layer by layer instead, and
    inputs says what they were measured on.
    """

    name: str
    kind: str
    sites: int = 0
    rewritten: int = 0
    skipped: list[tuple[str, str, int]] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    seconds: float = 0.0
    raw: dict[str, tuple[Subgraph, list[Rewrite]]] = field(default_factory=dict)
    error: Any = None
    error_output: Any = None
    error_reason: str | None = None
    site_errors: dict[str, tuple[Any, float]] = field(default_factory=dict)
    vetoed: dict[str, str] = field(default_factory=dict)
    layers: tuple[SiteError, ...] = ()
    inputs: str = ""


class Verifier(Protocol):
    """Judges each pass by numbers."""

    def before(self, program: Program, pass_: Pass) -> None:
        """Called before a pass runs (again)."""

    def after(self, program: Program, before: Program, result: PassResult) -> Mapping[str, str]:
        """Records the pass's errors, in `result` if it likes, and returns the sites to leave alone with the reasons."""


class PassFailed(TurbocompileError):
    """A pass raised an error. sites: those that it was at; reason: what it raised, in a few words."""

    def __init__(self, name: str, sites: Sequence[str], error: BaseException) -> None:
        self.sites = tuple(sites)
        self.reason = str(error) if isinstance(error, TurbocompileError) else f"the pass failed here: {brief(error)}"
        super().__init__(f"pass {name!r} failed at {', '.join(sites)}: {self.reason}")


# What a user asked for and cannot have, and a machine that is too small: no fault of a pass at a site.
NOT_OF_A_SITE = (RecipeError, UnsupportedError, torch.OutOfMemoryError, MemoryError)


def load_pass(name: str) -> Pass:
    """The pass of turbocompile/passes/<name>.py."""
    return importlib.import_module(f"turbocompile.passes.{name}").PASS


def ordered(passes: Sequence[Pass], extra: Sequence[Pass] = ()) -> list[Pass]:
    """The passes in their order, with third-party passes placed by what they need and provide.

    An extra pass runs as late as those that need it allow, and after all built-in passes where nobody does.
    """
    everything = [*passes, *extra]
    index = {p.name: i for i, p in enumerate(everything)}
    if len(index) != len(everything):
        names = [p.name for p in everything]
        twice = next(n for n in names if names.count(n) > 1)
        raise TurbocompileError(f"two passes are named {twice!r}; give one of them another name")
    providers: dict[str, list[str]] = {}
    for p in everything:
        for what in (p.name, *p.provides):
            providers.setdefault(what, []).append(p.name)
    order = nx.DiGraph()
    order.add_nodes_from(index)
    order.add_edges_from(zip([p.name for p in passes], [p.name for p in passes][1:], strict=False))
    for p in everything:
        for what in p.needs:
            if what not in providers:
                raise TurbocompileError(f"pass {p.name!r} needs {what!r}, which no pass provides")
            order.add_edges_from((provider, p.name) for provider in providers[what] if provider != p.name)
    try:
        names = list(nx.lexicographical_topological_sort(order, key=index.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(a for a, _ in nx.find_cycle(order))
        raise TurbocompileError(f"the passes need each other in a circle: {cycle}") from None
    return [everything[index[n]] for n in names]


def run_passes(
    program: Program,
    options: CompileOptions,
    verifier: Verifier | None = None,
    passes: Sequence[Pass] | None = None,
    extra: Sequence[Pass] = (),
    vetoes: Mapping[str, Mapping[str, str]] | None = None,
) -> list[PassResult]:
    """Runs all passes on a normalized program, in place.

    options: what each pass does.
    passes: instead of the built-in ones. extra: third-party passes, placed by what they need and provide.
    vetoes: pass name -> sites to leave alone -> why. A site where a pass fails is left alone as well: what it raises
    costs the site, not the build.
    """
    results = []
    lineage.begin(program)
    for pass_ in ordered([load_pass(n) for n in PASSES] if passes is None else passes, extra):
        result = _run_judged(
            program, pass_, options.of(pass_.section or pass_.name), verifier, dict((vetoes or {}).get(pass_.name, {}))
        )
        if (not pass_.section or result.rewrites or result.vetoed) and (not pass_.quiet or result.sites):
            results.append(result)
    for sub in program.graphs.values():
        _store_as_read(sub)
    return results


def _run_judged(
    program: Program, pass_: Pass, options: Any, verifier: Verifier | None, veto: dict[str, str]
) -> PassResult:
    """Runs one pass again and again, each time without the sites that failed or were refused."""
    refused: dict[str, tuple[Any, float]] = {}
    while True:
        before = program.copy()
        if verifier is not None:
            verifier.before(program, pass_)
        try:
            result = run_pass(program, pass_, options, veto)
        except PassFailed as failed:
            bad = dict.fromkeys(failed.sites, failed.reason)
        else:
            bad = dict(verifier.after(program, before, result)) if verifier is not None and result.rewrites else {}
            if not bad:
                break
            refused |= {site: result.site_errors[site] for site in bad if site in result.site_errors}
        if set(bad) <= set(veto):
            raise TurbocompileError(f"pass {pass_.name!r}: sites {sorted(bad)} were vetoed and rewritten again")
        veto = {**bad, **veto}
        program.graphs, program.constants = before.graphs, before.constants
    result.site_errors |= refused
    result.vetoed = veto
    return result


def _store_as_read(sub: Subgraph) -> None:
    """Stores weights with adapters in the type that they are read in: the sum is made in float32, and rounded here."""
    for node in [n for n in sub.graph.nodes if is_cast(n) and n.args[0].op == "get_attr"]:
        source, to = node.args[0], node.meta["val"].dtype
        expr = sub.weights[str(source.target)]
        if is_adapted(expr):
            name = f"{str(source.target).removesuffix('weight')}{str(to).removeprefix('torch.')}_weight"
            sub.weights[name] = Cast(expr, to)
            with sub.graph.inserting_before(source):
                made = sub.graph.create_node("get_attr", name)
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            sub.graph.erase_node(node)
            if not source.users:
                sub.graph.erase_node(source)
    drop_unread(sub)


def run_pass(program: Program, pass_: Pass, options: Any, veto: Mapping[str, str] | None = None) -> PassResult:
    """Runs one pass over all graphs, in place; one that is left as it was captured it does not look at.

    veto: sites to leave alone -> why; the site `everywhere(graph)` is the whole graph. Raises PassFailed where the pass
    raises an error; the program is then half rewritten.
    """
    started = time.perf_counter()
    veto = veto or {}
    result = PassResult(pass_.name, pass_.kind_of(options))
    for graph, sub in program.graphs.items():
        if sub.left:
            continue
        if everywhere(graph) in veto:
            count = program.count(graph)
            result.skipped.append((everywhere(graph), veto[everywhere(graph)], count))
            result.sites += count
            continue
        rewrites = _run_on_graph(program, graph, pass_, options, veto, result)
        if rewrites:
            result.raw[graph] = (sub.copy(), rewrites)
            with _failing(pass_, [r.site for r in rewrites]):
                moved = clean(sub, program.fake_mode)
            result.rewrites += [_followed(r, moved, sub.graph) for r in rewrites]
    result.seconds = time.perf_counter() - started
    return result


def everywhere(graph: str) -> str:
    """The name of all sites of a graph together: where a pass fails before it is at any."""
    return f"{graph}:*"


@contextlib.contextmanager
def _failing(pass_: Pass, sites: Sequence[str]) -> Iterator[None]:
    """Says of an error at which sites of which pass it was raised."""
    try:
        yield
    except (PassFailed, *NOT_OF_A_SITE):
        raise
    except Exception as error:
        raise PassFailed(pass_.name, sites, error) from error


def _run_on_graph(
    program: Program, graph: str, pass_: Pass, options: Any, veto: Mapping[str, str], result: PassResult
) -> list[Rewrite]:
    sub, calls = program.graphs[graph], program.count(graph)
    sites = _Sites(graph)
    done: set[str] = set()
    refused: dict[str, tuple[list[str], int]] = {}
    rewrites: list[Rewrite] = []
    for rule in pass_.rules:
        with _failing(pass_, [everywhere(graph)]):
            roots = list(rule.candidates(sub))
        for root in roots:
            if root._erased:  # an earlier rewrite took it in
                continue
            site = sites.name(root)
            if site in done:
                continue
            count = rule.count(root) * calls
            with _failing(pass_, [site]):
                match, outcome = _attempt(program, graph, site, root, rule, options, veto)
                if isinstance(outcome, str):
                    _undo(match, sub.graph)
                    reasons, _ = refused.setdefault(site, ([], count))
                    reasons += [outcome] if outcome not in reasons else []
                    continue
                done.add(site)
                refused.pop(site, None)
                pairs = outcome.items() if isinstance(outcome, dict) else [(root, outcome)]
                lineage.follow(pass_.name, match.made, pairs)
                rewrites.append(Rewrite(graph, site, tuple(_replace(match, outcome))))
                _erase_dead(sub.graph, [root, *(outcome if isinstance(outcome, dict) else ())])
            result.rewritten += count
    if rewrites:
        with _failing(pass_, [r.site for r in rewrites]):
            sort(sub.graph)
    result.skipped += [(site, "; ".join(reasons), count) for site, (reasons, count) in refused.items()]
    result.sites = result.rewritten + sum(count for _, _, count in result.skipped)
    return rewrites


class _Sites:
    """Names sites by module path: `block:attn1`, `block:attn1#2`. The same graph gives the same names at any shape."""

    def __init__(self, graph: str) -> None:
        self.graph = graph
        self.names: dict[str, str] = {}
        self.seen: dict[str, int] = {}

    def name(self, node: fx.Node) -> str:
        if node.name not in self.names:
            path = module_path(node)
            k = self.seen[path] = self.seen.get(path, 0) + 1
            self.names[node.name] = f"{self.graph}:{path}" + (f"#{k}" if k > 1 else "")
        return self.names[node.name]


def _attempt(
    program: Program,
    graph: str,
    site: str,
    root: fx.Node,
    rule: Any,
    options: Any,
    veto: Mapping[str, str],
) -> tuple[Match, Outcome]:
    made: list[fx.Node] = []  # shared by the attempts at one site, so that what a refused one made is taken away

    def make(bound: dict[str, Any]) -> Match:
        return Match(root, graph, site, program, options, bound, made)

    if not options.enabled:
        return make({}), "switched off in the recipe (enabled: false)"
    if site in veto:
        return make({}), veto[site]
    return rule.apply(make, root)


def _undo(match: Match, graph: fx.Graph) -> None:
    """Takes away what a rule made before it refused."""
    for node in reversed(match.made):
        if not node.users:
            if node.op == "get_attr":
                match.sub.weights.pop(str(node.target), None)
            graph.erase_node(node)


def _replace(match: Match, outcome: fx.Node | dict[fx.Node, fx.Node]) -> Iterable[tuple[str, str]]:
    """Puts the new nodes in the place of the old ones; gives (old name, new name) of equal values."""
    pairs = outcome.items() if isinstance(outcome, dict) else [(match.root, outcome)]
    made = set(match.made)
    for old, new in pairs:
        if old is new:
            continue
        was, now = old.meta["val"], new.meta["val"]
        if not isinstance(was, torch.Tensor) or was.dtype == now.dtype:
            _same_shape(match, old, new)
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)
            yield old.name, new.name
            continue
        # Another dtype: where all users cast to it anyway the casts go, else a cast keeps the old dtype.
        _same_shape(match, old, new)
        users = [u for u in old.users if u not in made]
        if all(is_cast(u) and u.meta["val"].dtype == now.dtype for u in users):
            for user in users:
                user.replace_all_uses_with(new)
                lineage.absorb(new, user)
                _erase_dead(match.sub.graph, [user])
                yield user.name, new.name
        else:
            cast = match.op(aten.to.dtype, new, was.dtype)
            lineage.absorb(cast, new)
            made.add(cast)
            old.replace_all_uses_with(cast, delete_user_cb=lambda user: user not in made)
            yield old.name, cast.name


def _erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erases those of the nodes that nobody reads, and what is read by them alone; weights and inputs stay."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and not node.users and not node._erased:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            stack += inputs


def _same_shape(match: Match, old: fx.Node, new: fx.Node) -> None:
    was, now = old.meta["val"], new.meta["val"]
    if isinstance(was, torch.Tensor) and tuple(was.shape) != tuple(now.shape):
        raise TurbocompileError(
            f"{match.site}: the rewrite of {old.name} ({old.target}) has shape {tuple(now.shape)} "
            f"instead of {tuple(was.shape)}; the pass that made it is wrong"
        )


def _followed(rewrite: Rewrite, moved: Mapping[str, str], graph: fx.Graph) -> Rewrite:
    """The rewrite with its new nodes by the names that they have after clean-up; those that are gone are left out."""
    alive = {n.name for n in graph.nodes}
    pairs = []
    for old, new in rewrite.replaced:
        while new not in alive and new in moved:
            new = moved[new]
        if new in alive:
            pairs.append((old, new))
    return Rewrite(rewrite.graph, rewrite.site, tuple(pairs))


def sort(graph: fx.Graph) -> None:
    """Puts the nodes in an order in which each follows its inputs, changing the order as little as that needs."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    if all(place[a] < i for n, i in place.items() for a in n.all_input_nodes):
        return
    order = nx.DiGraph()
    order.add_nodes_from(place)
    order.add_edges_from((a, n) for n in place for a in n.all_input_nodes)
    last = None
    for node in nx.lexicographical_topological_sort(order, key=place.__getitem__):
        if last is not None:
            last.append(node)
        last = node
