"""Quantized and sparse attention, and what prepares its operands."""
