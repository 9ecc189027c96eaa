"""Faults planted in what passes and the normal form make, each of a kind that a wrong rewrite has: `plant`.

A fault is in the new nodes of one site: another operand, another axis or half, a sign, another eps or scale, a missing
bias or gate, a weight of another layer, transposed, or put together in another order. As a script it plants one in each
of many random models and says how many ended in an engine that gives other numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

sys.path.insert(0, str(Path(__file__).parent))
import random_dits

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.arguments import arguments
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import Program, Subgraph, is_op
from turbocompile.ir.weights import RELATIVE, Cat, Expr, Load, Permute
from turbocompile.numerics.errors import compare
from turbocompile.numerics.inputs import random_inputs
from turbocompile.numerics.interpreter import Interpreter
from turbocompile.numerics.program_values import Weights
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Settings
from turbocompile.rewrite import normalize as normal_form
from turbocompile.rewrite import pipeline, run_pass

aten = torch.ops.aten
SEEN = 1e-8  # of the largest value, in float64: what differs by less is no fault


@dataclass
class Fault:
    """One planted fault: where, and what was changed; `what` stays empty until it is planted."""

    seed: int
    pass_name: str
    graph: str = ""
    site: str = ""
    what: str = ""


# --------------------------------------------------------------------------------------------------- changes of a node


def changes(node: fx.Node, sub: Subgraph, layers: int) -> list[tuple[str, Any]]:
    """(what it is, function that does it) for each fault that a node can have."""
    if node.op == "get_attr":
        return [(what, _weight(node, sub, expr)) for what, expr in _weights(sub.weights[str(node.target)], layers)]
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    names = [a.name for a in node.target._schema.arguments]
    given = arguments(node.target, node.args, node.kwargs)
    found: list[tuple[str, Any]] = []

    def changed(what: str, place: int, value: Any) -> None:
        args = [*given]
        args[place] = value
        found.append((f"{node.target._opname}: {what}", lambda: _set(node, args)))

    for i, (name, value) in enumerate(zip(names, given, strict=True)):
        if isinstance(value, bool):
            changed(f"{name} is {not value}", i, not value)
        elif isinstance(value, float) and name == "eps":
            changed("eps is 1e-5 instead of 1e-6, or the other way round", i, value * (0.1 if value > 2e-6 else 10))
        elif isinstance(value, float):
            changed(f"{name} times sqrt(2)", i, value * 2**0.5)
        elif value is None and name == "scale" and is_op(node, aten.scaled_dot_product_attention):
            changed("scale of another head size", i, (2 * node.args[0].meta["val"].shape[-1]) ** -0.5)
        elif isinstance(value, fx.Node):
            _operands(node, name, i, value, given, changed, sub)
        elif isinstance(value, (list, tuple)) and len(value) > 1 and all(isinstance(v, fx.Node) for v in value):
            alike = len({tuple(v.meta["val"].shape) for v in value}) == 1
            changed("parts in another order" if alike else "parts turned round", i, [*value[1:], value[0]])
    if is_op(node, aten.slice.Tensor) and len(node.args) == 4:
        x, dim, start, stop = node.args
        size, width = x.meta["val"].shape[dim], stop - start
        other = start + width if stop + width <= size else start - width
        if other >= 0:
            found.append(("slice: the next part", lambda: _set(node, [x, dim, other, other + width])))
    if is_op(node, aten.permute.default):
        sizes, dims = node.args[0].meta["val"].shape, list(node.args[1])
        for a in range(len(dims)):
            for b in range(a):
                if sizes[dims[a]] == sizes[dims[b]] > 1:
                    swapped = [*dims]
                    swapped[a], swapped[b] = dims[b], dims[a]
                    found.append(("permute: another axis", lambda s=swapped: _set(node, [node.args[0], s])))
    return found


def _operands(node: fx.Node, name: str, i: int, value: fx.Node, given: list[Any], changed: Any, sub: Subgraph) -> None:
    """The faults of one operand: another one of its shape, its sign, or none where it may be missing."""
    meta = value.meta["val"]
    if not isinstance(meta, torch.Tensor) or not meta.is_floating_point():
        return
    alike = [
        n
        for n in sub.graph.nodes
        if n is not value and n is not node and isinstance(n.meta.get("val"), torch.Tensor)
        and tuple(n.meta["val"].shape) == tuple(meta.shape) and n.meta["val"].dtype == meta.dtype and _before(n, node)
    ]  # fmt: skip
    if alike:
        changed(f"another {name}", i, alike[-1])
    if len(alike) > 2:
        changed(f"another {name}", i, alike[len(alike) // 2])
    optional = "Optional" in str(node.target._schema.arguments[i].type)
    if optional:
        changed(f"no {name}", i, None)
    if name in ("shift", "gate", "scale", "bias", "y", "other", "q"):
        with sub.graph.inserting_before(node):
            minus = sub.graph.call_function(aten.neg.default, (value,))
        minus.meta["val"] = meta
        changed(f"the sign of {name}", i, minus)


def _before(one: fx.Node, other: fx.Node) -> bool:
    for node in other.graph.nodes:
        if node is one or node is other:
            return node is one
    return False


def _set(node: fx.Node, args: list[Any]) -> None:
    node.args, node.kwargs = tuple(args), {}


def _weights(expr: Expr, layers: int) -> Iterator[tuple[str, Expr]]:
    """(what it is, expression) of the wrong weights that have the right one's shape."""
    if isinstance(expr, Load) and expr.name.startswith(RELATIVE) and layers > 1:
        for layer in (0, layers - 1):
            yield f"the weight of layer {layer}", replace(expr, name=f"blocks.{layer}.{expr.name.removeprefix('.')}")
    if len(expr.shape) == 2 and expr.shape[0] == expr.shape[1]:
        yield "a transposed weight", Permute(expr, (1, 0))
    if isinstance(expr, Cat):
        if len({part.shape for part in expr.of}) == 1:
            yield "weights in another order", Cat((*expr.of[1:], expr.of[0]), expr.dim)
            yield "one weight twice", Cat((expr.of[0], expr.of[0], *expr.of[2:]), expr.dim)
        for what, part in _weights(expr.of[0], layers):
            yield what, Cat((part, *expr.of[1:]), expr.dim)


