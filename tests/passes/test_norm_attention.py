"""A quantized attention makes the k that it alone reads; others stay, each with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn
from turbocompile.passes.norm_attention import WITH_NORM

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.node_cost import node_cost
from turbocompile.ir.program import is_op
from turbocompile.numerics.program_values import Weights
from turbocompile.numerics.verifier import Verifier
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Settings
from turbocompile.report.attentions import attention_sites, chosen, untuned
from turbocompile.rewrite import match
from turbocompile.rewrite.facts import facts
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import run_passes, story
from turbocompile.runtime import tuning

F = nn.functional
BEFORE, AFTER = "gelu_quant", "norm_attention"
KINDS = {
    "sage": {"attention": {"kind": "sage", "pv": "fp16"}},
    "sla": {
        "attention": {"kind": "sla", "allow_untuned": True, "topk": 0.5, "block_q": 16, "block_k": 16, "pv": "fp8"}
    },
}
UNTUNED = pytest.mark.filterwarnings("ignore:.*not trained with SLA")
B, L, H, D = 1, 24, 2, 64
C = H * D


@UNTUNED
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_wan_makes_the_k_of_self_attention_alone_to_the_bit(kind, dtype, head_dim, wan, wan_call, rewrite):
    model, call = wan(attention_head_dim=head_dim).to(dtype), wan_call(dtype=dtype)
    options = KINDS[kind] | {"w8a8": {"format": "int8"}}
    before, done = (rewrite(model, (), call, until=u, options=options, target="sm90") for u in (BEFORE, AFTER))
    result = done.results[AFTER]
    assert (result.kind, result.sites, result.rewritten, result.skipped) == ("exact", 2, 2, ())
    (graph,) = [name for name in done.program.graphs if name != "shell"]
    (node,) = done.nodes(f"norm_{kind}_attention", graph)
    turned = done.nodes("qk_norm_rope", graph)
    assert [len(n.args[5]) for n in turned] == [3, 0, 0]  # q, and both of cross-attention
    assert node.args[0] is turned[0]
    assert len(done.ops(graph)) == len(before.ops(graph)) - 1
    outputs = [r.run(*call.values()) for r in (before, done)]
    assert torch.equal(*outputs)


@UNTUNED
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_said_of_an_attention_stays_said(kind, wan, wan_call, rewrite):
    """Its site, why it is what it is, its sizes, what tuning keeps; it counts k's norm and rotary besides."""
    before, done = (
        rewrite(wan(), (), wan_call(), until=u, options=KINDS[kind], target="sm90") for u in (BEFORE, AFTER)
    )
    rows = [attention_sites(r.program, list(r.results.values())) for r in (before, done)]
    for old, new in zip(*rows, strict=True):
        assert replace(new, cost=old.cost) == old
    assert rows[1][0].kind == kind
    assert untuned(rows[0]) == untuned(rows[1])
    assert chosen([before.program]) == chosen([done.program])
    devices = [tuning.attentions({"": r.program}, torch.device("cpu")) for r in (before, done)]
    assert devices[0] == devices[1] != {}
    (graph,) = [name for name in done.program.graphs if name != "shell"]
    key, old = before.nodes("qk_norm_rope", graph)[1], before.nodes(f"{kind}_attention", graph)[0]
    (new,) = done.nodes(f"norm_{kind}_attention", graph)
    apart, whole = [node_cost(key), node_cost(old)], node_cost(new)
    assert sum(whole[0].values()) == sum(sum(work.values()) for work, _ in apart)
    assert whole[1] == sum(moved for _, moved in apart) - 2 * key.meta["val"].numel() * 4  # k is not written and read
    assert facts(new).origins == facts(key).origins | facts(old).origins
    assert facts(new).passes[-1] == AFTER
    assert set(facts(new).passes) > {"attention", "qk_norm_rope"}


