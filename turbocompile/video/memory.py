"""What the models around a transformer need on a card: text encoder, VAE and image encoder, by a run without memory.

A model on the device "meta" computes shapes alone. What its operators would allocate is followed through the rules of
PyTorch's allocator (cuda_allocator.py).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbocompile.errors import UnsupportedError
from turbocompile.recipe.presets import TEXT_TOKENS, Geometry, vae_strides
from turbocompile.recipe.schema import Shape
from turbocompile.runtime.cuda_allocator import CudaAllocator, has_expandable_segments
from turbocompile.runtime.engine import Engine
from turbocompile.runtime.memory_plan import PartNeeds
from turbocompile.runtime.workspace import CUBLAS
from turbocompile.video import vae as wan_vae
from turbocompile.video.components import in_tiles
from turbocompile.video.latents import Pipeline
from turbocompile.wan.components import folder_name, made_on_meta, vae_config

SHOWN = 4  # latent frames that show the peak of a decoder, which goes through them one by one
TILES = (512, 384, 256)  # pixels of the tiles that a VAE may work in, the largest first
VIDEOS = 4.5  # float32 videos that tiles and what is made of them take: 3.2 live, in the allocator's blocks
TEXT, IMAGE, DECODE = "text", "image", "decode"


class _Followed(TorchDispatchMode):
    """Follows what operators allocate, and when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = CudaAllocator(has_expandable_segments())
        self._known: dict[int, Any] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._known or not storage.nbytes():
            return
        self._count += 1
        key = self._count
        self.allocator.allocate(key, storage.nbytes())

        def freed(_: Any) -> None:
            self.allocator.free(key)
            self._known.pop(place, None)

        self._known[place] = weakref.ref(storage, freed)


@torch.no_grad()
def peak_bytes(call: Callable[[], object]) -> int:
    """What the allocator would take from a card for a call of models on "meta"; their weights are not counted."""
    with _Followed() as followed:
        result = call()  # alive until the run is over
    del result
    return followed.allocator.peak_reserved


def decoding_bytes(vae: Any, latent: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of decoding a latent (B, C, T, H, W). vae: on "meta"."""
    batch, channels, frames, height, width = latent
    shown = torch.empty(batch, channels, min(frames, SHOWN), height, width, device="meta", dtype=dtype)
    made = vae.decode(shown, return_dict=False)[0]
    more = made.nbytes // made.shape[2] * 4 * max(0, frames - SHOWN)  # the frames so far are held
    return _with_cudnn(peak_bytes(lambda: vae.decode(shown, return_dict=False)[0]) + more)


def _with_cudnn(size: int) -> int:
    """With the workspaces of convolutions, as measured on an H200 in float32 and bfloat16, at 480p and 720p."""
    return int(1.06 * size) + 300 * 10**6


def encoding_bytes(vae: Any, video: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of encoding a video (B, 3, F, H, W), which is on the card in float32 and in the dtype. vae: on "meta"."""
    batch, colours, frames, height, width = video
    shown = torch.empty(batch, colours, min(frames, 9), height, width, device="meta", dtype=dtype)
    held = batch * colours * frames * height * width * (4 + dtype.itemsize)
    return _with_cudnn(peak_bytes(lambda: vae.encode(shown, return_dict=False)[0]) + held)


def vae_needs(vae: Any, weights: int, dtype: torch.dtype, geometry: Geometry, size: Shape, image: bool) -> PartNeeds:
    """Of a VAE, and of the largest tile that may serve instead of the whole."""
    frames, height, width = geometry.latent(size)
    channels = vae.config.z_dim
    working = decoding_bytes(vae, (size.batch, channels, frames, height, width), dtype)
    stages: tuple[str, ...] = (DECODE,)
    if image:
        pixels = (1, 3, size.num_frames, size.height, size.width)
        working, stages = max(working, encoding_bytes(vae, pixels, dtype)), (IMAGE, DECODE)
    video = 3 * 4 * size.batch * size.num_frames * size.height * size.width
    tiles: dict[int, int] = {}
    for tile in TILES:
        side = tile // geometry.spatial
        if side < max(height, width):
            latent = (size.batch, channels, frames, min(side, height), min(side, width))
            tiles[tile] = decoding_bytes(vae, latent, dtype) + int(VIDEOS * video)
    return PartNeeds(weights, working, stages, tiles=tiles)


def text_needs(encoder: Any, weights: int, prompts: int) -> PartNeeds:
    """Of a text encoder, which may pass through the card layer by layer; its table of tokens then stays on the CPU."""
    c = encoder.config
    size = next(encoder.parameters()).dtype.itemsize
    scores = c.num_heads * TEXT_TOKENS * (5 * size + 8)  # with bias, in float32 for the softmax, and their sums
    working = prompts * TEXT_TOKENS * (scores + 4 * size * c.d_ff + 8 * size * c.d_model)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in encoder.encoder.block]
    return PartNeeds(weights, working + CUBLAS, (TEXT,), block=max(layers), rest=1 << 20)


