"""What the tests of the ops share: seeded tensors, and the checks that every op has to pass."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten
from turbocompile.kernels import DECOMPOSITIONS

from turbocompile import kernels


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


# --- Triton without a GPU: interpreted, or compiled for cards that are not here


@cache
def kernel_modules() -> tuple[ModuleType, ...]:
    """All modules of turbocompile.kernels but the one in Gluon, which the interpreter does not know."""
    names = [m.name for m in pkgutil.walk_packages(kernels.__path__, "turbocompile.kernels.")]
    return tuple(importlib.import_module(name) for name in names if not name.endswith("_gluon"))


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Kernels run in Triton's interpreter, on tensors of the CPU.

    Triton decides at the decoration of a function whether it is compiled or interpreted. So each compiled function, of
    our modules and of Triton's own, is replaced by an interpreted twin, and all is put back after the test.
    """
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    language = triton.language
    modules = [*kernel_modules(), *(m for name, m in sys.modules.items() if name.startswith("triton.language"))]
    # The interpreter replaces members of these two classes while it runs, and leaves some of the replacements behind.
    places = [*modules, language.tensor, language.core.tensor_descriptor_base]
    before = [(place, dict(vars(place))) for place in places]
    twins: dict[int, InterpretedFunction] = {}
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        for module in modules:
            for name, value in list(vars(module).items()):
                if type(value) is JITFunction:
                    setattr(module, name, twins.setdefault(id(value), InterpretedFunction(value.fn)))
        yield
    for place, members in before:
        added = [name for name in vars(place) if name not in members]
        for name in added if isinstance(place, type) else ():  # rewritten functions still need those of their modules
            delattr(place, name)
        for name, value in members.items():
            if vars(place)[name] is not value:
                setattr(place, name, value)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ]
)
def interpreted_or_cuda(request) -> str:
    """The device on which a test runs kernels: the CPU, in the interpreter, and the GPU."""
    if request.param == "cpu":
        request.getfixturevalue("interpreted")
    return request.param


KIB = 1024
CARDS = {  # by compute capability: multiprocessors, KiB of shared memory in each, KiB that a program may ask for
    80: (108, 164, 163),
    86: (84, 100, 99),
    89: (128, 100, 99),
    90: (132, 228, 227),
    100: (148, 228, 227),
    120: (170, 100, 99),
}


@dataclass(frozen=True)
class FakeCard:
    """A card that compiles the kernels that it is asked to launch, as Triton's driver."""

    capability: int
    launched: dict[str, Any]  # name and hash -> triton.compiler.CompiledKernel

    @property
    def largest_program(self) -> int:
        """Bytes of shared memory that a program may ask for."""
        return CARDS[self.capability][2] * KIB

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by the device's number

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def _item(t: torch.Tensor, index: Any) -> torch.Tensor:
    """t[index] of integers and slices by operators alone: torch without CUDA refuses the indexing of its tensors."""
    axis = 0
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, slice):
            start, stop, step = one.indices(t.shape[axis])
            assert step == 1
            t, axis = t.narrow(axis, start, stop - start), axis + 1
        elif one is None:
            t, axis = t.unsqueeze(axis), axis + 1
        else:
            t = t.select(axis, one)
    return t


@pytest.fixture
def fake_card(monkeypatch):
    """fake_card(90): within the test torch and Triton see a card of that capability; launches compile, and run nothing.

    Operands are FakeTensors on the device "cuda" (`with FakeTensorMode(): torch.empty(..., device="cuda")`).
    """
    pytest.importorskip("triton")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    from turbocompile.kernels import _registry

    compile_or_run = JITFunction.run

    def make(capability: int) -> FakeCard:
        card = FakeCard(capability, {})
        processors, shared, _ = CARDS[capability]
        properties = SimpleNamespace(
            name=f"sm{capability}", major=capability // 10, minor=capability % 10, multi_processor_count=processors,
            shared_memory_per_multiprocessor=shared * KIB,
        )  # fmt: skip

        def run(self, *args, grid, warmup, **options):
            kernel = compile_or_run(self, *args, grid=grid, warmup=True, **options)
            if kernel is not None:
                card.launched[f"{self.__name__} {kernel.hash[:12]}"] = kernel

        monkeypatch.setattr(driver, "_active", card)
        monkeypatch.setattr(JITFunction, "run", run)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: properties.name)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0)
        monkeypatch.setattr(FakeTensor, "__getitem__", _item)
        monkeypatch.setattr(FakeTensor, "__setitem__", lambda t, i, value: torch.ops.aten.copy_(_item(t, i), value))
        monkeypatch.setattr(
            FakeTensor, "contiguous",
            lambda t: t if t.is_contiguous() else t.clone(memory_format=torch.contiguous_format),
        )  # fmt: skip
        _registry.card.cache_clear()
        _registry.runs_triton.cache_clear()
        return card

    yield make
    _registry.card.cache_clear()
    _registry.runs_triton.cache_clear()
