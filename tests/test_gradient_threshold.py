"""`gradient_threshold`: the products of the kept entries, the bound on what is lost, and where it may run."""

from __future__ import annotations

import pytest
import torch

from distil_kernels import fused_distil_loss, fused_forward_ce
from distil_kernels.engine import gradient_threshold as sparse_products
from distil_kernels.engine import gradients as gradient_sums
from distil_kernels.engine import sizes
from distil_kernels.engine.gradient_threshold import large_entries
from distil_kernels.testing import assert_within_budget, baselines, make_inputs, oracle

# Vocabularies and hidden sizes that leave remainders in every panel of columns: 12, 4 and 1 vectors (of bfloat16 6 and
# 2 pairs, 4 and 1 vectors), and scalars.
SHAPES = [(7, 33, 3), (60, 1009, 23), (37, 2500, 277)]


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch):
    """A few rows at a time, so that chunks add to one dW."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 2 * 4 * 2500 * 16)


@pytest.fixture
def dense_chunks(monkeypatch):
    """Chunks that kept too many entries, as they come."""
    seen = []

    def spy(*arguments):
        found = large_entries(*arguments)
        seen.append(found[0] is None)
        return found

    monkeypatch.setattr(gradient_sums, "large_entries", spy)
    return seen


def exact_logit_gradient(inputs, row_weight):
    """[N, V] in float64: row_weight (S - T) by definition, and what float32 logits of size 50 make of it at worst."""
    wide = inputs.to(torch.float64)
    student = (wide.student_hidden @ wide.student_weight.T).detach()
    teacher_weight = wide.student_weight.detach() if wide.teacher_weight is None else wide.teacher_weight
    teacher = wide.teacher_hidden @ teacher_weight.T
    weight, s, t = row_weight.double()[:, None], student.softmax(-1), teacher.softmax(-1)
    return weight * (s - t), 1e-4 * weight.abs() * (s + t)


def split(gradient, uncertainty, threshold):
    """Entries that are kept, and magnitudes of those that rounding may put on either side."""
    magnitude = gradient.abs()
    cutoff = threshold * magnitude.amax(-1, keepdim=True)
    margin = uncertainty + threshold * uncertainty.amax(-1, keepdim=True)
    return torch.where(magnitude >= cutoff, gradient, 0.0), ((magnitude - cutoff).abs() <= margin) * magnitude


def gradients(inputs, row_weight, threshold, **options):
    found = fused_forward_ce(
        *inputs.heads, token_weight=row_weight, reduction="sum", backend="cpu", gradient_threshold=threshold,
        return_dropped=True, **options,
    )  # fmt: skip
    return *torch.autograd.grad(found.loss, [inputs.student_hidden, inputs.student_weight]), found


@pytest.mark.parametrize("threshold", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_the_kept_entries(shape, dtype, threshold, threads, small_chunks, dense_chunks, monkeypatch,
                                      generator):  # fmt: skip
    """Against float64 with the same entries; an entry at the threshold's very edge may fall on either side."""
    monkeypatch.setattr(sparse_products, "MAX_SHARE", 1.0)
    inputs = make_inputs(*shape, dtype=dtype, kind="peaked", generator=generator)
    row_weight = torch.rand(shape[0], generator=generator) - 0.3
    full, uncertainty = exact_logit_gradient(inputs, row_weight)
    kept, edge = split(full, uncertainty, threshold)
    grad_hidden, grad_weight, found = gradients(inputs, row_weight, threshold)
    assert not any(dense_chunks)
    weight, hidden = inputs.student_weight.detach().double(), inputs.student_hidden.detach().double()
    slack = edge + (kept != 0) * uncertainty
    for ours, exact, bound in (
        (grad_hidden, kept @ weight, slack @ weight.abs()),
        (grad_weight, kept.T @ hidden, slack.T @ hidden.abs()),
    ):
        assert ((ours.double() - exact).abs() <= bound + torch.finfo(dtype).eps * exact.abs()).all()
    lost = (full - kept).abs().sum(-1) / full.abs().sum(-1)
    slack = (edge + 2 * uncertainty).sum(-1) / full.abs().sum(-1)
    assert ((found.dropped.double() - lost).abs() <= slack).all()


