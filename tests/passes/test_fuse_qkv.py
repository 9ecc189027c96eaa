"""Linears that feed one attention and share their input become one; no others do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from turbocompile.ir.weights import Cat, Load, Zeros
from turbocompile.rewrite.facts import facts

C = 32


def load(name: str, *sizes: int) -> Load:
    return Load(name, sizes, torch.float32)


def test_q_k_and_v_become_one_linear_over_the_concatenated_weights(rewrite, assert_same):
    style = zoo.Style(num_kv_heads=1)
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args, until="fuse_qkv")
    weights = done.program.graphs["blocks"].weights
    q, k, v = (load(f".attn.qkv.to_{n}.weight", rows, C) for n, rows in (("q", 32), ("k", 16), ("v", 16)))
    assert weights["attn.qkv.to_q_to_k_to_v.weight"] == Cat((q, k, v), 0)
    assert "attn.qkv.to_q.weight" not in weights
    wide = done.nodes("linear", "blocks")[0]
    assert facts(wide).linears == 3
    assert [n.args[1:] for n in wide.users] == [(2, 0, 32), (2, 32, 48), (2, 48, 64)]
    assert_same(done.run(*args), model(*args))


def test_a_missing_bias_becomes_zeros(rewrite, assert_same):
    style = zoo.Style(qkv_bias="q")
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args, until="fuse_qkv")
    zeros = Zeros((C,), torch.float32)
    found = done.program.graphs["blocks"].weights["attn.qkv.to_q_to_k_to_v.bias"]
    assert found == Cat((load(".attn.qkv.to_q.bias", C), zeros, zeros), 0)
    assert_same(done.run(*args), model(*args))
    none = rewrite(zoo.build(zoo.Style(qkv_bias="none")), args, until="fuse_qkv")
    assert "attn.qkv.to_q_to_k_to_v.bias" not in none.program.graphs["blocks"].weights


def test_streams_of_joint_attention_are_fused_each_for_itself(rewrite, assert_same):
    style = zoo.GALLERY["mmdit"]
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args, until="fuse_qkv")
    assert done.results["fuse_qkv"].rewritten == 2 * style.depth
    assert_same(done.run(*args), model(*args))


class TwoAttentions(nn.Module):
    """Two cross-attentions of one text: four linears share an input, two and two feed one attention."""

    def __init__(self, gate=None):
        super().__init__()
        self.names = [f"{n}{i}" for i in range(2) for n in "qkv"]
        for name in self.names:
            setattr(self, name, nn.Linear(C, C))
        self.gate = gate

    def forward(self, x, text):
        for i in range(2):
            q, k, v = (getattr(self, f"{n}{i}")(x if n == "q" else text).unflatten(-1, (2, -1)) for n in "qkv")
            k = k if self.gate is None else self.gate(k)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def test_sharing_an_input_is_not_enough(rewrite, assert_same):
    model, args = TwoAttentions().requires_grad_(False), (torch.randn(1, 6, C), torch.randn(1, 5, C))
    done = rewrite(model, args, until="fuse_qkv")
    assert sorted(n for n in done.program.shell.weights if "_to_" not in n and n.endswith("weight"))[:2] == [
        "k0_v0.weight",
        "k1_v1.weight",
    ]
    assert done.results["fuse_qkv"].rewritten == 2
    assert_same(done.run(*args), model(*args))


@pytest.mark.parametrize("gate", [lambda k: k + 1.0, torch.tanh, lambda k: k * k])
def test_a_linear_behind_other_arithmetic_feeds_no_attention(gate, rewrite, assert_same):
    model, args = TwoAttentions(gate).requires_grad_(False), (torch.randn(1, 6, C), torch.randn(1, 5, C))
    done = rewrite(model, args, until="fuse_qkv")
    assert done.results["fuse_qkv"].sites == 0
    assert_same(done.run(*args), model(*args))


def test_weights_of_different_types_stay_apart(rewrite):
    class Mixed(TwoAttentions):
        def forward(self, x, text):
            q, k = self.q0(x), F.linear(text, self.k0.weight.to(torch.float32))
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, self.v0(text)))
            return F.scaled_dot_product_attention(q, k, v)

    model = Mixed().requires_grad_(False)
    model.k0.to(torch.bfloat16)
    done = rewrite(model, (torch.randn(1, 6, C), torch.randn(1, 5, C)), until="fuse_qkv")
    # The cast weight is the cast of an expression, so that the two can be one after all.
    weight = done.program.shell.weights["k0_v0.weight"]
    assert [e.dtype for e in weight.of] == [torch.float32] * 2


def test_a_computed_weight_stays_and_says_so(rewrite):
    class Computed(TwoAttentions):
        def forward(self, x, text):
            q, k = self.q0(x), F.linear(text, self.k0.weight * 2)
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, self.v0(text)))
            return F.scaled_dot_product_attention(q, k, v)

    done = rewrite(Computed(), (torch.randn(1, 6, C), torch.randn(1, 5, C)), until="fuse_qkv")
    assert done.reasons("fuse_qkv") == ["a weight is computed in the graph"]
    assert done.results["fuse_qkv"].sites == 1


def test_a_projection_that_is_fused_already_is_no_site(rewrite):
    for qkv in ("chunk", "reshape", "unbind", "interleaved"):
        style = zoo.Style(qkv=qkv)
        assert rewrite(zoo.build(style), zoo.example(style), until="fuse_qkv").results["fuse_qkv"].sites == 0


def test_the_graph_before_and_after(shown):
    shown("fuse_qkv", TwoAttentions(), (torch.randn(1, 6, C), torch.randn(1, 5, C)), "fuse_qkv")
