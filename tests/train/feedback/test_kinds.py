"""The table of feedback kinds: each verifies answers, and says of itself what the configuration checks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distil_kernels.train.config import Config
from distil_kernels.train.feedback.kinds import FEEDBACK, correction_feedback, feedback_kind, judge_source
from distil_kernels.train.tasks import make_task
from distil_kernels.train.tasks.sandbox import JudgeFailed


def test_a_verifier_scores_and_corrects() -> None:
    task = make_task("largest", 0)
    problem = task.problem(0)
    right, wrong = (correction_feedback(task, problem, answer) for answer in (f" {problem.answer} ", "0"))
    assert (right.score, wrong.score) == (1.0, 0.0)
    assert right.text == wrong.text and problem.answer in wrong.text  # the correction does not depend on the rollout


@pytest.mark.parametrize("name", FEEDBACK)
def test_a_row_is_what_the_configuration_checks(name: str) -> None:
    kind = FEEDBACK[name]
    others: dict[str, Any] = {} if kind.is_read else {"teacher": "local", "teacher_model": "other"}
    others |= {"expert_url": "http://localhost/v1"} if name == "expert" else {}
    given = {"feedback": name, **others}
    config = Config(**given, baseline="leave_one_out")
    config.check()
    remarks = " ".join(config.remarks())
    assert ("is computed from the rollout" in remarks) == kind.depends_on_rollout
    assert ("shows a rollout to the teachers" in remarks) == kind.compares_rollouts
    checks = {
        "rollouts_per_prompt": (Config(**given, rollouts_per_prompt=1, baseline="none"), kind.compares_rollouts),
        "teacher_reads": (Config(**given, teacher_reads="demonstration"), not kind.has_demonstration),
    }
    for option, (changed, is_refused) in checks.items():
        if is_refused:
            with pytest.raises(ValueError, match=rf"\[{option}\] .*feedback {name}"):
                changed.check()
        else:
            changed.check()


JUDGES = """
import time

def slow(problem, answer):
    time.sleep(60 if answer == "hard" else 0)
    return 0.5, "words " * 100

def other(problem, answer):
    return 0.5, ""
"""


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own_judges.py"
    sys.modules.pop("own_judges", None)


def test_a_judge_has_a_time_limit_and_an_answer_without_a_verdict_is_left_out(judges: Path) -> None:
    task = make_task("largest", 0)
    kind = feedback_kind("own_judges:slow", 0.1, 20)
    assert kind.verifier(task, task.problem(0), "easy") == (0.5, "words words words wo", task.problem(0).answer)
    with pytest.raises(JudgeFailed, match=r"own_judges:slow took longer than 0\.1 s"):
        kind.verifier(task, task.problem(0), "hard")


def test_the_file_of_a_judge_is_known(judges: Path) -> None:
    assert judge_source("own_judges:slow") == judges
    assert judge_source("correction") is None and judge_source("math:sqrt") is None
