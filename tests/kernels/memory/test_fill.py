"""Words set by address, under the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize("count", [1, 3, 4, 1021, 1024, 2500])
def test_a_range_is_filled_and_nothing_beside_it(interpreted_or_cuda, count):
    from turbocompile.kernels.memory.fill_triton import launch_fill

    for word in (0, 1, -1, 2**31 - 1, -(2**31)):
        x = torch.full((count + 2,), 7, dtype=torch.int32, device=interpreted_or_cuda)
        launch_fill(x.data_ptr() + 4, word, count)
        assert x.tolist() == [7, *[word] * count, 7]
