"""Calibration measures the error of each 8-bit linear in each layer, and decides which layers keep the model's dtype.

The graph of a block stands for many layers, and each layer has its own weights and its own input. The truth is the
graph before w8a8 in float32, because errors of 1 to 4% are judged. It is run layer by layer, with the weights of one
layer in memory. The 8-bit linear of each site is computed from the true input, in the dtypes of the engine, and
compared with the true product. A site over its budget keeps the model's dtype in that layer alone; layers that keep the
same sites share a graph.
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
    """Measures a Program in normal form, which is left as it was, and decides.

    source: the weights. options: as `resolve` gives them. inputs: the calls to measure on. device: where the Program is
    run. Raises Uncomputed where the Program cannot be computed on the inputs.
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
    """The Program as the pass `smooth` finds it, but with attention in floating point, because the error of a quantized
    attention is judged by itself.
    """
    made = program.copy()
    run_passes(made, options.in_floating_point(), passes=story("smooth")[:-1])
    return made
