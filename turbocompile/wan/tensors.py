"""Sources of named tensors: safetensors files, .pth files and their shards, GGUF, and seeded synthetic weights.

Each is a `TensorSource` (weights.py): names, shapes and dtypes at once, values one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from turbocompile.capture.module_weights import DATA, SCALE
from turbocompile.errors import EngineError, TurbocompileError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.kernels.quantize.quantize import dequantize, quantize
from turbocompile.wan.gguf_file import MAGIC, GGUFTensors

Spec = tuple[tuple[int, ...], torch.dtype]

STEM = "diffusion_pytorch_model"  # diffusers' names of weights begin so, transformers' with `model`
INDEX = f"{STEM}.safetensors.index.json"
SINGLE = f"{STEM}.safetensors"

# safetensors' names of dtypes
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFiles:
    """The tensors of some safetensors files. A value is mapped into memory while it is used, and read from disk then.

    Each value has a mapping of its own, because the pages of a mapping count as this process's memory until it is gone:
    a build would seem to take, and on a small machine press out of memory, as much as its checkpoint has.

    places: the file of each tensor. metadata: what the headers say, as text by key.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Reads the headers. Raises EngineError for a missing or damaged file, or a name that two files hold."""
        self.places: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        self._specs: dict[str, Spec] = {}
        for path in files:
            try:
                opened = safe_open(path, framework="pt")
                self.metadata |= opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if name in self.places:
                        raise EngineError(f"{path}: the tensor {name} is in another file of the checkpoint too")
                    header = opened.get_slice(name)
                    self._specs[name] = (tuple(header.get_shape()), DTYPES[header.get_dtype()])
                    self.places[name] = path
            except FileNotFoundError:
                raise EngineError(f"{path}: this part of the checkpoint is missing; download it again") from None
            except (SafetensorError, OSError) as e:
                raise EngineError(f"{path}: this is no whole safetensors file ({e}); download it again") from e
            except KeyError as e:
                raise EngineError(f"{path}: tensors of dtype {e} are not supported") from e

    def keys(self) -> Iterable[str]:
        return self._specs.keys()

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def get(self, name: str) -> torch.Tensor:
        path = self.places[name]
        try:
            with safe_open(path, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise EngineError(f"{path}: this file changed or went away during the build ({e}); begin again") from e


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files that hold a model's weights. index: the JSON file that lists them, if they are shards."""

    files: tuple[Path, ...]
    index: Path | None = None
    variant: str = ""


