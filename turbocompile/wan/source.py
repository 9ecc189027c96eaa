"""Opens the model that a recipe names: a diffusers folder, a hub id, a checkpoint file, or synthetic weights.

`open_source(recipe)` reads configurations and headers alone. A transformer is built with parameters on the meta device
and its weights stay a `TensorSource` until the emitter asks for them, so that planning a 14B model needs no memory.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.recipe.parse import HUB_ID
from turbocompile.recipe.presets import (
    HUB_PRESETS,
    PRESETS,
    TEXT_TOKENS,
    TRANSFORMER_FIELDS,
    Geometry,
    Preset,
    preset_for,
    published_vae,
    task_of,
    vae_strides,
    with_transformer,
    wrong_field,
    wrong_latents,
)
from turbocompile.recipe.schema import Recipe, Shape
from turbocompile.wan.checkpoints import CheckpointTensors, infer_config
from turbocompile.wan.components import (
    Components,
    FolderComponents,
    NoComponents,
    SyntheticComponents,
    read_index,
    read_json,
)
from turbocompile.wan.leftovers import refusal
from turbocompile.wan.tensors import SyntheticTensors, checkpoint_file, gguf_refusal, safetensors_folder

CLIP_TOKENS = 257  # image tokens of the CLIP encoder that Wan2.1 I2V was trained with: 16 x 16 patches and the class
BOUNDARY = {"i2v": 0.9, "t2v": 0.875}  # of Wan2.2's two experts, in units of the 1000 training timesteps
TRANSFORMERS = ("transformer", "transformer_2")
PROBE_SECONDS = 5.0
ENCODED = 4  # frames that diffusers' AutoencoderKLWan encodes at a time after the first
IMAGE_PIPELINE = "WanImageToVideoPipeline"
ONE_TIMESTEP = (
    "the engine takes one timestep for all tokens, which in text-to-video are the same; a diffusers pipeline with "
    "expand_timesteps gives each token its own, so set expand_timesteps=False in the one that calls the engine"
)
PUBLISHED = Geometry()
QUANTIZED = ("int8_weight", "scale")  # TurboDiffusion's two parts of a weight
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_SLA = re.compile(r"blocks\.\d+\.attn1\.proj_l\.(weight|bias)")  # read by the pass for sparse-linear attention


@dataclass(frozen=True)
class TransformerSource:
    """One transformer: its configuration, how it is built, and where its weights are.

    dtype: what `from_pretrained(torch_dtype=...)` would be given. image_tokens: of the image encoder, None without one.
    geometry: how a video's size becomes that of its latent. notes: what of the checkpoint is not used, as sentences.
    """

    name: str
    config: Mapping[str, Any]
    tensors: TensorSource
    dtype: torch.dtype
    image_tokens: int | None = None
    where: str = ""
    geometry: Geometry = PUBLISHED
    notes: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """diffusers' WanTransformer3DModel with parameters on meta, in from_pretrained's dtypes, and real buffers.

        Raises EngineError where the weights do not fit the configuration, or some are left over.
        """
        model = build_transformer(self.config, self.dtype)
        available = set(self.tensors.keys())
        parameters = dict(model.named_parameters())
        self._check_all_used(available, set(parameters))
        for name, parameter in parameters.items():
            if name not in available:
                raise EngineError(f"{self.where}: the checkpoint lacks {name}, which its configuration asks for")
            shape, stored = self.tensors.spec(name)
            if not stored.is_floating_point:
                raise EngineError(
                    f"{self.where}: {name} holds whole numbers ({stored}), which are no weights by themselves"
                )
            if shape != tuple(parameter.shape):
                raise EngineError(
                    f"{self.where}: {name} has the shape {shape}, the configuration asks for {tuple(parameter.shape)}"
                )
        return model

    def _check_all_used(self, available: set[str], parameters: set[str]) -> None:
        """Every tensor must be a parameter, or one of a block that the recipe leaves out (num_layers)."""
        layers = self.config["num_layers"]

        def used(name: str) -> bool:
            block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
            like = f"blocks.0.{block[2]}" if block and int(block[1]) >= layers else name
            if like in parameters or _SLA.fullmatch(like):
                return True
            (path, _, leaf), own = like.rpartition("."), name.rpartition(".")[0]
            both = all(f"{own}.{part}" in available for part in QUANTIZED)
            return leaf in QUANTIZED and both and f"{path}.weight" in parameters

        left = [name for name in available if not used(name)]
        if left:
            raise refusal(self.where, left)

    def load(self) -> nn.Module:
        """The model with its weights, on the CPU: the eager one that an engine is compared with."""
        model = self.build()
        for key, parameter in list(model.named_parameters()):
            path, _, leaf = key.rpartition(".")
            value = self.tensors.get(key).to(parameter.dtype).clone()
            setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        return model

    def example_inputs(self, shape: Shape) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call that diffusers' pipelines make, as tensors without storage (device meta).

        hidden_states (B, C, T, H, W) with T, H, W the latent's; timestep (B,) float32; encoder_hidden_states
        (B, 512, text_dim); encoder_hidden_states_image (B, image_tokens, image_dim) where the model takes it;
        (2 B, image_tokens, image_dim) for a model of first and last frames.
        """
        frames, height, width = self.geometry.latent(shape)

        def empty(*size: int, dtype: torch.dtype = self.dtype, images: int = 1) -> torch.Tensor:
            return torch.empty(images * shape.batch, *size, dtype=dtype, device="meta")

        kwargs: dict[str, Any] = {
            "hidden_states": empty(self.config["in_channels"], frames, height, width),
            "timestep": empty(dtype=torch.float32),
            "encoder_hidden_states": empty(TEXT_TOKENS, self.config["text_dim"]),
        }
        if self.image_tokens is not None:
            kwargs["encoder_hidden_states_image"] = empty(
                self.image_tokens, self.config["image_dim"], images=images_of(self.config)
            )
        kwargs["return_dict"] = False
        return (), kwargs


