"""The C++ row kernels directly: every instruction set of this processor, and what a driver never gives them."""

from __future__ import annotations

import pytest
import row_checks
import torch

from distil_kernels import _C
from distil_kernels.backends import FORWARD_CE, Cost, LogitPair, LogitTransform, Statistic, cpu, reference
from distil_kernels.testing import assert_within_budget

COSTS = [
    FORWARD_CE,
    Cost(Statistic.REVERSE_KL),
    Cost(Statistic.JSD, 0.5),
    Cost(Statistic.JSD, 0.01),
    Cost(Statistic.ENTROPY),
]
PLAIN = LogitTransform(None, None, 1.0)
INSTRUCTION_SETS = cpu.supported_instruction_sets()
VOCABULARIES = [1, 7, 1024, 1025, 5000]  # one lane, less than a vector, whole blocks, a part of one, many


def rows(num_rows: int, vocab_size: int, generator: torch.Generator, scale: float = 3.0) -> LogitPair:
    return LogitPair(*(torch.randn(num_rows, vocab_size, generator=generator) * scale for _ in range(2)))


def test_statistics_are_numbered_alike():
    names = {name: int(value) for name, value in _C.Statistic.__members__.items()}
    assert names == {statistic.name.lower(): statistic.value for statistic in Statistic}


def test_portable_always_runs():
    assert {"best", "portable"} <= set(INSTRUCTION_SETS)


def test_shards(generator):
    row_checks.check_shards(reference, generator)
    for instruction_set in INSTRUCTION_SETS:
        row_checks.check_shards(cpu, generator, instruction_set=instruction_set)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab_size", [7, 1031])
@pytest.mark.parametrize("cost", row_checks.COSTS)
def test_terms(cost, vocab_size, softcap, generator):
    row_checks.check_terms(reference, generator, cost, softcap, vocab_size)
    for instruction_set in INSTRUCTION_SETS:
        row_checks.check_terms(cpu, generator, cost, softcap, vocab_size, instruction_set=instruction_set)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.statistic.name.lower())
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_against_float64(instruction_set, cost, vocab_size, softcap, generator):
    num_rows = 9
    pair = rows(num_rows, vocab_size, generator)
    bias = torch.randn(vocab_size, generator=generator)
    tokens = torch.randint(vocab_size, (num_rows,), generator=generator)
    student, teacher = LogitTransform(bias, softcap, 0.7), LogitTransform(None, softcap, 1.3)
    cost_weight, logprob_weight = torch.randn(2, num_rows, generator=generator)

    def run(module, logits, *, dtype, **options):
        s, t = (LogitTransform(x.bias if x.bias is None else x.bias.to(dtype), x.softcap, x.temperature)
                for x in (student, teacher))  # fmt: skip
        logits = LogitPair(*(x.to(dtype) for x in logits))
        statistics = module.row_stats(logits, s, t, tokens, cost, **options)
        out = torch.empty_like(logits.student)
        module.row_grad(
            logits, s, t, tokens, statistics, cost, cost_weight.to(dtype), logprob_weight.to(dtype), out, **options
        )  # fmt: skip
        return statistics, out

    exact, exact_grad = run(reference, pair, dtype=torch.float64)
    base, base_grad = run(reference, pair, dtype=torch.float32)
    ours, ours_grad = run(cpu, pair, dtype=torch.float32, instruction_set=instruction_set)
    largest_logit = float(exact[Statistic.MAX_LOGIT].abs().max()) + 10.0
    for statistic in Statistic:
        assert_within_budget(statistic.name, ours[statistic], [base[statistic]], exact[statistic], terms=largest_logit)
    terms = 3.0 if cost == FORWARD_CE else 3.0 * largest_logit  # S times a difference of logits, not of probabilities
    assert_within_budget("grad", ours_grad, [base_grad], exact_grad, terms=terms)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_small_divergences_keep_their_digits(instruction_set, generator):
    row_checks.check_small_divergences(cpu, generator, instruction_set=instruction_set)


def test_small_divergences_of_the_reference(generator):
    row_checks.check_small_divergences(reference, generator)


@pytest.mark.parametrize("num_lanes", [4, 8, 16])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_small_terms_after_a_large_one(instruction_set, num_lanes):
    column = torch.arange(1024)
    row_checks.check_small_terms_after_large_ones(
        cpu, column < num_lanes, column == 1023, instruction_set=instruction_set
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.statistic.name.lower())
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_both_at_once_are_both_one_after_the_other(instruction_set, cost, dtype, generator):
    pair = rows(5, 2500, generator)
    pair.student[3] = torch.nan  # a row of weight 0
    tokens, weights = torch.randint(2500, (5,), generator=generator), torch.tensor([0.3, -1.0, 2.0, 0.0, 1e-3])
    transform = LogitTransform(torch.randn(2500, generator=generator), 5.0, 0.7)
    how = {"instruction_set": instruction_set}
    statistics = cpu.row_stats(pair, transform, PLAIN, tokens, cost, **how)
    expected = torch.empty_like(pair.student, dtype=dtype)
    rounding = cpu.row_grad(pair, transform, PLAIN, tokens, statistics, cost, weights, None, expected, **how)
    out = pair.student.view(dtype)[:, :2500]  # in place
    found, lost = cpu.row_stats_grad(pair, transform, PLAIN, tokens, cost, weights, out, **how)
    assert torch.equal(out, expected)
    torch.testing.assert_close(found, statistics, rtol=0, atol=0, equal_nan=True)
    assert lost is rounding is None or torch.equal(lost, rounding)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_gradient_in_place_and_strided(instruction_set, generator):
    pair = rows(5, 2000, generator)
    tokens = torch.randint(2000, (5,), generator=generator)
    weights = torch.randn(5, generator=generator)
    statistics = cpu.row_stats(pair, PLAIN, PLAIN, tokens, FORWARD_CE, instruction_set=instruction_set)
    out = torch.empty_like(pair.student)
    cpu.row_grad(
        pair, PLAIN, PLAIN, tokens, statistics, FORWARD_CE, weights, weights, out, instruction_set=instruction_set
    )
    wide = torch.randn(5, 3000)
    wide[:, :2000] = pair.student
    strided = LogitPair(wide[:, :2000], pair.teacher)
    cpu.row_grad(strided, PLAIN, PLAIN, tokens, statistics, FORWARD_CE, weights, weights, strided.student,
                 instruction_set=instruction_set)  # fmt: skip
    assert torch.equal(out, strided.student)
    assert torch.equal(out.isnan(), torch.zeros_like(out, dtype=torch.bool))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("vocab_size", [5, 3000])
