"""A teacher that was asked before: what `record_teacher` wrote, for the sequences of a data set and no others.

It cannot answer a question, and evaluations have no accuracy of it. What decides which sequences there are (the task's
file, the vocabulary, the prompt's layout and examples, the length limit) must be as it was when the store was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_kernels.train.config import Config, as_text
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Ends, Sampling
from distil_kernels.train.run.inputs import inputs
from distil_kernels.train.teachers.base import HiddenTarget, Target
from distil_kernels.train.teachers.store import Store, sequence_key, topk_of

OPTIONS = (
    "seed", "num_examples", "layout", "chat_template_kwargs", "max_new_tokens", "feedback", "teacher_reads",
)  # fmt: skip
"""Options that decide what a sequence is."""


def sources(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a store is of, but for its teacher: the options by name, and checksums of what is read besides."""
    checksums = {f"{name.partition(' --')[0]} --{name.split(' --')[1].split()[0]}": found
                 for name, found in inputs(config, tokenizer).items()}  # fmt: skip
    task = {} if "the file of --task" in checksums else {"task": config.task}
    return {**task, **{name: getattr(config, name) for name in OPTIONS}, **checksums}


class StoredTeacher:
    """A `Teacher` that reads its answers from config.teacher_store.

    Raises:
        ValueError: there is no such store, it was made of other tokens, texts or options, or its payload does not go
            with the objective.
    """

    moves = False
    answers = False

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device
    ) -> None:
        self._store = Store(Path(config.teacher_store), "teacher_store")
        self._device = device
        origin = self._store.origin
        for name, wanted in sources(config, tokenizer).items():
            if origin.get(name) != wanted:
                is_option = name in OPTIONS or name == "task"
                had = f"{as_text(origin.get(name))}, got {as_text(wanted)}" if is_option else "another content"
                raise ValueError(
                    f"[{name if is_option else 'teacher_store'}] {config.teacher_store} was recorded with {name} {had}"
                    ": expected the same"
                )
        self._head: tuple[Tensor, Tensor | None, float, float] | None = None
        if origin["payload"] == "topk":
            config.check_partial_teacher("a store of top log-probs", keeps_temperature=True)
        else:
            head = self._store.head()
            bias = head.get("bias")
            self._head = (
                head["weight"].to(device), None if bias is None else bias.to(device),
                float(origin["logit_scale"]), float(origin["logit_softcap"]),
            )  # fmt: skip
            if len(head["weight"]) != vocab_size:
                raise ValueError(
                    f"[teacher_store] {config.teacher_store} has a head of {len(head['weight'])} rows, expected the "
                    f"student's {vocab_size}"
                )

    @property
    def note(self) -> str:
        """What a person should know of the teacher."""
        origin = self._store.origin
        what = f"top {origin['top']} log-probs" if self._head is None else "hidden states"
        return f"{self._store.folder} has {what} of {origin['model']} for {len(self._store)} sequences"

    def opened(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def head_opened(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @torch.no_grad()
    def target(self, batch: PackedBatch) -> Target:
        prompts = [batch.teacher_prompts[index] for index in batch.teacher_prompt_index]
        keys = [sequence_key(*pair) for pair in zip(prompts, batch.completions, strict=True)]
        rows = self._store.rows(keys)
        if rows is None:
            num_missing = sum(key not in self._store for key in keys)
            raise ValueError(
                f"[teacher_store] {self._store.folder} lacks {num_missing} of {len(keys)} sequences of a batch, "
                "expected those of every step: record_teacher with the run's --steps and --prompts_per_step adds them"
            )
        rows = {name: part.to(self._device) for name, part in rows.items()}
        return topk_of(rows) if self._head is None else HiddenTarget(rows["states"], *self._head)

    def generate(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> list[Rollout]:
        raise NotImplementedError("a store answers no question")

    def follow(self) -> None:
        """A store does not follow the student."""

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the store was made by another teacher than the run's."""
        if state["origin"] != self._identity:
            raise ValueError(
                f"[teacher_store] {self._store.folder} was recorded of another teacher, or in another way, than the "
                "store that the run began with: expected the same"
            )

    @property
    def _identity(self) -> str:
        return hashlib.sha256(json.dumps(self._store.origin, sort_keys=True).encode()).hexdigest()
