"""The weights of a component's folder: copied as they are, or cast, with scales multiplied into 8-bit weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from turbocompile.wan.scaled import EIGHT_BIT, ScaledTensors
from turbocompile.wan.tensors import STEM, SafetensorsFiles, Spec, weight_files

WIDE = (torch.float32, torch.bfloat16, torch.float16)  # what the libraries load and compute in


class StoredWeights:
    """The safetensors weights of one model in a folder. dtype: that of the weights once saved."""

    def __init__(self, folder: Path, of_transformers: bool, cast: torch.dtype | None) -> None:
        """cast: the dtype to save in; None keeps the stored dtypes, except that 8 bits and float64 become float32.

        Reads headers. Raises EngineError where the files are missing or not whole, UnsupportedError for GGUF.
        """
        self._stem = "model" if of_transformers else STEM
        self._found = weight_files(folder, self._stem, single_first=of_transformers)
        self._files = SafetensorsFiles(self._found.files)
        self._tensors = ScaledTensors(self._files, str(folder))
        stored = [self._files.spec(self._tensors.key(name))[1] for name in self._tensors.keys()]  # noqa: SIM118
        odd = [d for d in stored if d in EIGHT_BIT or d == torch.float64]
        self._cast = cast or (torch.float32 if odd else None)
        self.dtype = self._cast or next((d for d in stored if d in WIDE), torch.float32)
        self.rewritten = bool(odd) or self._tensors.converted or bool(self._found.variant)

    def specs(self) -> dict[str, Spec]:
        """Shapes and dtypes once saved, by name."""
        return {name: (self._tensors.spec(name)[0], self._saved(name)) for name in self._tensors.keys()}  # noqa: SIM118

    def _saved(self, name: str) -> torch.dtype:
        dtype = self._tensors.spec(name)[1]
        return self._cast if self._cast is not None and dtype.is_floating_point else dtype

    @property
    def size(self) -> int:
        """Bytes once saved: the weights exactly, their headers nearly."""
        return sum(math.prod(shape) * dtype.itemsize + 100 for shape, dtype in self.specs().values())

    def save(self, folder: Path) -> None:
        """Writes the files into `folder` under the libraries' names; one file is in memory at a time."""
        for path in self._found.files:
            target = folder / (path.name if self._found.index else f"{self._stem}.safetensors")
            if self._cast is None and not self._tensors.converted:
                shutil.copyfile(path, target)
                continue
            names = [n for n in self._tensors.keys() if self._files.places[self._tensors.key(n)] == path]  # noqa: SIM118
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata()
            save_file({n: self._tensors.get(n).to(self._saved(n)) for n in names}, target, metadata)
        if self._found.index is not None:
            index = json.loads(self._found.index.read_text(encoding="utf-8"))
            known = set(self._tensors.keys())
            index["weight_map"] = {n: file for n, file in index["weight_map"].items() if n in known}
            text = json.dumps(index, indent=2) + "\n"
            (folder / f"{self._stem}.safetensors.index.json").write_text(text, encoding="utf-8")
