"""A transformer's checkpoint of any format as a folder that diffusers' `WanTransformer3DModel.from_pretrained` opens.

Quantized weights are dequantized. Parameters go into shards under diffusers' names; what diffusers' class has no place
for lies in files of its own beside them: SLA's projections and VSA's gates. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.files import check_folder
from turbocompile.wan.checkpoints import CheckpointTensors
from turbocompile.wan.keys import PROJECTIONS
from turbocompile.wan.opening import EXPERTS, GATES_FILE, PROJECTIONS_FILE, Checkpoint, open_checkpoint, snapshot
from turbocompile.wan.tensors import DTYPES as DTYPES_BY_NAME
from turbocompile.wan.tensors import INDEX, SINGLE, STEM, Spec
from turbocompile.wan.transformer import TransformerSource

SHARD = 5_000_000_000  # bytes; diffusers writes 10 GB by default, the hub's uploads like less
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BESIDE = {PROJECTIONS_FILE: "the projections of SLA", GATES_FILE: "the gates of VSA"}
ALIGNMENT = 64  # bytes: products of mapped weights take the same code paths as those of weights in memory
Progress = Callable[[str, float], None]
Specs = Mapping[str, Spec]
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES_BY_NAME.items()}


@dataclass(frozen=True)
class Converted:
    """What was written. folder: where. dtype: of the weights. tensors: parameters. bytes: of all files. dequantized:
    weights that were stored quantized. beside: file -> what it holds. notes: sentences about what is not used.
    """

    folder: Path
    dtype: str
    tensors: int
    bytes: int
    dequantized: int
    beside: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder), "dtype": self.dtype, "tensors": self.tensors, "bytes": self.bytes,
            "dequantized": self.dequantized, "beside": dict(self.beside), "notes": list(self.notes),
        }  # fmt: skip


def convert(
    source: Path,
    out: Path,
    dtype: str | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    shard: int = SHARD,
) -> Converted:
    """Writes the transformer in the file or folder `source` as the folder `out`, whole or not at all.

    dtype: "float32" or "bfloat16"; None: bfloat16 where the checkpoint is in it or quantized, else float32. Norms and
    embeddings that diffusers keeps in float32 are float32 either way. force: replaces a folder that a conversion wrote.
    progress(stage, fraction). shard: bytes of a file at most, unless one tensor is larger. Raises TurbocompileError.
    """
    _check_out(source, out, force)
    opened = _open(source)
    chosen = DTYPES[dtype] if dtype is not None else _own_dtype(opened)
    transformer = TransformerSource("transformer", opened.config, opened.tensors, chosen, where=opened.where)
    model = transformer.build()  # raises where the tensors do not fit
    wanted = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    tensors = opened.tensors
    projections = [name for name in tensors.keys() if PROJECTIONS.fullmatch(name)]  # noqa: SIM118
    beside = {
        file: {name: (tensors.spec(name)[0], chosen) for name in names}
        for file, names in ((PROJECTIONS_FILE, projections), (GATES_FILE, tensors.aside))
        if names
    }
    total = sum(_bytes(spec) for specs in (wanted, *beside.values()) for spec in specs.values())
    _check_space(out, total)
    with _replacing(out, force) as folder:
        model.save_config(folder)  # type: ignore[operator]
        writer = _Writer(tensors, folder, total, progress)
        if progress is not None:
            progress("convert", 0.0)
        writer.write_shards(wanted, shard)
        for name, specs in beside.items():
            writer.write(name, specs)
        size = sum(path.stat().st_size for path in folder.iterdir())
    held = {name: what for name, what in BESIDE.items() if name in beside}
    words = str(chosen).removeprefix("torch.")
    return Converted(out, words, len(wanted), size, len(tensors.stored), held, opened.notes)


def _bytes(spec: Spec) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def _open(source: Path) -> Checkpoint:
    """The checkpoint. Raises EngineError or UnsupportedError where it is none of one transformer."""
    if not source.exists():
        raise EngineError(f"{source}: there is no such file or folder; name a checkpoint or a transformer's folder")
    if source.is_dir():
        source = snapshot(source)
        parts = [name for name in ("transformer", "transformer_2", *EXPERTS) if (source / name).is_dir()]
        if len(parts) == 1 and not (source / "config.json").exists():
            source = source / parts[0]
        elif parts and not (source / "config.json").exists():
            raise UnsupportedError(
                f"{source}: this folder has the transformers {', '.join(parts)}, and one is converted at a time; name "
                f"{source / parts[0]}"
            )
    return open_checkpoint(source, torch.float32)


def _own_dtype(opened: Checkpoint) -> torch.dtype:
    """bfloat16 where no linear of the blocks has more digits, else float32."""
    tensors = opened.tensors
    linears = [n for n in tensors.keys() if n.startswith("blocks.") and len(tensors.spec(n)[0]) == 2]  # noqa: SIM118
    wide = any(n not in tensors.stored and tensors.spec(n)[1] != torch.bfloat16 for n in linears)
    return torch.float32 if wide and not tensors.stored else torch.bfloat16


@dataclass
class _Writer:
    """Writes tensors of a checkpoint into safetensors files, one tensor in memory at a time. total: bytes of all."""

    tensors: CheckpointTensors
    folder: Path
    total: int
    progress: Progress | None
    done: int = 0

    def write_shards(self, wanted: Specs, size: int) -> None:
        """One file, or shards of at most `size` bytes and their index."""
        shards = list(_shards(wanted, size))
        if len(shards) == 1:
            self.write(SINGLE, wanted)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"{STEM}-{number:05}-of-{len(shards):05}.safetensors"
            self.write(file, {name: wanted[name] for name in names})
            places |= dict.fromkeys(names, file)
        metadata = {"total_size": sum(map(_bytes, wanted.values()))}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, wanted: Specs) -> None:
        """One file. Tensors whose sizes are no multiples of ALIGNMENT stand last, because the format has no gaps."""
        ordered = sorted(wanted, key=lambda n: _bytes(wanted[n]) % ALIGNMENT != 0)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key in ordered:
            shape, dtype = wanted[key]
            span = [offset, offset + _bytes(wanted[key])]
            header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": span}
            offset = span[1]
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        with (self.folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for key in ordered:
                value = self.tensors.get(key).to(wanted[key][1]).contiguous()
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
                self.done += _bytes(wanted[key])
                self._tell()
            file.flush()
            os.fsync(file.fileno())

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress("convert", self.done / self.total)


def _shards(wanted: Specs, size: int) -> Iterator[list[str]]:
    """The names of each shard, in the model's order."""
    names: list[str] = []
    held = 0
    for name, spec in wanted.items():
        if names and held + _bytes(spec) > size:
            yield names
            names, held = [], 0
        names.append(name)
        held += _bytes(spec)
    yield names


