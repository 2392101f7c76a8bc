"""What is said of a run whose records have no number in places: one held-out problem has no standard error."""

from __future__ import annotations

import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distil_kernels.train.config import Config
from distil_kernels.train.evaluate import Evaluation
from distil_kernels.train.report import console, pages
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
    assert "sampled 0.500  greedy 1.000  teacher 0.250" in line and len(line) <= 80
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
    columns = dict(zip(console.step_header().split(), console.step_line(record, 9, math.nan).split(), strict=True))
    assert columns["loss"] == columns["KL"] == columns["GiB"] == "nan" and columns["left"] == "-"
    assert list(warnings([record] * 2 * WINDOW, Config())) == []


@pytest.mark.parametrize("value", [0.0, 0.123456, 12345.678, -3e7, 1e300, math.nan])
def test_the_line_of_a_step_fits_a_terminal(value: float) -> None:
    names = ("accuracy", "loss", "kl", "length", "tokens_per_second", "peak_memory_gib", "ce", "entropy", "grad_norm")
    record = {"step": 1234} | dict.fromkeys((*names, "truncated", "seconds"), value)
    line, header = console.step_line(record, 20000, 86400 * 30.0), console.step_header()
    assert len(line) == len(header) <= 80
    assert line.split()[0] == "1234/20000" and line.endswith("30d 00:00")
    verbose = console.step_line(record, 20000, 75.0, verbose=True)
    assert len(verbose) == len(console.step_header(verbose=True)) > 80 and verbose.endswith(" 0:01:15")
    assert len(line.split()) == len(header.split()) + 1  # the days; no two cells touch


def test_the_columns_are_named_again_and_the_time_left_is_that_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, *(100.0 + 10.0 * taken for taken in range(1, 26))])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    shown = Console(width=80, record=True, quiet=False, file=io.StringIO())
    lines = console.StepLines(shown, step=5, num_steps=100, verbose=False)
    left = [lines.show(step(5 + taken, 0.5)) for taken in range(1, 26)]
    assert left[0] == "0:15:40 left" and left[24] == "0:11:40 left"
    text = shown.export_text().splitlines()
    assert [index for index, line in enumerate(text) if "accuracy" in line] == [0, 21]
    assert len(text) == 27 and max(map(len, text)) <= 80


def test_the_pages_of_a_run_are_there_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pages.time, "perf_counter", lambda: now[0])
    written = pages.Pages(Config(), tmp_path, is_main=True)
    written.write()
    append_lines(tmp_path / "metrics.jsonl", [step(1, 0.5)])
    written.refresh()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    append_lines(tmp_path / "rollouts.jsonl", [trained(1), trained(1) | {"question": "other"}])
    now[0] = 31.0
    written.refresh()
    document = (tmp_path / "report.html").read_text()
    assert (tmp_path / "plot.svg").exists() and "Training rollouts" in document
    assert "what was asked" in document and "other" not in document
    (tmp_path / "report.html").unlink()
    written.refresh()
    pages.Pages(Config(), tmp_path, is_main=False).write()
    assert not (tmp_path / "report.html").exists()
    written.write()
    assert (tmp_path / "report.html").exists()


def trained(number: int) -> dict[str, Any]:
    texts = {"question": "what was asked", "answer": "1", "expected": "1", "feedback": "The correct answer is 1."}
    return {"kind": "training", "step": number, **texts, "score": 1.0, "has_feedback": True, "tokens": [1]}


def test_a_long_run_is_a_page_that_can_be_read() -> None:
    """Of a thousand steps some training rollouts are shown, from the first to the last."""
    metrics = [step(number, number / 1000) for number in range(1, 1001)]
    document = page(Config(), "run", metrics, [trained(number) for number in range(1, 1001)])
    assert [number for number in range(1, 1001) if f"step {number}, question" in document] == [
        1,
        201,
        401,
        600,
        800,
        1000,
    ]
    assert len(document) < 600_000
