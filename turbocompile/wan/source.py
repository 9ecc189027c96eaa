"""Opens the model that a recipe names: a diffusers folder, a hub id, a checkpoint file, or synthetic weights.

`open_source(recipe)` reads configurations and headers alone. A transformer is built with parameters on the meta device
and its weights stay a `TensorSource` until the emitter asks for them, so that planning a 14B model needs no memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.recipe.configuration import with_changes, wrong_field
from turbocompile.recipe.parse import HUB_ID
from turbocompile.recipe.presets import (
    CLIP_TOKENS,
    HUB_PRESETS,
    PRESETS,
    Geometry,
    Preset,
    boundary_of,
    preset_for,
    published_vae,
    task_of,
    with_transformer,
)
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.as_stored import parts_of
from turbocompile.wan.checks import check_channels, check_frames, check_task, geometry_of
from turbocompile.wan.components import Components, FolderComponents, NoComponents, read_index, read_json
from turbocompile.wan.hub import fetch
from turbocompile.wan.lora import with_loras
from turbocompile.wan.opening import (
    EXPERTS,
    Checkpoint,
    is_original,
    is_transformer,
    open_checkpoint,
    read_config,
    snapshot,
)
from turbocompile.wan.synthetic_components import SyntheticComponents
from turbocompile.wan.tensors import SyntheticTensors
from turbocompile.wan.transformer import TransformerSource, build_transformer, images_of

TRANSFORMERS = ("transformer", "transformer_2")
ONE_TIMESTEP = (
    "the engine takes one timestep for all tokens (model.text_only), which in text-to-video are the same; a diffusers "
    "pipeline with expand_timesteps gives each token its own, so set expand_timesteps=False in the one that calls the "
    "engine"
)


@dataclass(frozen=True)
class Source:
    """An opened model. task: as `presets.task_of` says it. boundary_ratio: below it (times 1000) transformer_2 takes
    over.

    is_synthetic: whether the transformers' weights are random. where: names the model in messages. seed: of synthetic
    weights.
    """

    transformers: Mapping[str, TransformerSource]
    components: Components
    task: str
    boundary_ratio: float | None
    is_synthetic: bool
    where: str
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return next(iter(self.transformers.values())).geometry

    def synthetic(self, name: str) -> TensorSource:
        """Synthetic weights with the names, shapes and dtypes of a transformer's weights, for plans without values."""
        transformer = self.transformers[name]
        tensors, parts = transformer.tensors, parts_of(transformer.stored)
        return SyntheticTensors({key: tensors.spec(key) for key in (*tensors.keys(), *parts)}, self.seed, name)

    @property
    def sla(self) -> bool:
        """Whether the checkpoint has SLA projections (`proj_l`): it was trained with sparse-linear attention."""
        return any(".proj_l." in name for t in self.transformers.values() for name in t.tensors.keys())  # noqa: SIM118


def open_source(recipe: Recipe) -> Source:
    """The model of a recipe. Reads headers, downloads a hub id's files, reads no weights.

    Raises RecipeError where there is no such model or it has not the recipe's sizes, EngineError where it is damaged,
    UnsupportedError where it is something else than Wan's transformer.
    """
    model = recipe.model
    if model.preset is not None:
        return _open_preset(recipe, PRESETS[model.preset])
    name = model.path or ""
    path = Path(name)
    if path.is_dir():
        return _open_folder(recipe, snapshot(path))
    if path.is_file():
        return _open_file(recipe, path)
    if not HUB_ID.fullmatch(name):
        raise RecipeError(f"model.path: there is no folder or file {name}, and it is no hub id (owner/name)")
    if model.weights == "synthetic" and name in HUB_PRESETS:
        return _open_preset(recipe, HUB_PRESETS[name])
    return _open_folder(recipe, fetch(name, model.revision))


