"""Where results are written: looked at before the work, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from turbocompile.errors import UnsupportedError

MANIFEST = "manifest.json"  # of an engine's folder


def check_file(path: str | Path, suffix: str | None = None) -> Path:
    """The path of a file that can be written, or written over.

    suffix: what its name must end in. Raises UnsupportedError for another name, a folder, a place inside an engine, and
    a folder that cannot be made or written to.
    """
    path = Path(path)
    if suffix is not None and path.suffix.lower() != suffix:
        raise UnsupportedError(f"{path}: the file is written as {suffix}; give a name that ends so")
    _check_parents(path)
    if path.is_dir():
        raise UnsupportedError(f"{path} is a folder; give the name of a file in it")
    return path


def check_folder(path: str | Path) -> Path:
    """The path of a folder that files can be written to; it is made later. Raises UnsupportedError as `check_file`."""
    path = Path(path)
    _check_parents(path / "file")
    return path


def _check_parents(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # its own name may be the one that is refused
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
    """Whether a folder is an engine; others have manifests, too."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"schema", "modules", "digest"} <= found.keys()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` when the body ends well, and disappears when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:100]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
