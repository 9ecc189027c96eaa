"""Opens one Wan transformer: a file, a folder of diffusers' layout, of Wan's own, or of weights alone.

What a path holds is found out from the path: `config.json` says the layout, and what each file begins with its kind.
`open_checkpoint` reads headers; values stay on the disk until they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.recipe.configuration import TRANSFORMER_FIELDS, VACE_FIELDS, wrong_field
from turbocompile.recipe.presets import PRESETS
from turbocompile.wan import vace
from turbocompile.wan.checkpoints import CheckpointTensors, infer_config
from turbocompile.wan.components import read_json
from turbocompile.wan.keys import CONFIG_FIELDS, listed
from turbocompile.wan.tensors import STEM, SafetensorsFiles, checkpoint_file, checkpoint_files, weight_files

DIFFUSERS = "WanTransformer3DModel"
PROJECTIONS_FILE, GATES_FILE = "proj_l.safetensors", "vsa.safetensors"  # what a conversion writes beside the weights
PICKLES = (".pth", ".pt", ".bin")
DEFAULTS = PRESETS["wan2.1-t2v-14b"].transformer  # of diffusers' class
_FIELDS = {DIFFUSERS: TRANSFORMER_FIELDS, vace.CLASS: (*TRANSFORMER_FIELDS, *VACE_FIELDS)}
_VACE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    DIFFUSERS: {},
    vace.CLASS: {name: PRESETS["wan2.1-vace-14b"].transformer[name] for name in VACE_FIELDS},
}
_KINDS = ("t2v", "i2v", "flf2v", "ti2v", "vace")  # model_type of Wan's own layout
EXPERTS = ("high_noise_model", "low_noise_model")  # folders of Wan2.2's two experts in its own layout
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_OTHER_PARTS = re.compile(r"(?i)(umt5|t5[-_]|vae|clip|xlm|optimizer|scheduler|rng|training_args)")

# quantization_config of a folder: what says the method, and the values of it whose weights are read
_METHODS: Mapping[str, tuple[str, ...]] = {
    "modelopt": ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "INT8", "W8A8_SQ_PER_CHANNEL"),
    "fp8": (),
    "compressed-tensors": (),
}


@dataclass(frozen=True)
class Checkpoint:
    """One opened transformer. tensors: under diffusers' names. config: of WanTransformer3DModel. where: names it in
    messages. written: the number of layers that its configuration says, if it has one. notes: what is not used.
    """

    tensors: CheckpointTensors
    config: dict[str, Any]
    where: str
    written: int | None
    notes: tuple[str, ...]


def open_checkpoint(path: Path, dtype: torch.dtype) -> Checkpoint:
    """The transformer in a file or a folder. dtype: of several variants of the weights, the one in this dtype is taken.

    Raises EngineError where it is damaged or incomplete, UnsupportedError where it is something else.
    """
    where = str(path)
    if not path.is_dir():
        tensors = CheckpointTensors(checkpoint_file(path), where)
        return Checkpoint(tensors, _check(path, infer_config(tensors, where)), where, None, tensors.notes)
    config = read_config(path) if (path / "config.json").exists() else {}
    tensors = CheckpointTensors(folder_weights(path, dtype), where)
    layers = config.get("num_layers")
    if len(config) < len(TRANSFORMER_FIELDS):  # of Wan's own layout, or none
        config = {**infer_config(tensors, where, config.get("num_attention_heads")), **config}
    return Checkpoint(tensors, _check(path, config), where, layers, tensors.notes)


def read_config(folder: Path) -> dict[str, Any]:
    """The transformer's configuration, as diffusers calls it, from a folder's config.json.

    Of Wan's own layout it has what the file says; of diffusers' all fields, where the file leaves some out with
    diffusers' own defaults. Raises EngineError, UnsupportedError.
    """
    path = folder / "config.json"
    raw = read_json(path, "a diffusers model has one")
    check_quantization(folder, raw)
    if is_original(raw):
        return _check(path, _from_original(path, raw))
    known = _FIELDS.get(str(raw.get("_class_name")))
    if known is None:
        raise UnsupportedError(
            f"{path}: the transformer is a {raw.get('_class_name')}, and recipes take {' and '.join(_FIELDS)}; load "
            "the model by its own library and give it to turbocompile.optimize(model, ...)"
        )
    return _check(path, {**DEFAULTS, **_VACE_DEFAULTS[raw["_class_name"]], **{k: raw[k] for k in known if k in raw}})


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of Wan's own layout."""
    return "dim" in config and "num_heads" in config and config.get("_class_name") not in _FIELDS


def is_transformer(folder: Path) -> bool:
    """Whether a folder is that of a transformer alone, and not of a pipeline."""
    if (folder / "config.json").exists():
        return True
    return not (folder / "model_index.json").exists() and bool(_candidates(folder))


