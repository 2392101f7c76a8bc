"""The records of a step: means over tokens, metrics of its rollouts, and a line for each rollout."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.objective import SUMMED, Sums
from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout


class PhaseTimer:
    """The seconds that each phase of a step has taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory in GiB that this process has held so far, and what torch has allocated on its GPU."""
    peaks = {"peak_memory_gib": _peak_of_process() / 2**30}
    if device.type == "cuda":
        peaks["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peaks


def _peak_of_process() -> float:
    """Bytes; Linux's getrusage would give a child the peak of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024.0 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def update_means(first: Sequence[Sums], last: Sequence[Sums]) -> dict[str, float]:
    """Means over the tokens in the first update on a batch, and in the last one how far the student has gone."""
    of_last = token_means(last)
    gone = {name: value for name, value in of_last.items() if name in ("drift", "ratio", "ratio_tail")}
    return token_means(first) | gone


def token_means(sums: Sequence[Sums]) -> dict[str, float]:
    """Means over the tokens of all micro-batches of the values in SUMMED that the objective has; 0 without tokens.

    `credit_to_cost` is the mean weight of the credit divided by the mean cost, `mismatch_max` a maximum.
    """
    num_tokens = max(1, sum(part.num_tokens for part in sums))
    totals = torch.stack([part.totals for part in sums]).sum(0).tolist()
    mean = {name: total / num_tokens for name, total in zip(SUMMED, totals, strict=True) if not math.isnan(total)}
    if "abs_credit" in mean:
        mean["credit_to_cost"] = mean.pop("abs_credit") / mean["cost"] if mean["cost"] > 0 else math.nan
    if "mismatch" in mean:
        mean["mismatch_max"] = max(float(part.largest_mismatch) for part in sums if part.largest_mismatch is not None)
    return mean


def rollout_metrics(
    groups: Sequence[PromptGroup],
    prompts: Prompts,
    stop_ids: Sequence[int],
    teacher_logprobs: Sequence[torch.Tensor | None],
) -> dict[str, float | None]:
    """Metrics of a step's rollouts.

    Args:
        teacher_logprobs: as of `teacher_prefers_right`.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = _known_scores(rollouts)
    outcomes = [rollout.outcome for rollout in rollouts if rollout.outcome is not None]
    of_episodes = {
        "turns": statistics.fmean(len(outcome.turns) for outcome in outcomes),
        "num_unfinished": sum(not outcome.is_finished for outcome in outcomes),
    } if outcomes else {}  # fmt: skip
    return {
        "accuracy": statistics.fmean(scores) if scores else math.nan,
        "truncated": statistics.fmean(rollout.is_truncated(stop_ids) for rollout in rollouts),
        "equal_score_groups": statistics.fmean(len(set(_known_scores(group.rollouts))) <= 1 for group in groups),
        "teacher_prefers_right": teacher_prefers_right(groups, teacher_logprobs),
        "num_without_verdict": sum(not rollout.feedback.has_verdict for rollout in rollouts),
        "num_without_feedback": sum(not rollout.has_feedback for rollout in rollouts),
        "num_shortened_prompts": sum(
            prompts.shortens(group.problem, rollout.feedback) for group in groups for rollout in group.rollouts
        ),
        **of_episodes,
    }


def _known_scores(rollouts: Sequence[Rollout]) -> list[float]:
    return [rollout.feedback.score for rollout in rollouts if rollout.feedback.has_verdict]


def teacher_prefers_right(
    groups: Sequence[PromptGroup], teacher_logprobs: Sequence[torch.Tensor | None]
) -> float | None:
    """The share of pairs of rollouts in which the teacher finds the one with the higher score likelier.

    The pairs are of one problem, with feedback and different scores; None if there are none.

    Args:
        teacher_logprobs: for each micro-batch the log-probs of its completions [B] under the teacher, if it knows them.
    """
    known = [part for part in teacher_logprobs if part is not None]
    if not known:
        return None
    num_wins = num_pairs = 0
    values = iter(torch.cat(known).tolist())
    for group in groups:
        scored = [(rollout.feedback.score, next(values), rollout.has_feedback) for rollout in group.rollouts]
        scored = [entry for entry in scored if entry[2]]
        for score, value, _ in scored:
            for other_score, other_value, _ in scored:
                if score > other_score:
                    num_pairs += 1
                    num_wins += value > other_value
    return num_wins / num_pairs if num_pairs else None


def rollout_records(
    kind: str, step: int, groups: Sequence[PromptGroup], columns: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """A line of rollouts.jsonl for each rollout; `columns` are the `token_columns` of each."""
    records = [
        {
            "kind": kind,
            "step": step,
            "question": group.problem.question,
            "answer": rollout.answer,
            "expected": group.problem.answer,
            "score": rollout.feedback.score,
            "feedback": rollout.feedback.text,
            "has_feedback": rollout.has_feedback,
            "tokens": rollout.tokens,
            "tool_positions": [position for position, by_model in enumerate(rollout.by_model) if not by_model],
            **({} if rollout.outcome is None else {"turns": [list(turn) for turn in rollout.outcome.turns]}),
        }
        for group in groups
        for rollout in group.rollouts
    ]
    for record, column in zip(records, columns or [], strict=columns is not None):
        record.update(column)
    return records