def _check_out(source: Path, out: Path, force: bool) -> None:
    """Raises UnsupportedError for a place where no folder may be written."""
    check_folder(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UnsupportedError(f"{out} exists and is no folder; name another one")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise UnsupportedError(f"{out} exists and is not empty; name another folder, or add --force to replace it")
        strange = sorted(p.name for p in out.iterdir() if not _is_ours(p))
        if strange:
            raise UnsupportedError(f"{out} holds {strange[0]}, which no conversion writes, so it is not replaced")
        if source.resolve() == out.resolve() or out.resolve() in source.resolve().parents:
            raise UnsupportedError(f"{out} holds the checkpoint itself; name another folder")
    if out.resolve() == Path.cwd():
        raise UnsupportedError("the folder to write cannot be the current one; name another")


def _is_ours(path: Path) -> bool:
    known = {"config.json", INDEX, SINGLE, *BESIDE}
    return path.name in known or (path.name.startswith(f"{STEM}-") and path.suffix == ".safetensors")


def _check_space(out: Path, size: int) -> None:
    nearest = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(nearest).free
    if size > free:
        raise EngineError(f"{out}: the weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")


@contextmanager
def _replacing(out: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `out`, also in place of a folder that a conversion wrote."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp makes private folders
        if force and out.is_dir() and any(out.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            os.replace(out, old)
            os.replace(made, out)
            shutil.rmtree(old)
        else:
            os.replace(made, out)  # replaces an empty folder, too
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
