"""Reverse KL, JSD, entropy and policy gradient: the same driver, rows and plans, each against float64 by definition."""

from __future__ import annotations

import math

import pytest
import torch

import distil_kernels
from distil_kernels import (
    fused_distil_loss,
    fused_forward_ce,
    fused_forward_kl,
    fused_jsd,
    fused_policy_loss,
    fused_reverse_kl,
    token_logprobs,
)
from distil_kernels.backends import Cost, Statistic
from distil_kernels.engine.gradients import Needs
from distil_kernels.engine.plan import Plan
from distil_kernels.engine.policy import Policy
from distil_kernels.engine.spec import Spec
from distil_kernels.testing import (
    assert_within_budget,
    baselines,
    cost_by_definition,
    credit_by_definition,
    make_inputs,
    oracle,
)

LOSSES = {"kl": fused_forward_kl, "reverse_kl": fused_reverse_kl, "jsd": fused_jsd}
LOSSES_BY_NAME = {loss.__name__: loss for loss in LOSSES.values()}
BACKENDS = ["reference", "cpu"]
OPTIONS = {"kl": {}, "reverse_kl": {}, "jsd": {"jsd_weight": 0.3}}


def gradients(value, inputs):
    return dict(zip(inputs.leaves, torch.autograd.grad(value, list(inputs.leaves.values())), strict=True))


def expected(inputs, cost, weights):
    costs = cost_by_definition(inputs, cost, OPTIONS.get(cost, {}).get("jsd_weight", 0.5))
    value = (costs * weights.to(costs.dtype)).sum()
    return {"value": value.detach()} | gradients(value, inputs)


def assert_right(found, inputs, compute, terms=8.0):
    exact, base = compute(inputs.to(torch.float64)), baselines(inputs, compute)
    for name, mine in found.items():
        assert_within_budget(name, mine, base[name], exact[name], terms=terms)


