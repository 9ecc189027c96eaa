"""Activations and weights in 8 bits, alone and with GELU."""