def image_needs(encoder: Any, weights: int) -> PartNeeds:
    """Of an image encoder."""
    side = encoder.config.image_size
    dtype = next(encoder.parameters()).dtype
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=dtype)
    return PartNeeds(weights, peak_bytes(lambda: encoder(pixels, output_hidden_states=True)), (IMAGE,))


def part_needs(
    folder: Path,
    table: Mapping[str, Mapping[str, str]],
    geometry: Geometry,
    size: Shape,
    image: bool,
    image_tokens: bool,
) -> dict[str, PartNeeds]:
    """What the components in a folder need for videos of a size. image: the video starts from one."""
    found: dict[str, PartNeeds] = {}
    for name, row in table.items():
        if name not in ("text_encoder", "vae", "image_encoder") or (name == "image_encoder" and not image_tokens):
            continue
        model = made_on_meta(folder / folder_name(name, row), name, row)
        dtype = next(model.parameters()).dtype
        weights = sum(p.nbytes for p in model.parameters())
        if name == "vae":
            found[name] = vae_needs(model, weights, dtype, geometry, size, image)
        elif name == "text_encoder":
            found[name] = text_needs(model, weights, size.batch)
        else:
            found[name] = image_needs(model, weights)
    return found


# ----------------------------------------------------------------------------------------------- videos under a plan


def plan_video(
    engine: Engine, vram: str | int | None, size: Shape, image: bool, device: torch.device | None,
    say: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Has an engine and the components of its folder share a GPU's memory for videos of a size.

    vram: as `Engine.plan_memory` takes it; None keeps to the budget of the plan that the engine has. image: whether the
    video starts from an image. device: the GPU; by default the engine's. say: is told the plan in sentences.

    An engine that has such a plan keeps it. Raises UnsupportedError where no plan fits.
    """
    known = engine.memory
    asked = vram if vram is not None else known.budget if known is not None else "auto"
    fits = (asked, size, image)
    if known is not None and engine.planned_for == fits and device in (None, engine.device):
        return
    assert engine.folder is not None
    table = engine.manifest["components"]
    geometry = Geometry(*vae_strides(made_config(engine)), tuple(engine.config["patch_size"]))
    tokens = engine.config.get("image_dim") is not None
    needs = part_needs(engine.folder / "components", table, geometry, size, image, tokens)
    plan = engine.plan_memory(asked, needs, shape=size.name, device=device)
    engine.planned_for = fits
    if say is not None:
        for sentence in plan.sentences():
            say(sentence)


def made_config(engine: Engine) -> dict[str, Any]:
    """The configuration of the VAE in an engine's folder."""
    assert engine.folder is not None
    return vae_config(engine.folder / "components" / folder_name("vae", engine.manifest["components"]["vae"]))


@torch.no_grad()
def decoded(pipeline: Pipeline, latents: torch.Tensor) -> torch.Tensor:
    """The frames of latents, uint8 (B, F, H, W, 3) on the CPU.

    Where the GPU's memory does not suffice, the transformers leave it, and then the VAE works in tiles, with a warning:
    latents that took minutes are not lost to a decoder.
    """
    for attempt in range(3):
        with contextlib.suppress(torch.OutOfMemoryError):
            return _decoded(pipeline, latents, TILES[-1] if attempt == 2 else 0)
        for expert in pipeline.experts.values():
            expert.park()
        torch.cuda.empty_cache()
    raise UnsupportedError(
        "the VAE ran out of the GPU's memory, even in tiles; free memory that others use, or make a smaller video"
    )


def _decoded(pipeline: Pipeline, latents: torch.Tensor, tile: int) -> torch.Tensor:
    with pipeline.component("vae") as vae:
        if tile:
            warnings.warn(
                f"the VAE ran out of the GPU's memory, and works in tiles of {tile} pixels, which it blends",
                RuntimeWarning,
                3,
            )
            in_tiles(vae, tile)
        return wan_vae.to_frames(wan_vae.decode(vae, latents)).cpu()


@contextlib.contextmanager
def enough_memory(engine: Engine) -> Iterator[None]:
    """Turns a GPU's "out of memory" into a sentence. What the body held is free then, and the engine can go on."""
    full = False
    try:
        yield
    except torch.OutOfMemoryError:
        full = True
    if full:  # here, because an error's frames hold the tensors that filled the card
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        raise UnsupportedError(
            "the GPU's memory does not suffice for this video; plan it (--vram auto), or make a smaller one or fewer "
            "frames"
        )


def peak_taken(engine: Engine) -> int | None:
    """The most that PyTorch's allocator took of the GPU in this process, in bytes; None without a plan or a GPU."""
    if engine.memory is None or engine.device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(engine.device)
