"""The Triton row kernels one by one, on logits chosen for their corners, against the float64 oracle.

Logits come as hidden states times an identity head, so that the oracle sees exactly the logits of the kernel.
"""

from __future__ import annotations

import pytest
import torch

from distil_kernels.backends import LogitPair, LogitTransform, Statistic, triton
from distil_kernels.testing import Inputs, assert_within_budget, baselines, oracle

NAMES = {
    "ce": Statistic.FORWARD_CE, "kl": Statistic.FORWARD_KL, "reverse_kl": Statistic.REVERSE_KL,
    "logprob": Statistic.LOGPROB, "teacher_logprob": Statistic.TEACHER_LOGPROB, "entropy": Statistic.ENTROPY,
    "teacher_entropy": Statistic.TEACHER_ENTROPY,
}  # fmt: skip


def make_logits(num_rows: int, vocab_size: int, generator: torch.Generator, kind: str = "ordinary") -> LogitPair:
    """Rows of one memory with a padded stride, as the driver has them; padding holds NaN."""
    both = torch.full((2 * num_rows, vocab_size + 5), float("nan"))[:, :vocab_size]
    student, teacher = both[:num_rows], both[num_rows:]
    student.copy_(torch.randn(num_rows, vocab_size, generator=generator))
    noise = torch.randn(num_rows, vocab_size, generator=generator)
    teacher.copy_(student + 1e-3 * noise if kind == "near" else noise)
    if kind == "peaked":
        both *= 12
    if kind == "offset":
        student += 1e4
        teacher -= 1e4
    return LogitPair(student, teacher)


def as_inputs(logits: LogitPair, tokens: torch.Tensor, **options: object) -> Inputs:
    eye = torch.eye(logits.student.shape[1])
    return Inputs(logits.student.clone().requires_grad_(), eye, logits.teacher.clone(), eye, tokens, options)


def expected(inputs: Inputs, ce_weight: torch.Tensor, logprob_weight: torch.Tensor) -> dict[str, torch.Tensor]:
    found = oracle(inputs)
    dtype = found.ce.dtype
    total = (ce_weight.to(dtype) * found.ce + logprob_weight.to(dtype) * found.logprob).sum()
    (gradient,) = torch.autograd.grad(total, inputs.student_hidden)
    return {name: getattr(found, name).detach() for name in NAMES} | {"student_hidden": gradient}


@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near", "offset"])
@pytest.mark.parametrize("vocab_size", [1, 7, 131])
def test_statistics_and_gradient(vocab_size, kind, generator):
    # 1: everything is 0; 7: most of a block is outside; 131: odd, so rows begin at odd addresses.
    logits = make_logits(3, vocab_size, generator, kind)
    tokens = torch.randint(vocab_size, (3,), generator=generator)
    ce_weight, logprob_weight = torch.rand(2, 3, generator=generator) + 0.1
    bias = torch.randn(vocab_size, generator=generator)
    student, teacher = LogitTransform(bias, None, 0.7), LogitTransform(None, None, 1.3)
    inputs = as_inputs(logits, tokens, student_bias=bias, temperature=0.7, teacher_temperature=1.3,
                       teacher_bias=torch.zeros(vocab_size))  # fmt: skip
    check(logits, student, teacher, inputs, ce_weight, logprob_weight)


def test_softcap_and_minus_infinity(generator):
    # Columns that neither model may choose; a softcap on the other side of tanh's polynomial and near it.
    logits = make_logits(3, 131, generator)
    logits.student[1] *= 40
    tokens = torch.tensor([2, 5, 130])
    bias = torch.zeros(131)
    bias[[0, 7, 60]] = float("-inf")
    ce_weight, logprob_weight = torch.rand(2, 3, generator=generator) + 0.1
    plain = as_inputs(logits, tokens, student_bias=bias, teacher_bias=bias)
    transform = LogitTransform(bias, None, 1.0)
    check(logits, transform, transform, plain, ce_weight, logprob_weight)
    capped = as_inputs(logits, tokens, logit_softcap=20.0, temperature=0.7)
    transform = LogitTransform(None, 20.0, 0.7)
    check(logits, transform, transform, capped, ce_weight, logprob_weight)