def _from_original(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' fields of a configuration of Wan's own layout."""
    kind = raw.get("model_type", "t2v")
    if kind not in _KINDS:
        raise UnsupportedError(
            f"{path}: this is a model of the type {kind!r}, and a recipe compiles Wan's {', '.join(_KINDS)}; load the "
            "model by its own library and give it to turbocompile.optimize(model, ...)"
        )
    window = raw.get("window_size", (-1, -1))
    if tuple(window if isinstance(window, (list, tuple)) else (window,)) != (-1, -1) or not raw.get("qk_norm", True):
        raise UnsupportedError(
            f"{path}: window_size {window!r} and qk_norm {raw.get('qk_norm', True)!r} are of no published Wan; "
            "turbocompile takes attention over all tokens with normalized q and k"
        )
    config = {theirs: raw[ours] for ours, theirs in CONFIG_FIELDS.items() if ours in raw}
    dim, heads = raw["dim"], raw["num_heads"]
    if type(dim) is not int or type(heads) is not int or heads < 1 or dim < 1 or dim % heads:
        raise EngineError(f"{path}: dim {dim!r} is no multiple of num_heads {heads!r}; download it again")
    if kind == "vace":  # with Wan's own default
        config.setdefault("vace_layers", tuple(range(0, raw.get("num_layers", 0), 2)))
    return config | {"attention_head_dim": dim // heads}


def _check(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, with a tuple as patch_size. Raises EngineError for one that cannot be."""
    wrong = wrong_field({**DEFAULTS, **config})
    if wrong is not None:
        raise EngineError(f"{path}: {wrong}")
    for name in {"patch_size", "vace_layers"} & config.keys():
        config[name] = tuple(config[name])
    return config


def check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a folder whose quantization is none of 8 bits with scales beside the weights.

    The tensors are looked at themselves (scaled.py): a scale that is missing, or another part that is there, is an
    error there.
    """
    said = config.get("quantization_config")
    other = folder / "hf_quant_config.json"
    if said is None and other.is_file():
        said = {"quant_method": "modelopt", **_mapping(read_json(other, "").get("quantization"))}
    if said is None:
        return
    said = _mapping(said)
    method, algorithm = said.get("quant_method"), said.get("quant_algo", said.get("quant_type"))
    allowed = _METHODS.get(str(method))
    if allowed is None or (allowed and str(algorithm).upper() not in allowed):
        name = f"{method} {algorithm}" if algorithm is not None else str(method)
        raise UnsupportedError(
            f"{folder / 'config.json'}: the checkpoint is quantized by {name}, and turbocompile reads 8-bit weights "
            f"with scales beside them ({', '.join(_METHODS)}); give the checkpoint that was not quantized"
        )


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def folder_weights(folder: Path, dtype: torch.dtype) -> TensorSource:
    """The weights of a transformer in a folder: safetensors, else GGUF, else .pth. Raises EngineError.

    Of safetensors the names with an index or of diffusers come first, then shards and a single file of any name.
    """
    beside = [folder / name for name in (PROJECTIONS_FILE, GATES_FILE) if (folder / name).is_file()]
    for stem in (STEM, "model"):
        if any(folder.glob(f"{stem}.*safetensors*")):
            return SafetensorsFiles([*weight_files(folder, stem, dtype=dtype).files, *beside])
    found = _candidates(folder)
    if not found:
        weight_files(folder)  # raises, and says what is there
    if len(found) > 1:
        names = listed(paths[0].name for paths in found)
        raise EngineError(f"{folder}: holds several checkpoints ({names}); give the file of one")
    return checkpoint_files([*found[0], *beside] if found[0][0].suffix == ".safetensors" else found[0])


def _candidates(folder: Path) -> list[list[Path]]:
    """The checkpoints in a folder that may be a transformer's, each with all its shards: of the first kind there is.

    Raises EngineError where shards are missing.
    """
    for suffixes in ((".safetensors",), (".gguf",), PICKLES):
        files = (p for p in folder.iterdir() if p.suffix in suffixes and p.name not in (PROJECTIONS_FILE, GATES_FILE))
        paths = sorted(p for p in files if not _OTHER_PARTS.search(p.name))
        groups: dict[str, list[Path]] = {}
        for path in paths:
            shard = _SHARD.fullmatch(path.name)
            groups.setdefault(f"{shard[1]}{shard[3]}{shard[4]}" if shard else path.name, []).append(path)
        for group in groups.values():
            _check_shards(group)
        if groups:
            return list(groups.values())
    return []


def _check_shards(group: list[Path]) -> None:
    shards = [m for m in (_SHARD.fullmatch(path.name) for path in group) if m]
    if not shards:
        return
    stem, count, suffix = shards[0][1], int(shards[0][3]), shards[0][4]
    wanted = {f"{stem}-{i:05}-of-{count:05}{suffix}" for i in range(1, count + 1)}
    lost = wanted - {path.name for path in group}
    if lost:
        raise EngineError(f"{group[0].parent}: the shards {listed(lost)} are missing; download them again")


def snapshot(folder: Path) -> Path:
    """The folder itself, or the snapshot in a folder of the Hugging Face cache (models--owner--name).

    Raises EngineError where there are several snapshots and none of them is the main one.
    """
    if not (folder / "snapshots").is_dir() or not (folder / "blobs").is_dir():
        return folder
    head = folder / "refs" / "main"
    if head.is_file() and (main := folder / "snapshots" / head.read_text(encoding="utf-8").strip()).is_dir():
        return main
    found = sorted(p for p in (folder / "snapshots").iterdir() if p.is_dir())
    if len(found) != 1:
        names = listed(p.name for p in found) or "none"
        raise EngineError(f"{folder}: this folder of the hub's cache has the snapshots {names}; name one of them")
    return found[0]
