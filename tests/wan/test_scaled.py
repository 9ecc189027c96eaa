"""8-bit weights with scales are read as what they stand for, wherever they are; a scale is never left out silently."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.recipe.schema import Recipe
from turbocompile.tools.verify_folder import verify_folder
from turbocompile.wan.components import MODELS, load_components
from turbocompile.wan.scaled import ScaledTensors, dequantized
from turbocompile.wan.source import open_source
from turbocompile.wan.tensors import INDEX, SINGLE, Tensors

LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
TINY = {"shapes": [{"height": 32, "width": 32, "num_frames": 5}], "target": "cpu", "components": "none"}


def stored(weight: torch.Tensor, dtype: torch.dtype, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (N, K) in 8 bits, its scale by `tensor`, `row` (N,), `column` (N, 1) or `block` of 64 x 64, and what
    the two stand for.
    """
    blocks = {"tensor": weight.shape, "row": (1, weight.shape[1]), "column": (1, weight.shape[1]), "block": (64, 64)}
    rows, columns = blocks[kind]
    tiles = weight.float().unfold(0, rows, rows).unfold(1, columns, columns)
    scale = tiles.abs().amax((2, 3)).clamp(min=1e-6) / LIMITS[dtype]
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    data = weight.float() / wide
    data = (data.round() if dtype == torch.int8 else data).to(dtype)
    shape = {"tensor": (), "row": (weight.shape[0],)}.get(kind, scale.shape)
    return data, scale.reshape(shape), data.float() * wide


