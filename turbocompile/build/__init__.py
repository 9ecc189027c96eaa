"""From a module or a recipe to an engine: all rooms above, in order."""
