"""Attention in any writing becomes the operator that the recipe asks for; what is no attention stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from asked import sage_speeds
from torch import nn
from turbocompile.passes import attention, sla

from turbocompile import hardware
from turbocompile.ir.weights import Load, Zeros
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Settings
from turbocompile.report.attentions import attention_sites, untuned
from turbocompile.report.rows import Sparsity

B, H, L, D = 2, 4, 16, 16  # as many tokens as channels: a wrong axis then has the right shape
SCALE = D**-0.5


def qkv(keys=L, heads=H):
    g = torch.Generator().manual_seed(0)
    sizes = [(B, H, L, D), (B, heads, keys, D), (B, heads, keys, D)]
    return tuple(torch.randn(s, generator=g) for s in sizes)


def bias(keys=L):
    return torch.linspace(-1, 1, L * keys).reshape(L, keys)


def scores(q, k):
    return q @ k.transpose(-2, -1)


def flat(*tensors):
    return [t.reshape(-1, *t.shape[2:]) for t in tensors]


def by_bmm(q, k, v, m):
    a, b, c = flat(q, k, v)
    return torch.bmm(torch.softmax(torch.bmm(a, b.transpose(1, 2)) * SCALE, -1), c).view(q.shape)


def by_baddbmm(q, k, v, m):
    a, b, c = flat(q, k, v)
    start = torch.zeros(a.shape[0], a.shape[1], b.shape[1])
    return (torch.baddbmm(start, a, b.transpose(1, 2), beta=0, alpha=SCALE).softmax(-1) @ c).unflatten(0, (B, H))


def by_einsum(q, k, v, m):
    p = (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", p, v)


FORMS = {
    "sdpa": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v),
    "sdpa with its scale given": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    "scaled scores": lambda q, k, v, m: torch.softmax(scores(q, k) * SCALE, -1) @ v,
    "divided scores": lambda q, k, v, m: torch.softmax(scores(q, k) / 4.0, dim=3) @ v,
    "scaled q": lambda q, k, v, m: scores(q * SCALE, k).softmax(-1) @ v,
    "scaled k": lambda q, k, v, m: scores(q, k * SCALE).softmax(-1) @ v,
    "q and k scaled by a root each": lambda q, k, v, m: scores(q * SCALE**0.5, k * SCALE**0.5).softmax(-1) @ v,
    "no scale": lambda q, k, v, m: scores(q, k).softmax(-1) @ v,
    "softmax in float32": lambda q, k, v, m: torch.softmax(scores(q, k), -1, dtype=torch.float32).type_as(v) @ v,
    "a bias on the scores": lambda q, k, v, m: torch.softmax(scores(q, k) * SCALE + bias(), -1) @ v,
    "a bias first": lambda q, k, v, m: torch.softmax(bias() + SCALE * scores(q, k), -1) @ v,
    "bmm over batch and heads": by_bmm,
    "baddbmm": by_baddbmm,
    "einsum": by_einsum,
}


@pytest.mark.parametrize("name", FORMS)
def test_any_writing_becomes_sdpa(name, form, rewrite, assert_same):
    model, args = form(FORMS[name]), qkv()
    done = rewrite(model, args, until="attention")
    assert done.results["attention"].rewritten == 1
    assert "softmax" not in done.ops()
    assert done.ops().count("scaled_dot_product_attention") == 1
    assert_same(done.run(*args), model(*args))


def test_what_stands_for_another_function_is_not_rewritten_or_stays_right(form, rewrite, assert_same):
    forms = {
        "over the queries": lambda q, k, v, m: torch.softmax(scores(q, k) * SCALE, -2) @ v,
        "over the heads": lambda q, k, v, m: torch.softmax(scores(q, k) * SCALE, 1) @ v,
        "the bias is scaled too": lambda q, k, v, m: torch.softmax((scores(q, k) + bias()) * SCALE, -1) @ v,
        "a scale for each channel": lambda q, k, v, m: torch.softmax(scores(q, k) * m.a[:L], -1) @ v,
        "weights transposed": lambda q, k, v, m: torch.softmax(scores(q, k) * SCALE, -1).transpose(-2, -1) @ v,
    }
    for name, function in forms.items():
        model, args = form(function), qkv()
        done = rewrite(model, args, until="attention")
        result = done.results["attention"]
        assert result.rewritten == 0, name
        assert result.sites == len(result.skipped), name
        assert_same(done.run(*args), model(*args))


def test_other_signs_and_layouts_are_rewritten_and_right(form, rewrite, assert_same):
    forms = [
        lambda q, k, v, m: torch.softmax(bias() - scores(q, k) * SCALE, -1) @ v,  # a negative scale
        lambda q, k, v, m: torch.softmax(q @ k * SCALE, -1) @ v,  # the attention of the transposed k
        lambda q, k, v, m: torch.softmax(scores(k, q) * SCALE, -1) @ v,
    ]
    for function in forms:
        model = form(function)
        done = rewrite(model, qkv(), until="attention")
        assert done.results["attention"].rewritten == 1
        assert_same(done.run(*qkv()), model(*qkv()))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "where", ["by SDPA", "repeated", "repeated in the layout of projections", "repeated, explicit"]
)
def test_grouped_heads_are_not_repeated(where, groups, form, rewrite, assert_same):
    def grouped(q, k, v, m):
        if where == "by SDPA":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if where == "repeated in the layout of projections":
            k, v = (t.transpose(1, 2).repeat_interleave(H // groups, dim=2).transpose(1, 2) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(H // groups, dim=1) for t in (k, v))
        return scores(q, k).mul(SCALE).softmax(-1) @ v if "explicit" in where else FORMS["sdpa"](q, k, v, m)

    args = qkv(heads=groups)
    model = form(grouped)
    done = rewrite(model, args, until="attention")
    assert "expand" not in done.ops()
    (node,) = done.nodes("scaled_dot_product_attention")
    assert node.kwargs["enable_gqa"] is True
    assert_same(done.run(*args), model(*args))


def test_masks_and_causality_are_kept(form, rewrite, assert_same):
    forms = [
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=bias() > 0.2 * torch.eye(L)),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=bias()),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ]
    for function in forms:
        model = form(function)
        done = rewrite(model, qkv(), until="attention")
        assert done.results["attention"].rewritten == 1
        assert_same(done.run(*qkv()), model(*qkv()))


def test_dropout_is_refused(form, rewrite):
    model = form(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert "dropout" in rewrite(model, qkv(), until="attention").reasons("attention")[0]


SAGE = {"attention": {"kind": "sage", "pv": "fp16"}}


def test_sage_reads_and_writes_the_layout_of_projections(rewrite):
    style = zoo.Style(head_dim=64, qk_norm="heads", rope="stacked")
    done = rewrite(zoo.build(style), zoo.example(style), options=SAGE)
    assert done.results["attention"].kind == "quantizing"
    assert done.results["attention"].rewritten == 2
    assert "permute" not in done.ops("blocks")
    (node,) = done.nodes("sage_attention", "blocks")
    assert [tuple(n.meta["val"].shape) for n in node.args[:3]] == [(2, 12, 2, 64)] * 3
    assert node.args[3:] == (64**-0.5, False, "fp16")


def test_sage_is_near_exact_attention(form, rewrite):
    model, args = form(FORMS["scaled scores"]), qkv()
    found, truth = rewrite(model, args, until="attention", options=SAGE).run(*args), model(*args)
    # INT8 q and k and an FP16 product are 1.3% off for N(0, 1) inputs, and a wrong layout over 100%.
    assert float((found - truth).abs().sum() / truth.abs().sum()) < 0.02


def test_sage_says_what_it_cannot_do(form, rewrite):
    masked = form(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=bias()))
    causal = form(lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:], is_causal=True))
    wide = form(lambda q, k, v, m: F.scaled_dot_product_attention(*(torch.cat([t] * 9, -1) for t in (q, k, v))))
    for model, reason in ((masked, "mask"), (causal, "as many keys"), (wide, "144")):
        done = rewrite(model, qkv(), until="attention", options=SAGE)
        assert done.results["attention"].rewritten == 0
        assert reason in done.reasons("attention")[0]
        assert "scaled_dot_product_attention" in done.ops()


@pytest.fixture
def pays(monkeypatch):
    """pays(tokens): on sm90, Sage is twice as fast from so many queries and keys on."""

    def make(tokens, target="sm90"):
        rows = sage_speeds("fp8", 1, 128, (tokens, tokens, 2.0))
        monkeypatch.setattr(hardware, "_SAGE_SPEEDUP", {target: rows})

    return make


def test_auto_keeps_floating_point_on_a_cpu_and_takes_sage_where_it_pays(form, rewrite, pays):
    pays(L)
    auto = {"attention": {"kind": "auto"}}
    for target, op, kind in (
        ("cpu", "scaled_dot_product_attention", "exact"),
        ("sm80", "scaled_dot_product_attention", "exact"),
        ("sm90", "sage_attention", "quantizing"),
    ):
        done = rewrite(form(FORMS["scaled scores"]), qkv(), until="attention", options=auto, target=target)
        assert op in done.ops()
        assert done.results["attention"].kind == kind


def test_auto_chooses_for_each_site(rewrite, pays):
    """Of two attentions in a block, the one over more keys than it takes is quantized."""
    style = zoo.Style(cross=True, head_dim=16, batch=1, grid=(6, 8))
    pays(40)  # 48 tokens, and a text of fewer
    done = rewrite(
        zoo.build(style), zoo.example(style), until="attention", options={"attention": {"kind": "auto"}}, target="sm90"
    )
    rows = {site.role: site for site in attention_sites(done.program, list(done.results.values()))}
    assert (rows["self"].kind, rows["self"].queries, rows["self"].keys) == ("sage", 48, 48)
    assert rows["self"].why == "Sage (fp8) has 2.00 times the speed of SDPA at 40 x 40 tokens, 1 head of 128, measured"
    assert rows["cross"].kind == "native"
    assert "smaller than all that Sage (fp8) was measured at on sm90" in rows["cross"].why
    assert done.results["attention"].rewritten == 2 * style.depth
    assert done.results["attention"].skipped == ()


def test_auto_is_native_where_sage_cannot_be_and_says_why(form, rewrite, pays):
    pays(L)
    masked = [
        form(FORMS["a bias on the scores"]),
        form(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=bias())),
    ]
    for model in masked:
        done = rewrite(model, qkv(), until="attention", options={"attention": {"kind": "auto"}}, target="sm90")
        (row,) = attention_sites(done.program)
        assert (row.kind, row.why) == ("native", "SageAttention has no mask")


def test_auto_without_a_product_in_8_or_16_bits_is_native(form, rewrite, pays):
    pays(1)
    options = {"attention": {"kind": "auto", "pv": "none"}}
    done = rewrite(form(FORMS["scaled scores"]), qkv(), until="attention", options=options, target="sm90")
    (row,) = attention_sites(done.program)
    assert (row.kind, row.why) == ("native", "the recipe says pv: none, and Sage has no such product")


def test_a_choice_that_is_given_overrules_the_size(form, rewrite, pays):
    """What a small twin of an engine's shapes needs, to be rewritten as they are."""
    pays(10 * L)
    given = {"shell:": hardware.AttentionChoice("sage", "so it is at the engine's shape")}
    auto = {"attention": {"kind": "auto"}}
    done = rewrite(form(FORMS["scaled scores"]), qkv(), until="attention", options=auto, target="sm90", choices=given)
    (row,) = attention_sites(done.program)
    assert (row.kind, row.why) == ("sage", "so it is at the engine's shape")


