"""Bytes of weights and of activations that are alive at once."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from turbocompile.capture.export import capture
from turbocompile.ir.memory import activation_bytes, parameter_bytes, parameters_by_dtype


def test_parameters_are_those_of_the_model(wan, wan_call):
    model = wan(num_layers=3)
    program = capture(model, (), wan_call())
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    constants = sum(t.numel() * t.element_size() for t in program.constants.values())
    assert parameter_bytes([program]) == own + constants
    # A second shape of the same model brings no weights of its own.
    assert parameter_bytes([program, capture(model, (), wan_call(frames=5))]) == own + constants
    assert parameters_by_dtype([program]) == {"float32": own + constants}


class Chain(nn.Module):
    def forward(self, x):
        y = x.sin()  # alive: x, y
        z = y.cos()  # x, y, z
        return z.exp()  # x, z and the result: y is gone


class Branch(nn.Module):
    def forward(self, x):
        a, b, c = x.sin(), x.cos(), x.exp()
        d = a + b  # x, a, b, c, d
        return d * c


class Views(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.sin().t().reshape(self.shape)[0] * 2.0


@pytest.mark.parametrize(("model", "tensors"), [(Chain(), 3), (Branch(), 5)])
def test_activations_alive_at_once(model, tensors):
    assert activation_bytes(capture(model, (torch.randn(8, 4),), {})) == tensors * 8 * 4 * 4


def test_a_view_needs_no_memory_and_keeps_its_base_alive():
    def peak(*shape):
        return activation_bytes(capture(Views(*shape), (torch.randn(8, 4),), {}))

    assert peak(4, 2, 4) == 4 * (32 + 32 + 8)  # x, sin and the product: the reshape of the transpose splits a dimension
    assert peak(8, 4) == 4 * (32 + 32 + 32)  # x, sin and a copy: it merges two; at the product sin is gone


class Wide(nn.Module):
    """A block that needs much more inside than it hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 64, bias=False)

    def forward(self, x):
        y = self.linear(x).sum(-1, keepdim=True)
        for _ in range(6):
            y = y.sin()
        return x + y


class Stacked(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wide() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.sin()


def test_memory_inside_a_block_counts_while_it_runs():
    tokens = 8
    program = capture(Stacked(3), (torch.randn(1, tokens, 4),), {})
    assert program.count("blocks") == 3
    # The inputs of the model and of the second block, and what that makes at its widest: 64 channels and their sum.
    assert activation_bytes(program) == 4 * tokens * (4 + 4 + 64 + 1)


def test_getitem_of_several_outputs_follows_each_of_them():
    class Halves(nn.Module):
        def forward(self, x):
            values, indices = torch.max(x, dim=-1)
            return values * 2.0, indices

    program = capture(Halves(), (torch.randn(8, 4),), {})
    assert any(n.target is operator.getitem for n in program.shell.graph.nodes)
    assert activation_bytes(program) == 8 * 4 * 4 + 8 * 4 + 8 * 8 + 8 * 4  # x, values, indices, product
