"""Writes the weights of an engine as safetensors files (shards), in bounded memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
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

    stem: `stored_names.shard_stem` of the module. At most one shard and one tensor's operands are in memory. A shard
    appears under its name once it is whole, and one that is in the folder already is not made again: the caller says by
    the folder that it is of the same plan. progress: called as progress(done, total) with bytes.
    """
    names: list[str] = []
    done, total = 0, planned_bytes(plan)
    for number, wanted in enumerate(_grouped(plan, shard_bytes), 1):
        names.append(f"{stem}-{number:05d}.safetensors")
        made = (folder / names[-1]).exists()
        shard: dict[str, torch.Tensor] = {}
        for name in wanted:
            if not made:
                shard[name] = evaluate(plan[name].expr, plan[name].prefix)
            done += nbytes(plan[name].expr)
            if progress is not None:
                progress(done, total)
        if not made:
            _write_shard(shard, folder / names[-1])
    return names


def planned_bytes(plan: Mapping[str, Emission]) -> int:
    """Bytes of all tensors of a plan, without the headers of their files."""
    return sum(nbytes(e.expr) for e in plan.values())


def _grouped(plan: Mapping[str, Emission], shard_bytes: int) -> Iterator[list[str]]:
    """The names of the tensors of each shard: as many as it takes to reach `shard_bytes`."""
    names: list[str] = []
    size = 0
    for name, emission in plan.items():
        names.append(name)
        size += nbytes(emission.expr)
        if size >= shard_bytes:
            yield names
            names, size = [], 0
    if names:
        yield names


def _write_shard(shard: dict[str, torch.Tensor], path: Path) -> None:
    """Writes one safetensors file whose tensors start at multiples of 64 bytes once it is mapped.

    The library's own writer aligns to 8 bytes. A mapped engine then differed from its source model by an ulp (1e-6 of
    the values), because CPU matrix products take other code paths for other alignments. Tensors whose sizes are no
    multiples of 64 bytes stand last, because the format allows no gaps.
    """
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
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in ordered:
            file.write(shard[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # a name that is there after a power cut holds a whole shard
    partial.replace(path)


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
