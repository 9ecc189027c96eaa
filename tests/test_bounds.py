"""Nothing right is refused and nothing wrong is built: random DiTs, planted faults, and what a build then does.

What models at random show is shown on few here; `tests/random_dits.py` and `tests/faults.py` run on hundreds.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbocompile
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.errors import RecipeError, VerificationError
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import is_op
from turbocompile.numerics.inputs import random_inputs
from turbocompile.numerics.normal_forms import wrong_forms
from turbocompile.numerics.program_values import Weights
from turbocompile.rewrite import normalize, pipeline, run_pass, simplify

sys.path.insert(0, str(Path(__file__).parent))
import faults
import random_dits

aten = torch.ops.aten
# Engine and model round in other places, each some hundred times; of two such sums one may be half as large again.
AS_NEAR = 1.5


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_random_dit_is_refused_for_rounding(seed, dtype):
    outcome = random_dits.compiled(seed, dtype)
    assert outcome.warnings == ()
    assert outcome.rewritten > 0
    assert outcome.engine <= AS_NEAR * outcome.eager


def test_a_random_dit_is_the_same_for_the_same_seed_and_takes_several_sizes():
    (one, calls), (other, _) = (random_dits.random_dit(3, calls=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert calls[0][0][0].shape[1] == calls[1][0][0].shape[1] + 3
    for args, kwargs in calls:
        assert one(*args, **kwargs).isfinite().all()
    assert not random_dits.draw(0).layer_constants


@pytest.mark.parametrize(("seed", "dtype"), [(2, torch.float32), (5, torch.bfloat16), (8, torch.float32)])
def test_planted_faults_are_left_out_of_the_engine(seed, dtype):
    """Each of ten faults changes the numbers where nothing is verified; where rewrites are, it is warned of instead."""
    case = faults.Case(seed, dtype)
    names = case.passes()
    verdicts, number = [], 0
    while len(verdicts) < 10:
        verdict = case.judge(number, names[number % len(names)])
        verdicts += [verdict] if verdict is not None else []
        number += 1
    assert [v for v in verdicts if not v.caught] == []


# ------------------------------------------------------------------------------------------------------ whole models


class FusedBlock(nn.Module):
    """addcmul modulation, one qkv linear taken apart by unbind, and attention of scaled queries written out."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.modulation, self.qkv, self.out = nn.Linear(dim, 6 * dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))

    def forward(self, x, c):
        b, n, dim = x.shape
        d = dim // self.heads
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        q, k, v = self.qkv(y).view(b, n, 3, self.heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * d**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = torch.addcmul(x, gate1, self.out(y.transpose(1, 2).reshape(b, n, dim)))
        y = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.down(F.gelu(self.up(y), approximate="tanh")))


class Fused(nn.Module):
    def __init__(self, dim=256, heads=4, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(FusedBlock(dim, heads) for _ in range(depth))

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x


@pytest.mark.parametrize("gain", [1.0, 8.0], ids=["as initialized", "sharp attention and large values"])
def test_a_dit_of_addcmul_unbind_and_scaled_queries_builds(gain):
    torch.manual_seed(0)
    model = Fused().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= gain if parameter.dim() > 1 else 1.0
    args = (torch.randn(2, 200, 256), torch.randn(2, 256))
    engine = turbocompile.optimize(model, args)
    assert engine.report.warnings == ()
    passes = engine.report.passes
    assert [passes[n].rewritten for n in ("attention", "adaln", "residual_norm")] == [3, 6, 6]
    truth = copy.deepcopy(model).double()(*(t.double() for t in args))
    errors = [random_dits.relative_l2(f(*args), truth) for f in (engine, model)]
    assert errors[0] <= AS_NEAR * errors[1]


@pytest.mark.parametrize("target", ["cpu", "sm90"])
def test_a_chroma_transformer_in_bfloat16_is_nearer_to_float64_than_eager(target):
    """Its RMSNorms name no eps: in 16 bits that is float32's, and not the type's own."""
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(0)
    model = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=3,
    ).eval().bfloat16().requires_grad_(False)  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 24, 32),
        "img_ids": torch.rand(16, 3), "txt_ids": torch.rand(24, 3), "timestep": torch.tensor([0.7]),
    }  # fmt: skip
    call = {k: v.bfloat16() for k, v in call.items()}
    passes = {"attention": {"kind": "native"}, "w8a8": {"enabled": False}}
    engine = turbocompile.optimize(model, (), call, recipe={"passes": passes}, target=target)
    assert engine.report.warnings == ()
    assert engine.report.passes["residual_norm"].rewritten > 10
    truth = copy.deepcopy(model).double()(**{k: v.double() for k, v in call.items()}).sample
    errors = [random_dits.relative_l2(f(**call).sample, truth) for f in (engine, model)]
    assert errors[0] <= 1.1 * errors[1]


