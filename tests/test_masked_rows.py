"""Rows that a mask leaves out may hold anything: every op, plan and back end of the CPU."""

from __future__ import annotations

import masked_rows
import pytest
import torch


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16), ("reference", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(("op", "plan"), masked_rows.cases())
def test_anything_in_masked_rows(op, plan, backend, dtype, generator):
    masked_rows.check(op, plan, backend, dtype, generator)
