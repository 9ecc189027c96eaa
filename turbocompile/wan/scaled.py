"""Weights stored in 8 bits with a scale beside them: the numbers that they encode, or their data and scale as they are.

    w = stored * scale        stored: e4m3, e5m2 or int8

The scale of `a.weight` is `a.weight_scale`, `a.scale_weight`, `a.scale`, `a.weight_scale_inv` (which is multiplied by
as well, in spite of its name) or ModelOpt's `a.weight_quantizer._scale`: one number, one a row, or one a block of a
regular grid. TurboDiffusion calls the stored weight `a.int8_weight`; its `a.scale` is by tiles of 128 x 128. A float8
weight without a scale is a plain cast. What the checkpoint says of activations (`input_scale`) is not used, because an
engine takes the scale of activations from themselves.

ComfyUI says beside each weight (`comfy_quant`), in the header of the file (`_quantization_metadata`), or by an empty
tensor (`scaled_fp8`) that weights are scaled; where one of these says so, a weight without a scale is refused. Bytes
(uint8) that are described as float8 are float8. INT8 weights that are described as `convrot` were rotated before they
were quantized: w = (stored * scale) H in groups of columns; H is `regular_hadamard`, which is its own inverse.

A weight whose numbers a kernel reads as they are stored has that kernel's format (`Stored.format`):

    e4m3 with one scale, one a row, or none     fp8           a single scale is the same number in each row
    int8 with one scale or one a row            int8
    int8 with one scale a tile of 128 x 128     int8_block
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.wan.keys import PARTS, WHOLE_FILE, listed

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EIGHT_BIT = (*FLOAT8, torch.int8)
INT8_WEIGHT = "int8_weight"  # TurboDiffusion's name of a stored weight
WEIGHT_SCALES = ("weight_scale", "scale_weight", "scale", "weight_scale_inv", "weight_quantizer._scale")
# What says how activations were quantized, or repeats what a scale says.
ACTIVATION_SCALES = ("input_scale", "scale_input", "input_quantizer._amax", "weight_quantizer._amax")
MARKER = "scaled_fp8"  # ComfyUI's files have this empty tensor, whose dtype is the weights' (float32: e4m3)
DESCRIPTION = "comfy_quant"  # ComfyUI's later files: JSON as bytes, beside each weight
FORMATS = {  # descriptions of weights whose scales say all: the dtype that is stored
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fn_rowwise": torch.float8_e4m3fn,
    "float8_e4m3fn_blockwise": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
    "int8_blockwise": torch.int8,
}
# What a description says besides: how to multiply, what the scale's shape shows, what the weight was before.
SAID_BESIDES = ("full_precision_matrix_mult", "group_size", "block_size", "orig_dtype", "orig_shape")
METADATA = "_quantization_metadata"  # the same for all weights, as JSON in the header of the file
BLOCK = 128  # of scales by blocks that do not divide the weight


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores a quantized weight. words: for messages. format: the kernels' format that it has."""

    words: str
    format: str | None = None


