"""Problems from the records of a file, a JSON object a line or one array of them: the user's, or the small one of a
domain.

Every record is read at the start. One that cannot be used (no object, a field that is missing or no text, nothing to
judge an answer by) is named with its place in the file; the file is refused, or such records are left out if so asked.

A field's text may also be a number, or the messages of a chat that ask one question.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distil_kernels.train.tasks.problem import Problem

_Records = TypeVar("_Records", bound="Records")

DATA = Path(__file__).parent / "data"
NUM_NAMED = 5
"""Records that a message names; the command check names all."""
LARGE = 4_000_000
"""Bytes of a file from which on reading it shows its progress."""

Record = dict[str, Any]
Entry = tuple[str, Callable[[], Any]]
"""A record's place in its file, and the function that parses it."""


class NotJudgeable(ValueError):
    """A record by which no answer can be judged, with the reason."""


class Records:
    """All problems of a file in an order of its own for each pass over it.

    Args:
        path: file of JSON objects, one a line or all in one array.
        read: makes a problem of a record; whatever it raises says why the record cannot be used.
        skips_bad: such records are left out with a warning.

    Raises:
        ValueError: the file cannot be read, has no record that can be used, or, unless it `skips_bad`, one that
            cannot; names file and line.
    """

    def __init__(self, path: Path, read: Callable[[Record], Problem], seed: int, skips_bad: bool = False) -> None:
        self._seed = seed
        self._problems: list[Problem] = []
        self._pass: tuple[int, list[int]] = (-1, [])
        self.places: list[str] = []
        """Of each problem, in the file's order: its line, or its number in the array."""
        self.left_out: list[str] = []
        """Places of records that cannot be used, with the reason."""
        for place, parse in _with_progress(_entries(path), path):
            try:
                self._problems.append(_checked(read(_as_record(parse()))))
                self.places.append(place)
            except Exception as error:  # a record is anything, and so is what a reader stumbles over
                self.left_out.append(f"{place}: {_reason(error)}")
        if not (self._problems or self.left_out):
            raise ValueError(f"[task] {path} holds no records")
        if self.left_out and not (skips_bad and self._problems):
            cure = "--skip_bad_records leaves them out" if self._problems else "no record of it can be used"
            raise ValueError(f"[task] {path}, {self._named()}; {cure}")
        if self.left_out:
            warnings.warn(f"{path}: {self._named()}; they are left out", stacklevel=3)

    def _named(self) -> str:
        num_bad, more = len(self.left_out), ["..."] if len(self.left_out) > NUM_NAMED else []
        named = "; ".join(self.left_out[:NUM_NAMED] + more)
        return f"{named}; {num_bad} of {len(self._problems) + num_bad} records cannot be used"

    def with_seed(self: _Records, seed: int) -> _Records:
        """Returns the same problems in the orders of another seed; nothing is read again."""
        other = copy.copy(self)
        other._seed, other._pass = seed, (-1, [])
        return other

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


# --- a file's records


def _entries(path: Path) -> list[Entry]:
    """Returns the records of a file; lines end at "\\n" alone, since JSON's texts may hold every other end of line."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"[task] cannot read {path}: {error.strerror}") from error
    if content.lstrip().startswith(b"["):
        try:
            return [(f"record {number}", partial(_same, item)) for number, item in enumerate(json.loads(content), 1)]
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Extra data"):  # a line that is a list
                raise ValueError(f"[task] {path} begins like a JSON array and is none: {_reason(error)}") from error
    lines = enumerate(content.split(b"\n"), 1)
    return [(f"line {number}", partial(_parsed, line)) for number, line in lines if line.strip()]


def _same(item: Any) -> Any:
    return item


def _parsed(line: bytes) -> Any:
    return json.loads(line.decode())  # given bytes, json guesses the encoding


def _with_progress(entries: Sequence[Entry], path: Path) -> Iterator[Entry]:
    """Yields the entries; the records of a large file under a bar, where there is a terminal."""
    if not entries or path.stat().st_size < LARGE or os.environ.get("RANK", "0") != "0":
        yield from entries
        return
    from rich.console import Console  # late: small files need none of it
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(entries, f"reading {path.name}", console=console, transient=True, disable=not console.is_terminal)


def _as_record(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{_kind(value)}, expected an object with the fields of a record")
    return value


def _checked(problem: Problem) -> Problem:
    """Returns a problem whose texts a tokenizer takes."""
    if not problem.question.strip():
        raise ValueError("the question is empty")
    for name, text in (("question", problem.question), ("answer", problem.answer), ("key", problem.key)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} holds half of a surrogate pair, {text[error.start]!r}, expected text") from None
    return problem


def _reason(error: Exception) -> str:
    """Returns why a record cannot be used, in one line."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8 at byte {error.start + 1}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if isinstance(error, ValueError) else f"no such record ({type(error).__name__}: {text})"


# --- a record's fields


def text_field(record: Record, *names: str) -> str:
    """Returns the first of some fields that is there, as text.

    Raises:
        KeyError: none is there.
        ValueError: it is no text.
    """
    for name in names:
        if record.get(name) is not None:
            return as_text(record[name], name)
    raise KeyError(" or ".join(names))


def right_answers(record: Record, name: str) -> tuple[str, ...]:
    """Returns the answers of a field that is one right answer or a list of them.

    Raises:
        KeyError, ValueError: as `text_field`.
    """
    value = record.get(name)
    if isinstance(value, list) and value and not _are_messages(value):
        return tuple(as_text(item, name) for item in value)
    return (text_field(record, name),)


def as_text(value: Any, name: str) -> str:
    """Returns the text of a field's value: a text, a number, or messages of a chat.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str):
        return value
    if _is_number(value):
        return str(value)
    if _are_messages(value):
        return _text_of_messages(value, name)
    raise ValueError(f"{name} is {_kind(value)}, expected text")


def _is_number(value: Any) -> bool:
    is_finite_float = isinstance(value, float) and math.isfinite(value)
    return is_finite_float or (isinstance(value, int) and not isinstance(value, bool))


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value)
    )


def _text_of_messages(messages: Sequence[Record], name: str) -> str:
    """Returns the text of one message, or of a system message and the user's that it introduces."""
    roles = [message["role"] for message in messages]
    if len(messages) > 1 and roles not in (["system", "user"], ["developer", "user"]):
        turns = ", ".join(map(str, roles))
        raise ValueError(f"{name} is a chat ({turns}), expected one message, perhaps after a system message")
    texts = [_text_of_content(message["content"], name) for message in messages]
    return "\n\n".join(text for text in texts if text)


def _text_of_content(content: Any, name: str) -> str:
    """Returns the text of a message's content, which may be a list of parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) and part.get("type") != "text" else "a message"
            raise ValueError(f"{name} has {kind} without text, expected text")
    return "".join(part["text"] for part in parts)


def _kind(value: Any) -> str:
    """Returns what a value of JSON is, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return "a number" if _is_number(value) else "no finite number"
    words: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return words.get(type(value), type(value).__name__)
