"""What some things cost in a shop whose prices only the environment `shop` tells."""

from __future__ import annotations

import random
from typing import NamedTuple

from distil_kernels.train.tasks.problem import Problem

ITEMS = ("apple", "book", "candle", "fig", "lamp", "lemon", "pear", "pencil", "plum", "spoon")


class Purchase(NamedTuple):
    """So many of an item, at a price."""

    number: int
    item: str
    price: int

    @property
    def total(self) -> int:
        return self.number * self.price


class Purchases:
    """Questions whose answers need a look-up and a product."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def problem(self, index: int) -> Problem:
        draw = random.Random(f"{self._seed}/{index}")
        purchase = Purchase(draw.randint(2, 9), draw.choice(ITEMS), draw.randint(11, 99))
        question = f"What do {purchase.number} {purchase.item}s cost?"
        return Problem(question, str(purchase.total), purchase, key=str(tuple(purchase)))

    def score(self, answer: str, entry: Purchase) -> float:
        return float(answer == str(entry.total))
