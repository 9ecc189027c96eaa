"""Files in the user's cache: measurements of an engine on this machine, because its folder stays as it was built."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

from turbocompile.files import replacing


def cache_path(kind: str, name: str) -> Path:
    """The path $XDG_CACHE_HOME/turbocompile/`kind`/`name`.json, with ~/.cache where the variable is not set.

    Raises OSError where the user has no home folder.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError as error:  # a container that runs as a user without an entry in its passwd
        raise FileNotFoundError(errno.ENOENT, "there is no home folder; set XDG_CACHE_HOME to one to keep") from error
    return Path(root) / "turbocompile" / kind / f"{name}.json"


def write_json(path: Path, data: Any) -> Path:
    """Writes data as JSON, whole or not at all, and makes the missing folders. Returns the path."""
    text = json.dumps(data, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def keep_json(kind: str, name: str, data: Any) -> Path | None:
    """Writes data to the cache and returns the path.

    Where the cache cannot be written, a warning says why and the result is None: the caller still has the data.
    """
    try:
        return write_json(cache_path(kind, name), data)
    except OSError as error:
        warnings.warn(f"the result is not kept in the cache ({error})", UserWarning, 2)
        return None
