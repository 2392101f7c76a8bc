"""A teacher between the student at the start and the student as it is (SDPO's trust region, arXiv 2601.20802): both
read the feedback, and their logits are interpolated.

    T = softmax((1 - a) t_start + a t_student)          a: ema_rate, which SDPO calls teacher_update_rate

As probabilities that is a normalised geometric mean. Logits are a product of hidden states and head, and so is their
interpolation: states [(1 - a) h_start, a h_student] of twice the width, heads side by side. The loss takes that as a
teacher of another hidden size, and no logits are held here. A student with adapters has one head for both, and its
states alone are interpolated.

Memory: a copy of the start's weights (none with adapters), and both heads once more. Left out: softcapped logits, whose
interpolation is no such product, and sharded models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Ends, Sampling, generate
from distil_kernels.train.teachers.base import HiddenTarget
from distil_kernels.train.teachers.in_process import InProcessTeacher


class TrustRegionTeacher(InProcessTeacher):
    """A `Teacher` that holds the start as a frozen one does.

    Args:
        share: of the student's logits.
        reading, starts_without: as of `InProcessTeacher`.

    Raises:
        ValueError: the logits have a softcap.
    """

    def __init__(self, student: Reader, share: float, reading: str = "auto", starts_without: bool = True) -> None:
        if not math.isinf(student.logit_softcap):
            raise ValueError(
                f"[teacher] trust_region interpolates logits: expected a model without a softcap, got one of "
                f"{student.logit_softcap:g}"
            )
        super().__init__(student, "frozen", 0.0, None, reading, starts_without)
        self._share = share

    @property
    def moves(self) -> bool:
        return True

    @property
    def answers(self) -> bool:
        """Both models sample together, which they do where their prompts are read once."""
        return self.lm.shares_prompts

    @torch.no_grad()
    def target(self, batch: PackedBatch) -> HiddenTarget:
        start, share, student = super().target(batch), self._share, self._student
        with student.opened():
            states = student.states(batch.teacher_prompts, batch.teacher_prompt_index, batch.completions)
        if start.weight is None:
            return start._replace(states=torch.lerp(start.states, states.to(start.states.dtype), share))
        bias = start.bias
        if bias is not None and student.bias is not None:
            bias = torch.lerp(bias, student.bias.detach(), share)
        return start._replace(
            states=torch.cat([(1.0 - share) * start.states, share * states.to(start.states.dtype)], 1),
            weight=torch.cat([start.weight, student.weight.detach()], 1),
            bias=bias,
        )

    def generate(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> list[Rollout]:
        both = _Both(self.lm, self._student, self._share, self._adapters_disabled)
        with self.opened():
            return generate(cast(Reader, both), prompts, prompt_index, sampling, ends)


class _Caches:
    """The caches of two models, which have the same rows."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def batch_repeat_interleave(self, count: int) -> None:
        for part in self.parts:
            part.batch_repeat_interleave(count)

    def batch_select_indices(self, index: Tensor) -> None:
        for part in self.parts:
            part.batch_select_indices(index)


class _Both:
    """Two models as one that samples, by the interpolation of their logits."""

    shares_prompts = True

    def __init__(
        self, start: Reader, student: Reader, share: float, as_start: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._models, self._share, self._as_start = (start, student), share, as_start
        self.weight = student.weight

    def new_cache(self) -> _Caches:
        return _Caches(*(lm.new_cache() for lm in self._models))

    def hidden(self, input_ids: Tensor, cache: _Caches, **kwargs: Any) -> Tensor:
        """Returns the hidden states of both, side by side."""
        start, student = self._models
        with self._as_start():
            first = start.hidden(input_ids, cache=cache.parts[0], **kwargs)
        return torch.cat([first, student.hidden(input_ids, cache=cache.parts[1], **kwargs)], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        start, student = (lm.logits(states) for lm, states in zip(self._models, hidden.chunk(2, -1), strict=True))
        return torch.lerp(start, student, self._share)
