"""Models that torchao quantized, and engines whose weights torchao runs."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import dequantize, quantize

import turbocompile
from turbocompile.capture.module_weights import quantized
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.runtime.to_torchao import to_torchao

ROOT = Path(__file__).parents[2]
# Relative L1 of one linear on N(0, 1) inputs against the exact product (tests/passes/test_w8a8.py). Half of that
# error's square is the weight's and half the activation's. Where two quantizers share the weight and differ in the
# activation's grid, their results differ by the root of twice the activation's part: by the same figure. Two blocks
# stay below twice.
ONE_LINEAR = {"int8": 0.012, "fp8": 0.037}
EXACT = 1e-5  # of the largest value: what an exact rewrite may change in float32
# Before 2.13 torch multiplies no FP8 with a scale for each row on a CPU.
needs_fp8_rows = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13), reason="torch < 2.13"
)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (linear(y).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


LINEARS = ("down", "out", "to_k", "to_q", "to_v", "up")


class Model(nn.Module):
    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(32, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ao(monkeypatch):
    """torchao.quantization, which quantizes to FP8 on this machine too (it asks for a card that multiplies it)."""
    import torchao.quantization.quant_api

    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return torchao.quantization


def config(ao, format: str, **options):
    if format == "int8":
        return ao.Int8DynamicActivationInt8WeightConfig(version=2, **options)
    return ao.Float8DynamicActivationFloat8WeightConfig(**{"granularity": ao.PerRow(), **options})


def in_blocks(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("blocks.")


def optimize(model: nn.Module, x: torch.Tensor, format: str = "auto") -> nn.Module:
    return turbocompile.optimize(model, x, recipe={"passes": {"w8a8": format}})


def rel_l1(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).abs().sum() / truth.abs().sum())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


# ------------------------------------------------------------------------------------------------------ from torchao


@pytest.mark.parametrize("format", ["int8", pytest.param("fp8", marks=needs_fp8_rows)])
def test_an_engine_takes_data_and_scale_as_they_are_and_answers_as_torchao_does(ao, model, x, format):
    """In bfloat16, which torchao asks for row-wise FP8 in."""
    model, x = model.bfloat16(), x.bfloat16()
    ao.quantize_(model, config(ao, format), in_blocks)
    weights = dict(model.named_parameters())
    expected = model(x)
    engine = optimize(model, x, format)
    assert engine.report.to_dict()["passes"]["w8a8"]["rewritten"] == 12
    assert rel_l1(engine(x), expected) <= 2 * ONE_LINEAR[format]
    for i in range(2):
        attention = [weights[f"blocks.{i}.to_{n}.weight"] for n in "qkv"]
        for name, parts in (("up", [weights[f"blocks.{i}.up.weight"]]), ("to_q_to_k_to_v", attention)):
            found = [engine.weights[f"blocks.{i}.{name}.{format}_{part}"] for part in ("weight", "scale")]
            for mine, part in zip(found, ("qdata", "scale"), strict=True):
                assert torch.equal(bits(mine), torch.cat([bits(getattr(w, part).to(mine.dtype)) for w in parts]))
    # The model is what it was: the same tensors, the same answer.
    assert all(p is weights[n] for n, p in model.named_parameters())
    assert torch.equal(model(x), expected)


def test_one_int8_linear_is_within_half_a_step_of_both_grids(ao):
    """torchao's step is amax / 127.5, with the largest value clamped to 127; ours is amax / 127. Each rounds by half a
    step at most (torchao's clamp is one too), and the weights are the same.
    """
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 48).requires_grad_(False), torch.randn(64, 96)
    ao.quantize_(linear, config(ao, "int8"))
    weight = quantized("weight", linear.weight)
    found = ops.w8a8_linear(*ops.quantize(x, "int8"), weight.data, weight.scale, linear.bias, "int8", x.dtype)
    amax, columns = x.abs().amax(1, keepdim=True), linear.weight.dequantize().abs().sum(1)
    bound = amax * (1 / 254 + 1 / 255) * columns + EXACT * found.abs().max()
    difference = (found - linear(x)).abs()
    assert bool((difference <= bound).all())
    assert bool(difference.any())  # the grids do differ


@needs_fp8_rows
def test_fp8_in_float32_is_the_same_quantizer(ao, model, x):
    """Both scale by amax / 448 and round to the nearest e4m3: an activation may fall on the other side of a tie, a few
    in 10^5, and moves one token's result by under a hundredth.
    """
    to_torchao(optimize(model, x, "fp8"), model)
    assert rel_l1(optimize(model, x, "fp8")(x), model(x)) <= 1e-3


def test_wan_of_diffusers(ao, wan, wan_call):
    model, call = wan(), wan_call()
    ao.quantize_(model, config(ao, "int8"), in_blocks)
    with torch.no_grad():
        expected = model(**call).sample
    engine = turbocompile.optimize(model, kwargs=call, recipe={"passes": {"w8a8": "int8"}})
    assert engine.report.to_dict()["passes"]["w8a8"]["rewritten"] == 20
    assert rel_l1(engine(**call).sample, expected) <= 2 * ONE_LINEAR["int8"]


@pytest.mark.parametrize("format", ["off", "auto", "fp8"])
def test_where_the_format_is_another_the_weight_is_dequantized(ao, model, x, format):
    """On a CPU `auto` is off: the engine is that of the model with torchao's dequantized weights."""
    plain = copy.deepcopy(model)
    ao.quantize_(model, config(ao, "int8"))  # the embedding too
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear):
            linear.weight = nn.Parameter(model.get_submodule(name).weight.dequantize(), requires_grad=False)
    expected = optimize(plain, x, format)(x)
    engine = optimize(model, x, format)
    assert (engine(x) - expected).abs().max() <= EXACT * expected.abs().max()
    if format == "fp8":
        data, scale = quantize(plain.blocks[0].up.weight, "fp8")
        assert torch.equal(bits(engine.weights["blocks.0.up.fp8_weight"]), bits(data))
        assert torch.equal(engine.weights["blocks.0.up.fp8_scale"], scale)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_one_scale_for_a_weight_is_the_scale_of_each_row(ao, model, x, format):
    ao.quantize_(model, config(ao, format, granularity=ao.PerTensor()), in_blocks)
    engine = optimize(model, x, format)
    weight, scale = model.blocks[1].down.weight, engine.weights[f"blocks.1.down.{format}_scale"]
    assert weight.scale.numel() == 1
    assert torch.equal(scale, weight.scale.expand(64, 1))
    # torchao's activations have one scale for all tokens: its error is larger, by the spread of the tokens' maxima.
    assert rel_l1(engine(x), model(x)) <= 2 * ONE_LINEAR[format]


