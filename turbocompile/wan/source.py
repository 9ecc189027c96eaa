"""Opens the model that a recipe names: a diffusers folder, a hub id, a checkpoint file, or synthetic weights.

`open_source(recipe)` reads configurations and headers alone. A transformer is built with parameters on the meta device
and its weights stay a `TensorSource` until the emitter asks for them, so that planning a 14B model needs no memory.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.recipe import HUB_ID, Recipe, Shape
from turbocompile.wan.checkpoints import CheckpointTensors, infer_config
from turbocompile.wan.components import (
    Components,
    FolderComponents,
    NoComponents,
    SyntheticComponents,
    read_index,
    read_json,
)
from turbocompile.wan.configs import (
    HUB_PRESETS,
    PRESETS,
    TEXT_TOKENS,
    TRANSFORMER_FIELDS,
    Preset,
    preset_for,
    task_of,
    with_transformer,
    wrong_field,
)
from turbocompile.wan.tensors import SyntheticTensors, checkpoint_file, safetensors_folder
from turbocompile.weights import TensorSource

CLIP_TOKENS = 257  # image tokens of the CLIP encoder that Wan2.1 I2V was trained with: 16 x 16 patches and the class
BOUNDARY = {"i2v": 0.9, "t2v": 0.875}  # of Wan2.2's two experts, in units of the 1000 training timesteps
TRANSFORMERS = ("transformer", "transformer_2")
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class TransformerSource:
    """One transformer: its configuration, how it is built, and where its weights are.

    dtype: what `from_pretrained(torch_dtype=...)` would be given. image_tokens: of the image encoder, None without one.
    """

    name: str
    config: Mapping[str, Any]
    tensors: TensorSource
    dtype: torch.dtype
    image_tokens: int | None = None
    where: str = ""

    def build(self) -> nn.Module:
        """diffusers' WanTransformer3DModel with parameters on meta, in from_pretrained's dtypes, and real buffers.

        Raises EngineError where the weights do not fit the configuration.
        """
        model = build_transformer(self.config, self.dtype)
        available = set(self.tensors.keys())
        for name, parameter in model.named_parameters():
            if name not in available:
                raise EngineError(f"{self.where}: the checkpoint lacks {name}, which its configuration asks for")
            shape = self.tensors.spec(name)[0]
            if shape != tuple(parameter.shape):
                raise EngineError(
                    f"{self.where}: {name} has the shape {shape}, the configuration asks for {tuple(parameter.shape)}"
                )
        return model

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
        (B, 512, text_dim); encoder_hidden_states_image (B, image_tokens, image_dim) where the model takes it.
        """
        frames, height, width = shape.latent

        def empty(*size: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape.batch, *size, dtype=dtype, device="meta")

        kwargs: dict[str, Any] = {
            "hidden_states": empty(self.config["in_channels"], frames, height, width),
            "timestep": empty(dtype=torch.float32),
            "encoder_hidden_states": empty(TEXT_TOKENS, self.config["text_dim"]),
        }
        if self.image_tokens is not None:
            kwargs["encoder_hidden_states_image"] = empty(self.image_tokens, self.config["image_dim"])
        kwargs["return_dict"] = False
        return (), kwargs


@dataclass(frozen=True)
class Source:
    """An opened model. task: "t2v" or "i2v". boundary_ratio: below it (times 1000) transformer_2 takes over.

    is_synthetic: the transformers' weights are random. where: names the model in messages. seed: of synthetic ones.
    """

    transformers: Mapping[str, TransformerSource]
    components: Components
    task: str
    boundary_ratio: float | None
    is_synthetic: bool
    where: str
    seed: int = 0

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

    Raises RecipeError where there is no such model, EngineError where it is damaged, UnsupportedError where it is
    something else than Wan's transformer.
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
    transformers = {name: _synthetic(name, config, recipe, preset.name, _image_tokens(preset)) for name in names}
    components = _components(recipe, SyntheticComponents(preset, recipe.model.seed, recipe.torch_dtype))
    where = f"{preset.name} (synthetic weights)"
    return Source(transformers, components, preset.task, preset.boundary_ratio, True, where, recipe.model.seed)


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
    if not (folder / "model_index.json").exists() and (folder / "config.json").exists():
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
    return Source(
        transformers, _components(recipe, own), task_of(config), boundary, synthetic, where, recipe.model.seed
    )


def _open_bare(recipe: Recipe, folder: Path) -> Source:
    """A folder with a transformer's config.json and weights, or with synthetic weights the config.json alone."""
    transformer = _open_transformer(recipe, folder, "transformer", None)
    synthetic = recipe.model.weights == "synthetic"
    own: Components = NoComponents()
    if synthetic:
        own = SyntheticComponents(preset_for(transformer.config), recipe.model.seed, recipe.torch_dtype)
    else:
        _need_components(recipe, folder, transformer)
    task = task_of(transformer.config)
    return Source(
        {"transformer": transformer}, _components(recipe, own), task, None, synthetic, str(folder), recipe.model.seed
    )


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
    tokens = (image_tokens or CLIP_TOKENS) if config["image_dim"] is not None else None
    if recipe.model.weights == "synthetic":
        return _synthetic(name, config, recipe, str(folder), tokens)
    return TransformerSource(name, config, safetensors_folder(folder), recipe.torch_dtype, tokens, str(folder))


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
    task = task_of(high.config)
    boundary = BOUNDARY[task] if len(files) == 2 else None
    return Source(transformers, _components(recipe, own), task, boundary, synthetic, str(path), recipe.model.seed)


def _open_checkpoint(recipe: Recipe, path: Path, name: str, image_tokens: int | None) -> TransformerSource:
    tensors = CheckpointTensors(checkpoint_file(path), str(path))
    config = {**infer_config(tensors, str(path)), **recipe.model.config}
    tokens = (image_tokens or CLIP_TOKENS) if config["image_dim"] is not None else None
    if recipe.model.weights == "synthetic":
        return _synthetic(name, config, recipe, str(path), tokens)
    return TransformerSource(name, config, tensors, recipe.torch_dtype, tokens, str(path))


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
