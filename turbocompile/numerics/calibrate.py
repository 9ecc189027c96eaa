"""Calibration: what 8 bits do to each linear in each layer, and which layers keep the model's dtype for it.

A block's graph stands for many layers, each with its own weights and its own, true, input. The truth is the graph
before w8a8 in float32 (errors of 1 to 4% are judged), run layer by layer with one layer's weights in memory; at each
site the 8-bit linear is computed from the true input, in the dtypes of the engine, and compared. A site over its budget
stays wide in that layer only: layers that keep the same sites share a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turbocompile.ir.program import Program
from turbocompile.ir.weights import TensorSource, WithVectors
from turbocompile.numerics.errors import budget_of
from turbocompile.numerics.inputs import Inputs
from turbocompile.numerics.interpreter import CPU
from turbocompile.numerics.linear_errors import Smoothing, find_groups, find_linears, measure
from turbocompile.numerics.plan import Measured, Plan, decide, with_smoothing
from turbocompile.numerics.smoothing import NO_HELP, alphas_of
from turbocompile.rewrite.pipeline import PASSES, load_pass, run_pass, run_passes


def calibrate(
    program: Program,
    source: TensorSource,
    options: Mapping[str, Mapping[str, Any]],
    target: str,
    inputs: Inputs,
    device: torch.device = CPU,
) -> Plan:
    """Measures a normalized Program, which is left as it was.

    options: as for `run_passes`. inputs: tensors that the Program takes. device: where to compute.
    """
    prepared = before_smooth(program, options, target)
    w8a8 = options.get("w8a8", {})
    linears = find_linears(prepared, w8a8, target)
    if not linears:
        return Plan(str(inputs))
    budgets = {s.site: budget_of(w8a8, {s.format}) for s in linears}
    alphas = alphas_of(w8a8.get("smooth", "off")) if inputs.recorded else ()
    groups, reasons = find_groups(prepared, linears) if alphas else ([], {})
    plain, scales = measure(prepared, source, linears, inputs, device, Smoothing(groups, alphas, budgets))
    smoothed = [g for g in groups if any(s.alpha is not None for s in scales[g.site].values())]
    reasons |= {s.site: NO_HELP for g in groups if g not in smoothed for s in g.linears}
    found = Measured(plain, budgets, reasons)
    vectors: dict[str, torch.Tensor] = {}
    if smoothed:
        for group in smoothed:
            for prefix, scale in scales[group.site].items():
                vectors |= group.vectors(prefix, scale.s)
                found.alphas |= {(s.site, prefix): scale.alpha for s in group.linears if scale.alpha is not None}
        sites = frozenset(g.site for g in smoothed)
        run_pass(prepared, load_pass("smooth"), {**w8a8, "target": target, "smoothed": sites})
        after = find_linears(prepared, w8a8, target)
        found.errors, _ = measure(prepared, WithVectors(source, vectors), after, inputs, device)
    plan = decide(prepared, linears, found, str(inputs))
    return with_smoothing(plan, prepared, [g.site for g in smoothed], reasons, vectors)


def before_smooth(program: Program, options: Mapping[str, Mapping[str, Any]], target: str) -> Program:
    """The Program as smooth finds it, but with attention in floating point: its quantization is judged by itself."""
    made = program.copy()
    attention = dict(options.get("attention", {}))
    attention |= {"pv": "none", "kind": "native" if attention.get("kind") == "sage" else attention.get("kind", "auto")}
    passes = [load_pass(name) for name in PASSES[: PASSES.index("smooth")]]
    run_passes(made, {**options, "attention": attention}, target, passes=passes)
    return made
