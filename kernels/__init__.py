"""Operators of turbocompile: one file an op, with its reference, its kernel and its registration."""
