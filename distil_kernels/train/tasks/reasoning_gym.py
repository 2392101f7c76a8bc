"""Any reasoning-gym task that comes with an answer, with reasoning-gym's own verifier."""

from __future__ import annotations

import difflib
from typing import Any

from distil_kernels.train.tasks.problem import Problem

BLOCK = 1000
"""Problems per data set object; some tasks refuse or are slow at large sizes, so an endless stream is many objects."""


class ReasoningGym:
    """A procedural data set of the reasoning-gym package, by name.

    Raises:
        ValueError: the package or the task is missing, or its entries hold no answer that a correction could show.
    """

    def __init__(self, name: str, seed: int) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise ValueError("[task] reasoning_gym tasks need the package: pip install reasoning-gym") from None
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"[task] reasoning-gym has no task {name!r}{hint}")
        self._create, self._name, self._seed = reasoning_gym.create_dataset, name, seed
        try:
            self._use_block(0)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"[task] reasoning-gym cannot make {name!r} with its own settings: {error}") from error
        if self._dataset[0]["answer"] is None:
            raise ValueError(f"[task] entries of reasoning-gym's {name!r} hold no answer to show as a correction")

    def _use_block(self, block: int) -> None:
        # An entry's generator is seeded with seed + index, so blocks follow on from each other.
        self._block = block
        self._dataset = self._create(self._name, size=BLOCK, seed=self._seed + block * BLOCK)

    def problem(self, index: int) -> Problem:
        block, offset = divmod(index, BLOCK)
        if block != self._block:
            self._use_block(block)
        entry = self._dataset[offset]
        return Problem(entry["question"], str(entry["answer"]), entry, key=entry["question"])

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        try:
            return float(self._dataset.score_answer(answer, entry))
        except Exception:  # of an answer that its task's own verifier cannot read: prime_factorization and "2 x a"
            return 0.0
