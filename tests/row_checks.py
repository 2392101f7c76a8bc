"""Checks of one back end's row kernels, on logits chosen for their corners, against the float64 oracle.

Logits come as hidden states times an identity head, so that the oracle sees exactly the logits of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from types import ModuleType, SimpleNamespace

import torch

from distil_kernels.backends import (
    FORWARD_CE,
    NUM_STATISTICS,
    Cost,
    LogitPair,
    LogitScaling,
    LogitTransform,
    RowTerms,
    Statistic,
    TermWeight,
    reference,
)
from distil_kernels.engine.vocab_shards import EXCHANGED, OF_TOKEN, VocabShards
from distil_kernels.testing import Inputs, assert_within_budget, baselines, cost_by_definition, oracle
from distil_kernels.testing import logits as logits_of

NAMES = {
    "ce": Statistic.FORWARD_CE, "kl": Statistic.FORWARD_KL, "reverse_kl": Statistic.REVERSE_KL,
    "logprob": Statistic.LOGPROB, "teacher_logprob": Statistic.TEACHER_LOGPROB, "entropy": Statistic.ENTROPY,
    "teacher_entropy": Statistic.TEACHER_ENTROPY,
}  # fmt: skip


def make_logits(
    num_rows: int, vocab_size: int, generator: torch.Generator, kind: str = "ordinary", padding: int = 5
) -> LogitPair:
    """Rows of one memory with a padded stride, as the driver has them; padding holds NaN."""
    both = torch.full((2 * num_rows, vocab_size + padding), float("nan"))[:, :vocab_size]
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


COSTS = {
    "ce": Cost(Statistic.FORWARD_CE), "reverse_kl": Cost(Statistic.REVERSE_KL), "jsd": Cost(Statistic.JSD, 0.3),
    "entropy": Cost(Statistic.ENTROPY),
}  # fmt: skip


def expected(
    inputs: Inputs, cost: str, cost_weight: torch.Tensor, logprob_weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    found, costs = oracle(inputs), cost_by_definition(inputs, cost, COSTS[cost].jsd_weight)
    dtype = costs.dtype
    total = (cost_weight.to(dtype) * costs + logprob_weight.to(dtype) * found.logprob).sum()
    (gradient,) = torch.autograd.grad(total, inputs.student_hidden)
    rows = {name: getattr(found, name).detach() for name in NAMES}
    return rows | {cost: costs.detach(), "student_hidden": gradient}


def check(
    kernels: ModuleType,
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, inputs: Inputs, cost_weight: torch.Tensor,
    logprob_weight: torch.Tensor, cost: str = "ce",
) -> None:  # fmt: skip
    exact = expected(inputs.to(torch.float64), cost, cost_weight, logprob_weight)
    base = baselines(inputs, lambda copy: expected(copy, cost, cost_weight, logprob_weight))
    largest = max(float(each.abs().max()) for each in logits)
    statistics = kernels.row_stats(logits, student, teacher, inputs.tokens, COSTS[cost])
    for name, index in (NAMES | {cost: COSTS[cost].statistic}).items():
        assert_within_budget(name, statistics[index], base[name], exact[name], terms=largest)
    arguments = logits, student, teacher, inputs.tokens, statistics, COSTS[cost], cost_weight, logprob_weight
    out = torch.full_like(logits.student, float("nan"))
    kernels.row_grad(*arguments, out)
    # A logit of 1e4 is known to half an ulp, 5e-4, and a probability to a quarter of that: 4 eps times a tenth of the
    # logit. Entropy and divergences also weigh S with logits, whose rounding is of their size.
    terms = max(3.0, 0.1 * largest) if cost == "ce" else 3.0 * (1.0 + largest)
    assert_within_budget("gradient", out, base["student_hidden"], exact["student_hidden"], terms=terms)
    rounded = torch.full_like(logits.student, float("nan"), dtype=torch.bfloat16)
    lost = kernels.row_grad(*arguments, rounded)
    exact_lost = (out.double() - rounded.double()).sum(-1)
    if exact_lost.isfinite().all():
        torch.testing.assert_close(lost.double(), exact_lost, rtol=1e-4, atol=1e-6 * float(out.abs().sum(-1).max()))
    # An interpreter may cut off, and below the smallest normal number there are fewer digits.
    assert ((rounded - out).abs() <= 2**-7 * out.abs() + torch.finfo(torch.bfloat16).tiny).all()
    kernels.row_grad(*arguments, logits.student)  # in place
    assert torch.equal(logits.student, out)


def in_shards(kernels: ModuleType, *sizes: int, **options: object) -> SimpleNamespace:
    """The kernels for a vocabulary of which each process has a shard, all of them here one after the other."""
    borders = tuple(accumulate(sizes, initial=0))
    columns = [slice(*each) for each in pairwise(borders)]

    def shard(place: int) -> VocabShards:
        return VocabShards(None, place, borders, sizes, sequence_parallel=False)

    def part(transform: LogitTransform, place: slice) -> LogitTransform:
        bias = None if transform.bias is None else transform.bias[place].contiguous()
        return LogitTransform(bias, transform.softcap, transform.temperature)

    def of(place: int, logits: LogitPair, student: LogitTransform, teacher: LogitTransform) -> tuple:
        here = columns[place]
        return LogitPair(*(each[:, here] for each in logits)), part(student, here), part(teacher, here)

    def row_stats(logits, student, teacher, tokens, cost):
        local = [None if tokens is None else shard(place).local_ids(tokens) for place in range(len(sizes))]
        statistics = [
            kernels.row_stats(*of(place, logits, student, teacher), ids if ids is None else ids.clamp(min=0),
                              FORWARD_CE, **options)
            for place, ids in enumerate(local)
        ]  # fmt: skip

        class Here(VocabShards):
            def gather(self, _: torch.Tensor) -> torch.Tensor:
                sent = [*EXCHANGED, *(() if tokens is None else OF_TOKEN)]
                return torch.stack([each[sent] for each in statistics])

        merged = Here(None, 0, borders, sizes, sequence_parallel=False).merged(statistics[0], tokens)
        if cost.statistic == Statistic.JSD:
            mixtures = [merged.clone() for _ in sizes]
            for place, mixture in enumerate(mixtures):
                kernels.row_mixture(*of(place, logits, student, teacher), mixture, cost, **options)
            for statistic in (Statistic.JSD, Statistic.STUDENT_MIXTURE_KL):
                merged[statistic] = sum(each[statistic] for each in mixtures)
        return merged

    def row_grad(logits, student, teacher, tokens, statistics, cost, cost_weight, logprob_weight, out, terms=None):
        lost = []
        for place in range(len(sizes)):
            ids = None if tokens is None else shard(place).local_ids(tokens)
            lost.append(
                kernels.row_grad(
                    *of(place, logits, student, teacher), ids, statistics, cost, cost_weight, logprob_weight,
                    out[:, columns[place]], **options,
                )
            )  # fmt: skip
        return None if lost[0] is None else sum(lost)

    return SimpleNamespace(row_stats=row_stats, row_grad=row_grad)


def check_shards(kernels: ModuleType, generator: torch.Generator, *, is_slow: bool = False, **options: object) -> None:
    """Statistics and gradients of a vocabulary in shards of 64, 1 and 66; fewer of them where the kernels are slow."""
    sharded = in_shards(kernels, 64, 1, 66, **options)
    cases = [("ordinary", "jsd"), ("near", "ce"), ("peaked", "reverse_kl"), ("offset", "ce"), ("near", "jsd")]
    for kind, cost in cases[:2] if is_slow else cases:
        check_kinds(sharded, 131, kind, generator, cost=cost)
    if not is_slow:
        check_softcap_and_minus_infinity(sharded, generator)
    check_first_of_equal_maxima(in_shards(kernels, 1, 2, 4, **options))

    # In the student's likeliest shard both have the same likeliest token; the teacher's own is in another one.
    logits, plain = make_logits(1, 131, generator), LogitTransform(None, None, 1.0)
    logits.student[0, 3] = logits.teacher[0, 3] = 20.0
    assert sharded.row_stats(logits, plain, plain, None, FORWARD_CE)[Statistic.AGREE] == 1
    logits.teacher[0, 100] = 30.0
    assert sharded.row_stats(logits, plain, plain, None, FORWARD_CE)[Statistic.AGREE] == 0


def check_kinds(
    kernels: ModuleType,
    vocab_size: int,
    kind: str,
    generator: torch.Generator,
    padding: int = 5,
    cost: str = "ce",
) -> None:
    """Ordinary and difficult logits with everything that a kernel is asked for but the softcap."""
    logits = make_logits(3, vocab_size, generator, kind, padding)
    tokens = torch.randint(vocab_size, (3,), generator=generator)
    cost_weight, logprob_weight = torch.rand(2, 3, generator=generator) + 0.1
    bias = torch.randn(vocab_size, generator=generator)
    student, teacher = LogitTransform(bias, None, 0.7), LogitTransform(None, None, 1.3)
    inputs = as_inputs(logits, tokens, student_bias=bias, temperature=0.7, teacher_temperature=1.3,
                       teacher_bias=torch.zeros(vocab_size))  # fmt: skip
    check(kernels, logits, student, teacher, inputs, cost_weight, logprob_weight, cost)


def check_softcap_and_minus_infinity(kernels: ModuleType, generator: torch.Generator) -> None:
    """Columns that neither model may choose; a softcap on both sides of where tanh's polynomial ends."""
    logits = make_logits(3, 131, generator)
    logits.student[1] *= 40
    tokens = torch.tensor([2, 5, 130])
    bias = torch.zeros(131)
    bias[[0, 7, 60]] = float("-inf")
    cost_weight, logprob_weight = torch.rand(2, 3, generator=generator) + 0.1
    capped = as_inputs(logits, tokens, logit_softcap=20.0, temperature=0.7)
    plain = as_inputs(logits, tokens, student_bias=bias, teacher_bias=bias)
    scaled = as_inputs(logits, tokens, logit_softcap=20.0, temperature=0.7, student_logit_scale=3.0,
                       teacher_logit_softcap=math.inf, teacher_logit_scale=0.5)  # fmt: skip
    student, teacher = LogitScaling(0.7, 20.0, 3.0).transform(None), LogitScaling(0.7, None, 0.5).transform(None)
    copy = LogitPair(logits.student.clone(), logits.teacher.clone())
    check(kernels, copy, student, teacher, scaled, cost_weight, logprob_weight)
    transform = LogitTransform(None, 20.0, 0.7)
    copy = LogitPair(logits.student.clone(), logits.teacher.clone())
    check(kernels, copy, transform, transform, capped, cost_weight, logprob_weight)
    transform = LogitTransform(bias, None, 1.0)
    check(kernels, logits, transform, transform, plain, cost_weight, logprob_weight)


