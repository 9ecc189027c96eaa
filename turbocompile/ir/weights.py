"""Weights as expressions over checkpoint tensors.

Passes never touch tensor values: a weight in a graph is an expression whose leaves are named tensors of a checkpoint.
`evaluate` computes one expression from a `TensorSource`; `emit` walks all of them, tensor by tensor, and writes
safetensors shards in bounded memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from turbocompile.capture.module_weights import DATA, SCALE, named_tensors, quantized
from turbocompile.errors import EngineError
from turbocompile.kernels.quantize.quantize import BLOCK, FORMATS, dequantize, quantize

ALIGNMENT = 64  # bytes: a cache line, and what matrix libraries align to
SHARD_BYTES = 1 << 30  # one shard is in memory while it is made
RELATIVE = "."  # the name of a Load or a Constant that starts with it is relative to the prefix of the call


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


class TensorSource(Protocol):
    """Named tensors, read one at a time: a checkpoint, a module's state, or synthetic weights."""

    def keys(self) -> Iterable[str]:
        """The names."""

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it; KeyError where there is none."""

    def get(self, name: str) -> torch.Tensor:
        """The values, on the CPU."""


class Expr:
    """One weight. Subclasses are frozen dataclasses with a `shape` and a `dtype`.

    A shape is computed once: one that asks its part for each axis would take time exponential in the depth.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def parts(self) -> tuple[Expr, ...]:
        """The expressions that this one reads."""
        return ()


