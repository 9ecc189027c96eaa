"""The tensors that a Program is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turbocompile.ir.program import Program


@dataclass(frozen=True)
class Inputs:
    """Calls that a Program is run on: for each the tensors in the order, shapes and dtypes of the Program's inputs.

    recorded: whether a user recorded them; else they are random.
    """

    calls: Sequence[Sequence[torch.Tensor]]
    recorded: bool = False

    def __str__(self) -> str:
        if not self.recorded:
            return "random inputs"
        return f"{len(self.calls)} recorded input" + ("s" if len(self.calls) > 1 else "")


def random_inputs(
    program: Program, seed: int = 0, example: Sequence[torch.Tensor] = (), *, zeros: bool = False
) -> list[torch.Tensor]:
    """Random tensors for the Program's inputs: N(0, 1), timesteps in (0, 1000), ones for masks and integers.

    example: the tensors of a call of these shapes. Masks and integers of the example are taken as they are, because
    only the model knows what they may be: indices, lengths, classes. A tensor of zeros among them becomes ones unless
    `zeros` is set, because a mask of zeros would hide every key, and positions of zero would rotate nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k, i in enumerate(program.signature.inputs):
        if i.number and k < len(example):
            value = example[k].detach().cpu()
        elif i.cast:
            value = torch.rand(i.shape, generator=generator) * 999.0 + 0.5
        elif i.dtype.is_floating_point:
            value = torch.randn(i.shape, generator=generator)
        else:
            given = example[k].detach().cpu() if k < len(example) and example[k].device.type != "meta" else None
            value = given if given is not None and (zeros or bool(given.any())) else torch.ones(i.shape)
        made.append(value.to(i.dtype))
    return made
