"""fused_forward_ce: every back end, plan, dtype and reduction against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distil_kernels.engine.driver
import distil_kernels.engine.sizes
import distil_kernels.losses
from distil_kernels import fused_forward_ce, token_stats
from distil_kernels.testing import (
    KINDS,
    Inputs,
    assert_within_budget,
    baselines,
    logits,
    make_inputs,
    oracle,
    term_sizes,
)

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [("reference", dtype) for dtype in (torch.float64, *CPU_DTYPES)] + [("cpu", dtype) for dtype in CPU_DTYPES]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that small inputs cross many borders."""
    monkeypatch.setitem(distil_kernels.engine.sizes.LOGITS_CHUNK_BYTES, "cpu", 64 * 1024)


def row_weight(inputs: Inputs) -> torch.Tensor:
    """[N] token weight times mask."""
    weight = inputs.student_hidden.new_ones(inputs.tokens.numel())
    if inputs.options.get("token_weight") is not None:
        weight = inputs.options["token_weight"].flatten()
    if inputs.options.get("token_mask") is not None:
        weight = weight * inputs.options["token_mask"].flatten()
    return weight


def expected(inputs: Inputs, reduction: str) -> dict[str, torch.Tensor]:
    """Value and gradients by definition, in the dtype of the inputs; "none" with fixed upstream gradients."""
    weight = row_weight(inputs)
    value = oracle(inputs).ce * weight
    if reduction != "none":
        value = value.sum() / (weight.sum() if reduction == "mean" else 1.0)
    gradients = torch.autograd.grad(value, list(inputs.leaves.values()), upstream(value))
    return {"value": value, **dict(zip(inputs.leaves, gradients, strict=True))}


def upstream(value: torch.Tensor) -> torch.Tensor:
    """Unequal, exactly representable upstream gradients."""
    return torch.arange(1, value.numel() + 1, dtype=value.dtype).remainder(7).add(1).reshape(value.shape)


def check(inputs: Inputs, *, reduction: str = "mean", backend: str, plan: str = "auto") -> None:
    value = fused_forward_ce(*inputs.heads, **inputs.options, reduction=reduction, backend=backend, plan=plan)
    gradients = torch.autograd.grad(value, list(inputs.leaves.values()), upstream(value))
    for gradient, leaf in zip(gradients, inputs.leaves.values(), strict=True):
        assert gradient.dtype == leaf.dtype
    compare(inputs, reduction, value, gradients)