def _weight(node: fx.Node, sub: Subgraph, expr: Expr) -> Any:
    return lambda: sub.weights.__setitem__(str(node.target), expr)


# -------------------------------------------------------------------------------------------------------- planting them


@contextlib.contextmanager
def planted(fault: Fault, layers: int) -> Iterator[None]:
    """Plants the fault wherever the pass rewrites its site, while the context lasts."""
    if fault.pass_name == "normalize":
        with _in_normal_form(fault, layers):
            yield
        return
    run = run_pass.run_on_graph

    def wrong(program: Program, graph: str, pass_: Any, options: Any, veto: Any) -> Any:
        before = {n.name for n in program.graphs[graph].graph.nodes}
        found = run(program, graph, pass_, options, veto)
        if pass_.name == fault.pass_name and found.rewrites and fault.graph in ("", graph):
            _plant(fault, program.graphs[graph], graph, found.rewrites, before, layers)
        return found

    with mock.patch.object(run_pass, "run_on_graph", wrong):
        yield


def _plant(fault: Fault, sub: Subgraph, graph: str, rewrites: Any, before: set[str], layers: int) -> None:
    sites = [r for r in rewrites if fault.site in ("", r.site)]
    if not sites:
        return
    rewrite = random.Random(fault.seed).choice(sites)
    named = {n.name: n for n in sub.graph.nodes}
    made: dict[str, fx.Node] = {}
    todo = [named[new] for _, new in rewrite.replaced]
    while todo:  # the new nodes of the site
        node = todo.pop()
        if node.name not in before and node.name not in made:
            made[node.name] = node
            todo += node.all_input_nodes
    _change(fault, sub, [n for n in sub.graph.nodes if n.name in made], layers)
    if fault.what:
        fault.graph, fault.site = graph, rewrite.site


def _change(fault: Fault, sub: Subgraph, nodes: list[fx.Node], layers: int) -> None:
    """Makes the fault in one of the nodes, the same for the same seed and graph."""
    by_kind: dict[str, list[tuple[str, Any]]] = {}
    for node in nodes:
        for what, do in changes(node, sub, layers):
            by_kind.setdefault(what.split(":")[0] if ":" in what else "weight", []).append((what, do))
    rng = random.Random(fault.seed + 1)
    if by_kind:
        fault.what, do = rng.choice(by_kind[rng.choice(sorted(by_kind))])
        do()
        run_pass.sort(sub.graph)


@contextlib.contextmanager
def _in_normal_form(fault: Fault, layers: int) -> Iterator[None]:
    """As a wrong rule of the normal form would leave it."""
    right = normal_form._normalize

    def wrong(sub: Subgraph, program: Program) -> None:
        right(sub, program)
        graph = next(name for name, s in program.graphs.items() if s is sub)
        wanted = fault.graph or random.Random(fault.seed).choice(sorted(program.graphs))
        if graph == wanted:
            nodes = [n for n in sub.graph.nodes if n.op == "call_function"]
            _change(fault, sub, nodes, layers)
            fault.graph = graph

    with mock.patch.object(normal_form, "_normalize", wrong):
        yield