def check_small_divergences(kernels: ModuleType, generator: torch.Generator, **options: object) -> None:
    """Divergences of about 1e-9 in rows that are flat, peaked, and have an entry that neither model may choose."""
    logits = make_logits(24, 1100, generator)
    logits.student[8:16] *= 8
    logits.teacher.copy_(logits.student + 5e-5 * torch.randn(24, 1100, generator=generator))
    logits.student[16:, 7] = logits.teacher[16:, 7] = float("-inf")
    logits.teacher[16:, 8] = -200.0  # no mass, and far from the student's
    logits.student[16:, 8] = -150.0
    plain = LogitTransform(None, None, 1.0)
    ours = kernels.row_stats(logits, plain, plain, None, FORWARD_CE, **options)
    s, t = (each.double().log_softmax(-1).clamp(min=-1e300) for each in logits)
    for statistic, p, q in ((Statistic.FORWARD_KL, t, s), (Statistic.REVERSE_KL, s, t)):
        exact = (p.exp() * (p - q)).sum(-1)
        assert (ours[statistic] >= 0).all() and exact.median() < 2e-9
        assert ((ours[statistic] - exact) / exact).abs().mean() < 1e-2
    same = kernels.row_stats(
        LogitPair(logits.student, logits.student.clone()), plain, plain, None, FORWARD_CE, **options
    )
    assert same[Statistic.FORWARD_KL].eq(0).all() and same[Statistic.REVERSE_KL].eq(0).all()


