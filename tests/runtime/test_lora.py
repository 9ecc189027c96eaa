"""Adapters in a running engine: the right numbers, in the same memory, and the bits of before when they are gone."""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import nn
from turbocompile.kernels.quantize.quantize import dequantize

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.ir.inverse import put_together, unit_name, units
from turbocompile.recipe.schema import LoraSpec, Recipe
from turbocompile.runtime import lora as runtime_lora
from turbocompile.runtime.lora import slots_of
from turbocompile.runtime.memory_plan import MemoryPlan, ModulePlan
from turbocompile.runtime.streaming import parcels_of
from turbocompile.video.session import generate
from turbocompile.wan.lora import LoraTensors, changes_of
from turbocompile.wan.tensors import Tensors

FORMATS = ("off", "int8", "int8_block", "fp8")


def recipe(format):
    return {"passes": {"w8a8": {"format": format, "budget": 1.0}, "attention": "native"}}


@pytest.fixture(scope="module")
def base(model):
    """The model's tensors."""
    return Tensors({n: p.detach() for n, p in model.named_parameters()})


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """LoRA files: of every linear; of some, as DoRA; with differences, and one weight that is replaced."""
    g = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("loras")

    def rand(*shape, size=0.1):
        return torch.randn(*shape, generator=g) * size

    low_rank, dora = {}, {}
    for name in base.keys():  # noqa: SIM118
        shape, path = base.spec(name)[0], name.removesuffix(".weight")
        if not name.endswith(".weight") or len(shape) < 2:
            continue
        for tensors in (low_rank, dora) if "attn1" in path or "ffn" in path else (low_rank,):
            tensors[f"{path}.lora_A.weight"] = rand(3, *shape[1:])
            tensors[f"{path}.lora_B.weight"] = rand(shape[0], 3, *(1 for _ in shape[2:]))
        if path in ("blocks.0.attn1.to_k", "blocks.1.ffn.net.2"):
            dora[f"{path}.lora_magnitude_vector"] = rand(shape[0], size=0.3) + 1
    more = {
        "diffusion_model.blocks.0.modulation.diff": rand(*base.spec("blocks.0.scale_shift_table")[0]),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": rand(*base.spec("blocks.1.attn1.norm_q.weight")[0]),
        "diffusion_model.blocks.1.ffn.0.diff_b": rand(*base.spec("blocks.1.ffn.net.0.proj.bias")[0]),
        "diffusion_model.blocks.0.self_attn.v.set_weight": rand(*base.spec("blocks.0.attn1.to_v.weight")[0]),
        "diffusion_model.head.head.diff": rand(*base.spec("proj_out.weight")[0]),
    }
    for name, tensors in (("a", low_rank), ("b", dora), ("c", more)):
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in "abc"}


@pytest.fixture(scope="module")
def merged(model, base):
    """merged([(path, weight), ...]): the model with the adapters in its weights."""

    def make(*loras):
        specs = {n: base.spec(n) for n in base.keys()}  # noqa: SIM118
        changes = changes_of([LoraSpec(*lora) for lora in loras], {"transformer": specs})["transformer"]
        tensors, made = LoraTensors(base, changes), copy.deepcopy(model)
        for name, parameter in made.named_parameters():
            parameter.data = tensors.get(name).clone()
        return made

    return make


@pytest.fixture(scope="module")
def built(model, call):
    """built(format): an engine of the model, made once. Tests leave it without adapters."""
    made = {}

    def make(format):
        if format not in made:
            made[format] = turbocompile.optimize(model, kwargs=call(), recipe=recipe(format))
        return made[format]

    return make


def bits(engine):
    return {name: (t.data_ptr(), t.clone().view(torch.uint8)) for name, t in engine.weights.items()}


def same_bits(engine, before):
    return all(
        t.data_ptr() == before[name][0] and torch.equal(t.view(torch.uint8), before[name][1])
        for name, t in engine.weights.items()
    )