@dataclass(frozen=True)
class Load(Expr):
    """A tensor of the checkpoint, cast to `dtype`; a name that starts with "." is relative to the call's prefix."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Constant(Expr):
    """A tensor that is in no checkpoint (a non-persistent buffer), stored with the program under `key`.

    A key that starts with "." is relative to the call's prefix: each layer has a value of its own.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Zeros(Expr):
    """Zeros: what a pass adds and the checkpoint lacks (SLA's untuned proj_l)."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Reshape(Expr):
    of: Expr
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Cast(Expr):
    of: Expr
    dtype: torch.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Permute(Expr):
    of: Expr
    dims: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.of.shape[d] for d in self.dims)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Slice(Expr):
    """`of` from start to stop along dim; 0 <= start < stop <= size."""

    of: Expr
    dim: int
    start: int
    stop: int

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        s = list(self.of.shape)
        s[self.dim] = self.stop - self.start
        return tuple(s)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Cat(Expr):
    of: tuple[Expr, ...]
    dim: int

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        s = list(self.of[0].shape)
        s[self.dim] = sum(e.shape[self.dim] for e in self.of)
        return tuple(s)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of[0].dtype

    def parts(self) -> tuple[Expr, ...]:
        return self.of


@dataclass(frozen=True)
class Mul(Expr):
    """`of * by`, computed in float32, in the dtype of `of`."""

    of: Expr
    by: Expr | float

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.by) if isinstance(self.by, Expr) else (self.of,)


@dataclass(frozen=True)
class AddLora(Expr):
    """`of + scale * b @ a`: of (out, in), a (rank, in), b (out, rank); computed in float32, of float64 in float64."""

    of: Expr
    a: Expr
    b: Expr
    scale: float

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.a, self.b)


@dataclass(frozen=True)
class Dequantize(Expr):
    """The floating weight that quantized data and scale of a checkpoint stand for."""

    data: Expr
    scale: Expr
    format: str
    dtype: torch.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.data.shape

    def parts(self) -> tuple[Expr, ...]:
        return (self.data, self.scale)


@dataclass(frozen=True)
class Quantize(Expr):
    """One part, "data" or "scale", of a quantized (out, in) weight: "int8" and "fp8" per row, "int8_block" by tiles."""

    of: Expr
    format: str
    part: str

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        n, k = self.of.shape
        if self.part == "data":
            return (n, k)
        return (-(-n // BLOCK), -(-k // BLOCK)) if self.format == "int8_block" else (n, 1)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return FORMATS[self.format] if self.part == "data" else torch.float32

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


def leaves(expr: Expr) -> list[Expr]:
    """The Load, Constant and Zeros leaves, in order."""
    parts = expr.parts()
    return [expr] if not parts else [leaf for part in parts for leaf in leaves(part)]


def stacked(expr: Expr) -> list[Load]:
    """The checkpoint tensors whose rows a weight holds, one after the other; empty where it holds anything else.

    A quantized, cast or scaled weight holds the rows of what it is made of, and so does one that a LoRA was added to.
    """
    match expr:
        case Load():
            return [expr]
        case Cast() | AddLora() | Quantize():
            return stacked(expr.of)
        case Mul():  # by a number; with vectors it is another function that the rows are of
            return stacked(expr.of) if not isinstance(expr.by, Expr) else []
        case Dequantize():
            return stacked(expr.data)
        case Cat(dim=0):
            parts = [stacked(part) for part in expr.of]
            return [load for part in parts for load in part] if all(parts) else []
    return []


def is_adapted(expr: Expr) -> bool:
    """Whether adapters were added to a weight, or to a part of it."""
    return isinstance(expr, AddLora) or any(map(is_adapted, expr.parts()))


def full_name(name: str, prefix: str) -> str:
    """The name of a Load, or the key of a Constant, as a call with this prefix reads it."""
    return prefix + name.removeprefix(RELATIVE) if name.startswith(RELATIVE) else name


def is_relative(expr: Expr) -> bool:
    """Whether the expression differs from call to call, because a leaf is relative to the prefix."""
    names = [leaf.name if isinstance(leaf, Load) else getattr(leaf, "key", "") for leaf in leaves(expr)]
    return any(name.startswith(RELATIVE) for name in names)


def absolute(expr: Expr, prefix: str) -> Expr:
    """The same with full names, as a call with this prefix reads it."""
    if isinstance(expr, Load):
        return replace(expr, name=full_name(expr.name, prefix))
    if isinstance(expr, Constant):
        return replace(expr, key=full_name(expr.key, prefix))
    values = {f.name: getattr(expr, f.name) for f in fields(expr)}  # type: ignore[arg-type]
    changed = {
        name: absolute(v, prefix) if isinstance(v, Expr) else tuple(absolute(e, prefix) for e in v)
        for name, v in values.items()
        if isinstance(v, Expr) or (isinstance(v, tuple) and v and all(isinstance(e, Expr) for e in v))
    }
    return replace(expr, **changed) if changed else expr  # type: ignore[type-var]


def nbytes(expr: Expr) -> int:
    """Bytes of the emitted tensor."""
    return torch.Size(expr.shape).numel() * expr.dtype.itemsize


def emitted_name(graph_is_shell: bool, graph: str, local: str, expr: Expr, prefix: str) -> str:
    """The name under which a weight is stored: prefix + local name; shared by all calls where no leaf is relative."""
    if isinstance(expr, Constant):
        return f"constants.{full_name(expr.key, prefix)}"
    if graph_is_shell or is_relative(expr):
        return prefix + local
    return expr.name if isinstance(expr, Load) else f"shared.{graph}.{local}"


@dataclass(frozen=True)
class Emission:
    """One tensor to write: its expression, and the prefix that relative names take."""

    expr: Expr
    prefix: str


class Evaluator:
    """Computes expressions from a source. Values are read and freed one at a time.

    The operand of the last quantization is kept, because its data and its scale are asked for one after the other.
    """

    def __init__(self, source: TensorSource, constants: Mapping[str, torch.Tensor]) -> None:
        self.source = source
        self.constants = constants
        self._last: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, expr: Expr, prefix: str = "") -> torch.Tensor:
        """The values of `expr`, on the CPU, contiguous. Raises EngineError where the source differs from the graph."""
        value = self._value(expr, prefix)
        if tuple(value.shape) != expr.shape or value.dtype != expr.dtype:
            raise EngineError(
                f"a weight is {list(value.shape)} {value.dtype} where the graph expects {list(expr.shape)} "
                f"{expr.dtype}; the checkpoint is of another model"
            )
        return value.resolve_conj().contiguous()

    def _value(self, expr: Expr, prefix: str) -> torch.Tensor:
        def of(e: Expr) -> torch.Tensor:
            return self._value(e, prefix)

        match expr:
            case Load():
                return self._load(expr, prefix)
            case Constant():
                return self.constants[full_name(expr.key, prefix)]
            case Zeros():
                return torch.zeros(expr.shape, dtype=expr.dtype)
            case Reshape():
                return of(expr.of).reshape(expr.shape)
            case Cast():
                return of(expr.of).to(expr.dtype)
            case Permute():
                return of(expr.of).permute(expr.dims)
            case Slice():
                return of(expr.of).narrow(expr.dim, expr.start, expr.stop - expr.start)
            case Cat():
                return torch.cat([of(e) for e in expr.of], expr.dim)
            case Mul():
                value = of(expr.of)
                by = of(expr.by).float() if isinstance(expr.by, Expr) else expr.by
                return (value.float() * by).to(value.dtype)
            case AddLora():
                value = of(expr.of)
                wide = torch.promote_types(value.dtype, torch.float32)
                return (value.to(wide) + expr.scale * (of(expr.b).to(wide) @ of(expr.a).to(wide))).to(value.dtype)
            case Dequantize():
                return dequantize(of(expr.data), of(expr.scale), expr.format, expr.dtype)
            case Quantize():
                return self._quantize(expr, prefix)
        raise EngineError(f"a weight is a {type(expr).__name__}, which is no weight expression")

    def _load(self, expr: Load, prefix: str) -> torch.Tensor:
        name = full_name(expr.name, prefix)
        try:
            value = self.source.get(name)
        except KeyError:
            raise EngineError(f"the checkpoint has no tensor {name!r}; it is of another model, or incomplete") from None
        if tuple(value.shape) != expr.shape:
            raise EngineError(
                f"the checkpoint's {name!r} has shape {list(value.shape)}, and the model's {list(expr.shape)}; "
                "it is of another model"
            )
        return value.to(expr.dtype)

    def _quantize(self, expr: Quantize, prefix: str) -> torch.Tensor:
        key = (expr.of, expr.format, prefix)
        if self._last is None or self._last[0] != key:
            data, scale = quantize(self._value(expr.of, prefix), expr.format)
            self._last = (key, data, scale)
        return self._last[1] if expr.part == "data" else self._last[2]


@dataclass(frozen=True)
class WithVectors:
    """A source and tensors that a build made beside it (the scales of smoothed linears), by their full names."""

    source: TensorSource
    vectors: Mapping[str, torch.Tensor]

    def keys(self) -> Iterable[str]:
        return [*self.source.keys(), *self.vectors]

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        found = self.vectors.get(name)
        return self.source.spec(name) if found is None else (tuple(found.shape), found.dtype)

    def get(self, name: str) -> torch.Tensor:
        return self.vectors[name] if name in self.vectors else self.source.get(name)


class ModuleTensors:
    """A module's parameters and buffers as a TensorSource; what torchao quantized, as its data and its scale.

    device: where values are given; the CPU where nothing is said.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._state: dict[str, torch.Tensor] = {}
        self._places: set[int] | None = None
        for name, tensor, saved in named_tensors(module):
            parts = quantized(name, tensor) if saved else None
            if saved:
                self._state |= {name: tensor} if parts is None else {name + DATA: parts.data, name + SCALE: parts.scale}

    def keys(self) -> Iterable[str]:
        return self._state.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._state[name].shape), self._state[name].dtype

    def get(self, name: str) -> torch.Tensor:
        tensor = self._state[name].detach()
        if tensor.device.type == "meta":
            raise EngineError(
                f"the parameter {name!r} is on the meta device, so it has no values; load the weights first"
            )
        return tensor.to(self._device)

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether a value is the module's own memory, which what is done to the module would change."""
        if self._places is None:
            self._places = {t.untyped_storage().data_ptr() for t in self._state.values() if t.device.type == "cpu"}
        return tensor.untyped_storage().data_ptr() in self._places


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that starts as far from a multiple of 64 bytes as the tensor does.

    CPU matrix products take other paths for other alignments: a copy elsewhere gives other sums, by an ulp.
    """
    offset = tensor.data_ptr() % ALIGNMENT
    if not offset or not tensor.is_contiguous() or tensor.is_complex():
        return tensor.clone()
    room = torch.empty(tensor.nbytes + ALIGNMENT, dtype=torch.uint8)
    start = (offset - room.data_ptr()) % ALIGNMENT
    made = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return made.copy_(tensor)


def write_shards(
    plan: Mapping[str, Emission],
    evaluate: Evaluator,
    folder: Path,
    stem: str,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Evaluates the plan tensor by tensor and writes `stem-00001.safetensors`, ...; the file names, in order.

    At most one shard and one tensor's operands are in memory. progress(done, total) is called with bytes.
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

    The library's own writer aligns to 8. CPU matrix products take other paths for other alignments: a mapped engine
    then differed from its source model by an ulp (1e-6 of the values). Tensors of odd sizes stand last, so that no gap
    is needed, which the format does not allow.
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
