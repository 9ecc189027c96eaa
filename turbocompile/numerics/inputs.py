"""The tensors that a Program is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turbocompile.ir.program import Program


@dataclass(frozen=True)
class Inputs:
    """What the model is run on: the tensors of some calls, in the order and dtypes of the Program's inputs."""

    calls: Sequence[Sequence[torch.Tensor]]
    recorded: bool = False

    def __str__(self) -> str:
        if not self.recorded:
            return "random inputs"
        return f"{len(self.calls)} recorded input" + ("s" if len(self.calls) > 1 else "")


def random_inputs(
    program: Program, seed: int = 0, example: Sequence[torch.Tensor] = (), *, zeros: bool = False
) -> list[torch.Tensor]:
    """Random tensors of the Program's inputs: N(0, 1), timesteps in (0, 1000), ones for masks and integers.

    example: the tensors of a call of these shapes. Its masks and integers are taken as they are, for what they may be
    is the model's own: indices, lengths, classes. One that is all zeros becomes ones unless `zeros` says otherwise: a
    mask of zeros would take every key away, and positions of zero would rotate nothing.
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
