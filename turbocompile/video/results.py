"""What a call of `generate` made: the videos, and the files that hold them and say how they were made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from turbocompile.files import check_file, check_folder
from turbocompile.runtime.engine import Engine
from turbocompile.runtime.memory_plan import MemoryPlan
from turbocompile.version import __version__
from turbocompile.video import file as video_file
from turbocompile.video.latents import Request


@dataclass(frozen=True)
class GenerateResult:
    """The videos of one call, and how long each stage took.

    video: uint8 (B, F, H, W, 3), RGB. latents: float32 (B, C, T, H, W), normalized. timings: seconds by stage ("load",
    "lora", "plan", "text", "image", "denoise", "decode", "write"; those that ran). paths: the files, one a video.
    metadata: how the videos were made. memory: the plan that the engine followed, and `memory_peak` the most that was
    taken of the GPU, in bytes; None without a plan.
    """

    video: torch.Tensor
    latents: torch.Tensor
    timings: dict[str, float]
    paths: tuple[Path, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    memory: MemoryPlan | None = None
    memory_peak: int | None = None

    @property
    def path(self) -> Path | None:
        """The first file; None where nothing was written."""
        return self.paths[0] if self.paths else None


@dataclass(frozen=True)
class Places:
    """Where the videos of a call are written. video: an .mp4 file; frames: a folder for PNG files; latents: a
    .safetensors file; None of each: it is not written. The videos behind the first have -1, -2, ... behind these names.
    """

    video: Path | None = None
    frames: Path | None = None
    latents: Path | None = None

    @classmethod
    def checked(cls, video: str | Path | None, frames: str | Path | None, latents: str | Path | None) -> Places:
        """Raises UnsupportedError for a place that cannot be written to, before any work."""
        return cls(
            video_file.check_path(video) if video is not None else None,
            check_folder(frames) if frames is not None else None,
            check_file(latents, ".safetensors") if latents is not None else None,
        )

    def __bool__(self) -> bool:
        return any(place is not None for place in (self.video, self.frames, self.latents))

    def numbered(self, number: int) -> Places:
        """The places of the video with this number, from 0 on."""
        suffix = f"-{number}" if number else ""
        return Places(
            self.video and self.video.with_stem(self.video.stem + suffix),
            self.frames and self.frames.with_name(self.frames.name + suffix),
            self.latents and self.latents.with_stem(self.latents.stem + suffix),
        )

    def write(self, result: GenerateResult, prompts: Sequence[str], first: int) -> tuple[Path, ...]:
        """Writes each video of a call. first: the number of its first video. Returns the main file of each video."""
        paths: list[Path] = []
        for index, (made, latents) in enumerate(zip(result.video, result.latents, strict=True)):
            place = self.numbered(first + index)
            said = json.dumps({**result.metadata, "prompt": prompts[index], "video": index}, ensure_ascii=False)
            written: list[Path] = []
            if place.video is not None:
                written.append(video_file.write_video(place.video, made, fps_of(result.metadata), said))
            if place.frames is not None:
                video_file.write_frames(place.frames, made, said)
                written.append(place.frames)
            if place.latents is not None:
                written.append(video_file.write_latents(place.latents, latents, said))
            paths += written[:1]
        return tuple(paths)


def metadata_of(engine: Engine, asked: Request) -> dict[str, Any]:
    """How the videos of a call are made, as plain data. `prompt`, and `video`, the number in the batch, follow."""
    return {
        "turbocompile": __version__,
        "engine": engine.manifest.get("digest"),
        "seed": asked.seed,
        "shape": asked.size.name,
        "negative_prompt": asked.negative_prompt or "",
        "sampler": dataclasses.asdict(asked.sampler),
        "lora": [dataclasses.asdict(spec) for spec in engine.lora],
        "fps": video_file.FPS_OF.get(str(engine.manifest.get("task")), video_file.FPS),
        **({"given": asked.picture.names, "control_scale": asked.picture.scale} if asked.picture is not None else {}),
    }


def fps_of(metadata: Mapping[str, Any]) -> int:
    """Frames a second of the videos of a call."""
    return int(metadata.get("fps", video_file.FPS))