@pytest.mark.parametrize("threshold", [1e-3, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near"])
def test_error_bound(kind, threshold, generator):
    """What docs/mathematics.md promises, from the reported share and from the entries."""
    inputs = make_inputs(48, 701, 24, kind=kind, generator=generator)
    row_weight = torch.rand(48, generator=generator) + 0.1
    full, uncertainty = exact_logit_gradient(inputs, row_weight)
    dense = gradients(inputs, row_weight, 0.0)
    ours = gradients(inputs, row_weight, threshold)
    weight, hidden = inputs.student_weight.detach().double(), inputs.student_hidden.detach().double()
    mass = full.abs().sum(-1)
    hidden_error = (ours[0] - dense[0]).double().norm(dim=-1)
    bound = (ours[2].dropped.double() * mass + uncertainty.sum(-1)) * weight.norm(dim=-1).max()
    assert (hidden_error <= bound).all()
    kept, edge = split(full, uncertainty, threshold)
    lost = (full - kept).abs() + edge
    weight_error = (ours[1] - dense[1]).double().norm(dim=-1)
    assert (weight_error <= (lost + uncertainty).T @ hidden.norm(dim=-1)).all()


def test_a_row_of_tiny_gradients_keeps_its_direction(generator):
    """Relative to the row: a row 1e30 times smaller than its neighbours is treated alike."""
    inputs = make_inputs(12, 900, 16, kind="peaked", generator=generator)
    ones = torch.ones(12)
    scales = ones.clone()
    scales[::2] = 1e-30
    plain, scaled = gradients(inputs, ones, 0.2), gradients(inputs, scales, 0.2)
    size = plain[0].norm(dim=-1)
    assert (size > 0).all()
    # The row's, not the entry's: an entry may be a thousand times smaller than what is summed to it.
    assert ((scaled[0] / scales[:, None] - plain[0]).norm(dim=-1) <= 1e-6 * size).all()
    torch.testing.assert_close(scaled[2].dropped, plain[2].dropped, rtol=1e-4, atol=1e-7)
    assert (plain[2].dropped < 1).all()


def test_masked_rows(generator):
    """Rows that do not count may hold anything, lose nothing and add nothing; a weight of 0 gives a zero row."""
    inputs = make_inputs(20, 300, 16, kind="peaked", generator=generator)
    mask = torch.rand(20, generator=generator) < 0.5
    mask[:2] = torch.tensor([True, False])
    weight = torch.ones(20)
    weight[0] = 0.0
    expected = gradients(inputs, weight * mask, 0.1)
    with torch.no_grad():
        inputs.student_hidden[~mask] = torch.nan
    ours = gradients(inputs, weight, 0.1, token_mask=mask)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])
    assert not ours[0][~mask].any()
    assert not ours[0][0].any()
    assert not ours[2].dropped[~mask].any()
    assert ours[2].dropped[mask].any()


@pytest.mark.parametrize("plan", ["auto", "frozen_head"])
def test_value_and_bias_are_exact_with_credit(plan, threads, small_chunks, generator):
    inputs = make_inputs(45, 2500, 20, kind="peaked", bias=True, generator=generator, temperature=0.7)
    if plan == "frozen_head":
        inputs.student_weight.requires_grad_(False)
        inputs.options["student_bias"].requires_grad_(False)

    def run(threshold):
        out = fused_distil_loss(
            *inputs.heads, tokens=inputs.tokens, cu_seqlens=torch.tensor([0, 20, 45]), plan=plan, discount=0.9,
            gradient_threshold=threshold, **inputs.options,
        )  # fmt: skip
        return out, dict(zip(inputs.leaves, torch.autograd.grad(out.loss, list(inputs.leaves.values())), strict=True))

    (dense, dense_gradients), (ours, our_gradients) = run(0.0), run(1e-2)
    assert torch.equal(ours.loss, dense.loss)
    assert torch.equal(ours.credit, dense.credit)
    assert not dense.dropped.any()
    assert (ours.dropped > 0).any()
    assert not ours.dropped.requires_grad
    for name, exact in dense_gradients.items():
        error = (our_gradients[name] - exact).norm() / exact.norm()
        assert error == 0 if name == "student_bias" else 0 < error < 0.1, name


