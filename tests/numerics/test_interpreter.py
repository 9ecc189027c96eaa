"""One graph, node by node: in a wider dtype, with values freed after their last reader; refusals are told apart."""

from __future__ import annotations

import weakref

import pytest
import torch
from products import made
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from turbocompile.capture.export import capture
from turbocompile.numerics.errors import compare
from turbocompile.numerics.inputs import random_inputs
from turbocompile.numerics.interpreter import Interpreter, Uncomputed
from turbocompile.numerics.program_values import Weights, run_widest

aten = torch.ops.aten


def test_truth_is_more_exact_than_float32():
    model, program, _, verifier = made()
    wide = Interpreter(program.graphs["blocks"], verifier._weight(program, "blocks"), torch.float64)
    inputs = verifier.inputs[0].double()
    found = wide({program.graphs["blocks"].inputs()[0].name: inputs})
    with torch.no_grad():
        expected = model.double().blocks[0](inputs)
    (output,) = program.graphs["blocks"].outputs()
    assert compare(found[output.name], expected).max_rel < 1e-14


class Chain(nn.Module):
    """A chain of operators, of which each reads the one before."""

    def forward(self, x):
        for _ in range(20):
            x = (x + 1).sin()
        return x


class Alive(TorchDispatchMode):
    """Counts the tensors that operators made and that are alive, at most."""

    def __init__(self):
        super().__init__()
        self.made, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        value = func(*args, **(kwargs or {}))
        self.made = [r for r in self.made if r() is not None] + [weakref.ref(value)]
        self.most = max(self.most, len(self.made))
        return value


@pytest.mark.parametrize("way", ["keep", "reach"])
def test_a_value_is_freed_after_its_last_reader(way):
    x = torch.randn(2, 3)
    shell = capture(Chain(), (x,)).shell
    (source,), (output,) = shell.inputs(), shell.outputs()
    run = Interpreter(shell, lambda node: None, None)
    with Alive() as alive:
        given = {source.name: x}
        values = run(given, keep={output.name}) if way == "keep" else run.reach([output.name], given)
    assert list(values) == [output.name]
    assert torch.equal(values[output.name], Chain()(x))
    assert alive.most == 2  # the operand and the result
    with Alive() as alive:
        run(given)
    assert alive.most == 40


def test_a_value_with_two_readers_stays_until_the_second():
    class Twice(nn.Module):
        def forward(self, x):
            y = x.sin()
            z = y.cos()
            return z.tanh() + y

    x = torch.randn(4)
    shell = capture(Twice(), (x,)).shell
    values = Interpreter(shell, lambda node: None, None)({shell.inputs()[0].name: x}, keep={shell.outputs()[0].name})
    assert torch.equal(*values.values(), Twice()(x))


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, index):
        return self.table(index).sin()


def looked(index):
    model = Looked().eval().requires_grad_(False)
    program = capture(model, (torch.tensor([1, 2]),))
    interpreter = Interpreter(program.shell, lambda node: model.table.weight, None)
    return interpreter({program.shell.inputs()[0].name: index})


def test_an_operator_that_refuses_its_values_is_named():
    looked(torch.tensor([0, 3]))
    with pytest.raises(Uncomputed, match="index out of range") as caught:
        looked(torch.tensor([0, 4]))
    assert caught.value.node == "embedding"
    assert caught.value.reason.startswith("IndexError: ")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory"), None])
def test_too_little_memory_is_no_refusal(error):
    """A machine that is too small says nothing of a graph. On a CPU torch raises a RuntimeError (None here)."""
    shell = capture(Chain(), (torch.randn(2, 3),)).shell
    node = next(n for n in shell.graph.nodes if n.op == "call_function")

    def fails(*args):
        if error is None:
            return torch.empty(1 << 60)
        raise error

    node.target = fails
    with pytest.raises(torch.OutOfMemoryError):
        Interpreter(shell, lambda node: None, None)({shell.inputs()[0].name: torch.randn(2, 3)})


def test_an_index_out_of_range_is_not_tried_in_other_dtypes():
    _, program, _, verifier = made()
    tried = []

    class Counting(Weights):
        def __call__(self, sub, prefix, wide, keep=True):
            tried.append(wide)
            return super().__call__(sub, prefix, wide, keep)

    node = next(n for n in program.shell.graph.nodes if n.op == "placeholder")
    with program.shell.graph.inserting_after(node):
        taken = program.shell.graph.call_function(lambda t: t[7], (node,))
    taken.meta = dict(node.meta)
    with pytest.raises(Uncomputed, match="out of bounds"):
        run_widest(program, Counting(verifier.weights.evaluate), random_inputs(program))
    assert tried == [torch.float64]
