"""Files of records: how they are divided, what a field may be, and what is said of records that cannot be used."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distil_kernels.train.__main__ import main
from distil_kernels.train.tasks import Problem, make_task, records, with_seed

GOOD = {"question": "2+2?", "answer": "4"}


def written(path: Path, *lines: Any, encoding: str = "utf-8") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes("\n".join(texts).encode(encoding, "surrogatepass"))
    return path


def problems(path: Path, domain: str = "qa") -> tuple[Problem, ...]:
    return make_task(f"{domain}:{path}", seed=0).all_problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.jsonl"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_record(file: Path, separator: str) -> None:
    question = f"one{separator}two"
    text = question if separator > "\x1f" else json.dumps(question)[1:-1]
    written(file, f'{{"question": "{text}", "answer": "4"}}\r', "", GOOD)
    assert [problem.question for problem in problems(file)] == [question, "2+2?"]


def test_a_byte_order_mark_is_no_text(file: Path) -> None:
    assert len(problems(written(file, GOOD, encoding="utf-8-sig"))) == 1


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_a_file_of_records_too(file: Path, indent: int | None) -> None:
    file.write_text("\n " + json.dumps([GOOD, GOOD | {"question": "3+1?"}], indent=indent) + "\n")
    assert [problem.question for problem in problems(file)] == ["2+2?", "3+1?"]
    file.write_text(json.dumps([GOOD, 3]))
    with pytest.raises(ValueError, match=r"mine.jsonl, record 2: a number, expected an object"):
        problems(file)
    file.write_text(json.dumps([GOOD, 3], indent=2)[:-1])
    with pytest.raises(ValueError, match=r"\[task\] .*mine.jsonl begins like a JSON array and is none: .* line 7"):
        problems(file)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7", "a number, expected an object with the fields of a record"),
        ("[1]", "a list, expected an object"),
        ('"text"', "a text, expected an object"),
        ("null", "null, expected an object"),
        ('{"question": "?"', "Expecting ',' delimiter"),
        ("[" * 100_000, "nested too deeply"),
        ({"question": "?"}, "the field 'answer' is missing"),
        (GOOD | {"answer": ""}, "answer is empty"),
        (GOOD | {"question": " "}, "the question is empty"),
        (GOOD | {"answer": True}, "answer is true, expected text"),
        (GOOD | {"answer": {"text": "4"}}, "answer is an object, expected text"),
        (GOOD | {"answer": []}, "answer is a list, expected text"),
        (GOOD | {"question": ["2", "2"]}, "question is a list, expected text"),
        ('{"question": "?", "answer": NaN}', "answer is no finite number, expected text"),
        ('{"question": "\\ud83d", "answer": "4"}', "question holds half of a surrogate pair, '\\ud83d'"),
        ('{"question": "?", "answer": "\\udc00"}', "answer holds half of a surrogate pair"),
        (
            GOOD | {"question": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "question is a chat (user, assistant), expected one message",
        ),
        (
            GOOD | {"question": [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]},
            "question has image_url without text",
        ),
        (GOOD | {"question": [{"role": "user", "content": None}]}, "question has a message without text"),
    ],
)
def test_one_bad_record_among_many_is_named_with_its_line(file: Path, line: Any, reason: str) -> None:
    good = [GOOD | {"question": f"{number}+2?"} for number in range(64)]
    written(file, *good[:9], line, *good[9:])
    expected = re.escape(f"{file}, line 10: {reason}") + r".*; 1 of 65 records cannot be used; --skip_bad_records"
    with pytest.raises(ValueError, match=rf"\[task\] {expected}") as refused:
        problems(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    with pytest.warns(UserWarning, match=r"line 10: .*1 of 65 records cannot be used; they are left out"):
        task = make_task(f"qa:{file}", seed=0, skip_bad_records=True)
    assert [problem.question for problem in task.all_problems] == [record["question"] for record in good]


def test_bytes_that_are_no_text_are_one_bad_record(file: Path) -> None:
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 2: no UTF-8 at byte 15; 1 of 2 records"):
        problems(file)


def test_a_message_names_five_bad_records_and_check_all(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(file, GOOD, *range(7))
    with pytest.raises(ValueError, match=r"line 6: a number[^;]*; \.\.\.; 7 of 8 records cannot be used"):
        problems(file)
    with pytest.warns(UserWarning, match="7 of 8"):
        assert main(["check", f"qa:{file}"]) == 1
    shown = capsys.readouterr().out
    assert "1 whose own answer is right" in shown and all(
        f"left out, line {number}: a number" in shown for number in range(2, 9)
    )


def test_a_file_with_nothing_to_use_is_refused_either_way(file: Path) -> None:
    written(file, 1, 2)
    for skips in (False, True):
        with pytest.raises(ValueError, match=r"2 of 2 records cannot be used; no record of it can be used"):
            make_task(f"qa:{file}", seed=0, skip_bad_records=skips)


def test_messages_and_numbers_are_text(file: Path) -> None:
    written(
        file,
        {"question": [{"role": "user", "content": "2+2?"}], "answer": 4},
        {"question": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}], "answer": 0.5},
        {"question": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
         "answer": [{"role": "assistant", "content": "4"}]},
    )  # fmt: skip
    assert [problem[:2] for problem in problems(file)] == [("2+2?", "4"), ("Be brief.\n\n2+2?", "0.5"), ("2+2?", "4")]


def test_each_of_several_right_answers_is_right(file: Path) -> None:
    written(file, {"question": "Where?", "answer": ["Paris", "the city of light", 75]})
    task = make_task(f"qa:{file}", seed=0)
    (problem,) = task.all_problems
    assert problem.answer == "Paris"
    scores = {answer: task.score(answer, problem.entry) for answer in ("paris.", "The City of Light", "75", "Lyon", "")}
    assert scores == {"paris.": 1.0, "The City of Light": 1.0, "75": 1.0, "Lyon": 0.0, "": 0.0}


def test_a_mixed_file_of_questions_says_which_are_no_multiple_choice(file: Path) -> None:
    """SciKnowEval's types of questions stand in one file."""
    choices = {"text": ["water", "salt"], "label": ["A", "B"]}
    asks = {"question": "Which?", "choices": choices, "answer": "", "answerKey": "A", "type": "mcq-2-choices"}
    judges = asks | {"choices": {"text": [], "label": []}, "answer": "True", "answerKey": "", "type": "true_or_false"}
    written(file, asks, judges)
    with pytest.raises(ValueError, match=r"line 2: no choices to choose from \(type true_or_false\); 1 of 2"):
        problems(file, "science")


def test_another_seed_is_another_order_of_the_same_problems(file: Path) -> None:
    written(file, *(GOOD | {"question": f"{number}?"} for number in range(30)))
    name = f"qa:{file}"
    first = make_task(name, seed=0)
    second, again = with_seed(first, name, 1), make_task(name, seed=1)
    assert [second.problem(index) for index in range(60)] == [again.problem(index) for index in range(60)]
    assert [first.problem(index) for index in range(60)] == [
        make_task(name, seed=0).problem(index) for index in range(60)
    ]
    assert with_seed(make_task("add", 0), "add", 5).problem(3) == make_task("add", 5).problem(3)


def test_a_large_file_shows_its_progress(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(file, *(GOOD for _ in range(5)))
    shown = io.StringIO()
    monkeypatch.setattr(records, "LARGE", 10)
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(file=shown, force_terminal=True))
    assert len(problems(file)) == 5
    assert "reading mine.jsonl" in shown.getvalue() and "100%" in shown.getvalue()
