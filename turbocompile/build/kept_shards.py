"""The finished shards of a build that was killed, which the same build goes on from.

They stand in a hidden folder beside the engine until the engine has them all. A build that ends by an error or Ctrl-C
removes the folder; one that the system kills (kill -9, a power cut) leaves it, and the next build of the same engine,
from the same files, takes the shards from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from turbocompile.build.compile import Compiled
from turbocompile.errors import EngineError
from turbocompile.ir.evaluate import TensorSource, WithVectors
from turbocompile.ir.shards import planned_bytes
from turbocompile.recipe.schema import Recipe
from turbocompile.version import __version__

MARK = "of.json"  # says of which build the shards are
SPARE = 64 << 20  # bytes for all of an engine's files but weights and components


@contextlib.contextmanager
def kept_shards(out: Path, build: str) -> Iterator[Path]:
    """The folder for the shards of the engine `out` while the body runs, with what an earlier build left in it.

    build: what tells builds apart, as of `fingerprint`. Two processes that build one engine have a folder each.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.shards"
    folder.mkdir(exist_ok=True)
    with _owned(folder) as own:
        if not own:
            folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=out.parent))
        try:
            if _mark(folder) != build:
                for path in folder.iterdir():
                    path.unlink()
                (folder / MARK).write_text(json.dumps({"build": build}), encoding="utf-8")
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[bool]:
    """Whether this process alone has the folder while the body runs; the system lets go of it if the process dies."""
    try:
        import fcntl
    except ImportError:  # no such locks outside of Unix
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _mark(folder: Path) -> str:
    try:
        return str(json.loads((folder / MARK).read_text(encoding="utf-8"))["build"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def fingerprint(recipe: Recipe, compiled: Mapping[str, Compiled], places: Mapping[str, str]) -> str:
    """Tells builds apart whose shards differ: by the recipe, the plans, the files of the model, constants and versions.

    places: the folder or file of each transformer.
    """
    told = hashlib.sha256()
    told.update(repr((__version__, torch.__version__, recipe.to_dict())).encode())
    loras = [spec.path for spec in recipe.lora]
    for place in [*places.values(), *(loras or ())]:
        told.update(repr(_files(Path(place))).encode())
    for name, item in compiled.items():
        told.update(repr((name, [(k, dataclasses.astuple(e)) for k, e in item.plan.items()])).encode())
        for key, tensor in [*item.constants.items(), *_vectors(item.source).items()]:
            told.update(repr((key, tensor.dtype, tuple(tensor.shape))).encode())
            told.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def _files(place: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files at a place; links are followed."""
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _vectors(source: TensorSource) -> Mapping[str, torch.Tensor]:
    return source.vectors if isinstance(source, WithVectors) else {}


def check_room(out: Path, shards: Path, compiled: Mapping[str, Compiled], components: int) -> None:
    """Raises EngineError where the disk has no room for what is left to write. components: bytes of the components."""
    there = sum(p.stat().st_size for p in shards.glob("*.safetensors"))
    needed = sum(planned_bytes(item.plan) for item in compiled.values()) + components + SPARE - there
    free = shutil.disk_usage(shards).free
    if needed > free:
        raise EngineError(
            f"{out}: the engine takes {needed / 1e9:.1f} GB more, and the disk has {free / 1e9:.1f} GB free; "
            "free some, or name a folder on another disk"
        )
