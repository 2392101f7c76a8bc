"""The tiny model that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))
