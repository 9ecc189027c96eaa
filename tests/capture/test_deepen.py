import re

import pytest
import torch
from torch import nn

from turbocompile.capture.deepen import CAPTURED, deepened
from turbocompile.capture.export import capture
from turbocompile.ir.printer import print_program


class Layer(nn.Module):
    def __init__(self, scale=None):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = scale

    def forward(self, x, c):
        x = x + self.down(self.up(self.norm(x) * (1 + c)).sigmoid()) * c
        return x if self.scale is None else x * self.scale


class Stacked(nn.Module):
    """layers: how many. own: each layer has a constant of its own. skip: the last layer reads the first one's result.
    between: an operation between two layers.
    """

    def __init__(self, layers, own=False, skip=False, between=False):
        super().__init__()
        self.start, self.end = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Layer(torch.tensor(1.0 + i) if own else None) for i in range(layers))
        self.skip, self.between = skip, between

    def forward(self, x, c):
        x = self.start(x)
        kept = None
        for i, block in enumerate(self.blocks):
            x = block(x if not (self.skip and i == 2) else x + kept, c)
            kept = x if i == 0 else kept
            x = x + 1 if self.between and i == 1 else x
        return self.end(x)


def shown(program):
    """The printed graphs without the numbers in the names of operations, which count the operations before them."""
    return re.sub(r"(?<=[a-z])_\d+", "", print_program(program))


ARGS = (torch.randn(2, 6, 8), torch.randn(2, 1, 8))


@pytest.mark.parametrize("layers", [4, 5, 9])
def test_three_layers_become_what_many_are_captured_as(layers):
    few = capture(Stacked(CAPTURED), ARGS)
    before = print_program(few)
    made = deepened(few, "blocks", layers)
    whole = capture(Stacked(layers), ARGS)
    assert shown(made) == shown(whole)
    for one, other in zip(made.calls(), whole.calls(), strict=True):
        assert (one.node.name, one.graph, one.prefix) == (other.node.name, other.graph, other.prefix)
    assert print_program(few) == before


def test_wan_is_deepened_to_what_it_is_captured_as(wan):
    def call():
        torch.manual_seed(0)
        hidden, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 32)
        return {"hidden_states": hidden, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}

    made = deepened(capture(wan(num_layers=CAPTURED), (), call()), "blocks", 6)
    assert shown(made) == shown(capture(wan(num_layers=6), (), call()))


@pytest.mark.parametrize("changed", [{"own": True}, {"skip": True}, {"between": True}])
def test_layers_that_are_no_chain_of_equals_are_not_repeated(changed):
    assert deepened(capture(Stacked(CAPTURED, **changed), ARGS), "blocks", 6) is None
