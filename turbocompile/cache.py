"""Files that belong to an engine on this machine: in the user's cache, as an engine's folder stays as it was built."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_path(kind: str, name: str) -> Path:
    """`name`.json under $XDG_CACHE_HOME, or ~/.cache, turbocompile/`kind`."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "turbocompile" / kind / f"{name}.json"


def write_json(path: Path, data: Any) -> Path:
    """Writes it whole or not at all; missing folders are made."""
    text = json.dumps(data, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)
    return path
