"""These tests need a GPU; elsewhere the folder is left out. `bench/gpu_check.py` runs them and more."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