def test_weight_only_models_are_exact_without_8_bit_linears(ao, model, x):
    for weight_only in (ao.Int8WeightOnlyConfig(version=2), ao.Float8WeightOnlyConfig()):
        given = copy.deepcopy(model)
        ao.quantize_(given, weight_only)
        expected = given(x)
        assert (optimize(given, x, "off")(x) - expected).abs().max() <= EXACT * expected.abs().max()


def test_blocks_of_another_format_are_another_graph(ao, model, x):
    ao.quantize_(model, config(ao, "int8"), lambda m, name: in_blocks(m, name) and name.startswith("blocks.1."))
    engine = optimize(model, x, "int8")
    program = next(iter(engine.programs.values()))
    assert [c.graph for c in program.calls()] == ["blocks", "blocks_1"]
    plain, taken = (engine.weights[f"blocks.{i}.up.int8_weight"] for i in range(2))
    assert torch.equal(plain, quantize(model.blocks[0].up.weight, "int8")[0])
    assert torch.equal(taken, model.blocks[1].up.weight.qdata)


def test_torch_compile_takes_them_too(ao, model, x):
    ao.quantize_(model, config(ao, "int8"), in_blocks)
    with torch.no_grad():
        expected, plain = model(x), copy.deepcopy(model)
        for name, linear in plain.named_modules():
            if in_blocks(linear, name):
                linear.weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
        exact = plain(x)
        found = torch.compile(model, backend="turbocompile")(x)
    assert (found - exact).abs().max() <= EXACT * exact.abs().max()
    assert rel_l1(found, expected) <= 2 * ONE_LINEAR["int8"]