class ScaledTensors:
    """The tensors of a source without the scales: each weight that has one is read as float32 stored * scale.

    stored: how the quantized weights are stored, by name. notes: sentences about what is not used.
    """

    def __init__(self, raw: TensorSource, where: str) -> None:
        """where: names the checkpoint in errors. Raises EngineError or UnsupportedError where a scale fits no weight,
        or a stored weight means nothing without one."""
        self._raw, self._where = raw, where
        names = set(raw.keys())
        self._keys = self._weights(names)
        self._bytes: dict[str, torch.dtype] = {}  # weights whose bytes are of another dtype than the file says
        self._groups: dict[str, int] = {}  # rotated weights, and how many columns are rotated together
        described, comments = self._described(names)
        self._scales = self._find(names)
        # a plain float8 weight, which has no scale, may say of its input what nobody uses
        paths = {_path(name) for name in self._keys if name in self._scales or self._dtype(name) in FLOAT8}
        unused = {f"{path}.{leaf}" for path in paths for leaf in ACTIVATION_SCALES} & names
        kinds = (*FLOAT8, torch.float32)
        markers = {name for name in names if name.rpartition(".")[2] == MARKER and raw.spec(name)[1] in kinds}
        consumed = {*self._scales.values(), *comments, *unused, *markers}
        self._keys = {name: key for name, key in self._keys.items() if key not in consumed}
        self._check_said(described, markers)
        self._check_stored()
        self.stored: Mapping[str, Stored] = {n: s for n in self._keys if (s := self._stored(n)) is not None}
        self.notes: tuple[str, ...] = ()
        if unused:
            self.notes = (
                f"{where}: {len(unused)} scales of activations (as {min(unused)}) are not used: an engine takes them "
                "from the activations themselves",
            )

    def _weights(self, names: set[str]) -> dict[str, str]:
        """The source's own names by ours, which for a weight of TurboDiffusion end in `weight`."""
        found: dict[str, str] = {}
        for name in self._raw.keys():  # noqa: SIM118 (no mapping)
            path, _, leaf = name.rpartition(".")
            ours = f"{path}.weight" if leaf == INT8_WEIGHT else name
            if ours in found or (ours != name and ours in names):
                raise EngineError(f"{self._where}: holds {ours} as a weight and as {INT8_WEIGHT}; keep one of them")
            found[ours] = name
        return found

    def _dtype(self, name: str) -> torch.dtype:
        return self._bytes.get(name) or self._raw.spec(self._keys[name])[1]

    def _find(self, names: set[str]) -> dict[str, str]:
        """The scale of each 8-bit weight, by the weight's name."""
        found: dict[str, str] = {}
        for name, key in self._keys.items():
            if name.rpartition(".")[2] != "weight" or self._dtype(name) not in EIGHT_BIT:
                continue
            scales = [s for s in (f"{_path(name)}.{leaf}" for leaf in WEIGHT_SCALES) if s in names]
            if len(scales) > 1:
                raise EngineError(
                    f"{self._where}: {name} has the scales {scales[0]} and {scales[1]}, and only one can be meant; "
                    "give the checkpoint that was not quantized"
                )
            if scales:
                found[name] = scales[0]
                sizes, _ = _grid(self._where, scales[0], self._raw.spec(scales[0]), self._raw.spec(key)[0])
                tiles = tuple(-(-size // BLOCK) for size in self._raw.spec(key)[0])
                if key.endswith(f".{INT8_WEIGHT}") and sizes != tiles:
                    raise EngineError(
                        f"{self._where}: {scales[0]} has the shape {list(sizes)}, and tiles of {BLOCK} x {BLOCK} of "
                        f"{key} are {list(tiles)}; download the checkpoint again"
                    )
        return found

    def _described(self, names: set[str]) -> tuple[set[str], set[str]]:
        """The weights that ComfyUI's descriptions say to be quantized, and the tensors that hold descriptions.

        Raises UnsupportedError for a description of more than a scale.
        """
        comments = {name for name in names if name.rpartition(".")[2] == DESCRIPTION}
        said: dict[str, Any] = {_path(name): (name, self._raw.get(name)) for name in comments}
        text = getattr(self._raw, "metadata", {}).get(METADATA)
        if text is not None:
            try:
                layers = json.loads(text)["layers"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise EngineError(f"{self._where}: {METADATA} in the header is no list of layers ({e!r})") from e
            held = {path: self._held(path) for path, _ in layers if not PARTS.match(path)}
            said = {**{held[p]: (f"{METADATA} of {p}", layer) for p, layer in layers if p in held}, **said}
        for path, (name, value) in said.items():
            dtype, group = self._description(name, value)
            weight = f"{path}.weight"
            if weight not in self._keys:
                raise EngineError(f"{self._where}: {name} describes {weight}, which the file does not hold")
            if self._dtype(weight) == torch.uint8 and dtype in FLOAT8:
                self._bytes[weight] = dtype
            if group is not None:
                self._groups[weight] = group
                self._check_rotated(weight)
        return {f"{path}.weight" for path in said}, comments

    def _held(self, path: str) -> str:
        """The path of a layer as the file has it, because some headers leave the prefix out."""
        prefixes = ("", WHOLE_FILE, WHOLE_FILE.removeprefix("model."))
        return next((p + path for p in prefixes if f"{p}{path}.weight" in self._keys), path)

    def _check_rotated(self, name: str) -> None:
        shape, group = self._raw.spec(self._keys[name])[0], self._groups[name]
        power = group > 1 and group & (group - 1) == 0 and group.bit_length() % 2 == 1  # of four
        if not power or len(shape) != 2 or shape[1] % group:
            raise EngineError(
                f"{self._where}: {name} of the shape {list(shape)} is said to be rotated in groups of {group} columns, "
                "which must be a power of four that divides them; download the checkpoint again"
            )

    def _description(self, name: str, value: Any) -> tuple[torch.dtype, int | None]:
        """The dtype of a described weight, and the columns that were rotated together, if it is rotated.

        Raises EngineError or UnsupportedError.
        """
        try:
            text = bytes(value.flatten().tolist()) if isinstance(value, torch.Tensor) else json.dumps(value)
            values = json.loads(text)
            kind = values.pop("format")
            rotated, group = values.pop("convrot", False), int(values.pop("convrot_groupsize", None) or 256)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise EngineError(f"{self._where}: {name} describes no weight ({e!r}); download it again") from e
        extra = [key for key, said in values.items() if key not in SAID_BESIDES and said not in (None, False)]
        if rotated and kind != "int8_tensorwise":
            extra.append("convrot")
        if extra or kind not in FORMATS:
            raise UnsupportedError(
                f"{self._where}: {name} says that the weight is stored as {kind}"
                f"{' with ' + ', '.join(extra) if extra else ''}, which turbocompile does not read; "
                "give the checkpoint that was not quantized"
            )
        return FORMATS[kind], group if rotated else None

    def _check_said(self, described: set[str], markers: set[str]) -> None:
        """Raises EngineError where the file says that its 8-bit weights are scaled, and the scales are missing."""
        weights = set(described)
        if markers and not self._scales:
            weights |= {name for name in self._keys if name.rpartition(".")[2] == "weight"}
        lost = [n for n in weights & self._keys.keys() if n not in self._scales and self._dtype(n) in EIGHT_BIT]
        if lost:
            said = f" ({min(markers)})" if markers else ""
            raise EngineError(
                f"{self._where}: {listed(lost)} is said to be scaled{said} and has no scale beside it; get the whole "
                "file again, or give the checkpoint that was not quantized"
            )

    def _check_stored(self) -> None:
        """Raises EngineError for integers without a scale, and for float8 weights without a scale among scaled ones."""
        scaled = {self._dtype(name) for name in self._scales}
        lost = []
        for name in self._keys:
            dtype = self._dtype(name)
            if name in self._scales or (name.rpartition(".")[2] != "weight" and dtype not in scaled):
                continue
            if not dtype.is_floating_point or dtype in scaled:
                lost.append(name)
        if lost:
            dtype = self._dtype(min(lost))
            others = " where other weights have one" if dtype in scaled else ""
            raise EngineError(
                f"{self._where}: {listed(self._keys[n] for n in lost)} is stored as "
                f"{str(dtype).removeprefix('torch.')} and has no scale beside it{others}; get the whole file again, or "
                "give the checkpoint that was not quantized"
            )

    def _stored(self, name: str) -> Stored | None:
        """How a weight is stored; None for one in floating point of 16 bits or more."""
        shape, dtype = self._raw.spec(self._keys[name])[0], self._dtype(name)
        given = getattr(self._raw, "stored", {}).get(self._keys[name])
        if given is not None or dtype not in EIGHT_BIT:
            return given
        words, scale = str(dtype).removeprefix("torch."), self._scales.get(name)
        if scale is None:
            return Stored(f"plain {words}", "fp8" if dtype == torch.float8_e4m3fn and len(shape) == 2 else None)
        sizes, blocks = _grid(self._where, scale, self._raw.spec(scale), shape)
        tiles = tuple(-(-size // BLOCK) for size in shape)
        whole, by_row = math.prod(sizes) == 1, sizes == (shape[0], *[1] * (len(shape) - 1))
        tiled = sizes == tiles and not (whole and not self._keys[name].endswith(f".{INT8_WEIGHT}"))
        kind = "one scale" if whole else "a scale a row" if by_row else f"a scale a block of {list(blocks)}"
        format = None
        if name in self._groups:
            kind += f", rotated in groups of {self._groups[name]}"
        elif len(shape) == 2 and dtype == torch.int8:
            format = "int8_block" if tiled else "int8" if whole or by_row else None
        elif len(shape) == 2 and dtype == torch.float8_e4m3fn:
            format = "fp8" if whole or by_row else None
        return Stored(f"{words} with {kind}", format)

    def key(self, name: str) -> str:
        """The source's own name of a tensor."""
        return self._keys[name]

    @property
    def converted(self) -> bool:
        """Whether any weight has a scale."""
        return bool(self._scales)

    def keys(self) -> Iterable[str]:
        return self._keys.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        shape = self._raw.spec(self._keys[name])[0]
        return shape, torch.float32 if name in self._scales else self._dtype(name)

    def get(self, name: str) -> torch.Tensor:
        stored, scale = self.data(name), self._scales.get(name)
        if scale is None:
            return stored
        values = dequantized(stored, self._scale(name), self._where, scale)
        return unrotated(values, self._groups[name]) if name in self._groups else values

    def _scale(self, name: str) -> torch.Tensor:
        values = self._raw.get(self._scales[name]).float()
        if not bool(values.isfinite().all()):
            scale = self._scales[name]
            raise EngineError(f"{self._where}: the scale {scale} is no finite number; download the checkpoint again")
        return values

    def data(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, without its scale."""
        stored = self._raw.get(self._keys[name])
        return stored.view(self._bytes[name]) if name in self._bytes else stored

    def scale(self, name: str) -> torch.Tensor:
        """The scale of a weight (N, K) that has a kernel's format, as the kernel reads it, in float32: (N, 1), or of
        int8_block (ceil(N/128), ceil(K/128)).
        """
        shape = self._raw.spec(self._keys[name])[0]
        if name not in self._scales:
            return torch.ones(shape[0], 1)
        scale = self._scale(name)
        if self.stored[name].format == "int8_block":
            return scale.reshape([-(-size // BLOCK) for size in shape])
        return scale.reshape(-1, 1).expand(shape[0], 1).contiguous()


@lru_cache
def regular_hadamard(size: int) -> torch.Tensor:
    """The symmetric orthogonal matrix (size, size) of ComfyUI's rotations, float32. size: a power of four."""
    core = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    made = core
    while made.shape[0] < size:
        made = torch.kron(made, core)
    return made


def unrotated(weight: torch.Tensor, group: int) -> torch.Tensor:
    """A float32 weight (N, K) before each `group` of its columns was multiplied by `regular_hadamard`."""
    return (weight.reshape(-1, group) @ regular_hadamard(group)).reshape(weight.shape)


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
