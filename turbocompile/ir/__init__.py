"""A Program as data: graphs, the expressions that its weights are, how it is written to files and printed."""
