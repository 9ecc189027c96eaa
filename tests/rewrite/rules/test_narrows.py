"""Where a slice goes under a reshape."""

import pytest
import torch

from turbocompile.rewrite.rules.narrows import narrow_before_reshape


@pytest.mark.parametrize(
    ("source", "result", "narrow", "expected"),
    [
        ((2, 6, 12), (2, 6, 3, 4), (2, 1, 2), (2, 4, 8)),  # a third of fused q, k, v
        ((2, 6, 12), (2, 6, 3, 2, 2), (2, 2, 3), (2, 8, 12)),
        ((2, 6, 12), (2, 6, 3, 4), (3, 0, 2), None),  # part of each head
        ((2, 6, 12), (12, 12), (0, 0, 6), (0, 0, 1)),  # whole rows of the batch
        ((2, 6, 12), (12, 12), (0, 3, 9), None),
        ((1, 6, 12), (6, 12), (0, 3, 5), (1, 3, 5)),
        ((6, 8), (6, 1, 8), (2, 1, 3), (1, 1, 3)),
        ((6, 8), (48,), (0, 8, 24), (0, 1, 3)),
    ],
)
def test_where_a_narrow_goes_under_a_reshape(source, result, narrow, expected):
    place = narrow_before_reshape(source, result, *narrow)
    assert place == expected
    if place is not None:
        x = torch.arange(torch.Size(source).numel()).reshape(source)
        dim, start, stop = narrow
        direct = x.reshape(result).narrow(dim, start, stop - start)
        assert torch.equal(x.narrow(place[0], place[1], place[2] - place[1]).reshape(direct.shape), direct)