class BlocksFrom:
    """The tensors of a checkpoint with blocks `first` and the next under the names of the first two, and no others."""

    def __init__(self, tensors: TensorSource, first: int) -> None:
        self._tensors = tensors
        self._names: dict[str, str] = {}
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            block = _OF_BLOCK.fullmatch(name)
            if block is None:
                self._names[name] = name
            elif first <= int(block[1]) < first + 2:
                self._names[f"blocks.{int(block[1]) - first}.{block[2]}"] = name

    def keys(self) -> Iterable[str]:
        return self._names.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._tensors.spec(self._names[name])

    def get(self, name: str) -> torch.Tensor:
        return self._tensors.get(self._names[name])


@dataclass(frozen=True)
class Source:
    """An opened model. task: "t2v" or "i2v". boundary_ratio: below it (times 1000) transformer_2 takes over.

    is_synthetic: the transformers' weights are random. where: names the model in messages. seed: of synthetic ones.
    geometry: how a video's size becomes that of its latent.
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
        """Synthetic weights in the names, shapes and dtypes of a transformer's own: for plans that read none."""
        tensors = self.transformers[name].tensors
        return SyntheticTensors({key: tensors.spec(key) for key in tensors.keys()}, self.seed, name)  # noqa: SIM118

    @property
    def sla(self) -> bool:
        """Whether the checkpoint has SLA projections (`proj_l`): it was trained with sparse-linear attention."""
        return any(".proj_l." in name for t in self.transformers.values() for name in t.tensors.keys())  # noqa: SIM118


