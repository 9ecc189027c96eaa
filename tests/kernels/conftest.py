"""What the tests of the ops share: seeded tensors, and the checks that every op has to pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten
from turbocompile.kernels import DECOMPOSITIONS


@pytest.fixture(scope="session")
def unit() -> dict[torch.dtype, float]:
    """The unit roundoff: one rounding to nearest is off by at most this, relatively."""
    return {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="session")
def randn() -> Callable[[int], Callable[..., torch.Tensor]]:
    """randn(seed)(2, 3, ..., dtype=float32): N(0, 1), another tensor at each call."""

    def seeded(seed: int) -> Callable[..., torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return make

    return seeded


@pytest.fixture
def normal(randn) -> Callable[..., torch.Tensor]:
    return randn(0)


@pytest.fixture(scope="session")
def sound() -> Callable[..., None]:
    """sound(overload, *args): torch's opcheck (schema, fake, autograd registration, AOT), and no input is written."""

    def check(overload: torch._ops.OpOverload, *args: Any) -> None:
        tensors = [t for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor)]
        checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if any(t.dtype == torch.float8_e4m3fn for t in tensors):
            checks.remove("test_schema")  # it multiplies its inputs, and torch has no product of float8
        torch.library.opcheck(overload, args, test_utils=checks)
        before = [t.clone() for t in tensors]
        overload(*args)
        for old, new in zip(before, tensors, strict=True):
            assert torch.equal(old, new)

    return check


@pytest.fixture(scope="session")
def decomposed() -> Callable[..., Any]:
    """decomposed(overload, *args): what the op's decomposition gives, traced to aten first, as an exporter does."""

    def run(overload: torch._ops.OpOverload, *args: Any) -> Any:
        traced = make_fx(lambda *a: DECOMPOSITIONS[overload](*a), tracing_mode="fake")(*args)
        targets = [n.target for n in traced.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        assert targets
        assert all(t.namespace in ("aten", "prims") and not t._schema.is_mutable for t in targets)
        return traced(*args)

    return run


@pytest.fixture(scope="session")
def same() -> Callable[[Sequence[Any] | torch.Tensor, Sequence[Any] | torch.Tensor], None]:
    """same(a, b): equal dtypes, shapes and bits."""

    def compare(a: Any, b: Any) -> None:
        for x, y in zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)

    return compare


@pytest.fixture
def interpret():
    """A function that runs a file's tests in a process where Triton interprets: it decides that at its import."""

    def run(file: str) -> None:
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
        assert re.search(r"[1-9]\d* passed", done.stdout), "no test ran in the interpreter"

    return run
