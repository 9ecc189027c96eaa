"""Reads the videos that the package writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from turbocompile.video.file import BT709, LIMITED_RANGE


def read_video(path: str | Path) -> tuple[torch.Tensor, float]:
    """Frames, uint8 (F, H, W, 3), and frames a second of a file that `write_video` wrote."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            frame.reformat(format="rgb24", src_colorspace=BT709, src_color_range=LIMITED_RANGE).to_ndarray()
            for frame in container.decode(stream)
        ]
        rate = float(stream.average_rate or 0)
    return torch.from_numpy(np.stack(frames)), rate
