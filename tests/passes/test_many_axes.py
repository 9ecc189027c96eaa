"""Activations with several axes of tokens (frames, rows and columns, windows) are rewritten as those with one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

C, HEADS = 32, 2
INT8 = {"w8a8": {"format": "int8"}}


class Axes(nn.Module):
    """A modulated block over (B, H, W, C). kind: which tokens attend to each other, and how the heads are laid out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm1, self.norm2 = nn.LayerNorm(C, elementwise_affine=False), nn.LayerNorm(C)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(C, C) for _ in range(4))
        self.up, self.down, self.modulation = nn.Linear(C, 2 * C), nn.Linear(2 * C, C), nn.Linear(C, 6 * C)
        self.register_buffer("mask", torch.randn(4, HEADS, 4, 4), persistent=False)

    def attend(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for f in (self.to_q, self.to_k, self.to_v))
        masks = {"rows": None, "one mask": self.mask[0, 0], "masks": self.mask, "masks of heads": self.mask[:1]}
        y = F.scaled_dot_product_attention(q, k, v, masks.get(self.kind))
        return self.to_out(y.transpose(-2, -3).flatten(-2))

    def mixed(self, x):
        b, h, w, c = x.shape
        if self.kind == "columns":
            return self.attend(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "windows":
            parts = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
            return self.attend(parts).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        if self.kind == "all":
            return self.attend(x.flatten(1, 2)).view(x.shape)
        return self.attend(x)

    def forward(self, x, t):
        m = self.modulation(F.silu(t)).view(-1, 6, 1, 1, C).unbind(1)
        x = x + m[2] * self.mixed(self.norm1(x) * (1 + m[1]) + m[0])
        y = self.up(self.norm2(x) * (1 + m[4]) + m[3])
        return x + m[5] * self.down(F.gelu(y, approximate="tanh"))


class Two(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Axes(kind) for _ in range(2))

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x, t)
        return x


@pytest.mark.parametrize("kind", ["rows", "columns", "windows", "all", "one mask", "masks", "masks of heads"])
def test_each_site_of_a_grid_of_tokens_is_rewritten_with_the_same_numbers(kind, rewrite, assert_same):
    model, args = Two(kind).eval(), (torch.randn(2, 4, 4, C), torch.randn(2, C))
    done = rewrite(model, args)
    counts = {name: r.rewritten for name, r in done.results.items() if r.rewritten}
    assert counts == {"attention": 2, "fuse_qkv": 2, "adaln": 4, "residual_norm": 4}
    assert_same(done.run(*args), model(*args))
    quantized = rewrite(model, args, options=INT8)
    assert quantized.results["w8a8"].rewritten == 12  # q, k, v, out, up and down
    found, truth = quantized.run(*args), model(*args)
    assert float((found - truth).abs().sum() / truth.abs().sum()) < 2 * 0.012  # two layers of one linear's error


@pytest.mark.parametrize("sizes", [(6, 16), (2, 6, 16), (2, 3, 1, 6, 16), (1, 2, 2, 2, 6, 16)])
def test_attention_of_any_number_of_axes_is_one_of_four(sizes, rewrite, form, assert_same):
    def attend(q, k, v, module):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    args = tuple(torch.randn(sizes) for _ in range(3))
    done = rewrite(form(attend), args, until="attention")
    assert done.results["attention"].rewritten == 1
    assert_same(done.run(*args), F.scaled_dot_product_attention(*args, is_causal=True))


def test_a_gate_that_all_tokens_and_heads_share_joins_the_sum(rewrite, form, assert_same):
    def gated(x, y, module):
        return x.unflatten(-1, (2, 16)) + module.a[:16] * y.unflatten(-1, (2, 16))

    args = torch.randn(2, 6, C), torch.randn(2, 6, C)
    done = rewrite(form(gated), args)
    assert done.results["residual_norm"].rewritten == 1
    assert_same(done.run(*args), form(gated)(*args))


def test_a_modulation_for_each_token_is_no_head(rewrite):
    class PerToken(Axes):
        def forward(self, x, t):
            m = self.modulation(F.silu(t)).unflatten(-1, (6, C)).unbind(-2)  # (B, H, W, C) each
            x = x * (1 + m[1]) + m[0]
            return x + self.down(F.gelu(self.up(x)))

    model = Two("rows").eval()
    for block in model.blocks:
        block.__class__ = PerToken
    done = rewrite(model, (torch.randn(2, 4, 4, C), torch.randn(2, 4, 4, C)), until="w8a8", options=INT8)
    assert done.results["w8a8"].rewritten == done.results["w8a8"].sites == 6


@pytest.mark.parametrize("where", ["split", "attention"])
def test_linears_of_the_vectors_of_heads_stay_wide(where, rewrite):
    class PerHead(Axes):
        def forward(self, x, t):
            if where == "split":
                return x + self.down(F.gelu(self.up(F.silu(x.unflatten(-1, (2, C)))))).flatten(-2)
            q = x.unflatten(-1, (2, C)).transpose(-2, -3)
            y = F.scaled_dot_product_attention(q, q, q)
            return x + self.down(F.gelu(self.up(y))).transpose(-2, -3).flatten(-2)

    model = Two("rows").eval()
    for block in model.blocks:
        block.__class__ = PerHead
    done = rewrite(model, (torch.randn(2, 4, 4, 2 * C), torch.randn(2, C)), until="w8a8", options=INT8)
    assert done.results["w8a8"].rewritten == 0
    assert done.results["w8a8"].sites == 4
