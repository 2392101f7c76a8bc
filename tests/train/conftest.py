"""A tiny randomly initialised model with a byte tokenizer, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, llama_config
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the model."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
