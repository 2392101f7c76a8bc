"""The condition under which credited cross-entropy pays for an early end, and the length that it asks for.

At a state whose teacher does not end, a student that ends with probability e and else agrees pays -log(1 - e) now, and
the cost to come, c nats, only if it goes on:

    J(e) = -log(1 - e) + (1 - e) c         least at e = 0 where c <= 1, at e = 1 - 1 / c where c > 1

So an end that the teacher never chooses is worth its cost as soon as going on costs more than one nat: cross-entropy
holds the teacher's entropy, which no student can lower but by not going there. Cost `kl` leaves that entropy out. With
a discount c is the discounted cost to come; the same condition makes the expected gradient vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log


def early_ends(entropies: Sequence[float], discount: float) -> list[float]:
    """The probability e of an end at each position for which the credited gradient vanishes (0 at the last position).

    Args:
        entropies: the teacher's entropy at each position of a complete answer, in nats; all 0 for cost `kl`.
        discount: factor of the cost to come, per token.
    """
    ends, to_come = [0.0], entropies[-1]
    for entropy in reversed(entropies[:-1]):
        cost_of_going_on = max(1.0, discount * to_come)
        ends.append(1.0 - 1.0 / cost_of_going_on)
        to_come = entropy + log(cost_of_going_on) + discount * to_come / cost_of_going_on
    return ends[::-1]


def expected_length(ends: Sequence[float]) -> float:
    """The expected tokens of an answer, its end included, whose position t ends early with probability ends[t]."""
    length, survival_prob = 0.0, 1.0
    for end in ends:
        length += survival_prob
        survival_prob *= 1.0 - end
    return length
