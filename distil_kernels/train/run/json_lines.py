"""Records of a run as JSON lines: metrics.jsonl and rollouts.jsonl are written, read and taken back here.

Records are appended and forced to the disk; a last line that a kill cut short is left out when the file is read, and so
is a damaged one, which is said. A resumed run takes back the records of steps after its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distil_kernels.train.run.directory import WriteError, write_text

Record = dict[str, Any]


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


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


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


def read_lines(path: Path, warn: Callable[[str], None] = _to_stderr) -> list[Record]:
    """Returns the records of a .jsonl file; none of a missing file.

    A last line that was cut short in writing is left out.

    Args:
        warn: is called with a sentence about each damaged line, which is left out too.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            warn(f"{path}, line {number} is damaged and left out: {line[:40].decode(errors='replace')!r}")
    return records


def drop_after(directory: Path, step: int, warn: Callable[[str], None] = _to_stderr) -> list[Record]:
    """Drops a run's records of later steps, which a resumed run takes again, and returns the others of metrics.jsonl.

    Rollouts of an evaluation that has no record in metrics.jsonl was cut short by a kill, and are dropped too.
    """
    metrics = _filter_lines(directory / "metrics.jsonl", lambda record: record["step"] <= step, warn)
    last_step = {"training": step, "held_out": min(step, last_evaluation(metrics))}
    _filter_lines(
        directory / "rollouts.jsonl", lambda record: record["step"] <= last_step.get(record["kind"], -1), warn
    )
    return with_nan(metrics)


def last_evaluation(metrics: Iterable[Record]) -> int:
    """Returns the step of the last evaluation among records of metrics.jsonl; -1 before the first."""
    return max((record["step"] for record in metrics if record["kind"] == "evaluation"), default=-1)


def _filter_lines(path: Path, keep: Callable[[Record], bool], warn: Callable[[str], None]) -> list[Record]:
    """Drops the records of a file for which `keep` is false, and returns the others."""
    records = [record for record in read_lines(path, warn) if keep(record)]
    write_text(path, "".join(json_line(record) + "\n" for record in records))
    return records


def _record(line: bytes) -> Record | None:
    """Returns the record of a line; None where the line is none: every record names its kind and its step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int)
    return record if is_record else None
