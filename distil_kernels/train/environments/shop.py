"""A shop: nobody knows its prices without looking them up, and nobody has to multiply by heart.

    Q: What do 3 pears cost?        A: price pear
    Q: 17                           A: calculate 3 * 17
    Q: 51                           A: 51               the episode is over, with reward 1

The problems are those of the task `shop`. Anything that is no call is the answer.
"""

from __future__ import annotations

import operator
import re

from distil_kernels.train.environments.environment import Environment
from distil_kernels.train.tasks import Problem
from distil_kernels.train.tasks.shop import Purchase

_PRICE = re.compile(r"price (\w+)")
_CALCULATE = re.compile(r"calculate (\d{1,9}) ?([-+*]) ?(\d{1,9})")
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Shop(Environment):
    """Answers `price ITEM` and `calculate A * B`."""

    def reset(self, record: Problem) -> str:
        self._purchase: Purchase = record.entry
        return record.question

    def step(self, text: str) -> tuple[str, float | None, bool]:
        text = text.strip()
        if asked := _PRICE.fullmatch(text):
            item = asked[1].removesuffix("s")
            return (str(self._purchase.price) if item == self._purchase.item else f"no {item} here"), None, False
        if asked := _CALCULATE.fullmatch(text):
            return str(_OPERATIONS[asked[2]](int(asked[1]), int(asked[3]))), None, False
        is_right = text == str(self._purchase.total)
        return "right" if is_right else "wrong", float(is_right), True

    def solution(self, record: Problem) -> list[str]:
        purchase: Purchase = record.entry
        return [f"price {purchase.item}", f"calculate {purchase.number} * {purchase.price}", str(purchase.total)]
