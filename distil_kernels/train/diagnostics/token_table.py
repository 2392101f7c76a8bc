"""The cost of every token of a rollout, and the teacher's likeliest tokens in its place: for `inspect` and `report`.

    ce      H(teacher, student) at the token's position, nats
    kl      KL(teacher || student) there, nats
    credit  the weight of grad log S[token]: the discounted cost to come, minus its baseline
    top     the teacher's likeliest tokens with both models' probabilities

The numbers are those of the loss on these rollouts (the same op without gradients): 0 for a token that does not learn.
Logits exist for BLOCK_ROWS tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_kernels.hf import CausalLM
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.config import Config
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.objective import fused_loss
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.teachers.base import Target, Teacher, TopKTarget

NUM_TOP = 5
BLOCK_ROWS = 64


@torch.no_grad()
def token_columns(
    student: Reader,
    teacher: Teacher,
    groups: Sequence[PromptGroup],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    average: PositionAverage,
) -> list[dict[str, Any]]:
    """For each rollout of each group: its prompts as text, and lists with one entry per token."""
    batch = PackedBatch.of(groups, student.weight.device)
    hidden = student.states(batch.prompts, batch.prompt_index, batch.completions).to(student.weight.dtype)
    target = teacher.target(batch)
    out = fused_loss(student, hidden, target, batch, config, average, token_mask=batch.learns.values)
    values = {"ce": out.stats.ce, "kl": out.stats.kl, "credit": out.credit}
    by_rollout = {name: column.split(batch.lengths) for name, column in values.items()}
    tops = _likeliest(student, hidden, target, tokenizer, config)
    columns = []
    for index, completion in enumerate(batch.completions):
        columns.append(
            {
                "problem": batch.prompt_index[index],
                "prompt": tokenizer.decode(batch.prompts[batch.prompt_index[index]]),
                "teacher_prompt": tokenizer.decode(batch.teacher_prompts[batch.teacher_prompt_index[index]]),
                "texts": [tokenizer.decode([token]) for token in completion],
                **{name: [round(float(v), 5) for v in column[index]] for name, column in by_rollout.items()},
                "top": [next(tops) for _ in completion],
            }
        )
    return columns


def _likeliest(
    student: CausalLM, student_hidden: Tensor, target: Target, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Iterator[list[tuple[str, float, float]]]:
    """For each token the teacher's likeliest tokens: text, probability under the teacher, under the student."""
    for begin in range(0, len(student_hidden), BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        student_probs = (student.logits(student_hidden[block]).float() / config.temperature).softmax(-1)
        if isinstance(target, TopKTarget):
            probs, ids = target.logprobs[block, :NUM_TOP].exp(), target.ids[block, :NUM_TOP]
        else:
            weight = student.weight if target.weight is None else target.weight
            teacher = replace(
                student, weight=weight, bias=target.bias, logit_scale=target.logit_scale,
                logit_softcap=target.logit_softcap,
            )  # fmt: skip
            logits = teacher.logits(target.states[block].to(student.weight.dtype)).float() / config.teacher_temperature
            probs, ids = logits.softmax(-1).topk(min(NUM_TOP, logits.shape[1]))
        same = student_probs.gather(1, ids.clamp(min=0))
        for tokens, p, q in zip(ids.tolist(), probs.tolist(), same.tolist(), strict=True):
            known = [entry for entry in zip(tokens, p, q, strict=True) if entry[0] >= 0]
            yield [(str(tokenizer.decode([token])), round(a, 5), round(b, 5)) for token, a, b in known]
