"""Three small tasks on numbers, that a 135M-parameter model can do but mostly does not at first."""

from __future__ import annotations

import random

from distil_kernels.train.tasks.problem import Problem


class _Numbers:
    """Draws from a generator of its own per problem, so that any problem can be had without those before it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def _draw(self, index: int, count: int, low: int, high: int) -> list[int]:
        return random.Random(f"{self._seed}/{index}").sample(range(low, high + 1), count)

    @staticmethod
    def _problem(question: str, answer: str, numbers: list[int]) -> Problem:
        """The numbers in any order are one problem."""
        return Problem(question, answer, entry=answer, key=str(sorted(numbers)))

    def score(self, answer: str, entry: str) -> float:
        return float(answer == entry)


class LargestNumber(_Numbers):
    """The largest of four two-digit numbers."""

    def problem(self, index: int) -> Problem:
        numbers = self._draw(index, 4, 10, 99)
        return self._problem(", ".join(map(str, numbers)), str(max(numbers)), numbers)


class SortNumbers(_Numbers):
    """Three two-digit numbers in rising order."""

    def problem(self, index: int) -> Problem:
        numbers = self._draw(index, 3, 10, 99)
        return self._problem(", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers))), numbers)


class AddNumbers(_Numbers):
    """The sum of two three-digit numbers."""

    def problem(self, index: int) -> Problem:
        numbers = self._draw(index, 2, 100, 999)
        return self._problem(f"{numbers[0]} + {numbers[1]}", str(sum(numbers)), numbers)
