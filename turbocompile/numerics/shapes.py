"""Whether a rewritten Program still has the shapes and dtypes of the captured one: what `verify: shapes` checks."""

from __future__ import annotations

import operator

import torch

from turbocompile.ir.program import Program, call, infer, walk_tensors

Spec = list[tuple[tuple[int, ...], torch.dtype]]


def _specs(value: object) -> Spec:
    return [(tuple(t.shape), t.dtype) for t in walk_tensors(value)]


def wrong_shapes(program: Program, captured: Program) -> str:
    """In words, the first node that gives another shape or dtype than it is noted with, or the first output of the
    shell that has another than the captured one; "" where there is none. No number is computed.
    """
    for name, sub in program.graphs.items():
        for node in sub.graph.nodes:
            if node.op != "call_function" or node.target in (call, operator.getitem):
                continue
            found = _specs(infer(node.target, node.args, dict(node.kwargs), program.fake_mode))
            if found != _specs(node.meta["val"]):
                return f"the node {node.name} of {name} gives {found}, and is noted with {_specs(node.meta['val'])}"
    outputs = [_specs([n.meta["val"] for n in p.shell.outputs()]) for p in (program, captured)]
    return "" if outputs[0] == outputs[1] else f"the outputs are {outputs[0]}, and were {outputs[1]}"