class Attend(nn.Module):
    """Attention of x (B, L, C) whose k is rotated, with q and k prepared by `prepare(t, module)`."""

    def __init__(self, head_dim=D, per_head=False, halves=False, rotary=True, also=None):
        super().__init__()
        self.head_dim, self.per_head, self.halves, self.rotary, self.also = head_dim, per_head, halves, rotary, also
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in "qkv")
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(head_dim if per_head else C))
        angles = torch.outer(torch.arange(L).double(), 0.5 ** torch.arange(head_dim // 2)).float()
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.requires_grad_(False)

    def prepare(self, t):
        t = t.unflatten(-1, (-1, self.head_dim)) if self.per_head else t
        t = F.rms_norm(t, self.weight.shape, self.weight, 1e-6)
        t = t if self.per_head else t.unflatten(-1, (-1, self.head_dim))
        if not self.rotary:
            return t
        a, b = t.chunk(2, -1) if self.halves else t.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        turned = [a * cos - b * sin, b * cos + a * sin]
        return torch.cat(turned, -1) if self.halves else torch.stack(turned, -1).flatten(-2)

    def forward(self, x):
        q, k = self.prepare(self.q(x)), self.prepare(self.k(x))
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        q, v = (k if self.also == name else t for name, t in (("q", q), ("v", v)))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
        return out + k.flatten(2) if self.also == "sum" else out


def rewritten(rewrite, model, kind="sage", **options):
    x = torch.randn(B, L, C, generator=torch.Generator().manual_seed(0))
    given = KINDS[kind] | options
    before, done = (rewrite(model, (x,), until=u, options=given, target="sm90") for u in (BEFORE, AFTER))
    assert torch.equal(before.run(x), done.run(x))
    return done


def test_one_attention_of_one_axis(rewrite):
    done = rewritten(rewrite, Attend())
    assert done.results[AFTER].rewritten == 1
    (node,) = done.nodes("norm_sage_attention")
    assert node.args[7] == [L]
    assert done.ops().count("qk_norm_rope") == 1


class Twice(Attend):
    """An attention without rotary before the one with it."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, D)).transpose(1, 2) for t in (self.q(x), self.k(x + 1), self.v(x)))
        return super().forward(x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_second_attention_of_a_module_keeps_its_name(rewrite):
    done = rewritten(rewrite, Twice())
    assert [row.site for row in attention_sites(done.program)] == ["shell:", "shell:#2"]
    assert done.ops().index("sage_attention") < done.ops().index("norm_sage_attention")


STAYS = {
    "read by a sum": (Attend(also="sum"), "something else reads k, too"),
    "q as well": (Attend(also="q"), "something else reads k, too"),
    "v as well": (Attend(also="v"), "something else reads k, too"),
    "a norm over each head": (Attend(per_head=True), "over each head"),
    "halves": (Attend(halves=True), "halves of a head"),
    "heads of 32": (Attend(head_dim=32), "the heads have 32 channels, and the kernel takes 64 or 128"),
}


@UNTUNED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STAYS)
def test_what_stays_has_its_reason(name, kind, rewrite):
    model, reason = STAYS[name]
    done = rewritten(rewrite, model, kind)
    assert (done.results[AFTER].sites, done.results[AFTER].rewritten) == (1, 0)
    assert reason in done.reasons(AFTER)[0]
    assert f"{kind}_attention" in done.ops()


@UNTUNED
@pytest.mark.parametrize(
    ("model", "kind", "options"),
    [
        (Attend(rotary=False), "sage", {}),
        (Attend(), "sage", {"attention": {"kind": "native"}}),
        (Attend(), "sla", {"attention": KINDS["sla"]["attention"] | {"pv": "none"}}),
        (Attend(), "sage", {"qk_norm_rope": {"enabled": False}}),
    ],
    ids=["no rotary", "native", "an SLA in floating point", "k by several ops"],
)
def test_what_is_no_site(model, kind, options, rewrite):
    assert rewritten(rewrite, model, kind, **options).results[AFTER].sites == 0


def test_a_recipe_switches_it_off(rewrite):
    done = rewritten(rewrite, Attend(), norm_attention={"enabled": False})
    assert done.results[AFTER].rewritten == 0
    assert "switched off" in done.reasons(AFTER)[0]


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_grouped_heads(kv_heads, rewrite):
    """The norm of one head is that of all channels."""
    style = zoo.Style(head_dim=64, qk_norm="channels", rope="stacked", num_kv_heads=kv_heads, depth=1)
    model, args = zoo.build(style), zoo.example(style)
    before, done = (rewrite(model, args, until=u, options=KINDS["sage"]) for u in (BEFORE, AFTER))
    (node,) = (n for graph in done.program.graphs for n in done.nodes("norm_sage_attention", graph))
    assert node.args[1].meta["val"].shape[-1] == kv_heads * 64
    assert torch.equal(before.run(*args), done.run(*args))


def verified(model, kind, dtype, extra=()):
    """The results of all passes, each measured."""
    model = model.to(dtype)
    x = torch.randn(B, L, C, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"attention": {**KINDS[kind]["attention"], "budget": 1.0}, "w8a8": {"format": "off"}}
    program = capture(model, (x,), {})
    normalize(program)
    resolved = resolve(Settings.from_dict({"target": "sm90", "passes": options}))
    verifier = Verifier(program, Weights(Evaluator(ModuleTensors(model), program.constants)), resolved)
    return {r.name: r for r in run_passes(program, resolved, verifier, passes=[*story(), *extra])}


@UNTUNED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_verification_finds_it_exact(kind, dtype):
    """What the attention's own quantization costs is not charged to it."""
    result = verified(Attend(), kind, dtype)[AFTER]
    assert result.rewritten == 1
    assert result.error["rel_l1"] < 1e-6


@UNTUNED
@pytest.mark.parametrize("place", [4, 5], ids=["another eps", "cos for sin"])
@pytest.mark.parametrize("kind", KINDS)
def test_verification_finds_another_k(kind, place):
    @match.rewrite(candidates=lambda sub: [n for n in sub.graph.nodes if is_op(n, *WITH_NORM.values())])
    def wrong(m):
        args = list(m.root.args)
        args[place] = m.root.args[6] if place == 5 else 1.0
        return m.op(m.root.target, *args)

    result = verified(Attend(), kind, torch.float32, [match.Pass("wrong", "exact", [wrong], needs=(AFTER,))])["wrong"]
    assert result.rewritten == 0
    assert all("changes the numbers" in reason for reason in result.vetoed.values())
