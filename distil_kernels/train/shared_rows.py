"""Rows of all processes for one loss, where a sharded model's vocabulary stays in shards (`models.exchanged_rows`).

A micro-batch of all processes is packed in each of them, from the tokens that they tell each other. Each reads its own
part, hidden states are gathered, and each has the sums of its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distil_kernels.hf import output_head
from distil_kernels.train.models.exchanged_rows import Sizes, all_rows, exchange_is_leaner
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.models.sharding import can_exchange_rows
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.run.distributed import Processes
from distil_kernels.train.teachers.base import Target, Teacher, TopKTarget
from distil_kernels.train.teachers.in_process import InProcessTeacher


class SharedRows(NamedTuple):
    """The rows of all processes, of which a head in shards of the vocabulary makes one loss."""

    batch: PackedBatch
    """Of all processes."""
    own: slice
    """The rows of this process."""

    @staticmethod
    def of(
        groups: Sequence[PromptGroup],
        packed: Callable[[Sequence[PromptGroup]], PackedBatch],
        student: Reader,
        teacher: Teacher,
        processes: Processes,
    ) -> SharedRows | None:
        """Makes the record of a micro-batch, of which these groups are this process's; None where the heads come.

        Args:
            packed: makes a batch of groups.
        """
        if not can_exchange_rows(student):
            return None
        every = processes.gather([list(groups)])
        rows = [sum(len(rollout.tokens) for group in part for rollout in group.rollouts) for part in every]
        if not exchange_is_leaner(_sizes(student, teacher, processes.count, sum(rows), sum(map(_num_read, every)))):
            return None
        begin = sum(rows[: processes.index])
        own = slice(begin, begin + rows[processes.index])
        return SharedRows(packed([group for part in every for group in part]), own)


def target_of_all(target: Target, teacher: Teacher, group: Any) -> Target:
    """The targets of the rows of all processes, with a sharded teacher's head as it lies."""
    if isinstance(target, TopKTarget):
        return TopKTarget(*(all_rows(each, group) for each in target))
    if isinstance(teacher, InProcessTeacher):
        target = teacher.in_shards(target)
    return target._replace(states=all_rows(target.states, group))


def _num_read(groups: Sequence[PromptGroup]) -> int:
    """The tokens of padded rows."""
    lengths = [len(group.prompt) + len(rollout.tokens) - 1 for group in groups for rollout in group.rollouts]
    return len(lengths) * max(lengths, default=0)


def _sizes(student: Reader, teacher: Teacher, num_processes: int, rows: int, ids: int) -> Sizes:
    head, model, num_teacher = student.weight, student.model, 0
    if isinstance(teacher, InProcessTeacher) and teacher.lm.weight is not head:
        num_teacher = teacher.lm.weight.shape[1]
    is_tied = output_head(model).weight is model.get_input_embeddings().weight
    vocab_size, hidden_size = head.shape
    return Sizes(num_processes, rows, ids, vocab_size, hidden_size, num_teacher, is_tied, head.requires_grad)
