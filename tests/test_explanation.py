"""`explain` says what an op does: it is compared with what runs, for every op, and computes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import distil_kernels
from distil_kernels import explain
from distil_kernels.engine import driver, sizes
from distil_kernels.plan import Plan
from distil_kernels.testing import Inputs, make_inputs

N, V, D = 100, 131, 16
BORDERS = torch.tensor([0, 20, 33, 70, 100])


@dataclass
class Run:
    """What the driver did in one call."""

    plans: list[Any] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    num_chunks: int = 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    record = Run()

    def spied(compute: Callable[..., Any]) -> Callable[..., Any]:
        def spy(inputs: driver.Inputs, plan: Any, *others: Any) -> Any:
            record.plans.append(plan)
            record.backends.append(inputs.spec.backend)
            return compute(inputs, plan, *others)

        return spy

    load = driver.Workspace.load

    def counted(workspace: driver.Workspace, rows: Any) -> Any:
        record.num_chunks += 1
        return load(workspace, rows)

    for name in ("scalar_loss", "policy_loss", "rows_statistics"):
        monkeypatch.setattr(driver, name, spied(getattr(driver, name)))
    monkeypatch.setattr(driver.Workspace, "load", counted)
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 2 * 4 * V * 16)  # 16 float32 rows
    yield record


def arguments_of(op: str, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and options of a call."""
    heads, tokens = inputs.heads, inputs.tokens
    named = tokens[:, None], torch.full((N, 1), -0.5)
    packed = {"tokens": tokens, "cu_seqlens": BORDERS}
    return {
        "fused_forward_ce": (heads, {}),
        "fused_forward_kl": (heads, {"normalizer": 3.0}),
        "fused_reverse_kl": (heads, {"reduction": "sum"}),
        "fused_jsd": (heads, {"jsd_weight": 0.3}),
        "fused_distil_loss": (heads, {"baseline": "leave_one_out", "group_size": 2, **packed}),
        "fused_topk_ce": ((*heads[:2], *named), {}),
        "fused_topk_distil_loss": ((*heads[:2], *named), {"discount": 0.9, **packed}),
        "fused_policy_loss": (heads[:2], {"tokens": tokens, "advantages": torch.ones(N)}),
        "token_stats": (heads, {"tokens": tokens}),
        "token_logprobs": (heads[:2], {"tokens": tokens}),
    }[op]


OPS = [name for name in distil_kernels.__all__ if name.startswith(("fused", "token"))]


@pytest.mark.parametrize("options", [{}, {"masked": True}, {"frozen": True}, {"no_grad": True}], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_says_what_runs(op, options, run, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    inputs.student_weight.requires_grad_("frozen" not in options)
    arguments, keywords = arguments_of(op, inputs)
    if "masked" in options:
        keywords["token_mask"] = torch.rand(N, generator=generator) < 0.6
    function = getattr(distil_kernels, op)
    with torch.set_grad_enabled("no_grad" not in options):
        explanation = explain(function, *arguments, **keywords)
        assert run == Run(), "explain computed something"
        function(*arguments, **keywords)
    plan = run.plans[0]
    assert (explanation.plan, explanation.plan_reason) == (plan.name, plan.reason)
    assert (explanation.chunk_rows, explanation.staging_rows) == (plan.chunk_rows, plan.staging_rows)
    assert explanation.backend == run.backends[0]
    assert explanation.num_chunks == run.num_chunks > 1


@pytest.mark.parametrize(
    ("options", "plan", "num_passes"),
    [
        ({"plan": "recompute"}, "recompute", 2),
        ({"reduction": "none"}, "recompute", 1),
        ({"reduction": "none", "plan": "kept_gradient"}, "kept_gradient", 1),
        ({"gradient_threshold": 0.1}, "gradient_in_forward", 1),
        ({"plan": Plan("gradient_in_forward", 7, 14)}, "gradient_in_forward", 1),
        ({"backend": "reference"}, "gradient_in_forward", 1),
    ],
    ids=str,
)
def test_says_what_runs_when_asked_by_name(options, plan, num_passes, run, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    explanation = explain(distil_kernels.fused_forward_ce, *inputs.heads, **options)
    distil_kernels.fused_forward_ce(*inputs.heads, **options)
    assert explanation.plan == run.plans[0].name == plan
    assert explanation.num_chunks * num_passes == run.num_chunks
    assert explanation.staging_rows == run.plans[0].staging_rows
    assert explanation.backend == run.backends[0]
    assert explanation.backend in str(explanation) and explanation.plan_reason in str(explanation)


@pytest.mark.parametrize("op", OPS)
def test_sizes_are_enough(op, generator):
    """By name and sizes the record is that of a call with tensors of these sizes."""
    inputs = make_inputs(N, V, D, dtype=torch.bfloat16, generator=generator)
    arguments, keywords = arguments_of(op, inputs)
    if "cu_seqlens" in keywords:
        keywords["cu_seqlens"] = torch.tensor([0, N])
        keywords.pop("baseline", None)
    by_tensors = explain(getattr(distil_kernels, op), *arguments, **keywords)
    options = {name: value for name, value in keywords.items() if not isinstance(value, torch.Tensor)}
    by_sizes = explain(op, num_rows=N, vocab_size=V, hidden_size=D, dtype=torch.bfloat16, **options)
    assert by_sizes == by_tensors


def test_needs_no_memory_and_no_gpu():
    explanation = explain(
        "fused_forward_ce", num_rows=10**7, vocab_size=10**6, hidden_size=10**5, dtype=torch.bfloat16, device="cuda",
        needs_grad=["student_hidden"],
    )  # fmt: skip
    assert explanation.plan == "frozen_head"
    assert explanation.memory.peak == explanation.memory.logits_chunk + explanation.memory.staging_buffer
    without_bias = explain("token_logprobs", num_rows=8, vocab_size=9, hidden_size=4)
    assert not without_bias.spec.needs.bias
    with_bias = explain("token_logprobs", num_rows=8, vocab_size=9, hidden_size=4, needs_grad=["student_bias"])
    assert with_bias.spec.needs.bias and not with_bias.spec.needs.weight


def test_an_op_without_a_teacher_has_half_the_logits():
    without_teacher, with_teacher = (
        explain(op, num_rows=512, vocab_size=5000, hidden_size=64) for op in ("fused_policy_loss", "fused_forward_ce")
    )
    assert with_teacher.memory.logits_chunk == 2 * without_teacher.memory.logits_chunk


def test_autocast_is_seen():
    with torch.autocast("cpu", torch.bfloat16):
        explanation = explain("fused_forward_ce", num_rows=8, vocab_size=9, hidden_size=4)
    assert explanation.spec.needs.weight


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "op is 'cross_entropy', expected one of", ("cross_entropy",), {}),
        (ValueError, "op is <built-in function sum>", (sum,), {}),
        (ValueError, r"\[fused_jsd\] jsd_weight is 1.0", ("fused_jsd",), {"jsd_weight": 1.0}),
        (ValueError, "plan='stats_only' cannot compute this call", ("fused_forward_ce",), {"plan": "stats_only"}),
        (ValueError, "needs_grad is", ("fused_forward_ce",), {"needs_grad": ["teacher_hidden"]}),
        (TypeError, "temperatur", ("fused_forward_ce",), {"temperatur": 1.0}),
    ],
)
def test_wrong_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        explain(*arguments, num_rows=8, vocab_size=9, hidden_size=4, **options)