def run(engine, call):
    with torch.no_grad():
        out = engine(**call(), return_dict=False)[0]
    return out.clone()


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("given", [[("a", 1.0)], [("b", 0.7)], [("c", 1.0)], [("a", -0.5), ("b", 1.0), ("c", 0.3)]])
def test_a_weight_of_32_bits_has_the_bits_of_a_build_with_the_adapters(built, merged, model, files, given, call):
    engine = built("off")
    other = turbocompile.optimize(
        merged(*((files[name], weight) for name, weight in given)), kwargs=call(), recipe=recipe("off")
    )
    before = run(engine, call)
    with engine.with_lora([{"path": files[name], "weight": weight} for name, weight in given]):
        for name, tensor in other.weights.items():
            assert torch.equal(engine.weights[name], tensor), name
        assert torch.equal(run(engine, call), run(other, call))
        assert not torch.equal(run(engine, call), before)
    assert torch.equal(run(engine, call), before)


def test_a_weight_of_16_bits_has_them_too(model, base, merged, files, call, tmp_path):
    half = copy.deepcopy(model).bfloat16()
    arguments = {k: v if k == "timestep" else v.bfloat16() for k, v in call().items()}
    engine = turbocompile.optimize(half, kwargs=arguments, recipe=recipe("off"))
    engine.set_lora(f"{files['a']}:0.5")
    specs = {n: (tuple(p.shape), p.dtype) for n, p in half.named_parameters()}
    changes = changes_of([LoraSpec(files["a"], 0.5)], {"transformer": specs})["transformer"]
    tensors = LoraTensors(Tensors({n: p.detach() for n, p in half.named_parameters()}), changes)
    for name, parameter in half.named_parameters():
        parameter.data = tensors.get(name).bfloat16()
    other = turbocompile.optimize(half, kwargs=arguments, recipe=recipe("off"))
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in other.weights.items())


@pytest.mark.parametrize("format", FORMATS[1:])
def test_a_weight_of_8_bits_is_rounded_twice(built, merged, model, files, format):
    """The first rounding is by half a step of the old scale, the second by half a step of the new one."""
    engine = built(format)
    old, new = (dict(m.named_parameters()) for m in (model, merged((files["a"], 1.0))))
    slots = [slot for slot in slots_of(engine.programs) if slot.format]
    assert len(slots) >= 8
    scales = {slot: engine.weights[slot.names[1]].clone() for slot in slots}
    with engine.with_lora(files["a"]), torch.no_grad():
        for slot in slots:
            before, after = (
                put_together(slot.expr, {u: p[unit_name(u)].detach() for u in units(slot.expr)}, None)
                for p in (old, new)
            )
            data, scale = (engine.weights[name] for name in slot.names)
            assert not torch.equal(scale, scales[slot])
            error = (dequantize(data, scale, format, torch.float32) - after).abs()
            ones = torch.ones_like(data, dtype=torch.float32)
            steps = [dequantize(ones.to(data.dtype), s, format, torch.float32) for s in (scales[slot], scale)]
            if format == "fp8":  # half of a last place is 2^-4 of a value, or 2^-10 steps of the smallest
                first, second = (w.abs() / 16 + step / 1024 for w, step in zip((before, after), steps, strict=True))
                bound = first + (second + first / 16)
            elif format == "int8_block":  # and +amax is 127 of 128 steps
                bound = sum(steps)
            else:
                bound = sum(steps) / 2
            assert bool((error <= bound * 1.001 + 1e-7).all())


def test_an_exchange_gives_the_bits_of_the_new_adapters_alone(built, files):
    engine = built("int8")
    with engine.with_lora(files["b"]):
        alone = bits(engine)
    with engine.with_lora(files["a"]):
        engine.set_lora([files["b"]])
        assert same_bits(engine, alone)
        assert [(x.path, x.weight) for x in engine.lora] == [(files["b"], 1.0)]
    assert engine.lora == ()


def test_a_file_that_was_written_anew_is_read_anew(built, files, tmp_path):
    engine, path = built("off"), tmp_path / "a.safetensors"
    shape = engine.weights["proj_out.weight"].shape
    weight = engine.weights["proj_out.weight"].clone()
    for value in (1.0, 2.0):
        save_file({"proj_out.diff": torch.full(shape, value)}, path)
        os.utime(path, ns=(0, int(value)))  # a clock may be too coarse to tell two writes
        engine.set_lora(path)
        assert torch.equal(engine.weights["proj_out.weight"], weight + value)
    engine.set_lora(None)


