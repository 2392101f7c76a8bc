"""fused_distil_loss: the sequence-level gradient, one pass in reverse time, against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from distil_kernels import fused_distil_loss
from distil_kernels.engine import driver, sizes
from distil_kernels.engine.plan import choose_plan
from distil_kernels.engine.sizes import Shape
from distil_kernels.testing import (
    assert_within_budget,
    baselines,
    credit_by_definition,
    credited_weight,
    make_inputs,
    oracle,
    term_sizes,
)

LENGTHS = [5, 1, 9, 0, 4, 7]  # one token, none, and no two alike


@pytest.fixture(params=[1, 40_000, 10**9], ids=["rows", "chunks", "whole"])
def chunk_bytes(request, monkeypatch):
    """One position at a time, a few positions, everything in one chunk."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", request.param)


def run(inputs, *, lengths=LENGTHS, normalizer=None, token_mask=None, token_weight=None, cost="ce", span="future",
        discount=1.0, horizon=None, by_remaining=False, baseline=None, group_size=None, clip=None, scale=1.0,
        teacher_clip=None, behaviour=None, importance_clip=None, **options):  # fmt: skip
    return fused_distil_loss(
        *inputs.heads, tokens=inputs.tokens, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), **inputs.options,
        normalizer=normalizer, token_mask=token_mask, token_weight=token_weight, cost=cost, credit_span=span,
        discount=discount, horizon=horizon, normalize_by_remaining=by_remaining, baseline=baseline,
        group_size=group_size, teacher_ratio_clip=teacher_clip, credit_clip=clip, credit_scale=scale,
        behaviour_logprobs=behaviour, importance_clip=importance_clip, **options,
    )  # fmt: skip


def definition(inputs, *, lengths=LENGTHS, normalizer=None, token_mask=None, token_weight=None, cost="ce",
               span="future", group_size=None, teacher_clip=None, behaviour=None, importance_clip=None,
               **credit):  # fmt: skip
    """Value, credit and gradients by loops and autograd, in the dtype of the inputs."""
    stats = oracle(inputs)
    counted = torch.ones_like(stats.ce, dtype=torch.bool) if token_mask is None else token_mask
    weight = counted * (1.0 if token_weight is None else token_weight.to(stats.ce.dtype))
    costs = weight * getattr(stats, cost)
    weights = to_go = torch.zeros_like(costs)
    if teacher_clip is not None:
        teacher_ratio = (stats.teacher_logprob - stats.logprob).detach().exp().clamp(max=teacher_clip)
        credit["scale"] = credit.get("scale", 1.0) * teacher_ratio
    if span != "none":
        plain = {name: value for name, value in credit.items() if name in ("discount", "horizon", "by_remaining")}
        to_go = credit_by_definition(costs.detach(), lengths, span=span, counted=counted, **plain)
        weights = credit_by_definition(
            costs.detach(), lengths, span=span, group_size=group_size or 1, counted=counted, **credit
        )
    normalizer = normalizer or len(lengths)
    ratio = torch.ones_like(costs)
    if behaviour is not None:
        ratio = (stats.logprob.detach().exp() / behaviour.to(costs.dtype).exp()).where(counted, 0.0)
        ratio = ratio if importance_clip is None else ratio.clamp(max=importance_clip)
    surrogate = (ratio * (costs + weights * stats.logprob)).sum() / normalizer
    gradients = torch.autograd.grad(surrogate, list(inputs.leaves.values()))
    return {
        "loss": costs.sum().detach() / normalizer,
        "credit": ratio * weights,
        "cost_to_go": to_go,
        **dict(zip(inputs.leaves, gradients, strict=True)),
    }


def check(inputs, *, backend="cpu", plan="auto", **settings):
    exact = definition(inputs.to(torch.float64), **settings)
    base = baselines(inputs, lambda copy: definition(copy, **settings))
    ours = run(inputs, backend=backend, plan=plan, **settings)
    total = float(exact["loss"].abs()) * 10
    assert_within_budget("loss", ours.loss, base["loss"], exact["loss"])
    for name in ("credit", "cost_to_go"):
        assert_within_budget(name, getattr(ours, name), base[name], exact[name], terms=total)
    gradients = torch.autograd.grad(ours.loss, list(inputs.leaves.values()))
    normalizer = settings.get("normalizer") or len(settings.get("lengths", LENGTHS))
    weight = credited_weight(exact["credit"], exact["cost_to_go"], settings.get("scale", 1.0))
    terms = term_sizes(inputs, weight / normalizer)
    for name, gradient in zip(inputs.leaves, gradients, strict=True):
        assert_within_budget(name, gradient, base[name], exact[name], terms=terms[name])
    return ours


