"""The onnx backend: standard operators, the engine's own weights, the engine's numbers."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from turbocompile.backends import flatten as flatten_module
from turbocompile.backends import onnx as backend
from turbocompile.backends import trial, triton
from turbocompile.backends.flatten import flatten

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.errors import EngineError, UnsupportedError, VerificationError
from turbocompile.recipe.schema import Recipe

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CPU = torch.device("cpu")
# float32 in another order of summation: eps * sqrt(256 channels) = 2e-6 an operator, and no path through these models
# has more than some 50 of them that sum.
TOLERANCE = 1e-4


def near(results, expected):
    pairs = list(zip(results, expected, strict=True))
    return all((a - b).abs().max() <= TOLERANCE * b.abs().max() for a, b in pairs)


def read(path):
    return onnx.load(str(path), load_external_data=False)


def place(tensor):
    return {e.key: e.value for e in tensor.external_data}


@pytest.fixture(scope="module", params=["passes off", "all exact passes"])
def exported(request, tiny, tmp_path_factory):
    """A Case, and an engine's folder with its weights and its ONNX file."""
    exact = {"w8a8": {"enabled": False}, "attention": {"kind": "native"}}
    it = tiny(None if request.param == "passes off" else exact)
    folder = tmp_path_factory.mktemp("engine")
    it.write_weights(folder)
    return it, folder, tuple(backend.emit(it.program, it.weights, folder, "transformer-a", "cpu"))


def test_wan_has_the_triton_backends_numbers(exported):
    it, folder, files = exported
    run = backend.compile_program(it.program, it.weights, CPU, folder, files)
    results = run(*it.tensors)
    assert near(results, triton.compile_program(it.program, it.weights, CPU)(*it.tensors))
    assert near(results, it.eager())


def test_the_file_is_a_valid_graph_of_opset_23_alone(exported):
    _, folder, files = exported
    onnx.checker.check_model(str(folder / files[0]), full_check=True)
    model = read(folder / files[0])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    operators = {n.op_type for n in model.graph.node}
    assert {"Attention", "RMSNormalization", "LayerNormalization"} <= operators
    assert [i.name for i in model.graph.input] == ["input_0", "input_1", "input_2"]
    assert [o.name for o in model.graph.output] == ["output_0"]


def test_weights_stay_in_the_engines_own_files(exported):
    it, folder, files = exported
    stored = {t.name: place(t) for t in read(folder / files[0]).graph.initializer}
    for name, tensor in it.weights.items():
        if not name.startswith("constants."):  # tables are cut to the grid, and held as they are used
            assert stored[name]["location"] == "weights-transformer-00001.safetensors"
            assert int(stored[name]["length"]) == tensor.nbytes
    # cos and sin of 48 tokens and 64 channels, at most: what is left to hold
    assert sum((folder / f).stat().st_size for f in files[1:]) <= 2 * 48 * 64 * 4
    assert (folder / files[0]).stat().st_size < 100_000


def test_the_file_tells_nothing_of_the_machine_that_built_it(exported):
    _, folder, files = exported
    data = (folder / files[0]).read_bytes()
    for trace in (b"site-packages", str(Path(__file__).parents[2]).encode(), b"forward", b"diffusers"):
        assert trace not in data


def test_modules_of_one_folder_find_each_their_own_weights(tiny, tmp_path):
    cases = {"transformer": tiny(seed=0), "transformer_2": tiny(seed=1)}
    for module, it in cases.items():
        it.write_weights(tmp_path, module)
    for module, it in cases.items():
        files = tuple(backend.emit(it.program, it.weights, tmp_path, f"{module}-a", "cpu"))
        places = {place(t)["location"] for t in read(tmp_path / files[0]).graph.initializer if t.external_data}
        assert places == {f"weights-{module}-00001.safetensors", f"{module}-a.onnx.data"}
        assert near(backend.compile_program(it.program, it.weights, CPU, tmp_path, files)(*it.tensors), it.eager())


