"""`turbocompile verify`: whether an engine folder is whole, and whether it still answers as its source model does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from turbocompile.errors import EngineError
from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.program import Program, is_op
from turbocompile.kernels import ops
from turbocompile.numerics.errors import Error, compare
from turbocompile.numerics.inputs import random_inputs
from turbocompile.recipe.schema import Recipe
from turbocompile.runtime.engine import Engine, load
from turbocompile.runtime.folder import check_files, check_strangers, read_manifest
from turbocompile.wan.source import open_source

EXACT_LIMIT = 1e-4  # of the largest value: more than 30 layers of exact rewrites round in float32
QUANTIZED = (ops.w8a8_linear, *SAGE, *SLA)


@dataclass
class Checked:
    """The result of a check. files, bytes: how many files, and their size.

    errors: module -> the error against the source model, empty unless asked for. limit: the largest error that is
    right, None for a quantized engine.
    """

    folder: str
    files: int
    bytes: int
    errors: dict[str, Error] = field(default_factory=dict)
    limit: float | None = None

    @property
    def good(self) -> bool:
        """Whether every module is within the limit. A quantized engine has no limit: its error is only shown."""
        return all(e.max_rel <= self.limit for e in self.errors.values()) if self.limit is not None else True

    def to_dict(self) -> dict[str, Any]:
        errors = {k: {**e.to_dict(), "max_rel": e.max_rel} for k, e in self.errors.items()}
        return {
            "folder": self.folder, "files": self.files, "bytes": self.bytes, "errors": errors, "limit": self.limit,
            "good": self.good,
        }  # fmt: skip


def verify_folder(folder: str | Path, numeric: bool = False) -> Checked:
    """Compares every file with its hash and opens the engine; with `numeric`, runs it beside its source model.

    Raises EngineError where the folder is damaged, or its source model cannot be opened any more.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    check_files(root, manifest)
    check_strangers(root, manifest, "components")
    engine = load(root, check=False)
    found = Checked(str(root), len(manifest["files"]), sum(f["size"] for f in manifest["files"].values()))
    if numeric:
        found.errors, exact = _compare(engine, manifest)
        found.limit = EXACT_LIMIT if exact else None
    return found


def _compare(engine: Engine, manifest: dict[str, Any]) -> tuple[dict[str, Error], bool]:
    if not isinstance(manifest.get("recipe"), dict) or "task" not in manifest:
        raise EngineError(
            "this engine was made from a module in memory, so there is no source model to compare with; "
            "compare engine(*args) with model(*args) where you have both"
        )
    source = open_source(Recipe.from_dict(manifest["recipe"], "manifest.json"))
    errors, exact = {}, True
    for name, expert in engine.experts.items():
        if name not in source.transformers:
            raise EngineError(f"the source model has no {name!r}, so the engine is not of it; build it again")
        program = min(expert.programs.values(), key=_elements)
        tensors = random_inputs(program)
        names = [i.path for i in program.signature.inputs]
        call = dict(zip(names, tensors, strict=True))
        model = source.transformers[name].load()
        with torch.no_grad():
            expected = model(**call, return_dict=False)[0]
            errors[name] = compare(expert(**call, return_dict=False)[0], expected)
        quantized = any(is_op(n, *QUANTIZED) for sub in program.graphs.values() for n in sub.graph.nodes)
        exact = exact and not quantized and expected.dtype == torch.float32
    return errors, exact


def _elements(program: Program) -> int:
    return sum(torch.Size(i.shape).numel() for i in program.signature.inputs)
