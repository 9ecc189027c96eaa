"""Calibration: what 8 bits do to each linear in each layer, and which layers keep the model's dtype for it.

A block's graph stands for many layers, each with its own weights and its own, true, input. The truth is the graph
before w8a8 in float32 (errors of 1 to 4% are judged), run layer by layer with one layer's weights in memory; at each
site the 8-bit linear is computed from the true input, in the dtypes of the engine, and compared. A site over its budget
stays wide in that layer only: layers that keep the same sites share a graph.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from turbocompile.ir.evaluate import TensorSource, WithVectors
from turbocompile.ir.program import Program
from turbocompile.numerics.inputs import Inputs
from turbocompile.numerics.interpreter import CPU
from turbocompile.numerics.linear_errors import Smoothing, find_groups, find_linears, measure
from turbocompile.numerics.plan import Measured, Plan, decide, with_smoothing
from turbocompile.numerics.smoothing import NO_HELP
from turbocompile.recipe.options import CompileOptions
from turbocompile.rewrite.pipeline import load_pass, run_passes, story
from turbocompile.rewrite.run_pass import run_pass


def calibrate(
    program: Program,
    source: TensorSource,
    options: CompileOptions,
    inputs: Inputs,
    device: torch.device = CPU,
) -> Plan:
    """Measures a normalized Program, which is left as it was.

    options: as they were resolved. inputs: tensors that the Program takes. device: where to compute.
    """
    prepared = before_smooth(program, options)
    w8a8 = options.w8a8
    linears = find_linears(prepared, w8a8)
    if not linears:
        return Plan(str(inputs))
    budgets = {s.site: w8a8.budget({s.format}) for s in linears}
    alphas = w8a8.alphas if inputs.recorded else ()
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
        run_pass(prepared, load_pass("smooth"), replace(w8a8, smoothed=sites))
        after = find_linears(prepared, w8a8)
        found.errors, _ = measure(prepared, WithVectors(source, vectors), after, inputs, device)
    plan = decide(prepared, linears, found, str(inputs))
    return with_smoothing(plan, prepared, [g.site for g in smoothed], reasons, vectors)


def before_smooth(program: Program, options: CompileOptions) -> Program:
    """The Program as smooth finds it, but with attention in floating point: its quantization is judged by itself."""
    made = program.copy()
    run_passes(made, options.in_floating_point(), passes=story("smooth")[:-1])
    return made
