"""Linears of blocks that act on tokens become 8-bit; the others stay and say why."""

from __future__ import annotations

import pytest
import torch
import zoo
from asked import asked
from torch import nn
from turbocompile.passes import w8a8

from turbocompile.ir.weights import Cast, Cat, Dequantize, Load, Quantize

WIDE = zoo.Style(head_dim=64)  # 128 channels: what a tile of int8_block needs
# Relative L1 of one linear on N(0, 1) inputs; two layers of them and of what is between stay below twice that.
ONE_LINEAR = {"int8": 0.012, "int8_block": 0.0135, "fp8": 0.037}


def options(format):
    return {"w8a8": {"format": format}}


def load(name, *sizes, dtype=torch.float32):
    return Load(name, sizes, dtype)


@pytest.mark.parametrize("format", ONE_LINEAR)
def test_every_format_stays_within_its_error(format, rewrite):
    model, args = zoo.build(WIDE), zoo.example(WIDE)
    done = rewrite(model, args, options=options(format))
    assert done.results["w8a8"].kind == "quantizing"
    assert done.results["w8a8"].rewritten == zoo.expected_sites(model)["w8a8"] == 12
    found, truth = done.run(*args), model(*args)
    error = float((found - truth).abs().sum() / truth.abs().sum())
    assert 0 < error < 2 * ONE_LINEAR[format]


def test_weights_are_expressions_and_the_activation_is_quantized_once(rewrite):
    style = zoo.Style(qkv_bias="none", mlp="silu_glu")
    done = rewrite(zoo.build(style), zoo.example(style), until="w8a8", options=options("int8"))
    weights = done.program.graphs["blocks"].weights
    gate = load(".stream.mlp.gate.weight", 64, 32)
    assert weights["stream.mlp.gate.int8_weight"] == Quantize(gate, "int8", "data")
    assert weights["stream.mlp.gate.int8_scale"] == Quantize(gate, "int8", "scale")
    qkv = weights["attn.qkv.to_q_to_k_to_v.int8_weight"]
    assert isinstance(qkv.of, Cat)
    # q, k, v / out / up and gate / down: the equal quantizes of up and gate are one
    assert done.ops("blocks").count("quantize") == 4
    assert done.ops("blocks").count("w8a8_linear") == 5


def test_linears_outside_the_blocks_and_of_modulation_stay(rewrite):
    style = zoo.Style(modulation="linear", cross=True)
    done = rewrite(zoo.build(style), zoo.example(style), until="w8a8", options=options("int8"))
    found = {site: (reason, count) for site, reason, count in done.results["w8a8"].skipped}
    assert found.pop("blocks:stream.modulation.linear") == ("it does not act on tokens (its input is [2, 32])", 2)
    assert set(found) == {f"shell:{n}" for n in ("embed", "time_in", "time_out", "text_in", "head")}
    assert {reason for reason, _ in found.values()} == {"it is outside the blocks"}


def test_modulation_of_a_batch_of_one_and_per_head_linears_are_no_tokens(rewrite):
    class PerHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x.unflatten(-1, (2, 16))).flatten(-2)
            return x

    done = rewrite(zoo.Stack(PerHead), (torch.randn(1, 6, 32),), until="w8a8", options=options("int8"))
    assert done.results["w8a8"].rewritten == 0
    assert done.results["w8a8"].sites == 16
    assert "does not act on tokens" in done.reasons("w8a8")[0]


def test_tiles_that_do_not_fit_are_refused(rewrite):
    style = zoo.Style(head_dim=64, mlp_ratio=1)
    narrow = zoo.Style(head_dim=16)
    assert rewrite(zoo.build(style), zoo.example(style), options=options("int8_block")).results["w8a8"].rewritten == 12
    done = rewrite(zoo.build(narrow), zoo.example(narrow), options=options("int8_block"))
    assert done.results["w8a8"].rewritten == 0
    assert any(r.startswith("int8_block needs K % 128 == 0") for r in done.reasons("w8a8"))


def test_what_no_kernel_takes_stays_where_a_kernel_would_run(rewrite):
    style = zoo.Style(head_dim=12, num_heads=2)
    for target, count in (("cpu", 12), ("sm90", 2)):  # of 24 channels, and of the 96 of the MLPs
        done = rewrite(zoo.build(style), zoo.example(style), until="w8a8", options=options("int8"), target=target)
        assert done.results["w8a8"].rewritten == count
    assert any(r == "the kernels need K % 16 == 0, and this weight is [24, 24]" for r in done.reasons("w8a8"))


def test_auto_follows_the_target(rewrite):
    for target, format in (("cpu", None), ("sm80", "int8"), ("sm86", "int8"), ("sm90", "fp8")):
        done = rewrite(zoo.build(), zoo.example(zoo.Style()), until="w8a8", options=options("auto"), target=target)
        names = {n for n in done.program.graphs["blocks"].weights if n.endswith("_scale")}
        assert bool(names) == (format is not None)
        assert all(n.endswith(f".{format}_scale") for n in names)
    reasons = rewrite(zoo.build(), zoo.example(zoo.Style()), options=options("auto")).reasons("w8a8")
    assert set(reasons) == {"8-bit linears do not pay on cpu"}
    off = rewrite(zoo.build(), zoo.example(zoo.Style()), options=options("off")).reasons("w8a8")
    assert set(off) == {"switched off in the recipe"}


def test_what_a_checkpoint_has_quantized_is_taken_as_it_is():
    def stored(name, rows):
        data, scale = load(f"{name}.data", rows, 256, dtype=torch.int8), load(f"{name}.scale", -(-rows // 128), 2)
        return Dequantize(data, scale, "int8_block", torch.bfloat16)

    q, k = stored("q", 128), stored("k", 256)
    assert w8a8.quantized(q, "int8_block") == (q.data, q.scale)
    assert w8a8.quantized(Cast(q, torch.float32), "int8_block") == (q.data, q.scale)
    both = Cat((q, k), 0)
    assert w8a8.quantized(both, "int8_block") == (Cat((q.data, k.data), 0), Cat((q.scale, k.scale), 0))
    # Another format is made anew, and so is a tile that would straddle two tensors.
    assert w8a8.quantized(q, "int8") == (Quantize(q, "int8", "data"), Quantize(q, "int8", "scale"))
    straddling = Cat((stored("short", 64), q), 0)
    assert isinstance(w8a8.quantized(straddling, "int8_block")[0], Quantize)
    assert w8a8.format_of(asked(target="sm90").w8a8, both) == "int8_block"
    assert w8a8.format_of(asked().w8a8, both) == "off"
    assert w8a8.format_of(asked({"w8a8": "fp8"}, "sm90").w8a8, both) == "fp8"


def test_without_blocks_nothing_is_quantized(rewrite):
    done = rewrite(nn.Linear(16, 16), (torch.randn(1, 6, 16),), until="w8a8", options=options("int8"))
    assert done.reasons("w8a8") == ["no repeated blocks were found, and only they change"]


def test_the_graph_before_and_after(shown):
    style = zoo.Style(mlp_ratio=1, modulation="none", qkv_bias="none")
    shown("w8a8", zoo.build(style), zoo.example(style), "w8a8", options("int8"))
