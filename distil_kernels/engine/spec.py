"""Everything about a call that is no tensor and no number of rows, as one record that fits into a custom op.

A custom op takes no objects, so a Spec travels as text (JSON by field names, every float to its last bit) and prints as
such in an FX graph; torch.compile makes one graph for each. What may change from call to call is not in the text there:
numbers (a temperature's schedule) are entries of a tensor, and the rows of chunks and staging buffer are arguments of
their own, which torch.compile keeps symbolic.
"""

from __future__ import annotations

import json
import math
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import FORWARD_CE, Cost, LogitScaling, Statistic
from distil_kernels.engine.credit import NO_CREDIT, Credit
from distil_kernels.engine.gradients import NO_GRADIENTS, Needs
from distil_kernels.engine.plan import Plan
from distil_kernels.engine.policy import Policy
from distil_kernels.engine.terms import Terms
from distil_kernels.engine.vocab_shards import ShardOptions


class Spec(NamedTuple):
    """What a custom op computes, and how."""

    backend: str
    """Name of the back end whose row kernels run."""
    backend_reason: str
    plan: str
    """Name of the plan."""
    plan_reason: str
    needs: Needs = NO_GRADIENTS
    """Which of the student's tensors need a gradient."""
    cost: Cost = FORWARD_CE
    """What a row costs."""
    student: LogitScaling = LogitScaling()
    teacher: LogitScaling = LogitScaling()
    gradient_threshold: float = 0.0
    """Entries of the logits' gradient below this share of their row's largest are left out of the products."""
    credit: Credit = NO_CREDIT
    """How the future cost of a token weighs its log-prob's gradient."""
    policy: Policy | None = None
    """Settings of a policy-gradient loss; None for any other."""
    terms: Terms | None = None
    """What a loss has besides its cost; None for nothing."""
    shards: ShardOptions | None = None
    """How the vocabulary lies in the processes of a group; None: this process has all of it."""

    def of_all_shards(self) -> Spec:
        """Returns what must be the same in all processes that share a vocabulary."""
        return self._replace(plan="", plan_reason="", backend_reason="")

    def plan_of(self, chunk_rows: int, staging_rows: int) -> Plan:
        """Returns the plan with the rows of its buffers."""
        return Plan(self.plan, chunk_rows, staging_rows, self.plan_reason)

    def encode(self) -> str:
        """Returns the text from which `decode` restores this record."""
        return _encoded(self, None)  # plain Python, which torch.compile can trace

    def encode_apart(self) -> tuple[str, Tensor]:
        """Returns the text without the numbers, and the numbers [F], float64 on the CPU."""
        numbers: list[float] = []
        text = _encoded(self, numbers)
        # A number that changes from call to call is an input of torch.compile's graph only as the factor of a tensor.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return text, torch.stack([one * number for number in numbers])

    @staticmethod
    def decode(text: str, numbers: Tensor | None = None) -> Spec:
        """Returns the record that `encode` made the text of, or `encode_apart` the text and the numbers.

        With the text of `encode_apart` alone, the numbers are NaN.
        """
        return _decoded(text, () if numbers is None else tuple(numbers.tolist()))


@lru_cache(maxsize=1024)
def _decoded(text: str, numbers: tuple[float, ...]) -> Spec:
    def with_number(entries: dict[str, Any]) -> Any:
        if len(entries) != 1 or not entries.keys() <= {"float", "int"}:
            return entries
        ((kind, place),) = entries.items()
        if not numbers:
            return math.nan
        return int(numbers[place]) if kind == "int" else numbers[place]

    fields = json.loads(text, strict=False, object_hook=with_number)  # a reason may hold line breaks
    statistic, jsd_weight = fields["cost"].values()
    fields["cost"] = Cost(Statistic(statistic), jsd_weight)
    fields["student"], fields["teacher"] = LogitScaling(**fields["student"]), LogitScaling(**fields["teacher"])
    fields["needs"] = Needs(**fields["needs"])
    fields["credit"] = Credit(**fields["credit"])
    fields["policy"] = None if fields["policy"] is None else Policy(**fields["policy"])
    if fields["terms"] is not None:
        fields["terms"] = Terms(**(fields["terms"] | {"policy": Policy(**fields["terms"]["policy"])}))
    fields["shards"] = None if fields["shards"] is None else ShardOptions(**fields["shards"])
    return Spec(**fields)


def _encoded(value: Any, numbers: list[float] | None) -> str:
    """Returns JSON of a value; a NamedTuple becomes an object by the names of its fields.

    Numbers are appended to `numbers`, if there is such a list, and the text has their places.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, IntEnum):
        return repr(int(value))
    if isinstance(value, (int, float)) and numbers is not None:
        numbers.append(value)
        return f'{{"{"int" if isinstance(value, int) else "float"}": {len(numbers) - 1}}}'
    if isinstance(value, int):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    entries = [f'"{name}": {_encoded(entry, numbers)}' for name, entry in zip(value._fields, value, strict=True)]
    return "{" + ", ".join(entries) + "}"
