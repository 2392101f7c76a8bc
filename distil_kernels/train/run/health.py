"""Warnings of what is wrong with a run, from its records, while there is time to stop it.

    no signal          every group's rollouts scored alike (policy_gradient), no rollout has feedback, or the teacher
                       agrees with the student
    entropy            the student has become sure of everything
    early ends         an end would save more cost to come than a teacher that rules it out can make up for
    length             most answers run into the limit, or they shrank to half
    teacher            it answers no better than its student, or much worse than at the start
    server             the rollout server samples from other weights than the student's

They compare means over the last WINDOW steps with those over the first WINDOW. Those of early ends, teacher and server
apart, none comes before there are twice as many steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from distil_kernels.train.config import SAFE_CREDIT_CLIP, Config

Record = dict[str, Any]

WINDOW = 5
_OTHER_WEIGHTS = 0.1
"""Nats a token; rounding does not explain a larger difference of log-probs."""
_NO_DISAGREEMENT = 1e-4
"""Nats of KL per token below which there is nothing left to learn."""


def warnings(records: Sequence[Record], config: Config) -> Iterator[tuple[str, str]]:
    """Yields (kind, sentence) for everything that is wrong now.

    Args:
        records: the records of metrics.jsonl so far.
    """
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    if evaluations:
        yield from _teacher(evaluations[0], evaluations[-1], config)
    if steps and "mismatch" in steps[-1]:
        yield from _server(steps[0]["mismatch"], steps[-1]["mismatch"])
    if steps and config.pays_for_early_ends and _mean(steps[-WINDOW:], "cost_to_come") > 1.0:
        text = (
            f"early ends pay: with discount {config.discount:g} an end saves up to "
            f"{_mean(steps[-WINDOW:], 'cost_to_come'):.1f} nats of what is to come (cost_to_come), and above 1 answers "
            f"shrink whatever the teacher says; credit_clip {SAFE_CREDIT_CLIP:g} prevents it"
        )
        yield "early ends", text
    if len(steps) < 2 * WINDOW:
        return
    first, last = steps[:WINDOW], steps[-WINDOW:]

    has_teacher = config.objective != "policy_gradient"
    if has_teacher and _mean(last, "num_without_feedback") == config.prompts_per_step * config.rollouts_per_prompt:
        text = f"no signal: in the last {WINDOW} steps no rollout had feedback for the teacher (num_without_feedback)"
        yield "signal", text
        return
    if not has_teacher and _mean(last, "equal_score_groups") == 1.0:
        text = (
            f"no signal: in the last {WINDOW} steps all rollouts of each problem scored the same, so no advantage is "
            "left; an easier or harder task, more rollouts, or an objective with a teacher"
        )
        yield "signal", text
    if has_teacher and _mean(last, "kl") < _NO_DISAGREEMENT:
        text = (
            f"no signal: teacher and student differ by {_mean(last, 'kl'):.1e} nats a token; the feedback says nothing "
            "that the student does not know, or the teacher has followed it"
        )
        yield "signal", text
    if _mean(last, "entropy") < 0.05 * _mean(first, "entropy"):
        text = (
            f"collapsed entropy: {_mean(last, 'entropy'):.2g} nats a token, {_mean(first, 'entropy'):.2g} at the "
            "start; rollouts of a problem are all the same"
        )
        yield "entropy", text
    if _mean(last, "truncated") > 0.5:
        text = (
            f"answers run into the limit: {_mean(last, 'truncated'):.0%} of the last {WINDOW} steps' have "
            f"{config.max_new_tokens} tokens and no end, {_mean(first, 'truncated'):.0%} at the start; a larger "
            "max_new_tokens, or a cost that does not pay for length"
        )
        yield "length", text
    if _mean(last, "length") < 0.5 * _mean(first, "length"):
        pays = config.pays_for_early_ends
        advice = f"; credit_clip {SAFE_CREDIT_CLIP:g} keeps the credit from paying for it" if pays else ""
        text = (
            f"shrinking answers: {_mean(last, 'length'):.1f} tokens, {_mean(first, 'length'):.1f} at the start{advice}"
        )
        yield "length", text


def _mean(records: Sequence[Record], key: str) -> float:
    return statistics.fmean(record.get(key, math.nan) for record in records)


def _teacher(first: Record, last: Record, config: Config) -> Iterator[tuple[str, str]]:
    """Yields warnings from the first and the last evaluation."""
    if config.objective == "policy_gradient":
        return
    if last["step"] == 0 and last["teacher"] <= last["sampled"]:
        text = (
            f"the teacher is no better than the student: {last['teacher']:.2f} of the held-out problems, the student "
            f"{last['sampled']:.2f}; look at what it reads (teacher_reads, layout)"
        )
        yield "teacher", text
    if last["teacher"] < first["teacher"] - 3.0 * max(first["teacher_se"], last["teacher_se"]) - 0.05:
        text = (
            f"the teacher itself has become worse: {last['teacher']:.2f} of the held-out problems, "
            f"{first['teacher']:.2f} at the start; a frozen teacher or a slower ema does not follow its student down"
        )
        yield "teacher", text


def _server(first: float, last: float) -> Iterator[tuple[str, str]]:
    """Yields warnings from the rollout server's mismatch in the first and the last step."""
    if last > min(_OTHER_WEIGHTS, 5.0 * first + 0.01):
        text = (
            f"the rollout server's log-probs differ by {last:.2g} nats a token from the student's, {first:.2g} in the "
            "first step: it does not have the student's weights (a tied head on vLLM's CPU back end needs a copy: the "
            "command untie), or another temperature"
        )
        yield "server", text
