"""The components beside the transformer: VAE, text encoder, tokenizer, scheduler, image encoder, image processor.

Components are diffusers-style sub-folders (vae/, text_encoder/, ...), in an engine as in a pipeline. The table ALLOWED
gives their classes: no file of a folder makes this module import, download or execute anything.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.wan.leftovers import refusal
from turbocompile.wan.stored import WIDE, StoredWeights
from turbocompile.wan.tensors import Spec

MODELS = ("vae", "text_encoder", "image_encoder")  # the components with weights

# component -> class -> the library of the class; synthetic components use the first class
ALLOWED: Mapping[str, Mapping[str, str]] = {
    "vae": {"AutoencoderKLWan": "diffusers"},
    "text_encoder": {"UMT5EncoderModel": "transformers", "T5EncoderModel": "transformers"},
    "tokenizer": {
        "PreTrainedTokenizerFast": "transformers",
        "T5TokenizerFast": "transformers",
        "T5Tokenizer": "transformers",
        "TokenizersBackend": "transformers",
    },
    "scheduler": {
        "UniPCMultistepScheduler": "diffusers",
        "FlowMatchEulerDiscreteScheduler": "diffusers",
    },
    "image_encoder": {"CLIPVisionModel": "transformers"},
    "image_processor": {
        "CLIPImageProcessor": "transformers",
        "CLIPImageProcessorPil": "transformers",
        "CLIPProcessor": "transformers",
    },
}
_ALIASES = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
    "CLIPProcessor": "CLIPImageProcessor",  # of FLF2V's folder, whose tokenizer nothing reads
}

# Files that a component may consist of. Weights are safetensors only.
_KEPT = (".json", ".safetensors", ".model", ".txt")
_INDEX = re.compile(r"\.safetensors\.index\.([\w-]+\.)?json$")
_TIED = frozenset({"shared.weight", "encoder.embed_tokens.weight"})  # one table of umT5 under two names
# Tensors that a component's files may hold and its class does not read: the other halves of T5 and CLIP models, tables.
_UNREAD: Mapping[str, tuple[str, ...]] = {
    "vae": (),
    "text_encoder": (r"^decoder\.", r"^lm_head\.", r"^spiece_model$"),
    "image_encoder": (
        r"^text_model\.", r"^text_projection\.", r"^visual_projection\.", r"^logit_scale$", r"(^|\.)position_ids$",
    ),
}  # fmt: skip
_CODE_KEYS = (
    "auto_map",
    "quantization_config",
    "custom_pipelines",
)  # keys that would make a library import other code than the class


class Components(Protocol):
    """The components that a pipeline has beside its transformers."""

    @property
    def names(self) -> tuple[str, ...]:
        """As in ("vae", "text_encoder", "tokenizer", "scheduler")."""

    def table(self) -> dict[str, dict[str, str]]:
        """For the manifest: name -> {"class", "library", "folder"} and, where it has weights, "dtype"."""

    def vae_config(self) -> Mapping[str, Any] | None:
        """The configuration of the VAE, as AutoencoderKLWan takes it; None without one."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each component once saved (weights exactly, small files nearly), without making them."""

    def save(self, folder: Path) -> dict[str, dict[str, str]]:
        """Writes one sub-folder each into `folder` and returns the table."""

    def load(self) -> dict[str, Any]:
        """The components themselves, by name, on the CPU."""


@dataclass(frozen=True)
class NoComponents:
    """`components: none`: an engine of the transformer alone."""

    names: tuple[str, ...] = ()

    def table(self) -> dict[str, dict[str, str]]:
        return {}

    def vae_config(self) -> None:
        return None

    def sizes(self) -> dict[str, int]:
        return {}

    def save(self, folder: Path) -> dict[str, dict[str, str]]:
        return {}

    def load(self) -> dict[str, Any]:
        return {}


