"""Files that belong to an engine on this machine: in the user's cache, as an engine's folder stays as it was built."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

from turbocompile.files import replacing


def cache_path(kind: str, name: str) -> Path:
    """`name`.json under $XDG_CACHE_HOME, or ~/.cache, turbocompile/`kind`. Raises OSError where there is no home."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError as error:  # a container under a user that it does not know
        raise FileNotFoundError(errno.ENOENT, "there is no home folder; set XDG_CACHE_HOME to one to keep") from error
    return Path(root) / "turbocompile" / kind / f"{name}.json"


def write_json(path: Path, data: Any) -> Path:
    """Writes it whole or not at all; missing folders are made."""
    text = json.dumps(data, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def keep_json(kind: str, name: str, data: Any) -> Path | None:
    """Writes it to the cache; where that cannot be, a warning says why, since what was measured is worth more."""
    try:
        return write_json(cache_path(kind, name), data)
    except OSError as error:
        warnings.warn(f"the result is not kept in the cache ({error})", UserWarning, 2)
        return None