REFUSED = {
    "asymmetric activations": lambda ao: config(ao, "int8", act_mapping_type=ao.MappingType.ASYMMETRIC),
    "fixed scales (act_quant_scale)": lambda ao: ao.Int8StaticActivationInt8WeightConfig(
        act_quant_scale=torch.tensor([[0.02]]), granularity=ao.PerTensor()
    ),
    "in blocks of [1, 32]": lambda ao: ao.Int8WeightOnlyConfig(version=2, granularity=ao.PerGroup(32)),
    "to torch.float8_e5m2": lambda ao: ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "activations that are clamped": lambda ao: config(ao, "fp8", granularity=ao.PerTensor(), activation_value_ub=2.0),
    "as IntxUnpackedToInt8Tensor": lambda ao: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_no_format_holds_is_refused_by_name_with_the_mend(ao, model, x, said):
    ao.quantize_(model, REFUSED[said](ao), lambda m, name: name == "blocks.1.up")
    with pytest.raises(UnsupportedError, match=re.escape(said)) as caught:
        optimize(model, x)
    assert str(caught.value).startswith("torchao quantized 'blocks.1.up.weight' ")
    assert "; quantize the model with" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_zeros_that_torchao_made_nan_are_refused(ao, model, x):
    """Its FP8 scale of such a row is 0, and 0 / 0 is stored; layers of diffusion transformers start at zero."""
    model.blocks[0].out.weight.data[3] = 0
    ao.quantize_(model, ao.Float8WeightOnlyConfig(), in_blocks)
    assert bool(model.blocks[0].out.weight.dequantize().isnan().any())
    with pytest.raises(UnsupportedError, match=r"'blocks\.0\.out\.weight' to NaN, as it does rows of zeros"):
        optimize(model, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_on_a_gpu_an_engine_answers_as_torchao_does_there_and_back(format):
    """torchao quantizes and multiplies on the card; `auto` takes the format that the weights have."""
    import torchao.quantization

    torch.manual_seed(0)
    model = Model(256).eval().requires_grad_(False).bfloat16().cuda()
    x = torch.randn(2, 100, 32, device="cuda", dtype=torch.bfloat16)
    given = copy.deepcopy(model)
    torchao.quantization.quantize_(given, config(torchao.quantization, format), in_blocks)
    expected = given(x)
    engine = optimize(given, x)
    linears = engine.report.to_dict()["passes"]["w8a8"]
    assert linears["rewritten"] == 12, linears
    assert rel_l1(engine(x), expected) <= 2 * ONE_LINEAR[format]
    assert torch.equal(bits(engine.weights[f"blocks.0.up.{format}_weight"]), bits(given.blocks[0].up.weight.qdata))
    mine = optimize(model, x, format)
    assert len(to_torchao(mine, model)) == 12
    assert model.blocks[0].up.weight.qdata.is_cuda
    assert rel_l1(model(x), mine(x)) <= 2 * ONE_LINEAR[format]


# ------------------------------------------------------------------------------------------------------- to torchao


@pytest.mark.parametrize("format", ["int8", pytest.param("fp8", marks=needs_fp8_rows)])
def test_torchao_runs_an_engines_weights(ao, model, x, tmp_path, format):
    engine = optimize(model, x, format)
    engine.save(tmp_path / "engine")
    given = copy.deepcopy(model)
    names = to_torchao(turbocompile.load(tmp_path / "engine"), given)
    assert names == [f"blocks.{i}.{name}" for i in range(2) for name in LINEARS]
    ours, theirs = (quantize(model.blocks[0].to_k.weight, format), given.blocks[0].to_k.weight)
    assert torch.equal(bits(theirs.qdata), bits(ours[0]))
    assert torch.equal(theirs.dequantize(), dequantize(*ours, format, torch.float32))
    assert rel_l1(given(x), engine(x)) <= 2 * ONE_LINEAR[format]
    # They are what quantize_ makes, down to what is asked of the activation, and they come back as they went.
    made = nn.Linear(64, 64, dtype=torch.bfloat16)
    ao.quantize_(made, config(ao, format))
    assert type(theirs) is type(made.weight)
    assert theirs.block_size == made.weight.block_size
    assert theirs.act_quant_kwargs == made.weight.act_quant_kwargs
    assert getattr(theirs, "mm_config", None) == getattr(made.weight, "mm_config", None)
    again = optimize(given, x, format)
    assert all(torch.equal(bits(w), bits(engine.weights[n])) for n, w in again.weights.items() if format in n)


def test_an_engines_device_and_the_models_dtype_are_kept(ao, model, x):
    engine, given = optimize(model, x, "int8"), copy.deepcopy(model).bfloat16()
    to_torchao(engine, given)
    assert given(x.bfloat16()).dtype == torch.bfloat16
    stored = engine.weights["blocks.0.up.int8_weight"]
    given.blocks[0].up.weight.qdata.zero_()
    assert bool(stored.any())  # not the engine's memory


def test_an_engine_that_does_not_fit_is_refused_before_the_model_is_changed(model, x):
    plain = dict(model.named_parameters())
    with pytest.raises(UnsupportedError, match="no 8-bit linear"):
        to_torchao(optimize(model, x, "off"), model)
    with pytest.raises(EngineError, match="call the module that optimize"):
        to_torchao(turbocompile.optimize(model), model)
    with pytest.raises(EngineError, match=r"Model has no linear 'blocks.0.\w+' with a weight of \[\d+, \d+\]"):
        to_torchao(optimize(model, x, "int8"), Model(32))
    wide = Model(128).requires_grad_(False)
    with pytest.raises(UnsupportedError, match="int8_block"):
        to_torchao(optimize(wide, x, "int8_block"), wide)
    assert all(p is plain[n] for n, p in model.named_parameters())


# -------------------------------------------------------------------------------------------------- without torchao


def test_without_torchao_the_way_there_is_refused(monkeypatch, model, x):
    monkeypatch.setitem(sys.modules, "torchao", None)  # what Python leaves of a package that must not be imported
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'turbocompile[torchao]'")):
        to_torchao(optimize(model, x, "int8"), model)
    assert type(model.blocks[0].up.weight) is nn.Parameter


def test_recognizing_imports_no_torchao():
    code = (
        "import sys, torch, turbocompile.runtime.to_torchao, turbocompile.capture.export as c;"
        "c.capture(torch.nn.Linear(4, 4), (torch.zeros(2, 4),)); print('torchao' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=True)
    assert done.stdout == "False\n"


def test_an_unknown_class_of_torchao_is_refused_by_where_it_is_defined(model, x):
    class Int4Tensor(torch.Tensor):
        pass

    Int4Tensor.__module__ = "torchao.quantization"
    model.blocks[0].up.weight = nn.Parameter(model.blocks[0].up.weight.as_subclass(Int4Tensor), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"'blocks.0.up.weight' as Int4Tensor.*filter_fn"):
        optimize(model, x)


def test_the_documents_code_runs(ao, model, x):
    page = (ROOT / "docs" / "torchao.md").read_text(encoding="utf-8")
    names = {"model": copy.deepcopy(model), "x": x}
    first, second = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    exec(first, names)
    assert rel_l1(names["engine"](x), names["model"](x)) <= 2 * ONE_LINEAR["int8"]
    names["model"] = model
    exec(second, names)
    assert rel_l1(names["model"](x), names["engine"](x)) <= 2 * ONE_LINEAR["int8"]
    assert len(names["names"]) == 12
