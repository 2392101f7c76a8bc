"""A resumed run is the run that it was: what it reads, its settings, its records, and the step that an error cut."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import QUICK, assert_same, metrics, train

from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.run.json_lines import read_lines

SUM = "def judge(problem, answer):\n    return float(answer.strip() == problem.answer), 'Try again.'\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a data file and a judge, which are read anew by each start."""
    lines = [json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in range(64)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "judge_of_sums.py").write_text(SUM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    yield tmp_path
    forget_judge()


def forget_judge() -> None:
    sys.modules.pop("judge_of_sums", None)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def start(model: Path, place: Path, *extra: str) -> Path:
    options = ["--task", f"qa:{place / 'sums.jsonl'}", "--feedback", "judge_of_sums:judge", "--layout", "chat"]
    return train(model, place, "run", *options, "--teacher", "live", "--credit_span", "none", *extra, steps=1)


def shrunk(place: Path) -> None:
    file = place / "sums.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-4]))


def another_judge(place: Path) -> None:
    (place / "judge_of_sums.py").write_text(SUM.replace("again", "harder"))
    forget_judge()


def another_template(place: Path) -> None:
    file = place / "model" / "chat_template.jinja"
    file.write_text(file.read_text().replace("<assistant>", "<model>"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shrunk, "the file of --task qa:"),
        (another_judge, "the file of --feedback judge_of_sums:judge has changed"),
        (another_template, "the chat template of --model"),
    ],
)
def test_what_has_changed_is_refused_by_name_or_accepted_and_recorded(
    model: Path, place: Path, capsys: pytest.CaptureFixture[str], change: object, said: str
) -> None:
    directory = start(model, place)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    change(place)  # type: ignore[operator]
    capsys.readouterr()
    resume = ["--resume", str(directory), "--steps", "2"]
    assert main(resume) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert (
        said in line and "checkpoint-000001" in line and "--accept_changes" in line and line.count("has changed") == 1
    )
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before

    assert main([*resume, "--accept_changes"]) == 0
    (record,) = [record for record in metrics(directory) if record["kind"] == "change"]
    assert record["step"] == 1 and said in record["changes"][0]
    assert main(["--resume", str(directory), "--steps", "3"]) == 0  # what was accepted is the run's from then on
    assert main(["report", str(directory)]) == 0


def test_a_relative_path_is_found_again_from_elsewhere(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    directory = train(Path("model"), place, "run", "--task", "qa:sums.jsonl", steps=1)
    settings = json.loads((directory / "config.json").read_text())
    assert settings["model"] == str(model) and settings["task"] == f"qa:{place / 'sums.jsonl'}"
    monkeypatch.chdir("/")
    assert main(["--resume", str(directory), "--steps", "2"]) == 0


def test_a_damaged_config_is_not_filled_in(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(tiny_model, tmp_path, "run", steps=1)
    whole = json.loads((directory / "config.json").read_text())
    for text in ("", "{}", '{"rollouts_per_prompt": 2', '{"steps": 3}', "\x00"):
        (directory / "config.json").write_text(text)
        for arguments in (["--resume", str(directory)], ["eval", str(directory)], ["report", str(directory)]):
            assert main(arguments) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "[config]" in line and str(directory / "config.json") in line
    (directory / "config.json").write_text(json.dumps({key: whole[key] for key in whole if key != "seed"}))
    assert main(["--resume", str(directory)]) == 2
    assert "lacks seed: expected every option of the run" in capsys.readouterr().err


def test_a_damaged_line_costs_that_line_and_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(tiny_model, tmp_path, "run", "--eval_every", "0", steps=6)
    lines = (directory / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    records = read_lines(directory / "metrics.jsonl")
    (directory / "metrics.jsonl").write_bytes(b"".join([*lines[:5], lines[5][:40] + b"\n", *lines[6:]]))
    assert main(["--resume", str(directory), "--steps", "7"]) == 0
    assert "metrics.jsonl, line 6 is damaged and left out" in " ".join(capsys.readouterr().out.split())
    after = read_lines(directory / "metrics.jsonl", pytest.fail)
    assert after[: len(records) - 1] == records[:5] + records[6:]


RAISES = """
import os
from pathlib import Path

def judge(problem, answer):
    calls = Path(os.environ["CALLS"])
    calls.write_text(str(int(calls.read_text()) + 1))
    if calls.read_text() == os.environ["FAILS_AT"]:
        raise OSError("the judge is not there")
    return float(len(answer) % 2), "Try again, with " + answer[:2]
"""


@pytest.mark.parametrize("fails_at", [48, 60])
def test_a_judge_that_raises_once_costs_the_step_that_it_raises_in(
    tiny_model: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails_at: int
) -> None:
    (place / "judge_of_sums.py").write_text(RAISES)
    calls = place / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    options = ["--feedback", "judge_of_sums:judge", "--teacher", "ema", "--credit_span", "none", "--eval_rollouts", "0"]

    def run(name: str, failure: int) -> Path:
        calls.write_text("0")
        monkeypatch.setenv("FAILS_AT", str(failure))
        place_of_run = ["--model", str(tiny_model), "--runs_dir", str(place), "--name", name, "--steps", "5"]
        assert main([*place_of_run, *QUICK, *options]) == (1 if failure else 0)
        return place / name

    whole, harmed = run("whole", 0), run("harmed", fails_at)
    step = max(record["step"] for record in metrics(harmed))
    assert step >= 2 and (harmed / "checkpoint").resolve().name == f"checkpoint-{step:06d}"
    said = capsys.readouterr()
    assert f"step {step} is saved: --resume {harmed} goes on" in " ".join(said.out.split())
    assert "OSError: the judge is not there" in said.err
    assert main(["--resume", str(harmed)]) == 0
    assert_same(harmed, whole)


SLOW = """
import time

def judge(problem, answer):
    time.sleep(60 if answer and ord(answer[0]) % 2 else 0)
    return 0.5, "Try again."
"""


def test_an_answer_that_a_judge_takes_too_long_for_has_no_verdict(tiny_model: Path, place: Path) -> None:
    (place / "judge_of_sums.py").write_text(SLOW)
    options = ["--feedback", "judge_of_sums:judge", "--judge_seconds", "0.05", "--credit_span", "none"]
    with pytest.warns(UserWarning, match="have no verdict"):
        directory = train(tiny_model, place, "run", *options, "--num_examples", "0", steps=1)
    rollouts = [record for record in read_lines(directory / "rollouts.jsonl") if record["kind"] == "training"]
    slow = sum(ord(record["answer"][:1] or "b") % 2 for record in rollouts)
    (step,) = [record for record in metrics(directory) if record["kind"] == "step"]
    assert 0 < step["num_without_verdict"] == slow < len(rollouts)


def test_the_default_run_has_a_checkpoint_before_its_end() -> None:
    assert 0 < Config().checkpoint_every < Config().steps
