"""Video files: mp4 (H.264), PNG frames, latents.

Frames are uint8 (F, H, W, 3) in RGB. The file is YUV 4:2:0 in limited range with BT.709 colours, and says so: players
guess the matrix of an untagged file from its height, and are wrong for half of them.
"""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turbocompile.errors import UnsupportedError
from turbocompile.files import check_file, replacing

METADATA = "turbocompile"  # the key of what PNG and safetensors files say of their making
FPS = 16  # of Wan's training videos
FPS_OF = {"ti2v": 24}  # by the model's task, where it was trained on others
QUALITY = 18  # x264's constant rate factor: differences from the frames are hard to see
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers
# mbtree=0: with macroblock trees x264 writes one of several files for the same frames (up to 12 in 2000 runs), without
# them always the same one (6000 runs).
ENCODERS = (
    ("libx264", {"crf": str(QUALITY), "preset": "medium", "x264-params": "mbtree=0"}),
    ("mpeg4", {"qmin": "2", "qmax": "2"}),
)


def check_path(path: str | Path) -> Path:
    """The path of an mp4 file that can be written. Raises UnsupportedError for another suffix, and as `check_file`."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UnsupportedError(f"{path}: videos are written as .mp4; give a name that ends so")
    return check_file(path)


def write_video(path: str | Path, frames: torch.Tensor, fps: int = FPS, metadata: str = "") -> Path:
    """Writes frames, uint8 (F, H, W, 3), as H.264 (MPEG-4 without x264); the file appears whole or not at all.

    metadata: a text that the file carries as its `comment`. Missing folders are made. Raises UnsupportedError for a
    name that does not end in .mp4, no frames, or odd sizes, which 4:2:0 cannot hold.
    """
    path = check_path(path)
    _check_frames(frames)
    with replacing(path) as temporary:
        _encode(temporary, frames.cpu().numpy(), fps, metadata)
    return path


def _check_frames(frames: torch.Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UnsupportedError(f"frames are uint8 (F, H, W, 3), not {frames.dtype} {tuple(frames.shape)}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UnsupportedError(f"a video's height and width must be even, not {frames.shape[1]} x {frames.shape[2]}")


def _encode(path: Path, frames: np.ndarray, fps: int, metadata: str) -> None:
    import av

    name, options = next((e for e in ENCODERS if e[0] in av.codecs_available), (None, {}))
    if name is None:
        raise UnsupportedError("this build of PyAV has neither an H.264 nor an MPEG-4 encoder; pip install av")
    # faststart puts the index first, so that a browser plays the file while it loads
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if metadata:
            container.metadata["comment"] = metadata
        stream: Any = container.add_stream(name, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_frames(folder: str | Path, frames: torch.Tensor, metadata: str = "") -> list[Path]:
    """Writes frames, uint8 (F, H, W, 3), as frame-0000.png and so on into `folder`, which is made; their paths.

    metadata: a text that each file carries under `turbocompile`. The files appear together once all are written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    _check_frames(frames)
    folder, text = Path(folder), PngInfo()
    if metadata:
        text.add_itxt(METADATA, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"frame-{number:04d}.png" for number in range(len(frames))]
    with contextlib.ExitStack() as stack:
        for path, pixels in zip(paths, frames.cpu().numpy(), strict=True):
            Image.fromarray(pixels).save(stack.enter_context(replacing(path)), pnginfo=text)
    return paths


def write_latents(path: str | Path, latents: torch.Tensor, metadata: str = "") -> Path:
    """Writes normalized latents, float32 (C, T, H, W), as the tensor `latents` of a safetensors file."""
    from safetensors.torch import save_file

    path = check_file(path, ".safetensors")
    with replacing(path) as temporary:
        save_file({"latents": latents.contiguous().cpu()}, temporary, {METADATA: metadata})
    return path