class FolderComponents:
    """The components of a diffusers pipeline folder. Saving copies the files, the text encoder's cast to `dtype`.

    Weights that are stored in 8 bits are saved as what they stand for, in float32 but for the text encoder.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Raises EngineError where there is no model_index.json, UnsupportedError for a class that is not known."""
        self._folder, self._dtype = folder, dtype
        self._opened: dict[str, StoredWeights] = {}
        self._classes: dict[str, tuple[str, str]] = {}
        for name, value in read_index(folder).items():
            if (
                name not in ALLOWED
                or not isinstance(value, list)
                or len(value) != 2
                or value[0] is None
                or not isinstance(value[1], str)
            ):
                continue
            cls = value[1]
            if cls not in ALLOWED[name]:
                known = ", ".join(ALLOWED[name])
                raise UnsupportedError(f"{folder / 'model_index.json'}: {name} is a {cls}, turbocompile knows {known}")
            self._classes[name] = (cls, ALLOWED[name][cls])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def vae_config(self) -> Mapping[str, Any] | None:
        return vae_config(self._folder / "vae") if "vae" in self._classes else None

    def _weights(self, name: str) -> StoredWeights:
        """The weights of a component, looked at once. Raises EngineError where they are not whole."""
        if name not in self._opened:
            folder = self._folder / name
            if not folder.is_dir():
                raise EngineError(f"{folder}: this part of the pipeline is missing; download it again")
            of_transformers = ALLOWED[name][self._classes[name][0]] == "transformers"
            cast = self._dtype if name == "text_encoder" else None
            self._opened[name] = StoredWeights(folder, of_transformers, cast)
        return self._opened[name]

    def _dtype_of(self, name: str) -> torch.dtype | None:
        return self._weights(name).dtype if name in MODELS else None

    def table(self) -> dict[str, dict[str, str]]:
        return {name: entry(name, cls, lib, self._dtype_of(name)) for name, (cls, lib) in self._classes.items()}

    def _files(self, name: str) -> list[Path]:
        """What is copied beside the weights: one level of plain files of the kinds that a component consists of."""
        folder = self._folder / name
        if not folder.is_dir():
            raise EngineError(f"{folder}: this part of the pipeline is missing; download it again")
        files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in _KEPT]
        for path in files:
            _check_file(path)
        if name in MODELS:
            files = [p for p in files if p.suffix != ".safetensors" and not _INDEX.search(p.name)]
        return files

    def sizes(self) -> dict[str, int]:
        made = {}
        for name in self.names:
            made[name] = sum(p.stat().st_size for p in self._files(name))
            if name in MODELS:
                check_model(self._folder / name, name, self._classes[name][0], self._weights(name).specs())
                made[name] += self._weights(name).size
        return made

    def save(self, folder: Path) -> dict[str, dict[str, str]]:
        for name in self.names:
            target = folder / name
            target.mkdir(parents=True)
            for path in self._files(name):
                shutil.copyfile(path, target / path.name)
            if name in MODELS:
                check_model(self._folder / name, name, self._classes[name][0], self._weights(name).specs())
                self._weights(name).save(target)
        return self.table()

    def load(self) -> dict[str, Any]:
        if not any(self._weights(name).rewritten for name in self.names if name in MODELS):
            return load_components(self._folder, self.table())
        with tempfile.TemporaryDirectory(prefix="turbocompile-") as made:  # the libraries would load what is stored
            return load_components(Path(made), self.save(Path(made)))


def _check_file(path: Path) -> None:
    """Raises EngineError for a configuration or an index that is no JSON, and for a shard that is missing."""
    index = bool(_INDEX.search(path.name))
    if not index and (path.suffix != ".json" or "config" not in path.name):
        return
    values = read_json(path, "the component needs it")
    shards = values.get("weight_map") if index else None
    for shard in sorted({str(s) for s in shards.values()} if isinstance(shards, dict) else ()):
        if not (path.parent / shard).is_file():
            raise EngineError(f"{path.parent / shard}: this part of the weights is missing; download it again")


def entry(name: str, cls: str, library: str, dtype: torch.dtype | None) -> dict[str, str]:
    """One row of the table of components."""
    row = {"class": cls, "library": library, "folder": name}
    return row | ({"dtype": str(dtype).removeprefix("torch.")} if dtype else {})


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a diffusers pipeline folder. Raises EngineError."""
    return read_json(folder / "model_index.json", "a diffusers pipeline has one")


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object; `missing` completes the sentence where there is no file. Raises EngineError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(f"{path}: there is no such file; {missing}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise EngineError(f"{path}: cannot be read as JSON ({e})") from e
    if not isinstance(values, dict):
        raise EngineError(f"{path}: is no JSON object")
    return values


def load_components(folder: Path, table: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Loads the components of a table (see Components.table) from their sub-folders of `folder`, on the CPU.

    Raises EngineError for a class that is not allowed, a configuration that would run other code, or damaged files.
    """
    return {name: _load(Path(folder), name, row) for name, row in table.items()}


def folder_name(name: str, row: Mapping[str, str]) -> str:
    """The sub-folder of a component. row: of a table of components; older tables leave the folder out."""
    return row.get("folder", name)


def _load(folder: Path, name: str, row: Mapping[str, str]) -> Any:
    cls, place = row.get("class", ""), folder_name(name, row)
    if cls not in ALLOWED.get(name, {}):
        raise EngineError(
            f"{folder}: the component {name} is of the class {cls!r}, which is not one that may be loaded"
        )
    if Path(place).name != place or place in ("", ".", ".."):
        raise EngineError(f"{folder}: the component {name} is in {place!r}, which is no plain folder name")
    path = folder / place
    check_configs(path)
    try:
        return _from_pretrained(path, name, cls, row.get("dtype"))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, EngineError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise EngineError(f"{path}: the component {name} cannot be loaded ({reason})") from e


