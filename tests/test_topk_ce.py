"""fused_topk_ce against float64 autograd on dense logits, and where it must not break: no tail, hardly any, padding."""

from __future__ import annotations

import pytest
import torch
from topk_reference import dense, teacher_topk

from distil_kernels import fused_forward_ce, fused_topk_ce
from distil_kernels.engine import sizes
from distil_kernels.engine.credit import NO_CREDIT, Credit
from distil_kernels.engine.gradients import Needs
from distil_kernels.engine.spec import Spec
from distil_kernels.testing import assert_within_budget, make_inputs

N, V, D = 23, 67, 16


def gradients(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def leaves_of(inputs, dtype, bias):
    cast = [inputs.student_hidden, inputs.student_weight, *([bias] if bias is not None else [])]
    return [leaf.detach().to(dtype).requires_grad_() for leaf in cast]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_named", "num_padding", "options"),
    [
        (5, 0, {}),
        (1, 0, {}),
        (6, 3, {"temperature": 0.7}),
        (8, 0, {"softcap": 3.0, "temperature": 1.3}),
        (V, 0, {}),
        (V - 1, 0, {}),
    ],
    ids=["five", "one", "padded", "softcap", "all", "all but one"],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients(num_named, num_padding, options, with_bias, dtype, generator, monkeypatch):
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", 2 * 8 * V * (8 if dtype == torch.float64 else 4))  # 8 rows
    inputs = make_inputs(N, V, D, generator=generator)
    bias = torch.randn(V, generator=generator) if with_bias else None
    ids, logprobs = teacher_topk(N, V, num_named, generator, num_padding)
    leaves = leaves_of(inputs, dtype, bias)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = gradients(dense(*exact_leaves[:2], ids, logprobs, *exact_leaves[2:], **options), exact_leaves)
    plain_leaves = [leaf.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for leaf in leaves]
    plain = gradients(dense(*plain_leaves[:2], ids, logprobs, *plain_leaves[2:], **options), plain_leaves)
    names = {"softcap": "logit_softcap"}
    keywords = {names.get(name, name): value for name, value in options.items()}
    ours = gradients(
        fused_topk_ce(*leaves[:2], ids, logprobs.to(plain_leaves[0].dtype), reduction="sum",
                      student_bias=leaves[2] if with_bias else None, **keywords),
        leaves,
    )  # fmt: skip
    for name, mine, naive, truth in zip(("loss", "dh", "dW", "db"), ours, plain, exact, strict=False):
        # bfloat16: the gradient of the logits is rounded once, on its way into the products.
        terms = float(truth.abs().max()) * (2**13 if dtype == torch.bfloat16 else 64)
        assert_within_budget(name, mine, [naive], truth, terms=terms)


def test_all_tokens_known_is_the_forward_cross_entropy(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    logprobs = (inputs.teacher_hidden @ inputs.teacher_weight.T).log_softmax(-1)
    ids = torch.arange(V).expand(N, V)
    leaves = list(inputs.leaves.values())[:2]
    ours = gradients(fused_topk_ce(*inputs.heads[:2], ids, logprobs), leaves)
    theirs = gradients(fused_forward_ce(*inputs.heads), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_tail_of_1e_12_keeps_its_digits(generator):
    """1 - sum S_k is 0 in float32 where the student is sure; the tail's own sum is not."""
    hidden = torch.zeros(1, 2)
    hidden[0, 0] = 1.0
    weight = torch.zeros(V, 2)
    weight[3, 0] = 40.0
    hidden.requires_grad_()
    loss = fused_topk_ce(hidden, weight, torch.tensor([[3]]), torch.tensor([[0.5]]).log(), reduction="sum")
    exact = 0.5 * (40.0 - torch.tensor(V - 1.0).log())
    assert abs(loss.item() - exact.item()) < 1e-4
    (grad,) = torch.autograd.grad(loss, hidden)
    assert abs(grad[0, 0].item() - 0.5 * 40.0) < 1e-3


def test_rows_that_do_not_count_are_not_read(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ids, logprobs = teacher_topk(N, V, 4, generator)
    mask = torch.rand(N, generator=generator) < 0.6
    weight = torch.rand(N, generator=generator)
    weight[mask.nonzero()[0]] = 0.0
    hidden = inputs.student_hidden.detach().clone()
    hidden[~mask], ids[~mask], logprobs[~mask] = torch.nan, V + 7, torch.nan
    hidden.requires_grad_()
    loss = fused_topk_ce(hidden, inputs.student_weight, ids, logprobs, token_mask=mask, token_weight=weight)
    ours = gradients(loss, [hidden, inputs.student_weight])
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, inputs.student_weight)]
    row_weight = torch.where(mask, weight, 0.0).double()
    exact = gradients(dense(*exact_leaves, ids, logprobs, row_weight=row_weight) / row_weight.sum(), exact_leaves)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-6)
    assert (ours[1][~mask] == 0).all()


def test_nothing_known_and_nothing_counted(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ids, logprobs = torch.full((N, 2), -1), torch.full((N, 2), torch.nan)
    loss = fused_topk_ce(*inputs.heads[:2], ids, logprobs)
    loss.backward()
    assert abs(loss.item()) < 1e-6  # one bucket holds everything: both agree on it
    assert inputs.student_weight.grad.abs().max() < 1e-6
    mask = torch.zeros(N, dtype=torch.bool)
    assert fused_topk_ce(*inputs.heads[:2], ids, logprobs, token_mask=mask).item() == 0.0


@pytest.mark.parametrize("num_named", [1, 5, V])
def test_an_offset_that_all_logits_share(num_named, generator):
    """1e4 added to every logit costs what rounding the logits costs, and no more in the normalisers."""
    inputs = make_inputs(N, V, D, kind="offset", generator=generator)
    ids, logprobs = teacher_topk(N, V, num_named, generator)

    def by_definition(dtype):
        leaves = leaves_of(inputs, dtype, None)
        return gradients(dense(*leaves, ids, logprobs), leaves)

    leaves = leaves_of(inputs, torch.float32, None)
    ours = gradients(fused_topk_ce(*leaves, ids, logprobs.float(), reduction="sum"), leaves)
    for mine, plain, exact in zip(ours, by_definition(torch.float32), by_definition(torch.float64), strict=True):
        # The value is one number, which plain torch can hit by luck: a rounding of a logit is left to it.
        rounding = 1e4 * torch.finfo(torch.float32).eps if exact.ndim == 0 else 0.0
        assert (mine - exact).norm() <= 3 * (plain - exact).norm() + rounding


def test_gradcheck(generator):
    inputs = make_inputs(4, 9, 5, dtype=torch.float64, generator=generator)
    ids, logprobs = teacher_topk(4, 9, 3, generator)
    leaves = list(inputs.leaves.values())[:2]
    assert torch.autograd.gradcheck(lambda h, w: fused_topk_ce(h, w, ids, logprobs), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, generator):
    inputs = make_inputs(4, 9, 5, dtype=dtype, generator=generator)
    ids, logprobs = teacher_topk(4, 9, 3, generator)
    shared = (*inputs.heads[:2], None, ids, logprobs.float())
    for credit in (NO_CREDIT, Credit(discount=0.9)):
        tokens = None if credit == NO_CREDIT else ids[:, 0]
        spec = Spec("reference", "", "gradient_in_forward", "", Needs(True, True, False), credit=credit)
        no_terms = (None,) * 5
        borders = torch.tensor([0, 1, 4])
        arguments = (*shared, tokens, None, torch.ones(4), torch.tensor(2.0), borders, None, None, *no_terms)
        rows, (text, numbers) = {"vocab_size": 9, "chunk_rows": 3, "staging_rows": 4}, spec.encode_apart()
        torch.library.opcheck(torch.ops.distil_kernels.topk_loss, (*arguments, numbers, None), {"spec": text, **rows})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_ids": torch.full((N, 2), V)}, "expected 0 to 66"),
        ({"teacher_ids": torch.full((N, 2), 3)}, "twice"),
        ({"teacher_logprobs": torch.full((N, 2), 0.1)}, "expected at most 1"),
        (
            {"teacher_logprobs": torch.full((N, 2), torch.inf)},
            r"no distribution \(they sum to inf\), expected at most 1",
        ),
        ({"teacher_logprobs": torch.full((N, 2), torch.nan)}, "expected at most 1"),
        ({"teacher_logprobs": torch.zeros(N, 3)}, "expected one"),
        ({"teacher_ids": torch.zeros(N - 1, 2, dtype=torch.int64)}, "teacher_ids has shape"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_wrong_arguments(change, message, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ids, logprobs = teacher_topk(N, V, 2, generator)
    arguments = {"teacher_ids": ids, "teacher_logprobs": logprobs} | change
    with pytest.raises(ValueError, match=message):
        fused_topk_ce(*inputs.heads[:2], **arguments)


def with_mass(mass, dtype, generator, num_named=8):
    """Log-probs [N, K] of a dtype whose probabilities sum to `mass` in the last row, and to less in the others."""
    share = torch.rand(N, num_named, generator=generator, dtype=torch.float64) + 0.2
    share = share / share.sum(-1, keepdim=True) * 0.9
    share[-1] *= mass / 0.9
    return torch.stack([torch.randperm(V, generator=generator)[:num_named] for _ in range(N)]), share.log().to(dtype)


@pytest.mark.parametrize(("mass", "dtype", "is_right"), [
    (1.0014, torch.float32, True), (1.0014, torch.bfloat16, True), (1.0014, torch.float64, True),
    (1.0049, torch.float32, True), (1.006, torch.float32, False), (1.03, torch.bfloat16, False),
    (1.03, torch.float16, False),
])  # fmt: skip
def test_a_mass_above_one_by_the_rounding_of_log_probs(mass, dtype, is_right, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ids, logprobs = with_mass(mass, dtype, generator)
    mask = torch.arange(N) < N - 1
    fused_topk_ce(*inputs.heads[:2], ids, logprobs, token_mask=mask)
    if not is_right:
        with pytest.raises(ValueError, match=r"teacher_logprobs has a row .* \(they sum to 1.0"):
            fused_topk_ce(*inputs.heads[:2], ids, logprobs)
        return

    # Nothing is renormalised: the last row weighs as much as its probabilities sum to, and has no tail.
    leaves = leaves_of(inputs, torch.float64, None)
    value = fused_topk_ce(*leaves, ids, logprobs, reduction="sum")
    probs = logprobs.double().exp()
    named = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(1, ids)
    tail = (1.0 - named.exp().sum(-1)).log()
    exact = -(probs * named).sum() - ((1.0 - probs.sum(-1)).clamp(min=0.0) * tail).sum()
    for ours, theirs in zip(gradients(value, leaves), gradients(exact, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_distribution_in_half_precision_is_one(dtype, generator):
    """Of few tokens and of all, sure and unsure: what rounding makes of its sum is no error."""
    inputs = make_inputs(N, V, D, generator=generator)
    for scale in (0.0, 0.3, 3.0, 30.0):
        logprobs = (scale * torch.randn(N, V, generator=generator)).log_softmax(-1).to(dtype)
        for num_named in (V, 20):
            top = logprobs.topk(num_named)
            fused_topk_ce(*inputs.heads[:2], top.indices, top.values)


def test_log_probs_of_two_decimals_are_a_distribution(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    for scale in (0.3, 3.0):
        top = (scale * torch.randn(N, V, generator=generator)).log_softmax(-1).topk(V)
        fused_topk_ce(*inputs.heads[:2], top.indices, (top.values * 100).round() / 100)


def test_a_distribution_over_every_token_sums_to_one(generator):
    inputs = make_inputs(N, V, D, generator=generator)
    ids = torch.stack([torch.randperm(V, generator=generator) for _ in range(N)])
    logprobs = torch.full((N, V), 0.5 / V).log()
    with pytest.raises(ValueError, match=r"every token whose probabilities are no distribution \(they sum to 0.5"):
        fused_topk_ce(*inputs.heads[:2], ids, logprobs)
    fused_topk_ce(*inputs.heads[:2], ids[:, 1:], logprobs[:, 1:])