def _source(
    recipe: Recipe,
    transformers: Mapping[str, TransformerSource],
    own: Components,
    boundary: float | None,
    synthetic: bool,
    where: str,
    task: str = "",
) -> Source:
    """The opened model, after a check that its parts fit each other and the recipe's sizes. own: its components.

    task: where something else than the configuration says it. Raises RecipeError, EngineError, UnsupportedError.
    """
    components = _components(recipe, own)
    config = transformers[next(iter(transformers))].config
    task = task or task_of(config)
    for name, other in transformers.items():
        for key in ("in_channels", "out_channels", "patch_size", "image_dim", "vace_layers"):
            if other.config.get(key) != config.get(key):
                raise EngineError(
                    f"{where}: the {key} of {name} is {other.config.get(key)}, and that of the first transformer "
                    f"{config.get(key)}; two experts work on the same latents, so give two of one model"
                )
    vae = components.vae_config() or own.vae_config()
    made = geometry_of(config, vae if vae is not None else published_vae(config["out_channels"]), where)
    if vae is not None and components.vae_config() is not None:
        check_channels(config, vae, task, made, where)
    try:
        recipe.check_sizes(made)
    except RecipeError as error:
        raise RecipeError(f"{error}, because of the VAE and the patches of {where}") from None
    check_task(recipe, task, made, where)
    if task in ("i2v", "vace") and vae is not None:
        check_frames(recipe, made, where)
    each = task == "ti2v" and not recipe.model.text_only
    notes = (ONE_TIMESTEP,) if task == "ti2v" and not each else ()
    task = "t2v" if task == "ti2v" and not each else task
    placed = {
        name: replace(t, geometry=made, per_token=each, notes=(*t.notes, *notes))
        for name, t in with_loras(transformers, recipe.lora).items()
    }
    return Source(placed, components, task, boundary, synthetic, where, recipe.model.seed)


def _open_preset(recipe: Recipe, preset: Preset) -> Source:
    if recipe.model.weights == "checkpoint":
        return _open_folder(recipe, fetch(preset.hub_id or "", recipe.model.revision))
    config = with_changes(preset.transformer, recipe.model.config)
    wrong = wrong_field(config)
    if wrong is not None:
        raise RecipeError(f"model.config: {wrong}")
    if recipe.model.config:
        preset = with_transformer(preset, config)
    names = TRANSFORMERS[: preset.experts]
    tokens = _tokens_an_image(config, _image_tokens(preset), preset.name)
    transformers = {name: _synthetic(name, config, recipe, preset.name, tokens) for name in names}
    own = SyntheticComponents(preset, recipe.model.seed, recipe.torch_dtype)
    where = f"{preset.name} (synthetic weights)"
    return _source(recipe, transformers, own, preset.boundary_ratio, True, where, preset.task)