def test_minus_infinity_takes_no_part(instruction_set, vocab_size, generator):
    """Entries at -inf in both models leave everything else as if they were not there."""
    pair = rows(4, vocab_size, generator)
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[: vocab_size // 2] = False  # for 3000, the whole first block
    masked = LogitPair(*(torch.where(allowed, x, float("-inf")) for x in pair))
    short = LogitPair(*(x[:, allowed].contiguous() for x in pair))
    statistics = cpu.row_stats(masked, PLAIN, PLAIN, None, FORWARD_CE, instruction_set=instruction_set)
    expected = cpu.row_stats(short, PLAIN, PLAIN, None, FORWARD_CE, instruction_set=instruction_set)
    torch.testing.assert_close(statistics, expected, rtol=1e-5, atol=1e-5)
    ones, out, short_out = torch.ones(4), torch.empty_like(masked.student), torch.empty_like(short.student)
    cpu.row_grad(masked, PLAIN, PLAIN, None, statistics, FORWARD_CE, ones, None, out, instruction_set=instruction_set)
    cpu.row_grad(
        short, PLAIN, PLAIN, None, expected, FORWARD_CE, ones, None, short_out, instruction_set=instruction_set
    )
    assert torch.equal(out[:, ~allowed], torch.zeros(4, int((~allowed).sum())))
    # Differences of probabilities: 4 ulp of the largest of those.
    torch.testing.assert_close(out[:, allowed], short_out, rtol=1e-5, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_rows_without_weight_are_zero_whatever_they_hold(instruction_set, generator):
    pair = rows(3, 100, generator)
    pair.student[1] = float("nan")
    statistics = cpu.row_stats(pair, PLAIN, PLAIN, None, FORWARD_CE, instruction_set=instruction_set)
    out = torch.empty_like(pair.student)
    cpu.row_grad(pair, PLAIN, PLAIN, None, statistics, FORWARD_CE, torch.tensor([1.0, 0.0, 1.0]), None, out,
                 instruction_set=instruction_set)  # fmt: skip
    assert torch.equal(out[1], torch.zeros(100))
    assert not out.isnan().any()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_first_of_equal_maxima_decides_agreement(instruction_set):
    student, teacher = torch.zeros(1, 2050), torch.zeros(1, 2050)
    student[0, [3, 2049]], teacher[0, [3, 1500]] = 1.0, 1.0
    pair = LogitPair(student, teacher)
    assert cpu.row_stats(pair, PLAIN, PLAIN, None, FORWARD_CE, instruction_set=instruction_set)[Statistic.AGREE] == 1
    teacher[0, 2] = 1.0
    assert cpu.row_stats(pair, PLAIN, PLAIN, None, FORWARD_CE, instruction_set=instruction_set)[Statistic.AGREE] == 0


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_small_kl_keeps_its_digits(instruction_set, generator):
    """KL of 2e-6 next to a cross-entropy of 10, of which float32 keeps 1e-6: the gap sums see it to 2e-7."""
    student = torch.randn(6, 20_000, generator=generator)
    teacher = student + 2e-3 * torch.randn(6, 20_000, generator=generator)
    exact = reference.row_stats(LogitPair(student.double(), teacher.double()), PLAIN, PLAIN, None, FORWARD_CE)
    ours = cpu.row_stats(LogitPair(student, teacher), PLAIN, PLAIN, None, FORWARD_CE, instruction_set=instruction_set)
    for statistic in (Statistic.FORWARD_KL, Statistic.REVERSE_KL):
        error = (ours[statistic].double() - exact[statistic]).abs().max()
        assert error < 2e-7, f"{statistic.name}: {error:.1e} of {exact[statistic].max():.1e}"


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_bfloat16_gradient_and_what_its_sum_lost(instruction_set, vocab_size, generator):
    pair = rows(9, vocab_size, generator)
    pair.student[4, 0] = float("nan")
    ones = torch.ones(9)
    statistics = cpu.row_stats(pair, PLAIN, PLAIN, None, FORWARD_CE, instruction_set=instruction_set)
    arguments = pair, PLAIN, PLAIN, None, statistics, FORWARD_CE, ones, None
    exact, rounded = torch.empty_like(pair.student), torch.zeros(9, vocab_size, dtype=torch.bfloat16)
    assert cpu.row_grad(*arguments, exact, instruction_set=instruction_set) is None
    lost = cpu.row_grad(*arguments, rounded, instruction_set=instruction_set)
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)
    expected = (exact.double() - rounded.double()).sum(-1)
    torch.testing.assert_close(lost.double(), expected, rtol=1e-4, atol=1e-9, equal_nan=True)
    in_place = pair.student.view(torch.bfloat16)[:, :vocab_size]
    again = cpu.row_grad(*arguments, in_place, instruction_set=instruction_set)
    torch.testing.assert_close(again, lost, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(in_place, rounded, rtol=0, atol=0, equal_nan=True)
