"""token_stats: every statistic, and two independent upstream gradients."""

from __future__ import annotations

import pytest
import torch

from distil_kernels import token_logprobs, token_stats
from distil_kernels.engine import kept_gradient, sizes
from distil_kernels.testing import KINDS, assert_within_budget, baselines, make_inputs, oracle, term_sizes

DIFFERENTIABLE = ("ce", "logprob")


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)],
    ids=str,
)
def test_every_field_and_gradient(backend, dtype, kind, plan, generator, monkeypatch):
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 64 * 1024)
    monkeypatch.setitem(kept_gradient._MIX_BYTES, "cpu", 3 * 1031 * 4)  # some of a chunk's rows
    inputs = make_inputs(23, 1031, 24, dtype=dtype, kind=kind, bias=True, generator=generator)
    upstream = torch.randn(2, 23, generator=generator, dtype=torch.float64)

    def mix(stats):
        return sum((stats[name] * upstream[i].to(stats[name].dtype)).sum() for i, name in enumerate(DIFFERENTIABLE))

    def compute(copy):
        stats = oracle(copy)._asdict()
        total = mix(stats)
        gradients = torch.autograd.grad(total, list(copy.leaves.values()))
        return {**stats, **dict(zip(copy.leaves, gradients, strict=True))}

    exact = compute(inputs.to(torch.float64))
    base = baselines(inputs, compute)
    ours = token_stats(*inputs.heads, tokens=inputs.tokens, **inputs.options, backend=backend, plan=plan)
    size = float(exact["lse"].abs().max()) + float(exact["entropy"].max())
    for name, value in ours._asdict().items():
        if name != "agree":
            assert_within_budget(name, value, base[name], exact[name], terms=size)
            assert value.requires_grad == (name in DIFFERENTIABLE)
    # Rounding may turn a near tie; of 23 rows all but a few must agree about agreement.
    assert (ours.agree != exact["agree"]).sum() <= (12 if kind == "offset" else 1)
    terms = term_sizes(inputs, upstream.abs().sum(0))
    total = mix(ours._asdict())
    gradients = torch.autograd.grad(total, list(inputs.leaves.values()))
    for name, gradient in zip(inputs.leaves, gradients, strict=True):
        assert_within_budget(name, gradient, base[name], exact[name], terms=terms[name])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_output_alone(name, generator):
    """Backward through one of the two leaves the other's share out."""
    inputs = make_inputs(7, 50, 8, dtype=torch.float64, generator=generator)
    value = getattr(token_stats(*inputs.heads, tokens=inputs.tokens), name)
    exact = getattr(oracle(inputs), name)
    leaves = list(inputs.leaves.values())
    torch.testing.assert_close(torch.autograd.grad(value.sum(), leaves), torch.autograd.grad(exact.sum(), leaves))


def test_gradcheck(generator):
    inputs = make_inputs(4, 9, 4, dtype=torch.float64, bias=True, generator=generator, logit_softcap=2.0)
    options = {k: v for k, v in inputs.options.items() if k != "student_bias"}

    def both(hidden, weight, bias):
        stats = token_stats(
            hidden, weight, inputs.teacher_hidden, inputs.teacher_weight,
            tokens=inputs.tokens, student_bias=bias, **options,
        )  # fmt: skip
        return stats.ce, stats.logprob

    assert torch.autograd.gradcheck(both, list(inputs.leaves.values()))


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
def test_leading_dimensions_and_masks(plan, generator):
    mask = torch.rand(12, generator=generator) < 0.5
    inputs = make_inputs(12, 30, 8, generator=generator)
    flat = token_stats(*inputs.heads, tokens=inputs.tokens, token_mask=mask, plan=plan)
    cube = token_stats(
        inputs.student_hidden.reshape(3, 4, 8), inputs.student_weight,
        inputs.teacher_hidden.reshape(3, 4, 8), inputs.teacher_weight,
        tokens=inputs.tokens.reshape(3, 4), token_mask=mask.reshape(3, 4), plan=plan,
    )  # fmt: skip
    for ours, expected in zip(cube, flat, strict=True):
        assert ours.shape == (3, 4)
        assert torch.equal(ours.flatten(), expected)
        assert not expected[~mask].any()
    (cube.ce.sum() + cube.logprob.sum()).backward()
    assert torch.equal(inputs.student_hidden.grad.any(-1), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_runs_again(dtype, generator):
    """Plan `kept_gradient` mixes two kept gradients in memory of its own."""
    inputs = make_inputs(7, 50, 8, dtype=dtype, generator=generator)
    found = token_stats(*inputs.heads, tokens=inputs.tokens, plan="kept_gradient")
    first, again, ce = (
        torch.autograd.grad(total.sum(), list(inputs.leaves.values()), retain_graph=True)
        for total in (found.ce - 2.0 * found.logprob, found.ce - 2.0 * found.logprob, found.ce)
    )
    assert all(map(torch.equal, first, again))
    alone = token_stats(*inputs.heads, tokens=inputs.tokens, plan="kept_gradient").ce.sum()
    assert all(map(torch.equal, ce, torch.autograd.grad(alone, list(inputs.leaves.values()))))


def test_masked_rows_need_no_token(generator):
    inputs = make_inputs(4, 30, 8, generator=generator)
    mask = torch.tensor([True, False, True, True])
    tokens = torch.where(mask, inputs.tokens, -100)
    with_garbage = token_stats(*inputs.heads, tokens=tokens, token_mask=mask)
    clean = token_stats(*inputs.heads, tokens=inputs.tokens, token_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(with_garbage, clean, strict=True))


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute", "frozen_head"])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)], ids=str)
def test_without_tokens(backend, dtype, plan, generator):
    """All but the log-probs, and the gradients of the cross-entropy, or of the entropy without a teacher."""
    mask = torch.rand(12, generator=generator) < 0.7
    inputs = make_inputs(12, 331, 8, dtype=dtype, bias=True, generator=generator)
    inputs.student_weight.requires_grad_(plan != "frozen_head")
    inputs.options["student_bias"].requires_grad_(plan != "frozen_head")
    upstream, leaves = torch.randn(12, generator=generator, dtype=dtype), list(inputs.leaves.values())
    options = {"token_mask": mask, "backend": backend, "plan": plan}
    found = token_stats(*inputs.heads, tokens=None, **inputs.options, **options)
    alone = token_logprobs(*inputs.heads[:2], tokens=None, student_bias=inputs.options["student_bias"], **options)
    exact, wide = oracle(copy := inputs.to(torch.float64)), list(copy.leaves.values())
    for name, ours in (("ce", found.ce), ("entropy", alone.entropy)):
        rows = getattr(exact, name)[mask]
        torch.testing.assert_close(ours[mask].double(), rows, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(ours, leaves, upstream)
        expected = torch.autograd.grad(rows, wide, upstream[mask].double(), retain_graph=True)
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
    for value in (found.logprob, found.teacher_logprob, alone.logprob):
        assert value.isnan().all() and not value.requires_grad
    torch.testing.assert_close(found.entropy, alone.entropy.detach())
    torch.testing.assert_close(found.lse, alone.lse)
