"""turbocompile: a compiler for diffusion transformers.

engine = turbocompile.optimize(model, args, kwargs)     # any module
engine = turbocompile.load("engine/")                   # a folder that `turbocompile optimize` wrote
out = engine(*args, **kwargs)                           # called like the model it came from
"""

from typing import TYPE_CHECKING, Any

from turbocompile.errors import (
    CaptureError,
    EngineError,
    RecipeError,
    TurbocompileError,
    UnsupportedError,
    VerificationError,
)
from turbocompile.version import __version__

if TYPE_CHECKING:
    from turbocompile.build.from_module import optimize
    from turbocompile.numerics.recording import record
    from turbocompile.recipe.schema import Recipe, load_recipe
    from turbocompile.report.report import Report
    from turbocompile.runtime.engine import Engine, load

__all__ = [
    "CaptureError",
    "Engine",
    "EngineError",
    "Recipe",
    "RecipeError",
    "Report",
    "TurbocompileError",
    "UnsupportedError",
    "VerificationError",
    "__version__",
    "load",
    "load_recipe",
    "optimize",
    "record",
]
_HOMES = {
    "optimize": "turbocompile.build.from_module",
    "Engine": "turbocompile.runtime.engine",
    "load": "turbocompile.runtime.engine",
    "Recipe": "turbocompile.recipe.schema",
    "load_recipe": "turbocompile.recipe.schema",
    "record": "turbocompile.numerics.recording",
    "Report": "turbocompile.report.report",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: `turbocompile --version` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'turbocompile' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