# ------------------------------------------------------------------------------------------------------------ sla

STYLE = zoo.Style(cross=True, head_dim=16, batch=1)


def keys(tuned: bool) -> frozenset[str]:
    names = [f"blocks.{i}.attn.proj_l.{leaf}" for i in range(STYLE.depth) for leaf in ("weight", "bias")]
    return frozenset(names if tuned else [])


def sla_options(**more):
    return {"attention": {"kind": "sla", "topk": 0.5, "block_q": 16, **more}}


def test_sla_takes_self_attention_and_its_projection_from_the_checkpoint(rewrite, pays):
    pays(1)
    options = sla_options(block_k=16)
    done = rewrite(zoo.build(STYLE), zoo.example(STYLE), options=options, target="sm90", checkpoint=keys(True))
    assert (done.results["sla"].kind, done.results["sla"].rewritten) == ("semantic", STYLE.depth)
    assert (done.results["attention"].kind, done.results["attention"].rewritten) == ("quantizing", 2 * STYLE.depth)
    (node,) = done.nodes("sla_attention", "blocks")
    assert node.args[5:] == (0.5, 16, 16, "softmax", "fp8")
    assert len(done.nodes("sage_attention", "blocks")) == 1  # cross-attention
    weights = done.program.graphs["blocks"].weights
    assert weights["attn.proj_l.weight"] == Load(".attn.proj_l.weight", (16, 16), torch.float32)
    assert weights["attn.proj_l.bias"] == Load(".attn.proj_l.bias", (16,), torch.float32)
    by_role = {site.role: site for site in attention_sites(done.program)}
    assert by_role["self"].sparsity == Sparsity(0.5, 16, 16, kept=1, blocks=1, tuned=True)
    assert by_role["self"].why == "the checkpoint was trained with SLA: it has proj_l"
    assert by_role["cross"].kind == "sage"


