"""A LoRA's file or folder: its tensors, what its configuration says of their scale, its keys sorted by module."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.wan.lora_keys import HIGH, LOW, Key, other_kind, split
from turbocompile.wan.tensors import checkpoint_file

CONFIG = "adapter_config.json"  # PEFT's
IN_FOLDERS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
METADATA = "lora_adapter_metadata"  # diffusers' entry in the header of a safetensors file: PEFT's configuration as JSON
EXPERT_OF = {"transformer": HIGH, "transformer_2": LOW}  # of diffusers' metadata
SHOWN = 10  # keys in an error, before the rest is counted
_RESIDUAL = ("pissa", "olora", "corda", "loftq")  # starts of a LoRA that change the weights that it is added to


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT's configuration says of the scale of an adapter. Patterns: of a module's path -> rank, alpha."""

    alpha: float | None = None
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    root: bool = False  # rsLoRA: alpha is divided by the root of the rank

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> AdapterConfig:
        """The configuration of PEFT's values. Raises UnsupportedError for another kind of adapter than LoRA."""
        kind = str(values.get("peft_type") or "LORA").rpartition(".")[2]
        start = values.get("init_lora_weights")
        if kind.upper() != "LORA":
            raise UnsupportedError(f"{where}: the adapter is of the kind {kind}, and LoRA and DoRA are read")
        if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
            raise UnsupportedError(
                f"{where}: the adapter belongs to weights that {start} changed (init_lora_weights); save it as a plain "
                "LoRA (in PEFT: path_initial_model_for_weight_conversion)"
            )
        if values.get("fan_in_fan_out"):
            raise UnsupportedError(f"{where}: fan_in_fan_out is for models of Conv1D layers, which Wan has none of")
        try:
            alpha, rank = values.get("lora_alpha"), values.get("r")
            return cls(
                None if alpha is None else float(alpha),
                None if rank is None else int(rank),
                {str(k): int(v) for k, v in (values.get("rank_pattern") or {}).items()},
                {str(k): float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
                bool(values.get("use_rslora")),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{where}: lora_alpha, r or a pattern is no number ({error}); save it again") from error

    def scale(self, paths: Sequence[str], rank: int) -> float:
        """What b @ a of a module of this rank is multiplied by. paths: its names in the file and in the model."""
        alpha = _by_pattern(self.alphas, paths, self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)

    def said_rank(self, paths: Sequence[str]) -> int | None:
        """The rank that the configuration says a module has."""
        return _by_pattern(self.ranks, paths, self.rank)


def _by_pattern(patterns: Mapping[str, Any], paths: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that is a path or a regular expression of a path's end, as PEFT finds it."""
    for pattern, value in patterns.items():
        try:
            if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
                return value
        except re.error:
            continue
    return default


@dataclass(frozen=True)
class LoraFile:
    """An opened LoRA. modules: (expert, path) -> the part of the LoRA -> its key; expert None: of each."""

    where: str
    tensors: TensorSource
    modules: Mapping[tuple[str | None, str], Mapping[str, str]]
    configs: Mapping[str | None, AdapterConfig]

    def config(self, expert: str | None) -> AdapterConfig:
        """The configuration of an expert's modules."""
        return self.configs.get(expert) or self.configs.get(None) or AdapterConfig()


def open_lora(path: str | Path) -> LoraFile:
    """Opens a file (.safetensors, .pth, .bin) or a folder (PEFT's, diffusers', or with one safetensors file).

    Raises RecipeError where there is none, EngineError where it is damaged or holds something else, UnsupportedError
    for another kind of adapter.
    """
    path = Path(path).expanduser()
    configs: dict[str | None, AdapterConfig] = {}
    if path.is_dir():
        if (path / CONFIG).is_file():
            configs[None] = AdapterConfig.of(_json(path / CONFIG), str(path / CONFIG))
        path = _in_folder(path)
    if not path.is_file():
        raise RecipeError(
            f"lora: there is no file or folder {path}; a weight follows after a colon, as in {path.name or 'a'}:0.8"
        )
    tensors = checkpoint_file(path)
    configs |= _of_metadata(path)
    saved = None in configs  # PEFT's folder may hold whole modules
    keys = [key for name in tensors.keys() if (key := _key(name, saved, str(path))) is not None]  # noqa: SIM118
    return LoraFile(str(path), tensors, _by_module(keys, str(path)), configs)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EngineError(f"{path}: this is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise EngineError(f"{path}: a configuration is a mapping, not a {type(found).__name__}; download it again")
    return found


def _in_folder(folder: Path) -> Path:
    """The file of a LoRA's folder."""
    known = next((folder / name for name in IN_FOLDERS if (folder / name).is_file()), None)
    files = sorted(folder.glob("*.safetensors"))
    if known is not None:
        return known
    if len(files) != 1:
        what = f"{len(files)} of them" if files else "none"
        raise RecipeError(f"lora: {folder} should hold one LoRA as a .safetensors file, and has {what}; name the file")
    return files[0]


def _of_metadata(path: Path) -> dict[str | None, AdapterConfig]:
    """The configurations in the header of a file that diffusers wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError):  # a .pth, which has no header
        return {}
    if text is None:
        return {}
    try:
        values = json.loads(text)
        items = list(values.items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise EngineError(f"{path}: its header's {METADATA} is no JSON ({error}); save it again") from error
    split_up: dict[str | None, dict[str, Any]] = {}
    for name, value in items:
        head, dot, rest = name.partition(".")
        named = bool(dot) and head in EXPERT_OF
        split_up.setdefault(EXPERT_OF[head] if named else None, {})[rest if named else name] = value
    found = {expert: AdapterConfig.of(v, f"{path} ({METADATA})") for expert, v in split_up.items()}
    if LOW not in found and HIGH in found:  # the only one, of whichever expert gets it
        found[None] = found[HIGH]
    return found


def _key(name: str, saved: bool, where: str) -> Key | None:
    """A key taken apart. Raises UnsupportedError for one of another kind of adapter."""
    what = other_kind(name)
    if what is not None:
        raise UnsupportedError(
            f"{where}: {name} belongs to {what}; LoRA and DoRA of the transformer, differences and set_weight are read"
        )
    return split(name, saved) or Key(name, name, "")


def _by_module(keys: list[Key], where: str) -> dict[tuple[str | None, str], dict[str, str]]:
    """The keys by expert and path. Raises EngineError for a file of no LoRA, or of two adapters."""
    if not any(key.part for key in keys):
        raise EngineError(f"{where}: this is no LoRA, none of its keys is one's ({listed(k.key for k in keys)})")
    strange = [key.key for key in keys if not key.part]
    if strange:
        raise EngineError(f"{where}: holds {count(strange, 'key')} of no known kind of LoRA: {listed(strange)}")
    adapters = sorted({key.adapter for key in keys if key.adapter})
    if len(adapters) > 1:
        raise EngineError(f"{where}: holds the adapters {', '.join(adapters)}; save each in a file of its own")
    two = any(key.expert == LOW for key in keys)
    found: dict[tuple[str | None, str], dict[str, str]] = {}
    for key in keys:
        parts = found.setdefault((key.expert if two else None, key.path), {})
        if key.part in parts:
            raise EngineError(f"{where}: {parts[key.part]} and {key.key} are the same part of a LoRA; keep one of them")
        parts[key.part] = key.key
    return found


def number(tensors: TensorSource, key: str, where: str) -> float:
    """The only value of a tensor, as alpha is."""
    shape, _ = tensors.spec(key)
    if math.prod(shape) != 1:
        raise EngineError(f"{where}: {key} has the shape {list(shape)}, and should be one number")
    value = float(tensors.get(key).to(torch.float64))
    if not math.isfinite(value):
        raise EngineError(f"{where}: {key} is {value}, and should be a finite number")
    return value


def count(items: Iterable[Any], noun: str) -> str:
    """As in "3 keys"."""
    size = len(list(items))
    return f"{size} {noun}{'' if size == 1 else 's'}"


def listed(items: Iterable[str]) -> str:
    """Up to SHOWN of them, and how many more there are."""
    every = sorted(items)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more
