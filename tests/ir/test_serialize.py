"""Programs as data: nothing is lost, nothing foreign gets in."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbocompile
from turbocompile.capture.export import capture
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.allowed_ops import ALLOWED
from turbocompile.ir.deserialize import from_json
from turbocompile.ir.serialize import to_json


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


def picture(x):
    """x (2, 6, 8) as two images of 6 channels."""
    return x.reshape(2, 6, 2, 4)


HELD = {
    "scatter_add": lambda x, i: torch.zeros_like(x).scatter_add_(1, i, x),
    "scatter_reduce": lambda x, i: x.scatter_reduce(1, i, x, "amax"),
    "gather": lambda x, i: torch.take_along_dim(x.gather(1, i), i, 1),
    "index_add": lambda x, i: x.index_add(1, i[0, :, 0], x).index_fill(1, i[0, :2, 1], 0.5),
    "cumulative": lambda x, i: x.cumprod(1) + x.logcumsumexp(1) + x.cummax(1)[0],
    "convolutions back": lambda x, i: F.conv_transpose2d(picture(x), x[0, 0].reshape(1, 1, 2, 4).expand(6, 3, 2, 4)),
    "largest of a window": lambda x, i: F.max_pool2d(picture(x), 2) + F.adaptive_max_pool2d(picture(x), (1, 2)),
    "mean of a window": lambda x, i: F.adaptive_avg_pool2d(picture(x), (1, 3)),
    "bicubic": lambda x, i: F.interpolate(picture(x), scale_factor=2, mode="bicubic"),
    "bilinear": lambda x, i: F.interpolate(picture(x), scale_factor=0.5, mode="bilinear", antialias=True),
    "trilinear": lambda x, i: F.interpolate(picture(x)[:, :, None], scale_factor=2, mode="trilinear"),
    "linear": lambda x, i: F.interpolate(x, scale_factor=2, mode="linear"),
    "nearest": lambda x, i: F.interpolate(picture(x), scale_factor=2, mode="nearest-exact"),
    "log softmax": lambda x, i: F.log_softmax(x, -1) + F.logsigmoid(x),
    "orthogonal": lambda x, i: torch.linalg.qr(x.transpose(1, 2) + torch.eye(8, 6))[0],
    "inverse": lambda x, i: torch.linalg.solve(x[..., :6] + 9 * torch.eye(6), torch.linalg.inv(torch.eye(6) * 2)),
    "searched": lambda x, i: torch.searchsorted(x.sort(-1)[0], x) + torch.bucketize(x, torch.linspace(-1, 1, 5)),
    "sampled": lambda x, i: F.grid_sample(picture(x), x.reshape(2, 6, 4, 2)[:, :2].tanh(), align_corners=False),
    "folded": lambda x, i: F.fold(F.unfold(picture(x), 2), (2, 4), 2),
    "functions": lambda x, i: torch.erfinv(x.tanh()) + torch.erfc(x) + x.asinh() + x.exp2() + torch.sinc(x) + x.frac(),
    "gates": lambda x, i: F.selu(x) + F.celu(x) + F.hardsigmoid(x) + F.softshrink(x) + F.relu6(x) + x.sigmoid().logit(),
    "bits": lambda x, i: (i ^ 3) + (i << 1) + (i >> 1) + (x > 0).logical_xor(x > 1),
    "distances": lambda x, i: torch.cdist(x, x + 1) + F.cosine_similarity(x, x + 1, -1)[..., None],
    "products": lambda x, i: torch.kron(x[0, :2], x[1, :2]) + torch.linalg.cross(x[0, :1, :3], x[0, :1, 3:6]).sum(),
    "order": lambda x, i: x.argsort(-1) + x.median(-1, True)[0] + x.kthvalue(2, -1, True)[0],
    "diagonals": lambda x, i: torch.diag_embed(x).sum(1) + torch.diag(x[0]).sum() + x[0].trace(),
    "batch norm": lambda x, i: F.batch_norm(x, x[0, 0, :6], x[0, 1, :6].abs() + 1) + F.instance_norm(x),
    "classes": lambda x, i: F.one_hot(i, 6) + x[..., None],
    "a value written": lambda x, i: x.index_copy(1, torch.tensor([1]), x[:, :1]).masked_scatter(x > 0, x),
}


@pytest.mark.parametrize("passes", ["on", "off"])
@pytest.mark.parametrize("form", HELD.values(), ids=HELD.keys())
def test_engines_hold_tensor_mathematics_as_it_is_written_and_in_normal_form(form, passes, tmp_path):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, i):
            return form(self.linear(x), i)

    torch.manual_seed(0)
    model = Held().requires_grad_(False)
    inputs = torch.randn(2, 6, 8), torch.randint(0, 6, (2, 6, 8))
    recipe = {"passes": "off", "verify": "off"} if passes == "off" else None
    turbocompile.optimize(model, inputs, recipe=recipe).save(tmp_path / "engine")
    found, expected = turbocompile.load(tmp_path / "engine")(*inputs), model(*inputs)
    assert found.dtype == expected.dtype
    # sums in another order, of values whose conditioning is up to some 100: of 2^-24
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_operator_outside_the_list_is_named_when_the_engine_is_built():
    class Foreign(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    with pytest.raises(UnsupportedError, match="eigvalsh"):
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