def check_configs(folder: Path) -> None:
    """Raises EngineError where a component's configuration asks for code from elsewhere."""
    for config in sorted(folder.glob("*config*.json")):
        values = read_json(config, "the component needs it")
        bad = [key for key in _CODE_KEYS if key in values]
        attention = [v for k, v in values.items() if "attn_implementation" in k and v not in (None, "eager", "sdpa")]
        if bad or attention:
            raise EngineError(
                f"{config}: {bad[0] if bad else 'attn_implementation'} asks for code from elsewhere; remove it"
            )


def vae_config(folder: Path) -> dict[str, Any]:
    """The configuration in a VAE's folder. Raises EngineError."""
    return read_json(folder / "config.json", "a VAE has one")


def check_model(folder: Path, name: str, cls: str, specs: Mapping[str, Spec]) -> None:
    """Raises EngineError where a model's weights are not those of its class and configuration, one for one.

    name: the component's. specs: of the weights, as they are to be loaded. The libraries only warn: they draw at random
    what is missing and leave out what is left over.
    """
    check_configs(folder)
    expected = _on_meta(folder, name, cls)
    wanted = {_plain(name, n): tuple(t.shape) for n, t in expected.state_dict().items()}
    found = {_plain(name, n): n for n in specs}
    where = f"the {name.replace('_', ' ')} of the class {cls}"
    ignored = [*_UNREAD[name], *(getattr(expected, "_keys_to_ignore_on_load_unexpected", None) or ())]
    strange = [n for n in found if n not in wanted and not any(re.search(pattern, n) for pattern in ignored)]
    if strange:
        raise refusal(str(folder), [found[n] for n in strange], where)
    tied = _TIED if _TIED & found.keys() else frozenset()
    missing = sorted(set(wanted) - found.keys() - tied)
    missing = [n for n in missing if not any(re.search(pattern, n) for pattern in _UNREAD[name])]
    if missing:
        raise EngineError(f"{folder}: lacks {missing[0]}, which {where} has; download it again")
    for n, shape in wanted.items():
        if n in found and specs[found[n]][0] != shape:
            raise EngineError(
                f"{folder}: {found[n]} has the shape {specs[found[n]][0]}, the configuration asks for {shape}"
            )


def _plain(component: str, name: str) -> str:
    """A tensor's name without the level that transformers 5 dropped from CLIP's vision model."""
    return name.removeprefix("vision_model.") if component == "image_encoder" else name


def _on_meta(folder: Path, name: str, cls: str) -> Any:
    """The model of a component's configuration, without memory. Raises EngineError."""
    try:
        with torch.device("meta"):
            if ALLOWED[name][cls] == "diffusers":
                return _class(name, cls).from_config(_class(name, cls).load_config(str(folder), local_files_only=True))
            made = _class(name, cls).config_class.from_pretrained(str(folder), local_files_only=True)
            return _class(name, cls)(made)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise EngineError(f"{folder}: no {cls} can be made of its configuration ({reason})") from e


def made_on_meta(folder: Path, name: str, row: Mapping[str, str]) -> Any:
    """A model of a table of components with its configuration and dtype, and no memory. Raises EngineError."""
    if row.get("class") not in ALLOWED.get(name, {}):
        raise EngineError(f"{folder}: the component {name} is of the class {row.get('class')!r}, which is not known")
    check_configs(folder)
    model = _on_meta(folder, name, row["class"])
    for parameter in model.parameters():  # not model.to: diffusers warns of a cast
        parameter.data = parameter.data.to(getattr(torch, row.get("dtype", "float32")))
    return model.eval().requires_grad_(False)


def _class(name: str, cls: str) -> Any:
    """A component's class."""
    import diffusers
    import transformers

    library: Any = {"diffusers": diffusers, "transformers": transformers}[ALLOWED[name][cls]]
    return getattr(library, _ALIASES.get(cls, cls))


def _from_pretrained(path: Path, name: str, cls: str, dtype: str | None) -> Any:
    """The class's own loader, on local files, with safetensors alone."""
    import transformers

    loader = _class(name, cls)
    if name not in MODELS:
        return loader.from_pretrained(str(path), local_files_only=True)
    wanted = getattr(torch, dtype or "float32", None)
    if wanted not in WIDE:
        raise ValueError(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    of_transformers = ALLOWED[name][cls] == "transformers"
    check_model(path, name, cls, StoredWeights(path, of_transformers, None).specs())
    # transformers renamed the argument in 4.56 and diffusers keeps the old name
    key = "dtype" if of_transformers and _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    with quiet():
        model = loader.from_pretrained(str(path), local_files_only=True, use_safetensors=True, **{key: wanted})
    return model.eval().requires_grad_(False)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers: a component of an engine loads in well under a second a gigabyte."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
