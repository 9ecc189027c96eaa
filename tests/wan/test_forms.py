"""The forms that a model lies on a disk in: variants, shards, links, prefixes, GGUF, two images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.capture.guards import check_parameters
from turbocompile.errors import EngineError, TurbocompileError, UnsupportedError
from turbocompile.recipe.schema import Recipe, load_recipe
from turbocompile.tools.verify_folder import verify_folder
from turbocompile.video.session import generate
from turbocompile.wan.components import MODELS, load_components
from turbocompile.wan.source import open_source
from turbocompile.wan.tensors import SINGLE

CPU = {"target": "cpu", "shapes": [{"height": 32, "width": 32, "num_frames": 5}]}


def opened(path, **more):
    return open_source(Recipe.from_dict({"model": {"path": str(path)}, **CPU, **more}))


@pytest.fixture
def folder(example, tmp_path):
    shutil.copytree(example("i2v-image", 128), tmp_path / "wan")
    return tmp_path / "wan"


def same(model: nn.Module, other: nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
@pytest.mark.parametrize("shards", [False, True])
def test_the_only_variant_is_the_model(example, tmp_path, variant, shards):
    plain = opened(example())
    folder = tmp_path / "wan"
    shutil.copytree(example(), folder)
    size = {"max_shard_size": "500KB"} if shards else {}
    for name in ("transformer", "vae", "text_encoder"):
        part = plain.transformers[name].load() if name == "transformer" else plain.components.load()[name]
        for path in (folder / name).glob("*.safetensors"):
            path.unlink()
        if name == "transformer":
            full = WanTransformer3DModel.from_pretrained(example() / name)
            full.save_pretrained(folder / name, variant=variant, **size)
        else:
            part.save_pretrained(folder / name, variant=variant, **size)
    found = opened(folder)
    assert same(found.transformers["transformer"].load(), plain.transformers["transformer"].load())
    expected = plain.components.load()
    table = found.components.save(tmp_path / "c")
    for loaded in (found.components.load(), load_components(tmp_path / "c", table)):
        assert same(loaded["vae"], expected["vae"])
        assert same(loaded["text_encoder"], expected["text_encoder"])
    assert not list((tmp_path / "c").rglob(f"*.{variant}.json"))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_of_several_variants_that_of_the_recipes_dtype_is_taken_and_a_plain_file_wins(folder, part):
    weights = folder / part / SINGLE
    state = load_file(weights)
    for times, variant in enumerate(("fp16", "bf16"), 2):
        path = folder / part / f"diffusion_pytorch_model.{variant}.safetensors"
        save_file({k: v * times for k, v in state.items()}, path, {"format": "pt"})
    key = min(state)

    def factor(dtype: str) -> float:
        source = opened(folder, dtype=dtype)
        held = source.transformers[part].load() if part == "transformer" else source.components.load()[part]
        return round(float((held.state_dict()[key].float() / state[key]).mean()))

    assert factor("float32") == 1
    weights.unlink()
    assert [factor(dtype) for dtype in ("float32", "bfloat16")] == [3, 3]
    if part == "transformer":
        assert factor("float16") == 2
    for variant in ("fp16", "bf16"):
        path = folder / part / f"diffusion_pytorch_model.{variant}.safetensors"
        path.rename(path.with_name(path.name.replace(variant, f"{variant}_ema")))
    with pytest.raises(EngineError, match=r"variants bf16_ema, fp16_ema and not as diffusion_pytorch_model\.safet"):
        opened(folder).components.sizes()


def test_a_hub_caches_links_open_as_models(folder, tmp_path):
    """In a cache each file of a snapshot is a link into ../../blobs, whose names are hashes."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / f"{number:064}")
        target.symlink_to(
            Path("../" * len(target.relative_to(tmp_path / "models--a--b").parts[:-1])) / "blobs" / f"{number:064}"
        )
    linked = opened(snapshot)
    linked.components.save(tmp_path / "c")
    assert not any(p.is_symlink() for p in (tmp_path / "c").rglob("*"))
    assert same(linked.transformers["transformer"].load(), opened(folder).transformers["transformer"].load())
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: models--a--b/snapshots/0123/transformer/{SINGLE}}}\ncomponents: none\ntarget: cpu\n"
    )
    by_file = open_source(load_recipe(tmp_path / "r.yaml"))
    assert by_file.transformers["transformer"].config["num_layers"] == 2
    blob = (snapshot / "transformer" / SINGLE).resolve()  # and by its hash
    assert opened(blob, components="none").transformers["transformer"].config["num_layers"] == 2


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.diffusion_model.", "model.", "transformer.", "_orig_mod.", "module."]
)
def test_what_loaders_put_before_names_is_stripped(folder, tmp_path, prefix):
    state = load_file(folder / "transformer" / SINGLE)
    save_file({f"{prefix}{k}": v for k, v in state.items()}, tmp_path / "w.safetensors")
    made = opened(tmp_path / "w.safetensors", components="none").transformers["transformer"]
    assert torch.equal(made.load().proj_out.weight, state["proj_out.weight"])


