"""Records with one right answer: any question, multiple choice, mathematics.

qa        question, answer                               right where the words are the same, in any case and spacing
science   question, choices {label, text}, answerKey     SciKnowEval's own format; right where the letter is
math      problem or question, answer or solution        right where math-verify says so, or the words are the same;
                                                         answers in \\boxed{} or plain
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from distil_kernels.train.tasks.expressions import is_equal
from distil_kernels.train.tasks.problem import Problem
from distil_kernels.train.tasks.records import Record, Records, text_field


class Questions(Records):
    """Any questions with an answer each."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__(path, self._read, seed)

    @staticmethod
    def _read(record: Record) -> Problem:
        question, answer = text_field(record, "question"), text_field(record, "answer")
        return Problem(question, answer, entry=answer, key=question)

    def score(self, answer: str, entry: str) -> float:
        return float(_plain(answer) == _plain(entry))


class MultipleChoice(Records):
    """Questions whose answer is the letter of a choice."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__(path, self._read, seed)

    @staticmethod
    def _read(record: Record) -> Problem:
        choices = dict(zip(record["choices"]["label"], record["choices"]["text"], strict=True))
        right = str(record["answerKey"]).strip()
        if right not in choices:
            raise ValueError(f"answerKey is {right!r}, expected one of {', '.join(choices)}")
        lines = "\n".join(f"{label}. {text}" for label, text in choices.items())
        question = f"{record['question']}\n{lines}"
        return Problem(question, right, entry=(right, tuple(choices)), key=question)

    def score(self, answer: str, entry: tuple[str, tuple[str, ...]]) -> float:
        """The letter that an answer begins with and sets apart, or else the last that it calls its answer."""
        right, labels = entry
        letter = "|".join(map(re.escape, labels))
        first = re.match(rf"\W*({letter})\W*?(?:[.):,]|\Z|\n)", answer)
        named = re.findall(rf"(?i:answer|option|choice)\W+(?:is\W+)?\(?({letter})\b|\\boxed{{({letter})}}", answer)
        chosen = first[1] if first else next((a or b for a, b in reversed(named)), "")
        return float(chosen == right)


class Mathematics(Records):
    """Problems whose answers are expressions, compared as mathematics by the package math-verify.

    Raises:
        ValueError: as Records, or math-verify is missing.
    """

    def __init__(self, path: Path, seed: int) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("[task] math tasks need the package: pip install math-verify")
        super().__init__(path, self._read, seed)

    @staticmethod
    def _read(record: Record) -> Problem:
        question = text_field(record, "problem", "question")
        answer = boxed(text_field(record, "answer", "solution"))
        return Problem(question, answer, entry=answer, key=question)

    def score(self, answer: str, entry: str) -> float:
        if answer and answer == entry:
            return 1.0
        found = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
        return float(is_equal(f"\\boxed{{{entry}}}", found))


def boxed(text: str) -> str:
    """What stands in the last \\boxed{...} of a text, or the text."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return text.strip()
    depth, start = 0, begin + len("\\boxed{")
    for end in range(start - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    raise ValueError(f"\\boxed is not closed in {text[begin : begin + 40]!r}")


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")
