"""The tensors that an engine stores: every weight that its Programs read, once, by its stored name."""

from __future__ import annotations

from collections.abc import Mapping

from turbocompile.errors import EngineError
from turbocompile.ir.program import SHELL, Program
from turbocompile.ir.weights import Emission, absolute, emitted_name


def weight_plan(programs: Mapping[str, Program]) -> dict[str, Emission]:
    """Every tensor that the Programs read, once, by its stored name.

    Programs of several shapes share what is equal. Raises EngineError where two would store different values under one
    name.
    """
    plan: dict[str, Emission] = {}
    for program in programs.values():
        for graph, sub in program.graphs.items():
            used = {str(n.target) for n in sub.graph.nodes if n.op == "get_attr"}
            for prefix in program.prefixes(graph):
                for local in sorted(used):
                    expr = sub.weights[local]
                    name = emitted_name(graph == SHELL, graph, local, expr, prefix)
                    known = plan.setdefault(name, Emission(expr, prefix))
                    # a weight that blocks share is one's own and the other's by its full name
                    if known.expr != expr and absolute(known.expr, known.prefix) != absolute(expr, prefix):
                        raise EngineError(
                            f"two shapes of the engine, or blocks that share it, need different values of {name!r}; "
                            "build an engine for each shape, or untie the weights (copy.deepcopy of one)"
                        )
    # A quantized weight's data and scale come from one evaluation when they follow each other.
    return dict(sorted(plan.items(), key=lambda item: item[0]))
