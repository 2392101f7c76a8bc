"""Packing: which prompt belongs to which completion, which tokens count, and what an append keeps together."""

from __future__ import annotations

import torch

from distil_kernels.train.rollouts.packed_batch import PackedBatch, distinct
from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout
from distil_kernels.train.tasks import Problem

PROBLEM = Problem("", "", None, "")


def rollout(tokens: list[int], by_model: list[bool], score: float, teacher_prompt: list[int] | None) -> Rollout:
    made = Rollout(tokens, by_model, teacher_prompt=teacher_prompt)
    made.feedback = made.feedback._replace(score=score)
    return made


def test_two_groups() -> None:
    """A tool's token in the second rollout, no feedback to the third, one teacher prompt twice."""
    first = PromptGroup(
        PROBLEM, [1, 2], [rollout([5, 6], [True, True], 1.0, [9]), rollout([7, 8], [True, False], 0.5, [9, 9])]
    )
    second = PromptGroup(
        PROBLEM, [1, 3], [rollout([8], [True], 0.0, None), rollout([4, 4, 4], [True, True, True], 0.25, [9])]
    )
    batch = PackedBatch.of([first, second], torch.device("cpu"))
    assert batch.prompts == [[1, 2], [1, 3]] and batch.prompt_index == [0, 0, 1, 1]
    assert batch.teacher_prompts == [[9], [9, 9], [1, 3]] and batch.teacher_prompt_index == [0, 1, 2, 0]
    assert batch.completions == [[5, 6], [7, 8], [8], [4, 4, 4]] and batch.lengths == [2, 2, 1, 3]
    assert batch.tokens.tolist() == [5, 6, 7, 8, 8, 4, 4, 4] and batch.cu_seqlens.tolist() == [0, 2, 4, 5, 8]
    assert batch.judged.values is not None and batch.learns.values is not None
    assert batch.judged.values.tolist() == [True, True, True, False, True, True, True, True]
    assert batch.learns.values.tolist() == [True, True, True, False, False, True, True, True]
    assert (batch.judged.num_tokens, batch.learns.num_tokens) == (7, 6)
    assert batch.scores.tolist() == [1.0, 0.5, 0.0, 0.25] and batch.group_size == 2
    assert batch.behaviour_logprobs is None


def test_log_probs_of_a_server_are_packed_like_its_tokens() -> None:
    served = Rollout.sampled([5, 6], [-1.0, -2.0])
    served.append(Rollout([7], [False]))
    served.append(Rollout.sampled([8], [-3.0]))
    assert served == Rollout([5, 6, 7, 8], [True, True, False, True], [-1.0, -2.0, 0.0, -3.0])
    other = Rollout.sampled([9], [-4.0])
    batch = PackedBatch.of([PromptGroup(PROBLEM, [1], [served, other])], torch.device("cpu"))
    assert batch.behaviour_logprobs is not None and batch.behaviour_logprobs.tolist() == [-1.0, -2.0, 0.0, -3.0, -4.0]


def test_distinct_lists_keep_their_order() -> None:
    assert distinct([[2, 1], [1], [2, 1], []]) == ([[2, 1], [1], []], [0, 1, 0, 2])