@pytest.mark.parametrize("place", ["file", "disguised", "folder", "transformer", "text_encoder", "low"])
def test_a_damaged_gguf_is_named_wherever_it_is(folder, tmp_path, place):
    gguf, more = b"GGUF" + bytes(60), {}
    path = tmp_path / ("model.bin" if place == "disguised" else "model-Q4_K_M.gguf")
    if place in ("file", "disguised"):
        path.write_bytes(gguf)
        more = {"components": "none"}
    elif place == "folder":
        path = tmp_path / "ggufs"
        path.mkdir()
        (path / "model.gguf").write_bytes(gguf)
    elif place == "low":
        path.write_bytes(gguf)
        high = folder / "transformer" / SINGLE
        more = {"model": {"path": str(high), "transformer_2": str(path)}, "components": "none"}
    else:
        for weights in (folder / place).glob("*.safetensors"):
            weights.unlink()
        (folder / place / "model.gguf").write_bytes(gguf)
        path = folder
    recipe = Recipe.from_dict({"model": {"path": str(path)}, **CPU, **more})
    error, said = (EngineError, r"model.*: this is no whole GGUF file \(.*download it again")
    if place == "text_encoder":
        error, said = (UnsupportedError, r"this is a GGUF file.*as a transformer alone; give the safetensors version")
    with pytest.raises(error, match=said) as caught:
        open_source(recipe).components.sizes()
    assert "\n" not in str(caught.value)


class GGUFParameter(nn.Parameter):
    """As in diffusers.quantizers.gguf.utils."""


def foreign(module: str, name: str) -> type:
    return type(name, (nn.Parameter,), {"__module__": module})


@pytest.mark.parametrize(
    ("kind", "library"),
    [
        (GGUFParameter, "GGUF"),
        (foreign("diffusers.quantizers.gguf.utils", "GGUFParameter"), "GGUF"),
        (foreign("bitsandbytes.nn.modules", "Params4bit"), "bitsandbytes"),
        (foreign("optimum.quanto.tensor.weights.qbytes", "WeightQBytesTensor"), "quanto"),
    ],
)
def test_parameters_that_another_library_packed_are_refused(kind, library):
    model = nn.Sequential(nn.Linear(4, 4))
    check_parameters(model)
    model[0].weight = kind(torch.zeros(4, 4))
    with pytest.raises(UnsupportedError, match=rf"0\.weight is quantized by {library} .*load the model without"):
        check_parameters(model)


def test_ggufs_own_parameter_is_known():
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter as Theirs

    model = nn.Linear(32, 2, bias=False)
    data = torch.zeros(2, 34, dtype=torch.uint8)
    model.weight = Theirs(data, quant_type=gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(UnsupportedError, match="weight is quantized by GGUF"):
        check_parameters(model)


def test_a_model_of_first_and_last_frames_is_built_and_asks_for_both(folder, tmp_path):
    """FLF2V: CLIP tokens of two images, 17 each here, and a table of positions over both."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config = {k: v for k, v in config.items() if k[0] != "_"} | {"pos_embed_seq_len": 34}
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    model = WanTransformer3DModel(**config)
    nn.init.normal_(model.condition_embedder.image_embedder.pos_embed)
    model.save_pretrained(folder / "transformer")
    recipe = Recipe.from_dict({"model": {"path": str(folder)}, **CPU, "passes": "off", "verify": "off"})
    inputs = open_source(recipe).transformers["transformer"].example_inputs(recipe.shapes[0])[1]
    assert inputs["encoder_hidden_states_image"].shape == (2, 17, 32)
    optimize_recipe(recipe, tmp_path / "engine")
    assert verify_folder(tmp_path / "engine", numeric=True).errors["transformer"].max_abs == 0
    with pytest.raises(UnsupportedError, match=r"from a first image to a last one .* last_image="):
        generate(tmp_path / "engine", "a cat", image=Image.new("RGB", (32, 32)))
    path = folder / "image_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": 64}))
    with pytest.raises(EngineError, match=r"positions for 34 image tokens .* 2 images makes 130"):
        opened(folder)


@pytest.mark.parametrize("part", MODELS)
def test_weights_under_another_name_are_told(folder, part):
    path = next((folder / part).glob("*.safetensors"))
    path.rename(path.with_name("weights.safetensors"))
    with pytest.raises(TurbocompileError, match=r"holds neither .* but weights\.safetensors: rename it"):
        opened(folder).components.sizes()
