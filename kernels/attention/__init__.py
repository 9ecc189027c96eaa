"""Quantized and sparse attention, and the kernels that prepare its operands."""