def build_transformer(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """WanTransformer3DModel for inference: parameters on meta, buffers real.

    diffusers keeps the modules named in `_keep_in_fp32_modules` in float32 whatever dtype is asked for, by whole
    components of the parameter's name; so does this.
    """
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**config)
    # The rotary tables are in no checkpoint, so that their module is built for real.
    model.rope = type(model.rope)(config["attention_head_dim"], tuple(config["patch_size"]), config["rope_max_seq_len"])
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise UnsupportedError(
            f"this version of diffusers has the table {lost[0]} in its Wan transformer, which is not known"
        )
    kept = set(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
    return model.eval().requires_grad_(False)


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
        return _open_folder(recipe, path)
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
) -> Source:
    """The opened model, its parts checked against each other and against the recipe's sizes. own: its components.

    Raises RecipeError, EngineError, UnsupportedError.
    """
    components = _components(recipe, own)
    config = transformers[next(iter(transformers))].config
    task = task_of(config)
    for name, other in transformers.items():
        for key in ("in_channels", "out_channels", "patch_size", "image_dim"):
            if other.config[key] != config[key]:
                raise EngineError(
                    f"{where}: the {key} of {name} is {other.config[key]}, and that of the first transformer "
                    f"{config[key]}; two experts work on the same latents, so give two of one model"
                )
    vae = components.vae_config() or own.vae_config()
    made = _geometry(config, vae if vae is not None else published_vae(config["out_channels"]), where)
    if vae is not None and components.vae_config() is not None:
        _check_channels(config, vae, task, made, where)
    try:
        recipe.check_sizes(made)
    except RecipeError as error:
        raise RecipeError(f"{error}, because of the VAE and the patches of {where}") from None
    if task == "i2v" and vae is not None:
        _check_frames(recipe, made, where)
    placed = {name: replace(t, geometry=made) for name, t in transformers.items()}
    return Source(placed, components, task, boundary, synthetic, where, recipe.model.seed)


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any], where: str) -> Geometry:
    try:
        return Geometry(*vae_strides(vae), tuple(config["patch_size"]))
    except ValueError as error:
        raise EngineError(f"{where}: the VAE's configuration cannot be: {error}") from None


def _check_channels(
    config: Mapping[str, Any], vae: Mapping[str, Any], task: str, geometry: Geometry, where: str
) -> None:
    """The transformer must take what the VAE makes. Raises EngineError, UnsupportedError."""
    wrong = wrong_latents(vae)
    if wrong is not None:
        raise EngineError(f"{where}: the VAE's configuration cannot be: {wrong}")
    channels = vae.get("z_dim", 16)
    given, made = config["in_channels"], config["out_channels"]
    if made != channels:
        raise EngineError(
            f"{where}: the transformer makes latents of {made} channels (out_channels), and its VAE decodes {channels} "
            "(z_dim), so they are of two models; name the folder of its own VAE as components.source, or build with "
            "components: none"
        )
    if task == "i2v" and given != 2 * channels + geometry.temporal:
        raise UnsupportedError(
            f"{where}: the transformer takes {given} channels (in_channels), and image-to-video is "
            f"{2 * channels + geometry.temporal}: {channels} of noise, {channels} of the first frame and a mask of "
            f"{geometry.temporal}; build with components: none and call the engine in the model's own pipeline"
        )
    if task == "t2v" and given != channels:
        raise UnsupportedError(
            f"{where}: the transformer takes {given} channels (in_channels) and makes {made} (out_channels), and "
            "text-to-video is as many; build with components: none and call the engine in the model's own pipeline"
        )


def _check_frames(recipe: Recipe, geometry: Geometry, where: str) -> None:
    """diffusers' VAE encodes the first frame, then fours of frames, whatever its stride."""
    if ENCODED % geometry.temporal:
        raise UnsupportedError(
            f"{where}: the VAE makes one latent frame of {geometry.temporal}, and diffusers encodes {ENCODED} at a "
            "time, so that image-to-video cannot encode its first frame; take a VAE of a temporal stride of 1, 2 or 4"
        )
    for i, shape in enumerate(recipe.shapes):
        if (shape.num_frames - 1) % ENCODED:
            raise RecipeError(
                f"shapes.{i}.num_frames must be {ENCODED}k + 1 for image-to-video, not {shape.num_frames}, because "
                f"diffusers' VAE encodes {ENCODED} frames at a time"
            )


