"""The inputs of attention kernels in a trained model: q, k and v of the model's attentions, recorded from a forward.

The errors of a quantized attention depend on its inputs, and random numbers are unlike the inputs in a trained model:
there some channels have a bias or are far larger than the rest, and a few queries single out some keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from turbocompile.sampling import TRAIN_TIMESTEPS
from turbocompile.video import vae as wan_vae
from turbocompile.video.text import encode_prompt
from turbocompile.wan_mini import world
from turbocompile.wan_mini.world import Combination

TIMES = (0.9, 0.5, 0.1)  # times of the flow from video (0) to noise (1)


@dataclass(frozen=True)
class Attended:
    """The operands q, k, v (B, L, H, D) of one scaled_dot_product_attention, after norms and rotary."""

    module: str  # the name of the attention's module in the model
    time: float  # the flow time of the model's call, in [0, 1]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def is_self(self) -> bool:
        """Whether this is self-attention, which is attn1 in a Wan block."""
        return self.module.endswith("attn1")


class _Recorder(TorchFunctionMode):
    """Passes the operands of each scaled_dot_product_attention to `keep`, with the module that was entered last."""

    def __init__(self, keep: Callable[..., None]) -> None:
        super().__init__()
        self.keep = keep
        self.module = ""

    def enter(self, name: str, *_: Any) -> None:
        self.module = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.keep(self.module, *(given[name].transpose(1, 2) for name in ("query", "key", "value")))
        return func(*args, **kwargs)


@torch.no_grad()
def record(model: nn.Module, time: float, **inputs: Any) -> list[Attended]:
    """The attentions of one call of the model, in order; inputs: the call's keyword arguments.

    An attention's module is the last entered module whose own name begins with `attn`.
    """
    found: list[Attended] = []
    recorder = _Recorder(lambda module, *operands: found.append(Attended(module, time, *operands)))
    hooks = [
        module.register_forward_pre_hook(partial(recorder.enter, name))
        for name, module in model.named_modules()
        if name.rpartition(".")[2].startswith("attn")
    ]
    try:
        with recorder:
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def record_pipeline(
    folder: str | Path,
    wanted: Sequence[Combination],
    times: Sequence[float] = TIMES,
    *,
    frames: int = world.FRAMES,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Attended]:
    """The attentions of a diffusers pipeline of this world, in one call of its transformer for each time.

    folder: the pipeline's. The transformer gets drawn videos that show the combinations in `wanted`, with scans of
    held-back writers, as (1 - time) latent + time noise. frames: of each video, 4k + 1. dtype: of the transformer.
    """
    from diffusers import WanPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()  # because the loading takes only a second
    try:
        dtypes = {"transformer": dtype, "default": torch.float32}
        pipe = WanPipeline.from_pretrained(str(folder), torch_dtype=dtypes, local_files_only=True).to(device)
    finally:
        logging.enable_progress_bar()
    generator = torch.Generator().manual_seed(seed)
    scans = world.load_scans(train=False)
    scenes = world.draw_scenes(list(wanted), scans, generator)
    shown = torch.arange(frames).expand(len(scenes), -1)
    latent = wan_vae.encode(pipe.vae, world.render(scenes, world.enlarge(scans.images), shown))
    noise = torch.randn(latent.shape, generator=generator).to(latent.device)
    text = encode_prompt([c.prompt for c in wanted], pipe.tokenizer, pipe.text_encoder, dtype=dtype)
    found = []
    for time in times:
        found += record(
            pipe.transformer,
            time,
            hidden_states=((1 - time) * latent + time * noise).to(dtype),
            timestep=torch.full((len(scenes),), TRAIN_TIMESTEPS * time, device=latent.device),
            encoder_hidden_states=text,
        )
    return found
