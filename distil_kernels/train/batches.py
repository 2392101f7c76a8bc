"""The data iterator: the problems of each step, with their prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distil_kernels.train.feedback.tutor import Tutor
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.run.distributed import Processes
from distil_kernels.train.tasks import problems

MAX_MISSES = 1000
"""Problems in a row that may be skipped."""


class Batches:
    """An endless iterator of batches of `num_prompts` problems without rollouts, the same in all processes.

    Problems whose prompts do not fit are skipped, and so are worked examples, whose answers stand in every prompt.

    Args:
        example_keys: the keys of the worked examples.
        needs_answers: problems without an expert's answer are skipped too.
    """

    def __init__(
        self,
        tutor: Tutor,
        example_keys: set[str],
        num_prompts: int,
        processes: Processes,
        needs_answers: bool = False,
    ) -> None:
        self._tutor, self._example_keys, self._needs_answers = tutor, example_keys, needs_answers
        self._num_prompts, self._processes = num_prompts, processes
        self._position = 0
        self.num_skipped = 0
        """Problems skipped so far."""

    def __iter__(self) -> Iterator[list[PromptGroup]]:
        return self

    def __next__(self) -> list[PromptGroup]:
        with self._processes.all_or_none():
            batch = self._read()
        # The main process decides: the feedback known before any answer may be a trace, which may differ.
        batch, self._position, self.num_skipped = self._processes.from_main((batch, self._position, self.num_skipped))
        return batch

    def _read(self) -> list[PromptGroup]:
        """Reads the problems of a batch, as this process sees them."""
        batch: list[PromptGroup] = []
        misses = example_misses = 0  # in a row
        for position, problem in problems(self._tutor.task, held_out=False, start=self._position):
            self._position = position
            is_example = problem.key in self._example_keys
            is_usable = not is_example and (bool(problem.answer) or not self._needs_answers)
            group = self._tutor.group(problem) if is_usable else None
            if group is None:
                self.num_skipped += 1
                misses += 1
                example_misses += is_example
                if example_misses == MAX_MISSES:
                    raise ValueError("[num_examples] a thousand problems in a row are worked examples: take fewer")
                if misses == MAX_MISSES and self._needs_answers and not problem.answer:
                    raise ValueError(
                        "[rollouts] a thousand problems in a row have no answer to learn: expected student"
                    )
                if misses == MAX_MISSES:
                    raise ValueError("[max_prompt_tokens] a thousand problems in a row did not fit: raise the limit")
                continue
            misses = example_misses = 0
            batch.append(group)
            if len(batch) == self._num_prompts:
                break
        return batch

    def state_dict(self) -> dict[str, Any]:
        task = self._tutor.task
        found = task.state_dict() if hasattr(task, "state_dict") else {}
        return {"position": self._position, "num_skipped": self.num_skipped, "task": found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position, self.num_skipped, task = state["position"], state["num_skipped"], self._tutor.task
        if hasattr(task, "load_state_dict"):
            task.load_state_dict(state["task"])
