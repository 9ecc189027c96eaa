"""`from turbocompile.generate import generate`: an engine folder and a prompt become a video file."""

from turbocompile.video.session import generate, generate_all

__all__ = ["generate", "generate_all"]
