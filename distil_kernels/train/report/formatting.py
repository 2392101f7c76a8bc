"""How numbers, tokens and their colours are written, in the terminal and in HTML alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

COLORS = {"ce": "cross-entropy", "kl": "KL", "credit": "credit"}
"""The columns of a rollout's record that can colour its tokens, with their labels."""


def with_error(value: float, error: float) -> str:
    """Returns "mean ± standard error", or the mean alone where the error is not known (NaN)."""
    return f"{value:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")


def number(value: float, digits: int) -> str:
    """Returns a number with this many decimal places, or in powers of ten where these take more than eight letters."""
    text = f"{value:.{digits}f}"
    return text if len(text) <= 8 else f"{value:.1e}"


def tick_text(value: float) -> str:
    """Returns a value at an axis in at most six letters."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return (
        f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    )


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds; days where there are any; "-" where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{rest:02}"


def visible(text: str, keep_spaces: bool = False) -> str:
    """Returns the text of a token with line ends shown, and spaces too unless it stands among other tokens."""
    shown = harmless(text).replace("\n", "⏎")
    return shown if keep_spaces else shown.replace(" ", "␣")


def harmless(text: str) -> str:
    """Returns text in which characters that steer a terminal or turn the direction of writing are numbers."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def full_colors(rollouts: Sequence[Record]) -> dict[str, float]:
    """Returns for each of COLORS the value that is painted in full colour: one token in twenty exceeds it."""
    full = {}
    for name in COLORS:
        values = sorted(abs(value) for rollout in rollouts for value in rollout[name] if math.isfinite(value))
        full[name] = max(values[int(0.95 * (len(values) - 1))], 1e-9) if values else 1.0
    return full


def verdict(score: float) -> str:
    """Returns "right" for the full score, "unjudged" for none (NaN), else "wrong"."""
    return "right" if score >= 1.0 else "unjudged" if math.isnan(score) else "wrong"
