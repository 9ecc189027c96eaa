"""Writes the weights of an engine as safetensors files (shards), in bounded memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from turbocompile.ir.emit import Emission
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.weights import nbytes

ALIGNMENT = 64  # bytes: a cache line, and what matrix libraries align to
SHARD_BYTES = 1 << 30  # one shard is in memory while it is made
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def write_shards(
    plan: Mapping[str, Emission],
    evaluate: Evaluator,
    folder: Path,
    stem: str,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Evaluates the plan tensor by tensor and writes `stem-00001.safetensors`, ...; returns the file names, in order.

    stem: `stored_names.shard_stem` of the module. At most one shard and one tensor's operands are in memory.
    progress: called as progress(done, total) with bytes.
    """
    names: list[str] = []
    shard: dict[str, torch.Tensor] = {}
    size = done = 0
    total = sum(nbytes(e.expr) for e in plan.values())
    for name, emission in plan.items():
        shard[name] = evaluate(emission.expr, emission.prefix)
        grown = nbytes(emission.expr)
        size, done = size + grown, done + grown
        if size >= shard_bytes:
            names.append(_write_shard(shard, folder, stem, len(names) + 1))
            shard, size = {}, 0
        if progress is not None:
            progress(done, total)
    if shard:
        names.append(_write_shard(shard, folder, stem, len(names) + 1))
    return names


def _write_shard(shard: dict[str, torch.Tensor], folder: Path, stem: str, number: int) -> str:
    """Writes one safetensors file whose tensors start at multiples of 64 bytes once it is mapped.

    The library's own writer aligns to 8 bytes. A mapped engine then differed from its source model by an ulp (1e-6 of
    the values), because CPU matrix products take other code paths for other alignments. Tensors whose sizes are no
    multiples of 64 bytes stand last, because the format allows no gaps.
    """
    name = f"{stem}-{number:05d}.safetensors"
    ordered = sorted(shard, key=lambda k: (shard[k].nbytes % ALIGNMENT != 0, k))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in ordered:
        tensor = shard[key]
        span = [offset, offset + tensor.nbytes]
        header[key] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with (folder / name).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in ordered:
            file.write(shard[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return name


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor at the same alignment: as far from a multiple of 64 bytes as the tensor.

    CPU matrix products take other code paths for other alignments, and their sums then differ by an ulp.
    """
    offset = tensor.data_ptr() % ALIGNMENT
    if not offset or not tensor.is_contiguous() or tensor.is_complex():
        return tensor.clone()
    room = torch.empty(tensor.nbytes + ALIGNMENT, dtype=torch.uint8)
    start = (offset - room.data_ptr()) % ALIGNMENT
    made = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return made.copy_(tensor)
