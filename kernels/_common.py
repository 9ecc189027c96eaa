"""What the ops share: registration, the dtype they compute in, checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from turbocompile.errors import UnsupportedError

NAMESPACE = "turbocompile"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op on `dtype` computes: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def choose(kind: str, name: str, *names: str) -> None:
    """ValueError unless `name` is one of `names`."""
    check(name in names, f"{kind} is {name!r}; it must be one of {', '.join(names)}")


def check_channels(x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """ValueError unless each vector that is given has one element a channel of x (..., C)."""
    for name, vector in vectors.items():
        fits = vector is None or (vector.ndim == 1 and vector.shape[0] == x.shape[-1])
        check(fits, f"the {name} is not a vector over the {x.shape[-1]} channels of the activation")


def check_broadcast(x: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """ValueError unless each tensor that is given broadcasts to x's shape."""
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
    """Defines turbocompile::<name> and returns its overload.

    reference: runs on every device that has no kernel of its own.
    fake: shapes and dtypes alone; refuses what the reference refuses.
    backward, setup_context: as torch.library.register_autograd takes them. Without them a gradient that reaches the
        op raises UnsupportedError: silently wrong or missing gradients are worse.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default")(reference)
    torch.library.register_fake(qualified)(fake)
    torch.library.register_autograd(qualified, backward or _no_backward(name), setup_context=setup_context)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _no_backward(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise UnsupportedError(
            f"{NAMESPACE}::{name} has no gradient; train the model before it is optimized, or use torch.no_grad()"
        )

    return backward
