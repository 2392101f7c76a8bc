"""Named starting points: options that a preset sets, before the file of --config and the command line.

The paper names the objective and its gradient and is silent on teacher, discount, baseline and rates: those values are
ours, as stable as we measured them on tiny models.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Forward cross-entropy with its sequence-level gradient (the paper's); discount, baseline, frozen teacher (ours).
    "distil": {
        "cost": "ce", "credit_span": "future", "discount": 0.9, "baseline": "leave_one_out", "teacher": "frozen",
    },
}  # fmt: skip
