"""Rotary embeddings, alone and with the norm of queries and keys."""
