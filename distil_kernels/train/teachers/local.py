"""The teacher: the student's own body and head, now, at the start, or averaged, reading more than the student does;
or another model of the same vocabulary.

`live` follows every step and can follow the student into a collapse. `frozen` cannot, and bounds what can be learnt
by what the start can do with the feedback. `ema`, a slow average in float32, is between. A PEFT student's frozen
teacher is the same model with its adapters off and costs no memory, its ema teacher a second set of adapters. `local`
is any other causal LM with the student's tokens; heads that one family pads to different sizes are brought to the
student's. `remote` and `samples` have no weights here: `remote.RemoteTeacher`.

Left out: a local teacher whose softcap is not the student's (the loss knows one).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distil_kernels.hf import CausalLM
from distil_kernels.train.config import Config
from distil_kernels.train.models import loading
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.models.sharding import local_shard, split_sharded, unsharded
from distil_kernels.train.models.state import load_model_state, model_state
from distil_kernels.train.rollouts.python_tool import Python, Rollouts, roll_out
from distil_kernels.train.rollouts.sampling import Sampling, sample

ABSENT = -1e4
"""Logit of tokens that the teacher's head lacks: their probability is 0, and 0 times it is no NaN."""


class Teacher:
    """Answers with hidden states, and a head where it is not the student's own.

    Args:
        kind: "live", "frozen", "ema" or "local".
        rate: share of the student that enters the average each step.
        other: the model that teaches when kind is "local"; that an average or frozen teacher starts from where it is
            not to be `copied` here, because the student is sharded.
        reading: how a model of its own reads (`reader`).

    Raises:
        ValueError: the loss cannot express `other`.
    """

    def __init__(
        self, student: Reader, kind: str, rate: float, other: nn.Module | None = None, reading: str = "auto"
    ) -> None:
        self.kind, self._rate, self._student = kind, rate, student
        self._adapters_off = kind == "frozen" and hasattr(student.model, "disable_adapter")
        if kind == "live" or self._adapters_off:
            self.lm = student
        elif kind == "local":
            assert other is not None
            other = other.requires_grad_(False).eval().to(student.weight.device)
            with unsharded(other):
                self.lm = reader(_with_head_like(split_sharded(other), student), reading)
        else:
            start = other or copied(student.model)
            with unsharded(start):
                self.lm = reader(split_sharded(start, check=False), reading)
        self._average: dict[str, tuple[Tensor, Tensor]] = {}
        """Each parameter of an ema teacher that moves, with the student's that it follows."""
        if kind == "ema":
            mine = dict(self.lm.model.named_parameters())
            trained = {name: theirs for name, theirs in student.model.named_parameters() if theirs.requires_grad}
            self._average = {name: (mine[name], theirs) for name, theirs in trained.items()}

    @property
    def moves(self) -> bool:
        """Whether the next update changes its answers."""
        return self.kind in ("live", "ema")

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Whose weights its answers take."""
        return (self.lm.model,)

    @property
    def head(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the teacher's head; weight None where it shares the student's."""
        return (None if self.lm.weight is self._student.weight else self.lm.weight), self.lm.bias

    @torch.no_grad()
    def at_states(
        self,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        completions: Sequence[list[int]],
        counts: Sequence[Sequence[bool]] | None = None,
    ) -> Tensor:
        """Hidden states [N, D] that predict the completions' tokens; arguments of `Reader.states`.

        Tokens that do not count are read with the others of their row.
        """
        with self._reading():
            return self.lm.states(prompts, rows, completions)

    def answers(
        self, prompts: Sequence[list[int]], rows: Sequence[int], sampling: Sampling, tool: Python | None
    ) -> Rollouts:
        """Its own completions; arguments of `roll_out`."""
        with self._reading():
            return roll_out(partial(sample, self.lm), prompts, rows, sampling, tool)

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        """In it, `lm` gives the teacher's values."""
        return self._student.model.disable_adapter() if self._adapters_off else contextlib.nullcontext()

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average after an optimiser step."""
        if self._average:
            mine, theirs = zip(*self._average.values(), strict=True)
            shares = [local_shard(parameter).to(torch.float32) for parameter in theirs]
            torch._foreach_lerp_([local_shard(parameter) for parameter in mine], shares, self._rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged weights by name, in the main process; empty for a teacher that is no average."""
        state = model_state(self.lm.model) if self._average else {}
        return {name: state[name] for name in self._average if state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._average:
            load_model_state(self.lm.model, {name: state[name] for name in self._average}, strict=False)


def copied(student: nn.Module, apart: bool = False) -> nn.Module:
    """What an ema or frozen teacher starts from.

    Unless it is to be kept apart, what is not trained stays the student's own: the average of an adapted model is that
    of its adapters.
    """
    fixed = {} if apart else {id(weight): weight for weight in student.parameters() if not weight.requires_grad}
    return copy.deepcopy(student, fixed).requires_grad_(False).eval()


def other_model(
    config: Config, student: Any, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, is_sharded: bool
) -> Any:
    """`Teacher`'s argument of that name, before student and teacher are sharded.

    Raises:
        ValueError: teacher_model cannot be loaded, or its tokens are others.
    """
    if config.teacher == "local":
        model, its_tokenizer = loading.load(config.teacher_model, "teacher_model")
        check_same_tokens(tokenizer, its_tokenizer)
        loading.use_flash_attention(model, accelerator.device, accelerator.mixed_precision)
        # A student that learns to end as its teacher does must be heard to, here and by who loads its checkpoint.
        ends = {*loading.end_ids(student, tokenizer), *loading.end_ids(model, its_tokenizer)}
        student.generation_config.eos_token_id = sorted(ends)
        return model
    copies = config.teacher == "ema" or (config.teacher == "frozen" and not config.lora_rank)
    return copied(student, apart=True) if is_sharded and copies else None


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where a token id that both tokenizers know is not the same token."""
    mine, other = ({index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    shared = sorted(mine.keys() & other.keys())
    different = [index for index in shared if mine[index] != other[index]]
    if different or not shared:
        first = different[0] if different else 0
        raise ValueError(
            f"[teacher_model] {len(different)} of {len(shared)} token ids mean something else to the teacher, expected "
            f"one vocabulary: id {first} is {mine.get(first)!r} to the student, {other.get(first)!r} to the teacher"
        )


def _with_head_like(lm: CausalLM, student: CausalLM) -> CausalLM:
    """Rows that the student's head lacks are cut off; rows that the teacher's lacks have probability 0."""
    if lm.softcap != student.softcap:
        raise ValueError(
            f"[teacher_model] its logits are capped at {lm.softcap}, expected the student's {student.softcap}"
        )
    weight, bias = lm.weight, lm.bias
    rows, wanted = weight.shape[0], student.weight.shape[0]
    if rows < wanted:
        if lm.softcap is not None:
            raise ValueError(
                f"[teacher_model] its head has {rows} rows, expected the student's {wanted} or more: capped logits "
                "cannot say that a token is absent"
            )
        weight = nn.functional.pad(weight, (0, 0, 0, wanted - rows))
        bias = nn.functional.pad(weight.new_zeros(rows) if bias is None else bias, (0, wanted - rows), value=ABSENT)
    return dataclasses.replace(lm, weight=weight[:wanted], bias=None if bias is None else bias[:wanted])
