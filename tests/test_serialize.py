"""Programs as data: nothing is lost, nothing foreign gets in."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from turbocompile.capture import capture
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.serialize import ALLOWED, from_json, to_json


class Odd(nn.Module):
    """Arguments of every kind: infinity, dtypes, lists, None, keyword names, a factory, a complex table."""

    def __init__(self):
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False)

    def forward(self, x, scale: float = math.inf):
        y = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * self.turn).flatten(-2)
        y = y.masked_fill(y > 1, -math.inf).softmax(-1, dtype=torch.float64).float()
        return {"a": y.clamp(max=min(scale, 5.0)) + torch.arange(8, dtype=torch.float32), "b": [y.sum((0, 1)), None]}


def trip(program):
    return from_json(json.loads(json.dumps(to_json(program))))


def test_a_round_trip_changes_nothing(wan, wan_call):
    for program in (capture(wan(), kwargs=wan_call()), capture(Odd(), (torch.randn(2, 3, 8),))):
        again = trip(program)
        assert to_json(again) == to_json(program)
        assert list(again.graphs) == list(program.graphs)
        assert again.signature == program.signature
        for name, sub in program.graphs.items():
            assert [n.name for n in again.graphs[name].graph.nodes] == [n.name for n in sub.graph.nodes]
            assert again.graphs[name].weights == sub.weights


def test_infinite_arguments_survive():
    class Limits(nn.Module):
        def forward(self, x):
            return x.clamp(-math.inf, 3).masked_fill(x < 0, math.inf)

    text = json.dumps(to_json(capture(Limits(), (torch.randn(4),))), allow_nan=False)
    assert "inf" in text
    again = from_json(json.loads(text))
    values = [a for n in again.shell.graph.nodes for a in n.args if isinstance(a, float)]
    assert math.inf in values
    assert -math.inf in values


def test_an_operator_outside_the_list_is_named_when_the_engine_is_built():
    class Foreign(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    with pytest.raises(UnsupportedError, match="linalg_inv"):
        to_json(capture(Foreign(), (torch.eye(3),)))


def test_the_list_holds_no_operator_that_reaches_outside_its_tensors():
    for name, op in ALLOWED.items():
        assert not any(word in name for word in ("file", "print", "storage", "set_", "resize", "as_strided", "python"))
        if hasattr(op, "_schema"):
            assert not any(a.is_out for a in op._schema.arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "format 2"),
        (lambda d: d.pop("graphs"), "not readable"),
        (lambda d: d["graphs"].pop("shell"), "no shell graph"),
        (lambda d: d["graphs"].pop("blocks"), "names a graph"),
        (lambda d: d["graphs"]["shell"]["nodes"].pop(), "no output"),
        (lambda d: d["graphs"]["blocks"]["nodes"][0].update(name="a b"), "a node named"),
        (lambda d: d["graphs"]["blocks"]["nodes"][0].update(op="call_method"), "node of kind"),
        (lambda d: d["graphs"]["blocks"]["nodes"][0].update(val=[[[-1], "float32"]]), "that is none"),
    ],
)
def test_what_is_no_program_is_one_sentence(wan, wan_call, change, message):
    data = json.loads(json.dumps(to_json(capture(wan(), kwargs=wan_call()))))
    change(data)
    with pytest.raises(EngineError, match=message) as caught:
        from_json(data)
    assert "\n" not in str(caught.value)
