"""A model's folder on the Hugging Face hub: from the local cache, or downloaded."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from turbocompile.errors import RecipeError
from turbocompile.recipe.presets import HUB_PRESETS

PROBE_SECONDS = 5.0


def fetch(repo: str, revision: str | None, without_transformers: bool = False) -> Path:
    """The folder of a hub model: from the local cache, else downloaded. Raises RecipeError where neither is possible.

    The hub is probed once, for at most PROBE_SECONDS, because the hub's client would retry without a network.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    ignored = ["transformer*/*.safetensors"] if without_transformers else None
    options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ignored}
    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE or not _reachable(f"{constants.ENDPOINT}/api/models/{repo}"):
        raise RecipeError(_no_weights(repo, "this machine cannot reach the hub"))
    print(f"downloading {repo}", file=sys.stderr)
    try:
        return Path(huggingface_hub.snapshot_download(repo, **options))
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        raise RecipeError(_no_weights(repo, f"the hub refuses it ({status})")) from e


def _reachable(url: str) -> bool:
    """Whether a server answers; an HTTP error is an answer."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _no_weights(repo: str, why: str) -> str:
    preset = HUB_PRESETS.get(repo)
    instead = "add --set model.weights=synthetic" if preset else "write model: {preset: wan-tiny}"
    return (
        f"{repo} is not in the Hugging Face cache and {why}: get the weights where there is a network with "
        f"`hf download {repo} --local-dir DIR` and set model.path to DIR, or {instead} to try it with synthetic weights"
    )
