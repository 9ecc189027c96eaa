"""One tiny pipeline folder of each variant, written once."""

from __future__ import annotations

import pytest
import torch

from turbocompile.wan.example import write_example


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A function that gives the folder of a variant; tests must not change it."""
    made = {}

    def folder(variant: str = "t2v", head_dim: int = 64):
        key = (variant, head_dim)
        if key not in made:
            target = tmp_path_factory.mktemp("example") / f"{variant}-{head_dim}"
            write_example(target, variant, head_dim)
            made[key] = target
        return made[key]

    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
