"""Kernels that write device memory by address."""
