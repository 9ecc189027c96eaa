"""Ways to emit and run a Program."""
