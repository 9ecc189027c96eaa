"""Times a module's attentions, and lets the kernels of its linears compete, on the card that it is built for."""

from __future__ import annotations

from dataclasses import replace

import torch

from turbocompile.build.compile import Compiled
from turbocompile.build.stages import Stages
from turbocompile.hardware import target_of
from turbocompile.recipe.schema import Settings
from turbocompile.runtime.timing import time_attentions
from turbocompile.runtime.tuning import tune


def measured(item: Compiled, settings: Settings, stages: Stages) -> Compiled:
    """The module with the times and the choices of kernels, where this machine has the card; else as it is."""
    if settings.backend != "triton" or settings.target == "cpu" or not torch.cuda.is_available():
        return item
    if target_of(torch.cuda.get_device_capability()) != settings.target:
        return item
    device = torch.device("cuda")
    with stages("measure"):
        try:
            times = time_attentions(next(iter(item.programs.values())), device)
            item = replace(item, times=times, measured_on=torch.cuda.get_device_name())
            return replace(item, tuning=tune(item.programs, device))
        except torch.OutOfMemoryError:  # the card is in use, and an engine can do without
            return item.warned("attentions and linears were not all timed: the GPU had too little free memory")
