"""Programs that read a checkpoint's quantized weights as they are stored, and the error of weights quantized anew.

    Load(w)   ->   Dequantize(Load(w.qdata), Load(w.scale), format)

Both are the same numbers. Behind the second one a pass that quantizes in this format finds the data and the scale, and
the engine stores these bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from turbocompile.capture.module_weights import DATA, SCALE
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import SHELL, Program
from turbocompile.ir.weights import Dequantize, Load, Quantize, full_name, leaves
from turbocompile.kernels.quantize.quantize import BLOCK, FORMATS, dequantize
from turbocompile.wan.scaled import Stored

MEASURED = 12  # weights whose second error is measured: those of one layer


def parts_of(stored: Mapping[str, Stored]) -> list[str]:
    """The names of the data and scales of the weights that a kernel takes as they are stored."""
    return [name + part for name, s in stored.items() if s.format is not None for part in (DATA, SCALE)]


def with_stored(program: Program, stored: Mapping[str, Stored]) -> Program:
    """A Program with stored weights, or the given one where there are none. stored: of the checkpoint, by name."""
    formats = {n: s.format for n, s in stored.items() if s.format is not None}
    if not formats:
        return program
    made = program.copy()
    for graph in [g for g in made.graphs if g != SHELL]:
        _part(made, graph, formats)
    for graph, sub in made.graphs.items():
        first = next(iter(made.prefixes(graph)), "")
        for name, expr in sub.weights.items():
            format = formats.get(full_name(expr.name, first)) if isinstance(expr, Load) else None
            if isinstance(expr, Load) and format is not None:
                sub.weights[name] = _dequantize(expr, format)
    return made


def _kinds(program: Program, graph: str, formats: Mapping[str, str]) -> dict[str, tuple[str | None, ...]]:
    """The formats of a graph's weights, by the prefix of each call."""
    loads = [expr.name for expr in program.graphs[graph].weights.values() if isinstance(expr, Load)]
    return {p: tuple(formats.get(full_name(name, p)) for name in loads) for p in program.prefixes(graph)}


def _part(program: Program, graph: str, formats: Mapping[str, str]) -> None:
    """Gives layers whose weights are stored in different formats graphs of their own, in place."""
    kinds = _kinds(program, graph, formats)
    called: dict[tuple[str | None, ...], str] = {}
    for kind in kinds.values():
        if kind not in called:
            free = (f"{graph}_{i}" for i in range(1, len(program.graphs) + len(called) + 2))
            taken = {*program.graphs, *called.values()}
            called[kind] = graph if not called else next(name for name in free if name not in taken)
    if len(called) > 1:
        program.split(graph, {prefix: called[kind] for prefix, kind in kinds.items()})


def _dequantize(expr: Load, format: str) -> Dequantize:
    rows, columns = expr.shape
    scale = (-(-rows // BLOCK), -(-columns // BLOCK)) if format == "int8_block" else (rows, 1)
    data = Load(expr.name + DATA, expr.shape, FORMATS[format])
    return Dequantize(data, Load(expr.name + SCALE, scale, torch.float32), format, expr.dtype)


def second_errors(program: Program, stored: Mapping[str, Stored], evaluate: Evaluator) -> str | None:
    """A sentence about the weights that the checkpoint stores in one format and the Program in another: how far the
    second rounding moves the weights of the first layer. None where there are no such weights.
    """
    found: dict[str, tuple[float, str]] = {}  # stored weight -> relative L1, both formats
    count = 0
    for graph, sub in program.graphs.items():
        prefixes = program.prefixes(graph)
        for expr in sub.weights.values():
            if not (isinstance(expr, Quantize) and expr.part == "data"):
                continue
            loads = [leaf.name for leaf in leaves(expr) if isinstance(leaf, Load)]
            held = [full_name(name, prefix).removesuffix(DATA) for name in loads for prefix in prefixes]
            again = [name for name in held if name in stored]
            count += len(again)
            if again and len(found) < MEASURED:
                words = f"{stored[again[0]].words} to {expr.format}"
                found[again[0]] = (_second_error(expr, prefixes[0], evaluate), words)
    if not found:
        return None
    name = max(found, key=lambda n: found[n][0])
    error, words = found[name]
    return (
        f"{count} weights of linears that the checkpoint holds quantized are quantized anew ({words}): the second "
        f"rounding moves the weights by up to {error:.2g} (relative L1, {name})"
    )


def _second_error(expr: Quantize, prefix: str, evaluate: Evaluator) -> float:
    """sum|again - before| / sum|before| of a weight."""
    before = evaluate(expr.of, prefix).float()
    scale = Quantize(expr.of, expr.format, "scale")
    again = dequantize(evaluate(expr, prefix), evaluate(scale, prefix), expr.format, torch.float32)
    return float((again - before).abs().sum() / before.abs().sum().clamp(min=1e-30))
