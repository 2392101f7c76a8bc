"""A run directory: which files it has, and how a file is replaced in one step.

    runs/<name>/config.json             every option of the run
                metrics.jsonl           one record per step and per evaluation
                rollouts.jsonl          one record per rollout
                plot.svg                the curves of metrics.jsonl
                checkpoint-<step>/      what `checkpoint` writes
                checkpoint              link to the newest of them

A file is replaced in one step: written under another name, forced to the disk, renamed. How records are appended and
taken back is in `json_lines`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


class WriteError(OSError):
    """A file could not be written (a full disk, say); the checkpoints before it are untouched."""


def is_run(directory: Path) -> bool:
    """Returns whether the directory has the config.json of a run; a model's directory has one of another kind."""
    try:
        return "rollouts_per_prompt" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False


def make(directory: Path, config: str, replaces: bool = False) -> None:
    """Makes a run directory with the text of its config.json.

    A kill leaves the old run, the new run, or for a moment the old run alone, as .<name>.new/old.tmp.

    Args:
        replaces: a run of the same name is deleted, once the new one has its place.
    """
    new = directory.with_name(f".{directory.name}.new")
    new.mkdir(parents=True, exist_ok=True)
    write_text(new / "config.json", config)
    if replaces and directory.exists():
        os.replace(directory, new / "old.tmp")
    os.replace(new, directory)
    force_to_disk(directory.parent)
    remove_leftovers(directory)


def remove_leftovers(directory: Path) -> None:
    """Removes what writes and removals that a kill cut short have left in a run directory."""
    for path in directory.glob("*.tmp*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step.

    Raises:
        WriteError: the disk did not take it; the file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        force_to_disk(temporary)
        os.replace(temporary, path)
        force_to_disk(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from error


def force_to_disk(path: Path) -> None:
    """Waits until the contents of a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
