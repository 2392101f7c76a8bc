"""Problems from the lines of a JSON Lines file: a file of the user's, or the small one that comes with a domain.

A record that cannot be judged (no tests, no right answer) is left out, counted and named; one that is no record of the
domain at all is an error.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distil_kernels.train.tasks.problem import Problem

DATA = Path(__file__).parent / "data"

Record = dict[str, Any]


class NotJudgeable(ValueError):
    """A record by which no answer can be judged, with the reason."""


class Records:
    """All problems of a file in an order of its own for each pass over it.

    Args:
        path: file of JSON objects, one a line.
        read: makes a problem of a record; NotJudgeable leaves it out, a KeyError, TypeError or other ValueError says
            that it is no such record.

    Raises:
        ValueError: the file cannot be read, has a line that is no such record, or none by which an answer can be
            judged; names file and line.
    """

    def __init__(self, path: Path, read: Callable[[Record], Problem], seed: int) -> None:
        self._seed = seed
        self._problems: list[Problem] = []
        self._pass: tuple[int, list[int]] = (-1, [])
        self.line_numbers: list[int] = []
        """Of each problem, in the file's order."""
        self.left_out: list[str] = []
        """Lines that cannot be judged, with the reason."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"[task] cannot read {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                self._problems.append(read(json.loads(line)))
                self.line_numbers.append(number)
            except NotJudgeable as error:
                self.left_out.append(f"line {number}: {error}")
            except KeyError as error:
                raise ValueError(f"[task] {path}, line {number}: the field {error} is missing") from error
            except (TypeError, ValueError) as error:
                raise ValueError(f"[task] {path}, line {number}: {error}") from error
        if not self._problems and self.left_out:
            others = f" (and {len(self.left_out) - 1} more)" if len(self.left_out) > 1 else ""
            raise ValueError(f"[task] {path}, {self.left_out[0]}{others}; no record of it can be judged")
        if not self._problems:
            raise ValueError(f"[task] {path} holds no records")
        if self.left_out:
            named = "; ".join(self.left_out[:5]) + ("; ..." if len(self.left_out) > 5 else "")
            num_records = len(self._problems) + len(self.left_out)
            warnings.warn(
                f"{path}: {len(self.left_out)} of {num_records} records cannot be judged and are left out ({named})",
                stacklevel=3,
            )

    @property
    def all_problems(self) -> Sequence[Problem]:
        """Every problem of the file once, in the file's order."""
        return tuple(self._problems)

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
