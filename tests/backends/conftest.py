"""What tests of backends share: small models, their Programs and weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import asked
from torch import nn

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir import signature as sig
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import Program
from turbocompile.ir.shards import write_shards
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import run_passes

EXACT = {"w8a8": {"enabled": False}, "attention": {"kind": "native"}}


def _load_zoo():
    """tests/zoo.py as the module `zoo`."""
    spec = importlib.util.spec_from_file_location("zoo", Path(__file__).parents[1] / "zoo.py")
    module = sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if "zoo" not in sys.modules:
    _load_zoo()


@dataclass
class Case:
    """A model, one call of it, and what the compiler made of the two."""

    model: nn.Module
    program: Program
    weights: dict[str, torch.Tensor]
    tensors: list[torch.Tensor]

    def eager(self) -> list[torch.Tensor]:
        """The model's own results, flat."""
        flat: list[torch.Tensor] = []
        args, kwargs = sig.rebuild(self.program.signature, self.tensors)
        with torch.no_grad():
            sig.describe_output(self.model(*args, **kwargs), flat)
        return flat

    def write_weights(self, folder: Path, module: str = "transformer") -> None:
        """The weights as an engine folder has them."""
        evaluate = Evaluator(ModuleTensors(self.model), self.program.constants)
        write_shards(weight_plan({"call": self.program}), evaluate, folder, f"weights-{module}")


def _case(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    passes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Case:
    program = capture(model, tuple(args), kwargs)
    if passes is not None:
        normalize(program)
        run_passes(program, asked(passes))
    evaluate = Evaluator(ModuleTensors(model), program.constants)
    weights = {name: evaluate(e.expr, e.prefix) for name, e in weight_plan({"call": program}).items()}
    tensors, _ = sig.bind(program.signature, tuple(args), dict(kwargs or {}))
    return Case(model, program, weights, sig.cast(program.signature, tensors))


@pytest.fixture
def case():
    """case(model, args, kwargs, passes): captured, rewritten by `passes` (not at all without), weights evaluated."""
    return _case


@pytest.fixture
def exact():
    """The options of all exact passes."""
    return EXACT


@pytest.fixture(scope="session")
def tiny():
    """tiny(passes, seed): a Wan of 2 layers in float32, 48 tokens, as a Case."""

    def make(passes: Mapping[str, Mapping[str, Any]] | None = None, seed: int = 0) -> Case:
        from diffusers import WanTransformer3DModel

        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, text_dim=32, freq_dim=64, ffn_dim=256,
            num_layers=2, rope_max_seq_len=64,
        ).eval().requires_grad_(False)  # fmt: skip
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # no two are equal, as zeros and ones were
        call = {
            "hidden_states": torch.randn(1, 16, 3, 8, 8),
            "timestep": torch.tensor([750.0]),
            "encoder_hidden_states": torch.randn(1, 16, 32),
        }
        return _case(model, kwargs=call, passes=passes)

    return make
