"""Norms, alone and with what precedes and follows them: modulation, residual, quantization."""