def test_a_chunk_that_keeps_too_much_is_dense(dense_chunks, generator):
    inputs = make_inputs(16, 200, 16, kind="flat", generator=generator)
    dense, ours = gradients(inputs, torch.ones(16), 0.0), gradients(inputs, torch.ones(16), 1e-3)
    assert dense_chunks == [True]
    assert torch.equal(ours[0], dense[0])
    assert torch.equal(ours[1], dense[1])
    assert not ours[2].dropped.any()


def test_off_does_not_look_for_entries(dense_chunks, generator):
    inputs = make_inputs(16, 200, 16, kind="peaked", generator=generator)
    gradients(inputs, torch.ones(16), 0.0)
    assert dense_chunks == []


def test_value_against_the_oracle_and_shape_of_dropped(generator):
    inputs = make_inputs(12, 400, 16, kind="peaked", generator=generator)
    hidden, weight, teacher_hidden, teacher_weight = inputs.heads
    found = fused_forward_ce(
        hidden.view(3, 4, 16), weight, teacher_hidden.view(3, 4, 16), teacher_weight, gradient_threshold=0.1,
        return_dropped=True,
    )  # fmt: skip
    assert found.dropped.shape == (3, 4)
    base = baselines(inputs, lambda copy: {"loss": oracle(copy).ce.mean()})["loss"]
    assert_within_budget("loss", found.loss, base, oracle(inputs.to(torch.float64)).ce.mean())


@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512"])
def test_lists_of_every_instruction_set(instruction_set, monkeypatch, generator):
    """Entries, transposition and product, to the bit what torch selects; NaN is kept, zeros never are."""
    kernels = sparse_products._C
    chosen = getattr(kernels.InstructionSet, instruction_set)
    if not kernels.cpu_supports(chosen):
        pytest.skip(f"this processor has no {instruction_set}")
    monkeypatch.setattr(sparse_products, "_threads_and_instructions", lambda: (torch.get_num_threads(), chosen))
    monkeypatch.setattr(sparse_products, "MAX_SHARE", 1.0)
    matrix = torch.randn(9, 533, generator=generator).pow(5)
    matrix[3] = 0.0
    matrix[4, 100:500] = 0.0
    kept, dropped = large_entries(matrix, 0.01)
    largest = matrix.abs().amax(-1, keepdim=True)
    expected = torch.where(matrix.abs() >= 0.01 * largest, matrix, 0.0)
    rows = torch.arange(9).repeat_interleave(kept.offsets.diff())
    found = torch.zeros_like(matrix)
    found[rows, kept.index.long()] = kept.value
    assert torch.equal(found, expected)
    assert kept.index.numel() == expected.count_nonzero()
    torch.testing.assert_close(dropped, ((matrix - expected).abs().sum(-1) / matrix.abs().sum(-1)).nan_to_num(0.0))
    dense = torch.randn(9, 271, generator=generator)
    out = torch.ones(533, 271)
    kept.transposed().add_product(dense, out)
    torch.testing.assert_close(out.double(), 1 + expected.double().T @ dense.double(), rtol=1e-5, atol=1e-3)
    matrix[0, 7] = torch.nan
    assert large_entries(matrix, 0.01)[0].value.isnan().sum() == 1


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "gradient_threshold is 1.0, expected a number below 1", {"gradient_threshold": 1.0}),
        (ValueError, "from 0.0 to 1.0", {"gradient_threshold": -0.1}),
        (ValueError, "from 0.0 to 1.0", {"gradient_threshold": float("nan")}),
        (TypeError, "gradient_threshold is str", {"gradient_threshold": "0.1"}),
        (ValueError, "backend='reference', expected 'cpu'", {"gradient_threshold": 0.1, "backend": "reference"}),
        (ValueError, "plan 'recompute'", {"gradient_threshold": 0.1, "plan": "recompute"}),
        (ValueError, "reduction='none'", {"gradient_threshold": 0.1, "reduction": "none"}),
        (ValueError, "reduction='none'", {"return_dropped": True, "reduction": "none"}),
    ],
)
def test_refusals(error, match, options, generator):
    inputs = make_inputs(4, 40, 8, generator=generator)
    with pytest.raises(error, match=match):
        fused_forward_ce(*inputs.heads, **options)


def test_float16_is_refused(generator):
    inputs = make_inputs(4, 40, 8, dtype=torch.float16, generator=generator)
    with pytest.raises(TypeError, match="float16"):
        fused_forward_ce(*inputs.heads, gradient_threshold=0.1)