def compare(inputs: Inputs, reduction: str, value: torch.Tensor, gradients: tuple[torch.Tensor, ...]) -> None:
    """Value [N] or [], and the gradients of the leaves, within the error budget."""
    exact = expected(inputs.to(torch.float64), reduction)
    base = baselines(inputs, lambda copy: expected(copy, reduction))
    weight = row_weight(inputs)
    scale = upstream(value) if reduction == "none" else 1.0 / (weight.sum() if reduction == "mean" else 1.0)
    terms = term_sizes(inputs, weight * scale)
    # The value is a difference of logits, each of which is rounded to half an ulp: the student's and the teacher's.
    counted = {"none": weight.max(), "sum": weight.sum(), "mean": 1.0}[reduction]
    terms["value"] = float(max(side.detach().abs().max() for side in logits(inputs.to(torch.float64))) * counted) / 4
    for name, ours in (("value", value), *zip(inputs.leaves, gradients, strict=True)):
        assert_within_budget(name, ours, base[name], exact[name], terms=terms.get(name, 0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_value_and_gradients(backend, dtype, kind, generator, small_chunks):
    # 37 rows: no multiple of the chunk; 1031: one block of 1024 and a rest of 7.
    check(make_inputs(37, 1031, 24, dtype=dtype, kind=kind, generator=generator), backend=backend)


@pytest.mark.parametrize("vocab_size", [1, 7, 1024, 49152 + 3])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_vocabularies(backend, vocab_size, generator):
    # 1: the loss is 0; 7: less than a vector; 1024: exactly a block; 49155: a real one and not a multiple of 16.
    check(make_inputs(5, vocab_size, 16, kind="peaked", generator=generator), backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shared_head", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.bfloat16)], ids=str)
def test_every_option_at_once(backend, dtype, shared_head, reduction, generator, small_chunks):
    weight = torch.rand(41, generator=generator).to(dtype)
    mask = torch.rand(41, generator=generator) < 0.6
    inputs = make_inputs(
        41, 517, 20, dtype=dtype, teacher_hidden_size=28, shared_head=shared_head, bias=True, generator=generator,
        temperature=0.7, teacher_temperature=1.3, logit_softcap=2.5, token_mask=mask, token_weight=weight,
    )  # fmt: skip
    check(inputs, reduction=reduction, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("plan", "reduction", "frozen"),
    [
        ("gradient_in_forward", "mean", False),
        ("recompute", "mean", False),
        ("recompute", "none", False),
        ("kept_gradient", "none", False),
        ("frozen_head", "mean", True),
        ("frozen_head", "none", True),
        ("kept_gradient", "none", True),
    ],
)
def test_plans(plan, reduction, frozen, masked, backend, generator, small_chunks):
    mask = torch.rand(50, generator=generator) < 0.5 if masked else None
    inputs = make_inputs(50, 600, 12, generator=generator, token_mask=mask)
    inputs.student_weight.requires_grad_(not frozen)
    check(inputs, reduction=reduction, backend=backend, plan=plan)


def test_default_plans_run(generator, monkeypatch):
    """The plan that `plan` chooses is the one that runs."""
    ran = []
    for name in ("scalar_loss", "rows_statistics"):
        original = getattr(distil_kernels.engine.custom_ops.driver, name)
        monkeypatch.setattr(
            distil_kernels.engine.custom_ops.driver,
            name,
            lambda inputs, plan, original=original: ran.append(plan.name) or original(inputs, plan),
        )
    inputs = make_inputs(6, 11, 8, generator=generator)
    fused_forward_ce(*inputs.heads)
    fused_forward_ce(*inputs.heads, reduction="none")
    inputs.student_weight.requires_grad_(False)
    fused_forward_ce(*inputs.heads)
    with torch.no_grad():
        fused_forward_ce(*inputs.heads, reduction="none")
    assert ran == ["gradient_in_forward", "kept_gradient", "frozen_head", "stats_only"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, generator, small_chunks):
    inputs = make_inputs(
        5, 9, 4, dtype=torch.float64, bias=True, generator=generator, temperature=0.8, logit_softcap=3.0,
        token_weight=torch.rand(5, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    options = {k: v for k, v in inputs.options.items() if k != "student_bias"}

    def loss(hidden, weight, bias):
        return fused_forward_ce(
            hidden, weight, inputs.teacher_hidden, inputs.teacher_weight,
            student_bias=bias, reduction=reduction, backend="reference", **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("plan", ["auto", "recompute"])
def test_backward_twice(plan, reduction, generator):
    inputs = make_inputs(9, 33, 8, generator=generator)
    value = fused_forward_ce(*inputs.heads, reduction=reduction, plan=plan).sum()
    leaves = list(inputs.leaves.values())
    first = torch.autograd.grad(value, leaves, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(value, leaves, torch.tensor(1.5))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, 2 * b)


def test_teacher_gets_no_gradient(generator):
    inputs = make_inputs(4, 9, 8, generator=generator)
    teacher_hidden = inputs.teacher_hidden.clone().requires_grad_()
    teacher_weight = inputs.teacher_weight.clone().requires_grad_()
    fused_forward_ce(inputs.student_hidden, inputs.student_weight, teacher_hidden, teacher_weight).backward()
    assert teacher_hidden.grad is None and teacher_weight.grad is None
    # A shared head gets the student's share only.
    teacher_hidden.grad = None
    fused_forward_ce(inputs.student_hidden, inputs.student_weight, teacher_hidden).backward()
    assert teacher_hidden.grad is None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted(reduction, backend, generator):
    inputs = make_inputs(6, 19, 8, generator=generator, token_mask=torch.zeros(6, dtype=torch.bool))
    value = fused_forward_ce(*inputs.heads, **inputs.options, reduction=reduction, backend=backend)
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value))
    for leaf in inputs.leaves.values():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction, generator):
    inputs = make_inputs(0, 19, 8, generator=generator)
    value = fused_forward_ce(*inputs.heads, reduction=reduction)
    assert value.shape == ((0,) if reduction == "none" else ())
    value.sum().backward()
    assert torch.equal(inputs.student_weight.grad, torch.zeros_like(inputs.student_weight))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_rows_may_hold_anything(reduction, backend, generator, small_chunks):
    mask = torch.rand(30, generator=generator) < 0.5
    inputs = make_inputs(30, 600, 8, generator=generator, token_mask=mask)
    clean = fused_forward_ce(*inputs.heads, token_mask=mask, reduction=reduction, backend=backend)
    clean.sum().backward()
    dirty_hidden = torch.where(mask[:, None], inputs.student_hidden, float("nan")).detach().requires_grad_()
    dirty_teacher = torch.where(mask[:, None], inputs.teacher_hidden, float("inf"))
    weight = inputs.student_weight.detach().clone().requires_grad_()
    dirty = fused_forward_ce(
        dirty_hidden, weight, dirty_teacher, inputs.teacher_weight,
        token_mask=mask, reduction=reduction, backend=backend,
    )  # fmt: skip
    dirty.sum().backward()
    assert torch.equal(clean, dirty)
    assert torch.equal(inputs.student_weight.grad, weight.grad)
    assert torch.equal(inputs.student_hidden.grad, dirty_hidden.grad)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_is_not_hidden(backend, generator):
    inputs = make_inputs(4, 3000, 8, generator=generator)
    with torch.no_grad():
        inputs.student_hidden[2, 3] = float("nan")
    value = fused_forward_ce(*inputs.heads, reduction="none", backend=backend)
    assert value.isnan().tolist() == [False, False, True, False]


def test_a_mean_is_rounded_once(generator):
    """bfloat16 gradients of a mean over 7 rows are those of a sum with weights 1/7, bit for bit."""
    inputs = make_inputs(7, 300, 16, dtype=torch.bfloat16, generator=generator)
    leaves = list(inputs.leaves.values())
    mean = fused_forward_ce(*inputs.heads, backend="cpu")
    weighted = fused_forward_ce(*inputs.heads, token_weight=torch.full((7,), 7.0).reciprocal(), reduction="sum",
                                backend="cpu")  # fmt: skip
    for found, exact in zip(torch.autograd.grad(mean, leaves), torch.autograd.grad(weighted, leaves), strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_a_mean_in_float16_is_divided_last(dtype, generator, monkeypatch):
    """Entries over thousands of tokens are no float16 numbers; the products of a GPU would take them as such."""
    seen, inputs = [], make_inputs(7, 30, 16, dtype=dtype, generator=generator)

    def spy(inputs, plan):
        seen.append(inputs.denominator)
        return compute(inputs, plan)

    compute = distil_kernels.engine.driver.scalar_loss
    monkeypatch.setattr(distil_kernels.engine.driver, "scalar_loss", spy)
    mean, total = (fused_forward_ce(*inputs.heads, reduction=reduction) for reduction in ("mean", "sum"))
    assert [denominator is None for denominator in seen] == [dtype == torch.float16, True]
    torch.testing.assert_close(mean, total / 7)


def test_global_normalizer_makes_accumulation_exact(generator):
    """Two micro-batches with one denominator give the gradients of the whole batch."""
    mask = torch.rand(20, generator=generator) < 0.7
    inputs = make_inputs(20, 40, 8, dtype=torch.float64, generator=generator, token_mask=mask)
    whole = fused_forward_ce(*inputs.heads, token_mask=mask)
    expected_gradients = torch.autograd.grad(whole, list(inputs.leaves.values()))
    total, gradients = 0.0, [0.0, 0.0]
    for half in (slice(0, 13), slice(13, 20)):
        part = fused_forward_ce(
            inputs.student_hidden[half], inputs.student_weight, inputs.teacher_hidden[half], inputs.teacher_weight,
            token_mask=mask[half], normalizer=mask.sum(),
        )  # fmt: skip
        total += part.detach()
        for i, gradient in enumerate(torch.autograd.grad(part, list(inputs.leaves.values()))):
            gradients[i] = gradients[i] + gradient
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradients, list(expected_gradients))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_shapes_strides_and_masks(data, monkeypatch):
    """Leading dimensions, transposed and sliced tensors, masks, chunk sizes."""
    monkeypatch.setitem(
        distil_kernels.engine.sizes.LOGITS_CHUNK_BYTES,
        "cpu",
        data.draw(st.sampled_from([1, 5000, 40_000]), "chunk bytes"),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    leading = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "leading")
    vocab_size, size = data.draw(st.integers(1, 70), "V"), data.draw(st.integers(1, 9), "D")
    num_rows = torch.Size(leading).numel()
    inputs = make_inputs(
        num_rows, vocab_size, size, kind=data.draw(st.sampled_from(KINDS), "kind"), generator=generator,
        temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0]), "temperature"),
    )  # fmt: skip
    mask = torch.rand(num_rows, generator=generator) < 0.8
    layout = data.draw(st.sampled_from(["plain", "transposed", "sliced"]), "layout")

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if layout == "transposed":
            tensor = tensor.T.contiguous().T
        elif layout == "sliced":
            tensor = torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
        return tensor

    leaves = strided(inputs.student_hidden).requires_grad_(), strided(inputs.student_weight).requires_grad_()
    for reduction in ("mean", "none"):
        value = fused_forward_ce(
            leaves[0].reshape(*leading, size), leaves[1], strided(inputs.teacher_hidden).reshape(*leading, size),
            strided(inputs.teacher_weight), token_mask=mask.reshape(leading), reduction=reduction,
            temperature=inputs.options["temperature"], backend="cpu",
        )  # fmt: skip
        if not mask.any():
            assert value.sum() == 0
            continue
        gradients = torch.autograd.grad(value, leaves, upstream(value))
        masked = Inputs(*inputs.heads, inputs.tokens, {**inputs.options, "token_mask": mask})
        compare(masked, reduction, value.flatten() if reduction == "none" else value, gradients)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_other_entry_of_longer_rows(backend, generator):
    """Weights and tokens that are views with gaps: back ends that take addresses must not read what lies between."""
    inputs = make_inputs(9, 23, 8, generator=generator)
    weight, tokens = torch.rand(18, generator=generator)[::2], torch.stack([inputs.tokens, 22 - inputs.tokens], 1)[:, 0]

    def results(weight: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        loss = fused_forward_ce(*inputs.heads, token_weight=weight, reduction="sum", backend=backend)
        stats = token_stats(*inputs.heads, tokens=tokens, backend=backend)
        total = loss + (weight * stats.logprob).sum()
        return [loss, stats.logprob, *torch.autograd.grad(total, list(inputs.leaves.values()))]

    assert not weight.is_contiguous()
    assert not tokens.is_contiguous()
    torch.testing.assert_close(results(weight, tokens), results(weight.contiguous(), tokens.contiguous()))
