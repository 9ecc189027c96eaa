"""Files by name: where results may be written, and which names an engine's files may have.

A result's path is checked before the work, and the result is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbocompile.errors import EngineError, UnsupportedError

MANIFEST = "manifest.json"  # of an engine's folder
_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")  # a repository's folder in the cache of the hub


def check_file(path: str | Path, suffix: str | None = None) -> Path:
    """The path of a file that can be written, or written over.

    suffix: the ending that the name must have. Raises UnsupportedError for another ending, the path of a folder, a path
    inside an engine, and a folder that cannot be made or written to.
    """
    path = Path(path)
    if suffix is not None and path.suffix.lower() != suffix:
        raise UnsupportedError(f"{path}: the file is written as {suffix}; give a name that ends so")
    _check_parents(path)
    if path.is_dir():
        raise UnsupportedError(f"{path} is a folder; give the name of a file in it")
    return path


def check_folder(path: str | Path) -> Path:
    """The path of a folder that files can be written to; it is made later.

    Raises UnsupportedError as `check_file` does.
    """
    path = Path(path)
    _check_parents(path / "file")
    return path


def _check_parents(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # the system may refuse the last part of the path, and not its parents
        parents = list(path.absolute().parents)
        nearest = next(p for p in parents if p.exists() or p.is_symlink())
        inside = next((p for p in parents if _is_engine(p)), None)
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise UnsupportedError(f"{str(path)[:200]!r} cannot be written ({error}); name another place") from error
    if not nearest.is_dir():
        raise UnsupportedError(f"{path} cannot be written: {nearest} is not a folder; name another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UnsupportedError(f"{path} cannot be written: nothing may be written to {nearest}; name another place")
    if inside is not None:
        raise UnsupportedError(f"{path} is inside the engine {inside}, which stays as it was built; name another place")


def _is_engine(folder: Path) -> bool:
    """Whether a folder is an engine. A manifest alone does not tell: other programs write files of that name, too."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"schema", "modules", "digest"} <= found.keys()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the body ends well, and is deleted when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # because mkstemp makes files that their owner alone can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_plain_name(value: Any) -> bool:
    """Whether a value is a plain relative name, as in "programs/a.json", which leads nowhere else on any system."""
    fits = isinstance(value, str) and len(value) <= 1000 and _NAME.fullmatch(value) is not None
    return fits and not any(set(part) == {"."} for part in value.split("/"))


def inside(folder: Path, name: Any) -> Path:
    """The path of an engine's file. Raises EngineError for a name that leads out, a link and a missing file.

    In the cache of the Hugging Face hub the files of a repository are links to its blobs: these links are followed.
    """
    if not is_plain_name(name):
        shown = ascii(name)[:60] if isinstance(name, str) else f"of the type {type(name).__name__}"
        raise EngineError(f"a file that the engine names is {shown}, which is no plain relative name")
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink() and not _is_blob(folder, path):
            raise EngineError(
                f"{name} in the engine is a link, and an engine holds plain files only; copy the folder with `cp -rL`"
            )
    if not path.is_file():
        raise EngineError(f"the engine lacks the file {name}; copy it again or build it again")
    return path


def _is_blob(folder: Path, link: Path) -> bool:
    """Whether a link in models--OWNER--NAME/snapshots/REVISION leads to a plain file in the same repository's blobs."""
    for snapshots in folder.resolve().parents:
        if snapshots.name == "snapshots" and _REPOSITORY.fullmatch(snapshots.parent.name):
            target = Path(os.path.normpath(link.parent.resolve() / os.readlink(link)))
            return target.parent == snapshots.parent / "blobs" and target.is_file() and not target.is_symlink()
    return False
