"""The options of commands that make videos from images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_OF_IMAGES = (
    click.option("--image", type=_PATH, help="The first frame, for image-to-video models."),
    click.option("--last-image", type=_PATH, help="The last frame, for models that take one (FLF2V, Wan2.2 I2V)."),
    click.option(
        "--control", type=_PATH, metavar="VIDEO", help="VACE: a video, or a folder of its frames as pictures."
    ),
    click.option(
        "--mask", type=_PATH, help="VACE: what of the control is made anew (white): a video, folder or picture."
    ),
    click.option(
        "--reference", type=_PATH, multiple=True, help="VACE: a picture of what the video shows; one or more."
    ),
    click.option("--control-scale", type=float, help="VACE: how much the control counts, 1.0 where not given."),
)


def image_options(command: Any) -> Any:
    """The options of a command that makes a video from images."""
    for option in reversed(_OF_IMAGES):
        command = option(command)
    return command
