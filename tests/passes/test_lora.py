"""Adapters that run beside a linear join its weight, and what is not exactly that stays."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

import turbocompile
from turbocompile.ir.weights import AddLora, Cast

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
C, RANK = 32, 4


class Adapted(nn.Module):
    """A residual linear with adapters beside it. form: how they are written."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.base = form, nn.Linear(C, C, bias=form != "bias alone")
        self.down, self.up = nn.Linear(C, RANK, bias=False), nn.Linear(RANK, C, bias="bias" in form)
        self.down2, self.up2 = nn.Linear(C, 2, bias=False), nn.Linear(2, C, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        y, adapter = self.base(x), self.up(self.down(x))
        added = {
            "scaled": lambda: y + adapter * 0.5,
            "first": lambda: -2 * adapter + y,
            "plain": lambda: y + adapter,
            "minus": lambda: y - adapter,
            "minus inside": lambda: y + self.up(-self.down(x)),
            "inside": lambda: y + self.up(self.down(x) * 0.5),
            "two": lambda: y + adapter * 0.5 + self.up2(self.down2(x)) * 2.0,
            "bias": lambda: y + adapter * 0.5,
            "bias alone": lambda: adapter * 0.5 + y,
            "learned": lambda: y + adapter * self.gain,
            "another input": lambda: y + self.up(self.down(x + 1)),
            "bent": lambda: y + self.up(self.down(x).relu()),
            "of its output": lambda: y + self.up(self.down(y)),
        }
        return x + added[self.form]().tanh().sin().cos().exp().tanh()


def stack(form, dtype=torch.float32):
    torch.manual_seed(0)
    model = zoo.Stack(lambda: Adapted(form)).eval().requires_grad_(False).to(dtype)
    return model, (torch.randn(2, 6, C, dtype=dtype),)


@pytest.mark.parametrize(
    ("form", "count"),
    {
        "scaled": 1,
        "first": 1,
        "plain": 1,
        "minus": 1,
        "minus inside": 1,
        "inside": 1,
        "two": 2,
        "bias": 1,
        "bias alone": 1,
    }.items(),
)
def test_adapters_join_the_weight(form, count, rewrite, assert_same):
    model, args = stack(form)
    done = rewrite(model, args)
    assert done.results["lora"].rewritten == done.results["lora"].sites == 2 * count
    assert done.ops("blocks").count("linear") == 1
    assert_same(done.run(*args), model(*args))


STAYS = {
    "learned": "its scale is computed in the graph",
    "another input": "it is no linear(x)",
    "of its output": "it is no linear(x)",
    "bent": None,  # no candidate
}


@pytest.mark.parametrize(("form", "reason"), STAYS.items())
def test_what_is_no_sum_of_weights_stays(form, reason, rewrite, assert_same):
    model, args = stack(form)
    done = rewrite(model, args)
    assert "lora" not in done.results or done.results["lora"].rewritten == 0
    if reason:
        assert reason in done.reasons("lora")[0]
    assert ("lora" in done.results) == (reason is not None)
    assert_same(done.run(*args), model(*args))


def test_a_weight_of_16_bits_is_rounded_once_and_is_as_near_to_the_truth_as_the_adapter_was(rewrite):
    model, args = stack("two", torch.bfloat16)
    done = rewrite(model, args)
    stored = [e for e in done.program.graphs["blocks"].weights.values() if isinstance(e, Cast)]
    assert [(e.dtype, type(e.of), e.of.dtype) for e in stored] == [(torch.bfloat16, AddLora, torch.float32)]
    truth = model.double()(*(a.double() for a in args))
    model.to(torch.bfloat16)
    found, eager = (float((y.double() - truth).norm()) for y in (done.run(*args), model(*args)))
    assert found <= 1.1 * eager  # of 384 values, whose mean error varies by 1 / sqrt(384) = 5%, twice


DORAS = {
    "alone": [(4, True, 1.0)],
    "of another scale": [(4, True, 0.3)],
    "subtracted": [(4, True, -1.0)],
    "before a LoRA": [(4, True, 0.5), (2, False, -1.0)],
    "after a LoRA": [(2, False, 1.0), (4, True, 0.5)],
    "two": [(4, True, 1.0), (3, True, 1.0)],
}
NOT_FOLDED = {"after a LoRA": 1, "two": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", DORAS)
def test_dora_joins_the_weight_where_no_other_adapter_stands_before_it(case, bias, dtype, rewrite):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, 2 * C, bias=bias), nn.Tanh(), nn.Linear(2 * C, 300, bias=bias))
    names = []
    for i, (rank, dora, scale) in enumerate(DORAS[case]):
        config = peft.LoraConfig(
            r=rank, lora_alpha=scale * rank, use_dora=dora, target_modules=["0", "2"], init_lora_weights=False
        )
        peft.inject_adapter_in_model(config, model, f"a{i}")
        names.append(f"a{i}")
    for i in (0, 2):
        model[i].set_adapter(names)
        for magnitude in model[i].lora_magnitude_vector.values():
            magnitude.weight.data *= 1 + 0.2 * torch.randn_like(magnitude.weight)
    model.requires_grad_(False).eval().to(dtype)
    args = (torch.randn(2, 6, C, dtype=dtype),)
    done = rewrite(model, args)
    left = NOT_FOLDED.get(case, 0)
    assert done.results["lora"].rewritten == 2 * (len(names) - left)
    assert len(done.reasons("lora")) == 2 * left
    if not left:
        assert done.ops().count("linear") == 2
    eager = model(*args).double()
    truth = model.double()(*(a.double() for a in args))
    size = truth.norm()
    assert (done.run(*args).double() - truth).norm() <= 1.1 * (eager - truth).norm() + 2e-6 * size


