"""Words set by address, under the interpreter and on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
either = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in a process that interprets Triton")),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            pytest.mark.skipif(INTERPRETED, reason="the interpreter writes to the host's memory alone"),
        ],
    ),
]


@pytest.mark.skipif(INTERPRETED, reason="starts the process that interprets Triton")
def test_the_kernel_interpreted(interpret):
    interpret(__file__)


@pytest.mark.parametrize("count", [1, 3, 4, 1021, 1024, 2500])
@pytest.mark.parametrize("device", either)
def test_a_range_is_filled_and_nothing_beside_it(device, count):
    from turbocompile.kernels.fill_triton import launch_fill

    for word in (0, 1, -1, 2**31 - 1, -(2**31)):
        x = torch.full((count + 2,), 7, dtype=torch.int32, device=device)
        launch_fill(x.data_ptr() + 4, word, count)
        assert x.tolist() == [7, *[word] * count, 7]
