"""The teacher: the student's own body and head, now, at the start, or averaged, reading more than the student does.

`live` follows every step and can follow the student into a collapse. `frozen` cannot, and bounds what can be learnt
by what the start can do with the feedback. `ema`, a slow average in float32, is between. A PEFT student's frozen
teacher is the same model with its adapters off, and costs no memory.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from distil_kernels.hf import CausalLM, split
from distil_kernels.train.prefix import completion_hidden


class Teacher:
    """Answers with hidden states, and a head where it is not the student's own.

    Args:
        kind: "live", "frozen" or "ema".
        rate: share of the student that enters the average each step.
    """

    def __init__(self, student: CausalLM, kind: str, rate: float) -> None:
        self.kind, self._rate, self._student = kind, rate, student
        self._adapters_off = kind == "frozen" and hasattr(student.model, "disable_adapter")
        if kind == "live" or self._adapters_off:
            self.lm = student
        else:
            self.lm = split(copy.deepcopy(student.model).requires_grad_(False).eval(), check=False)

    @property
    def head(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the teacher's head; weight None where it shares the student's."""
        return (None if self.lm is self._student else self.lm.weight), self.lm.bias

    @torch.no_grad()
    def hidden(
        self, prompts: Sequence[list[int]], rows: Sequence[int], completions: Sequence[list[int]], share: bool
    ) -> Tensor:
        """[N, D] for the completions' tokens after the teacher's prompts; arguments of `completion_hidden`."""
        with self.reading():
            return completion_hidden(self.lm, prompts, rows, completions, share)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """In it, `lm` gives the teacher's values."""
        return self._student.model.disable_adapter() if self._adapters_off else contextlib.nullcontext()

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average after an optimiser step."""
        if self.kind == "ema":
            mine: list[Tensor] = list(self.lm.model.parameters())
            theirs = [parameter.to(torch.float32) for parameter in self._student.model.parameters()]
            torch._foreach_lerp_(mine, theirs, self._rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty unless the teacher has a state that the start and the student do not give."""
        return self.lm.model.state_dict() if self.kind == "ema" else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.kind == "ema":
            self.lm.model.load_state_dict(state)