@pytest.mark.parametrize(
    "style",
    [
        zoo.Style(qkv="chunk", attention="softmax", rope="complex", norm="written", modulation="linear", cross=True),
        zoo.Style(num_kv_heads=1, rope="slices", layout="bhld", mlp="silu_glu", modulation="none"),
        zoo.Style(
            qkv="unbind", attention="einsum", modulate="addcmul", rope="rotate_half", qk_norm="heads", joint=True
        ),
    ],
    ids=["written_out", "grouped_heads", "joint"],
)
def test_hand_written_models_have_the_triton_backends_numbers(case, exact, style):
    it = case(zoo.build(style), zoo.example(style), passes=exact)
    expected = triton.compile_program(it.program, it.weights, CPU)(*it.tensors)
    assert near(backend.compile_program(it.program, it.weights, CPU)(*it.tensors), expected)


def test_tables_are_computed_once_and_broadcasts_are_not_stored(exported):
    it, _, _ = exported
    flat = flatten(it.program, it.weights, "onnx")
    tables = {n: getattr(flat.module, b) for b, n in flat.names.items() if n.startswith("folded.")}
    assert tables
    for name, table in tables.items():
        assert table.numel() <= 48 * 64, name  # not repeated over heads or batch
    # each stored weight is one buffer, though two calls read the tables
    assert len(set(flat.names.values())) == len(flat.names)


def test_two_calls_do_not_share_memory_and_any_strides_will_do(exported):
    it, folder, files = exported
    run = backend.compile_program(it.program, it.weights, CPU, folder, files)
    (first,) = run(*it.tensors)
    before = first.clone()
    strided = it.tensors[0].transpose(3, 4).contiguous().transpose(3, 4)
    assert not strided.is_contiguous()
    (again,) = run(strided, *it.tensors[1:])
    assert torch.equal(again, before)
    run(*(2 * t for t in it.tensors))
    assert torch.equal(first, before)


def test_an_engine_runs_it_in_memory_and_from_its_folder(case, wan, wan_call, tmp_path):
    model, call = wan(), wan_call()
    engine = turbocompile.optimize(model, kwargs=call, recipe={"passes": "off"}, backend="onnx")
    expected = model(**call).sample
    assert near([engine(**call).sample], [expected])
    saved = engine.save(tmp_path / "engine")
    loaded = turbocompile.load(saved)
    assert {f.rsplit(".", 1)[1] for f in loaded.files["call"]} == {"onnx", "data"}
    assert near([loaded(**call).sample], [expected])
    (saved / loaded.files["call"][0]).write_bytes(b"\x08\x0b")
    with pytest.raises(EngineError, match=r"\.onnx"):
        turbocompile.load(saved)


@pytest.mark.parametrize("passes", ["off", {}], ids=["passes off", "all exact passes"])
def test_the_wan_tiny_recipe_builds_an_engine_with_the_triton_backends_numbers(tmp_path, passes):
    shape = {"height": 64, "width": 64, "num_frames": 5}
    recipe = Recipe.from_dict(
        {"model": {"preset": "wan-tiny"}, "shapes": [shape], "passes": passes, "verify": "off",
         "backend": "onnx", "target": "cpu", "dtype": "float32"}
    )  # fmt: skip
    optimize_recipe(recipe, tmp_path / "engine")
    engine = turbocompile.load(tmp_path / "engine")
    ((name, program),) = engine.programs.items()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(i.shape, generator=generator) for i in program.signature.inputs]
    files = tuple(engine.files[name])
    results = backend.compile_program(program, engine.weights, CPU, engine.folder, files)(*tensors)
    assert near(results, triton.compile_program(program, engine.weights, CPU)(*tensors))


# ----------------------------------------------------------------------------------------------------------- attention

B, H, LQ, LK, D = 2, 4, 5, 7, 8
MASKS = [
    (LQ, LK), (1, LK), (LQ, 1), (1, 1), (1, LQ, LK), (H, 1, LK), (H, LQ, LK), (B, 1, 1, LK), (1, H, 1, LK),
    (B, 1, LQ, LK), (B, H, 1, LK), (1, 1, LQ, LK), (B, H, LQ, LK), (B, 1, 1, 1), (1, 1, 1, 1),
]  # fmt: skip


