"""Verifies one candidate in a separate process: correctness, accuracy and memory. run.py starts it.

Its folder holds case.json, and <regime>.pt with inputs and exact results. The value must agree with the oracle, and so
must the gradients in the ordinary regime: a wrong result is never timed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from cases import OTHER_OPS, REGIMES, Case, CaseInputs, ExactResult, relative_errors
from peers import Candidate, Loss, candidates
from timing import forward_backward, peak_extra_bytes, return_large_blocks

VALUE_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative tolerance of the value. A loss that rounds logits to half precision is inaccurate but the same loss."""
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.05}
APPROXIMATE_TOLERANCE = 0.25
"""Relative tolerance of gradients whose small entries are left out."""


def load(folder: Path, name: str) -> tuple[CaseInputs, dict[str, ExactResult]]:
    """Reads inputs and their exact results by kind (op, or a group that computes another)."""
    content = torch.load(folder / f"{name}.pt", weights_only=False, mmap=True)
    return content["inputs"], content.get("results", {})


def verify(case: Case, candidate: Candidate, folder: Path) -> dict[str, object]:
    """Returns a row's reason not to be timed (None for a right result), errors by regime, and peak memory."""
    loss = candidate.build(case)
    inputs, results = load(folder, "ordinary")
    errors = {"ordinary": _errors(case, candidate, loss, inputs, results)}
    reason = rejection_reason(case, errors["ordinary"], candidate.group == "approximate")
    if reason is not None:
        return {"reason": reason, "errors": errors}
    del inputs, results
    errors["converged"] = _errors(case, candidate, loss, *load(folder, "converged"))
    return {"reason": None, "errors": errors, "peak_extra_bytes": _memory(case, loss, folder)}


def rejection_reason(case: Case, errors: dict[str, float], approximate: bool = False) -> str | None:
    """The reason to reject a result, or None. An approximate candidate has a tolerance for its gradient alone."""
    gradient_tolerance = APPROXIMATE_TOLERANCE if approximate else GRADIENT_TOLERANCE[case.dtype]
    if not errors["value"] <= VALUE_TOLERANCE[case.dtype]:
        return f"computes another value: off by {errors['value']:.1e} of it"
    for name, error in errors.items():
        if name != "value" and not error <= gradient_tolerance:
            return f"computes another gradient: {name} off by {error:.1e} of its norm"
    return None


def _errors(
    case: Case, candidate: Candidate, loss: Loss, cpu_inputs: CaseInputs, results: dict[str, ExactResult]
) -> dict[str, float]:
    result = results[candidate.group if candidate.group in OTHER_OPS else "op"]
    inputs = cpu_inputs.on_device(case.device)
    value = forward_backward(loss, inputs).item()
    exact = result.values[candidate.value]
    return {"value": abs(value - exact) / abs(exact), **relative_errors(inputs, result)}


def _memory(case: Case, loss: Loss, folder: Path) -> int | None:
    inputs = load(folder, "all_rows")[0].on_device(case.device)
    forward_backward(loss, inputs)  # compiles for this number of rows and fills the buffers of the products
    return peak_extra_bytes(lambda: forward_backward(loss, inputs), inputs, case.device)


def main(folder: Path, name: str) -> None:
    """Leaves result.json in the folder, and output.txt, what the candidate printed."""
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    case = Case(**json.loads((folder / "case.json").read_text()))
    torch.set_num_threads(case.threads)
    return_large_blocks()
    assert set(REGIMES) == {"ordinary", "converged"}
    available = candidates(case.op, torch.device(case.device), case.torch_dtype)
    candidate = next(candidate for candidate in available if candidate.name == name)
    try:
        row = verify(case, candidate, folder)
    except Exception as error:  # a peer may fail in any way; the table shows its reason
        lines = f"{type(error).__name__}: {error}".splitlines()
        row = {"reason": f"failed: {lines[0]}"[:300]}
    (folder / "result.json").write_text(json.dumps(row))
