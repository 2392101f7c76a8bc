"""A user's environment by its import path: runs, what ends them, and what a resumed one refuses."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from runs import metrics, train

from distil_kernels.train.__main__ import main
from distil_kernels.train.run.json_lines import read_lines

DOCS = Path(__file__).parents[3] / "docs" / "training.md"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes the module `mine`."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(text: str) -> None:
        (tmp_path / "mine.py").write_text(text)
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()

    yield module
    sys.modules.pop("mine", None)


def options(model: Path, runs: Path, name: str, *extra: str) -> list[str]:
    return ["--model", str(model), "--runs_dir", str(runs), "--name", name, "--environment", "mine:World", *extra]


def test_the_class_of_the_docs_is_one(tiny_model: Path, tmp_path: Path, write) -> None:
    (text,) = (part for part in DOCS.read_text().split("```") if part.startswith("python\nclass World"))
    write(text.removeprefix("python\n"))
    directory = train(tiny_model, tmp_path, "run", "--environment", "mine:World", "--feedback", "both",
                      "--credit_span", "none", steps=1)  # fmt: skip
    records = read_lines(directory / "rollouts.jsonl")
    assert all(len(record["turns"]) == 1 and record["tool_positions"] == [] for record in records)
    assert all(record["feedback"].startswith("score 0\nThe correct answer is ") for record in records)
    (step,) = (record for record in metrics(directory) if record["kind"] == "step")
    cut = [len(record["tokens"]) == 4 for record in records if record["kind"] == "training"]
    assert step["turns"] == 1.0 and 0 < step["num_unfinished"] == sum(cut) and step["truncated"] == sum(cut) / len(cut)


FAILS_LATER = """
calls = 0
class World:
    def step(self, text):
        global calls
        calls += 1
        if calls > 30:
            raise KeyError("prices")
        return "", 0.0, True
"""


def test_one_that_raises_ends_the_run_in_one_line(
    tiny_model: Path, tmp_path: Path, write, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write(FAILS_LATER)
    sizes = ["--prompts_per_step", "3", "--rollouts_per_prompt", "2", "--max_new_tokens", "3", "--eval_problems", "4",
             "--num_examples", "0", "--eval_samples", "1", "--eval_every", "0"]  # fmt: skip
    assert main(options(tiny_model, tmp_path, "run", "--steps", "9", *sizes)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    place = f"({tmp_path / 'mine.py'}, line 8)"
    assert line == f"python -m distil_kernels.train: [environment] mine:World raised KeyError: 'prices' {place}"
    assert (tmp_path / "run" / "checkpoint").exists()  # of the last complete step

    write(FAILS_LATER.replace("> 30", "> 1000"))
    resumed = ["--resume", str(tmp_path / "run"), "--steps", "4"]
    assert main(resumed) == 2
    assert "the file of --environment mine:World has changed" in capsys.readouterr().err
    assert main([*resumed, "--accept_changes"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Other: pass", "cannot import 'mine:World': AttributeError"),
        ("def World(): pass", "expected one of python, shop, or module:name of a class with reset and step"),
        ("class World:\n    def __init__(self): 1 / 0\n    def step(self, text): pass",
         "mine:World raised ZeroDivisionError: division by zero"),
        ("class World:\n    def reset(self, record): return 7\n    def step(self, text): pass",
         "mine:World.reset gave 7, expected a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_work(
    tiny_model: Path, tmp_path: Path, write, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:  # fmt: skip
    write(text)
    assert main(options(tiny_model, tmp_path, "run", "--steps", "1")) == 2
    assert f"python -m distil_kernels.train: [environment] {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
