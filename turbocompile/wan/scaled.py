"""Weights stored in 8 bits with a scale beside them, read as the float32 numbers that they encode.

    w = stored * scale        stored: e4m3, e5m2 or int8

The scale of `a.weight` is `a.weight_scale`, `a.scale_weight`, `a.scale` or `a.weight_scale_inv` (which is multiplied by
as well, in spite of its name): one number, one a row, or one a block of a regular grid. A float8 weight without a scale
is a plain cast. What the checkpoint says of activations (`input_scale`) is not used, because an engine takes the scale
of activations from themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import torch

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EIGHT_BIT = (*FLOAT8, torch.int8)
WEIGHT_SCALES = ("weight_scale", "scale_weight", "scale", "weight_scale_inv")
ACTIVATION_SCALES = ("input_scale", "scale_input")
MARKER = "scaled_fp8"  # ComfyUI's files have this empty tensor, whose dtype is the weights'
DESCRIPTION = "comfy_quant"  # ComfyUI's later files: JSON as bytes, beside each weight
BLOCK = 128  # of scales by blocks that do not divide the weight


class ScaledTensors:
    """The tensors of a source without the scales: each weight that has one is read as float32 stored * scale."""

    def __init__(self, raw: TensorSource, where: str) -> None:
        """where: names the checkpoint in errors. Raises EngineError or UnsupportedError where a scale fits no weight,
        or a stored weight means nothing without one."""
        self._raw, self._where = raw, where
        names = set(raw.keys())
        self._scales = self._find(names)
        described = self._described(names)
        unused = {f"{path}.{leaf}" for path in map(_path, self._scales) for leaf in ACTIVATION_SCALES} & names
        markers = {name for name in names if name.rpartition(".")[2] == MARKER and raw.spec(name)[1] in FLOAT8}
        consumed = {*self._scales.values(), *described, *unused, *markers}
        self._names = [name for name in raw.keys() if name not in consumed]  # noqa: SIM118 (no mapping)
        self._check_said(described, markers)
        self._check_stored()
        self.notes: tuple[str, ...] = ()
        if unused:
            self.notes = (
                f"{where}: {len(unused)} scales of activations (as {min(unused)}) are not used: an engine takes them "
                "from the activations themselves",
            )

    def _find(self, names: set[str]) -> dict[str, str]:
        """The scale of each 8-bit weight, by the weight's name."""
        found: dict[str, str] = {}
        for name in names:
            if name.rpartition(".")[2] != "weight" or self._raw.spec(name)[1] not in EIGHT_BIT:
                continue
            scales = [s for s in (f"{_path(name)}.{leaf}" for leaf in WEIGHT_SCALES) if s in names]
            if len(scales) > 1:
                raise EngineError(
                    f"{self._where}: {name} has the scales {scales[0]} and {scales[1]}, and only one can be meant; "
                    "give the checkpoint that was not quantized"
                )
            if scales:
                found[name] = scales[0]
                _grid(self._where, scales[0], self._raw.spec(scales[0]), self._raw.spec(name)[0])
        return found

    def _described(self, names: set[str]) -> set[str]:
        """ComfyUI's descriptions of weights. Raises UnsupportedError for a description of more than a scale."""
        found = set()
        for name in names:
            if name.rpartition(".")[2] != DESCRIPTION:
                continue
            try:
                values = json.loads(bytes(self._raw.get(name).flatten().tolist()))
                kind = values.pop("format")
                values.pop("full_precision_matrix_mult", None)  # how to multiply, not what the weight is
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise EngineError(f"{self._where}: {name} describes no weight ({e!r}); download it again") from e
            if values or kind not in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise"):
                raise UnsupportedError(
                    f"{self._where}: {name} says that the weight is stored as {kind}"
                    f"{' with ' + ', '.join(map(str, values)) if values else ''}, which turbocompile does not read; "
                    "give the checkpoint that was not quantized"
                )
            found.add(name)
        return found

    def _check_said(self, described: set[str], markers: set[str]) -> None:
        """Raises EngineError where the file says that its 8-bit weights are scaled, and the scales are missing."""
        weights = [f"{_path(name)}.weight" for name in described]
        if markers and not self._scales:
            weights += [name for name in self._names if name.rpartition(".")[2] == "weight"]
        for name in weights:
            if name in self._names and name not in self._scales and self._raw.spec(name)[1] in EIGHT_BIT:
                raise EngineError(
                    f"{self._where}: {name} is said to be scaled ({min([*markers, *described])}) and has no scale "
                    "beside it; get the whole file again, or give the checkpoint that was not quantized"
                )

    def _check_stored(self) -> None:
        """Raises EngineError for integers without a scale, and for float8 weights without a scale among scaled ones."""
        scaled = {self._raw.spec(name)[1] for name in self._scales}
        for name in self._names:
            dtype = self._raw.spec(name)[1]
            if name in self._scales or (name.rpartition(".")[2] != "weight" and dtype not in scaled):
                continue
            if not dtype.is_floating_point or dtype in scaled:
                others = " where other weights have one" if dtype in scaled else ""
                raise EngineError(
                    f"{self._where}: {name} is stored as {str(dtype).removeprefix('torch.')} and has no scale beside "
                    f"it{others}; get the whole file again, or give the checkpoint that was not quantized"
                )

    @property
    def converted(self) -> bool:
        """Whether any weight has a scale."""
        return bool(self._scales)

    def keys(self) -> Iterable[str]:
        return self._names

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        shape, dtype = self._raw.spec(name)
        return shape, torch.float32 if name in self._scales else dtype

    def get(self, name: str) -> torch.Tensor:
        stored = self._raw.get(name)
        scale = self._scales.get(name)
        if scale is None:
            return stored
        values = self._raw.get(scale)
        if not bool(values.float().isfinite().all()):
            raise EngineError(f"{self._where}: the scale {scale} is no finite number; download the checkpoint again")
        return dequantized(stored, values, self._where, scale)


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _grid(
    where: str, name: str, spec: tuple[tuple[int, ...], torch.dtype], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a scale with as many dimensions as its weight, and the block that one of its numbers scales.

    Raises EngineError for a scale of another shape.
    """
    sizes, dtype = spec
    wrong = EngineError(
        f"{where}: the scale {name} has the shape {list(sizes)}, which says neither one number, nor one a row, nor one "
        f"a block of a weight of {list(shape)}; give the checkpoint that was not quantized"
    )
    if not dtype.is_floating_point:
        raise wrong
    if math.prod(sizes) == 1:
        return (1,) * len(shape), shape
    if len(sizes) == 1 and sizes[0] == shape[0]:
        sizes = (sizes[0], *[1] * (len(shape) - 1))
    if len(sizes) != len(shape):
        raise wrong
    blocks = [_block(count, size) for count, size in zip(sizes, shape, strict=True)]
    if not all(blocks):
        raise wrong
    return sizes, tuple(blocks)


def _block(count: int, size: int) -> int:
    """How many of `size` values each of `count` scales covers; 0 where no block size fits.

    The last block may be shorter than 128 values; other block sizes must divide `size`.
    """
    if count in (1, size):
        return size // count
    if count == -(-size // BLOCK):
        return BLOCK
    return size // count if count and size % count == 0 else 0


def dequantized(stored: torch.Tensor, scale: torch.Tensor, where: str = "", name: str = "scale") -> torch.Tensor:
    """stored * scale in float32. scale: one number, one a row, or one a block. Raises EngineError for other shapes."""
    sizes, blocks = _grid(where, name, (tuple(scale.shape), scale.dtype), tuple(stored.shape))
    wide = scale.float().reshape(sizes)
    for dim, (block, size) in enumerate(zip(blocks, stored.shape, strict=True)):
        if wide.shape[dim] > 1 and block > 1:
            wide = wide.repeat_interleave(block, dim).narrow(dim, 0, size)
    return stored.float() * wide
