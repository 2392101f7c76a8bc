"""What is said of a run whose records have no number in places: one held-out problem has no standard error."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distil_kernels.train.config import Config
from distil_kernels.train.evaluate import Evaluation
from distil_kernels.train.report import console
from distil_kernels.train.report.chart import charts, plot
from distil_kernels.train.report.html import page
from distil_kernels.train.run.health import WINDOW, warnings
from distil_kernels.train.run.json_lines import append_lines, read_lines, with_nan

ONE = Evaluation(0.5, math.nan, 1.0, math.nan, 0.25, math.nan, 4.0, 1, {1: (0.5, math.nan), 2: (1.0, math.nan)}, [1])


def evaluation(step: int) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, **asdict(ONE), "seconds": 1.0}


def step(number: int, value: float) -> dict[str, Any]:
    names = ("accuracy", "truncated", "length", "equal_score_groups")
    known = dict.fromkeys(names, 0.25) | {"kind": "step", "step": number, "num_without_feedback": 0, "seconds": 1.0}
    return known | dict.fromkeys(("loss", "ce", "kl", "entropy", "grad_norm", "held_out_change"), value)


def printed(shown: object) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_an_error_that_is_not_known_is_left_out() -> None:
    line = console.evaluation_line(0, ONE)
    assert "sampled 0.500  greedy 1.000  teacher 0.250  length" in line
    table = printed(console.final_table([evaluation(0), evaluation(2)]))
    assert "0.250" in table and "nan" not in table.lower() and "±" in table  # in the title
    whole = {**evaluation(0), "sampled_se": 0.125, "greedy_se": math.nan}
    assert "0.500 ± 0.125" in printed(console.final_table([whole]))


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_records_without_numbers(value: float, tmp_path: Path) -> None:
    metrics = [evaluation(0), *(step(number, value) for number in range(1, 2 * WINDOW + 1)), evaluation(2 * WINDOW)]
    sample = {
        "kind": "held_out", "step": 0, "question": "?", "answer": "1", "expected": "1", "score": 1.0, "feedback": "",
        "problem": 0, "prompt": "?", "teacher_prompt": "?", "texts": ["1", "2"], "ce": [value, 0.5],
        "kl": [value, 0.5], "credit": [value, 0.5], "top": [[["1", value, value]], []],
    }  # fmt: skip
    append_lines(tmp_path / "records.jsonl", [*metrics, sample])
    *metrics, sample = with_nan(read_lines(tmp_path / "records.jsonl"))
    document = page(Config(), "run", metrics, [sample])
    assert "± nan" not in document and "0.500" in document
    assert "nan" not in plot(charts(metrics), "run")
    assert dict(warnings(metrics, Config())).keys() <= {"signal"}


def test_a_step_without_its_entropy_is_shown() -> None:
    """As one whose loss is no number has none."""
    record = {name: value for name, value in step(1, math.nan).items() if name not in ("ce", "kl", "entropy")}
    assert "loss     nan" in console.step_line(record)
    assert list(warnings([record] * 2 * WINDOW, Config())) == []
