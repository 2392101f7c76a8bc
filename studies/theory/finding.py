"""One row of the results table: a claim or a quantity, its measured value, and the verdict on the claim."""

from __future__ import annotations

from typing import Literal, NamedTuple

Verdict = Literal["holds", "FAILS", ""]


class Finding(NamedTuple):
    """A measured quantity and what it is compared with; `verdict` is "" where the number tests no claim."""

    subject: str
    quantity: str
    measured: str
    compared_with: str
    verdict: Verdict


def verdict(claim_holds: bool) -> Verdict:
    """The word that the table prints for a claim."""
    return "holds" if claim_holds else "FAILS"
