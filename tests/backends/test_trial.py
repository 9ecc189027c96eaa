"""The trial of what a backend made: what counts as the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from turbocompile.backends import triton
from turbocompile.backends.trial import BOUND_32, Trial, difference, too_large

from turbocompile.errors import VerificationError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected", "size"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [NAN, 2.0], INF),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([NAN, 2.0], [INF, 2.0], INF),
        ([1e-3, 0.0], [0.0, 0.0], INF),
    ],
)
def test_the_difference_is_of_the_largest_value_and_infinite_where_only_one_is_finite(found, expected, size):
    assert difference(torch.tensor(found), torch.tensor(expected)) == size


def test_integers_shapes_and_dtypes_are_equal_or_infinitely_far():
    a = torch.tensor([1, 2])
    assert difference(a, a.clone()) == 0
    assert difference(a, a + 1) == difference(a, a[:1]) == difference(a, a.int()) == INF


def test_what_a_rounding_of_the_inputs_moves_is_allowed_and_no_more(case):
    """sin(1000 x) loses ten bits: a relative 2^-24 of x moves it by up to 1000 |x| 2^-24, some 1e-4 to 2e-4."""

    class Steep(nn.Module):
        def forward(self, x):
            return (3000 * x).sin()

    it = case(Steep(), (torch.randn(1000),))
    trial = Trial(it.program, it.weights)
    (expected,) = trial.expected
    trial.check([expected + 3 * BOUND_32], "a")
    with pytest.raises(VerificationError, match="a gives other numbers than its program: output 0"):
        trial.check([expected + 0.05], "a")
    calm = case(nn.Identity(), (torch.randn(1000),))
    trial = Trial(calm.program, calm.weights)
    with pytest.raises(VerificationError):
        trial.check([trial.expected[0] * (1 + 3 * BOUND_32)], "a")


def test_inputs_are_what_the_program_computes_with(case):
    table = nn.Embedding(1, 4).requires_grad_(False)
    it = case(table, (torch.zeros(3, dtype=torch.long),))
    trial = Trial(it.program, it.weights)
    assert trial.computes
    assert not trial.inputs[0].any()

    class Masked(nn.Module):
        def forward(self, x, mask):
            return x.masked_fill(~mask, -INF).softmax(-1)

    it = case(Masked(), (torch.randn(8, 8), torch.ones(8, 8, dtype=torch.bool)))
    mask = Trial(it.program, it.weights).inputs[1]
    assert mask.any(-1).all()
    assert not mask.all()


def test_a_forward_of_ordinary_size_is_tried(case):
    it = case(nn.Linear(8, 8).requires_grad_(False), (torch.randn(2, 8),))
    assert too_large(it.program) is None


def test_a_machine_without_memory_is_no_model_that_takes_no_integers(case, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no room")

    it = case(nn.Linear(8, 8).requires_grad_(False), (torch.randn(2, 8),))
    monkeypatch.setattr(triton, "compile_program", lambda *args: full)
    with pytest.raises(torch.OutOfMemoryError):
        Trial(it.program, it.weights)