def test_an_engine_with_adapters_gets_no_more_shapes(model, call, files):
    lazy = turbocompile.optimize(model, recipe=recipe("off"))
    run(lazy, call)
    with (
        lazy.engine.with_lora(files["a"]),
        pytest.raises(EngineError, match="an engine with more shapes would not say"),
    ):
        lazy(**call(height=16), return_dict=False)
    assert lazy(**call(height=16), return_dict=False)[0].shape[-2] == 16


def test_two_halves_are_a_whole(built, files, call):
    engine = built("off")
    with engine.with_lora(files["a"]):
        whole = run(engine, call)
    with engine.with_lora([f"{files['a']}:0.25", (LoraSpec(files["a"], 0.75))]):
        halves = run(engine, call)
    assert (halves - whole).abs().max() <= 1e-5 * whole.abs().max()  # the rounding of one sum more
    with engine.with_lora(f"{files['a']}:0.5", weight=2.0):
        assert torch.equal(run(engine, call), whole)


# ----------------------------------------------------------------------------------------------------- taking them out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("opened", [False, True], ids=["built here", "of a folder"])
def test_without_adapters_every_bit_and_address_is_as_before(built, files, format, opened, call, tmp_path):
    engine = built(format)
    if opened:
        engine = turbocompile.load(engine.save(tmp_path / "engine"))
    before, out = bits(engine), run(engine, call)
    for lora in ([files["a"], files["c"]], [files["b"]], f"{files['b']}:0"):
        engine.set_lora(lora)
        assert all(t.data_ptr() == before[name][0] for name, t in engine.weights.items())
    assert same_bits(engine, before)  # the last has the weight 0
    engine.set_lora(files["a"])
    assert not same_bits(engine, before)
    assert not torch.equal(run(engine, call), out)
    engine.set_lora(None)
    assert same_bits(engine, before)
    assert torch.equal(run(engine, call), out)
    assert not engine.adapted.kept
    if opened:
        assert torch.equal(run(turbocompile.load(tmp_path / "engine"), call), out)  # nothing was written to the files


def test_an_engine_with_adapters_is_not_saved(built, files, tmp_path):
    engine = built("off")
    with engine.with_lora(files["a"]), pytest.raises(EngineError, match=r"take them out by engine\.set_lora\(None\)"):
        engine.save(tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_folder_that_is_gone_is_found_before_anything_changes(built, files, tmp_path):
    engine = turbocompile.load(built("off").save(tmp_path / "engine"))
    engine.set_lora(files["a"])
    adapted = bits(engine)
    (tmp_path / "engine").rename(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="cannot be read any more"):
        engine.set_lora(None)
    assert same_bits(engine, adapted)
    (tmp_path / "elsewhere").rename(tmp_path / "engine")
    engine.set_lora(None)


def test_copies_know_of_each_others_adapters_and_moved_ones_do_not(built, files, call):
    engine = copy.deepcopy(built("off"))
    shared = copy.copy(engine)
    out = run(engine, call)
    engine.set_lora(files["a"])
    assert shared.lora == engine.lora
    apart = copy.deepcopy(engine)
    shared.set_lora(None)
    assert torch.equal(run(engine, call), out)
    assert not torch.equal(run(apart, call), out)
    apart.set_lora(None)
    assert torch.equal(run(apart, call), out)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ("nothing.safetensors", RecipeError, "there is no file or folder nothing.safetensors"),
        (3, RecipeError, "is no adapter"),
        ([3], RecipeError, "is no adapter"),
        ({"weight": 1.0}, RecipeError, "is no adapter"),
        ({"path": "a", "expert": "medium"}, RecipeError, "expert must be one of"),
        ({"path": "a", "weight": "much"}, RecipeError, "is no adapter"),
        ({"path": "a", "mode": "branch"}, RecipeError, "mode cannot be branch in an engine that is built"),
        (LoraSpec("a", mode="branch"), RecipeError, "mode cannot be branch in an engine that is built"),
    ],
)
def test_what_is_no_adapter_is_refused(built, lora, error, message):
    before = bits(built("off"))
    with pytest.raises(error, match=message):
        built("off").set_lora(lora)
    assert same_bits(built("off"), before)


