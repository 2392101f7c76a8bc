"""One candidate in a process of its own: is it right, how accurate, how much memory. Run by run.py.

    python bench/check.py FOLDER CANDIDATE        prints one line of JSON

FOLDER holds case.json, and <regime>.pt with the problem and its exact answer. The value must be that of the oracle
and the gradients at the ordinary regime must be near it: a wrong result gets no speed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from cases import REGIMES, Answer, Case, Problem, relative_errors
from peers import Candidate, Loss, candidates
from timing import forward_backward, peak_extra_bytes, return_large_blocks

VALUE_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative. Half precision that rounds logits is inaccurate, which the table shows; it is not another loss."""
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.05}
APPROXIMATE_TOLERANCE = 0.25
"""Of gradients whose small entries are left out: beyond it they are another gradient."""


def load(folder: Path, name: str) -> tuple[Problem, dict[str, Answer]]:
    """A problem with its exact answers by kind (op, label)."""
    saved = torch.load(folder / f"{name}.pt", weights_only=False, mmap=True)
    return saved["problem"], saved.get("answers", {})


def check(case: Case, candidate: Candidate, folder: Path) -> dict[str, object]:
    loss = candidate.build(case)
    problem, answers = load(folder, "ordinary")
    errors = {"ordinary": _errors(case, candidate, loss, problem, answers)}
    reason = wrong(case, errors["ordinary"], candidate.group == "approximate")
    if reason is not None:
        return {"reason": reason, "errors": errors}
    del problem, answers
    errors["converged"] = _errors(case, candidate, loss, *load(folder, "converged"))
    return {"reason": None, "errors": errors, "peak_extra_bytes": _memory(case, loss, folder)}


def wrong(case: Case, errors: dict[str, float], approximate: bool = False) -> str | None:
    """Why a result counts as wrong, or None. One that is approximate by choice has its error in the table."""
    gradient_tolerance = APPROXIMATE_TOLERANCE if approximate else GRADIENT_TOLERANCE[case.dtype]
    if not errors["value"] <= VALUE_TOLERANCE[case.dtype]:
        return f"computes another value: off by {errors['value']:.1e} of it"
    for name, error in errors.items():
        if name != "value" and not error <= gradient_tolerance:
            return f"computes another gradient: {name} off by {error:.1e} of its norm"
    return None


def _errors(
    case: Case, candidate: Candidate, loss: Loss, problem: Problem, answers: dict[str, Answer]
) -> dict[str, float]:
    answer = answers["label" if candidate.group == "label" else "op"]
    moved = problem.to(case.device)
    value = forward_backward(loss, moved).item()
    exact = answer.values[candidate.value]
    return {"value": abs(value - exact) / abs(exact), **relative_errors(moved, answer)}


def _memory(case: Case, loss: Loss, folder: Path) -> int | None:
    problem = load(folder, "problem")[0].to(case.device)
    forward_backward(loss, problem)  # compiles for this number of rows, fills the products' own buffers
    return peak_extra_bytes(lambda: forward_backward(loss, problem), problem, case.device)


def main(folder: Path, name: str) -> None:
    case = Case(**json.loads((folder / "case.json").read_text()))
    torch.set_num_threads(case.threads)
    return_large_blocks()
    available = candidates(case.op, torch.device(case.device), case.torch_dtype)
    candidate = next(candidate for candidate in available if candidate.name == name)
    try:
        found = check(case, candidate, folder)
    except Exception as error:  # a peer may fail in any way; its reason goes into the report
        lines = f"{type(error).__name__}: {error}".splitlines()
        found = {"reason": f"failed: {lines[0]}"[:300]}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    assert set(REGIMES) == {"ordinary", "converged"}
    main(Path(sys.argv[1]), sys.argv[2])
