"""The training of the judge's classifier."""

from __future__ import annotations

import torch

from turbocompile.wan_mini import world
from turbocompile.wan_mini.train_judge import train_classifier


def test_training_is_a_function_of_its_arguments():
    scans = world.load_scans(train=True)
    state = torch.random.get_rng_state()
    a, b, c = (train_classifier(scans, steps=2, batch=16, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