# --------------------------------------------------------------------------------------------------- what a build does

X = (torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0)),)


class Small(nn.Module):
    """Blocks of a pre-norm and a GELU, behind a tanh of the shell's."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(SmallBlock() for _ in range(3))

    def forward(self, x):
        x = (x - 0.1) / 3.0
        for block in self.blocks:
            x = block(x)
        return x


class SmallBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.gain, self.modulation = nn.Parameter(torch.randn(32)), nn.Linear(32, 64)

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        scale, shift = self.modulation(x.mean(1, keepdim=True)).chunk(2, dim=-1)
        y = F.layer_norm(self.down(F.gelu(self.up(y))), (32,)) * (1 + scale) + shift
        return x + scale * y


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def close(engine, model, *args):
    found, expected = engine(*args), model(*args)
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_a_graph_whose_normal_form_is_wrong_is_built_as_it_was_captured(small, monkeypatch, tmp_path):
    """A rule that forgets a sign: the shell, which has a difference, stays; the blocks are rewritten."""

    def forgets(node, make):
        return aten.add.Tensor, (node.args[0], node.args[1])

    for overload in (aten.sub.Tensor, aten.sub.Scalar):
        monkeypatch.setitem(simplify.RULES, overload, [forgets])
    engine = turbocompile.optimize(small, X)
    (said,) = engine.report.warnings
    assert said.startswith("the graph 'shell' is built as it was captured, and no pass rewrites it: its normal form is")
    assert "another function: in float64 the largest difference is" in said
    assert engine.report.passes["norms"].rewritten > 0
    assert close(engine, small, *X)
    engine.save(tmp_path / "engine")
    assert torch.equal(turbocompile.load(tmp_path / "engine")(*X), engine(*X))


def test_a_graph_without_a_normal_form_is_built_as_it_was_captured_at_all_shapes(small, monkeypatch):
    def fails(node, make):
        raise KeyError("no such rule")

    monkeypatch.setitem(simplify.RULES, aten.gelu.default, [fails])
    other = (torch.randn(1, 7, 32),)
    engine = turbocompile.optimize(small, [(X, {}), (other, {})])
    (said,) = engine.report.warnings
    assert "'blocks' is built as it was captured" in said
    assert "it has no normal form (KeyError: 'no such rule')" in said
    assert engine.report.passes["norms"].rewritten == 0
    assert close(engine, small, *X)
    assert close(engine, small, *other)


@pytest.mark.parametrize("where", ["rule", "candidates", "clean-up"])
def test_a_pass_that_fails_costs_its_sites_and_not_the_build(small, monkeypatch, where):
    norms = pipeline.load_pass("norms")
    rule = norms.rules[0]

    def fails(*args):
        raise ZeroDivisionError("a pass divided by zero")

    changed = {"rule": {"function": fails}, "candidates": {"candidates": fails}, "clean-up": {}}[where]
    broken = replace(norms, rules=[replace(rule, **changed), *norms.rules[1:]])
    load, clean = pipeline.load_pass, run_pass.clean
    monkeypatch.setattr(pipeline, "load_pass", lambda name: broken if name == "norms" else load(name))
    if where == "clean-up":
        has_norm = lambda sub: any(is_op(n, aten.rms_norm.default) for n in sub.graph.nodes)  # noqa: E731
        monkeypatch.setattr(run_pass, "clean", lambda sub, mode: fails() if has_norm(sub) else clean(sub, mode))
    engine = turbocompile.optimize(small, X)
    assert engine.report.passes["norms"].rewritten == 0
    assert engine.report.passes["adaln"].rewritten == 3
    (said,) = (w for w in engine.report.warnings if "left blocks:" in w)
    assert said.startswith("the pass 'norms' left")
    assert "ZeroDivisionError: a pass divided by zero" in said
    assert close(engine, small, *X)


def test_what_a_user_asked_for_and_cannot_have_is_no_fault_of_a_pass(small, monkeypatch):
    norms, load = pipeline.load_pass("norms"), pipeline.load_pass

    def refuses(m):
        raise RecipeError("not with these options")

    broken = replace(norms, rules=[replace(norms.rules[0], function=refuses)])
    monkeypatch.setattr(pipeline, "load_pass", lambda name: broken if name == "norms" else load(name))
    with pytest.raises(RecipeError, match="not with these options"):
        turbocompile.optimize(small, X)


def test_a_site_that_one_shape_alone_rewrites_is_left_alone_at_all(small, monkeypatch):
    adaln, load = pipeline.load_pass("adaln"), pipeline.load_pass
    function = adaln.rules[0].function

    def at_one_shape(m):
        return function(m) if m.root.meta["val"].shape[1] == 12 else "not at this shape"

    broken = replace(adaln, rules=[replace(adaln.rules[0], function=at_one_shape)])
    monkeypatch.setattr(pipeline, "load_pass", lambda name: broken if name == "adaln" else load(name))
    other = (torch.randn(1, 7, 32),)
    engine = turbocompile.optimize(small, [(X, {}), (other, {})])
    assert engine.report.passes["adaln"].rewritten == 0
    assert engine.report.passes["residual_norm"].rewritten == 3
    (said,) = engine.report.warnings
    assert "the pass 'adaln' left blocks: as it was: rewritten at one shape and not at another" in said
    assert close(engine, small, *X)
    assert close(engine, small, *other)


def test_a_graph_that_is_finite_in_its_own_type_alone_fails_the_build():
    """Nothing can be measured: 256.01 is 256 in bfloat16, and their difference no negative number."""

    class Rounded(nn.Module):
        def forward(self, x):
            y = x * 0 + 256
            return (y - (y + 0.01)).sqrt() + x

    with pytest.raises(VerificationError, match="is not finite in float64 where it is in"):
        turbocompile.optimize(Rounded(), (torch.randn(2, 8, 16).bfloat16(),))


def written_table(dtype):
    """A table that is filled in place, in its two halves."""
    table = torch.zeros(12, 32, dtype=dtype)
    angles = torch.arange(12, dtype=torch.float32)[:, None] / torch.tensor(3.0) ** torch.arange(16)
    table[:, 0::2], table[:, 1::2] = angles.sin() / 3, angles.cos() / 3
    return table * 1.1


def cast_table(dtype):
    angles = torch.arange(12, dtype=torch.float32)[:, None] / torch.tensor(3.0) ** torch.arange(32)
    return (angles.cos() / 3).to(dtype)


@pytest.mark.parametrize("table", [written_table, cast_table])
def test_the_normal_form_of_a_16_bit_table_is_not_charged_with_its_rounding(table):
    """A table that is computed from constants and cast to bfloat16 is the model's own in float64, too."""

    class Table(nn.Module):
        def forward(self, x):
            return x * table(torch.bfloat16)

    program = capture(Table(), X)
    raw = program.copy()
    assert normalize.normalize(program) == {}
    inputs = random_inputs(program)
    weights = Weights(Evaluator(ModuleTensors(Table()), {**raw.constants, **program.constants}))
    assert wrong_forms(raw, program, weights, inputs) == {}
    node = next(n for n in program.shell.graph.nodes if is_op(n, aten.cos.default))
    node.target = aten.sin.default
    assert list(wrong_forms(raw, program, weights, inputs)) == ["shell"]
