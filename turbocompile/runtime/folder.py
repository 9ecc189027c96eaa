"""An engine's folder: how its files are written and sealed, and how they are checked before anyone reads them.

Reading executes nothing from the folder. The names of files are plain relative names without links, JSON is bounded in
size and depth, and each file's hashes are compared with the manifest's. Hashes show damage, not origin: a user loads
engines only from where they would load weights from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from turbocompile.errors import EngineError
from turbocompile.files import MANIFEST, inside
from turbocompile.ir import reading
from turbocompile.ir.reading import Unreadable, entry, file_name, items, table, text, texts, whole
from turbocompile.version import __version__

SCHEMA = 1
CHUNK = 64 << 20  # bytes of a weights file that share one hash, so that files can be checked in parallel
MAX_JSON = 256 << 20  # bytes
MAX_DEPTH = 96
# Strings are tokens, so that brackets in them do not count. A string without an end reaches to the end of the data,
# because the data is then read once and not once for each quote.
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # one half of a character beyond 16 bits, perhaps without its other half
_MODULE = re.compile(r"[A-Za-z0-9_-]{1,100}")  # the name of a module is a part of file names
_HASH = re.compile(r"[0-9a-f]{64}")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` that becomes it when the body ends well, and disappears when it does not."""
    if target.exists() or target.is_symlink():
        raise EngineError(
            f"{target} exists already, and an engine is never written over; name another folder or remove it"
        )
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # another process made it meanwhile
                raise EngineError(f"{target} was written by another process meanwhile; name another folder") from error
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def canonical(manifest: Mapping[str, Any]) -> bytes:
    """The bytes that the digest is computed from: JSON in UTF-8, sorted keys, no spaces, without the digest."""
    body = {k: v for k, v in manifest.items() if k != "digest"}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def seal(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the hashes of every file and the digest to a manifest, writes it into the folder, and returns it."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: file_entry(folder / name) for name in names if name != MANIFEST}
    manifest = {**manifest, "schema": SCHEMA, "version": __version__, "files": files}
    manifest["digest"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def file_entry(path: Path) -> dict[str, Any]:
    """The size of a file in bytes, and the SHA-256 of each 64 MiB of it."""
    return {"size": path.stat().st_size, "sha256": _hashes(path)}


def _hashes(path: Path) -> list[str]:
    def digest(start: int) -> str:
        h = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(start)
            left = CHUNK
            while left and (data := file.read(min(left, 1 << 20))):
                h.update(data)
                left -= len(data)
        return h.hexdigest()

    starts = range(0, max(1, path.stat().st_size), CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, starts))


def read_json(path: Path) -> Any:
    """The parsed JSON of a file in UTF-8. Raises EngineError where it is too large, too deep or no JSON."""
    if path.stat().st_size > MAX_JSON:
        raise EngineError(f"{path.name} is {path.stat().st_size >> 20} MiB, more than any engine needs; build it again")
    data = path.read_bytes()
    depth = 0
    for token in _BRACKETS.finditer(data):  # before it is parsed, because the parser recurses
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > MAX_DEPTH:
            raise EngineError(f"{path.name} is nested more than {MAX_DEPTH} deep, so it is no engine file")
    try:
        found = json.loads(data.decode("utf-8"))  # decoded here, because the parser would guess another encoding
        if _SURROGATE.search(data):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise EngineError(f"{path.name} is not valid JSON ({reason}); the engine is damaged, build it again") from error
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises EngineError where its digest differs, or a field is of another type."""
    if not folder.is_dir():
        raise EngineError(f"{folder} is no folder; `turbocompile optimize RECIPE -o {folder}` makes one")
    if not (folder / MANIFEST).is_file():
        raise EngineError(f"{folder} has no {MANIFEST}, so it is no engine; `turbocompile optimize` makes one")
    manifest = read_json(inside(folder, MANIFEST))
    if not isinstance(manifest, dict) or type(manifest.get("schema")) is not int:
        raise EngineError(f"{folder / MANIFEST} is no manifest of an engine; build it again")
    if manifest["schema"] > SCHEMA:
        raise EngineError(
            f"the engine was built by turbocompile {str(manifest.get('version'))[:40]} (schema "
            f"{reading.shown(manifest['schema'])}), and this version reads schema {SCHEMA}; upgrade turbocompile"
        )
    if manifest.get("digest") != hashlib.sha256(canonical(manifest)).hexdigest():
        raise EngineError(f"the manifest of {folder} was altered after the build (its digest differs); build it again")
    try:
        _check_manifest(manifest)
    except Unreadable as error:
        raise EngineError(f"the manifest of {folder} is damaged: {error}; build the engine again") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises Unreadable for a field of another type, and for the name of a file that has no hash."""
    whole(manifest["schema"], "schema", 1)
    files, modules, components = (table(entry(manifest, k, "it"), f"{k!r}") for k in ("files", "modules", "components"))
    for name, value in files.items():
        file_name(name)
        row = table(value, f"the entry of {name}")
        whole(entry(row, "size", f"the entry of {name}"), f"the size of {name}", 0)
        if not all(map(_HASH.fullmatch, texts(entry(row, "sha256", f"the entry of {name}"), f"the hashes of {name}"))):
            raise Unreadable(f"a hash of {name} is none")
    for module, value in modules.items():
        if not _MODULE.fullmatch(module):
            raise Unreadable(f"a module is named {reading.shown(module)}, and should have a plain name")
        _check_module(table(value, f"the entry of {module!r}"), f"the entry of {module!r}", files)
    for component, value in components.items():
        file_name(component, "a component")
        row = table(value, f"the component {component!r}")
        for field, found in row.items():
            text(found, f"{field[:40]!r} of the component {component!r}")
        file_name(row.get("folder", component), f"the folder of the component {component!r}")
    for name in ("version", "target", "task"):
        if name in manifest:
            text(manifest[name], f"{name!r}")
    for name in ("versions", "recipe"):
        if name in manifest:
            table(manifest[name], f"{name!r}")
    for name, value in manifest.get("versions", {}).items():
        text(value, f"the version of {name[:40]!r}")
    if manifest.get("boundary_ratio") is not None:
        reading.number(manifest["boundary_ratio"], "'boundary_ratio'")


def _check_module(row: dict[str, Any], what: str, files: Mapping[str, Any]) -> None:
    """Raises Unreadable where a field of a module's entry is of another type, or names a file that has no hash."""
    programs = table(entry(row, "programs", what), f"'programs' of {what}")
    if not programs:
        raise Unreadable(f"{what} has no program")
    groups = table(entry(row, "files", what), f"'files' of {what}")
    named = [*programs.values(), *items(entry(row, "weights", what), f"'weights' of {what}")]
    named += [name for shape, group in groups.items() for name in items(group, f"the files of {shape[:40]!r}")]
    for name in named:
        if file_name(name) not in files:
            raise Unreadable(f"{what} names {name}, which is not among the engine's files")
    for field in ("backend", "dtype"):
        text(entry(row, field, what), f"{field!r} of {what}")
    text(row.get("name", ""), f"'name' of {what}")
    table(row.get("config", {}), f"'config' of {what}")


def check_files(folder: Path, manifest: Mapping[str, Any], names: Sequence[str] | None = None) -> None:
    """Compares the sizes and hashes of the named files with the manifest, by default of all files.

    Raises EngineError for a file that is missing, or differs from the manifest.
    """
    for name in names if names is not None else manifest["files"]:
        row = manifest["files"].get(name)
        path = inside(folder, name)
        if not isinstance(row, dict):
            raise EngineError(f"the engine's {name} is not in its manifest; build it again")
        if path.stat().st_size != row.get("size"):
            raise EngineError(
                f"the engine's {name} has {path.stat().st_size} bytes and should have {row.get('size')}; copy it again"
            )
        if _hashes(path) != row.get("sha256"):
            raise EngineError(f"the engine's {name} was altered (its hash differs); copy it again or build it again")


def check_strangers(folder: Path, manifest: Mapping[str, Any], subfolder: str) -> None:
    """Raises EngineError for a file in the subfolder that the manifest does not name: a loader may open any file."""
    found = {p.relative_to(folder).as_posix() for p in (folder / subfolder).rglob("*") if not p.is_dir()}
    strangers = sorted(found.difference(manifest["files"]))
    if strangers:
        raise EngineError(f"the engine's {strangers[0]} is not in its manifest; remove it or build again")
