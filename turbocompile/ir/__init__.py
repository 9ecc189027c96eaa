"""A Program as data: its graphs, its weights as expressions, and how both are stored, read, printed and counted."""
