"""A run directory: which files it has, and how a file is replaced in one step.

    runs/<name>/config.json             every option of the run
                metrics.jsonl           one record per step and per evaluation
                rollouts.jsonl          one record per rollout
                plot.svg, report.html   the curves of metrics.jsonl; all of the run as a page
                checkpoint-<step>/      what `checkpoint` writes
                checkpoint              link to the newest of them
                lock                    what `lock` writes while the run lives

A file is replaced in one step: written under another name, forced to the disk, renamed. How records are appended and
taken back is in `json_lines`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

from distil_kernels.train.run.lock import RunLock


class WriteError(OSError):
    """A file could not be written (a full disk, say); the checkpoints before it are untouched."""


def is_run(directory: Path) -> bool:
    """Returns whether the directory has the config.json of a run, or a run's records beside a damaged one.

    A model's directory has a config.json of another kind.
    """
    if (directory / "metrics.jsonl").exists():
        return True
    try:
        return "rollouts_per_prompt" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def make(directory: Path, config: str, replaced: RunLock | None = None) -> RunLock:
    """Makes a run directory with the text of its config.json, and returns its lock.

    A kill leaves the old run, the new run, or for a moment the old run alone, as .<name>.new/old.tmp.

    Args:
        replaced: the lock of a run of the same name, which is deleted once the new one has its place.

    Raises:
        ValueError: another process is making the directory, or has made it.
    """
    new = directory.with_name(f".{directory.name}.new")
    new.mkdir(parents=True, exist_ok=True)
    lock = RunLock(new, "name")
    try:
        write_text(new / "config.json", config)
        if replaced is not None:
            os.replace(directory, new / "old.tmp")
        os.replace(new, directory)
    except OSError as error:
        lock.release()
        if replaced is not None or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(new)
        raise ValueError(f"[name] {directory} was made by another process meanwhile: choose another --name") from None
    lock.moved(directory)
    force_to_disk(directory.parent)
    if replaced is not None:
        replaced.release()
    remove_leftovers(directory)
    return lock


def remove_leftovers(directory: Path) -> None:
    """Removes what writes and removals that a kill cut short have left in a run directory."""
    for path in directory.glob("*.tmp*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_text(path: Path, text: str, is_forced: bool = True) -> None:
    """Replaces a file in one step.

    Args:
        is_forced: waits until it is on the disk. What can be made again from other files need not be.

    Raises:
        WriteError: the disk did not take it; the file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        if is_forced:
            force_to_disk(temporary)
        os.replace(temporary, path)
        if is_forced:
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
