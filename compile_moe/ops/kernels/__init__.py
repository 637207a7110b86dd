"""Triton kernels and their launchers. A launcher takes tensors that an op has checked, and writes into them."""
