"""Linears on 8-bit operands."""
