"""tests/training/toy.py as the module `toy`, which these tests import and torchrun runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def _load_toy():
    spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
    module = sys.modules["toy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if "toy" not in sys.modules:
    _load_toy()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
