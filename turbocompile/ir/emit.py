"""The plan of the tensors that an engine stores: every weight that its Programs read, once, by its stored name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turbocompile.errors import EngineError
from turbocompile.ir.inverse import factors
from turbocompile.ir.program import Program
from turbocompile.ir.stored_names import stored_weights
from turbocompile.ir.weights import Expr, Load, absolute, leaves


@dataclass(frozen=True)
class Emission:
    """One tensor to write: its expression, and the prefix that the relative names in the expression take."""

    expr: Expr
    prefix: str


def factor_plan(programs: Mapping[str, Program]) -> dict[str, Emission]:
    """The checkpoint's vectors that weights were multiplied by, by their full names.

    No graph reads them. An engine stores them, because they say what a scaled weight was before (adapters that are
    added to an engine's weights need it).
    """
    plan: dict[str, Emission] = {}
    for program in programs.values():
        for weight in stored_weights(program):
            for factor in factors(absolute(weight.expr, weight.prefix)):
                plan |= {leaf.name: Emission(leaf, "") for leaf in leaves(factor) if isinstance(leaf, Load)}
    return plan


def weight_plan(programs: Mapping[str, Program]) -> dict[str, Emission]:
    """Every tensor that the Programs read, once, by its stored name, in the order of the names.

    Programs of several shapes share what is equal. Raises EngineError where two would store different values under one
    name.
    """
    plan: dict[str, Emission] = {}
    for program in programs.values():
        for weight in stored_weights(program):
            known = plan.setdefault(weight.name, Emission(weight.expr, weight.prefix))
            # a weight that blocks share is relative to one block and has its full name in the other
            same = known.expr == weight.expr
            if not same and absolute(known.expr, known.prefix) != absolute(weight.expr, weight.prefix):
                raise EngineError(
                    f"two shapes of the engine, or blocks that share it, need different values of {weight.name!r}; "
                    "build an engine for each shape, or untie the weights (copy.deepcopy of one)"
                )
    # A quantized weight's data and scale come from one evaluation when they follow each other.
    return dict(sorted(plan.items(), key=lambda item: item[0]))