def check_equal_models(kernels: ModuleType, generator: torch.Generator) -> None:
    """Divergences of rows that are the same are 0, not rounding, also behind a scale and a softcap."""
    for kind in ("ordinary", "peaked", "offset"):
        student = make_logits(3, 4099, generator, kind).student
        for scaling in (LogitScaling(), LogitScaling(0.7, 20.0, 3.0)):
            transform = scaling.transform(torch.randn(4099, generator=generator))
            found = kernels.row_stats(LogitPair(student, student.clone()), transform, transform, None, FORWARD_CE)
            assert not found[Statistic.FORWARD_KL].any() and not found[Statistic.REVERSE_KL].any()


def check_blocks(kernels: ModuleType, generator: torch.Generator) -> None:
    """4099 columns: two Triton programs per row, the second with three; the largest logit is on either side."""
    logits = make_logits(2, 4099, generator)
    logits.student[0, 4098] = logits.teacher[0, 4098] = 9.0
    logits.student[1, 3], logits.teacher[1, 4097] = 9.0, 9.0
    plain, tokens = LogitTransform(None, None, 1.0), torch.tensor([4098, 4095])
    statistics = kernels.row_stats(logits, plain, plain, tokens, FORWARD_CE)
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


def check_small_terms_after_large_ones(
    kernels: ModuleType, large_in_student: torch.Tensor, large_in_teacher: torch.Tensor, **options: object
) -> None:
    """A lane that begins with 1 (gap: 20) may round 64 times; what follows is 5e-8 (1e-6), about half of its ulp."""
    student = torch.where(large_in_student, 0.0, math.log(5e-8))[None]
    teacher = torch.where(large_in_teacher, 0.0, student - 20.0)
    pair, plain = LogitPair(student, teacher), LogitTransform(None, None, 1.0)
    exact = reference.row_stats(LogitPair(*(x.double() for x in pair)), plain, plain, None, FORWARD_CE)
    ours = kernels.row_stats(pair, plain, plain, None, FORWARD_CE, **options)
    error = float((ours[Statistic.REVERSE_KL] - exact[Statistic.REVERSE_KL]).abs())
    assert error <= 64 * (20 * 2**-24 + 2**-20), error  # half an ulp of 1 counts 20 times