def test_auto_is_sla_where_the_checkpoint_is(rewrite):
    options = {"attention": {"kind": "auto"}}
    done = rewrite(zoo.build(STYLE), zoo.example(STYLE), until="attention", options=options, checkpoint=keys(True))
    assert done.results["attention"].kind == "exact"  # on a CPU the SLA stays in floating point
    assert done.nodes("sla_attention", "blocks")[0].args[-1] == "none"
    assert len(done.nodes("scaled_dot_product_attention", "blocks")) == 1


def test_an_untuned_sla_is_refused_unless_allowed_and_then_warned_of(rewrite):
    with pytest.warns(UserWarning, match="blocks:attn: no SLA, since the checkpoint was not trained with SLA"):
        done = rewrite(zoo.build(STYLE), zoo.example(STYLE), until="attention", options=sla_options())
    assert done.results["attention"].skipped[0][1:] == (sla.UNTUNED, STYLE.depth)
    assert sla.UNTUNED in [row.why for row in attention_sites(done.program, list(done.results.values()))]
    assert "sla_attention" not in done.ops("blocks")
    allowed = sla_options(allow_untuned=True)
    with pytest.warns(UserWarning, match="not trained with SLA"):
        done = rewrite(zoo.build(STYLE), zoo.example(STYLE), until="attention", options=allowed)
    assert done.program.graphs["blocks"].weights["attn.proj_l.weight"] == Zeros((16, 16), torch.float32)
    sites = attention_sites(done.program)
    assert untuned(sites) == ["blocks:attn"]
    assert "not trained with SLA" in next(site.why for site in sites if site.kind == "sla")


