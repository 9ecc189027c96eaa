"""The tensors of an engine's shards: how they are read, and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import unset_fake_temporarily

from turbocompile.errors import EngineError
from turbocompile.files import inside


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = (t.detach().to(b.device).contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Makes tensors inside real tensors on the CPU, whatever the caller set.

    A default device, a FakeTensorMode or inference mode around `load` would make weights without values, or weights
    that nobody can write to.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        yield


def read_weights(root: Path, shards: Sequence[str]) -> dict[str, torch.Tensor]:
    """All tensors of the shards, mapped into memory. Raises EngineError for a file that is no safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        try:
            with safe_open(inside(root, shard), framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118 (not a dictionary)
                    tensors[key] = file.get_tensor(key)
        except SafetensorError as error:
            raise EngineError(f"the engine's {shard} is no safetensors file ({error}); copy it again") from error
    return tensors
