"""Six small tasks on numbers with short answers, that a 135M-parameter model mostly does not do at first.

Sampled accuracy of SmolLM2-135M-Instruct after two worked examples: `largest` .20, `remainder` .14, `sort` .11,
`add` .010, `reverse` .005.
"""

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


class Product(_Numbers):
    """A number up to 30 times a digit."""

    def problem(self, index: int) -> Problem:
        (left,), (right,) = self._draw(index, 1, 2, 30), self._draw(~index, 1, 2, 9)
        return self._problem(f"{left} * {right}", str(left * right), [left, right])


class Remainder(_Numbers):
    """What is left of a two-digit number after division by a digit."""

    def problem(self, index: int) -> Problem:
        (number,), (divisor,) = self._draw(index, 1, 10, 99), self._draw(~index, 1, 3, 9)
        return self._problem(f"{number} modulo {divisor}", str(number % divisor), [number, divisor])


class Reverse(_Numbers):
    """The digits of a four-digit number from the last to the first."""

    def problem(self, index: int) -> Problem:
        (number,) = self._draw(index, 1, 1000, 9999)
        return self._problem(str(number), str(number)[::-1], [number])
