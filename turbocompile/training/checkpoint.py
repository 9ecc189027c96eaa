"""Checkpoints that survive a kill at any moment, and that any number of processes can read.

    ROOT/step_00001000/     one checkpoint: torch.distributed.checkpoint files and about.json
    ROOT/.step_...          a checkpoint that is being written or removed; ignored, and removed at the next start

A checkpoint is written under a dotted name, synced to disk and then renamed, so that a checkpoint under its final name
is whole. about.json holds the step, the configuration and the sizes of all files. All processes share ROOT. Load only
checkpoints that you trust, because torch reads their files with pickle.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from turbocompile.errors import EngineError
from turbocompile.training.parallel import barrier, rank, world_size

FORMAT = 1
ABOUT = "about.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder, and the contents of its about.json."""

    path: Path
    about: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.about["step"])


def save(root: Path, step: int, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any], keep: int) -> Path:
    """Writes a checkpoint, removes all checkpoints but the newest `keep`, and returns the new checkpoint's folder.

    tensors: by name, plain or sharded. about: further data for about.json. Every process must call this.
    """
    final = root / f"step_{step:08d}"
    temporary = root / f".{final.name}.writing"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    with _quiet():
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(temporary), no_dist=world_size() == 1)
    barrier()  # every process has written and synced its file
    if rank() == 0:
        _publish(temporary, final, {**about, "format": FORMAT, "step": step})
        for old in _folders(root)[:-keep]:
            _remove(old)
    barrier()
    return final


def _publish(temporary: Path, final: Path, about: dict[str, Any]) -> None:
    about["files"] = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
    with open(temporary / ABOUT, "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)
    if final.exists():
        _remove(final)
    os.rename(temporary, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes a checkpoint. Its folder is renamed first, so that a half-removed checkpoint does not look whole."""
    trash = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _folders(root: Path) -> list[Path]:
    """The folders under a checkpoint's final name, in the order of their steps."""
    found = [p for p in root.glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def clean(root: Path) -> None:
    """Removes the folders that a killed run left half written or half removed."""
    for path in root.glob(".step_*"):
        shutil.rmtree(path)


def newest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there is no checkpoint. Raises EngineError if all checkpoints are
    damaged.
    """
    folders = _folders(root)
    for path in reversed(folders):
        about = _read_about(path)
        if about is not None:
            return Checkpoint(path, about)
        log.warning("%s is damaged (its files are not those that were written); an older one is looked for", path)
    if folders:
        raise EngineError(f"{root}: every checkpoint is damaged; restore one, or remove the folder to begin anew")
    return None


def _read_about(path: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in about["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if whole and about.get("format") != FORMAT:
        raise EngineError(
            f"{path} has format {about.get('format')}, and this version reads {FORMAT}; update turbocompile"
        )
    return about if whole else None


def load(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Reads a checkpoint into `tensors`, in place; every process must call this.

    Raises EngineError if the checkpoint holds other names or shapes than `tensors`.
    """
    reader = dcp.FileSystemReader(checkpoint.path)
    _check_fit(checkpoint.path, _sizes(reader), {name: value.shape for name, value in tensors.items()})
    with _quiet():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=world_size() == 1)


def _sizes(reader: dcp.FileSystemReader) -> dict[str, torch.Size]:
    entries = reader.read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _check_fit(path: Path, stored: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    for name in sorted({*stored, *wanted}):
        if name not in stored:
            what = f"lacks {name}"
        elif name not in wanted:
            what = f"has {name}, which this run lacks"
        elif stored[name] != wanted[name]:
            what = f"has {name} of shape {tuple(stored[name])}, and this run's is {tuple(wanted[name])}"
        else:
            continue
        raise EngineError(f"{path} {what}; resume with the model it was trained with, or use another folder")


def read(checkpoint: Checkpoint, parts: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with one of `parts`, unsharded, on the CPU, in one process."""
    reader = dcp.FileSystemReader(checkpoint.path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(parts)
    }
    with _quiet():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def read_weights(folder: str | Path, *, ema: bool = True) -> dict[str, torch.Tensor]:
    """The model's state dict from the newest checkpoint in a run's folder, on the CPU and without a trainer.

    ema: whether to read the moving averages instead of the trained weights. Raises EngineError if the folder holds no
    whole checkpoint, or if the checkpoint holds no averages.
    """
    root = Path(folder) / "checkpoints"
    checkpoint = newest(root)
    if checkpoint is None:
        raise EngineError(f"{root} has no checkpoint; give the folder of a run that has written one")
    weights = _strip(read(checkpoint, ("model.",)), "model.")
    if not ema:
        return weights
    averages = _strip(read(checkpoint, ("ema.",)), "ema.")
    if not averages:
        raise EngineError(f"{checkpoint.path} has no moving averages; read it with ema=False")
    return weights | averages


def _strip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's warnings about a missing process group, and about torch's own use of its older storage class."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield
