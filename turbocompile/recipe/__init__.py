"""What a user may ask for: the fields of a recipe, checked, and resolved once."""

from turbocompile.recipe.reference import reference
from turbocompile.recipe.schema import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe", "reference"]
