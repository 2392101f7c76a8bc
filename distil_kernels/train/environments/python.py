"""A tool as an environment: the model writes a call, and the value of the Python expression is put behind it.

    A: <tool>17 * 23</tool> <result>391</result> 391
       by the model         observed             by the model

Calls run one after the other, in `sandbox`: one Python expression, with the names of `math`. The task's verifier reads
what stands beside the calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from distil_kernels.train.environments.environment import Environment
from distil_kernels.train.tasks.sandbox import SANDBOX, Limits, run_python

OPEN, CLOSE = "<tool>", "</tool>"
LIMITS = Limits(seconds=2.0)
_CALLS = re.compile(r"<(tool|result)>.*?</\1>", re.DOTALL)


class Python(Environment):
    """Runs expressions."""

    stop, frame = CLOSE, (" <result>", "</result>")
    example = (
        "17 * 23? (Python gives the value of <tool>EXPRESSION</tool>.)",
        "<tool>17 * 23</tool> <result>391</result> 391",
    )

    def __init__(self) -> None:
        SANDBOX.walls()  # a ValueError now, not in the first rollout

    def step(self, text: str) -> tuple[str, float | None, bool]:
        if not text.endswith(CLOSE):
            return "", None, True
        call = text.removesuffix(CLOSE).rpartition(OPEN)[2].strip()
        run = run_python(f"from math import *\nprint(eval({call!r}))", limits=LIMITS)
        output = run.output if run.is_ok else run.error.splitlines()[-1]
        return " ".join(output.split()), None, False

    def answer(self, turns: Sequence[str]) -> str:
        return _CALLS.sub("", "".join(turns))