def check_first_of_equal_maxima(kernels: ModuleType) -> None:
    """The same largest value several times over two blocks; torch and the CPU kernels take the first."""
    logits = LogitPair(torch.zeros(2, 4099), torch.zeros(2, 4099))
    logits.student[:, [5, 9, 4098]] = 1.0
    logits.teacher[0, [5, 4098]] = 1.0
    logits.teacher[1, [4, 4098]] = 1.0
    plain = LogitTransform(None, None, 1.0)
    statistics = kernels.row_stats(logits, plain, plain, None, FORWARD_CE)
    assert statistics[Statistic.AGREE].tolist() == [1.0, 0.0]
    assert statistics[Statistic.LOGPROB].tolist() == [0.0, 0.0]


def check_unused_rows_and_nan(kernels: ModuleType, generator: torch.Generator) -> None:
    """A row without weight is zero whatever it holds, and NaN stays in its row."""
    logits = make_logits(3, 131, generator)
    logits.student[0] = float("nan")
    logits.student[1, 7] = float("nan")
    plain, tokens = LogitTransform(None, None, 1.0), torch.tensor([1, 2, 3])
    statistics = kernels.row_stats(logits, plain, plain, tokens, FORWARD_CE)
    assert statistics[Statistic.FORWARD_CE].isnan().tolist() == [True, True, False]
    out = torch.empty_like(logits.student)
    weights = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    kernels.row_grad(logits, plain, plain, tokens, statistics, FORWARD_CE, *weights, out)
    assert out[0].eq(0).all() and out[1].isnan().any() and out[2].isfinite().all()


def check_tokens_outside(kernels: ModuleType, generator: torch.Generator) -> None:
    """A token outside the vocabulary gets NaN and reads nothing."""
    logits = make_logits(3, 7, generator)
    plain = LogitTransform(None, None, 1.0)
    statistics = kernels.row_stats(logits, plain, plain, torch.tensor([-1, 7, 6]), FORWARD_CE)
    assert statistics[Statistic.LOGPROB].isnan().tolist() == [True, True, False]
    assert statistics[Statistic.FORWARD_CE].isfinite().all()


