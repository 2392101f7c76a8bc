"""What every token of a rollout costs, and what the teacher would have said instead: for `inspect` and `report`.

    ce      H(teacher, student) at the token's position, nats
    kl      KL(teacher || student) there
    credit  the weight of grad log S[token]: discounted cost to come, less its baseline
    top     the teacher's likeliest tokens with both models' probabilities

The numbers are those of the loss on these rollouts (the same op without gradients): 0 where a token does not count.
Logits exist for BLOCK_ROWS tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_kernels.hf import CausalLM
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.batches import Sample
from distil_kernels.train.config import Config
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.objective import fused_loss, token_mask
from distil_kernels.train.teachers.local import Teacher
from distil_kernels.train.teachers.remote import RemoteTeacher, TopK

NUM_TOP = 5
BLOCK_ROWS = 64


@torch.no_grad()
def token_columns(
    student: Reader,
    teacher: Teacher | RemoteTeacher,
    batch: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    average: PositionAverage,
) -> list[dict[str, Any]]:
    """For each rollout of each problem: prompts as text, and lists with one entry per token."""
    completions = [done for entry in batch for done in entry.completions]
    rows = [row for row, entry in enumerate(batch) for _ in entry.completions]
    teacher_prompts = [prompt for entry in batch for prompt in entry.teacher_prompts]
    hidden = student.states([entry.prompt for entry in batch], rows, completions)
    counts = [row for entry in batch for row in entry.counts]
    taught = teacher.at_states(teacher_prompts, range(len(completions)), completions, counts)
    hidden = hidden.to(student.weight.dtype)
    lengths = [len(done) for done in completions]
    mask = token_mask(counts, hidden.device)
    out = fused_loss(student, hidden, teacher, taught, completions, config, average, token_mask=mask)
    numbers = {"ce": out.stats.ce, "kl": out.stats.kl, "credit": out.credit}
    by_rollout = {name: values.split(lengths) for name, values in numbers.items()}
    tops = _tops(student, hidden, teacher, taught, tokenizer, config)
    columns = []
    for index, done in enumerate(completions):
        columns.append(
            {
                "problem": rows[index],
                "prompt": tokenizer.decode(batch[rows[index]].prompt),
                "teacher_prompt": tokenizer.decode(teacher_prompts[index]),
                "texts": [tokenizer.decode([token]) for token in done],
                **{name: [round(float(v), 5) for v in values[index]] for name, values in by_rollout.items()},
                "top": [next(tops) for _ in done],
            }
        )
    return columns


def _tops(
    student: CausalLM,
    hidden: Tensor,
    teacher: Teacher | RemoteTeacher,
    taught: Tensor | TopK,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> Iterator[list[tuple[str, float, float]]]:
    """For each token position the teacher's likeliest tokens: text, teacher's and student's probability."""
    for begin in range(0, len(hidden), BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        own = (student.logits(hidden[block]).float() / config.temperature).softmax(-1)
        if isinstance(taught, TopK):
            best, ids = taught.logprobs[block, :NUM_TOP].exp(), taught.ids[block, :NUM_TOP]
        else:
            assert isinstance(teacher, Teacher)
            logits = teacher.lm.logits(taught[block].to(student.weight.dtype)).float() / config.teacher_temperature
            best, ids = logits.softmax(-1).topk(min(NUM_TOP, logits.shape[1]))
        for p, q, tokens in zip(best.tolist(), own.gather(1, ids.clamp(min=0)).tolist(), ids.tolist(), strict=True):
            known = [entry for entry in zip(tokens, p, q, strict=True) if entry[0] >= 0]
            yield [(str(tokenizer.decode([token])), round(a, 5), round(b, 5)) for token, a, b in known]
