"""The story of a compilation: the passes in order, each judged by its numbers."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx

from turbocompile.errors import TurbocompileError
from turbocompile.ir.allowed_ops import ALLOWED
from turbocompile.ir.program import Program, Subgraph, drop_unread
from turbocompile.ir.weights import Cast, is_adapted
from turbocompile.recipe.options import CompileOptions
from turbocompile.rewrite import lineage
from turbocompile.rewrite.facts import facts
from turbocompile.rewrite.match import Pass, is_cast
from turbocompile.rewrite.results import Judge, Judgement, PassResult
from turbocompile.rewrite.run_pass import PassFailed, run_pass

# The built-in passes, in the order in which they run. Each is a module of turbocompile.passes with a PASS. lora runs
# first, because it adds adapters to their linears, which later passes count. norms makes each norm one operator before
# a pass looks for the products that modulate it. rope runs before residual_norm, because x * cos + y * sin looks like a
# gated residual. sla and attention run before the passes that rewrite q, k and v. The passes that merge a quantize into
# the operator before it run last, because w8a8 and attention make the quantizes.
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


def load_pass(name: str) -> Pass:
    """The pass of turbocompile/passes/<name>.py."""
    return importlib.import_module(f"turbocompile.passes.{name}").PASS


# ------------------------------------------------------------------------------------------------- third-party passes

ENTRY_POINTS = "turbocompile.passes"  # the group in which an installed package names its passes
_registered: dict[str, Pass] = {}


def register(pass_: Pass) -> Pass:
    """Adds a third-party pass to every compilation of this process from here on; returns the pass.

    The pass runs where its `needs`, `provides` and `before` place it (`ordered`), is verified as the built-in passes
    are, and has its row in the report. A pass of the same name that was registered before is replaced. Raises
    TurbocompileError for the name of a built-in pass.
    """
    if pass_.name in PASSES:
        raise TurbocompileError(f"there is a built-in pass {pass_.name!r}; give yours another name")
    _registered[pass_.name] = pass_
    return pass_


def unregister(name: str) -> None:
    """Takes a registered pass out of the compilations that follow. Raises TurbocompileError where none has the name."""
    if name not in _registered:
        raise TurbocompileError(f"no pass {name!r} is registered; those that are: {sorted(_registered) or 'none'}")
    del _registered[name]


def third_party() -> list[Pass]:
    """The passes of installed packages (entry points of the group `turbocompile.passes`), then the registered passes.

    Raises TurbocompileError where an installed package names something else than a Pass.
    """
    return list((_installed() | _registered).values())


@functools.cache
def _installed() -> dict[str, Pass]:
    """The passes of installed packages by name; looked for once, because that reads the metadata of all packages."""
    found: dict[str, Pass] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            made = entry.load()
        except Exception as error:
            raise TurbocompileError(f"the installed pass {entry.value!r} cannot be imported: {error}") from error
        if not isinstance(made, Pass):
            raise TurbocompileError(f"the installed pass {entry.value!r} is a {type(made).__name__}, and no Pass")
        found[made.name] = made
    return found


def foreign_operators(program: Program) -> set[str]:
    """The operators that passes made and that no engine folder may hold; the engine runs in this process alone."""
    nodes = [n for sub in program.graphs.values() for n in sub.graph.nodes if n.op == "call_function"]
    return {str(n.target) for n in nodes if facts(n).passes and n.target not in ALLOWED.values()}


def story(last: str | None = None) -> list[Pass]:
    """All passes in the order in which they run, third-party passes in their places; up to and with the pass `last`."""
    passes = ordered([load_pass(name) for name in PASSES], third_party())
    names = [p.name for p in passes]
    return passes if last is None else passes[: names.index(last) + 1]


def ordered(passes: Sequence[Pass], extra: Sequence[Pass] = ()) -> list[Pass]:
    """The passes in their order, with third-party passes where their `needs`, `provides` and `before` place them.

    An extra pass runs as late as the passes that it is before, or that need it, allow; after all built-in passes where
    there are none. Raises TurbocompileError where two passes have one name, a need is not provided, or no order is
    possible.
    """
    everything = [*passes, *extra]
    index = {p.name: i for i, p in enumerate(everything)}
    if len(index) != len(everything):
        names = [p.name for p in everything]
        twice = next(n for n in names if names.count(n) > 1)
        raise TurbocompileError(f"two passes are named {twice!r}; give one of them another name")
    order = nx.DiGraph()
    order.add_nodes_from(index)
    order.add_edges_from(zip([p.name for p in passes], [p.name for p in passes][1:], strict=False))
    order.add_edges_from(_needed(everything))
    order.add_edges_from((p.name, later) for p in everything for later in p.before if later in index)
    try:
        names = list(nx.lexicographical_topological_sort(order, key=index.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(a for a, _ in nx.find_cycle(order))
        raise TurbocompileError(f"the passes need each other in a circle: {cycle}") from None
    return [everything[index[n]] for n in names]


def _needed(passes: Sequence[Pass]) -> Iterator[tuple[str, str]]:
    """(provider, pass that needs it), by name."""
    providers: dict[str, list[str]] = {}
    for p in passes:
        for provided in (p.name, *p.provides):
            providers.setdefault(provided, []).append(p.name)
    for p in passes:
        for need in p.needs:
            if need not in providers:
                raise TurbocompileError(f"pass {p.name!r} needs {need!r}, which no pass provides")
            yield from ((provider, p.name) for provider in providers[need] if provider != p.name)


# ------------------------------------------------------------------------------------------------------------ running


def run_passes(
    program: Program,
    options: CompileOptions,
    judge: Judge | None = None,
    passes: Sequence[Pass] | None = None,
    vetoes: Mapping[str, Mapping[str, str]] | None = None,
) -> list[PassResult]:
    """Runs passes on a normalized program, in place, and returns the result of each that has sites or is never quiet.

    options: what each pass does. judge: measures each pass that rewrote something. passes: instead of the whole story.
    vetoes: pass name -> sites to leave alone -> why. A site where a pass raises an error is left alone as well, so that
    the error costs the site and not the build. Raises RecipeError and UnsupportedError as the passes do.
    """
    results = []
    lineage.begin(program)
    before = program.copy()
    for pass_ in story() if passes is None else passes:
        veto = dict((vetoes or {}).get(pass_.name, {}))
        result = _run_judged(program, before, pass_, options.of(pass_.section or pass_.name), judge, veto)
        if result.rewrites:
            before = program.copy()
        if result.sites or not pass_.quiet:
            results.append(result)
    for sub in program.graphs.values():
        _store_as_read(sub)
    return results


def _run_judged(
    program: Program,
    before: Program,
    pass_: Pass,
    options: Any,
    judge: Judge | None,
    veto: dict[str, str],
) -> PassResult:
    """Runs one pass again and again, each time without the sites that failed or were refused.

    before: a copy of the program, which stays as it is.
    """
    refused: dict[str, tuple[Any, float]] = {}
    while True:
        judgement = Judgement()
        try:
            result = run_pass(program, pass_, options, veto)
        except PassFailed as failed:
            bad: Mapping[str, str] = dict.fromkeys(failed.sites, failed.reason)
        else:
            if judge is not None and result.rewrites:
                judgement = judge.after(program, before, result)
            bad = judgement.refused
            if not bad:
                break
            errors = judgement.verdict.site_errors
            refused |= {site: errors[site] for site in bad if site in errors}
        if set(bad) <= set(veto):
            raise TurbocompileError(f"pass {pass_.name!r}: sites {sorted(bad)} were vetoed and rewritten again")
        veto = {**bad, **veto}
        start = before.copy()
        program.graphs, program.constants = start.graphs, start.constants
    verdict = replace(judgement.verdict, site_errors={**judgement.verdict.site_errors, **refused})
    return replace(result, vetoed=veto, verdict=verdict)


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
