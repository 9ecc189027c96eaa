from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn
from turbocompile.passes import adaln

import turbocompile
from turbocompile.capture.export import capture
from turbocompile.errors import VerificationError
from turbocompile.ir.program import is_op
from turbocompile.numerics.shapes import wrong_shapes
from turbocompile.rewrite import pipeline

aten = torch.ops.aten


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture
def program():
    return capture(Feed(), (torch.randn(2, 8),))


def test_a_program_has_the_shapes_that_it_is_noted_with(program):
    assert wrong_shapes(program.copy(), program) == ""


def test_a_node_of_another_dtype_is_named(program):
    made = program.copy()
    node = next(n for n in made.shell.graph.nodes if is_op(n, aten.relu))
    node.meta["val"] = node.meta["val"].double()
    assert wrong_shapes(made, program).startswith(f"the node {node.name} of shell gives [((2, 32), torch.float32)]")


def test_an_output_of_another_shape_is_named(program):
    made = program.copy()
    output = next(n for n in made.shell.graph.nodes if n.op == "output")
    output.args = ((next(n for n in made.shell.graph.nodes if is_op(n, aten.relu)),),)
    assert (
        wrong_shapes(made, program) == "the outputs are [((2, 32), torch.float32)], and were [((2, 8), torch.float32)]"
    )


def test_verify_shapes_computes_no_number_and_refuses_a_pass_that_changes_a_dtype(monkeypatch):
    style = zoo.Style()
    model, args = zoo.build(style), zoo.example(style)
    report = turbocompile.optimize(model, args, recipe={"verify": "shapes"}).report
    assert report.passes["adaln"].rewritten > 0
    assert {p.error for p in report.passes.values()} == {None}
    assert report.compared == ""
    rule = adaln.PASS.rules[0]

    def spoiled(m):
        made = rule.function(m)
        if not isinstance(made, str):
            made.meta["val"] = made.meta["val"].double()
        return made

    broken, load = replace(adaln.PASS, rules=[replace(rule, function=spoiled)]), pipeline.load_pass
    monkeypatch.setattr(pipeline, "load_pass", lambda name: broken if name == "adaln" else load(name))
    with pytest.raises(VerificationError, match="is noted with"):
        turbocompile.optimize(model, args, recipe={"verify": "shapes"})
