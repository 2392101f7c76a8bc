"""What a step changed where it was not trained: the log-prob of right answers to held-out problems, before and after.

    held_out_logprob   mean over the problems of log p(the expert's answer | what the student reads), after the step
    held_out_change    the same less its value before the step

By the bound of theory/success.py an objective that raises this raises the success probability's lower bound; unlike an
accuracy it moves with every step and needs no sampling. Costs two forward passes over the held-out prompts. An answer's
end is not counted, because it may be written in more than one way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distil_kernels import token_logprobs
from distil_kernels.train.config import Config
from distil_kernels.train.evaluate import BATCH_ROWS
from distil_kernels.train.feedback.kinds import Prompts
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.tasks import Problem


@torch.no_grad()
def right_logprob(
    student: Reader, posed: Sequence[tuple[Problem, list[int]]], prompts: Prompts, config: Config
) -> float:
    """Mean log-prob of the expert's whole answers; `posed` are problems with what the student reads of them.

    Problems without an expert's answer are left out; NaN where no problem has one.
    """
    known = [(prompt, prompts.written(problem.answer)) for problem, prompt in posed if problem.answer]
    if not known:
        return float("nan")
    total = 0.0
    for begin in range(0, len(known), BATCH_ROWS):
        batch, answers = zip(*known[begin : begin + BATCH_ROWS], strict=True)
        hidden = student.states(batch, range(len(batch)), answers)
        tokens = torch.tensor([token for answer in answers for token in answer], device=hidden.device)
        found = token_logprobs(
            hidden.to(student.weight.dtype), student.weight, tokens=tokens, student_bias=student.bias,
            temperature=config.temperature, logit_softcap=student.softcap, backend=config.backend,
        )  # fmt: skip
        total += found.logprob.sum().item()
    return total / len(known)


def figures(before: float | None, after: float | None) -> dict[str, float]:
    """What a record shows: nothing where the change was not asked for."""
    if before is None or after is None:
        return {}
    return {"held_out_logprob": after, "held_out_change": after - before}
