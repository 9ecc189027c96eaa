"""What a video is made from beside its prompt: a first and a last image, a control video with its mask, references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from turbocompile.errors import UnsupportedError
from turbocompile.recipe.schema import Shape
from turbocompile.video.image import open_image
from turbocompile.wan.transformer import images_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # the files of a folder of frames
SCALE = 1.0  # of the control, as VACE was trained


@dataclass(frozen=True)
class Given:
    """What a caller gives; after `opened` PIL images, of control and mask one a frame.

    image, last_image: PIL images or paths. control, mask: a video, a folder of frames in the order of their names, or a
    list of images; a mask may be one image for all frames. references: images. scale: of what VACE's blocks add to the
    transformer's.
    """

    image: Any = None
    last_image: Any = None
    control: Any = None
    mask: Any = None
    references: tuple[Any, ...] = ()
    scale: float = SCALE

    @classmethod
    def of(
        cls, image: Any = None, last_image: Any = None, control: Any = None, mask: Any = None, reference: Any = None,
        control_scale: float | None = None,
    ) -> Given:  # fmt: skip
        """As `generate` takes them. reference: an image or several."""
        several = reference if isinstance(reference, (list, tuple)) else [reference] if reference is not None else []
        return cls(image, last_image, control, mask, tuple(several), SCALE if control_scale is None else control_scale)

    def opened(self) -> Given:
        """With all files read. Raises UnsupportedError."""
        return Given(
            open_image(self.image) if self.image is not None else None,
            open_image(self.last_image) if self.last_image is not None else None,
            open_frames(self.control) if self.control is not None else None,
            open_frames(self.mask) if self.mask is not None else None,
            tuple(open_image(r) for r in self.references),
            self.scale,
        )

    @property
    def is_empty(self) -> bool:
        return self == Given(scale=self.scale)

    @property
    def names(self) -> list[str]:
        """What is given, as in ["control", "references"]."""
        return [name for name in ("image", "last_image", "control", "mask", "references") if getattr(self, name)]

    def of_size(self, size: Shape) -> Given:
        """With as many frames of the control and of the mask as the video has. Raises UnsupportedError.

        Of a longer control the first frames are taken; one image as a mask is that of each frame.
        """
        count = size.num_frames
        mask = self.mask * count if self.mask is not None and len(self.mask) == 1 else self.mask
        for name, frames in (("control", self.control), ("mask", mask)):
            if frames is not None and len(frames) < count:
                raise UnsupportedError(
                    f"the {name} has {len(frames)} frames, and the video has {count} ({size.name}); give a "
                    f"{name} of at least as many, or another of the engine's shapes"
                )
        control = self.control[:count] if self.control is not None else None
        return replace(self, control=control, mask=mask[:count] if mask is not None else None)


def open_frames(given: Any) -> tuple[Any, ...]:
    """PIL images of a video's frames: of a file, a folder of pictures, or images. Raises UnsupportedError."""
    if isinstance(given, (list, tuple)):
        return tuple(open_image(frame) for frame in given)
    if not isinstance(given, (str, Path)):
        return (open_image(given),)
    path = Path(given)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not found:
            raise UnsupportedError(f"{path}: the folder holds no pictures ({', '.join(PICTURES)}) to take as frames")
        return tuple(open_image(p) for p in found)
    if path.suffix.lower() in PICTURES:
        return (open_image(path),)
    return _read_video(path)


def _read_video(path: Path) -> tuple[Any, ...]:
    import av
    from PIL import Image

    try:
        with av.open(str(path)) as container:
            frames: list[np.ndarray] = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise UnsupportedError(f"{path} cannot be read as a video ({error})") from error
    if not frames:
        raise UnsupportedError(f"{path}: the video has no frames")
    return tuple(Image.fromarray(frame) for frame in frames)


# ------------------------------------------------------------------------------------ what a model takes of all that


def check_given(given: Given, task: str, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError where a model of the task takes something else. config: of its transformer."""
    control = {"control": given.control, "mask": given.mask, "reference": given.references or None}
    if task == "vace":
        if given.image is not None or given.last_image is not None:
            raise UnsupportedError(
                "the engine is of a VACE model, which takes no first image; give a control video whose first frame it "
                "is, with a mask that leaves that frame out (--control, --mask), or a --reference"
            )
        if given.mask is not None and given.control is None:
            raise UnsupportedError("a mask says which pixels of a control video are made anew; give --control, too")
        return
    for name, value in control.items():
        if value is not None:
            raise UnsupportedError(f"the engine is of no VACE model, so that it takes no {name}; leave --{name} out")
    if given.scale != SCALE:
        raise UnsupportedError("the engine is of no VACE model, so that it takes no --control-scale; leave it out")
    if task == "t2v" and (given.image is not None or given.last_image is not None):
        raise UnsupportedError("the engine makes videos from text alone; leave the image out")
    if task == "i2v" and given.image is None:
        raise UnsupportedError("the engine makes videos from an image; give one with image= (--image)")
    _check_last(given, task, config)


def _check_last(given: Given, task: str, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError where a last image is missing, or where the model was not trained to take one."""
    if images_of(config) == 2 and given.last_image is None:
        raise UnsupportedError(
            "the model goes from a first image to a last one (it has positions for two: pos_embed_seq_len), and here "
            "is one; give the last with last_image= (--last-image)"
        )
    if given.last_image is None or images_of(config) == 2:
        return
    if task == "ti2v" or config.get("image_dim") is not None:
        raise UnsupportedError(
            "the model starts from an image and takes no last one; leave --last-image out, or take a model of first "
            "and last images (FLF2V, or I2V of Wan2.2)"
        )


def fitting(given: Given, size: Shape, task: str) -> Given | None:
    """What is given, opened, for a video of a size; None where it is made from text alone. Raises UnsupportedError."""
    if task == "vace" and len(given.references) != size.references:
        raise UnsupportedError(
            f"the shape {size.name} is for {size.references} reference images, and there are {len(given.references)}; "
            "give as many (--reference), or build with a shape of as many references"
        )
    return None if given.is_empty and task != "vace" else given.opened().of_size(size)


def sizes_for(shapes: Sequence[Shape], references: int) -> list[Shape]:
    """The shapes for so many reference images; all shapes where there is none."""
    return [shape for shape in shapes if shape.references == references] or list(shapes)
