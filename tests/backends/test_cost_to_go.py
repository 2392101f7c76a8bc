"""The credit's scan in plain torch; the other back ends' have the same checks beside their row kernels."""

from __future__ import annotations

import pytest
import to_go_checks
import torch

from distil_kernels.backends import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference(dtype, generator):
    to_go_checks.check_random_layouts(reference, generator, 200, dtype=dtype)
    to_go_checks.check_long_sequences(reference, generator, dtype=dtype)