def test_the_recipe_keeps_adapters_apart(rewrite, assert_same):
    model, args = stack("scaled")
    done = rewrite(model, args, options={"lora": {"enabled": False}})
    assert done.ops("blocks").count("linear") == 3
    assert_same(done.run(*args), model(*args))


@pytest.fixture(scope="module")
def sites():
    """sites(engine): what each pass did, without the pass lora."""

    def of(engine):
        return {name: (p.sites, p.rewritten) for name, p in engine.report.passes.items() if name != "lora"}

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_a_wan_with_adapters_of_peft_has_the_sites_of_one_without(dtype, dora, wan, wan_call, sites, tmp_path):
    peft = pytest.importorskip("peft")
    call, recipe = {**wan_call(dtype=dtype), "return_dict": False}, {"passes": {"w8a8": {"format": "off"}}}
    plain = turbocompile.optimize(wan().to(dtype), kwargs=call, recipe=recipe)
    model = wan()
    for name, rank, targets in (("a", 4, TARGETS), ("b", 2, ["to_q", "to_v"])):
        config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=targets, use_dora=dora and name == "a")
        model.add_adapter(config, adapter_name=name)
    model.set_adapters(["a", "b"], [0.7, -0.3])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    model.requires_grad_(False).to(dtype)
    engine = turbocompile.optimize(model, kwargs=call, recipe=recipe)
    assert sites(engine) == sites(plain)
    folded = engine.report.passes["lora"]
    assert folded.rewritten == folded.sites == 2 * (10 + 4)  # layers x (ten linears, and q and v of two attentions)
    truth, found = model(**call)[0], engine(**call)[0]
    error = float((found.double() - truth.double()).norm() / truth.double().norm())
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)  # some hundred roundings, each of 2^-9, halved by chance
    loaded = turbocompile.load(engine.save(tmp_path / "engine"))
    assert torch.equal(loaded(**call)[0], found)
    model.disable_adapters()
    off = turbocompile.optimize(model, kwargs=call, recipe=recipe)
    assert "lora" not in off.report.passes
    assert sites(off) == sites(plain)