class Calls(nn.Module):
    """One result a function of the given tensors: a model of many small attentions, since a build takes a second."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def forward(self, *tensors):
        return tuple(f(*tensors) for f in self.functions)


def qkv(*lead, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*lead, n, D, generator=generator).to(dtype) for n in (LQ, LK, LK))


def masks_of(kind, generator):
    for shape in MASKS:
        if kind is torch.bool:
            mask = torch.rand(shape, generator=generator) < 0.6
            mask[..., :1] = True
        else:
            mask = torch.randn(shape, generator=generator).to(kind)
        yield mask


def agree(case, model, args, tolerance=1e-6):
    """Every result is near the module's own, of its dtype, and no build warned of what it did not try."""
    it = case(model, args)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        results = backend.compile_program(it.program, it.weights, CPU)(*it.tensors)
    for i, (found, expected) in enumerate(zip(results, model(*args), strict=True)):
        assert found.dtype == expected.dtype
        # sums of 8 and 7 numbers of size 1 in another order
        assert (found.double() - expected.double()).abs().max() <= tolerance, i


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "float"])
def test_a_mask_of_any_shape_that_broadcasts_is_right(case, kind):
    given = tuple(masks_of(kind, torch.Generator().manual_seed(1)))

    def attend(i):
        return lambda q, k, v, *masks: sdpa(q, k, v, masks[i], scale=0.3 if i % 2 else None)

    agree(case, Calls(*map(attend, range(len(given)))), (*qkv(B, H), *given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_rows_without_a_key_are_zeros_and_rows_of_lowest_numbers_hide_nothing(case, dtype):
    hidden = torch.zeros(LQ, LK, dtype=torch.bool)
    hidden[1], hidden[2, 3:], hidden[3, 0] = True, True, True
    lowest = torch.finfo(dtype).min
    zeros = torch.zeros(LQ, LK, dtype=dtype)
    both = zeros.masked_fill(hidden, -torch.inf)
    both[2, :3] = lowest
    args = (
        *qkv(B, H, dtype=dtype),
        ~hidden,
        zeros.masked_fill(hidden, -torch.inf),
        zeros.masked_fill(hidden, lowest),
        both,
    )
    attend = [lambda q, k, v, *masks, i=i: sdpa(q, k, v, masks[i]) for i in range(4)]
    model = Calls(*attend)
    assert not model(*args)[0][:, :, 1].any()
    assert model(*args)[2][:, :, 1].any()
    agree(case, model, args, 1e-6 if dtype.itemsize > 2 else 4e-3)  # two roundings of 2^-11 of numbers below 4


def test_lengths_scales_and_causal_attention_are_right(case):
    model = Calls(
        *(lambda q, k, v, m, s=s: sdpa(q, k, v, scale=s) for s in (0.3, -0.3, 0.0)),
        lambda q, k, v, m: sdpa(q, k, v, m, scale=-0.3),
        lambda q, k, v, m: sdpa(q, k, v, is_causal=True),
        lambda q, k, v, m: sdpa(k, q, q, is_causal=True),
        lambda q, k, v, m: sdpa(k, k, v, is_causal=True),
        lambda q, k, v, m: sdpa(q, k, v[..., :3], m),
    )
    agree(case, model, (*qkv(B, H), torch.arange(B * LK).view(B, 1, 1, LK) % 3 != 1))


def test_grouped_and_broadcast_heads_and_batches_are_right(case):
    def grouped(q, k, v, m, **how):
        return sdpa(q, k[:, :2], v[:, :2], enable_gqa=True, **how)

    model = Calls(
        grouped,
        lambda q, k, v, m: grouped(q, k, v, m, attn_mask=m),
        lambda q, k, v, m: grouped(q, k, v, m, attn_mask=m.expand(B, H, 1, LK)),
        lambda q, k, v, m: grouped(q, k, v, m, is_causal=True),
        lambda q, k, v, m: sdpa(q, k, v, enable_gqa=True),
        lambda q, k, v, m: sdpa(q, k[:1, :1], v[:1, :1], m),
        lambda q, k, v, m: sdpa(q[:1], k, v),
    )
    agree(case, model, (*qkv(B, H), torch.arange(B * LK).view(B, 1, 1, LK) % 3 != 1))


def test_attention_of_other_ranks_is_right(case):
    model = Calls(
        lambda q, k, v, m: sdpa(q[0], k[0], v[0]),
        lambda q, k, v, m: sdpa(q[0], k[0], v[0], m[0]),
        lambda q, k, v, m: sdpa(q[0], k[0], v[0], m[0, 0, 0]),
        lambda q, k, v, m: sdpa(q[0], k[0], v[0], is_causal=True),
        lambda q, k, v, m: sdpa(q[0, 0], k[0, 0], v[0, 0], m[0, 0]),
        lambda q, k, v, m: sdpa(q[None], k[None], v[None]),
        lambda q, k, v, m: sdpa(*(torch.stack([t, 2 * t]) for t in (q, k, v)), torch.stack([m, ~m])),
        lambda q, k, v, m: sdpa(q[0], k, v),
    )
    agree(case, model, (*qkv(B, H), torch.arange(B * LK).view(B, 1, 1, LK) % 3 != 1))


def test_float16_attention_is_right_with_masks_of_three_dtypes(case):
    generator = torch.Generator().manual_seed(1)
    masks = [
        torch.rand(B, 1, 1, LK, generator=generator) < 0.7,
        *(torch.randn(1, H, 1, LK).to(t) for t in (torch.float16, torch.float32)),
    ]
    masks[0][..., 0] = True
    model = Calls(*(lambda q, k, v, *m, i=i: sdpa(q, k, v, m[i]) for i in range(3)))
    agree(case, model, (*qkv(B, H, dtype=torch.float16), *masks), 4e-3)  # as above


def test_dropout_is_refused(case):
    it = case(Calls(lambda q, k, v: sdpa(q, k, v, dropout_p=0.1)), qkv(B, H))
    with pytest.raises(UnsupportedError, match=r"drops weights at random \(dropout_p\).*eval mode.*backend: triton"):
        backend.compile_program(it.program, it.weights, CPU)


# ------------------------------------------------------------------------------------- dtypes that runtimes do not have


def test_choices_between_booleans_are_right(case):
    b, c = torch.arange(12).view(3, 4) % 2 == 0, torch.arange(12).view(3, 4) % 3 == 0
    model = Calls(
        torch.where,
        lambda b, c, d: b.masked_fill(c, False),
        lambda b, c, d: torch.where(b, c, True),
        lambda b, c, d: torch.where(b, c.short(), 7),
        lambda b, c, d: b + c,
    )
    agree(case, model, (b, c, ~b))


def test_hunyuan_video_hides_the_padding_of_its_prompt(case):
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval().requires_grad_(False)  # fmt: skip
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    call = {
        "hidden_states": torch.randn(2, 4, 1, 4, 4), "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 6, 16), "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, 8), "guidance": torch.tensor([1000.0, 500.0]),
    }  # fmt: skip
    it = case(model, kwargs=call)
    results = backend.compile_program(it.program, it.weights, CPU)(*it.tensors)
    assert near(results, it.eager())
    call["encoder_attention_mask"] = torch.ones_like(mask)
    assert not near(results, [model(**call).sample])  # the mask matters


def test_float16_results_of_operators_without_a_float16_kernel_are_float16(case):
    agree(
        case, Calls(lambda x: x.abs(), lambda x: x.amax(-1), lambda x: x.cumsum(-1)), (torch.randn(3, 4).half(),), 4e-3
    )


def test_numbers_beside_float64_keep_their_digits(case):
    model = Calls(lambda x: x * 0.1, lambda x: x + 0.1, lambda x: x / 0.3)
    agree(case, model, (torch.randn(3, 4, dtype=torch.float64),), 1e-15)


# ------------------------------------------------------------------------------------------------- the trial of a build


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x, mask):
        x = self.linear(x)[:, None]
        return sdpa(x, x, x, mask)


