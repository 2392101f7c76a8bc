"""The work of record_teacher: what a teacher says of the sequences that a run without rollouts would learn.

The batches are those of the run: its --steps and --prompts_per_step say how many. A sequence that the store has is
passed over, so that a recording that was cut short, or a longer one, goes on with the store.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from distil_kernels.train.build import Parts
from distil_kernels.train.config import Config
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.run.checkpoint import fingerprint
from distil_kernels.train.teachers.base import HiddenTarget
from distil_kernels.train.teachers.hidden_states import HiddenTeacher
from distil_kernels.train.teachers.in_process import InProcessTeacher
from distil_kernels.train.teachers.store import DTYPES, StoreWriter, rows_of, sequence_key, top_logprobs
from distil_kernels.train.teachers.stored import sources


def check_recording(config: Config, payload: str) -> None:
    """Raises ValueError where a teacher cannot be recorded with these options."""
    if config.rollouts != "none":
        raise ValueError("[rollouts] record_teacher writes what is learnt without rollouts: expected none (preset kd)")
    if config.teacher in ("live", "ema", "trust_region", "stored"):
        raise ValueError(f"[teacher] record_teacher takes one that stays as it is, got {config.teacher}")
    if payload == "hidden" and config.teacher in ("remote", "samples"):
        raise ValueError(f"[payload] teacher {config.teacher} gives log-probs: expected topk, got hidden")
    if payload == "topk" and config.teacher_temperature != 1.0 and config.teacher != "samples":
        raise ValueError(f"[teacher_temperature] payload topk takes 1.0, got {config.teacher_temperature}")


def _weights(teacher: InProcessTeacher | HiddenTeacher) -> str:
    """The same for the same weights behind the same kind of teacher."""
    if isinstance(teacher, HiddenTeacher):
        return teacher.digest.hex()
    return hashlib.sha256(repr(fingerprint(teacher.lm.model)).encode()).hexdigest()


class Recording:
    """A store that is being made of the parts of a run."""

    def __init__(self, config: Config, parts: Parts, folder: Path, payload: str, dtype: str) -> None:
        if parts.processes.are_several:
            raise ValueError(f"[STORE] record_teacher writes from one process, got {parts.accelerator.num_processes}")
        self._config, self._parts, self._dtype = config, parts, DTYPES[dtype]
        self._is_hidden = payload == "hidden"
        teacher, student = parts.models.teacher, parts.models.student
        origin: dict[str, Any] = {
            "payload": payload, "dtype": dtype, "teacher": config.teacher,
            "model": config.teacher_model or config.teacher_url or config.model,
            "top": None if self._is_hidden else self._num_columns,
            **sources(config, parts.models.tokenizer),
        }  # fmt: skip
        head = None
        if isinstance(teacher, (InProcessTeacher, HiddenTeacher)):
            origin["weights"] = _weights(teacher)
            if self._is_hidden:
                weight, bias, origin["logit_scale"], softcap = teacher.head
                origin["logit_softcap"] = str(softcap)
                weight = (student.weight if weight is None else weight).detach()[: student.vocab_size]
                head = {"weight": weight.float().cpu()}
                head |= {} if bias is None else {"bias": bias.detach()[: student.vocab_size].float().cpu()}
        self.writer = StoreWriter(folder, origin, head)

    @property
    def _num_columns(self) -> int:
        return self._config.teacher_samples if self._config.teacher == "samples" else self._config.teacher_top

    def step(self) -> None:
        """Records the sequences of the next batch."""
        models, data = self._parts.models, self._parts.data
        groups = next(data.batches)
        data.tutor.take_answers(groups, data.sampling)
        data.tutor.give_feedback(models.student, groups, 1)
        fresh: dict[bytes, PromptGroup] = {}
        for group in groups:
            (rollout,) = group.rollouts
            if rollout.teacher_prompt is not None:
                key = sequence_key(rollout.teacher_prompt, rollout.tokens)
                fresh |= {} if key in self.writer else {key: group}
        if not fresh:
            return
        batch = PackedBatch.of(list(fresh.values()), models.student.weight.device)
        target = models.teacher.target(batch)
        if isinstance(target, HiddenTarget) and not self._is_hidden:
            target = top_logprobs(target, models.student.weight, self._config.teacher_top)
        rows = {
            name: part.split(batch.lengths) for name, part in rows_of(target, self._dtype, self._num_columns).items()
        }
        for place, key in enumerate(fresh):
            self.writer.add(key, {name: parts[place] for name, parts in rows.items()})