def in_blocks(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and name.startswith("blocks.")


def quantize(state, name: str, dtype: torch.dtype, kind: str, chosen=in_blocks):
    """(what the file holds, what it stands for)."""
    file, meant = dict(state), dict(state)
    for key, weight in state.items():
        if chosen(key, weight):
            file[key], file[f"{key.removesuffix('weight')}{name}"], meant[key] = stored(weight, dtype, kind)
    return file, meant


@pytest.fixture(scope="module")
def state(example):
    return load_file(example() / "transformer" / SINGLE)


def opened(path, **more):
    return open_source(Recipe.from_dict({"model": str(path), **TINY, **more})).transformers["transformer"]


def write(folder, example, file, shards=1):
    """The example's transformer with other weights, in one file or in shards that part weights from their scales."""
    shutil.copytree(example() / "transformer", folder)
    if shards == 1:
        save_file(file, folder / SINGLE)
        return folder
    (folder / SINGLE).unlink()
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {key: names[i % shards] for i, key in enumerate(sorted(file))}
    for name in names:
        save_file({k: v for k, v in file.items() if places[k] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize(
    "name", ["weight_scale", "scale_weight", "scale", "weight_scale_inv", "weight_quantizer._scale"]
)
@pytest.mark.parametrize("kind", ["tensor", "row", "column", "block"])
@pytest.mark.parametrize("dtype", LIMITS, ids=["e4m3", "e5m2", "int8"])
def test_a_weight_is_what_it_stands_for_under_every_name_and_grid(name, kind, dtype):
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0))
    file, meant = quantize({"blocks.0.a.weight": weight}, name, dtype, kind)
    tensors = ScaledTensors(Tensors(file), "x")
    assert list(tensors.keys()) == ["blocks.0.a.weight"]
    assert tensors.spec("blocks.0.a.weight") == ((128, 192), torch.float32)
    found = tensors.get("blocks.0.a.weight")
    assert torch.equal(found, meant["blocks.0.a.weight"])
    # half a step of the coarsest: of e5m2 1/8 of a value, of int8 1/254 of the largest, about 4.5
    assert (found - weight).abs().max() < weight.abs().max() / 8


def test_blocks_of_128_may_leave_a_rest():
    data = torch.ones(200, 130, dtype=torch.int8)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = dequantized(data, scale)
    assert [found[i, j].item() for i, j in ((0, 0), (127, 129), (128, 127), (199, 129))] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("place", ["file", "folder", "shards"])
@pytest.mark.parametrize(("name", "kind"), [("scale_weight", "tensor"), ("weight_scale", "row"), ("scale", "column")])
def test_a_transformer_is_what_its_file_stands_for(example, tmp_path, state, place, name, kind):
    file, meant = quantize(state, name, torch.float8_e4m3fn, kind)
    assert len(file) > len(meant)
    if place == "file":  # a file of diffusers' names has no configuration beside it, and heads of 128
        file, meant = quantize(load_file(example("t2v", 128) / "transformer" / SINGLE), name, torch.float8_e4m3fn, kind)
        path = tmp_path / "fp8.safetensors"
        save_file({f"model.diffusion_model.{k}": v for k, v in file.items()}, path)
    else:
        path = write(tmp_path / "t", example, file, 3 if place == "shards" else 1)
    model = opened(path).load()
    assert all(torch.equal(p, meant[n]) for n, p in model.named_parameters())


def test_an_engine_of_scaled_weights_answers_as_the_dequantized_model(example, tmp_path, state):
    file, meant = quantize(state, "scale_weight", torch.float8_e4m3fn, "tensor")
    file["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    for name in [n for n in file if n.endswith(".scale_weight")]:
        file[name.replace("scale_weight", "scale_input")] = torch.ones(())
    folder = write(tmp_path / "t", example, file)
    report = optimize_recipe(Recipe.from_dict({"model": str(folder), **TINY}), tmp_path / "engine")
    assert any("scales of activations" in warning for warning in report.warnings)
    checked = verify_folder(tmp_path / "engine", numeric=True)
    assert checked.good
    assert checked.limit is not None
    loaded = opened(folder).load()
    assert torch.equal(loaded.blocks[0].ffn.net[2].weight, meant["blocks.0.ffn.net.2.weight"])


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize(("name", "kind"), [("weight_scale", "row"), ("scale_weight", "tensor"), ("scale", "column")])
def test_components_are_what_their_files_stand_for(example, tmp_path, part, name, kind):
    folder = tmp_path / "wan"
    shutil.copytree(example("i2v-image"), folder)
    path = next((folder / part).glob("*.safetensors"))
    file, meant = quantize(
        load_file(path), name, torch.float8_e4m3fn, kind, lambda n, w: w.dim() == 2 and n.endswith(".weight")
    )
    if part == "vae":  # it has convolutions alone: one number scales any shape
        file, meant = dict(file), dict(meant)
        for key in [k for k in file if k.endswith(".weight")]:
            scale = file[key].abs().max() / 448
            file[key] = (file[key] / scale).to(torch.float8_e4m3fn)
            rows = scale.expand(file[key].shape[0]) if kind == "row" else scale
            file[f"{key.removesuffix('weight')}{name}"] = rows.clone()
            meant[key] = file[key].float() * scale
    assert len(file) > len(meant)
    save_file(file, path, {"format": "pt"})
    recipe = {"model": {"path": str(folder)}, "target": "cpu", "shapes": TINY["shapes"]}
    components = open_source(Recipe.from_dict(recipe)).components
    assert components.sizes()[part] > 4 * sum(t.numel() for t in meant.values())
    for load in (components.load, lambda: load_components(tmp_path / "c", components.save(tmp_path / "c"))):
        loaded = load()[part].state_dict()
        known = {k.removeprefix("vision_model."): v for k, v in meant.items()}
        for key, value in loaded.items():
            wanted = known.get(key.removeprefix("vision_model."), known.get("shared.weight"))
            assert torch.equal(value, wanted), key


def test_plain_float8_is_cast(example, tmp_path, state):
    file = {k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in state.items()}
    model = opened(write(tmp_path / "t", example, file)).load()
    assert all(torch.equal(p, file[n].float()) for n, p in model.named_parameters())


BAD = "give the checkpoint that was not quantized"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"a.weight": torch.int8}, "a.weight is stored as int8 and has no scale beside it; .*" + BAD),
        ({"a.weight": torch.uint8}, "a.weight is stored as uint8 and has no scale"),
        ({"a.weight_scale": (3,)}, r"the scale a.weight_scale has the shape \[3\], which says neither one number"),
        ({"a.weight_scale": (1, 5)}, r"has the shape \[1, 5\]"),
        ({"a.weight_scale": (), "a.scale": ()}, "has the scales a.weight_scale and a.scale, and only one"),
        ({"a.weight_scale": (), "b.weight": torch.float8_e4m3fn}, "b.weight .* has no scale beside it where other"),
    ],
)
def test_what_says_no_number_is_refused_in_a_sentence(change, sentence):
    file = {"a.weight": torch.ones(8, 12).to(torch.float8_e4m3fn), "b.weight": torch.ones(8, 12)}
    for name, what in change.items():
        file[name] = file[name].float().to(what) if isinstance(what, torch.dtype) else torch.ones(what)
    with pytest.raises(EngineError, match=sentence) as caught:
        ScaledTensors(Tensors(file), "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"format": "float8_e4m3fn"}, None),
        ({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, None),
        ({"format": "float8_e4m3fn_rowwise", "orig_dtype": "torch.bfloat16"}, None),
        ({"format": "float8_e4m3fn_blockwise", "group_size": 128}, None),
        ({"format": "int8_tensorwise", "convrot": False}, None),
        ({"format": "nvfp4"}, "stored as nvfp4, which"),
        ({"format": "float8_e4m3fn", "convrot": True}, "stored as float8_e4m3fn with convrot"),
        ({"format": "int8_tensorwise", "convrot": True}, "rotated in groups of 256 columns, which must be"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 2}, "which must be a power of four"),
    ],
)
def test_descriptions_of_weights_are_followed_or_refused(description, words):
    text = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    file = {
        "a.weight": torch.full((2, 2), 2.0).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(0.5),
        "a.comfy_quant": text,
    }
    if words is None:
        assert ScaledTensors(Tensors(file), "x").get("a.weight").eq(1).all()
        return
    with pytest.raises((EngineError, UnsupportedError), match=words):
        ScaledTensors(Tensors(file), "x")