def test_keys_that_match_nothing_are_listed_and_nothing_changes(built, files, tmp_path):
    engine = built("int8")
    save_file({"blocks.9.attn1.to_q.diff": torch.ones(1)}, tmp_path / "d.safetensors")
    before = bits(engine)
    with pytest.raises(EngineError, match=r"matches 1 key of this LoRA, .*: blocks\.9\.attn1\.to_q\.diff"):
        engine.set_lora([files["a"], tmp_path / "d.safetensors"])
    assert same_bits(engine, before)
    assert engine.lora == ()


@pytest.mark.parametrize("opened", [False, True], ids=["built here", "of a folder"])
def test_a_failure_on_the_way_gives_every_bit_back(built, files, opened, monkeypatch, tmp_path):
    engine = turbocompile.load(built("int8").save(tmp_path / "engine")) if opened else built("int8")
    before, calls, quantize = bits(engine), [], runtime_lora.quantize

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory")
        return quantize(*args)

    with monkeypatch.context() as patched:
        patched.setattr(runtime_lora, "quantize", failing)
        with pytest.raises(torch.OutOfMemoryError):
            engine.set_lora(files["a"])
    assert same_bits(engine, before)
    assert engine.lora == ()
    with engine.with_lora(files["a"]):
        assert not same_bits(engine, before)


def test_a_backend_that_holds_the_weights_itself_is_refused(built, files):
    engine = copy.copy(built("off"))
    engine.backend = "onnx"
    object.__setattr__(engine, "experts", {"transformer": engine})
    with pytest.raises(UnsupportedError, match="the backend onnx holds the weights in its own files"):
        engine.set_lora(files["a"])


# ---------------------------------------------------------------------------------------------------- what else follows


@pytest.mark.parametrize("together", [True, False], ids=["", "one expert at a time"])
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_an_engine_under_a_memory_plan_gets_them_too(built, files, call, resident, together):
    engine, planned = built("int8"), copy.deepcopy(built("int8"))
    out = run(engine, call)
    prefixes = [p.prefix for p in parcels_of(engine.programs).parcels]
    module = ModulePlan(frozenset(prefixes[:resident]), 2, 0, 1, len(prefixes), len(prefixes) - resident)
    planned.use_plan(MemoryPlan(budget=0, modules={"transformer": module}, together=together))
    for called_before in (False, True):
        if called_before:
            assert torch.equal(run(planned, call), out)
        planned.set_lora(files["a"])
        with engine.with_lora(files["a"]):
            assert torch.equal(run(planned, call), run(engine, call))
        planned.set_lora(None)
        assert torch.equal(run(planned, call), out)


class Folding(nn.Module):
    """Computes something of its weights alone, which an engine does once."""

    def __init__(self):
        super().__init__()
        self.w, self.linear = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * torch.softmax(self.w, 0) + self.linear.weight.sum(0)


def test_what_was_computed_of_the_weights_follows_them(tmp_path):
    torch.manual_seed(0)
    model, x = Folding(), torch.randn(2, 8)
    engine = turbocompile.optimize(model, (x,))
    out = engine(x)
    diff, b, a = torch.randn(8), torch.randn(8, 2), torch.randn(2, 8)
    save_file({"w.diff": diff, "linear.lora_A.weight": a, "linear.lora_B.weight": b}, tmp_path / "a.safetensors")
    engine.set_lora(tmp_path / "a.safetensors")
    with torch.no_grad():
        model.w += diff
        model.linear.weight += b @ a
    assert torch.allclose(engine(x), model(x), rtol=1e-5, atol=1e-6)
    engine.set_lora(None)
    assert torch.equal(engine(x), out)


