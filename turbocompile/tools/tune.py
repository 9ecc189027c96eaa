"""`turbocompile tune`: chooses the kernels of an engine that was built elsewhere, on this machine's card."""

from __future__ import annotations

from pathlib import Path

from turbocompile.backends import Tuning
from turbocompile.cache import keep_json
from turbocompile.errors import UnsupportedError
from turbocompile.runtime.engine import Engine
from turbocompile.runtime.tuning import Progress, linears, tune


def tune_engine(engine: Engine, progress: Progress = lambda stage, fraction: None) -> tuple[Tuning, Path | None]:
    """Tunes all modules of an engine's folder on the GPU that it is on, and keeps the result in the user's cache.

    Linears of all sizes compete, because a user asked for them. Returns the tuning, which `load` gives to the same
    engine from now on, and the file that keeps the tuning; None (and a warning) if the cache cannot be written. Raises
    UnsupportedError if the engine is on no GPU or has no 8-bit linear.
    """
    if engine.device.type != "cuda":
        raise UnsupportedError(f"tuning measures kernels on a GPU, and the engine is on {engine.device}; name a GPU")
    programs = {f"{name}/{shape}": p for name, e in engine.experts.items() for shape, p in e.programs.items()}
    if not linears(programs):
        raise UnsupportedError("the engine has no 8-bit linear, so there is nothing to tune")
    found = tune(programs, engine.device, progress, least=0)
    return found, keep_json("tuning", str(engine.manifest["digest"]), found)
