"""The tensors of GGUF files, mapped into memory and dequantized one at a time when they are used.

A file lists the sizes of a tensor from the last axis to the first, so they are turned round here. In its metadata
`comfy.gguf.orig_shape.NAME` is the shape of a tensor that was folded so that its rows divide into blocks. Blocks
(Q8_0, Q4_K, ...) become float32, F16 and BF16 stay what they are. The package `gguf` reads and dequantizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.wan.scaled import Stored

MAGIC = b"GGUF"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WHOLE_NUMBERS = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}

Spec = tuple[tuple[int, ...], torch.dtype]


class GGUFTensors:
    """The tensors of a GGUF file, or of its parts. stored: how the quantized ones are stored, by name."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the headers. Raises EngineError for a damaged file, or a name that two files hold; UnsupportedError
        for blocks that the package does not know, or without the package."""
        self._tensors: dict[str, Any] = {}
        self._specs: dict[str, Spec] = {}
        self.stored: dict[str, Stored] = {}
        for path in files:
            reader = _reader(path)
            for tensor in reader.tensors:
                if tensor.name in self._tensors:
                    raise EngineError(f"{path}: the tensor {tensor.name} is in another file of the checkpoint too")
                self._tensors[tensor.name] = tensor
                self._specs[tensor.name] = _spec(path, reader, tensor)
                kind = tensor.tensor_type.name
                if kind not in _PLAIN and kind not in _WHOLE_NUMBERS:
                    self.stored[tensor.name] = Stored(kind)

    def keys(self) -> Iterable[str]:
        return self._specs.keys()

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def get(self, name: str) -> torch.Tensor:
        import numpy as np
        from gguf.quants import dequantize

        tensor, (shape, dtype) = self._tensors[name], self._specs[name]
        if name not in self.stored:
            values = np.array(tensor.data)  # a copy, because the map is read-only
            return torch.from_numpy(values).view(dtype).reshape(shape)
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)).reshape(shape)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UnsupportedError(
            f"{path}: this is a GGUF file, and the package that reads it is missing; pip install 'turbocompile[gguf]'"
        ) from None
    try:
        reader = GGUFReader(path)
        if reader.byte_order == "S":
            raise UnsupportedError(f"{path}: this GGUF file has the byte order of another machine; convert it first")
    except FileNotFoundError:
        raise EngineError(f"{path}: this part of the checkpoint is missing; download it again") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError) as e:
        raise EngineError(f"{path}: this is no whole GGUF file ({_reason(e)}); download it again") from e
    return reader


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _spec(path: Path, reader: Any, tensor: Any) -> Spec:
    """Shape and dtype of a tensor as it is read. Raises EngineError or UnsupportedError."""
    from gguf.quants import _type_traits

    kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape.tolist()))
    field = reader.get_field(ORIGINAL_SHAPE + tensor.name)
    if field is not None:
        given = field.contents()
        sizes = given if isinstance(given, list) else [given]
        if not all(isinstance(s, int) and s > 0 for s in sizes) or math.prod(sizes) != math.prod(shape):
            raise EngineError(
                f"{path}: {tensor.name} holds {list(shape)} numbers, and the metadata says that its shape was "
                f"{given!r}; download it again"
            )
        shape = tuple(sizes)
    if kind in _WHOLE_NUMBERS:
        return shape, _WHOLE_NUMBERS[kind]
    if kind not in _PLAIN and tensor.tensor_type not in _type_traits:
        raise UnsupportedError(
            f"{path}: {tensor.name} is stored as {kind}, which the package gguf does not dequantize; give a file of "
            "another quantization, as Q8_0 or Q4_K"
        )
    return shape, _PLAIN.get(kind, torch.float32)
