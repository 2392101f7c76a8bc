"""A teacher whose weights are in this process: the student's, which reads more than the student does, or another
model of the same vocabulary.

    live      the student as it is; it follows every step, and can follow the student into a collapse
    frozen    the student at the start; it cannot collapse, and what it can do with the feedback bounds what is learnt
    ema       a slow average of the student, in float32
    local     any other causal LM with the student's tokens; its head is brought to the size of the student's

The frozen teacher of a student with new adapters is the same model with its adapters off and costs no memory; where the
adapters were trained before it is a second set of them, and so is an ema teacher. The kinds `remote`, `samples`,
`hidden` and `stored` have no body here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedTokenizerBase

from distil_kernels import token_logprobs
from distil_kernels.hf import CausalLM
from distil_kernels.train.config import Config
from distil_kernels.train.models import loading
from distil_kernels.train.models.heads import named_end_ids
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.models.sharding import (
    can_exchange_rows,
    full_tensor,
    head_in_shards,
    local_shard,
    split_sharded,
    unsharded,
    unsharded_heads,
)
from distil_kernels.train.models.state import load_model_state, model_state
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Ends, Sampling, generate
from distil_kernels.train.teachers.base import HiddenTarget

ABSENT = -1e4
"""Logit of tokens that the teacher's head lacks. Their probability is 0, and 0 times the logit is not NaN."""