# 37 rows over chunks of 8: several chunks and a short one. Shared head: one product for both models.
@pytest.mark.parametrize("kind", ["ordinary", "peaked", "flat", "near"])
@pytest.mark.parametrize("plan", ["gradient_in_forward", "recompute", "kept_gradient", "frozen_head"])
@pytest.mark.parametrize("cost", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients(backend, cost, plan, kind, generator):
    inputs = make_inputs(37, 131, 16, kind=kind, bias=kind != "near", generator=generator)
    weights = torch.rand(37, generator=generator)
    if plan == "frozen_head":
        inputs.student_weight.requires_grad_(False)
        inputs.options.get("student_bias", inputs.student_weight).requires_grad_(False)
    reduction = "none" if plan == "kept_gradient" else "sum"
    value = LOSSES[cost](
        *inputs.heads, **inputs.options, **OPTIONS[cost], token_weight=weights, reduction=reduction, backend=backend,
        plan=Plan(plan, 8, 0),
    ).sum()  # fmt: skip
    found = {"value": value.detach()} | gradients(value, inputs)
    scale = 12.0 if kind == "peaked" else 1.0
    assert_right(found, inputs, lambda copy: expected(copy, cost, weights), terms=8.0 * scale**2)


@pytest.mark.parametrize("cost", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_temperature_and_mask(backend, cost, generator):
    """Rows left out hold NaN; softcap and two temperatures reach value and gradient."""
    inputs = make_inputs(11, 131, 16, generator=generator, temperature=0.7, teacher_temperature=1.3, logit_softcap=3.0)
    weights = torch.rand(11, generator=generator)
    mask = torch.rand(11, generator=generator) > 0.4
    with torch.no_grad():
        spoilt = inputs.student_hidden.clone()
        spoilt[~mask] = float("nan")
    heads = (spoilt.requires_grad_(), *inputs.heads[1:])
    value = LOSSES[cost](*heads, **inputs.options, **OPTIONS[cost], token_mask=mask, token_weight=weights,
                         reduction="sum", backend=backend)  # fmt: skip
    grad_hidden, grad_weight = torch.autograd.grad(value, heads[:2])
    found = {"value": value.detach(), "student_hidden": grad_hidden, "student_weight": grad_weight}
    assert_right(found, inputs, lambda copy: expected(copy, cost, weights * mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cost", LOSSES)
def test_half_precision_keeps_float32_logits(cost, dtype, generator):
    """Near a converged teacher the gradient keeps its direction and size, as with float32 logits."""
    inputs = make_inputs(64, 512, 64, dtype=dtype, kind="near", generator=generator)
    value = LOSSES[cost](*inputs.heads, **OPTIONS[cost], reduction="sum")
    exact = expected(inputs.to(torch.float64), cost, torch.ones(64))
    for name, mine in gradients(value, inputs).items():
        error = (mine.double() - exact[name]).norm() / exact[name].norm()
        assert error < 8 * torch.finfo(dtype).eps, f"{name}: {error:.1e}"


def test_jsd_is_small_and_exact_between_near_models(generator):
    """1e-7 and below: by the definition in float32 nothing of it is left."""
    inputs = make_inputs(16, 4096, 32, kind="near", generator=generator)
    exact = cost_by_definition(inputs.to(torch.float64), "jsd")
    ours = fused_jsd(*inputs.heads, reduction="none")
    assert (ours >= 0).all()
    assert float(((ours.detach() - exact.detach()) / exact.detach()).abs().max()) < 2e-2
    assert 0 < float(exact.max()) < 1e-5


@pytest.mark.parametrize("cost", ["kl", "reverse_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences_of_near_models_are_exact_and_of_equal_ones_zero(backend, cost, generator):
    """1e-7 and below, where the cross-entropy less the entropy is rounding; the gradient is that of the definition."""
    inputs = make_inputs(16, 4096, 32, kind="near", generator=generator)
    exact = cost_by_definition(inputs.to(torch.float64), cost).detach()
    ours = LOSSES[cost](*inputs.heads, reduction="none", backend=backend).detach()
    assert (ours >= 0).all() and 0 < float(exact.max()) < 1e-5
    assert float(((ours - exact) / exact).abs().max()) < 2e-2
    total = LOSSES[cost](*inputs.heads, reduction="sum", backend=backend)
    assert float((total - exact.sum()).abs() / exact.sum()) < 2e-2
    hidden, weight = inputs.heads[:2]
    for teacher in ((hidden, weight), (hidden, None)):
        value = LOSSES[cost](hidden, weight, *teacher, backend=backend)
        assert value == 0
        for gradient in torch.autograd.grad(value, [hidden, weight]):
            assert float(gradient.abs().max()) < 1e-7


def test_forward_kl_has_the_gradient_of_the_cross_entropy(generator):
    inputs = make_inputs(12, 131, 16, bias=True, generator=generator)
    kl, ce = fused_forward_kl(*inputs.heads, **inputs.options), fused_forward_ce(*inputs.heads, **inputs.options)
    assert all(map(torch.equal, gradients(kl, inputs).values(), gradients(ce, inputs).values()))
    torch.testing.assert_close(kl, ce - oracle(inputs).teacher_entropy.mean())


def test_jsd_at_small_weight_is_a_scaled_kl(generator):
    """Its ends are modes of their own: JSD_b / (b (1 - b)) goes to KL(T || S) as b goes to 0, JSD_b to 0."""
    inputs = make_inputs(16, 131, 32, dtype=torch.float64, generator=generator)
    weight = 1e-5
    jsd = fused_jsd(*inputs.heads, jsd_weight=weight) / (weight * (1 - weight))
    kl = oracle(inputs).kl.mean()
    assert abs(float(jsd - kl)) < 1e-3 * float(kl)
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"\[fused_jsd\] jsd_weight is .*expected a number above 0 and below 1"):
            fused_jsd(*inputs.heads, jsd_weight=end)


@pytest.mark.parametrize("cost", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_level_gradient(backend, cost, generator):
    """c grad cost + a grad logprob with the credit of the cost's own future, over several chunks."""
    lengths = [5, 9, 1, 7]
    inputs = make_inputs(sum(lengths), 131, 16, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    out = fused_distil_loss(
        *inputs.heads, tokens=inputs.tokens, cu_seqlens=cu_seqlens, cost=cost, discount=0.9, normalizer=1.0,
        backend=backend, plan=Plan("gradient_in_forward", 6, 0), **OPTIONS[cost],
    )  # fmt: skip

    def compute(copy):
        costs = cost_by_definition(copy, cost, OPTIONS[cost].get("jsd_weight", 0.5))
        credit = credit_by_definition(costs.detach(), lengths, span="future", discount=0.9)
        total = costs.sum() + (credit * oracle(copy).logprob).sum()
        return {"value": costs.sum().detach(), "credit": credit} | gradients(total, copy)

    found = {"value": out.loss.detach(), "credit": out.credit} | gradients(out.loss, inputs)
    assert_right(found, inputs, compute, terms=50.0)


@pytest.mark.parametrize("cost", LOSSES)
def test_gradcheck(cost, generator):
    inputs = make_inputs(5, 9, 4, dtype=torch.float64, bias=True, generator=generator, logit_softcap=3.0)
    options = {name: value for name, value in inputs.options.items() if name != "student_bias"}

    def loss(hidden, weight, bias):
        heads = hidden, weight, inputs.teacher_hidden, inputs.teacher_weight
        return LOSSES[cost](*heads, student_bias=bias, backend="reference", **options)

    assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))


def policy_by_definition(inputs, advantages, old, low, high, entropy_weight, weights, reference=None):
    logprob, entropy = oracle(inputs).logprob, oracle(inputs).entropy
    dtype = logprob.dtype
    ratio = (logprob - (logprob.detach() if old is None else old.to(dtype))).exp()
    advantages = advantages.to(dtype)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    rows = -surrogate - entropy_weight * entropy
    if reference is not None:
        ratio = (reference.to(dtype) - logprob).exp()
        rows = rows + 0.3 * (ratio - ratio.log() - 1)
    return (rows * weights.to(dtype)).sum()


@pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
@pytest.mark.parametrize(("old", "has_reference"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_loss(backend, old, has_reference, entropy_weight, generator):
    inputs = make_inputs(37, 131, 16, bias=True, generator=generator, temperature=0.8, logit_softcap=5.0)
    advantages, weights = torch.randn(37, generator=generator), torch.rand(37, generator=generator)
    own = oracle(inputs).logprob.detach()
    old_logprobs = own + 0.5 * torch.randn(37, generator=generator) if old else None
    reference = own + 0.5 * torch.randn(37, generator=generator) if has_reference else None
    options = {name: value for name, value in inputs.options.items() if not name.startswith("teacher")}
    options |= {"reference_logprobs": reference, "reference_weight": 0.3} if has_reference else {}
    out = fused_policy_loss(
        inputs.student_hidden, inputs.student_weight, tokens=inputs.tokens, advantages=advantages,
        old_logprobs=old_logprobs, clip_low=0.2, clip_high=0.3, entropy_weight=entropy_weight, token_weight=weights,
        normalizer=1.0, backend=backend, plan=Plan("gradient_in_forward", 8, 0), **options,
    )  # fmt: skip

    def compute(copy):
        value = policy_by_definition(copy, advantages, old_logprobs, 0.2, 0.3, entropy_weight, weights, reference)
        return {"value": value.detach()} | gradients(value, copy)

    assert_right({"value": out.loss.detach()} | gradients(out.loss, inputs), inputs, compute)
    torch.testing.assert_close(out.logprob, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, oracle(inputs).entropy.detach(), rtol=1e-5, atol=1e-5)
    ratio = torch.ones(37) if old_logprobs is None else (own - old_logprobs).exp()
    clipped = ((ratio > 1.3) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert torch.equal(out.clipped, clipped) and bool(clipped.any()) == old
    if reference is not None:
        ratio = (reference - own).exp()
        torch.testing.assert_close(out.reference, ratio - ratio.log() - 1, rtol=1e-4, atol=1e-5)
    assert (out.reference is not None) == has_reference


def test_policy_loss_without_bounds_is_reinforce(generator):
    """Without old log-probs the gradient is that of -A log S[y]; masked rows are not read."""
    inputs = make_inputs(20, 131, 16, generator=generator)
    advantages, mask = torch.randn(20, generator=generator), torch.arange(20) % 3 != 0
    with torch.no_grad():
        spoilt = inputs.student_hidden.clone()
        spoilt[~mask] = float("nan")
    spoilt.requires_grad_()
    out = fused_policy_loss(spoilt, inputs.student_weight, tokens=inputs.tokens, advantages=advantages,
                            clip_low=None, clip_high=None, token_mask=mask)  # fmt: skip
    grad_hidden, grad_weight = torch.autograd.grad(out.loss, [spoilt, inputs.student_weight])
    exact = inputs.to(torch.float64)
    value = -(advantages.double() * oracle(exact).logprob)[mask].sum() / int(mask.sum())
    for mine, truth in zip((grad_hidden, grad_weight), gradients(value, exact).values(), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-7)
    assert float(out.loss) == pytest.approx(float(-advantages[mask].mean()), rel=1e-5)


@pytest.mark.parametrize("plan", ["auto", Plan("recompute", 8, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_logprobs(backend, plan, generator):
    """Independent upstream gradients through log-prob and entropy."""
    inputs = make_inputs(19, 131, 16, bias=True, generator=generator, temperature=1.4)
    up, down = torch.randn(2, 19, generator=generator)
    options = {name: value for name, value in inputs.options.items() if not name.startswith("teacher")}
    out = token_logprobs(inputs.student_hidden, inputs.student_weight, tokens=inputs.tokens, backend=backend, plan=plan,
                         **options)  # fmt: skip

    def compute(copy):
        found = oracle(copy)
        total = (up.to(found.logprob.dtype) * found.logprob + down.to(found.logprob.dtype) * found.entropy).sum()
        rows = {name: getattr(found, name).detach() for name in ("logprob", "entropy", "lse")}
        return rows | gradients(total, copy)

    found = out._asdict() | gradients((up * out.logprob + down * out.entropy).sum(), inputs)
    assert_right(found, inputs, compute)


def test_without_a_teacher_there_is_one_product_and_half_the_logits(generator, monkeypatch):
    shapes = []
    original = distil_kernels.engine.driver.gemm.lm_head
    monkeypatch.setattr(
        distil_kernels.engine.driver.gemm,
        "lm_head",
        lambda hidden, weight, out: shapes.append(tuple(out.shape)) or original(hidden, weight, out=out),
    )
    inputs = make_inputs(8, 131, 16, generator=generator)
    arguments = {"tokens": inputs.tokens, "backend": "cpu"}
    fused_policy_loss(inputs.student_hidden, inputs.student_weight, advantages=torch.ones(8), **arguments)
    with torch.no_grad():
        token_logprobs(inputs.student_hidden, inputs.student_weight, **arguments)
    assert shapes == [(8, 131), (8, 131)]


@pytest.mark.parametrize(
    "name", ["fused_forward_kl", "fused_reverse_kl", "fused_jsd", "fused_policy_loss", "token_logprobs"]
)
def test_compiles_without_graph_breaks(name, generator):
    inputs = make_inputs(12, 131, 16, generator=generator)

    def call():
        if name in LOSSES_BY_NAME:
            return LOSSES_BY_NAME[name](*inputs.heads)
        heads = inputs.student_hidden, inputs.student_weight
        if name == "fused_policy_loss":
            return fused_policy_loss(*heads, tokens=inputs.tokens, advantages=torch.ones(12)).loss
        return token_logprobs(*heads, tokens=inputs.tokens).logprob.sum()

    eager = call()
    compiled = torch.compile(call, fullgraph=True)()
    torch.testing.assert_close(compiled, eager)
    for mine, theirs in zip(gradients(compiled, inputs).values(), gradients(eager, inputs).values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_opcheck_policy_loss(generator):
    inputs = make_inputs(6, 19, 8, generator=generator)
    # Advantages of -1 make the sum positive: opcheck differentiates its magnitude, and upstream gradients other than 1
    # scale the op's own outputs in place.
    spec = Spec("reference", "", "gradient_in_forward", "", Needs(hidden=True, weight=True, bias=False),
                cost=Cost(Statistic.ENTROPY), policy=Policy(0.2, 0.2, 0.01))  # fmt: skip
    text, numbers = spec.encode_apart()
    torch.library.opcheck(
        torch.ops.distil_kernels.policy_loss,
        (inputs.student_hidden, inputs.student_weight, None, inputs.tokens % 17, None, None, torch.tensor(3.0),
         -torch.ones(6), None, torch.zeros(6), numbers, None),
        {"spec": text, "vocab_size": 17, "chunk_rows": 4, "staging_rows": 0},
    )  # fmt: skip


def test_bad_arguments_are_named(generator):
    inputs = make_inputs(6, 19, 8, generator=generator)
    heads = inputs.student_hidden, inputs.student_weight
    with pytest.raises(ValueError, match=r"\[fused_policy_loss\] advantages has shape \[5\]"):
        fused_policy_loss(*heads, tokens=inputs.tokens, advantages=torch.ones(5))
    with pytest.raises(ValueError, match=r"\[fused_policy_loss\] clip_low is 1.5"):
        fused_policy_loss(*heads, tokens=inputs.tokens, advantages=torch.ones(6), clip_low=1.5)
    with pytest.raises(ValueError, match=r"reference_weight is given and reference_logprobs is None, expected both"):
        fused_policy_loss(*heads, tokens=inputs.tokens, advantages=torch.ones(6), reference_weight=0.1)
    with pytest.raises(ValueError, match=r"\[fused_policy_loss\] entropy_weight is nan"):
        fused_policy_loss(*heads, tokens=inputs.tokens, advantages=torch.ones(6), entropy_weight=math.nan)
    with pytest.raises(ValueError, match=r"\[fused_distil_loss\] jsd_weight is 1.0"):
        fused_distil_loss(*inputs.heads, tokens=inputs.tokens, cu_seqlens=torch.tensor([0, 6]), cost="jsd",
                          jsd_weight=1.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"\[fused_reverse_kl\] reduction is 'all'"):
        fused_reverse_kl(*inputs.heads, reduction="all")
    with pytest.raises(TypeError, match="temperatur"):
        fused_reverse_kl(*inputs.heads, temperatur=2.0)


def test_forward_ce_and_its_neighbours_differ(generator):
    """Each name computes its own divergence."""
    inputs = make_inputs(6, 19, 8, generator=generator)
    ce, rkl, jsd = (float(loss(*inputs.heads)) for loss in (fused_forward_ce, fused_reverse_kl, fused_jsd))
    found = oracle(inputs.to(torch.float64))
    assert ce == pytest.approx(float(found.ce.mean()), rel=1e-5)
    assert rkl == pytest.approx(float(found.reverse_kl.mean()), rel=1e-5)
    assert 0 < jsd < math.log(2)
