"""fused_topk_distil_loss against float64 autograd, the credit by its definition, and the loss with a whole teacher."""

from __future__ import annotations

import pytest
import torch
from topk_reference import dense, teacher_topk

from distil_kernels import fused_distil_loss, fused_topk_distil_loss
from distil_kernels.engine import sizes
from distil_kernels.testing import credit_by_definition, make_inputs

V, D = 67, 16
LENGTHS = [5, 1, 4, 7, 3, 3]
N = sum(LENGTHS)
BORDERS = torch.tensor([0, *LENGTHS]).cumsum(0)


def entropy_of_buckets(logprobs: torch.Tensor) -> torch.Tensor:
    """[N] of K named tokens and the rest."""
    probs = logprobs.nan_to_num(nan=-torch.inf).exp()
    return torch.special.entr(torch.cat([probs, (1 - probs.sum(1, keepdim=True)).clamp(min=0)], 1)).sum(1)


@pytest.mark.parametrize("num_named", [1, 4, V])
@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({"credit_span": "none"}, False),
        ({"discount": 0.8}, True),
        ({"baseline": "leave_one_out", "group_size": 2, "horizon": 2}, False),
        ({"baseline": "position_mean", "cost": "kl", "temperature": 0.7}, True),
        ({"credit_span": "sequence", "logit_softcap": 3.0, "credit_clip": 1.5}, True),
        ({"normalize_by_remaining": True, "credit_scale": 0.3, "normalizer": 2.0}, False),
        ({"teacher_ratio_clip": 1.0, "credit_clip": 2.0, "discount": 0.9}, True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else ("masked" if value else "all"),
)
def test_gradient_by_definition(num_named, options, masked, generator, monkeypatch):
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 2 * 8 * V * 8)  # 8 rows
    inputs = make_inputs(N, V, D, dtype=torch.float64, generator=generator)
    bias = torch.randn(V, generator=generator).double()
    hidden, weight, bias = (
        each.detach().clone().requires_grad_() for each in (inputs.student_hidden, inputs.student_weight, bias)
    )
    ids, logprobs = teacher_topk(N, V, num_named, generator, num_padding=num_named // 4)
    mask = torch.rand(N, generator=generator) < 0.7 if masked else None
    out = fused_topk_distil_loss(
        hidden, weight, ids, logprobs, tokens=inputs.tokens, cu_seqlens=BORDERS, student_bias=bias, token_mask=mask,
        **options,
    )  # fmt: skip
    ours = torch.autograd.grad(out.loss, [hidden, weight, bias])

    counted = torch.ones(N, dtype=torch.bool) if mask is None else mask
    temperature, softcap = options.get("temperature", 1.0), options.get("logit_softcap")
    rows = torch.stack(
        [
            dense(hidden[[i]], weight, ids[[i]], logprobs[[i]], bias, temperature=temperature, softcap=softcap)
            for i in range(N)
        ]
    )
    if options.get("cost") == "kl":
        rows = rows - entropy_of_buckets(logprobs)
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprob = (logits / temperature).log_softmax(-1).gather(1, inputs.tokens[:, None])[:, 0]
    scale: float | torch.Tensor = options.get("credit_scale", 1.0)
    if "teacher_ratio_clip" in options:  # 0 of a token that is not named
        probs = torch.where(ids == inputs.tokens[:, None], logprobs.exp(), 0.0).sum(1)
        scale = (probs / logprob.detach().exp()).clamp(max=options["teacher_ratio_clip"])
    span = options.get("credit_span", "future")
    credit = torch.zeros(N, dtype=torch.float64)
    if span != "none":
        credit = credit_by_definition(
            rows.detach(), LENGTHS, span=span, discount=options.get("discount", 1.0), horizon=options.get("horizon"),
            baseline=options.get("baseline"), group_size=options.get("group_size", 1), counted=counted,
            by_remaining=options.get("normalize_by_remaining", False), clip=options.get("credit_clip"),
            scale=scale,
        )  # fmt: skip
    denominator = options.get("normalizer", len(LENGTHS))
    cost = torch.where(counted, rows, 0.0)
    exact = torch.autograd.grad((cost + credit * logprob).sum() / denominator, [hidden, weight, bias])
    torch.testing.assert_close(out.loss, cost.sum().detach() / denominator)
    torch.testing.assert_close(out.cost, cost.detach())
    torch.testing.assert_close(out.credit, credit)
    torch.testing.assert_close(out.stats.logprob, torch.where(counted, logprob, 0.0).detach())
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_named_is_the_loss_with_a_whole_teacher(dtype, importance, generator):
    inputs = make_inputs(N, V, D, dtype=dtype, generator=generator)
    logits = inputs.teacher_hidden.float() @ inputs.teacher_weight.float().T
    shared = {
        "tokens": inputs.tokens, "cu_seqlens": BORDERS, "baseline": "leave_one_out", "group_size": 2, "discount": 0.9,
        "cost": "kl",
    }  # fmt: skip
    if importance:  # ratios on both sides of the bound
        shared |= {"behaviour_logprobs": 2.0 * torch.randn(N, generator=generator) - 4.0, "importance_clip": 1.5}
    ids = torch.arange(V).expand(N, V)
    ours = fused_topk_distil_loss(*inputs.heads[:2], ids, logits.log_softmax(-1), **shared)
    theirs = fused_distil_loss(*inputs.heads, backend="reference", **shared)
    leaves = [inputs.student_hidden, inputs.student_weight]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, other in zip(
        (ours.loss, ours.credit, *torch.autograd.grad(ours.loss, leaves)),
        (theirs.loss, theirs.credit, *torch.autograd.grad(theirs.loss, leaves)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, **close)
    for name in ("ce", "kl", "logprob", "teacher_logprob", "entropy", "teacher_entropy", "lse"):
        torch.testing.assert_close(getattr(ours.stats, name), getattr(theirs.stats, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.stats.agree, theirs.stats.agree)


def test_what_is_not_named_is_not_known(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ids, logprobs = teacher_topk(N, V, 3, generator)
    tokens = inputs.tokens.clone()
    tokens[0], tokens[1] = ids[0, 2], (ids[1].max() + 1) % V
    tokens[1] = next(token for token in range(V) if token not in ids[1])
    with torch.no_grad():
        out = fused_topk_distil_loss(*inputs.heads[:2], ids, logprobs, tokens=tokens, cu_seqlens=BORDERS)
    assert out.stats.teacher_logprob[0] == logprobs[0, 2].float() and out.stats.teacher_logprob[1].isnan()
    assert out.stats.reverse_kl.isnan().all() and out.stats.teacher_lse.isnan().all()
    torch.testing.assert_close(out.stats.teacher_entropy.double(), entropy_of_buckets(logprobs), rtol=1e-4, atol=1e-5)
    named = ids[torch.arange(N), logprobs.argmax(1)]
    assert torch.equal(out.stats.agree, named == (inputs.student_hidden @ inputs.student_weight.T).argmax(1))


def test_teacher_equal_to_student_costs_nothing(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    logprobs = (inputs.student_hidden @ inputs.student_weight.T).log_softmax(-1).detach()
    top = logprobs.topk(5)
    out = fused_topk_distil_loss(
        *inputs.heads[:2], top.indices, top.values, tokens=inputs.tokens, cu_seqlens=BORDERS, credit_span="none",
        cost="kl",
    )  # fmt: skip
    assert out.stats.kl.abs().max() < 1e-5 < out.stats.ce.max()
    out.loss.backward()
    assert inputs.student_hidden.grad.abs().max() < 1e-5


@pytest.mark.parametrize("noise", [6e-5, 1e-2])
def test_a_small_divergence_keeps_its_digits(noise, generator):
    """1e-9 beside a cross-entropy of 4, by the definition in float64 from the same logits; never negative."""
    logits = torch.randn(40, V, generator=generator)
    logprobs = (logits.double() + noise * torch.randn(40, V, generator=generator)).log_softmax(-1)
    ids = logprobs.topk(9).indices
    named = logprobs.gather(1, ids).float()
    out = fused_topk_distil_loss(
        logits, torch.eye(V), ids, named, tokens=ids[:, 0], cu_seqlens=torch.tensor([0, 40]), cost="kl"
    )
    named, log_s = named.double(), logits.double().log_softmax(-1).gather(1, ids)
    t = torch.cat([named, (-named.exp().sum(1, keepdim=True)).log1p()], 1)
    s = torch.cat([log_s, (-log_s.exp().sum(1, keepdim=True)).log1p()], 1)
    exact = (t.exp() * (t - s)).sum(1)
    assert (out.stats.kl >= 0).all() and noise**2 / 10 < exact.mean() < noise**2
    assert ((out.stats.kl - exact) / exact).abs().mean() < 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": "jsd"}, r"cost is 'jsd', expected one of \['ce', 'kl'\]"),
        ({"tokens": torch.full((N,), V)}, "tokens holds ids"),
        ({"cu_seqlens": torch.tensor([0, N - 1])}, "cu_seqlens goes from 0"),
        ({"baseline": "leave_one_out"}, "group_size is None"),
        ({"teacher_ids": torch.full((N, 2), 3)}, "twice"),
    ],
)
def test_wrong_arguments(change, message, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ids, logprobs = teacher_topk(N, V, 2, generator)
    arguments = {"teacher_ids": ids, "teacher_logprobs": logprobs, "tokens": inputs.tokens, "cu_seqlens": BORDERS}
    with pytest.raises(ValueError, match=message):
        fused_topk_distil_loss(*inputs.heads[:2], **{**arguments, **change})
