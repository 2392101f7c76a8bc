"""One row of the table: what was claimed, what came out, and whether the claim held."""

from __future__ import annotations

from typing import Literal, NamedTuple

Verdict = Literal["holds", "FAILS", ""]


class Finding(NamedTuple):
    """`verdict` is "" for a number that no claim is made about."""

    subject: str
    quantity: str
    measured: str
    compared_with: str
    verdict: Verdict


def held(condition: bool) -> Verdict:
    return "holds" if condition else "FAILS"