MASKED = (torch.randn(2, 6, D), torch.ones(2, 1, 1, 6, dtype=torch.bool))


def ways_in(tmp_path):
    """The ways to a build: an engine in memory, and the files of a folder. Each is given a Case."""
    return {
        "optimize": lambda it: turbocompile.optimize(it.model, MASKED, backend="onnx", recipe={"passes": "off"}),
        "emit": lambda it: backend.emit(it.program, it.weights, tmp_path, "a", "cpu"),
    }


@pytest.mark.parametrize("way", ["optimize", "emit"])
def test_what_builds_and_does_not_run_is_refused_at_the_build(case, monkeypatch, tmp_path, way):
    monkeypatch.setattr(flatten_module, "attention", sdpa)  # a mask that onnxruntime refuses when it runs
    it = case(Masked(), MASKED)
    with pytest.raises(
        UnsupportedError, match=r"cannot run \w+\.onnx on cpu: the operator Attention at '\w+' fails .*triton"
    ):
        ways_in(tmp_path)[way](it)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["optimize", "emit"])
def test_what_runs_with_other_numbers_is_refused_at_the_build(case, monkeypatch, tmp_path, way):
    def blind(q, k, v, attn_mask=None, *rest, **how):
        return sdpa(q, k, v)

    monkeypatch.setattr(flatten_module, "attention", blind)
    it = case(Masked(), MASKED)
    with pytest.raises(VerificationError, match=r"output 0 differs by .* rounding explains"):
        ways_in(tmp_path)[way](it)
    assert list(tmp_path.iterdir()) == []


