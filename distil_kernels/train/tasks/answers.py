"""Records with one right answer: any question, multiple choice, mathematics.

qa        question, answer, or a list of right ones      right where the words are the same, in any case and spacing
science   question, choices {label, text}, answerKey     SciKnowEval, ARC
          question, options, answer                      MMLU-Pro
          Question, Correct Answer, Incorrect Answer 1   GPQA; its choices in an order that the question decides
math      problem or question, answer or solution        MATH, AIME, HMMT, GSM8K, in any case of the fields' names

An answer's last statement counts: the last box, what follows GSM8K's ####, what is last said to be the answer.
"""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from typing import NamedTuple

from distil_kernels.train.tasks.expressions import is_equal
from distil_kernels.train.tasks.problem import Problem
from distil_kernels.train.tasks.records import NotJudgeable, Record, Records, as_text, right_answers, text_field


class Questions(Records):
    """Any questions with a right answer each, or several: a correction shows the first."""

    def __init__(self, path: Path, seed: int, skips_bad: bool = False) -> None:
        super().__init__(path, self._read, seed, skips_bad)

    @staticmethod
    def _read(record: Record) -> Problem:
        question, answers = text_field(record, "question"), right_answers(record, "answer")
        right = tuple(after_marker(answer) for answer in answers)
        if not all(map(_plain, right)):
            raise NotJudgeable("answer is empty")
        return Problem(question, answers[0], entry=right, key=question)

    def score(self, answer: str, entry: tuple[str, ...]) -> float:
        return float(not {_plain(answer), _plain(after_marker(answer))}.isdisjoint(map(_plain, entry)))


def after_marker(text: str) -> str:
    """What follows the last #### of a text, or the text."""
    return text.rpartition("####")[2].strip()


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


# --- multiple choice


class Choices(NamedTuple):
    """What an answer to a multiple-choice question is judged by."""

    right: str
    """The label of the right one."""
    texts: dict[str, str]
    """Text of each choice by its label."""


class MultipleChoice(Records):
    """Questions whose answer is the letter of a choice."""

    def __init__(self, path: Path, seed: int, skips_bad: bool = False) -> None:
        super().__init__(path, self._read, seed, skips_bad)

    @staticmethod
    def _read(record: Record) -> Problem:
        text, choices = _choices(record)
        if not choices.texts:  # SciKnowEval's other types of questions
            raise NotJudgeable(f"no choices to choose from (type {record.get('type')})")
        if not choices.right:
            raise NotJudgeable("answerKey is empty")
        if choices.right not in choices.texts:
            raise ValueError(f"answerKey is {choices.right!r}, expected one of {', '.join(choices.texts)}")
        lines = "\n".join(f"{label}. {choice}" for label, choice in choices.texts.items())
        question = f"{text}\n{lines}"
        return Problem(question, choices.right, entry=choices, key=question)

    def score(self, answer: str, entry: Choices) -> float:
        return float(chosen(answer, entry.texts) == entry.right)


def _choices(record: Record) -> tuple[str, Choices]:
    if "Correct Answer" in record:
        question, right = text_field(record, "Question"), text_field(record, "Correct Answer").strip()
        wrong = [text_field(record, name).strip() for name in record if name.startswith("Incorrect Answer")]
        options = list(dict.fromkeys([right, *wrong]))
        random.Random(question).shuffle(options)
        texts = dict(zip("ABCDEFGHIJ", options, strict=False))
        return question.strip(), Choices("ABCDEFGHIJ"[options.index(right)], texts)
    if "options" in record:
        options = [as_text(option, "an option").strip() for option in record["options"]]
        options = [option for option in options if option != "N/A"]
        texts = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False))
        return text_field(record, "question"), Choices(str(record.get("answer") or "").strip(), texts)
    if not isinstance(record["choices"], dict) or not all(
        isinstance(record["choices"].get(name), list) for name in ("label", "text")
    ):
        raise ValueError("choices is no object with lists label and text")
    labels, options = ([as_text(item, "choices") for item in record["choices"][name]] for name in ("label", "text"))
    texts = dict(zip(labels, options, strict=True))
    return text_field(record, "question"), Choices(str(record["answerKey"] or "").strip(), texts)


