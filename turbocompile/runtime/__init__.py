"""An engine: a folder becomes a module that is called like the model it came from."""
