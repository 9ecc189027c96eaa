"""The inputs that rewrites are measured on: recorded calls, or random tensors that the captured graph can compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from turbocompile.errors import RecipeError, VerificationError
from turbocompile.ir.evaluate import Evaluator, TensorSource
from turbocompile.ir.program import SHELL, Program, is_op
from turbocompile.numerics.inputs import Inputs, random_inputs
from turbocompile.numerics.program_values import Weights
from turbocompile.numerics.recording import MAX_TOKENS, Recorded
from turbocompile.numerics.verifier import Verifier

VERIFY_TOKENS = MAX_TOKENS  # a larger call is verified at a smaller shape, or not at all


def max_tokens(program: Program) -> int:
    """The largest number of rows that a linear of the Program sees in one sample."""
    sizes = [1]
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            if is_op(node, torch.ops.aten.linear) and node.meta["val"].dim() > 2:
                sizes.append(node.meta["val"].shape[-2])
    return max(sizes)


def calibration_inputs(
    program: Program, source: TensorSource, recorded: Recorded | None, example: Sequence[torch.Tensor] = ()
) -> Inputs:
    """The inputs that the rewrites of a captured Program are measured on.

    example: a call's tensors in the order of the Program's inputs, whose masks and whole numbers are taken. Raises
    RecipeError where the recorded calls do not fit, or have more than VERIFY_TOKENS tokens.
    """
    if recorded is None:
        made = random_inputs(program, example=example)
        if all(t.is_floating_point() for t in made):
            return Inputs([made])
        # Next for an index of a table with one row, then for a mask that hides all keys of a token.
        others = [random_inputs(program, example=example, zeros=True), random_inputs(program)]
        return Inputs([next((t for t in (made, *others) if _computes(program, source, t)), made)])
    calls = recorded.tensors(program.signature)
    tokens = max_tokens(program)
    if tokens > VERIFY_TOKENS:
        raise RecipeError(
            f"{recorded.where}: the calls have {tokens} tokens, and a build measures on {VERIFY_TOKENS} at most; "
            "record them at a smaller size"
        )
    return Inputs(calls, recorded=True)


def _computes(program: Program, source: TensorSource, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the captured Program gives numbers for these tensors. Raises torch.OutOfMemoryError."""
    try:
        verifier = Verifier(program, Weights(Evaluator(source, program.constants)), inputs=list(tensors))
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError):  # torch raises both for an index out of range, on a CPU and elsewhere
        return False
    return all(bool(t.isfinite().all()) for t in verifier.outputs[SHELL])


@contextlib.contextmanager
def measuring(name: str, inputs: Inputs) -> Iterator[None]:
    """VerificationError in one sentence where the model `name` does not compute on the inputs of its measurement.

    torch.OutOfMemoryError passes through, because a machine that is too small is no fault of the inputs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise VerificationError(
            f"{name} cannot be computed on {inputs} to measure its rewrites ({reason}); give real ones "
            "(calibration), or build with verify: off"
        ) from error
