"""A run directory: which files it has, and how its JSON lines are written, read and taken back.

    runs/<name>/config.json             every option of the run
                metrics.jsonl           one record per step and per evaluation
                rollouts.jsonl          one record per rollout
                plot.svg                the curves of metrics.jsonl
                checkpoint-<step>/      what `checkpoint` writes
                checkpoint              link to the newest of them

A file is replaced in one step: written under another name, forced to the disk, renamed. Records are appended and forced
to the disk; a last line that a kill cut short is left out when the file is read. A resumed run takes back the records
of steps after its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


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
    """Replaces a file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    force_to_disk(temporary)
    os.replace(temporary, path)
    force_to_disk(path.parent)


def force_to_disk(path: Path) -> None:
    """Waits until the contents of a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_line(record: Record) -> str:
    """Returns the record as one line of JSON, which has no NaN and no infinity: null takes their place."""
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None))


def with_nan(value: Any) -> Any:
    """Returns nested records with NaN for each null: the inverse of `json_line` where a number is not known."""
    if isinstance(value, dict):
        return {name: with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


def append_lines(path: Path, records: Iterable[Record]) -> None:
    """Appends records to a .jsonl file and waits until they are on the disk.

    Raises:
        WriteError: the disk did not take them.
    """
    try:
        with path.open("a") as file:
            file.writelines(json_line(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        cure = f"the run is as of its last checkpoint, from which --resume {path.parent} goes on"
        raise WriteError(f"cannot write {path}: {error.strerror}; {cure}") from error


def read_lines(path: Path) -> list[Record]:
    """Returns the records of a .jsonl file up to a line that was cut short in writing; none of a missing file."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def drop_after(directory: Path, step: int) -> list[Record]:
    """Drops a run's records of later steps, which a resumed run takes again, and returns the others of metrics.jsonl.

    Rollouts of an evaluation that has no record in metrics.jsonl was cut short by a kill, and are dropped too.
    """
    metrics = _filter_lines(directory / "metrics.jsonl", lambda record: record["step"] <= step)
    last_step = {"training": step, "held_out": min(step, last_evaluation(metrics))}
    _filter_lines(directory / "rollouts.jsonl", lambda record: record["step"] <= last_step[record["kind"]])
    return with_nan(metrics)


def last_evaluation(metrics: Iterable[Record]) -> int:
    """Returns the step of the last evaluation among records of metrics.jsonl; -1 before the first."""
    return max((record["step"] for record in metrics if record["kind"] == "evaluation"), default=-1)


def _filter_lines(path: Path, keep: Callable[[Record], bool]) -> list[Record]:
    """Drops the records of a file for which `keep` is false, and returns the others."""
    records = [record for record in read_lines(path) if keep(record)]
    write_text(path, "".join(json_line(record) + "\n" for record in records))
    return records