def _image_tokens(preset: Preset) -> int | None:
    if preset.transformer["image_dim"] is None:
        return None
    encoder = preset.image_encoder
    return CLIP_TOKENS if encoder is None else (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1


def _synthetic(
    name: str, config: Mapping[str, Any], recipe: Recipe, where: str, image_tokens: int | None
) -> TransformerSource:
    model = build_transformer(config, recipe.torch_dtype)
    specs = {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}
    tensors = SyntheticTensors(specs, recipe.model.seed, name)
    return TransformerSource(name, config, tensors, recipe.torch_dtype, image_tokens, where)


def _open_folder(recipe: Recipe, folder: Path) -> Source:
    """A diffusers pipeline folder, or the folder of a transformer alone."""
    if recipe.model.transformer_2:
        raise RecipeError(
            "model.transformer_2: goes with a checkpoint file; a pipeline's folder has both experts in it"
        )
    if not (folder / "model_index.json").exists():
        if all((folder / name).is_dir() for name in EXPERTS):
            return _open_experts(recipe, folder)
        if is_transformer(folder):
            return _open_bare(recipe, folder)
    index = read_index(folder)
    names = [name for name in TRANSFORMERS if isinstance(index.get(name), list) and any(index[name][:1])]
    if not names:
        raise UnsupportedError(f"{folder}: this pipeline ({index.get('_class_name')}) has no transformer")
    boundary = index.get("boundary_ratio")
    if boundary is not None and (type(boundary) not in (int, float) or not 0 <= boundary <= 1):
        index_file = folder / "model_index.json"
        raise EngineError(f"{index_file}: boundary_ratio must be a number from 0 to 1, not {boundary!r}")
    transformers = {
        name: _open_transformer(recipe, folder / name, name, _folder_image_tokens(folder)) for name in names
    }
    config = transformers[names[0]].config
    synthetic = recipe.model.weights == "synthetic"
    own: Components = FolderComponents(folder, recipe.torch_dtype)
    if synthetic and not (folder / "vae").is_dir():  # configurations alone
        own = SyntheticComponents(preset_for(config, len(names), boundary), recipe.model.seed, recipe.torch_dtype)
    where = f"{folder} (synthetic weights)" if synthetic else str(folder)
    task = task_of(config)
    if task != "vace":
        task = "ti2v" if index.get("expand_timesteps") else task.replace("ti2v", "t2v")
    return _source(recipe, transformers, own, boundary, synthetic, where, task)


def _open_bare(recipe: Recipe, folder: Path) -> Source:
    """A folder with a transformer's weights and perhaps its config.json, which alone serves synthetic weights."""
    tokens = _folder_image_tokens(Path(recipe.components.source))
    return _alone(recipe, {"transformer": _open_transformer(recipe, folder, "transformer", tokens)}, folder)


def _open_experts(recipe: Recipe, folder: Path) -> Source:
    """A folder of Wan2.2 in its own layout: a folder of each expert."""
    tokens = _folder_image_tokens(Path(recipe.components.source))
    pairs = zip(TRANSFORMERS, EXPERTS, strict=True)
    return _alone(recipe, {n: _open_transformer(recipe, folder / part, n, tokens) for n, part in pairs}, folder)


def _alone(recipe: Recipe, transformers: dict[str, TransformerSource], path: Path) -> Source:
    """One transformer or two experts without the other parts of a pipeline."""
    high = transformers["transformer"]
    boundary = boundary_of(None, task_of(high.config)) if len(transformers) == 2 else None
    synthetic = recipe.model.weights == "synthetic"
    own: Components = NoComponents()
    if synthetic:
        preset = preset_for(high.config, len(transformers), boundary)
        own = SyntheticComponents(preset, recipe.model.seed, recipe.torch_dtype)
    else:
        _need_components(recipe, path, high)
    return _source(recipe, transformers, own, boundary, synthetic, str(path))


def _need_components(recipe: Recipe, path: Path, transformer: TransformerSource) -> None:
    if recipe.components.source == "model":
        raise RecipeError(
            f"components.source: {path} holds the transformer alone; name the folder or hub id of its text encoder and "
            f"VAE, as in components: {_components_hint(transformer.config)}, or components: none"
        )


def _open_transformer(recipe: Recipe, folder: Path, name: str, image_tokens: int | None) -> TransformerSource:
    """A transformer's folder. With synthetic weights its configuration alone is read, where it has one."""
    opened: Checkpoint | None = None
    synthetic = recipe.model.weights == "synthetic"
    if synthetic and not is_original(read_json(folder / "config.json", "a diffusers model has one")):
        config = read_config(folder)
    else:
        opened = open_checkpoint(folder, recipe.torch_dtype)
        config = opened.config
    config = with_changes(config, recipe.model.config)
    wrong = wrong_field(config)
    if wrong is not None:
        raise EngineError(f"{folder / 'config.json'} (or the recipe's model.config): {wrong}")
    for field in {"patch_size", "vace_layers"} & config.keys():
        config[field] = tuple(config[field])
    tokens = _tokens_an_image(config, image_tokens, str(folder))
    if synthetic or opened is None:
        return _synthetic(name, config, recipe, str(folder), tokens)
    written = opened.written if opened.written is not None else config["num_layers"]
    _check_layers(opened.tensors, written, config["num_layers"], str(folder))
    return TransformerSource(name, config, opened.tensors, recipe.torch_dtype, tokens, str(folder), notes=opened.notes)


def _check_layers(tensors: TensorSource, written: Any, asked: int, where: str) -> None:
    """Raises EngineError for a configuration of fewer blocks than the file; the recipe alone may leave blocks out."""
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in tensors.keys()) if m}  # noqa: SIM118
    if type(written) is int and blocks and max(blocks) >= max(written, asked):
        left = [n for n in tensors.keys() if n.startswith(f"blocks.{max(blocks)}.")]  # noqa: SIM118
        raise EngineError(
            f"{where}: the configuration has {written} layers (num_layers), and the weights have {max(blocks) + 1}, as "
            f"in {min(left)}, so they are of two models; give the configuration that belongs to the weights"
        )


