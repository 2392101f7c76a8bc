"""The trainer: `python -m distil_kernels.train`. It uses the public package and `distil_kernels.hf`, nothing inside."""