def test_a_smoothed_weight_gets_its_adapter_unsmoothed(tmp_path):
    style, up = zoo.Style(depth=3, batch=1, head_dim=32), "blocks.1.stream.mlp.up"
    model = zoo.build(style).requires_grad_(False)
    block = model.blocks[1].stream
    block.modulation.table[0, 4, :3] = 60.0  # channels that are far larger than the rest
    block.mlp.up.weight[:, :3] /= 60.0
    calls = [zoo.example(style, seed) for seed in range(3)]
    options = {"passes": {"w8a8": {"format": "int8", "smooth": "0.5"}, "attention": "native"}}
    made = turbocompile.optimize(model, calls[0], recipe=options, calibration=calls)
    assert f"{up}.smooth" in made.weights
    assert not torch.equal(made.weights[f"{up}.smooth"], torch.ones_like(made.weights[f"{up}.smooth"]))
    rows, columns = block.mlp.up.weight.shape
    a, b = torch.randn(2, columns) / columns**0.5, torch.randn(rows, 2) * 0.3
    a[:, :3] /= 60.0
    save_file({f"{up}.lora_A.weight": a, f"{up}.lora_B.weight": b}, tmp_path / "a.safetensors")
    plain = model(*calls[0])
    other = copy.deepcopy(model)
    other.blocks[1].stream.mlp.up.weight += b @ a
    adapted = other(*calls[0])
    for engine in (made, turbocompile.load(made.save(tmp_path / "engine"))):
        error, before = (engine(*calls[0]) - plain).norm(), bits(engine)
        assert (adapted - plain).norm() > 5 * error
        engine.set_lora(tmp_path / "a.safetensors")
        assert (engine(*calls[0]) - adapted).norm() < 2 * error  # one rounding of one weight more than there are
        engine.set_lora(None)
        assert same_bits(engine, before)


