"""These tests need a GPU; elsewhere the folder is left out. `bench/gpu_check.py` runs them and more."""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]

# Memory is poisoned by torch's deterministic mode, in which torch before 2.10 refuses cuBLAS without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
