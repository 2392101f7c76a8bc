"""Any reasoning-gym task, with reasoning-gym's own verifier."""

from __future__ import annotations

import difflib
from typing import Any

NUM_PROBLEMS = 1_000_000_000
"""Size asked of a data set: problems are made when they are read."""


class ReasoningGym:
    """A procedural data set of the reasoning-gym package, by name."""

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
        self._dataset = reasoning_gym.create_dataset(name, size=NUM_PROBLEMS, seed=seed)

    def problem(self, index: int) -> tuple[str, str, dict[str, Any]]:
        entry = self._dataset[index]
        return entry["question"], str(entry["answer"]), entry

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        return float(self._dataset.score_answer(answer, entry))