# ------------------------------------------------------------------------------------------------------- judging them


def numbers(program: Program, model: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a Program gives in float64, each call with its own layer's weights."""
    weights = Weights(Evaluator(ModuleTensors(model), program.constants))
    wide = torch.float64

    def run_call(node: fx.Node, args: Any) -> Any:
        name, prefix = args[:2]
        sub = program.graphs[name]
        given = {n.name: v for n, v in zip(sub.inputs(), args[3:], strict=True)}
        values = Interpreter(sub, weights(sub, prefix, wide), wide)(given)
        outputs = tuple(values[n.name] for n in sub.outputs())
        return outputs[0] if len(outputs) == 1 else outputs

    shell = program.shell
    given = {n.name: t.to(wide) if t.is_floating_point() else t for n, t in zip(shell.inputs(), inputs, strict=True)}
    values = Interpreter(shell, weights(shell, "", wide), wide)(given, run_call)
    return [values[n.name] for n in shell.outputs()]


def error_of(program: Program, model: nn.Module, inputs: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest difference, of the largest value; infinity where it cannot be computed."""
    try:
        found = numbers(program, model, inputs)
    except Exception:  # a fault may be of any kind
        return float("inf")
    if [t.shape for t in found] != [t.shape for t in truth]:
        return float("inf")
    return max(compare(a, b).max_rel for a, b in zip(found, truth, strict=True))


@dataclass(frozen=True)
class Verdict:
    """fault, and the engine's error to float64 without verification and with it; what the build said."""

    fault: Fault
    unverified: float
    verified: float
    said: tuple[str, ...]

    @property
    def caught(self) -> bool:
        """Whether the engine has the right numbers, and the build said what it left."""
        return self.verified <= SEEN and bool(self.said)


class Case:
    """A random model, captured, with what it gives in float64."""

    def __init__(self, seed: int, dtype: torch.dtype, **fixed: Any) -> None:
        self.model, (call,) = random_dits.random_dit(seed, dtype, **fixed)
        self.layers = self.model.o.depth
        self.program = capture(self.model, *call)
        self.inputs = random_inputs(self.program, example=[*call[0], *call[1].values()])
        self.truth = numbers(self.program, self.model, self.inputs)

    def passes(self) -> list[str]:
        """The passes that rewrite something of the model, and the normal form."""
        item = random_dits.compile_program(self.program, self.model)
        return ["normalize", *(r.name for r in item.results if r.rewritten)]

    def judge(self, seed: int, pass_name: str) -> Verdict | None:
        """Plants a fault; None where it changes no number, or the pass leaves nothing to plant it in."""
        fault = Fault(seed, pass_name)
        with planted(fault, self.layers):
            wrong = self.program.copy()
            normal_form.normalize(wrong)
            with contextlib.suppress(Exception):
                pipeline.run_passes(wrong, resolve(Settings.from_dict({"target": "cpu"})))
        unverified = error_of(wrong, self.model, self.inputs, self.truth)
        if not fault.what or unverified <= SEEN:
            return None
        with planted(fault, self.layers):
            item = random_dits.compile_program(self.program, self.model)
        verified = error_of(item.programs["call"], self.model, self.inputs, self.truth)
        return Verdict(fault, unverified, verified, tuple(item.warnings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--models", type=int, default=30)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds: Counter[str] = Counter()
    missed = []
    smallest = float("inf")
    each = -(-given.number // given.models)
    for model in range(given.first, given.first + given.models):
        case = Case(model, torch.bfloat16 if model % 2 else torch.float32)
        names, seed, found = case.passes(), 0, 0
        while found < each and seed < 20 * each and sum(kinds.values()) < given.number:
            verdict = case.judge(seed, names[seed % len(names)])
            seed += 1
            if verdict is None:
                continue
            found += 1
            kinds[verdict.fault.pass_name] += 1
            smallest = min(smallest, verdict.unverified)
            if not verdict.caught:
                missed.append(verdict)
                print(f"model {model}: {verdict}\n  {case.model.o}", flush=True)
        print(f"model {model}: {sum(kinds.values())} faults, {len(missed)} missed", flush=True)
    print(f"{sum(kinds.values())} faults ({dict(kinds)}), the smallest of {smallest:.1e}; {len(missed)} missed")


if __name__ == "__main__":
    main()
