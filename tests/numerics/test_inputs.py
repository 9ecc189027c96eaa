"""Random inputs are those of the signature."""

from __future__ import annotations

import torch
from products import made

from turbocompile.numerics.inputs import random_inputs


def test_random_inputs_follow_the_signature():
    _, program, _, _ = made()
    first, again = random_inputs(program, 3), random_inputs(program, 3)
    assert torch.equal(first[0], again[0])
    assert tuple(first[0].shape) == (2, 12, 64)
    assert not torch.equal(first[0], random_inputs(program, 4)[0])