def test_an_engine_of_a_model_with_adapters_gets_more(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model).requires_grad_(False).eval()
    x = torch.randn(3, 16)
    engine = turbocompile.optimize(model, (x,))
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    save_file({"0.lora_A.weight": a, "0.lora_B.weight": b, "2.diff_b": torch.ones(16)}, tmp_path / "a.safetensors")
    engine.set_lora(tmp_path / "a.safetensors")
    model[0].base_layer.weight += b @ a
    model[2].bias += 1
    assert torch.allclose(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_calls_beside_an_exchange_see_the_old_weights_or_the_new(built, files, call):
    engine = built("int8")
    right = [run(engine, call)]
    with engine.with_lora(files["a"]):
        right.append(run(engine, call))
    wrong, done = [], threading.Event()

    def calls():
        torch.set_num_threads(1)
        while not done.is_set():
            out = run(engine, call)
            if not any(torch.equal(out, r) for r in right):
                wrong.append(out)

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        engine.set_lora(files["a"])
        engine.set_lora(None)
    done.set()
    for thread in threads:
        thread.join(60)
    assert wrong == []


# ------------------------------------------------------------------------------------------- two experts, and videos


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of an engine of two experts."""
    folder = tmp_path_factory.mktemp("two") / "engine"
    optimize_recipe(
        Recipe.from_dict({
            "model": {"preset": "wan-tiny-i2v-experts", "weights": "synthetic", "config": {"num_layers": 2}},
            "components": "none", "shapes": [{"height": 64, "width": 64, "num_frames": 5}], "target": "cpu",
            "passes": {"w8a8": "int8"}, "verify": "off",
        }),
        folder,
    )  # fmt: skip
    return folder


def test_each_expert_gets_its_own(two, tmp_path):
    engine = turbocompile.load(two)
    before = {name: bits(e) for name, e in engine.experts.items()}
    shape = engine.experts["transformer"].weights["proj_out.weight"].shape
    tensors = {
        f"{prefix}.proj_out.lora_{x}.weight": torch.randn(*s)
        for prefix in ("transformer", "transformer_2") for x, s in (("A", (2, shape[1])), ("B", (shape[0], 2)))
    }  # fmt: skip
    save_file(tensors, tmp_path / "two.safetensors")
    engine.set_lora(tmp_path / "two.safetensors")
    for name, expert in engine.experts.items():
        b, a = (tensors[f"{name}.proj_out.lora_{x}.weight"] for x in "BA")
        truth = before[name]["proj_out.weight"][1].view(torch.float32) + b @ a
        assert torch.allclose(expert.weights["proj_out.weight"], truth, rtol=1e-6, atol=1e-6)
    engine.set_lora({"path": tmp_path / "two.safetensors", "expert": "low"})
    assert same_bits(engine.experts["transformer"], before["transformer"])
    assert not same_bits(engine.experts["transformer_2"], before["transformer_2"])
    engine.experts["transformer_2"].set_lora(None)
    assert all(same_bits(e, before[name]) for name, e in engine.experts.items())


@pytest.mark.filterwarnings("ignore:the weights are synthetic")
def test_a_video_has_the_adapters_of_its_call(tmp_path):
    fields = {
        "model": {"preset": "wan-tiny"}, "shapes": [{"height": 64, "width": 64, "num_frames": 5}], "target": "cpu",
        "passes": "off", "verify": "off",
    }  # fmt: skip
    optimize_recipe(Recipe.from_dict(fields), tmp_path / "engine")
    engine = turbocompile.load(tmp_path / "engine")
    shape = engine.weights["proj_out.weight"].shape
    path = tmp_path / "a.safetensors"
    save_file({"diffusion_model.head.head.diff": torch.randn(shape)}, path)
    plain = generate(engine, "a cat").video
    adapted = generate(engine, "a cat", lora=f"{path}:0.5")
    assert "lora" in adapted.timings
    assert not torch.equal(adapted.video, plain)
    assert engine.lora == ()
    assert torch.equal(generate(engine, "a cat").video, plain)
    optimize_recipe(Recipe.from_dict({**fields, "lora": f"{path}:0.5"}), tmp_path / "merged")
    assert torch.equal(generate(tmp_path / "merged", "a cat").video, adapted.video)


@pytest.mark.parametrize("given", ["int8", "fp8"])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_stays_and_computes_with_the_adapters(model, files, call, given, opened, tmp_path):
    arguments = {k: v.cuda() for k, v in call().items()}
    engine = turbocompile.optimize(copy.deepcopy(model).cuda(), kwargs=arguments, recipe=recipe(given))
    if opened:
        engine = turbocompile.load(engine.save(tmp_path / "engine"), device="cuda")
    outs = [engine(**arguments, return_dict=False)[0] for _ in range(3)]
    graphs = {name: g._graph for name, g in engine._graphs.items()}
    assert all(g is not None for g in graphs.values())
    before = bits(engine)
    engine.set_lora(files["a"])
    adapted = engine(**arguments, return_dict=False)[0]
    assert {name: g._graph for name, g in engine._graphs.items()} == graphs
    engine.cuda_graph = False
    assert torch.equal(engine(**arguments, return_dict=False)[0], adapted)
    engine.cuda_graph = True
    assert not torch.equal(adapted, outs[-1])
    engine.set_lora(None)
    assert same_bits(engine, before)
    assert torch.equal(engine(**arguments, return_dict=False)[0], outs[-1])


@pytest.mark.parametrize("resident", [0, 1, 2])
@pytest.mark.parametrize("format", ["off", "int8"])
def test_weights_that_a_plan_holds_get_them_too(built, files, format, resident, call, tmp_path):
    folder = built(format).save(tmp_path / "engine")
    plain, planned = turbocompile.load(folder), turbocompile.load(folder)
    names = [p.prefix for p in parcels_of(planned.programs).parcels]
    assert len(names) == 2
    module = ModulePlan(frozenset(names[:resident]), 2, 0, 1, 2, 2 - resident)
    planned.use_plan(MemoryPlan(0, {"transformer": module}, together=True, leaves=frozenset({"decode"})))
    out = run(planned, call)
    for lora in ([files["a"], files["c"]], files["b"], None):
        plain.set_lora(lora)
        planned.set_lora(lora)
        assert torch.equal(run(planned, call), run(plain, call))
        planned.park()
        assert torch.equal(run(planned, call), run(plain, call))
    assert torch.equal(run(planned, call), out)
