"""Adapters that stay beside their linears: y = linear(x) + b(a(x)), with a and b in the engine's dtype.

A linear in 8 bits then keeps the bytes that it has without the adapter, and the adapter is rounded to no 8 bits. Each
call computes both. All blocks have one form, so that a module has a branch in every block: of the largest rank that it
has in one, filled with zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from turbocompile.ir.evaluate import Evaluator, TensorSource
from turbocompile.ir.weights import Expr

DOWN, UP = "lora_A", "lora_B"
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
Factors = tuple[Expr, Expr, float]  # a (rank, in), b (out, rank), and what b @ a is multiplied by


class Branched(nn.Linear):
    """A linear with an adapter beside it."""

    def __init__(self, of: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        like: dict[str, Any] = {"bias": False, "device": of.weight.device, "dtype": of.weight.dtype}
        self.lora_A, self.lora_B = nn.Linear(of.in_features, rank, **like), nn.Linear(rank, of.out_features, **like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        return super().forward(x) + self.lora_B(self.lora_A(x))


def add_branches(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Puts branches beside linears. ranks: by the linear's name, with "*" for the number of a block."""
    for name, module in list(model.named_modules()):
        rank = ranks.get(general(name), 0)
        if rank and isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            branched = Branched(module, rank).eval().requires_grad_(False)
            setattr(model.get_submodule(parent), leaf, branched)


def general(name: str) -> str:
    """The name of a module with "*" for the number of its block."""
    block = _OF_BLOCK.fullmatch(name)
    return f"blocks.*.{block[2]}" if block else name


class BranchTensors:
    """A checkpoint's tensors, and those of branches: `<linear>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank).

    stored: how the checkpoint stores its quantized weights, which branches leave as they are.
    """

    def __init__(self, tensors: TensorSource, branches: Mapping[str, Sequence[Factors]], leaves: TensorSource) -> None:
        self._tensors, self._branches, self._leaves = tensors, branches, leaves
        self.stored = getattr(tensors, "stored", {})
        self.ranks: dict[str, int] = {}
        for name, factors in branches.items():
            rank = sum(a.shape[0] for a, _, _ in factors)
            self.ranks[general(name)] = max(rank, self.ranks.get(general(name), 0))
        self._own: dict[str, tuple[str, str]] = {}
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and general(path) in self.ranks:
                self._own |= {f"{path}.{part}.weight": (path, part) for part in (DOWN, UP)}

    def keys(self) -> Iterable[str]:
        return [*self._tensors.keys(), *self._own]

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name not in self._own:
            return self._tensors.spec(name)
        path, part = self._own[name]
        shape, _ = self._tensors.spec(f"{path}.weight")
        rank = self.ranks[general(path)]
        return ((rank, math.prod(shape[1:])) if part == DOWN else (shape[0], rank)), torch.float32

    def get(self, name: str) -> torch.Tensor:
        if name not in self._own:
            return self._tensors.get(name)
        path, part = self._own[name]
        evaluate, made, at = Evaluator(self._leaves, {}), torch.zeros(self.spec(name)[0]), 0
        for a, b, scale in self._branches.get(path, ()):
            rank = a.shape[0]
            if part == DOWN:
                made[at : at + rank] = evaluate(a).float()
            else:
                made[:, at : at + rank] = evaluate(b).float() * scale
            at += rank
        return made
