"""The tensorrt backend: plans for named cards, built without one; refusals in a sentence."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
import zoo
from torch.nn.functional import scaled_dot_product_attention as sdpa
from turbocompile.backends import tensorrt as backend
from turbocompile.backends import triton
from turbocompile.backends.onnx import write_model

import turbocompile
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.hardware import host_target

trt = pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxscript")

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def cards(plan):
    """The compute capabilities that a plan holds kernels for, as their code names them."""
    return set(re.findall(rb"sm_?(\d{2,3})", bytes(plan)))


@pytest.fixture
def on_a(monkeypatch):
    """on_a(name, capability): pretends that this machine has that card."""

    def pretend(name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


# ----------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("rewritten", [False, True], ids=["passes off", "all exact passes"])
def test_wan_builds_for_sm120_on_any_machine(tiny, exact, tmp_path, rewritten):
    it = tiny(exact if rewritten else None)
    it.write_weights(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    files = backend.emit(it.program, it.weights, tmp_path, "transformer-a", "sm120")
    assert files == ["transformer-a-sm120.plan"]
    assert {p.name for p in tmp_path.iterdir()} == before | set(files)
    plan = (tmp_path / files[0]).read_bytes()
    assert cards(plan) == {b"120"}
    linears = [t for k, t in it.weights.items() if k.endswith("ffn.net.2.weight")]
    assert len(linears) == 2
    for weight in linears:  # the plan holds the weights, transposed or not
        assert any(w.contiguous().numpy().tobytes() in plan for w in (weight, weight.T))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """The ONNX file of a model with grouped heads and 17 tokens of both kinds, in float32."""
    from turbocompile.capture.export import capture
    from turbocompile.capture.module_weights import ModuleTensors
    from turbocompile.ir.emit import weight_plan
    from turbocompile.ir.evaluate import Evaluator

    style = zoo.Style(num_heads=4, num_kv_heads=2, joint=True, depth=1)
    model = zoo.build(style)
    program = capture(model, zoo.example(style))
    evaluate = Evaluator(ModuleTensors(model), program.constants)
    weights = {name: evaluate(e.expr, e.prefix) for name, e in weight_plan({"x": program}).items()}
    folder = tmp_path_factory.mktemp("onnx")
    return folder / write_model(program, weights, folder, "model", "tensorrt")[0]


@pytest.mark.parametrize("target", backend.TARGETS)
def test_a_plan_is_for_the_card_that_is_named(model_file, target):
    assert cards(backend.build_plan(model_file, target)) == {target.removeprefix("sm").encode()}


def test_float32_attention_without_a_fused_kernel_needs_the_mark(model_file):
    """What build_plan sets is needed: without it TensorRT refuses grouped heads in float32."""
    log = backend._logger()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse(model_file.read_bytes(), str(model_file))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    assert builder.build_serialized_network(network, config) is None
    assert "decomposable" in log.reason()


def test_bfloat16_with_float32_parts_builds(case, wan, wan_call, tmp_path):
    model = wan(num_layers=1).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    it = case(model, kwargs=wan_call(dtype=torch.bfloat16))
    (file,) = backend.emit(it.program, it.weights, tmp_path, "a", "sm120")
    assert cards((tmp_path / file).read_bytes()) == {b"120"}


class Inside(torch.nn.Module):
    def forward(self, x):
        return x.double().exp().float()


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(torch.nn.Linear(4, 4).double().requires_grad_(False), torch.float64), (Inside(), torch.float32)],
    ids=["everywhere", "inside"],
)
def test_float64_is_refused_where_tensorrt_would_round_it_in_silence(case, tmp_path, model, dtype):
    it = case(model, (torch.randn(2, 4, dtype=dtype),))
    with pytest.raises(UnsupportedError, match=r"TensorRT has no float64, and the model computes '[\w.]+' in it"):
        backend.emit(it.program, it.weights, tmp_path, "a", "sm120")
    assert list(tmp_path.iterdir()) == []


class MaskedAttentions(torch.nn.Module):
    """One attention a mask, then a causal one of two lengths, a negative scale, grouped heads and three dimensions.

    Each has queries, keys and values of its own, as a model's have.
    """

    def forward(self, q, k, v, *masks):
        own = [(q * (i + 2), k * (i + 2), v * (i + 2)) for i in range(len(masks) + 4)]
        outputs = [sdpa(*three, mask) for three, mask in zip(own, masks, strict=False)]
        causal, negative, (q, k, v), (q3, k3, v3) = own[len(masks) :]
        return (
            *outputs,
            sdpa(*causal, is_causal=True),
            sdpa(*negative, scale=-0.2),
            sdpa(q, k[:, :2], v[:, :2], masks[0], enable_gqa=True),
            sdpa(q3[0], k3[0], v3[0], masks[1][0]),
        )


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, torch.bool), (torch.bfloat16, torch.bfloat16)],
    ids=["float32 with booleans", "bfloat16 with floats"],
)
def test_masks_of_every_shape_build(case, tmp_path, dtype, kind):
    heads, queries, keys = 4, 5, 7
    shapes = [
        (queries, keys),
        (2, 1, 1, keys),
        (1, heads, 1, keys),
        (2, 1, queries, keys),
        (2, heads, 1, keys),
        (queries, 1),
    ]
    tensors = [torch.randn(2, heads, n, 64).to(dtype) for n in (queries, keys, keys)]
    it = case(MaskedAttentions(), (*tensors, *(torch.ones(shape).to(kind) for shape in shapes)))
    (file,) = backend.emit(it.program, it.weights, tmp_path, "a", "sm120")
    assert cards((tmp_path / file).read_bytes()) == {b"120"}


class Shared(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return sdpa(q, k, v, mask), sdpa(2 * q, k, v, mask)


@pytest.fixture
def shared(case):
    """A model that version 1.7 of TensorRT does not survive."""
    return case(Shared(), (*(torch.randn(2, 4, n, 64) for n in (5, 7, 7)), torch.ones(5, 7, dtype=torch.bool)))


def test_a_builder_that_dies_is_told_and_leaves_nothing(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_CHILD", "import os; os.abort()")
    with pytest.raises(UnsupportedError, match=r"TensorRT died .* for sm120 \(exit code -6\).*; use backend: triton"):
        backend.emit(shared.program, shared.weights, tmp_path, "a", "sm120")
    assert list(tmp_path.iterdir()) == []


def test_attentions_that_share_their_keys_are_built_or_refused(shared, tmp_path):
    """This process lives on, whichever TensorRT is installed."""
    refused = False
    try:
        backend.emit(shared.program, shared.weights, tmp_path, "a", "sm120")
    except UnsupportedError:
        refused = True
    assert [p.name for p in tmp_path.iterdir()] == ([] if refused else ["a-sm120.plan"])


def test_what_does_not_build_is_refused_when_an_engine_is_made():
    with pytest.raises(UnsupportedError, match=r"TensorRT cannot (read|build) .*; use backend: triton"):
        turbocompile.optimize(Bits(), (torch.arange(8),), recipe={"passes": "off"}, backend="tensorrt", target="sm89")


class Bits(torch.nn.Module):
    def forward(self, x):
        return x.bitwise_and(x + 1)


def test_what_tensorrt_refuses_is_said_and_leaves_nothing(case, tmp_path):
    it = case(Bits(), (torch.arange(8),))
    with pytest.raises(UnsupportedError, match=r"TensorRT cannot (read|build) .*; use backend: triton"):
        backend.emit(it.program, it.weights, tmp_path, "a", "sm120")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_for_another_machine_is_built_and_saved(case, wan, wan_call, tmp_path):
    call = wan_call()
    engine = turbocompile.optimize(
        wan(num_layers=1), kwargs=call, recipe={"passes": "off"}, backend="tensorrt", target="sm89"
    )
    loaded = turbocompile.load(engine.save(tmp_path / "engine"))
    assert loaded.files == {"call": ["transformer-call-sm89.plan"]}
    assert cards((tmp_path / "engine" / loaded.files["call"][0]).read_bytes()) == {b"89"}
    with pytest.raises(UnsupportedError, match="the engine is on cpu"):
        loaded(**call)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("cpu", "cpu is no GPU"),
        ("sm80", "sm80 is a data-centre card, which tensorrt_rtx does not serve"),
        ("sm90", "sm90 is a data-centre card, which tensorrt_rtx does not serve"),
        ("sm75", "no target 'sm75'"),
    ],
)
def test_other_targets_are_refused_with_the_reason(target, reason, tiny, tmp_path):
    with pytest.raises(UnsupportedError, match=reason):
        backend.check(target)
    it = tiny()
    with pytest.raises(UnsupportedError, match=reason):
        backend.emit(it.program, it.weights, tmp_path, "a", target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["tensorrt_rtx", "onnxscript"])
def test_missing_packages_are_named_with_the_extras(monkeypatch, package):
    backend.check("sm120")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(UnsupportedError, match=rf'needs {package}; pip install "turbocompile\[tensorrt\]"'):
        backend.check("sm120")


def test_operators_in_eight_bits_are_refused(tiny, tmp_path):
    it = tiny({"w8a8": {"format": "int8"}, "attention": {"kind": "native"}})
    with pytest.raises(
        UnsupportedError, match=r"the tensorrt backend holds .* turbocompile::\w+; set passes.w8a8: off"
    ):
        backend.emit(it.program, it.weights, tmp_path, "a", "sm120")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_runs_on_no_cpu(tiny, tmp_path):
    it = tiny()
    with pytest.raises(UnsupportedError, match="runs on the RTX card it was built for, and the engine is on cpu"):
        backend.compile_program(it.program, it.weights, CPU, tmp_path, ("a-sm120.plan",))


def test_a_data_centre_card_is_named(tiny, tmp_path, on_a):
    it = tiny()
    on_a("NVIDIA H100 80GB HBM3", (9, 0))
    with pytest.raises(UnsupportedError, match=r"this machine has an NVIDIA H100 80GB HBM3; .*backend: triton"):
        backend.compile_program(it.program, it.weights, CUDA, tmp_path, ("a-sm120.plan",))


def test_a_plan_for_another_card_is_refused_with_both(tiny, tmp_path, on_a):
    it = tiny()
    on_a("NVIDIA GeForce RTX 4090", (8, 9))
    with pytest.raises(
        UnsupportedError, match=r"built for sm120, and this machine's NVIDIA GeForce RTX 4090 is sm89; .*target: sm89"
    ):
        backend.compile_program(it.program, it.weights, CUDA, tmp_path, ("a-sm120.plan",))


@pytest.mark.parametrize("file", ["../a-sm120.plan", "/a-sm120.plan", "missing-sm120.plan"])
def test_a_plan_outside_the_folder_or_missing_is_refused(tiny, tmp_path, on_a, file):
    it = tiny()
    on_a("NVIDIA GeForce RTX 5090", (12, 0))
    with pytest.raises(EngineError, match=r"no plain relative name|lacks the file"):
        backend.compile_program(it.program, it.weights, CUDA, tmp_path, (file,))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or host_target() not in backend.TARGETS, reason="needs an RTX card that plans run on"
)
def test_a_plan_has_the_triton_backends_numbers_on_its_card(tiny, exact):
    it = tiny(exact)
    weights, tensors = {k: v.cuda() for k, v in it.weights.items()}, [t.cuda() for t in it.tensors]
    run = backend.compile_program(it.program, weights, CUDA)
    (result,) = run(*tensors)
    before = result.clone()
    (expected,) = triton.compile_program(it.program, it.weights, CPU)(*it.tensors)
    # float32 without TF32: as for onnxruntime, eps * sqrt(256 channels) over some 50 operators.
    assert (result.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()
    run(*(2 * t for t in tensors))
    assert torch.equal(result, before)