class InProcessTeacher:
    """A `Teacher` that answers with hidden states and a head.

    Args:
        kind: "live", "frozen", "ema" or "local".
        rate: share of the student that enters the average each step.
        other: the model of kind "local", or the copy of a sharded student that an ema or frozen teacher starts from
            (`copied` here if None).
        reading: the way in which a model that is not the student reads (`reader`).
        starts_without: the student's adapters change nothing at the start.

    Raises:
        ValueError: the loss cannot express `other`.
    """

    def __init__(
        self,
        student: Reader,
        kind: str,
        rate: float,
        other: nn.Module | None = None,
        reading: str = "auto",
        starts_without: bool = True,
    ) -> None:
        self.kind, self._rate, self._student = kind, rate, student
        self._adapters_off = kind == "frozen" and hasattr(student.model, "disable_adapter") and starts_without
        self._resized: CausalLM | None = None
        """A sharded model with its head cut where the student's is, if it has another number of rows."""
        if kind == "live" or self._adapters_off:
            self.lm = student
        elif kind == "local":
            assert other is not None
            other = other.requires_grad_(False).eval().to(student.weight.device)
            with unsharded(other):
                lm = split_sharded(other)
                self.lm = reader(with_head_like(lm, student), reading, autocast=student.autocast)
                if can_exchange_rows(student) and len(lm.weight) != len(student.weight):
                    self._resized = with_head_like(lm, head_in_shards(student))
        else:
            start = other or copied(student.model)
            with unsharded(start):
                self.lm = reader(split_sharded(start), reading, autocast=student.autocast)
        self._average: dict[str, tuple[Tensor, Tensor]] = {}
        """By name, each averaged parameter of an ema teacher and the student's parameter that it follows."""
        if kind == "ema":
            averages = dict(self.lm.model.named_parameters())
            trained = {name: weight for name, weight in student.model.named_parameters() if weight.requires_grad}
            self._average = {name: (averages[name], weight) for name, weight in trained.items()}

    @property
    def answers(self) -> bool:
        return True

    @property
    def moves(self) -> bool:
        return self.kind in ("live", "ema")

    @property
    def head(self) -> tuple[Tensor | None, Tensor | None, float, float]:
        """The fields of `HiddenTarget` after its states; the weight is None if it is the student's."""
        weight = None if self.lm.weight is self._student.weight else self.lm.weight
        return weight, self.lm.bias, self.lm.logit_scale, self.lm.logit_softcap

    def opened(self) -> contextlib.AbstractContextManager[None]:
        return self.lm.opened()

    def head_opened(self) -> contextlib.AbstractContextManager[None]:
        return unsharded_heads(self.lm.model)

    def in_shards(self, target: HiddenTarget) -> HiddenTarget:
        """The target with a head of a sharded model as it lies, in shards of the vocabulary."""
        if target.weight is None:
            return target
        head = self._resized or head_in_shards(self.lm)
        return target._replace(weight=head.weight, bias=head.bias)

    @torch.no_grad()
    def target(self, batch: PackedBatch) -> HiddenTarget:
        """The hidden states that predict the completions' tokens, and the head."""
        with self.opened(), self._adapters_disabled():
            states = self.lm.states(batch.teacher_prompts, batch.teacher_prompt_index, batch.completions)
        return HiddenTarget(states, *self.head)

    @torch.no_grad()
    def token_logprobs(self, batch: PackedBatch, config: Config) -> Tensor:
        """Returns the log-probs [N] of the completions' tokens after the student's own prompts, 0 where none learns."""
        with self.opened(), self._adapters_disabled():
            states = self.lm.states(batch.prompts, batch.prompt_index, batch.completions)
            return token_logprobs(
                states, self.lm.weight.to(states.dtype), tokens=batch.tokens, student_bias=self.lm.bias,
                vocab_size=self.lm.vocab_size, token_mask=batch.learns.either(batch.judged).values,
                temperature=config.temperature, logit_softcap=self.lm.logit_softcap,
                student_logit_scale=self.lm.logit_scale, backend=config.backend, vocab_group=self.lm.vocab_group,
            ).logprob  # fmt: skip

    def generate(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> list[Rollout]:
        with self.opened(), self._adapters_disabled():
            return generate(self.lm, prompts, prompt_index, sampling, ends)

    def _adapters_disabled(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model of a PEFT student is the one that it started from, if that one teaches."""
        return self._student.model.disable_adapter() if self._adapters_off else contextlib.nullcontext()

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average after an optimizer step."""
        if self._average:
            averages, trained = zip(*self._average.values(), strict=True)
            shares = [local_shard(parameter).to(torch.float32) for parameter in trained]
            torch._foreach_lerp_([local_shard(parameter) for parameter in averages], shares, self._rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged weights by name, in the main process; empty for a teacher that is no average."""
        state = model_state(self.lm.model) if self._average else {}
        return {name: state[name] for name in self._average if state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._average:
            load_model_state(self.lm.model, {name: state[name] for name in self._average}, strict=False)


def copied(student: nn.Module, copies_all: bool = False) -> nn.Module:
    """A copy of the student, from which an ema or frozen teacher starts.

    Unless it `copies_all`, the copy shares the parameters that are not trained: the average of an adapted model is the
    average of its adapters.
    """
    fixed = {} if copies_all else {id(weight): weight for weight in student.parameters() if not weight.requires_grad}
    return copy.deepcopy(student, fixed).requires_grad_(False).eval()


def other_model(
    config: Config, student: Any, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, is_in_parts: bool
) -> Any:
    """The argument `other` of `InProcessTeacher`, made before student and teacher are sharded or cut.

    Raises:
        ValueError: teacher_model cannot be loaded, or its token ids mean other tokens.
    """
    if config.teacher == "local":
        model, teacher_tokenizer = loading.load(config.teacher_model, "teacher_model")
        check_same_tokens(tokenizer, teacher_tokenizer)
        loading.use_flash_attention(model, accelerator.device, accelerator.mixed_precision)
        # The student learns to end answers as its teacher does: its checkpoint must name those end tokens too.
        ends = {*loading.end_ids(student, tokenizer), *loading.end_ids(model, teacher_tokenizer)}
        student.generation_config.eos_token_id = sorted(ends)
        return model
    if config.teacher == "hidden":
        ends = {*loading.end_ids(student, tokenizer), *named_end_ids(config.teacher_model)}
        student.generation_config.eos_token_id = sorted(ends)
    copies = config.teacher == "ema" or (config.teacher == "frozen" and not config.lora_rank)
    return copied(student, copies_all=True) if is_in_parts and copies else None


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if a token id that both tokenizers know is not the same token."""
    ours, theirs = (
        {index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)
    )
    shared = sorted(ours.keys() & theirs.keys())
    different = [index for index in shared if ours[index] != theirs[index]]
    if different or not shared:
        first = different[0] if different else 0
        raise ValueError(
            f"[teacher_model] {len(different)} of {len(shared)} token ids mean something else to the teacher, expected "
            f"one vocabulary: id {first} is {ours.get(first)!r} to the student, {theirs.get(first)!r} to the teacher"
        )


def with_head_like(lm: CausalLM, student: CausalLM) -> CausalLM:
    """The teacher with the student's vocabulary: further rows of its head are cut off, missing ones have probability
    0.

    In shards its head is cut where the student's is, or rows of it would be exchanged in every call.
    """
    rows, wanted = lm.vocab_size, student.vocab_size
    size = len(student.weight) if student.vocab_group else wanted
    if len(lm.weight) == size and rows >= wanted:
        return dataclasses.replace(lm, vocab_size=wanted)
    with torch.no_grad():
        kept = min(rows, wanted)
        weight, bias = full_tensor(lm.weight)[:kept], None if lm.bias is None else full_tensor(lm.bias)[:kept]
        if rows < wanted:
            if not math.isinf(lm.logit_softcap):
                raise ValueError(
                    f"[teacher_model] its head has {rows} rows, expected the student's {wanted} or more: capped logits "
                    "cannot say that a token is absent"
                )
            absent = max(ABSENT / lm.logit_scale, torch.finfo(weight.dtype).min)
            bias = nn.functional.pad(weight.new_zeros(rows) if bias is None else bias, (0, size - rows), value=absent)
        if kept < size:
            weight = nn.functional.pad(weight, (0, 0, 0, size - kept))
        if bias is not None and len(bias) < size:
            bias = nn.functional.pad(bias, (0, size - len(bias)))
        weight, bias = (_cut_like(each, student.weight) for each in (weight, bias))
    return dataclasses.replace(lm, weight=weight, bias=bias, vocab_size=wanted)


def _cut_like(tensor: Tensor | None, head: Tensor) -> Any:
    """A tensor in shards where a head is."""
    if tensor is None or not isinstance(head, DTensor):
        return tensor
    return distribute_tensor(tensor, head.device_mesh, head.placements, src_data_rank=None)
