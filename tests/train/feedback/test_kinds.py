"""The table of feedback kinds: each verifies answers, and says of itself what the configuration checks."""

from __future__ import annotations

import pytest

from distil_kernels.train.config import Config
from distil_kernels.train.feedback.kinds import FEEDBACK, correction_feedback
from distil_kernels.train.tasks import make_task


def test_a_verifier_scores_and_corrects() -> None:
    task = make_task("largest", 0)
    problem = task.problem(0)
    right, wrong = (correction_feedback(task, problem, answer) for answer in (f" {problem.answer} ", "0"))
    assert (right.score, wrong.score) == (1.0, 0.0)
    assert right.text == wrong.text and problem.answer in wrong.text  # the correction does not depend on the rollout


@pytest.mark.parametrize("name", FEEDBACK)
def test_a_row_is_what_the_configuration_checks(name: str) -> None:
    kind = FEEDBACK[name]
    config = Config(feedback=name, baseline="leave_one_out")
    config.check()
    remarks = " ".join(config.remarks())
    assert ("is computed from the rollout" in remarks) == kind.depends_on_rollout
    assert ("shows a rollout to the teachers" in remarks) == kind.compares_rollouts
    checks = {
        "rollouts_per_prompt": (Config(feedback=name, rollouts_per_prompt=1, baseline="none"), kind.compares_rollouts),
        "teacher_reads": (Config(feedback=name, teacher_reads="demonstration"), not kind.has_demonstration),
    }
    for option, (changed, is_refused) in checks.items():
        if is_refused:
            with pytest.raises(ValueError, match=rf"\[{option}\] .*feedback {name}"):
                changed.check()
        else:
            changed.check()
