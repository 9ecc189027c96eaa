"""Wan: configurations, checkpoints, and the models around the transformer."""