def test_the_first_call_of_an_engine_needs_no_other_export(monkeypatch):
    model = Masked().eval()
    engine = turbocompile.optimize(model, MASKED, backend="onnx", recipe={"passes": "off"})
    monkeypatch.setattr(backend, "write_model", None)
    assert near([engine(*MASKED)], [model(*MASKED)])


def test_a_forward_that_is_too_large_for_a_trial_is_told(case, monkeypatch, tmp_path):
    it = case(Masked(), MASKED)
    monkeypatch.setattr(trial, "MOST_SCORES", 2 * 6 * 6 * 4 - 1)
    with pytest.warns(UserWarning, match=r"a\.onnx was not tried: the scores .*; run it once before"):
        assert backend.emit(it.program, it.weights, tmp_path, "a", "cpu") == ["a.onnx"]
    monkeypatch.setattr(trial, "MOST_FLOPS", 1)
    with pytest.warns(UserWarning, match=r"a\.onnx was not tried: a forward of"):
        backend.emit(it.program, it.weights, tmp_path, "a", "cpu")
    engine = turbocompile.optimize(it.model, MASKED, backend="onnx", recipe={"passes": "off"})
    assert any("was not tried" in sentence for sentence in engine.report.warnings)


def test_bfloat16_is_written_for_a_gpu_with_a_warning_and_refused_for_a_cpu(case, tmp_path):
    it = case(Masked().to(torch.bfloat16), (MASKED[0].bfloat16(), MASKED[1]))
    with pytest.warns(UserWarning, match=r"a\.onnx was not tried: onnxruntime .* cannot run a\.onnx on cpu"):
        files = backend.emit(it.program, it.weights, tmp_path, "a", "sm90")
    for file in files:
        (tmp_path / file).unlink()
    with pytest.raises(UnsupportedError, match="use float32 there"):
        backend.emit(it.program, it.weights, tmp_path, "a", "cpu")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("passes", "operator", "advice"),
    [
        ({"w8a8": {"format": "int8"}, "attention": {"kind": "native"}}, r"\w+", "passes.w8a8: off"),
        ({"w8a8": {"enabled": False}, "attention": {"kind": "sage", "pv": "fp16"}}, "norm_sage_attention", "native"),
    ],
    ids=["w8a8", "sage"],
)
def test_operators_in_eight_bits_are_refused(tiny, tmp_path, passes, operator, advice):
    it = tiny(passes)
    with pytest.raises(UnsupportedError, match=rf"turbocompile::{operator}; set .*{advice}.* backend: triton"):
        backend.emit(it.program, it.weights, tmp_path, "a", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra(monkeypatch):
    backend.check("sm90")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n.startswith("onnxs") else find(n))
    with pytest.raises(UnsupportedError, match=r'needs onnxscript; pip install "turbocompile\[onnx\]"'):
        backend.check("cpu")


