"""A normal form that is another function than the captured graph, or rounds more, is found in its graph."""

from __future__ import annotations

import pytest
import torch
from products import Model, made, products
from torch import nn

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import is_op
from turbocompile.numerics.errors import compare
from turbocompile.numerics.inputs import random_inputs
from turbocompile.numerics.interpreter import Interpreter
from turbocompile.numerics.normal_forms import wrong_forms
from turbocompile.numerics.program_values import Weights
from turbocompile.numerics.verifier import Verifier
from turbocompile.rewrite.normalize import normalize

aten = torch.ops.aten


@pytest.fixture
def case():
    return made()


def wrong(model, raw, program, verifier):
    """The graphs whose normal form is wrong."""
    return wrong_forms(raw, program, Weights(Evaluator(ModuleTensors(model), program.constants)), verifier.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_normal_form_agrees_with_what_was_captured(dtype):
    model, program, raw, verifier = made(dtype)
    assert wrong(model, raw, program, verifier) == {}


def test_a_wrong_normal_form_is_found_in_its_graph_alone(case):
    model, program, raw, verifier = case
    node = products(raw.graphs["blocks"])[0]
    node.args = (node.args[0], node.args[0])
    ((graph, reason),) = wrong(model, raw, program, verifier).items()
    assert graph == "blocks"
    assert "is another function: in float64 the largest difference is" in reason


def test_a_wrong_value_that_the_shell_hands_to_a_block_is_found():
    class Outer(Model):
        def forward(self, x):
            return super().forward(x.tanh())

    torch.manual_seed(0)
    model = Outer().eval()
    program = capture(model, (torch.randn(2, 12, 64),))
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Weights(Evaluator(ModuleTensors(model), program.constants)))
    next(n for n in raw.shell.graph.nodes if is_op(n, aten.tanh)).target = aten.sin.default
    assert list(wrong(model, raw, program, verifier)) == ["shell"]


def test_a_shell_that_reads_another_call_of_a_block_is_found(case):
    """Of the blocks one alone is computed for all, and still each gives something of its own."""
    model, program, raw, verifier = case
    first, last = raw.calls()
    output = raw.shell.output()
    output.args = ((first.node,),)
    assert last.node.name != first.node.name
    assert list(wrong(model, raw, program, verifier)) == ["shell"]


class Clock(nn.Module):
    """Sines of a timestep in bfloat16, where 999 is 1000: radians off what float64 gives, as the model itself is."""

    def forward(self, x):
        t = x[:, :1, 0].abs() * 1000
        return x * (t * torch.arange(1, 33, dtype=x.dtype) / 32).sin().repeat(1, 2)[:, None]


@pytest.mark.parametrize("cosine", [False, True])
def test_what_a_16_bit_model_rounds_itself_is_no_wrong_normal_form(cosine):
    model, inputs = Clock().bfloat16(), (torch.randn(2, 12, 64).bfloat16(),)
    program = capture(model, inputs)
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Weights(Evaluator(ModuleTensors(model), program.constants)))
    truth = verifier.outputs["shell"][0]
    assert compare(run_raw(raw, verifier), truth).rel_l1 > 0.05  # the model's own rounding
    if cosine:
        node = next(n for n in raw.shell.graph.nodes if is_op(n, aten.sin.default))
        node.target = aten.cos.default
    assert list(wrong(model, raw, program, verifier)) == (["shell"] if cosine else [])


def run_raw(raw, verifier):
    """The output of a captured shell, in its own types."""
    values = Interpreter(raw.shell, lambda node: None, None)({"input_0": verifier.inputs[0]})
    return values[raw.shell.outputs()[0].name]


def test_an_eps_that_is_not_named_is_that_of_the_models_type():
    """Of an RMSNorm in 16 bits it is float32's, in float64 another: the truth has the model's."""

    class Norm(nn.Module):
        def forward(self, x):
            return nn.functional.rms_norm(x * 1e-3, (64,)) * 2

    for dtype in (torch.float32, torch.bfloat16):
        program = capture(Norm(), (torch.randn(2, 12, 64, dtype=dtype),))
        raw = program.copy()
        normalize(program)
        (norm,) = (n for n in program.shell.graph.nodes if is_op(n, aten.rms_norm))
        assert norm.args[3] == torch.finfo(torch.float32).eps
        inputs = random_inputs(program)
        weights = Weights(Evaluator(ModuleTensors(Norm()), program.constants))
        assert wrong_forms(raw, program, weights, inputs) == {}