def check_no_rows(kernels: ModuleType) -> None:
    plain, logits = LogitTransform(None, None, 1.0), LogitPair(torch.empty(0, 7), torch.empty(0, 7))
    statistics = kernels.row_stats(logits, plain, plain, torch.empty(0, dtype=torch.int64), FORWARD_CE)
    assert statistics.shape == (NUM_STATISTICS, 0)
    kernels.row_grad(logits, plain, plain, None, statistics, FORWARD_CE, torch.empty(0), None, torch.empty(0, 7))


def check_terms(kernels: ModuleType, generator: torch.Generator, cost: str, softcap: float | None = None,
                vocab_size: int = 131, **options: object) -> None:  # fmt: skip
    """What other terms add to the gradient; where the cost has no weight it may be NaN, and without any weight all may.

    The rows: everything; no label, and no credit; no cost, and a teacher of NaN; nothing, and logits of NaN.
    """
    logits, bias = make_logits(4, vocab_size, generator), torch.randn(vocab_size, generator=generator)
    tokens, labels = torch.randint(vocab_size, (2, 4), generator=generator)
    labels[1] = -100
    cost_weight, logprob_weight = torch.randn(2, 4, generator=generator)
    weights = torch.randn(4, 4, generator=generator)
    cost_weight[2:], logprob_weight[[1, 3]], weights[:, 3], weights[TermWeight.LABEL, 1] = 0.0, 0.0, 0.0, 0.0
    student, teacher = LogitTransform(bias, softcap, 0.7), LogitTransform(None, None, 1.3)
    inputs = as_inputs(logits, tokens, student_bias=bias, temperature=0.7, teacher_temperature=1.3,
                       logit_softcap=softcap, teacher_logit_softcap=math.inf,
                       teacher_bias=torch.zeros(vocab_size))  # fmt: skip

    def definition(copy: Inputs) -> dict[str, torch.Tensor]:
        (s, _), found = logits_of(copy), oracle(copy)
        costs = cost_by_definition(copy, cost, COSTS[cost].jsd_weight)
        of_s, of_log, of_one, of_label = weights.to(s.dtype)
        # Of which the gradients are S, S log S, 1 and onehot(label).
        student_log = -found.entropy - found.entropy.detach() * found.lse
        label = s.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        total = cost_weight.to(s.dtype) * costs + logprob_weight.to(s.dtype) * found.logprob
        total = total + of_s * found.lse + of_log * student_log + of_one * s.sum(-1) + of_label * label
        return {"gradient": torch.autograd.grad(total.sum(), copy.student_hidden)[0]}

    exact, base = definition(inputs.to(torch.float64)), baselines_without_order(inputs, definition)
    logits.teacher[2:], logits.student[3] = float("nan"), float("nan")
    statistics = kernels.row_stats(logits, student, teacher, tokens, COSTS[cost], **options)
    terms, out = RowTerms(weights, labels), torch.full_like(logits.student, float("nan"))
    arguments = logits, student, teacher, tokens, statistics, COSTS[cost], cost_weight, logprob_weight
    kernels.row_grad(*arguments, out, terms=terms, **options)
    assert_within_budget("gradient", out, base["gradient"], exact["gradient"], terms=20.0)
    assert out[3].eq(0).all()
    rounded = torch.full_like(out, float("nan"), dtype=torch.bfloat16)
    lost = kernels.row_grad(*arguments, rounded, terms=terms, **options)
    assert lost is not None
    torch.testing.assert_close(lost, (out - rounded).sum(-1), rtol=1e-3, atol=1e-5)
    kernels.row_grad(*arguments, out, terms=RowTerms(weights.clone().zero_(), None), **options)
    without = torch.full_like(out, float("nan"))
    kernels.row_grad(*arguments, without, **options)
    torch.testing.assert_close(out[:2], without[:2], rtol=1e-6, atol=1e-7)


def baselines_without_order(inputs: Inputs, definition: Callable[[Inputs], dict[str, torch.Tensor]]):
    """The baseline in the vocabulary's own order: labels do not move with it."""
    return {name: [value] for name, value in definition(inputs.to(torch.float32)).items()}