def _open_preset(recipe: Recipe, preset: Preset) -> Source:
    if recipe.model.weights == "checkpoint":
        return _open_folder(recipe, fetch(preset.hub_id or "", recipe.model.revision))
    config = {**preset.transformer, **recipe.model.config}
    wrong = wrong_field(config)
    if wrong is not None:
        raise RecipeError(f"model.config: {wrong}")
    if recipe.model.config:
        preset = with_transformer(preset, config)
    names = TRANSFORMERS[: preset.experts]
    tokens = _tokens_an_image(config, _image_tokens(preset), preset.name)
    transformers = {name: _synthetic(name, config, recipe, preset.name, tokens) for name in names}
    own = SyntheticComponents(preset, recipe.model.seed, recipe.torch_dtype)
    return _source(recipe, transformers, own, preset.boundary_ratio, True, f"{preset.name} (synthetic weights)")


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
        if (folder / "config.json").exists():
            return _open_bare(recipe, folder)
        if (gguf := next(folder.glob("*.gguf"), None)) is not None:
            raise gguf_refusal(gguf)
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
    if index.get("expand_timesteps") and (task_of(config) == "i2v" or index.get("_class_name") == IMAGE_PIPELINE):
        raise UnsupportedError(
            f"{folder}: this image-to-video pipeline gives each token a timestep of its own (expand_timesteps), which "
            "a recipe does not do yet; compile its transformer with turbocompile.optimize(model) inside the pipeline"
        )
    if index.get("expand_timesteps"):
        transformers = {name: replace(t, notes=(*t.notes, ONE_TIMESTEP)) for name, t in transformers.items()}
    return _source(recipe, transformers, own, boundary, synthetic, where)


def _open_bare(recipe: Recipe, folder: Path) -> Source:
    """A folder with a transformer's config.json and weights, or with synthetic weights the config.json alone."""
    transformer = _open_transformer(recipe, folder, "transformer", None)
    synthetic = recipe.model.weights == "synthetic"
    own: Components = NoComponents()
    if synthetic:
        own = SyntheticComponents(preset_for(transformer.config), recipe.model.seed, recipe.torch_dtype)
    else:
        _need_components(recipe, folder, transformer)
    return _source(recipe, {"transformer": transformer}, own, None, synthetic, str(folder))


def _need_components(recipe: Recipe, path: Path, transformer: TransformerSource) -> None:
    if recipe.components.source == "model":
        raise RecipeError(
            f"components.source: {path} holds the transformer alone; name the folder or hub id of its text encoder and "
            f"VAE, as in components: {_components_hint(transformer.config)}, or components: none"
        )


def _open_transformer(recipe: Recipe, folder: Path, name: str, image_tokens: int | None) -> TransformerSource:
    raw = read_json(folder / "config.json", "a diffusers model has one")
    if raw.get("_class_name") != "WanTransformer3DModel":
        raise UnsupportedError(
            f"{folder / 'config.json'}: the transformer is a {raw.get('_class_name')}, recipes take "
            "WanTransformer3DModel; use turbocompile.optimize(model, ...) for others"
        )
    if "quantization_config" in raw:
        raise UnsupportedError(f"{folder / 'config.json'}: the checkpoint is quantized; give the unquantized one")
    config = {k: raw[k] for k in TRANSFORMER_FIELDS if k in raw}
    config = {**PRESETS["wan2.1-t2v-14b"].transformer, **config, **recipe.model.config}  # diffusers' own defaults
    wrong = wrong_field(config)
    if wrong is not None:
        raise EngineError(f"{folder / 'config.json'} (or the recipe's model.config): {wrong}")
    config["patch_size"] = tuple(config["patch_size"])
    tokens = _tokens_an_image(config, image_tokens, str(folder))
    if recipe.model.weights == "synthetic":
        return _synthetic(name, config, recipe, str(folder), tokens)
    tensors = CheckpointTensors(safetensors_folder(folder), str(folder))
    _check_layers(tensors, raw.get("num_layers", config["num_layers"]), config["num_layers"], str(folder))
    return TransformerSource(name, config, tensors, recipe.torch_dtype, tokens, str(folder), notes=tensors.notes)


