"""Collects a report from the results of the passes and the Programs that the passes made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from turbocompile.ir.cost import cost
from turbocompile.ir.memory import activation_bytes, parameters_by_dtype
from turbocompile.ir.program import Program
from turbocompile.ir.site_errors import SiteError, finite
from turbocompile.report.attentions import attention_sites, with_times
from turbocompile.report.report import Report
from turbocompile.report.rows import PassReport, ShapeReport, Skip
from turbocompile.rewrite.results import PassResult

NO_ERROR = "not measured"


def pass_report(result: PassResult, unmeasured: str = NO_ERROR) -> PassReport:
    """The row of one pass. unmeasured: why there is no error, if `result` gives no reason itself."""
    error, output = finite(result.error), finite(result.error_output)
    reason = result.error_reason
    if reason is None and (error is None or output is None):
        lost = (result.error is not None and error is None) or (result.error_output is not None and output is None)
        if lost:
            reason = "the error is no finite number: the rewritten graph overflows, or the true values are all zero"
        else:
            reason = unmeasured if result.rewritten else "nothing was rewritten"
    skipped = tuple(Skip(*s) for s in result.skipped)
    measured = ((site, finite(error), budget) for site, (error, budget) in result.site_errors.items())
    errors = sorted(
        (SiteError(site, error, budget) for site, error, budget in measured if error is not None),
        key=lambda e: -e.error["rel_l1"] / e.budget if e.budget else -math.inf,
    )
    rows = result.layers or tuple(errors)
    counts = (result.kind, result.sites, result.rewritten)
    return PassReport(*counts, skipped, error, output, reason, result.seconds, rows, result.inputs)


def shape_report(name: str, program: Program) -> ShapeReport:
    whole = cost(program)
    inputs = {i.path: tuple(i.shape) for i in program.signature.inputs}
    return ShapeReport(name, inputs, whole.flops, whole.bytes, whole.activations)


def collect(
    results: Sequence[PassResult],
    programs: Program | Mapping[str, Program],
    *,
    unmeasured: str = NO_ERROR,
    times: Mapping[str, float] | None = None,
    **fields: Any,
) -> Report:
    """The report of one module. programs: the rewritten Program, or several Programs by the names of their shapes.

    unmeasured: why the passes have no errors, if the build verified nothing. times: measured seconds of one run of each
    attention, by site. fields: further fields of the Report.
    """
    named = programs if isinstance(programs, Mapping) else {"default": programs}
    first = next(iter(named.values()))
    return Report(
        passes={r.name: pass_report(r, unmeasured) for r in results},
        ops=cost(first).ops,
        attention=with_times(attention_sites(first, results), times or {}),
        shapes=tuple(shape_report(name, p) for name, p in named.items()),
        parameters=parameters_by_dtype(named.values()),
        activation_bytes=max(activation_bytes(p) for p in named.values()),
        **fields,
    )