def check(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, inputs: Inputs, ce_weight: torch.Tensor,
    logprob_weight: torch.Tensor,
) -> None:  # fmt: skip
    exact = expected(inputs.to(torch.float64), ce_weight, logprob_weight)
    base = baselines(inputs, lambda copy: expected(copy, ce_weight, logprob_weight))
    largest = max(float(each.abs().max()) for each in logits)
    statistics = triton.row_stats(logits, student, teacher, inputs.tokens)
    for name, index in NAMES.items():
        assert_within_budget(name, statistics[index], base[name], exact[name], terms=largest)
    arguments = logits, student, teacher, inputs.tokens, statistics, ce_weight, logprob_weight
    out = torch.full_like(logits.student, float("nan"))
    triton.row_grad(*arguments, out)
    assert_within_budget("gradient", out, base["student_hidden"], exact["student_hidden"], terms=3.0)
    rounded = torch.full_like(logits.student, float("nan"), dtype=torch.bfloat16)
    triton.row_grad(*arguments, rounded)
    assert ((rounded - out).abs() <= 2**-7 * out.abs()).all()  # the interpreter cuts off, a GPU rounds
    triton.row_grad(*arguments, logits.student)  # in place
    assert torch.equal(logits.student, out)


def test_blocks_of_a_row_meet(generator):
    # 4099 columns: two programs per row, the second holds three; the largest logit is on either side.
    logits = make_logits(2, 4099, generator)
    logits.student[0, 4098] = logits.teacher[0, 4098] = 9.0
    logits.student[1, 3], logits.teacher[1, 4097] = 9.0, 9.0
    plain, tokens = LogitTransform(None, None, 1.0), torch.tensor([4098, 4095])
    statistics = triton.row_stats(logits, plain, plain, tokens)
    s, t = (each.double().log_softmax(-1) for each in logits)
    exact = {
        Statistic.FORWARD_CE: -(t.exp() * s).sum(-1),
        Statistic.FORWARD_KL: (t.exp() * (t - s)).sum(-1),
        Statistic.REVERSE_KL: (s.exp() * (s - t)).sum(-1),
        Statistic.LOGPROB: s.gather(1, tokens[:, None])[:, 0],
        Statistic.TEACHER_LOGPROB: t.gather(1, tokens[:, None])[:, 0],
        Statistic.ENTROPY: -(s.exp() * s).sum(-1),
        Statistic.TEACHER_ENTROPY: -(t.exp() * t).sum(-1),
        Statistic.AGREE: torch.tensor([1.0, 0.0]),
        Statistic.MAX_LOGIT: torch.tensor([9.0, 9.0]),
    }
    for name, value in exact.items():
        torch.testing.assert_close(statistics[name].double(), value.double(), rtol=2e-6, atol=1e-6)


def test_first_of_equal_maxima_counts():
    # The same largest value three times over two blocks; torch and the CPU kernels take the first.
    logits = LogitPair(torch.zeros(2, 4099), torch.zeros(2, 4099))
    logits.student[:, [5, 9, 4098]] = 1.0
    logits.teacher[0, [5, 4098]] = 1.0
    logits.teacher[1, [4, 4098]] = 1.0
    plain = LogitTransform(None, None, 1.0)
    statistics = triton.row_stats(logits, plain, plain, None)
    assert statistics[Statistic.AGREE].tolist() == [1.0, 0.0]
    assert statistics[Statistic.LOGPROB].tolist() == [0.0, 0.0]


def test_rows_without_weight_are_zero_and_nan_stays_in_its_row(generator):
    logits = make_logits(3, 131, generator)
    logits.student[0] = float("nan")
    logits.student[1, 7] = float("nan")
    plain, tokens = LogitTransform(None, None, 1.0), torch.tensor([1, 2, 3])
    statistics = triton.row_stats(logits, plain, plain, tokens)
    assert statistics[Statistic.FORWARD_CE].isnan().tolist() == [True, True, False]
    out = torch.empty_like(logits.student)
    weights = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    triton.row_grad(logits, plain, plain, tokens, statistics, *weights, out)
    assert out[0].eq(0).all() and out[1].isnan().any() and out[2].isfinite().all()


def test_a_token_outside_the_vocabulary_is_nan_and_reads_nothing(generator):
    logits = make_logits(3, 7, generator)
    plain = LogitTransform(None, None, 1.0)
    statistics = triton.row_stats(logits, plain, plain, torch.tensor([-1, 7, 6]))
    assert statistics[Statistic.LOGPROB].isnan().tolist() == [True, True, False]
    assert statistics[Statistic.FORWARD_CE].isfinite().all()


def test_no_rows():
    plain, logits = LogitTransform(None, None, 1.0), LogitPair(torch.empty(0, 7), torch.empty(0, 7))
    statistics = triton.row_stats(logits, plain, plain, torch.empty(0, dtype=torch.int64))
    assert statistics.shape == (12, 0)
    triton.row_grad(logits, plain, plain, None, statistics, torch.empty(0), None, torch.empty(0, 7))