def chosen(answer: str, texts: dict[str, str]) -> str:
    """The label that an answer settles on, by the first of these that it has; empty where it has none.

    Its last box; what it last says the answer is; the whole of it; its beginning, where that is set apart; its last
    line; a choice that it last names ("option B").
    """
    answer = re.sub(r"[*_`]{1,3}", "", answer).strip()
    box = last_box(answer)
    if box is not None:
        return _label(box, texts)
    stated = re.findall(
        r"(?is)\banswer\b(?:\s+is)?\s*(?::|=|\bis\b|\bwould be\b)?\s*(?:option\s+|choice\s+)?(.*?)(?=\banswer\b|\Z)",
        answer,
    )
    for statement in reversed(stated):
        label = _label(statement.split("\n")[0] or statement.strip().split("\n")[0], texts)
        if label:
            return label
    lines = [line for line in answer.splitlines() if line.strip()]
    for text in (answer, *lines[:1], *lines[-1:]):
        label = _label(text, texts)
        if label:
            return label
    letters = "|".join(map(re.escape, texts))
    named = re.findall(rf"(?i:option|choice)\s+\(?({letters})\b", answer)
    return named[-1] if named else ""


def _label(text: str, texts: dict[str, str]) -> str:
    """The label that a text is, or begins with and sets apart; or that of the choice whose text it is."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*{([^{}]*)}", r"\1", text).strip().strip("$").strip()
    plain = _plain(text).strip(" '\"")
    by_text = [label for label, choice in texts.items() if plain and plain == _plain(choice).strip(" '\"")]
    if len(by_text) == 1 and not (len(plain) == 1 and plain.upper() in texts):
        return by_text[0]
    letters = "|".join(map(re.escape, texts))
    patterns = (
        rf"[\s(\[]*({letters})[\s)\].:,;!]*\Z",  # alone
        rf"\s*[(\[]({letters})[)\]]",  # (B) ...
        rf"\s*({letters})[).:](?!\w)",  # B. ... and B) ...
    )
    for pattern in patterns:
        match = re.match(pattern, text, re.IGNORECASE)
        if match:
            return next(label for label in texts if label.casefold() == match[1].casefold())
    # B, because ...: a capital, and no article before a noun.
    match = re.match(rf"\s*({letters})(?=\s*[,;\n-]|\s+(?:because|since|as|and|with|for)\b)", text)
    return match[1] if match else ""


# --- mathematics


class Mathematics(Records):
    """Problems whose answers are expressions, compared as mathematics by the package math-verify.

    Raises:
        ValueError: as Records, or math-verify is missing.
    """

    def __init__(self, path: Path, seed: int, skips_bad: bool = False) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("[task] math tasks need the package: pip install math-verify")
        super().__init__(path, self._read, seed, skips_bad)

    @staticmethod
    def _read(record: Record) -> Problem:
        record = {name.lower(): value for name, value in record.items()}
        question = text_field(record, "problem", "question")
        answer = after_marker(boxed(text_field(record, "answer", "solution")))
        if not normal(answer):
            raise NotJudgeable("answer is empty")
        return Problem(question, answer, entry=answer, key=question)

    def score(self, answer: str, entry: str) -> float:
        return float(answer == entry or is_same(entry, final_answer(answer)))


def boxed(text: str) -> str:
    """What stands in the last \\boxed{...} of a text, or the text.

    Raises:
        ValueError: that box is not closed.
    """
    begin = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if begin < 0:
        return text.strip()
    content = _braced(text, text.index("{", begin))
    if content is None:
        raise ValueError(f"\\boxed is not closed in {text[begin : begin + 40]!r}")
    return content


def last_box(text: str) -> str | None:
    """What stands in the last box of a text that is closed; None where there is none."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))):
        if text[match.end() : match.end() + 1] == "{":
            content = _braced(text, match.end())
            if content is not None:
                return content
        elif bare := re.match(r"[^\s$.,;{}\\]+", text[match.end() :]):  # \boxed 42
            return bare[0]
    return None


def _braced(text: str, begin: int) -> str | None:
    """What stands between the brace at `begin` and the one that closes it."""
    depth = 0
    for end in range(begin, len(text)):
        is_escaped = end > 0 and text[end - 1] == "\\"
        depth += 0 if is_escaped else {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin + 1 : end].strip()
    return None


def final_answer(text: str) -> str:
    """The last box of an answer; else what follows ####; else what is last said to be the answer; else all of it."""
    box = last_box(text)
    if box is not None:
        return box
    if "####" in text:
        return after_marker(text).split("\n")[0]
    stated = re.findall(r"(?i)\banswer\s*(?:is|:|=)\s*:?\s*(.+?)\s*(?:\.\s|\.?$|\n)", text, re.MULTILINE)
    return stated[-1] if stated else text