class Igamma(nn.Module):
    def forward(self, x):
        return torch.special.gammainc(x.abs(), x.abs() + 1)


def test_what_onnx_cannot_express_is_named(case, tmp_path):
    it = case(Igamma(), (torch.randn(3),))
    with pytest.raises(UnsupportedError, match=r"cannot express .*(igamma|gammainc).*backend: triton"):
        backend.emit(it.program, it.weights, tmp_path, "a", "cpu")


def test_a_dtype_that_onnxruntime_cannot_run_here_is_refused_in_a_sentence(case, wan, wan_call):
    it = case(wan(num_layers=1).to(torch.bfloat16), kwargs=wan_call(dtype=torch.bfloat16))
    with pytest.raises(UnsupportedError, match=r"cannot run model\.onnx on cpu: .*; use float32 there"):
        backend.compile_program(it.program, it.weights, CPU)


def test_a_gpu_needs_an_onnxruntime_for_it(exported, monkeypatch):
    it, folder, files = exported
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match="onnxruntime does not run on cuda; pip install onnxruntime-gpu"):
        backend.compile_program(it.program, it.weights, torch.device("cuda"), folder, files)


def test_a_missing_weight_is_named(exported, tmp_path):
    it, _, _ = exported
    weights = {k: v for k, v in it.weights.items() if k != "proj_out.weight"}
    with pytest.raises(EngineError, match=r"lacks the weight 'proj_out\.weight'"):
        backend.emit(it.program, weights, tmp_path, "a", "cpu")


# ------------------------------------------------------------------------------------------- damaged or hostile files


@pytest.fixture
def altered(exported, tmp_path):
    """altered(change): opens a copy of the engine's file whose model was changed."""
    it, folder, files = exported

    def run(change):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        model = read(copy / files[0])
        change(model)
        (copy / files[0]).write_bytes(model.SerializeToString())
        return backend.compile_program(it.program, it.weights, CPU, copy, files)

    return run


def relocate(location):
    def change(model):
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = location

    return change


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "*/_ORT_MEM_ADDR_/*", "a/../../b", ""])
def test_data_outside_the_folder_is_not_read(altered, location):
    with pytest.raises(EngineError, match="no plain relative name"):
        altered(relocate(location))


def test_data_behind_a_link_is_not_read(exported, altered, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(1 << 20))

    def change(model):
        (tmp_path / "copy" / "link").symlink_to(tmp_path / "secret")
        relocate("link")(model)

    with pytest.raises(EngineError, match="link in the engine is a link"):
        altered(change)


def test_data_of_a_nested_graph_is_looked_at_too(altered):
    def change(model):
        inner = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=1)
        inner.external_data.add(key="location", value="/etc/passwd")
        graph = onnx.helper.make_graph([], "inner", [], [], initializer=[inner])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph))

    with pytest.raises(EngineError, match="no plain relative name"):
        altered(change)


@pytest.mark.parametrize("how", ["domain", "function"])
def test_operators_of_others_are_refused(altered, how):
    def change(model):
        if how == "domain":
            model.graph.node[0].domain = "com.example"
        else:
            model.functions.add(name="f", domain="")

    with pytest.raises(EngineError, match="not ONNX's own"):
        altered(change)


def test_a_graph_of_other_shapes_than_its_program_is_refused(altered):
    def change(model):
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 5
        del model.graph.value_info[:]

    with pytest.raises((EngineError, UnsupportedError), match=r"takes or gives|cannot run"):
        altered(change)


def test_a_file_that_is_no_onnx_is_refused(exported, tmp_path):
    it, _, _ = exported
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(EngineError, match="is no ONNX file"):
        backend.compile_program(it.program, it.weights, CPU, tmp_path, ("a.onnx",))
