"""Checkpoints of a run, each of them complete or absent.

    checkpoint-<step>/   model or adapters, and tokenizer, as their libraries save them
                         trainer.pt    optimizer, teacher, schedule, random number generators, position in the data
                         files.json    size and checksum of every other file

A checkpoint is written under another name, forced to the disk and renamed; only then does the link `checkpoint` name
it, and only then is the oldest one removed. A kill at any moment leaves the checkpoint before it complete; damage is
found by the checksums, and then the checkpoint before it is taken.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distil_kernels.train.models.sharding import local_shard
from distil_kernels.train.run.directory import WriteError, force_to_disk, remove_leftovers, write_text

LINK = "checkpoint"
STATE = "trainer.pt"
MANIFEST = "files.json"


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    num_checkpoints: int = 1,
    weights: dict[str, Any] | None = None,
) -> None:
    """Writes checkpoint-<step>, links `checkpoint` to it and removes all but the newest `num_checkpoints`.

    Args:
        state: the content of trainer.pt.
        weights: the model's state where the model itself is sharded.

    Raises:
        WriteError: the disk did not take it.
    """
    target = directory / f"{LINK}-{step:06d}"
    remove_leftovers(directory)
    temporary = directory / f"{target.name}.tmp"
    try:
        _write(temporary, model, tokenizer, state, weights)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        names = [path.name for path in _checkpoints(directory)]
        position = f"the run directory is as of {names[-1]}" if names else "no checkpoint was written before it"
        reason = " ".join(str(error).split())
        raise WriteError(
            f"cannot write {target}: {reason}; {position}; --resume {directory} goes on from there"
        ) from error
    if target.exists():
        _remove(target)
    os.replace(temporary, target)
    force_to_disk(directory)
    link_to(target)
    # A checkpoint of a later step is a damaged one that a resumed run went back from.
    paths = _checkpoints(directory)
    newest = [path for path in paths if path <= target][-num_checkpoints:]
    for path in paths:
        if path not in newest:
            _remove(path)


def link_to(target: Path) -> None:
    """Makes the link `checkpoint` of a run directory name this checkpoint."""
    link = target.with_name(f"{LINK}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    os.replace(link, target.with_name(LINK))
    force_to_disk(target.parent)


def newest_undamaged(directory: Path, warn: Callable[[str], None]) -> Path | None:
    """Returns the newest checkpoint whose files are as they were written; None when the run has none yet.

    Args:
        warn: is called with a sentence about each damaged checkpoint that is passed over.

    Raises:
        ValueError: there are checkpoints and all are damaged.
    """
    paths = _checkpoints(directory)
    for path in reversed(paths):
        damage = _damage(path)
        if damage is None:
            return path
        warn(f"{path} is damaged ({damage}); taking the one before it")
    if paths:
        raise ValueError(f"[resume] every checkpoint of {directory} is damaged: remove them to start from step 0")
    return None


def load_state(path: Path) -> dict[str, Any]:
    """Returns what `save` was given as state."""
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def generator_states() -> dict[str, Any]:
    """Returns the states of the random number generators of python, numpy and torch.

    They are of types that torch.load takes without running code.
    """
    kind, keys, *position = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, numpy.asarray(keys).tolist(), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Puts the generators into the states that `generator_states` returned."""
    random.setstate(states["python"])
    kind, keys, *position = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *position))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def are_finite(weights: Iterable[Tensor]) -> bool:
    """Returns whether all numbers of these weights are finite, as far as this process holds them."""
    return all(bool(local_shard(weight).isfinite().all()) for weight in weights)


def fingerprint(model: nn.Module) -> list[int]:
    """Returns for each parameter the sum of its bits read as integers, which another model would hardly share."""
    return [int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters()]


def _write(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    weights: dict[str, Any] | None,
) -> None:
    """Writes every file of a checkpoint, the manifest last."""
    model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    torch.save(state, folder / STATE)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        force_to_disk(path)
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)] for path in files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _checkpoints(directory: Path) -> list[Path]:
    """Returns a run's checkpoints, oldest first."""
    return sorted(path for path in directory.glob(f"{LINK}-*") if re.fullmatch(rf"{LINK}-\d+", path.name))


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files; None where nothing is."""
    try:
        for name, (size, checksum) in json.loads((path / MANIFEST).read_text()).items():
            actual_size = (path / name).stat().st_size
            if actual_size != size:
                return f"{name} has {actual_size} bytes, {size} were written"
            if _checksum(path / name) != checksum:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _remove(path: Path) -> None:
    """Removes a checkpoint, its name first, so that no part of a checkpoint ever has it."""
    temporary = path.with_name(path.name + ".old.tmp")
    os.replace(path, temporary)
    shutil.rmtree(temporary)
