"""RMSNorm of q and k, heads, rotary and layout become one op per tensor; near misses stay or stay right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

B, L, H, D = 2, 16, 2, 16  # as many tokens as channels of a head: a wrong axis then has the right shape
C = H * D


@pytest.mark.parametrize("rope", ["none", "complex", "rotate_half", "slices", "stacked"])
@pytest.mark.parametrize(("qk_norm", "layout"), [("channels", "blhd"), ("heads", "bhld")])
def test_every_order_of_norm_heads_rotary_and_layout(rope, qk_norm, layout, rewrite, assert_same):
    style = zoo.Style(rope=rope, qk_norm=qk_norm, layout=layout, depth=1)
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args, until="qk_norm_rope")
    assert done.results["qk_norm_rope"].rewritten == style.depth
    assert done.ops("blocks").count("qk_norm_rope") == 2
    assert not {"rope", "rms_norm"} & set(done.ops("blocks"))
    for node in done.nodes("qk_norm_rope", "blocks"):
        assert node.args[3:5] == (qk_norm == "heads", H)
        assert len(node.args[5]) == (0 if rope == "none" else 2)  # a table an axis
    assert_same(done.run(*args), model(*args))


def test_sage_attention_reads_the_op_without_a_layout_change(rewrite):
    style = zoo.Style(rope="complex", qk_norm="heads", layout="bhld")
    done = rewrite(zoo.build(style), zoo.example(style), options={"attention": {"kind": "sage"}})
    (node,) = done.nodes("sage_attention", "blocks")
    assert [n.target._opname for n in node.args[:2]] == ["qk_norm_rope"] * 2
    assert "permute" not in done.ops("blocks")


def test_grouped_heads_have_their_own_number(rewrite, assert_same):
    style = zoo.Style(num_kv_heads=1, qk_norm="channels", rope="rotate_half")
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args, until="qk_norm_rope")
    assert [n.args[4] for n in done.nodes("qk_norm_rope", "blocks")] == [2, 1]
    assert_same(done.run(*args), model(*args))


@pytest.mark.parametrize("joint_rope", ["image", "all"])
def test_streams_of_joint_attention_get_one_op_each(joint_rope, rewrite, assert_same):
    style = zoo.Style(joint=True, qk_norm="heads", rope="stacked", joint_rope=joint_rope, layout="bhld")
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args, until="qk_norm_rope")
    nodes = done.nodes("qk_norm_rope", "blocks")
    assert sorted(n.meta["val"].shape[1] for n in nodes) == [zoo.TEXT_TOKENS] * 2 + [style.tokens] * 2
    assert "rope" not in done.ops("blocks")
    rotated = [n for n in nodes if n.args[5]]
    assert len(rotated) == (4 if joint_rope == "all" else 2)
    assert_same(done.run(*args), model(*args))


def test_keys_of_cross_attention_have_an_op_of_their_own(rewrite, assert_same):
    style = zoo.Style(cross=True, qk_norm="channels", rope="slices")
    model, args = zoo.build(style), zoo.example(style)
    done = rewrite(model, args, until="qk_norm_rope")
    assert done.results["qk_norm_rope"].rewritten == 2 * style.depth
    assert [len(n.args[5]) for n in done.nodes("qk_norm_rope", "blocks")] == [2, 2, 0, 0]
    assert_same(done.run(*args), model(*args))


class Attend(nn.Module):
    """Attention of x (B, L, C) with q and k prepared by `prepare(t (B, L, C), module) -> (B, L, H, D)`."""

    def __init__(self, prepare, times=1):
        super().__init__()
        self.prepare, self.times = prepare, times
        self.qk, self.v = nn.Linear(C, C), nn.Linear(C, C)
        self.channels, self.head = (nn.Parameter(1 + 0.1 * torch.randn(n)) for n in (C, D))
        angles = torch.outer(torch.arange(L).double(), 0.5 ** torch.arange(D // 2)).float()
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.requires_grad_(False)

    def rope(self, x, swap=False):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        turned = [a * cos - b * sin, b * cos + a * sin]
        return torch.stack(turned[::-1] if swap else turned, -1).flatten(-2)

    def forward(self, x, y):
        q, v = self.prepare(self.qk(x), self), self.v(y).unflatten(-1, (H, D))
        outputs = []
        for i in range(self.times):
            k = self.prepare(self.qk(y + i), self)
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            outputs.append(out.transpose(1, 2).flatten(2))
        return sum(outputs)


def args():
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, L, C, generator=g) for _ in range(2))


def heads(t):
    return t.unflatten(-1, (H, D))


def rms(t, weight, *sizes):
    return F.rms_norm(t, sizes or weight.shape, weight, 1e-6)


STAYS = {
    "LayerNorm": (lambda t, m: m.rope(F.layer_norm(heads(t), (D,), m.head)), "LayerNorm"),
    "rotary alone": (lambda t, m: m.rope(heads(t)), "no RMSNorm"),
    "a norm over heads and channels as two axes": (
        lambda t, m: F.rms_norm(heads(t), (H, D), m.channels.view(H, D), 1e-6),
        None,
    ),
    "a norm over the tokens": (lambda t, m: rms(heads(t).transpose(1, 3), m.head).transpose(1, 3), "not over"),
    "rotary before the norm": (lambda t, m: rms(m.rope(heads(t)), m.head), None),
    "two rotaries": (lambda t, m: m.rope(m.rope(rms(heads(t), m.head))), None),
    "a scale behind the norm": (lambda t, m: m.rope(rms(heads(t), m.head) * t.mean()), None),
    "swapped halves": (lambda t, m: m.rope(rms(heads(t), m.head), swap=True), None),
    "channels of a head apart": (
        lambda t, m: m.rope(rms(t, m.channels).unflatten(-1, (D, H)).transpose(-1, -2)),
        None,
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_near_misses_stay_or_stay_right(name, rewrite, assert_same):
    prepare, reason = STAYS[name]
    model = Attend(prepare)
    done = rewrite(model, args(), until="qk_norm_rope")
    result = done.results["qk_norm_rope"]
    assert result.sites == result.rewritten + len(result.skipped)
    if reason is not None:
        assert result.rewritten == 0
        assert reason in done.reasons("qk_norm_rope")[0]
    assert_same(done.run(*args()), model(*args()))


def test_two_attentions_share_their_q(rewrite, assert_same):
    model = Attend(lambda t, m: m.rope(rms(heads(t), m.head)), times=2)
    done = rewrite(model, args(), until="qk_norm_rope")
    assert done.results["qk_norm_rope"].rewritten == 2
    assert done.ops().count("qk_norm_rope") == 3
    assert_same(done.run(*args()), model(*args()))


def test_a_norm_that_something_else_reads_stays_for_it(rewrite, assert_same):
    class Reads(Attend):
        def forward(self, x, y):
            return super().forward(x, y) + rms(heads(self.qk(x)), self.head).flatten(2)

    model = Reads(lambda t, m: rms(heads(t), m.head))
    done = rewrite(model, args(), until="qk_norm_rope")
    assert_same(done.run(*args()), model(*args()))


def test_the_default_eps_of_rms_norm_is_that_of_its_dtype(rewrite, assert_same):
    model = Attend(lambda t, m: F.rms_norm(heads(t) * 1e-4, (D,), m.head))
    done = rewrite(model, args(), until="qk_norm_rope")
    assert done.nodes("qk_norm_rope")[0].args[2] == torch.finfo(torch.float32).eps
    assert_same(done.run(*args()), model(*args()))


def test_the_graph_before_and_after(shown):
    shown("qk_norm_rope", Attend(lambda t, m: m.rope(rms(heads(t), m.head))), args(), "qk_norm_rope")
