"""Loading and running an engine needs no part of the compiler, and none of the libraries that models come from."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import turbocompile

COMPILER = {
    "capture",
    "rewrite",
    "numerics",
    "passes",
    "build",
    "wan",
    "recipe",
    "tools",
    "video",
    "training",
    "sampling",
}
LIBRARIES = ("tokenizers", "diffusers", "transformers", "onnx", "onnxruntime", "safetensors.numpy")

LOADING = """
import json, sys
import turbocompile
engine = turbocompile.load(sys.argv[1])
loaded = sorted(sys.modules)
import torch
out = engine(torch.zeros(1, 6, 64))
repr(engine.report)
print(json.dumps({"loaded": loaded, "called": sorted(sys.modules), "shape": list(out.shape)}))
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The modules that a fresh interpreter has imported: after `load`, and after a call."""
    model = nn.Sequential(Block(), Block()).eval()
    recipe = {"passes": {"w8a8": "int8"}}  # an engine with operators of ours, and rows of every kind in its report
    engine = turbocompile.optimize(model, (torch.zeros(1, 6, 64),), recipe=recipe, target="cpu")
    folder = engine.save(tmp_path_factory.mktemp("imports") / "engine")
    done = subprocess.run([sys.executable, "-c", LOADING, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("when", ["loaded", "called"])
def test_no_room_of_the_compiler_is_imported(imported, when):
    rooms = {name.split(".")[1] for name in imported[when] if name.startswith("turbocompile.")}
    assert "runtime" in rooms
    assert sorted(rooms.intersection(COMPILER)) == []


@pytest.mark.parametrize("when", ["loaded", "called"])
def test_no_library_of_models_is_imported(imported, when):
    assert sorted(set(imported[when]).intersection(LIBRARIES)) == []
    assert imported["shape"] == [1, 6, 64]
