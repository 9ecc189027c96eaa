"""Rewrites of a Program, one file each."""
