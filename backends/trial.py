"""One forward of a file that a backend made, compared with the Program's own forward.

A file that builds may still not run, or may give other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from turbocompile.backends import triton

from turbocompile.errors import VerificationError
from turbocompile.ir.cost import arguments, cost
from turbocompile.ir.program import Program, is_op
from turbocompile.numerics.inputs import random_inputs

CPU = torch.device("cpu")
Run = Callable[..., tuple[torch.Tensor, ...]]

# Some 50 operators in a row add up to 256 numbers each in another order: sqrt(256) * 2^-23 = 2e-6 for each operator.
# float64 is no better, because ONNX holds constants and norms in float32. An operator in 16 bits rounds its result, and
# some 256 roundings add up to sqrt(256) of them. An ill-conditioned model may be off by more: see `_sensitivity`.
BOUND_32 = 1e-4
ROUNDINGS_16 = 16
SENSITIVE = 16  # operators whose rounding moves the result as far as a rounding of the inputs does

MOST_FLOPS = 1e12  # 10 to 20 seconds on two cores; a trial runs two or three forwards
MOST_SCORES = 1 << 30  # bytes of an attention's scores in float32: onnxruntime holds them all on a CPU


def too_large(program: Program) -> str | None:
    """The reason why a forward is too large for a trial on a CPU; None where it is not."""
    flops = cost(program).flops
    if flops > MOST_FLOPS:
        return f"a forward of {flops / 1e12:.1f} TFLOP takes a CPU too long"
    scores = max((_scores(program, name) for name in program.graphs), default=0)
    if scores > MOST_SCORES:
        return f"the scores of an attention take {scores / (1 << 30):.1f} GiB"
    return None


def _scores(program: Program, graph: str) -> int:
    """Bytes of the largest attention's scores in a graph."""
    found = 0
    for node in program.graphs[graph].graph.nodes:
        if is_op(node, torch.ops.aten.scaled_dot_product_attention.default):
            a = arguments(node)
            found = max(found, 4 * a["query"].shape[:-1].numel() * a["key"].shape[-2])
    return found


class Trial:
    """A Program's inputs and results on the CPU, to compare a file with that was made of the Program.

    weights: stored name -> tensor. Inputs are random; booleans are mixed and integers are ones, where the Program takes
    such inputs. computes: whether the Program takes any of the inputs tried, because integers may be indices of an
    unknown range.
    """

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor]) -> None:
        self.run: Run = triton.compile_program(program, {k: v.cpu() for k, v in weights.items()}, CPU)
        self.inputs: list[torch.Tensor] = []
        self.expected: tuple[torch.Tensor, ...] | None = None
        for inputs in _candidates(program):
            try:
                results = self.run(*inputs)
            except (IndexError, RuntimeError):  # torch raises one of them for an index out of range
                continue
            if self.expected is None or all(bool(t.isfinite().all()) for t in results):
                self.inputs, self.expected = inputs, results
            if all(bool(t.isfinite().all()) for t in results):
                break

    @property
    def computes(self) -> bool:
        return self.expected is not None

    def check(self, found: Sequence[torch.Tensor], what: str) -> None:
        """Raises VerificationError where results differ from the Program's by more than rounding does."""
        assert self.expected is not None
        moved: list[float] | None = None
        for i, (a, b) in enumerate(zip(found, self.expected, strict=True)):
            error, bound = difference(a, b), _bound(b.dtype)
            if error > bound:
                moved = moved or self._sensitivity()
                bound = max(bound, SENSITIVE * moved[i])
            if error > bound:
                raise VerificationError(
                    f"{what} gives other numbers than its program: output {i} differs by {error:.1e} of its size, and "
                    f"rounding explains {bound:.1e}; use backend: triton, and report it"
                )

    def _sensitivity(self) -> list[float]:
        """How far a rounding of the inputs moves each result: the sine of a time of 1,000 is off by 6e-5 in float32."""
        generator = torch.Generator().manual_seed(1)
        nudged = [
            t * (1 + torch.finfo(t.dtype).eps * torch.randn(t.shape, generator=generator)).to(t.dtype)
            if t.is_floating_point() else t
            for t in self.inputs
        ]  # fmt: skip
        assert self.expected is not None
        moved = [difference(a, b) for a, b in zip(self.run(*nudged), self.expected, strict=True)]
        return [
            m if m < 0.1 else 0.0 for m in moved
        ]  # a model that a rounding changes altogether explains no difference


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference of two tensors, relative to the size of the expected one.

    Size and difference are the largest absolute values in 32 bits or more, and sums of absolute values in 16 bits. The
    difference is infinite where one tensor has a NaN or an infinity that the other lacks.
    """
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    a, b = found.double().flatten(), expected.double().flatten()
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not bool(a[finite].isfinite().all()):
        return float("inf")
    gap, size = (a[finite] - b[finite]).abs(), b[finite].abs()
    if not bool(gap.any()):
        return 0.0
    over, under = (gap.sum(), size.sum()) if expected.dtype.itemsize <= 2 else (gap.max(), size.max())
    return float(over / under)


def _bound(dtype: torch.dtype) -> float:
    if not dtype.is_floating_point:
        return 0.0
    return ROUNDINGS_16 * torch.finfo(dtype).eps if dtype.itemsize <= 2 else BOUND_32


def _candidates(program: Program) -> list[list[torch.Tensor]]:
    """Inputs to try in turn: with mixed booleans, of which the first is True; with ones; with zeros for whole numbers,
    which are indices of a table with one row.
    """
    ones = random_inputs(program)
    generator = torch.Generator().manual_seed(2)

    def mixed(t: torch.Tensor) -> torch.Tensor:
        if t.dtype != torch.bool or not t.dim():
            return t
        made = torch.rand(t.shape, generator=generator) < 0.7
        made[..., :1] = True
        return made

    zeros = [t if t.is_floating_point() else torch.zeros_like(t) for t in ones]
    return [[mixed(t) for t in ones], ones, zeros]
