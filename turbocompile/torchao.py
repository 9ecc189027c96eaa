"""`from turbocompile.torchao import to_torchao`: the 8-bit weights of an engine in a model for torchao."""

from turbocompile.runtime.to_torchao import to_torchao

__all__ = ["to_torchao"]
