"""The effect of a step on held-out problems: the log-prob of their right answers before and after it.

    held_out_logprob   mean over the problems of log p(the expert's answer | the student's prompt), after the step
    held_out_change    its difference to the value before the step

By the bound of studies/theory/success.py an objective that raises this raises a lower bound of the success probability.
Unlike an accuracy it moves with every step and needs no sampling. It costs two forward passes over the held-out
prompts. The stop token of an answer is not counted, because there may be several.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distil_kernels import token_logprobs
from distil_kernels.train.config import Config
from distil_kernels.train.evaluate import BATCH_ROWS
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.prompt_group import PromptGroup


@torch.no_grad()
def held_out_logprob(student: Reader, groups: Sequence[PromptGroup], prompts: Prompts, config: Config) -> float:
    """The mean over problems of the log-prob of the expert's answer, after the student's prompt.

    Problems without an expert's answer are left out; NaN if no problem has one.
    """
    answered = [(group.prompt, prompts.answer_tokens(group.problem.answer)) for group in groups if group.problem.answer]
    if not answered:
        return float("nan")
    total = 0.0
    for begin in range(0, len(answered), BATCH_ROWS):
        batch, answers = zip(*answered[begin : begin + BATCH_ROWS], strict=True)
        hidden = student.states(batch, range(len(batch)), answers)
        tokens = torch.tensor([token for answer in answers for token in answer], device=hidden.device)
        out = token_logprobs(
            hidden.to(student.weight.dtype), student.weight, tokens=tokens, student_bias=student.bias,
            vocab_size=student.vocab_size, temperature=config.temperature, logit_softcap=student.logit_softcap,
            student_logit_scale=student.logit_scale, backend=config.backend, vocab_group=student.vocab_group,
        )  # fmt: skip
        total += out.logprob.sum().item()
    return total / len(answered)


def change_metrics(before: float | None, after: float | None) -> dict[str, float]:
    """The metrics of a step, from the log-prob before and after it; none in a step that does not record it."""
    if before is None or after is None:
        return {}
    return {"held_out_logprob": after, "held_out_change": after - before}