def test_bytes_that_are_described_as_float8_are_float8():
    weight, scale = torch.randn(4, 8), torch.rand(4, 1)
    data = weight.to(torch.float8_e4m3fn)
    text = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    file = {"a.weight": data.view(torch.uint8), "a.weight_scale": scale, "a.comfy_quant": text}
    tensors = ScaledTensors(Tensors(file), "x")
    assert torch.equal(tensors.get("a.weight"), data.float() * scale)
    assert tensors.data("a.weight").dtype == data.dtype
    assert tensors.stored["a.weight"].format == "fp8"
    del file["a.comfy_quant"]
    with pytest.raises(EngineError, match=r"a.weight is stored as uint8 and has no scale beside it"):
        ScaledTensors(Tensors({"a.weight": file["a.weight"]}), "x")


def saved(tmp_path, model, change):
    """A .pth of a tiny transformer whose 2-D block weights are float8, after a change."""
    state = {}
    for name, weight in model.state_dict().items():
        if name.startswith("blocks.") and weight.dim() == 2:
            scale = weight.abs().max() / 448
            state[name] = (weight / scale).to(torch.float8_e4m3fn)
            state[name.removesuffix("weight") + "weight_scale"] = scale.reshape(())
        else:
            state[name] = weight
    path = tmp_path / "model.pth"
    torch.save(change(state), path)
    return path


def scales(state):
    return {k: v for k, v in state.items() if k.endswith("weight_scale")}


def without(state):
    return {k: v for k, v in state.items() if not k.endswith("weight_scale")}


MISLAID = {
    "beside": (lambda s: {"model": without(s), "scales": scales(s)}, "tensors under 'scales' beside 'model'"),
    "within": (lambda s: {**without(s), "scales": scales(s)}, "tensors under 'scales' that are in no state dict"),
    "said": (
        lambda s: {**without(s), "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        "is said to be scaled .* and has no scale",
    ),
    "not finite": (lambda s: {k: v * float("nan") if k in scales(s) else v for k, v in s.items()}, "no finite number"),
    "without values": (lambda s: {k: v.to("meta") for k, v in s.items()}, "on the meta device, without values"),
    "sparse": (
        lambda s: {**s, "patch_embedding.bias": s["patch_embedding.bias"].to_sparse()},
        "stored as torch.sparse",
    ),
}


@pytest.mark.parametrize("name", MISLAID)
def test_scales_that_are_elsewhere_missing_or_no_numbers_are_refused(name, wan, tmp_path):
    change, message = MISLAID[name]
    with pytest.raises(EngineError, match=message):
        opened(saved(tmp_path, wan(num_attention_heads=1, attention_head_dim=128), change)).load()


def test_scales_that_are_python_numbers_are_read(wan, tmp_path):
    model = wan(num_attention_heads=1, attention_head_dim=128)
    path = saved(tmp_path, model, lambda s: {k: float(v) if k in scales(s) else v for k, v in s.items()})
    found = opened(path).load().state_dict()
    for name, weight in model.state_dict().items():
        assert (found[name] - weight).abs().max() <= weight.abs().max() / 16  # half a step of e4m3's three bits
