"""distil_kernels."""
