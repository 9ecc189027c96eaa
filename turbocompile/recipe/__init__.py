"""What a user may ask for: the fields of a recipe, checked, and resolved once."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbocompile.recipe.in_words import reference
    from turbocompile.recipe.schema import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe", "reference"]


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for, because the presets' names must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'turbocompile.recipe' has no attribute {name!r}")
    from turbocompile.recipe import schema
    from turbocompile.recipe.in_words import reference

    return reference if name == "reference" else getattr(schema, name)