def _check_layers(tensors: TensorSource, written: Any, asked: int, where: str) -> None:
    """Blocks may be left out by the recipe, which says so, not by a configuration of fewer than the file holds."""
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in tensors.keys()) if m}  # noqa: SIM118
    if type(written) is int and blocks and max(blocks) >= max(written, asked):
        left = [n for n in tensors.keys() if n.startswith(f"blocks.{max(blocks)}.")]  # noqa: SIM118
        raise EngineError(
            f"{where}: the configuration has {written} layers (num_layers), and the weights have {max(blocks) + 1}, as "
            f"in {min(left)}, so they are of two models; give the configuration that belongs to the weights"
        )


def images_of(config: Mapping[str, Any]) -> int:
    """How many images the transformer takes tokens of: two (the first and the last frame) where it has a table of
    positions over them, which diffusers' WanImageEmbedding adds to pairs.
    """
    return 2 if config.get("pos_embed_seq_len") is not None else 1


def _tokens_an_image(config: Mapping[str, Any], encoder: int | None, where: str) -> int | None:
    """CLIP tokens of one image; None where the transformer takes none. encoder: what the image encoder makes.

    Raises EngineError where the transformer's table of positions is of another number.
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
    high = transformers["transformer"]
    synthetic = recipe.model.weights == "synthetic"
    own: Components = NoComponents()
    if synthetic:
        own = SyntheticComponents(preset_for(high.config), recipe.model.seed, recipe.torch_dtype)
    else:
        _need_components(recipe, path, high)
    boundary = BOUNDARY[task_of(high.config)] if len(files) == 2 else None
    return _source(recipe, transformers, own, boundary, synthetic, str(path))


def _open_checkpoint(recipe: Recipe, path: Path, name: str, image_tokens: int | None) -> TransformerSource:
    tensors = CheckpointTensors(checkpoint_file(path), str(path))
    config = {**infer_config(tensors, str(path)), **recipe.model.config}
    wrong = wrong_field(config)
    if wrong is not None:
        raise RecipeError(f"model.config: {wrong}")
    tokens = _tokens_an_image(config, image_tokens, str(path))
    if recipe.model.weights == "synthetic":
        return _synthetic(name, config, recipe, str(path), tokens)
    return TransformerSource(name, config, tensors, recipe.torch_dtype, tokens, str(path), notes=tensors.notes)


def _components_hint(config: Mapping[str, Any]) -> str:
    """The hub id whose components belong to a transformer of this configuration."""
    fits = [p for p in HUB_PRESETS.values() if all(p.transformer[k] == config[k] for k in ("in_channels", "image_dim"))]
    exact = [p for p in fits if p.transformer["num_layers"] == config["num_layers"]]
    return (exact or fits or list(HUB_PRESETS.values()))[0].hub_id or ""


def _components(recipe: Recipe, own: Components) -> Components:
    """What `components.source` says; `own` are the model's."""
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


def fetch(repo: str, revision: str | None, without_transformers: bool = False) -> Path:
    """The folder of a hub model: from the local cache, else downloaded. Raises RecipeError in one sentence.

    Whether the hub can be reached is asked once, for 5 seconds: on a machine without a network nothing is retried.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    ignored = ["transformer*/*.safetensors"] if without_transformers else None
    options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ignored}
    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE or not _reachable(f"{constants.ENDPOINT}/api/models/{repo}"):
        raise RecipeError(_no_weights(repo, "this machine cannot reach the hub"))
    print(f"downloading {repo}", file=sys.stderr)
    try:
        return Path(huggingface_hub.snapshot_download(repo, **options))
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        raise RecipeError(_no_weights(repo, f"the hub refuses it ({status})")) from e


def _reachable(url: str) -> bool:
    """Whether anything answers; a refusal is an answer."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _no_weights(repo: str, why: str) -> str:
    preset = HUB_PRESETS.get(repo)
    instead = "add --set model.weights=synthetic" if preset else "write model: {preset: wan-tiny}"
    return (
        f"{repo} is not in the Hugging Face cache and {why}: get the weights where there is a network with "
        f"`hf download {repo} --local-dir DIR` and set model.path to DIR, or {instead} to try it with synthetic weights"
    )