@pytest.mark.parametrize("baseline", [None, "leave_one_out", "position_mean", "values"])
@pytest.mark.parametrize("span", ["none", "future", "sequence"])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)], ids=str)
def test_definition(backend, dtype, span, baseline, chunk_bytes, generator):
    num_rows = sum(LENGTHS)
    inputs = make_inputs(num_rows, 331, 16, dtype=dtype, bias=True, generator=generator, temperature=0.8)
    if baseline == "values":
        baseline = torch.randn(num_rows, generator=generator, dtype=dtype)
    group_size = 2 if isinstance(baseline, str) and baseline == "leave_one_out" else None
    check(inputs, backend=backend, span=span, baseline=baseline, group_size=group_size)


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("baseline", [None, "leave_one_out", "position_mean"])
@pytest.mark.parametrize("discount", [0.0, 0.9])
@pytest.mark.parametrize("cost", ["ce", "kl"])
def test_masks_weights_discounts_costs(cost, discount, baseline, plan, chunk_bytes, generator):
    num_rows = sum(LENGTHS)
    inputs = make_inputs(num_rows, 331, 16, dtype=torch.bfloat16, shared_head=True, generator=generator)
    check(
        inputs, plan=plan, cost=cost, discount=discount, baseline=baseline, group_size=3, scale=0.3, normalizer=7.0,
        token_mask=torch.rand(num_rows, generator=generator) < 0.7,
        token_weight=torch.rand(num_rows, generator=generator),
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("span", ["future", "sequence"])
def test_a_sequence_that_is_masked_whole_is_no_sibling(span, plan, chunk_bytes, generator):
    """Nor is it where all others of its group are masked; one without tokens is."""
    inputs = make_inputs(sum(LENGTHS), 331, 16, generator=generator)
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    mask[:5] = mask[15:19] = False  # the first of three, the second of [0, 4, 7]
    ours = check(inputs, plan=plan, span=span, baseline="leave_one_out", group_size=3, token_mask=mask)
    pair = run(inputs, span=span, baseline="leave_one_out", group_size=2, lengths=[5, 0, 1, 9, 0, 4, 0, 7],
               token_mask=mask, normalizer=len(LENGTHS))  # fmt: skip
    torch.testing.assert_close(ours.credit[5:15], pair.credit[5:15])


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("baseline", [None, "leave_one_out", "position_mean"])
@pytest.mark.parametrize("horizon", [1, 2, 3, 6, 100])
def test_horizon(horizon, baseline, plan, chunk_bytes, generator):
    """Powers of two, sums of them, and one beyond every sequence."""
    num_rows = sum(LENGTHS)
    inputs = make_inputs(num_rows, 331, 16, generator=generator)
    check(
        inputs, plan=plan, horizon=horizon, discount=0.9, baseline=baseline,
        group_size=3 if baseline == "leave_one_out" else None,
        token_mask=torch.rand(num_rows, generator=generator) < 0.8,
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("baseline", [None, "leave_one_out", "position_mean"])
@pytest.mark.parametrize(("by_remaining", "horizon", "clip"), [(True, None, None), (True, 3, 0.2), (False, None, 2.0)])
def test_normalisation_and_clip(by_remaining, horizon, clip, baseline, plan, chunk_bytes, generator):
    num_rows = sum(LENGTHS)
    inputs = make_inputs(num_rows, 331, 16, generator=generator)
    ours = check(
        inputs, plan=plan, by_remaining=by_remaining, horizon=horizon, clip=clip, discount=0.8, scale=0.7,
        baseline=baseline, group_size=3 if baseline == "leave_one_out" else None,
        token_mask=torch.rand(num_rows, generator=generator) < 0.8,
        token_weight=torch.rand(num_rows, generator=generator),
    )  # fmt: skip
    assert clip is None or ours.credit.abs().max() <= clip


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize(("teacher_clip", "clip"), [(1.0, None), (1.0, 0.5), (0.3, None), (math.inf, 2.0)])
def test_teacher_ratio(teacher_clip, clip, plan, chunk_bytes, generator):
    """Ratios on both sides of their bound."""
    inputs = make_inputs(sum(LENGTHS), 331, 16, generator=generator)
    ratio = (oracle(inputs).teacher_logprob - oracle(inputs).logprob).exp()
    assert bool((ratio < 0.3).any()) and bool((ratio > 1.0).any())
    mask = torch.rand(sum(LENGTHS), generator=generator) < 0.8
    check(
        inputs, plan=plan, teacher_clip=min(teacher_clip, 1e9), clip=clip, discount=0.9, scale=0.7,
        baseline="leave_one_out", group_size=3, token_mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("discount", [0.0, 1e-30])
def test_no_token_remains(discount, generator):
    """The last token of each sequence, and every token where the discount leaves next to nothing: no 0 / 0."""
    inputs = make_inputs(sum(LENGTHS), 40, 8, generator=generator)
    ours = run(inputs, discount=discount, by_remaining=True)
    last = torch.tensor(LENGTHS).cumsum(0)[torch.tensor(LENGTHS) > 0] - 1
    assert torch.equal(ours.credit[last], torch.zeros(len(last)))
    assert ours.credit.isfinite().all()


def test_clip_of_the_whole_sequences_cost(generator):
    inputs = make_inputs(sum(LENGTHS), 40, 8, generator=generator)
    check(inputs, span="sequence", clip=3.0)


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("span", ["none", "future", "sequence"])
@pytest.mark.parametrize("importance_clip", [None, 1.2])
def test_importance(importance_clip, span, plan, chunk_bytes, generator):
    """Ratios around 1, some above the clip; rows that do not count hold NaN."""
    num_rows = sum(LENGTHS)
    inputs = make_inputs(num_rows, 331, 16, generator=generator)
    mask = torch.rand(num_rows, generator=generator) < 0.8
    behaviour = oracle(inputs).logprob.detach() + 0.3 * torch.randn(num_rows, generator=generator)
    check(
        inputs, plan=plan, span=span, token_mask=mask, behaviour=behaviour.where(mask, float("nan")),
        importance_clip=importance_clip, baseline=None if span == "none" else "position_mean",
    )  # fmt: skip


def test_horizon_forgets_large_costs_entirely(monkeypatch, generator):
    """A cost of 1e6 behind the horizon leaves no rounding in the credit of small ones."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 1)
    inputs = make_inputs(12, 97, 16, generator=generator)
    weight = torch.ones(12)
    weight[-1] = 1e6
    settings = {"lengths": [12], "horizon": 3, "token_weight": weight}
    exact = definition(inputs.to(torch.float64), **settings)
    ours = run(inputs, **settings)
    torch.testing.assert_close(ours.credit[:8].double(), exact["credit"][:8], rtol=1e-5, atol=0.0)


def test_frozen_head(chunk_bytes, generator):
    inputs = make_inputs(sum(LENGTHS), 97, 16, generator=generator)
    inputs.student_weight.requires_grad_(False)
    check(inputs, plan="frozen_head", discount=0.9)


def test_many_sequences_in_several_blocks(monkeypatch, generator):
    """24 sequences in groups of 4 do not fit a chunk: blocks of whole groups, one after the other."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 2 * 4 * 53 * 18)  # 18 rows
    lengths = torch.randint(0, 12, (24,), generator=generator).tolist()
    inputs = make_inputs(sum(lengths), 53, 8, generator=generator)
    check(inputs, lengths=lengths, baseline="leave_one_out", group_size=4, discount=0.95)
    check(inputs, lengths=lengths, baseline="position_mean")


def test_one_pass_where_weights_are_known_in_order():
    shape = Shape(10_000, 50_000, 512, torch.float32, "cpu", scalar=True, grad_hidden=True, grad_head=True)
    assert choose_plan(shape, credit_in_one_pass=True).name == "gradient_in_forward"
    assert choose_plan(shape, credit_in_one_pass=False).name == "recompute"
    with pytest.raises(ValueError, match="other chunks"):
        choose_plan(shape, "gradient_in_forward", credit_in_one_pass=False)


def test_backward_twice_and_stats_are_detached(generator):
    inputs = make_inputs(sum(LENGTHS), 40, 8, generator=generator)
    ours = run(inputs, discount=0.9)
    assert not ours.credit.requires_grad
    assert not any(value.requires_grad for value in ours.stats)
    leaves = list(inputs.leaves.values())
    first = torch.autograd.grad(ours.loss, leaves, retain_graph=True)
    second = torch.autograd.grad(ours.loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_gradient_gives_the_same_numbers(generator):
    inputs = make_inputs(sum(LENGTHS), 40, 8, generator=generator)
    ours = run(inputs, discount=0.9)
    with torch.no_grad():
        still = run(inputs, discount=0.9)
    torch.testing.assert_close(ours.loss.detach(), still.loss)
    torch.testing.assert_close(ours.credit, still.credit)


@pytest.mark.parametrize("plan", ["gradient_in_forward", "recompute"])
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0]])
def test_nothing_counted(lengths, plan, generator):
    """Every row masked, and no rows at all: value and gradients are 0."""
    inputs = make_inputs(sum(lengths), 40, 8, generator=generator)
    nothing = torch.zeros(sum(lengths), dtype=torch.bool)
    ours = run(inputs, lengths=lengths, token_mask=nothing, baseline="leave_one_out", group_size=2, plan=plan)
    ours.loss.backward()
    assert ours.loss == 0
    assert not ours.credit.any()
    for leaf in inputs.leaves.values():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("plan", ["auto", "recompute", "frozen_head"])
@pytest.mark.parametrize("cost", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.bfloat16)], ids=str)
def test_without_tokens_and_borders(backend, dtype, cost, plan, chunk_bytes, generator):
    """A token-wise loss and the student's entropy from one pass, with the bits that a call with tokens has."""
    inputs = make_inputs(20, 331, 16, dtype=dtype, generator=generator)
    inputs.student_weight.requires_grad_(plan != "frozen_head")
    mask = torch.rand(20, generator=generator) < 0.7
    with torch.no_grad():
        inputs.student_hidden[~mask] = math.nan
    options = {"cost": cost, "credit_span": "none", "normalizer": 7.0, "token_mask": mask, "backend": backend}
    with_tokens = fused_distil_loss(
        *inputs.heads, tokens=inputs.tokens, cu_seqlens=torch.tensor([0, 5, 20]), plan=plan, **options
    )
    without = fused_distil_loss(*inputs.heads, tokens=None, cu_seqlens=None, plan=plan, **options)
    leaves = list(inputs.leaves.values())
    for ours, theirs in zip(
        (without.loss, *torch.autograd.grad(without.loss, leaves)),
        (with_tokens.loss, *torch.autograd.grad(with_tokens.loss, leaves)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    for name, value in without.stats._asdict().items():
        if name in ("logprob", "teacher_logprob"):
            assert value.isnan().all()
        else:
            assert torch.equal(value, getattr(with_tokens.stats, name))
    with torch.no_grad():
        inputs.student_hidden[~mask] = 0.0
    exact = oracle(inputs.to(torch.float64)).entropy[mask]
    torch.testing.assert_close(without.stats.entropy[mask].double(), exact, rtol=1e-5, atol=1e-5)


def test_without_tokens_there_are_four_products(generator, monkeypatch):
    names = []
    for name in ("lm_head", "grad_hidden", "grad_weight", "add_grad_weight"):
        original = getattr(driver.gemm, name)
        monkeypatch.setattr(
            driver.gemm, name,
            lambda *args, name=name, original=original, **kw: names.append(name) or original(*args, **kw),
        )  # fmt: skip
    inputs = make_inputs(8, 131, 16, generator=generator)
    out = fused_distil_loss(*inputs.heads, tokens=None, cu_seqlens=None, cost="jsd", credit_span="none")
    out.loss.backward()
    assert sorted(names) == ["grad_hidden", "grad_weight", "lm_head", "lm_head"]
    assert torch.equal(out.loss, out.cost.sum())  # one sequence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": None}, "tokens is None with credit_span='future', expected a tensor, or the span 'none'"),
        ({"cu_seqlens": None}, "cu_seqlens is None with credit_span='future', expected a tensor"),
        (
            {"tokens": None, "credit_span": "none", "behaviour_logprobs": torch.zeros(6)},
            "tokens is None with behaviour_logprobs, expected the tokens",
        ),
    ],
)
def test_credit_needs_tokens_and_borders(options, message, generator):
    inputs = make_inputs(6, 19, 8, generator=generator)
    with pytest.raises(ValueError, match=message):
        fused_distil_loss(*inputs.heads, **{"tokens": inputs.tokens, "cu_seqlens": torch.tensor([0, 6])} | options)
