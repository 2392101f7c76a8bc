"""A model's head from its files, without its body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from distil_kernels.hf import output_head
from distil_kernels.train.models import smollm2

FILE = "model.safetensors"


class Head(NamedTuple):
    """What of a model's files belongs to its vocabulary."""

    weight: Tensor
    """[V, D] float32."""
    bias: Tensor | None
    tokenizer: PreTrainedTokenizerBase


def load_head(name: str, option: str) -> Head:
    """Reads the head of a model in safetensors files, or its input embeddings where it is tied to them.

    Raises:
        ValueError: there are no such files, or none of them has the head.
    """
    source, is_local = _source(name)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=is_local)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = output_head(model)
        named = dict(model.named_parameters(remove_duplicate=False))
        weight = _tensor(source, [each for each, value in named.items() if value is head.weight])
        bias = None if head.bias is None else _tensor(source, [n for n, value in named.items() if value is head.bias])
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_local)
    except Exception as error:  # of files that hold anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"[{option}] cannot read the head of {name!r}: {reason}") from error
    return Head(weight, bias, tokenizer)


def named_end_ids(name: str) -> list[int]:
    """Returns the tokens that a model's generation config names as the ends of its answers; empty if it has none."""
    source, is_local = _source(name)
    try:
        named = GenerationConfig.from_pretrained(source, local_files_only=is_local).eos_token_id
    except OSError:
        return []
    return [*named] if isinstance(named, (list, tuple)) else [] if named is None else [named]


def _source(name: str) -> tuple[str, bool]:
    """The place that transformers loads a model from, and whether that is a directory."""
    source = str(smollm2.converted_directory() if name == smollm2.NAME else name)
    return source, Path(source).is_dir()


def _tensor(source: str, names: list[str]) -> Tensor:
    """The first of the tensors with these names that the files have, as float32."""
    index = cached_file(source, f"{FILE}.index.json", _raise_exceptions_for_missing_entries=False)
    places = json.loads(Path(index).read_text())["weight_map"] if index else dict.fromkeys(names, FILE)
    for name in names:
        path = cached_file(source, places[name]) if name in places else None
        if path is None:
            continue
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name).float()
    raise ValueError(f"expected safetensors with one of {', '.join(names)}")
