"""The figures of an error, also where the truth is no number."""

from __future__ import annotations

import math

import pytest
import torch

from turbocompile.numerics.errors import compare


def test_the_figures_of_an_error():
    truth = torch.tensor([3.0, -4.0])
    error = compare(torch.tensor([3.0, -3.0]), truth)
    assert error.rel_l1 == pytest.approx(1 / 7)
    assert error.max_abs == 1
    assert error.max_rel == pytest.approx(1 / 4)
    assert error.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert compare(torch.tensor([math.nan, 1.0]), truth).rel_l1 == math.inf
    assert compare(torch.zeros(2), torch.zeros(2)).rel_l1 == 0
    assert compare(torch.ones(2), torch.zeros(2)).rel_l1 == math.inf


def test_where_truth_is_no_number_the_same_must_stand():
    nan, inf = math.nan, math.inf
    truth = torch.tensor([1.0, nan, inf])
    assert compare(torch.tensor([1.0, nan, inf]), truth).max_rel == 0
    for found in ([1.0, 1.0, inf], [1.0, nan, -inf], [nan, nan, inf]):
        assert compare(torch.tensor(found), truth).max_rel == inf
