"""Registration of ops and of their kernels, checks of their arguments, and predicates on devices.

This module needs torch alone, because an op's file imports it on machines without Triton, too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from turbocompile.errors import UnsupportedError

NAMESPACE = "turbocompile"
TRITON, FP8 = (8, 0), (8, 9)  # the lowest compute capabilities on which Triton kernels run, and kernels that use e4m3
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the dtypes of activations that the kernels over rows take
WIDEST = 32768  # the most channels of a row that a program can hold in its registers
GRID = 65535  # the most programs along a grid's second axis, which counts batch items or tiles of 128 rows
# An option of every launch: the compiler may fuse a product and a sum into one instruction. Triton 3.9 warns if a
# launch does not set the option, and Triton 3.10 then compiles two instructions.
FUSED = {"enable_fp_fusion": True}

ON_CUDA: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""The implementation of each op on CUDA, by the op's overload."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op computes on tensors of `dtype`: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` is true."""
    if not condition:
        raise ValueError(message)


def choose(kind: str, name: str, *names: str) -> None:
    """Raises ValueError unless `name` is one of `names`. kind: the noun for the message."""
    check(name in names, f"{kind} is {name!r}; it must be one of {', '.join(names)}")


def check_channels(x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """Raises ValueError unless each vector that is not None has C elements, one for each channel of x (..., C)."""
    for name, vector in vectors.items():
        fits = vector is None or (vector.ndim == 1 and vector.shape[0] == x.shape[-1])
        check(fits, f"the {name} is not a vector over the {x.shape[-1]} channels of the activation")


def check_broadcast(x: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless each tensor that is not None broadcasts to x's shape."""
    for name, t in tensors.items():
        fits = t is None or (
            t.ndim <= x.ndim and all(n in (1, m) for n, m in zip(t.shape[::-1], x.shape[::-1], strict=False))
        )
        check(fits, f"the {name} does not broadcast to the activation's shape {list(x.shape)}")


def register(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> torch._ops.OpOverload:
    """Defines the op turbocompile::<name> and returns its overload.

    reference: the implementation on every device that has no kernel of its own.
    fake: gives shapes and dtypes alone, and refuses the same arguments as the reference.
    backward, setup_context: as torch.library.register_autograd takes them. Without them a backward pass through the op
        raises UnsupportedError, because a user would notice a missing or wrong gradient much later.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default")(reference)
    torch.library.register_fake(qualified)(fake)
    torch.library.register_autograd(qualified, backward or _no_backward(name), setup_context=setup_context)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_kernel(
    overload: torch._ops.OpOverload, reference: Callable[..., Any], takes: Callable[..., bool], launch: str
) -> Callable[..., Any]:
    """Makes a kernel the op's implementation on CUDA for the arguments that takes(*args) accepts.

    The reference computes all other arguments.

    launch: "family.file.function" of this package, which takes the op's arguments. It is imported at the first call,
    because a machine without a GPU may lack Triton.
    Returns the implementation, whose keyword arguments (a configuration) go to launch.
    """
    module, function = launch.rsplit(".", 1)

    def on_cuda(*args: Any, **options: Any) -> Any:
        if not takes(*args):
            return reference(*args)
        with torch.cuda.device(args[0].device):
            return getattr(importlib.import_module(f"turbocompile.kernels.{module}"), function)(*args, **options)

    register_on_cuda(overload, on_cuda)
    return on_cuda


def register_on_cuda(overload: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Makes `function` the op's implementation on CUDA; `function` itself chooses between kernels and reference."""
    torch.library.impl(overload.name(), "cuda")(function)
    ON_CUDA[overload] = function


@dataclass(frozen=True)
class Card:
    """The properties of a GPU on which the kernels' configurations depend."""

    capability: tuple[int, int]
    processors: int  # how many multiprocessors the GPU has
    shared: int  # bytes of shared memory of a multiprocessor


@functools.cache
def card(device: torch.device) -> Card:
    """The properties of a GPU. For the CPU, where Triton's interpreter runs, those of a small Hopper card."""
    if device.type != "cuda":
        return Card((9, 0), 2, 228 << 10)
    found = torch.cuda.get_device_properties(device)
    return Card((found.major, found.minor), found.multi_processor_count, found.shared_memory_per_multiprocessor)


@functools.cache
def runs_triton(device: torch.device, capability: tuple[int, int] = TRITON) -> bool:
    """Whether Triton is installed and the device is a GPU of at least this compute capability."""
    found = importlib.util.find_spec("triton") is not None
    return found and device.type == "cuda" and card(device).capability >= capability


def takes_rows(x: torch.Tensor, *others: Any) -> bool:
    """Whether the kernels over rows compute an op of x (..., C) and its other arguments, one of which may be a format.

    The kernels take x in bf16, fp16 or float32, with 1 to 32,768 channels and no empty axis. All tensors must be on one
    GPU, and the format "fp8" needs a GPU with e4m3.
    """
    leaves = tree_flatten(others)[0]
    fp8 = any(isinstance(leaf, str) and leaf == "fp8" for leaf in leaves)
    return (
        x.dtype in ROW_DTYPES
        and x.numel() > 0
        and x.ndim > 0
        and x.shape[-1] <= WIDEST
        and x.shape[:-2].numel() <= GRID
        and x.shape[:-1].numel() <= 128 * GRID
        and all(leaf.device == x.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        and runs_triton(x.device, FP8 if fp8 else TRITON)
    )


def _no_backward(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise UnsupportedError(
            f"{NAMESPACE}::{name} has no gradient; train the model before it is optimized, or use torch.no_grad()"
        )

    return backward
