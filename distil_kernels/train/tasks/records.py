"""Problems from the lines of a JSON Lines file: a file of the user's, or the small one that comes with a domain."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distil_kernels.train.tasks.problem import Problem

DATA = Path(__file__).parent / "data"

Record = dict[str, Any]


class Records:
    """All problems of a file in an order of its own for each pass over it.

    Args:
        path: file of JSON objects, one a line.
        read: makes a problem of a record; a KeyError, TypeError or ValueError says that it cannot.

    Raises:
        ValueError: the file cannot be read or has a line that is no such record; names file and line.
    """

    def __init__(self, path: Path, read: Callable[[Record], Problem], seed: int) -> None:
        self._seed, self._problems = seed, []
        self._pass: tuple[int, list[int]] = (-1, [])
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"[task] cannot read {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                self._problems.append(read(json.loads(line)))
            except KeyError as error:
                raise ValueError(f"[task] {path}, line {number}: the field {error} is missing") from error
            except (TypeError, ValueError) as error:
                raise ValueError(f"[task] {path}, line {number}: {error}") from error
        if not self._problems:
            raise ValueError(f"[task] {path} holds no records")

    def problem(self, index: int) -> Problem:
        """Pass after pass, each in its own order."""
        turn, place = divmod(index, len(self._problems))
        if turn != self._pass[0]:  # 24 ms at 100,000 records
            order = list(range(len(self._problems)))
            random.Random(f"{self._seed}/{turn}").shuffle(order)
            self._pass = turn, order
        return self._problems[self._pass[1][place]]


def text_field(record: Record, *names: str) -> str:
    """The first of some fields that is there, as text.

    Raises:
        KeyError: none is there.
    """
    for name in names:
        if record.get(name) is not None:
            return str(record[name])
    raise KeyError(" or ".join(names))
