"""Four tasks on digits, as tensors of characters, each with a habit that the models are pre-trained to have.

    question > correction =  answer .            the correction is blank for the student, the answer for the teacher

Every prompt of a task has one width, so no batch needs padding on the left. A problem is a number; those divisible by
HELD_OUT are never trained on. What decides whether one-bit rewards suffice is the habit: how often the right answer is
sampled before training, and whether it is ever sampled where the habit is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

CHARACTERS = "0123456789+>=. "
PLUS, READ, EQUALS, END, BLANK = range(10, 15)
SIGNS = (PLUS, READ, EQUALS)
HELD_OUT = 7


class Task(NamedTuple):
    """Problems of `digits` digits, their questions and right answers, and the habit to pre-train."""

    title: str
    digits: int
    answer_width: int
    """Maximal number of characters of an answer, END included."""
    question: Callable[[Tensor], Tensor]
    """Maps problems [B, digits] to questions [B, Q]."""
    answer: Callable[[Tensor], Tensor]
    """Maps problems [B, digits] to right answers [B, answer_width], BLANK after END."""
    habit: Callable[[Tensor, Generator], Tensor]
    """Samples the answers [B, answer_width] that pre-training teaches for prompts without a correction."""

    def problems(self, count: int, generator: Generator, held_out: bool = False) -> Tensor:
        """Draws problems [count, digits], either held-out ones or training ones."""
        numbers = torch.randint(0, 10**self.digits // HELD_OUT, (count,), generator=generator) * HELD_OUT
        if not held_out:
            numbers += torch.randint(1, HELD_OUT, (count,), generator=generator)
        return digits_of(numbers, self.digits)

    def prompts(self, problems: Tensor, corrections: Tensor | None = None) -> Tensor:
        """Returns prompts [B, P]: the teacher's with corrections [B, answer_width], the student's with None."""
        question = self.question(problems)
        if corrections is None:
            corrections = question.new_full((len(question), self.answer_width), BLANK)
        column = question.new_ones(len(question), 1)
        return torch.cat([question, READ * column, corrections[:, :-1], EQUALS * column], 1)


def digits_of(numbers: Tensor, count: int) -> Tensor:
    """The `count` decimal digits [B, count] of numbers [B], the most significant first."""
    return numbers[:, None] // 10 ** torch.arange(count - 1, -1, -1) % 10


def truncate(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Puts BLANK after the first END of answers [B, A]; also returns a bool mask [B, A] of characters up to END."""
    num_ends_before = (answers == END).long().cumsum(1) - (answers == END).long()
    answer_mask = num_ends_before == 0
    return answers.masked_fill(~answer_mask, BLANK), answer_mask


def any_signs(answers: Tensor, generator: Generator) -> Tensor:
    """Replaces each PLUS of the answers by a random one of the SIGNS: all of them are right."""
    signs = torch.tensor(SIGNS)[torch.randint(0, len(SIGNS), answers.shape, generator=generator)]
    return torch.where(answers == PLUS, signs, answers)


def one_sign(answers: Tensor) -> Tensor:
    """Replaces each of the SIGNS by PLUS, so that answers can be compared."""
    return answers.masked_fill(torch.isin(answers, torch.tensor(SIGNS)), PLUS)


def _with_end(digits: Tensor) -> Tensor:
    return torch.cat([digits, torch.full_like(digits[:, :1], END)], 1)


def _sorted(digits: Tensor) -> Tensor:
    return _with_end(digits.sort(1).values)


def _careless(digits: Tensor, generator: Generator) -> Tensor:
    """The sorted digits, of which about every fifth is replaced by a random one."""
    slips = torch.rand(digits.shape, generator=generator) < 0.22
    return _with_end(torch.where(slips, torch.randint(0, 10, digits.shape, generator=generator), digits.sort(1).values))


def _list(digits: Tensor) -> Tensor:
    """The digits with PLUS between them and END after the last one."""
    characters = torch.stack([digits, torch.full_like(digits, PLUS)], 2).flatten(1)
    characters[:, -1] = END
    return characters


def _sorted_list(digits: Tensor) -> Tensor:
    return _list(digits.sort(1).values)


def _careless_list(digits: Tensor, generator: Generator) -> Tensor:
    """The list of `_careless` digits; each character is END with probability .02."""
    answers = _list(_careless(digits, generator)[:, :-1])
    answers[torch.rand(answers.shape, generator=generator) < 0.02] = END
    return truncate(answers)[0]


def _descending(digits: Tensor) -> Tensor:
    return _with_end(digits.sort(1, descending=True).values)


def _mostly_ascending(digits: Tensor, generator: Generator) -> Tensor:
    is_right = torch.rand(len(digits), 1, generator=generator) < 0.15
    return torch.where(is_right, _descending(digits), _sorted(digits))


def _summands(digits: Tensor) -> Tensor:
    return torch.cat([digits[:, :3], torch.full_like(digits[:, :1], PLUS), digits[:, 3:]], 1)


def _sum(digits: Tensor) -> Tensor:
    """The sum, least significant digit first: three digits, or four of which the last is 1."""
    weights = torch.tensor([100, 10, 1])
    total = (digits[:, :3] * weights).sum(1) + (digits[:, 3:] * weights).sum(1)
    places = digits_of(total, 4).flip(1)
    fourth = places[:, 3:]
    ends = torch.where(fourth == 1, torch.tensor([1, END]), torch.tensor([END, BLANK]))
    return torch.cat([places[:, :3], ends], 1)


def _sum_without_carries(digits: Tensor, generator: Generator) -> Tensor:
    places = ((digits[:, :3] + digits[:, 3:]) % 10).flip(1)
    return torch.cat([_with_end(places), torch.full_like(places[:, :1], BLANK)], 1)


TASKS = {
    "sort": Task("sort five digits", 5, 6, lambda digits: digits, _sorted, _careless),
    "list": Task("sort, any signs between", 5, 10, lambda digits: digits, _sorted_list, _careless_list),
    "descend": Task("largest first", 5, 6, lambda digits: digits, _descending, _mostly_ascending),
    "add": Task("add three digits", 6, 5, _summands, _sum, _sum_without_carries),
}
