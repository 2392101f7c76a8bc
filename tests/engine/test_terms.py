"""A loss of several terms in one pass, against float64 autograd of each term's definition."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from terms_reference import ALL, BORDERS, D, N, V, check, definition, drawn, labels_of, per_row, run
from topk_reference import teacher_topk

import distil_kernels
from distil_kernels import (
    fused_distil_loss,
    fused_forward_ce,
    fused_policy_loss,
    fused_topk_ce,
    fused_topk_distil_loss,
    token_logprobs,
)
from distil_kernels.engine import gemm, sizes
from distil_kernels.testing import (
    assert_within_budget,
    baselines,
    logits,
    make_inputs,
    term_sizes,
)

SUBSETS = [*((term,) for term in ALL), *((first, second) for first in ALL for second in ALL if first < second), ALL]


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
@pytest.mark.parametrize(("backend", "dtype"), [
    ("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)
], ids=str)  # fmt: skip
def test_definition(backend, dtype, terms, monkeypatch, generator):
    """Every term and every pair, with the rest of the call drawn at random: plan and chunks, credit, logits, masks."""
    draw = random.Random(int(torch.randint(2**31, (), generator=generator)))
    transform = draw.choice([
        {"temperature": 0.8, "logit_softcap": 3.0}, {"temperature": 1.3, "student_logit_scale": 0.7}, {},
    ])  # fmt: skip
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", draw.choice([1, 40_000, 10**9]))
    inputs = make_inputs(N, V, D, dtype=dtype, bias=True, generator=generator, **transform)
    check(inputs, backend=backend, plan=draw.choice(["auto", "recompute"]), **drawn(generator, terms))


def gradients_of(loss, inputs):
    return torch.autograd.grad(loss, [inputs.student_hidden, inputs.student_weight], retain_graph=True)


def assert_equal_losses(ours, theirs, inputs, dtype):
    """The same loss by two ops: their kernels order a row's few terms in different ways."""
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for mine, other in zip(gradients_of(ours, inputs), gradients_of(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=2 * ulp, atol=8 * ulp * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("old", [False, True])
def test_rewards_alone_are_the_policy_loss(old, dtype, generator):
    inputs = make_inputs(N, V, D, dtype=dtype, generator=generator, temperature=0.7, logit_softcap=5.0)
    policy = {"advantages": torch.randn(N, generator=generator), "entropy_weight": 0.05, "clip_high": 0.28,
              "old_logprobs": -5.0 + torch.randn(N, generator=generator) if old else None}  # fmt: skip
    ours = run(inputs, distil_weight=0.0, normalizer=9, credit_span="none", **policy)
    theirs = fused_policy_loss(*inputs.heads[:2], tokens=inputs.tokens, normalizer=9, **inputs.options, **policy)
    assert torch.equal(ours.stats.logprob, theirs.logprob) and torch.equal(ours.terms.entropy, theirs.entropy)
    assert torch.equal(ours.terms.clipped, theirs.clipped) and (theirs.clipped.any() or not old)
    assert_equal_losses(ours.loss, theirs.loss, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_alone_are_the_loss_to_a_teacher_that_is_sure(dtype, generator):
    """A teacher whose whole mass is on the label; a label is also the loss to one named token."""
    inputs = make_inputs(N, V, D, dtype=dtype, generator=generator, temperature=0.7)
    one_hot = torch.nn.functional.one_hot(inputs.tokens, V).to(dtype) * 300
    sure = inputs.heads[0], inputs.heads[1], one_hot, torch.eye(V, dtype=dtype)
    ours = run(inputs, distil_weight=0.0, normalizer=9, label_rows=torch.arange(N), credit_span="none")
    theirs = fused_forward_ce(*sure, normalizer=9, **inputs.options)
    assert_equal_losses(ours.loss, theirs, inputs, dtype)
    named = fused_topk_ce(*inputs.heads[:2], inputs.tokens[:, None], torch.zeros(N, 1), normalizer=9, temperature=0.7)
    assert_equal_losses(ours.loss, named, inputs, dtype)


def test_a_negative_entropy_bonus_is_the_entropy(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ours = run(inputs, distil_weight=0.0, entropy_weight=-1.0, normalizer=9, credit_span="none")
    theirs = token_logprobs(*inputs.heads[:2], tokens=None).entropy.sum() / 9
    assert_equal_losses(ours.loss, theirs, inputs, torch.float32)


def test_a_weight_of_the_cost_is_that_of_its_tokens(generator):
    """It weighs the credit too; without other terms there is nothing else, and with a cost of 0 nothing is left."""
    inputs = make_inputs(N, V, D, generator=generator)
    weight = torch.rand(6, generator=generator)
    theirs = run(inputs, token_weight=per_row(weight))
    for distil_weight in (weight, per_row(weight)):
        ours = run(inputs, distil_weight=distil_weight)
        assert ours.terms is None and torch.equal(ours.loss, theirs.loss) and torch.equal(ours.credit, theirs.credit)
        for mine, other in zip(gradients_of(ours.loss, inputs), gradients_of(theirs.loss, inputs), strict=True):
            assert torch.equal(mine, other)
    for nothing in (0.0, torch.tensor(0.0)):
        out = run(inputs, distil_weight=nothing)
        assert out.loss == 0 and not any(gradient.any() for gradient in gradients_of(out.loss, inputs))


def test_a_teacher_that_is_not_asked_may_say_anything(generator):
    """Sequences that learn from rewards alone, beside others that are distilled: their teacher's states are NaN."""
    inputs = make_inputs(N, V, D, generator=generator)
    route = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    spoilt = inputs.teacher_hidden.where(per_row(route)[:, None] != 0, float("nan"))
    options = {"distil_weight": route, "advantages": 1.0 - route, "cost": "reverse_kl"}
    ours, theirs = run(replace(inputs, teacher_hidden=spoilt), **options), run(inputs, **options)
    assert torch.equal(ours.loss, theirs.loss)
    for mine, other in zip(gradients_of(ours.loss, inputs), gradients_of(theirs.loss, inputs), strict=True):
        assert torch.equal(mine, other)


def test_a_token_of_weight_0_may_hold_anything(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    weight = torch.ones(N)
    weight[[3, 8]] = 0.0
    hidden = inputs.student_hidden.detach().clone()
    hidden[[3, 8]] = float("nan")
    spoilt = replace(inputs, student_hidden=hidden.requires_grad_())
    options = drawn(generator, ALL, token_mask=None, token_weight=weight, credit_span="none")
    ours, theirs = run(spoilt, **options), run(inputs, **options)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(gradients_of(ours.loss, spoilt)[0], gradients_of(theirs.loss, inputs)[0])


@pytest.mark.parametrize(("kind", "options"), [
    ("ordinary", {}), ("ordinary", {"logit_softcap": 30.0}), ("offset", {}),
])  # fmt: skip
def test_labels_of_a_large_vocabulary(kind, options, generator):
    """The mean of its logits is taken in several blocks, and relative to the row's maximum."""
    inputs = make_inputs(5, 9001, 8, kind=kind, bias=kind == "ordinary", generator=generator)

    def definition(copy):
        capped = replace(copy, options=copy.options | options)
        rows = torch.nn.functional.cross_entropy(logits(capped)[0], copy.tokens, reduction="none", label_smoothing=0.3)
        gradients = torch.autograd.grad(rows.sum(), list(copy.leaves.values()))
        return {"label": rows.detach(), **dict(zip(copy.leaves, gradients, strict=True))}

    ours = fused_distil_loss(
        *inputs.heads, tokens=None, cu_seqlens=None, credit_span="none", distil_weight=0.0, labels=inputs.tokens,
        label_smoothing=0.3, **inputs.options, **options,
    )  # fmt: skip
    exact, base = definition(inputs.to(torch.float64)), baselines(inputs, definition)
    terms = term_sizes(inputs, torch.ones(5))
    assert_within_budget("label", ours.terms.label, base["label"], exact["label"], terms=20.0)
    for name, gradient in zip(inputs.leaves, torch.autograd.grad(ours.loss, list(inputs.leaves.values())), strict=True):
        assert_within_budget(name, gradient, base[name], exact[name], terms=terms[name])


@pytest.mark.parametrize("needs_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_terms_take_the_products_of_the_cost(dtype, needs_head, generator, monkeypatch):
    inputs = make_inputs(N, V, D, dtype=dtype, generator=generator)
    if not needs_head:
        inputs = replace(inputs, student_weight=inputs.student_weight.detach())
    products = []

    def counted(name):
        compute = getattr(gemm, name)

        def spy(*arguments, **options):
            products.append(name)
            return compute(*arguments, **options)

        monkeypatch.setattr(gemm, name, spy)

    for name in ("lm_head", "grad_hidden", "grad_weight", "add_grad_weight"):
        counted(name)
    run(inputs, credit_span="none").loss.backward()
    of_cost, products[:] = list(products), []
    run(inputs, **drawn(generator, ALL, token_mask=None, credit_span="none")).loss.backward()
    assert products == of_cost and len(products) == (4 if needs_head else 3)


@pytest.mark.parametrize("num_named", [1, 4, V])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_of_named_tokens(dtype, num_named, generator, monkeypatch):
    """With a tail and without one: the cost's part by its own op, the terms' by the definition."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 40_000)
    inputs = make_inputs(N, V, D, dtype=dtype, bias=True, generator=generator, temperature=0.8, logit_softcap=3.0)
    options = drawn(generator, ALL, cost="ce", token_weight=None, distil_weight=0.4)
    student = {name: value for name, value in inputs.options.items() if not name.startswith("teacher")}
    ids, logprobs = teacher_topk(N, V, num_named, generator)
    fixed = {name: options.pop(name) for name in ("normalizer", "token_mask", "cost", "credit_span")}
    labels = {"labels": labels_of(inputs, options.pop("label_rows"))}
    del options["token_weight"]  # which the op does not take

    def loss(inputs, student, ids, logprobs, **options):
        return fused_topk_distil_loss(
            *inputs.heads[:2], ids, logprobs, tokens=inputs.tokens, cu_seqlens=BORDERS, **student, **fixed, **options
        )

    wide = inputs.to(torch.float64)
    wide_student = {name: wide.options[name] for name in student}
    leaves = list(wide.leaves.values())
    of_cost = torch.autograd.grad(loss(wide, wide_student, ids, logprobs, distil_weight=0.4).loss, leaves)
    terms = options | {"label_rows": rows_of(inputs, labels["labels"]), "distil_weight": 0.0, "token_weight": None}
    exact = definition(wide, **terms, **fixed)
    ours = loss(inputs, student, ids, logprobs, **options, **labels)
    gradients = torch.autograd.grad(ours.loss, list(inputs.leaves.values()))
    for name in ALL:
        size = 20.0 * (1.0 + float(exact[name].abs().max()))  # a ratio errs by its log-prob's error times itself
        assert_within_budget(name, getattr(ours.terms, name), [exact[name]], exact[name], terms=size)
    # In float64 the other side errs as much.
    sizes_of_terms = term_sizes(inputs, 2.0 * (exact["sizes"] + 2.0 + ours.credit.double().abs()))
    for name, gradient, cost in zip(wide.leaves, gradients, of_cost, strict=True):
        assert_within_budget(name, gradient, [exact[name] + cost], exact[name] + cost, terms=sizes_of_terms[name])


def rows_of(inputs, labels):
    """The inverse of `labels_of`."""
    return torch.tensor([-1 if label < 0 else int((inputs.tokens == label).nonzero()[0]) for label in labels])


@pytest.mark.parametrize("op", ["fused_distil_loss", "fused_topk_distil_loss"])
@pytest.mark.parametrize(("options", "message"), [
    ({"policy_weight": 0.5}, "policy_weight is given and advantages is None, expected both"),
    ({"old_logprobs": torch.zeros(N)}, "old_logprobs is given and advantages is None"),
    ({"clip_low": 0.1}, "clip_low is given and advantages is None"),
    ({"clip_high": None}, "clip_high is given and advantages is None"),
    ({"label_weight": 1.0}, "label_weight is given and labels is None"),
    ({"label_smoothing": 0.1}, "label_smoothing is given and labels is None"),
    ({"reference_weight": 1.0}, "reference_weight is given and reference_logprobs is None"),
    ({"advantages": torch.zeros(7)}, r"advantages has shape \[7\], expected \[26\].* or \[6\], one for each sequence"),
    ({"distil_weight": torch.zeros(6, dtype=torch.int64)}, "distil_weight has dtype torch.int64, expected float"),
    ({"distil_weight": float("nan")}, "distil_weight is nan"),
    ({"labels": torch.full((N,), V)}, f"labels holds ids from {V} to {V}, expected 0 to {V - 1} or -100 for none"),
    ({"labels": torch.zeros(N), "label_weight": 1.0}, "labels has dtype torch.float32, expected int64"),
    ({"labels": torch.zeros(N, dtype=torch.int64), "label_smoothing": 1.5}, "label_smoothing is 1.5"),
    ({"z_loss_weight": float("inf")}, "z_loss_weight is inf"),
])  # fmt: skip
def test_wrong_arguments_are_named(op, options, message, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    teacher = inputs.heads[2:]
    if op == "fused_topk_distil_loss":
        teacher = inputs.tokens[:, None], torch.full((N, 1), -0.5)
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(distil_kernels, op)(*inputs.heads[:2], *teacher, tokens=inputs.tokens, cu_seqlens=BORDERS, **options)


@pytest.mark.parametrize("name", ["advantages", "reference_logprobs"])
def test_what_belongs_to_tokens_needs_them(name, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    with pytest.raises(ValueError, match=f"{name} is given and tokens is None"):
        fused_distil_loss(*inputs.heads, tokens=None, cu_seqlens=None, credit_span="none", **{name: torch.zeros(N)})


def test_labels_and_z_loss_need_no_tokens(generator):
    """KD beside cross-entropy, without sequences: torch's functions on full logits."""
    inputs = make_inputs(N, V, D, generator=generator)
    labels = torch.where(torch.arange(N) % 3 == 0, -100, inputs.tokens)
    ours = fused_distil_loss(
        *inputs.heads, tokens=None, cu_seqlens=None, credit_span="none", cost="kl", normalizer=N, distil_weight=0.9,
        labels=labels, label_weight=0.1, z_loss_weight=1e-3,
    )  # fmt: skip
    s, t = logits(inputs)
    kl = torch.nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum")
    ce = torch.nn.functional.cross_entropy(s, labels, reduction="sum")
    theirs = (0.9 * kl + 0.1 * ce + 1e-3 * s.logsumexp(-1).square().sum()) / N
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(gradients_of(ours.loss, inputs), gradients_of(theirs, inputs))
