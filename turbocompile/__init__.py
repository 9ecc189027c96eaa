"""turbocompile: a compiler for diffusion transformers."""

from turbocompile.version import __version__

__all__ = ["__version__"]