def _tokens_an_image(config: Mapping[str, Any], encoder: int | None, where: str) -> int | None:
    """CLIP tokens of one image; None for a transformer without images. encoder: tokens that the image encoder makes.

    Raises EngineError where the transformer's table of positions has another number of tokens.
    """
    if config["image_dim"] is None:
        return None
    length, images = config.get("pos_embed_seq_len"), images_of(config)
    tokens = encoder or (CLIP_TOKENS if length is None else length // images)
    if length is not None and length != images * tokens:
        raise EngineError(
            f"{where}: the transformer has positions for {length} image tokens (pos_embed_seq_len), and the encoder of "
            f"{images} images makes {images * tokens}; they are of two models, so download it again"
        )
    return tokens


def _folder_image_tokens(folder: Path) -> int | None:
    path = folder / "image_encoder" / "config.json"
    if not path.is_file():
        return None
    config = read_json(path, "an image encoder has one")
    config = config.get("vision_config", config)
    return (int(config.get("image_size", 224)) // int(config.get("patch_size", 14))) ** 2 + 1


def _open_file(recipe: Recipe, path: Path) -> Source:
    """A checkpoint file, and the low-noise expert's where there is one."""
    files = [path, *([Path(recipe.model.transformer_2)] if recipe.model.transformer_2 else [])]
    image_tokens = _folder_image_tokens(Path(recipe.components.source))
    transformers = {
        name: _open_checkpoint(recipe, file, name, image_tokens)
        for name, file in zip(TRANSFORMERS, files, strict=False)
    }
    return _alone(recipe, transformers, path)


def _open_checkpoint(recipe: Recipe, path: Path, name: str, image_tokens: int | None) -> TransformerSource:
    opened = open_checkpoint(path, recipe.torch_dtype)
    config = with_changes(opened.config, recipe.model.config)
    wrong = wrong_field(config)
    if wrong is not None:
        raise RecipeError(f"model.config: {wrong}")
    tokens = _tokens_an_image(config, image_tokens, str(path))
    if recipe.model.weights == "synthetic":
        return _synthetic(name, config, recipe, str(path), tokens)
    return TransformerSource(name, config, opened.tensors, recipe.torch_dtype, tokens, str(path), notes=opened.notes)


def _components_hint(config: Mapping[str, Any]) -> str:
    """The hub id whose components belong to a transformer of this configuration."""
    known = ("in_channels", "image_dim", "pos_embed_seq_len", "vace_layers")
    fits = [p for p in HUB_PRESETS.values() if all(p.transformer.get(k) == config.get(k) for k in known)]
    exact = [p for p in fits if p.transformer["num_layers"] == config["num_layers"]]
    return (exact or fits or list(HUB_PRESETS.values()))[0].hub_id or ""


def _components(recipe: Recipe, own: Components) -> Components:
    """The components that `components.source` names. own: the components of the model's folder."""
    source = recipe.components.source
    if source == "none":
        return NoComponents()
    if source == "model":
        return own
    folder = Path(source)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(source):
            raise RecipeError(f"components.source: there is no folder {source}, and it is no hub id (owner/name)")
        folder = fetch(source, None, without_transformers=True)
    return FolderComponents(folder, recipe.torch_dtype)