def is_same(right: str, found: str) -> bool:
    """Whether two answers are the same: as text once their writing is made alike, or as mathematics.

    What math-verify does not tell apart is told apart here: intervals, tuples and sets; lists of different lengths; one
    quantity of several ("5 minutes 30 seconds") and a part of it.
    """
    right, found = normal(right), normal(found)
    if not (right and found):
        return False
    if right == found or (_is_words(right) and _is_words(found) and right.casefold() == found.casefold()):
        return True
    if _is_words(right) or _shape(right) != _shape(found) or _has_parts(right) or _has_parts(found):
        return False
    return is_equal(f"\\boxed{{{right}}}", f"\\boxed{{{found}}}")


_ALIKE = (
    (r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![a-zA-Z])\s*", ""),
    (r"\\[!;:>]|(?<!\\)~", ""),
    (r"(?<=\d)\\,(?=\d)|(?<=\d){,}(?=\d)", ""),  # 10\,000 and 1{,}234
    (r"\\[, ]", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\dbinom|\\tbinom", r"\\binom"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*{\s*(?:or|and)\s*}", ","),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*{([^{}]*)}", r" \1 "),
    (r"\s+(?:or|and)\s+", ","),
    (r"\^\s*{?\s*\\circ\s*}?|\\degree|°", ""),
    (r"\\?\$", ""),
    (r"(?<!\\)%", r"\\%"),
    (r"\b(\d{1,3})((?:,\d{3})+)\b(?![\d,)\]}])", lambda match: match[0].replace(",", "")),  # 1,234
    ("\u2212", "-"),  # the sign
    (r"(?<![\d])\.(?=\d)", "0."),
    (r"\s*,[\s,]*", ","),  # 1, 2, and 3
    (r"\s+", " "),
)
_WITH_UNIT = re.compile(
    r"(-?[\d.,/]+|-?\d*\s*\\frac\s*{[^{}]*}\s*{[^{}]*})\s+(?!.*(?:illion|thousand|hundred|dozen))"
    r"[A-Za-z][A-Za-z. ]*[A-Za-z.](?:\s*\^\s*{?\d}?)?$"
)
"""A number and the words after it: public graders count the number alone, and so does math-verify."""


def normal(text: str) -> str:
    """An answer in one way of writing: without signs of currency, degrees, spaces and sizes of brackets."""
    text = text.strip().removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    is_list = bool(re.match(r"\s*(?:\$|\\left)?\s*(?:[(\[]|\\{)", text))
    for pattern, by in _ALIKE:
        if not (is_list and pattern.startswith(r"\b(\d{1,3})")):  # (1,234) is a pair
            text = re.sub(pattern, by, text)  # type: ignore[arg-type]
    text = re.sub(r"^([*_]+)(.+)\1$", r"\2", text.strip())  # **emphasis**
    text = text.strip().rstrip(".,;").strip()
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # a choice
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in(?![a-z]))\s*", "", text).strip()  # x = 5
    text = re.sub(r"^\\pm\s*([^,]+)$", r"\1,-\1", text)
    amount = _WITH_UNIT.match(text)
    return amount[1] if amount else text


def _is_words(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z' ,-]*[A-Za-z]", text)) and len(re.sub(r"[^A-Za-z]", "", text)) > 2


def _shape(text: str) -> tuple[str, int]:
    """Brackets of a tuple, an interval or a set, and the number of things in a list."""
    depth, commas, unions = 0, 0, 0
    first, last = (text[:2] if text.startswith("\\{") else text[:1]), text[-1:]
    for index, letter in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        is_outermost = depth == 0 or (depth == 1 and first in ("(", "[", "\\{"))
        commas += letter == "," and is_outermost
        unions += text.startswith(("\\cup", "\\cap"), index)
    if unions or "matrix}" in text:
        return "", unions
    is_bracketed = commas and first in ("(", "[") and last in (")", "]")
    return (first + last if is_bracketed else ""), commas


def _has_parts(text: str) -> bool:
    """Whether words stand between numbers."""
    return bool(re.search(r"\d[^\d,]*(?<![a-zA-Z\\])[a-zA-Z]{3,}[^\d,]*\d", re.sub(r"\\[a-zA-Z]+", "", text)))
