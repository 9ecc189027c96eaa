"""The quantize behind a GELU or a norm joins it where it alone reads it."""

from __future__ import annotations

import pytest
import torch
import zoo

INT8 = {"w8a8": {"format": "int8"}}


@pytest.mark.parametrize(("mlp", "approximate"), [("gelu_tanh", "tanh"), ("gelu", "none")])
def test_gelu_and_quantize_are_one_op(mlp, approximate, rewrite):
    style = zoo.Style(mlp=mlp)
    args = zoo.example(style)
    before = rewrite(zoo.build(style), args, until="residual_norm", options=INT8)
    done = rewrite(zoo.build(style), args, options=INT8)
    (node,) = done.nodes("gelu_quantize", "blocks")
    assert node.args[1:] == (approximate, "int8")
    assert "gelu" not in done.ops("blocks")
    assert done.results["gelu_quant"].rewritten == style.depth
    assert torch.equal(done.run(*args), before.run(*args))


def test_a_plain_norm_and_quantize_are_one_op(rewrite):
    style = zoo.Style(modulation="none", mlp="silu_glu")
    args = zoo.example(style)
    before = rewrite(zoo.build(style), args, until="residual_norm", options=INT8)
    done = rewrite(zoo.build(style), args, options=INT8)
    (node,) = done.nodes("norm_quantize", "blocks")
    assert node.args[3:] == (zoo.EPS, "layer", "int8")
    assert torch.equal(done.run(*args), before.run(*args))


def test_nothing_is_a_site_without_quantization(rewrite):
    assert rewrite(zoo.build(), zoo.example(zoo.Style())).results["gelu_quant"].sites == 0


class Gated(zoo.Mlp):
    def forward(self, x):
        y = torch.nn.functional.gelu(self.up(x))
        return self.down(self.change(y)) + self.other(y)


@pytest.mark.parametrize(
    ("change", "other", "sites"),
    [
        (lambda y: y, lambda y: y.mean(-1, keepdim=True), 2),  # something else reads the GELU
        (lambda y: y * y, lambda y: 0, 0),  # what is quantized is no GELU
        (lambda y: -y, lambda y: 0, 0),
    ],
)
def test_a_quantize_joins_its_own_gelu_alone(change, other, sites, rewrite):
    model, plain = zoo.build(), zoo.build()
    for block in (*model.blocks, *plain.blocks):
        block.stream.mlp.__class__, block.stream.mlp.change, block.stream.mlp.other = Gated, change, other
    args = zoo.example(model.style)
    done = rewrite(model, args, options=INT8)
    result = done.results["gelu_quant"]
    assert (result.sites, result.rewritten) == (sites, 0)
    assert all(reason == "something else than one quantize reads it" for reason in done.reasons("gelu_quant"))
    assert torch.equal(done.run(*args), rewrite(plain, args, until="residual_norm", options=INT8).run(*args))
