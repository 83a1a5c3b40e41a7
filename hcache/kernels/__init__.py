"""Triton kernels: they know tensors only. Callers import them late, as a CPU install has no Triton."""
