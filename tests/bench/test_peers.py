"""Adapters of the peers compute what they are compared for. A peer that is not installed is skipped with its reason."""

from __future__ import annotations

import pytest
import torch
from cases import Case, exact_result, make_case_inputs, relative_errors
from peers import PEERS, Candidate
from timing import forward_backward
from verify import rejection_reason

# Rows that eight chunks divide and a second sequence in `distil`; a vocabulary above 4096 is two blocks of the errors.
SIZES = {"num_rows": 80, "vocab_size": 5000, "hidden_size": 32}


@pytest.mark.parametrize(
    ("peer", "op"), [(peer, op) for peer in PEERS for op in peer.ops], ids=lambda v: getattr(v, "name", v)
)
def test_peer_computes_the_same_as_the_oracle(peer: Candidate, op: str) -> None:
    case = Case(op, **SIZES, dtype="fp32", device="cuda" if torch.cuda.is_available() else "cpu", threads=1)
    if (reason := peer.unavailable(case)) is not None:
        pytest.skip(reason)
    with torch.compiler.set_stance("force_eager"):  # the formula is under test, not the compiler
        inputs = make_case_inputs(case, "ordinary")
        result = exact_result("label" if peer.group == "label" else op, inputs)
        inputs = inputs.on_device(case.device)
        value = forward_backward(peer.build(case), inputs).item()
    exact = result.values[peer.value]
    errors = {"value": abs(value - exact) / abs(exact), **relative_errors(inputs, result)}
    assert rejection_reason(case, errors) is None
    assert ("student_weight" in errors) == (op != "frozen")


def test_a_missing_package_and_a_missing_gpu_are_reasons() -> None:
    case = Case("ce", **SIZES, dtype="fp32", device="cpu", threads=1)
    missing = Candidate("x", "peer", ("ce",), "kl", lambda case: None, needs=("no_such_package",))
    assert missing.unavailable(case) == "no_such_package is not installed"
    on_gpu = Candidate("x", "peer", ("ce",), "kl", lambda case: None, cuda_only=True)
    assert on_gpu.unavailable(case) == "its kernels need a GPU"