class Plain(nn.Module):
    """Self-attention of x, or of x and another sequence of the same length, with what SLA cannot do."""

    def __init__(self, other: bool, **options):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.other, self.options = other, options

    def forward(self, x, y):
        y = y if self.other else x
        q, k, v = (t.unflatten(-1, (1, 16)).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        return F.scaled_dot_product_attention(q, k, v, **self.options)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Plain(True), "projections of the same tokens"),
        (Plain(False, is_causal=True), "mask"),
        (Plain(False, scale=1.0), "scale"),
    ],
)
def test_sla_is_for_plain_self_attention(model, reason, rewrite):
    args = (torch.randn(1, 8, 16), torch.randn(1, 8, 16))
    options = {"attention": {"kind": "sla", "allow_untuned": True}}
    done = rewrite(model, args, until="attention", options=options)
    assert done.results["attention"].rewritten == 1
    result = done.results["sla"]  # in the report with its reason, though it rewrote nothing
    assert (result.sites, result.rewritten) == (1, 0)
    assert reason in result.skipped[0][1]


def test_the_kind_of_the_pass_follows_its_options():
    kinds = [
        ({"kind": "native"}, "sm90", "exact"),
        ({"kind": "sage"}, "cpu", "quantizing"),
        ({"kind": "sla"}, "cpu", "exact"),
        ({"kind": "sla", "pv": "fp16"}, "cpu", "quantizing"),
        ({"kind": "sla"}, "sm80", "quantizing"),
        ({"kind": "sla", "pv": "none"}, "sm80", "exact"),
        ({"kind": "auto"}, "cpu", "exact"),
        ({"kind": "auto"}, "sm80", "exact"),  # where nobody measured Sage
        ({"kind": "auto"}, "sm90", "quantizing"),
        ({"kind": "auto", "pv": "none"}, "sm90", "exact"),
    ]
    for options, target, kind in kinds:
        assert attention.kind_of(attention_options(options, target)) == kind
    assert attention_options({}, "sm86").pv == "fp16"
    assert attention_options({}, "sm120").pv == "fp8"


def attention_options(options, target):
    return resolve(Settings.from_dict({"target": target, "passes": {"attention": options}})).attention


def test_the_graph_before_and_after(form, shown):
    shown("attention", form(FORMS["bmm over batch and heads"]), qkv(), "attention")