PRECISIONS = ("fp32", "bf16", "fp16")  # variants of one model, the best first: Wan is published in bfloat16
VARIANTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def weight_files(
    folder: Path, stem: str = STEM, single_first: bool = False, dtype: torch.dtype | None = None
) -> WeightFiles:
    """The weights of a model folder: one file, or shards with an index, or a variant (as `fp16`) of these.

    stem: `diffusion_pytorch_model` (diffusers) or `model` (transformers). single_first: whether one file wins over
    shards, as in transformers. dtype: of several precisions (`fp32`, `bf16`, `fp16`) that of this dtype is taken, else
    the first of these. Raises EngineError where there are no weights, or several variants of other names;
    UnsupportedError for GGUF.
    """
    plain = [folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"]
    for path in reversed(plain) if single_first else plain:
        if path.is_file():
            return _weight_files(path, "")
    variants: dict[str, Path] = {}
    for path in sorted(folder.glob(f"{stem}.*")):
        name = path.name.removeprefix(stem)
        found = re.fullmatch(r"\.([\w-]+)\.safetensors|\.safetensors\.index\.([\w-]+)\.json", name)
        if found and not re.search(r"-\d{5}-of-\d{5}$", found[1] or ""):
            variants[found[1] or found[2]] = path
    wished = [VARIANTS[dtype]] if dtype in VARIANTS else []
    for name in (*wished, *PRECISIONS):
        if name in variants:
            return _weight_files(variants[name], name)
    if len(variants) > 1:
        raise EngineError(
            f"{folder}: holds its weights as the variants {', '.join(sorted(variants))} and not as {stem}.safetensors; "
            f"rename the files of one to {stem}.safetensors, or keep them alone"
        )
    for variant, path in variants.items():
        return _weight_files(path, variant)
    raise _no_weights(folder, stem)


def _weight_files(path: Path, variant: str) -> WeightFiles:
    """Of one file, or of the shards of an index."""
    if path.suffix != ".json":
        return WeightFiles((path,), None, variant)
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise EngineError(f"{path}: this is no index of safetensors shards ({e!r}); download it again") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise EngineError(f"{path}: {name!r} is not the name of a file beside the index")
    return WeightFiles(tuple(path.parent / name for name in sorted(names)), path, variant)


def _no_weights(folder: Path, stem: str) -> TurbocompileError:
    gguf = next(folder.glob("*.gguf"), None)
    if gguf is not None:
        return gguf_refusal(gguf)
    if any(folder.glob("*.bin")):
        return EngineError(f"{folder}: holds pickled weights (.bin) alone; get the safetensors version of the model")
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    other = f", but {others[0]}: rename it if it is the model's" if others else "; the folder has no weights"
    return EngineError(f"{folder}: holds neither {stem}.safetensors nor {stem}.safetensors.index.json{other}")


def gguf_refusal(path: Path) -> UnsupportedError:
    """The error for a GGUF file as a text encoder, VAE or image encoder."""
    return UnsupportedError(
        f"{path}: this is a GGUF file, which turbocompile reads as a transformer alone; give the safetensors version "
        "of this part of the pipeline"
    )


def safetensors_folder(folder: Path, dtype: torch.dtype | None = None) -> SafetensorsFiles:
    """The weights of a diffusers model folder (see `weight_files`)."""
    return SafetensorsFiles(weight_files(folder, dtype=dtype).files)


class Tensors:
    """Named tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def spec(self, name: str) -> Spec:
        tensor = self._tensors[name]
        return tuple(tensor.shape), tensor.dtype

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def checkpoint_file(path: Path) -> TensorSource:
    """The tensors of a .safetensors, .pth or .gguf file, mapped. A .pth may nest them under `state_dict`, `model` or
    `module`.

    Only tensors and plain containers are unpickled (`weights_only`). Raises EngineError, UnsupportedError.
    """
    return checkpoint_files([path])


def checkpoint_files(paths: list[Path]) -> TensorSource:
    """The tensors of one checkpoint, in one file or in shards of one kind. Raises EngineError, UnsupportedError."""
    kinds = {kind_of(path) for path in paths}
    if kinds == {"gguf"}:
        return GGUFTensors(paths)
    if kinds == {"safetensors"}:
        return SafetensorsFiles(paths)
    if len(kinds) > 1:
        raise EngineError(f"{paths[0].parent}: holds shards of several kinds ({', '.join(sorted(kinds))}); keep one")
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        tensors = _pickled(path)
        twice = found.keys() & tensors.keys()
        if twice:
            raise EngineError(f"{path}: the tensor {min(twice)} is in another file of the checkpoint too")
        found |= tensors
    return Tensors(found)


def kind_of(path: Path) -> str:
    """ "gguf", "safetensors" or "pickle", by what a file begins with. Raises EngineError where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as e:
        raise EngineError(f"{path}: there is no such checkpoint, or it cannot be read ({e})") from None
    if path.suffix == ".gguf" or start.startswith(MAGIC):
        return "gguf"
    if path.suffix == ".safetensors" or start[8:] == b"{":  # the size of a header, then its JSON
        return "safetensors"
    return "pickle"


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file."""
    try:  # the format before torch 1.6 cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged pickle makes torch raise whatever its instructions stumble over
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise EngineError(f"{path}: cannot be read as a checkpoint of plain tensors ({reason})") from e
    for key in ("state_dict", "model", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            _check_beside(loaded, key, path)
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise EngineError(f"{path}: holds no state dict but a {type(loaded).__name__}")
    return _tensors(loaded, path)


# What training keeps beside a model: no weights of it.
_TRAINING = re.compile(
    r"(?i)(optim\w*|lr_?sched\w*|\w*schedulers?|(grad_?)?scaler|rng\w*|callbacks|loops|hyper_?parameters)"
)


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in some nested containers."""
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def _check_beside(loaded: Mapping[Any, Any], chosen: str, path: Path) -> None:
    """Raises EngineError for tensors outside of the state dict that is used: scales, adapters, another model."""
    for key, value in loaded.items():
        if key != chosen and _holds_tensors(value) and not _TRAINING.fullmatch(str(key)):
            raise EngineError(
                f"{path}: holds tensors under {str(key)!r} beside {chosen!r}, and turbocompile reads one state dict; "
                "save all that belongs to the model in one, and nothing else"
            )


def _tensors(state: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, numbers with a parameter's name too. Raises EngineError for tensors elsewhere."""
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = str(key)
        if isinstance(value, torch.Tensor):
            if value.is_meta or value.layout is not torch.strided or value.is_quantized:
                kind = "on the meta device, without values" if value.is_meta else f"stored as {value.layout}"
                raise EngineError(f"{path}: {name} is {kind}; save the checkpoint with dense tensors that have values")
            found[name] = value
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and "." in name:
            found[name] = torch.tensor(float(value))
        elif _holds_tensors(value) and not _TRAINING.fullmatch(name):
            raise EngineError(
                f"{path}: holds tensors under {name!r} that are in no state dict by themselves; save the state dict of "
                "the model alone, or under state_dict, model or module"
            )
    return found


def synthetic(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A float32 tensor that depends on (seed, name, shape) alone, at the scale of trained weights.

    Linears and convolutions are N(0, 1 / fan_in), so that activations keep their size through any depth; norms are
    1 + N(0, 0.1^2) rather than 1, so that a rewrite that drops one shows in the numbers; biases N(0, 0.05^2).
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    noise = torch.randn(shape, generator=generator)
    leaf = name.rpartition(".")[2]
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return noise.mul_(0.1).add_(1.0)
    if len(shape) == 1:
        return noise.mul_(0.05)
    if leaf in ("scale_shift_table", "pos_embed"):
        return noise.mul_(shape[-1] ** -0.5)
    if ".shared." in f".{name}":  # the text encoder's token embeddings: unit variance, as umT5 starts
        return noise
    fan_in = math.prod(shape[1:])
    if name.endswith("SelfAttention.q.weight"):  # T5 attention does not divide by sqrt(head_dim); its query weights do
        fan_in *= 32
    return noise.mul_(fan_in**-0.5)


class SyntheticTensors:
    """Synthetic values for given shapes and dtypes. `get` makes a tensor anew each time, so that no memory is kept."""

    def __init__(self, specs: Mapping[str, Spec], seed: int, prefix: str) -> None:
        """prefix: part of each tensor's seed, so that two models with the same names have different values."""
        self._specs = dict(specs)
        self._seed, self._prefix = seed, prefix

    def keys(self) -> Iterable[str]:
        return self._specs.keys()

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def get(self, name: str) -> torch.Tensor:
        dtype = self._specs[name][1]
        for part, suffix in enumerate((DATA, SCALE)):
            weight = name.removesuffix(suffix)
            if weight != name and weight in self._specs:
                return quantize(self._values(weight), self._format(weight))[part]
        if name + DATA in self._specs:
            return dequantize(*quantize(self._values(name), self._format(name)), self._format(name), dtype)
        return self._values(name).to(dtype)

    def _values(self, name: str) -> torch.Tensor:
        return synthetic(f"{self._prefix}.{name}", self._specs[name][0], self._seed)

    def _format(self, name: str) -> str:
        """The format of a quantized weight."""
        if self._specs[name + DATA][1] != torch.int8:
            return "fp8"
        return "int8" if self._specs[name + SCALE][0] == (self._specs[name][0][0], 1) else "int8_block"
