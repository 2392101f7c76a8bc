"""A run directory's files: checkpoints that are whole or not there, and appended records.

    runs/<name>/config.json             the resolved configuration
                metrics.jsonl           one line per step and per evaluation
                rollouts.jsonl          one line per rollout
                checkpoint-<step>/      model or adapters, and tokenizer, as their libraries save them; trainer.pt
                                        (optimiser, teacher, schedule, generators, position); files.json (size and
                                        checksum of the others)
                checkpoint              link to the newest of them
                plot.png

A checkpoint is written beside its place, forced to the disk, renamed into its place, and only then linked and the
oldest one removed. A kill at any moment leaves the one before it whole; a damaged one is known by its checksums.
"""

from __future__ import annotations

import json
import math
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

from distil_kernels.train.models.sharding import local

LINK = "checkpoint"
STATE = "trainer.pt"
MANIFEST = "files.json"


class WriteError(OSError):
    """Something could not be written (a full disk, say); the checkpoints before it are untouched."""


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    _force(beside)
    os.replace(beside, path)
    _force(path.parent)


def make(directory: Path, config: str, replaces: bool = False) -> None:
    """Makes a run directory with its config.json; one that it `replaces` is deleted once it stands.

    A kill leaves the old one, the new one, or for a moment only the old one as .<name>.new/old.tmp.
    """
    beside = directory.with_name(f".{directory.name}.new")
    beside.mkdir(parents=True, exist_ok=True)
    write_text(beside / "config.json", config)
    if replaces and directory.exists():
        os.replace(directory, beside / "old.tmp")
    os.replace(beside, directory)
    _force(directory.parent)
    remove_leftovers(directory)


def json_line(record: dict[str, Any]) -> str:
    """JSON, which has no NaN and no infinity: null takes their place."""
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None))


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    try:
        with path.open("a") as file:
            file.writelines(json_line(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        rest = f"the run is as of its last checkpoint, from which --resume {path.parent} goes on"
        raise WriteError(f"cannot write {path}: {error.strerror}; {rest}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file; a last line that was cut in writing is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def with_nan(value: Any) -> Any:
    """Records as they were before `json_line`: NaN for null."""
    if isinstance(value, dict):
        return {name: with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


def keep_lines(path: Path, keeps: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drops the other records, those of steps that a resumed run takes again, and returns the kept ones."""
    kept = [record for record in read_lines(path) if keeps(record)]
    write_text(path, "".join(json_line(record) + "\n" for record in kept))
    return kept


def drop_after(directory: Path, step: int) -> list[dict[str, Any]]:
    """Drops a run's records of later steps, and returns the kept ones of metrics.jsonl.

    A rollout of an evaluation that was not finished is of its step, and goes too.
    """
    kept = keep_lines(directory / "metrics.jsonl", lambda record: record["step"] <= step)
    last_of = {"training": step, "sample": min(step, last_evaluation(kept))}
    keep_lines(directory / "rollouts.jsonl", lambda record: record["step"] <= last_of[record["kind"]])
    return with_nan(kept)


def last_evaluation(records: Iterable[dict[str, Any]]) -> int:
    """Step of the last evaluation among records of metrics.jsonl; -1 before the first."""
    return max((record["step"] for record in records if record["kind"] == "evaluation"), default=-1)


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    num_kept: int = 1,
    weights: dict[str, Any] | None = None,
) -> None:
    """Writes checkpoint-<step>, points `checkpoint` at it and keeps the newest `num_kept`.

    Args:
        weights: the model's state where the model itself is sharded.

    Raises:
        WriteError: it could not be written.
    """
    target = directory / f"{LINK}-{step:06d}"
    remove_leftovers(directory)
    beside = directory / f"{target.name}.tmp"
    try:
        _write(beside, model, tokenizer, state, weights)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(beside, ignore_errors=True)
        before = [path.name for path in _checkpoints(directory)]
        rest = f"the run directory is as of {before[-1]}" if before else "no checkpoint was written before it"
        reason = " ".join(str(error).split())
        raise WriteError(f"cannot write {target}: {reason}; {rest}; --resume {directory} goes on from there") from error
    if target.exists():
        _remove(target)
    os.replace(beside, target)
    _force(directory)
    point_to(target)
    # A later step than this one is a damaged checkpoint that a resumed run went back from.
    paths = _checkpoints(directory)
    kept = [path for path in paths if path <= target][-num_kept:]
    for other in paths:
        if other not in kept:
            _remove(other)


def remove_leftovers(directory: Path) -> None:
    """Of writes and removals that a kill cut short."""
    for path in directory.glob("*.tmp*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def point_to(target: Path) -> None:
    """Makes a run directory's `checkpoint` link name this checkpoint."""
    link = target.with_name(f"{LINK}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    os.replace(link, target.with_name(LINK))
    _force(target.parent)


def newest_whole(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written; None when the run has none yet.

    Args:
        say: is told of each damaged checkpoint that is passed over.

    Raises:
        ValueError: there are checkpoints and all are damaged.
    """
    paths = _checkpoints(directory)
    for path in reversed(paths):
        damage = _damage(path)
        if damage is None:
            return path
        say(f"{path} is damaged ({damage}); taking the one before it")
    if paths:
        raise ValueError(f"[resume] every checkpoint of {directory} is damaged: remove them to start from step 0")
    return None


def load_state(path: Path) -> dict[str, Any]:
    """What `save` was given as state."""
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def generator_states() -> dict[str, Any]:
    """Of python, numpy and torch, in types that torch.load takes without running code."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, numpy.asarray(keys).tolist(), *rest),
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


def are_finite(weights: Iterable[Tensor]) -> bool:
    """Of the shares that this process has."""
    return all(bool(local(weight).isfinite().all()) for weight in weights)


def fingerprint(model: nn.Module) -> list[int]:
    """A number per parameter that another start model would hardly share: the sum of its bits, read as integers."""
    return [int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters()]


def _write(
    beside: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    weights: dict[str, Any] | None,
) -> None:
    model.save_pretrained(beside, state_dict=weights)  # type: ignore[operator]
    tokenizer.save_pretrained(beside)
    torch.save(state, beside / STATE)
    files = sorted(path for path in beside.rglob("*") if path.is_file())
    for path in files:
        _force(path)
    sums = {str(path.relative_to(beside)): [path.stat().st_size, _checksum(path)] for path in files}
    write_text(beside / MANIFEST, json.dumps(sums, indent=2) + "\n")


def _checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in directory.glob(f"{LINK}-*") if re.fullmatch(rf"{LINK}-\d+", path.name))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files."""
    try:
        for name, (size, checksum) in json.loads((path / MANIFEST).read_text()).items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, {size} were written"
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
    """Takes the name away first, so that no half of a checkpoint ever has it."""
    beside = path.with_name(path.name + ".old.tmp")
    os.replace(path, beside)
    shutil.rmtree(beside)


def _force(path: Path) -> None:
    """Waits until a file's contents, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
