"""A run directory's files: checkpoints that are whole or not there, and appended metrics.

    runs/<name>/config.json             the resolved configuration
                metrics.jsonl           one line per step and per evaluation
                rollouts.jsonl          one line per rollout
                checkpoint              link to the newest checkpoint-<step>: model and tokenizer as transformers saves
                                        them, and trainer.pt (optimiser, teacher, schedule, generators, position)
                plot.png

A checkpoint is written beside its place, renamed into it, and only then linked and the one before it removed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

LINK = "checkpoint"
STATE = "trainer.pt"


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file; a last line that was cut in writing is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def keep_steps(path: Path, last: int) -> None:
    """Drops what was recorded after step `last`: the steps that a resumed run takes again."""
    kept = [record for record in read_lines(path) if record["step"] <= last]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def save(
    directory: Path, step: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]
) -> None:
    """Writes checkpoint-<step> and points `checkpoint` at it."""
    target = directory / f"{LINK}-{step:06d}"
    beside = directory / f"{target.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    torch.save(state, beside / STATE)
    if target.exists():
        shutil.rmtree(target)
    os.replace(beside, target)
    link = directory / f"{LINK}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    os.replace(link, directory / LINK)
    for other in directory.glob(f"{LINK}-*"):
        if other.name != target.name:
            shutil.rmtree(other)


def load_state(directory: Path) -> dict[str, Any]:
    """What `save` was given as state.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = directory / LINK / STATE
    if not path.exists():
        raise ValueError(f"[resume] {directory} has no checkpoint to resume from")
    return torch.load(path, map_location="cpu", weights_only=True)


def generator_states() -> dict[str, Any]:
    """Of python, numpy and torch, in types that torch.load takes without running code."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
