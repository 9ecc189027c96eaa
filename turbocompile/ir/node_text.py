"""A node's tensors in short text, for tables and printed graphs."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from turbocompile.ir.program import walk_tensors

SHORT = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool", torch.float8_e4m3fn: "fp8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def tensor_text(value: Any) -> str:
    """As in "1x32760x1536 bf16"; a tuple's tensors are separated by commas."""
    return ", ".join(
        f"{'x'.join(map(str, t.shape)) or 'scalar'} {SHORT.get(t.dtype, str(t.dtype).removeprefix('torch.'))}"
        for t in walk_tensors(value)
    )


def describe(node: fx.Node) -> str:
    """Shapes and dtypes of what a node reads and makes, as in "3 of 1x12x32760x128 bf16 -> 1x12x32760x128 bf16".

    Tensors that are a thousand times smaller than the largest (biases, scales, tables) are left out.
    """
    read = [t for n in node.all_input_nodes for t in walk_tensors(n.meta["val"])]
    made = list(walk_tensors(node.meta["val"]))
    least = max((t.numel() for t in read + made), default=0) / 1000

    def text(tensors: list[Any]) -> str:
        shown = [tensor_text(t) for t in tensors if t.numel() >= least]
        runs = ((one, len(list(same))) for one, same in itertools.groupby(shown))
        return ", ".join(one if n == 1 else f"{n} of {one}" for one, n in runs)

    return f"{text(read)} -> {text(made)}"
