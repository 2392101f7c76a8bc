"""The Triton kernels of back end `triton`; the launches are in `triton.py`. Not yet run on a GPU.

    row_partials    logits [R, V] -> partials [R, splits, 10]      a program takes one block of one row
    head_partials   hidden, weights -> partials                    a program takes a tile of rows and a split of the
                                                                   vocabulary; logits live in registers only
    merge_partials  partials -> statistics [14, R]                 a program takes a row; float64, one log per model
    mixture_partials  logits, statistics -> [2, R, splits]         a block's share of KL(S || M) and KL(T || M)
    row_grad        logits, statistics, weights -> d raw logits    elementwise, a program takes one block of one row

A partial holds, relative to the block's own maxima, the six sums of csrc/row_math.h in its order (student, teacher,
student_log, teacher_log, student_gap, teacher_gap), then the two maxima and the two first indices of them (int32 bits
in float32 words). Gaps are summed as gaps: KL of two nearly equal models would be lost in ce - entropy.

Memory beyond inputs and outputs: 40 bytes per partial, 0.12 % of float32 logits at blocks of 4096.
Left out: one pass that keeps a row in shared memory over several programs (Triton has no clusters; back end `cuda`
has it), and an exponential better than the hardware's (2 ulp plus the rounding of its argument).
"""

from __future__ import annotations

import triton
import triton.language as tl

NUM_PARTIALS = 10

# As in csrc/row_math.h: FLOOR replaces minus infinity among shifted logits, LOWEST begins a running maximum.
FLOOR = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-3.402823466e38)
NO_INDEX = tl.constexpr(2**31 - 1)
TINY = tl.constexpr(1e-37)

# Statistics that can be the cost and whose gradient is not S - T.
REVERSE_KL = tl.constexpr(2)
ENTROPY = tl.constexpr(5)
JSD = tl.constexpr(12)
STUDENT_MIXTURE_KL = tl.constexpr(13)


@triton.jit
def _tanh(x):
    """Computes tanh within 3 ulp: an odd polynomial near 0, where 1 - e^(-2|x|) would cancel, else the exponential."""
    square = x * x
    p = -8.18274232e-3 + 2.14760194e-3 * square
    p = p * square + 2.17029937e-2
    p = p * square - 5.39472089e-2
    p = p * square + 1.33332098e-1
    p = p * square - 3.33333309e-1
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * p, tl.where(x < 0, -far, far))


@triton.jit
def _log1p(x):
    """Computes log(1 + x) for x > -1: near 0 as 2 atanh(x / (2 + x)), since 1 + x has lost digits of x."""
    z = x / (2.0 + x)
    square = z * z
    p = 1.11111111e-1 * square + 1.42857143e-1
    p = p * square + 2.0e-1
    p = p * square + 3.33333333e-1
    return tl.where((x > -0.29) & (x < 0.41), 2.0 * z * (1.0 + square * p), tl.log(1.0 + x))


@triton.jit
def _mixture_excess(p, q, weight):
    """Computes M / P - 1 of a mixture M, as in csrc/row_math.h."""
    tiny = p < TINY
    return tl.where(tiny, 0.0, weight * (q - p) / tl.where(tiny, 1.0, p))


@triton.jit
def _logit(raw_plus_bias, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    if HAS_SOFTCAP:
        value = softcap * _tanh(raw_plus_bias / softcap) * inverse_temperature
    else:
        value = raw_plus_bias * inverse_temperature
    return value


@triton.jit
def _floored(x):
    """Computes max(x, FLOOR), with NaN kept."""
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def _load_logits(
    row_ptr, bias_ptr, columns, inside, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Loads the transformed logits of some columns of one row, -inf outside the vocabulary."""
    raw = tl.load(row_ptr + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    return tl.where(inside, _logit(raw, softcap, inverse_temperature, HAS_SOFTCAP), float("-inf"))


@triton.jit
def row_partials(
    student_ptr, teacher_ptr, student_stride, teacher_stride, student_bias_ptr, teacher_bias_ptr,
    student_softcap, teacher_softcap, student_inverse_temperature, teacher_inverse_temperature,
    tokens_ptr, token_logits_ptr, partials_ptr, num_rows, vocab_size, num_splits,
    HAS_STUDENT_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr,
    HAS_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    columns = split * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    student = _load_logits(
        student_ptr + row * student_stride, student_bias_ptr, columns, inside, student_softcap,
        student_inverse_temperature, HAS_STUDENT_BIAS, HAS_STUDENT_SOFTCAP,
    )  # fmt: skip
    teacher = _load_logits(
        teacher_ptr + row * teacher_stride, teacher_bias_ptr, columns, inside, teacher_softcap,
        teacher_inverse_temperature, HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP,
    )  # fmt: skip
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + row)
        here = columns == token
        if (token >= split * BLOCK) & (token < tl.minimum(split * BLOCK + BLOCK, vocab_size)):
            tl.store(token_logits_ptr + row, tl.sum(tl.where(here, student, 0.0)))
            tl.store(token_logits_ptr + num_rows + row, tl.sum(tl.where(here, teacher, 0.0)))

    # Columns outside lose every tie for the maximum: they lie to the right.
    student_max, student_index = tl.max(tl.where(student < LOWEST, LOWEST, student), axis=0, return_indices=True)
    teacher_max, teacher_index = tl.max(tl.where(teacher < LOWEST, LOWEST, teacher), axis=0, return_indices=True)
    s, t = _floored(student - student_max), _floored(teacher - teacher_max)
    p, q, gap = tl.exp(s), tl.exp(t), t - s
    out = partials_ptr + (row * num_splits + split) * 10
    tl.store(out + 0, tl.sum(p))
    tl.store(out + 1, tl.sum(q))
    tl.store(out + 2, tl.sum(p * s))
    tl.store(out + 3, tl.sum(q * t))
    tl.store(out + 4, tl.sum(-p * gap))
    tl.store(out + 5, tl.sum(q * gap))
    tl.store(out + 6, student_max)
    tl.store(out + 7, teacher_max)
    tl.store(out + 8, (split * BLOCK + student_index).to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(out + 9, (split * BLOCK + teacher_index).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _first_index(indices_ptr, maxima, maximum, splits, inside):
    """Returns the first index at which a row reaches its maximum."""
    index = tl.load(indices_ptr + splits * 10, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return tl.min(tl.where(inside & (maxima == maximum), index, NO_INDEX))


@triton.jit
def merge_partials(
    partials_ptr, token_logits_ptr, statistics_ptr, num_rows, num_splits,
    HAS_TOKENS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    inside = splits < num_splits
    base = partials_ptr + row * num_splits * 10
    student = tl.load(base + splits * 10, mask=inside, other=0.0).to(tl.float64)
    teacher = tl.load(base + splits * 10 + 1, mask=inside, other=0.0).to(tl.float64)
    student_log = tl.load(base + splits * 10 + 2, mask=inside, other=0.0).to(tl.float64)
    teacher_log = tl.load(base + splits * 10 + 3, mask=inside, other=0.0).to(tl.float64)
    student_gap = tl.load(base + splits * 10 + 4, mask=inside, other=0.0).to(tl.float64)
    teacher_gap = tl.load(base + splits * 10 + 5, mask=inside, other=0.0).to(tl.float64)
    student_maxima = tl.load(base + splits * 10 + 6, mask=inside, other=LOWEST)
    teacher_maxima = tl.load(base + splits * 10 + 7, mask=inside, other=LOWEST)
    student_max, teacher_max = tl.max(student_maxima), tl.max(teacher_maxima)
    student_index = _first_index(base + 8, student_maxima, student_max, splits, inside)
    teacher_index = _first_index(base + 9, teacher_maxima, teacher_max, splits, inside)

    # shift_sums of row_math.h: every block to the row's maxima.
    student_shift = _floored(student_maxima.to(tl.float64) - student_max)
    teacher_shift = _floored(teacher_maxima.to(tl.float64) - teacher_max)
    p, q, gap = tl.exp(student_shift), tl.exp(teacher_shift), teacher_shift - student_shift
    student_log = tl.sum(p * (student_log + student_shift * student))
    teacher_log = tl.sum(q * (teacher_log + teacher_shift * teacher))
    student_gap = tl.sum(p * (student_gap - gap * student))
    teacher_gap = tl.sum(q * (teacher_gap + gap * teacher))
    student, teacher = tl.sum(p * student), tl.sum(q * teacher)

    # finish of row_math.h.
    log_s, log_t = tl.log(student), tl.log(teacher)
    forward_kl = teacher_gap / teacher + (log_s - log_t)
    teacher_entropy = log_t - teacher_log / teacher
    out = statistics_ptr + row
    tl.store(out, (forward_kl + teacher_entropy).to(tl.float32))
    tl.store(out + num_rows, forward_kl.to(tl.float32))
    tl.store(out + 2 * num_rows, (student_gap / student + (log_t - log_s)).to(tl.float32))
    logprob, teacher_logprob = log_s * 0.0, log_t * 0.0
    if HAS_TOKENS:
        logprob = tl.load(token_logits_ptr + row).to(tl.float64) - student_max - log_s
        teacher_logprob = tl.load(token_logits_ptr + num_rows + row).to(tl.float64) - teacher_max - log_t
    tl.store(out + 3 * num_rows, logprob.to(tl.float32))
    tl.store(out + 4 * num_rows, teacher_logprob.to(tl.float32))
    tl.store(out + 5 * num_rows, (log_s - student_log / student).to(tl.float32))
    tl.store(out + 6 * num_rows, teacher_entropy.to(tl.float32))
    tl.store(out + 7 * num_rows, (student_index == teacher_index).to(tl.float32))
    tl.store(out + 8 * num_rows, student_max)
    tl.store(out + 9 * num_rows, log_s.to(tl.float32))
    tl.store(out + 10 * num_rows, teacher_max)
    tl.store(out + 11 * num_rows, log_t.to(tl.float32))
    tl.store(out + 12 * num_rows, 0.0)
    tl.store(out + 13 * num_rows, 0.0)


@triton.jit
def mixture_partials(
    student_ptr, teacher_ptr, student_stride, teacher_stride, student_bias_ptr, teacher_bias_ptr,
    student_softcap, teacher_softcap, student_inverse_temperature, teacher_inverse_temperature,
    statistics_ptr, partials_ptr, partials_stride, jsd_weight, num_rows, vocab_size, num_splits,
    HAS_STUDENT_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    columns = split * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    student = _load_logits(
        student_ptr + row * student_stride, student_bias_ptr, columns, inside, student_softcap,
        student_inverse_temperature, HAS_STUDENT_BIAS, HAS_STUDENT_SOFTCAP,
    )  # fmt: skip
    teacher = _load_logits(
        teacher_ptr + row * teacher_stride, teacher_bias_ptr, columns, inside, teacher_softcap,
        teacher_inverse_temperature, HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP,
    )  # fmt: skip
    s = _floored(student - tl.load(statistics_ptr + 8 * num_rows + row))
    t = _floored(teacher - tl.load(statistics_ptr + 10 * num_rows + row))
    p = tl.exp(s - tl.load(statistics_ptr + 9 * num_rows + row))
    q = tl.exp(t - tl.load(statistics_ptr + 11 * num_rows + row))
    student_share = 1.0 - jsd_weight
    out = partials_ptr + row * num_splits + split
    tl.store(out, tl.sum(jsd_weight * (q - p) - p * _log1p(_mixture_excess(p, q, jsd_weight))))
    tl.store(out + partials_stride, tl.sum(student_share * (p - q) - q * _log1p(_mixture_excess(q, p, student_share))))


@triton.jit
def row_grad(
    student_ptr, teacher_ptr, student_stride, teacher_stride, student_bias_ptr, teacher_bias_ptr,
    student_softcap, teacher_softcap, student_inverse_temperature, teacher_inverse_temperature,
    tokens_ptr, statistics_ptr, cost_weight_ptr, logprob_weight_ptr, terms_ptr, labels_ptr, jsd_weight, out_ptr,
    out_stride, residual_ptr, num_rows, vocab_size, num_splits,
    HAS_STUDENT_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr,
    HAS_LOGPROB: tl.constexpr, HAS_TERMS: tl.constexpr, HAS_LABELS: tl.constexpr, ROUNDS: tl.constexpr,
    COST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    columns = (tl.program_id(0) % num_splits) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    cost_weight = tl.load(cost_weight_ptr + row)
    weight_size = tl.zeros([BLOCK], tl.float32) + tl.abs(cost_weight)
    if HAS_LOGPROB:
        logprob_weight = tl.load(logprob_weight_ptr + row)
        weight_size += tl.abs(logprob_weight)
    if HAS_TERMS:  # in the order of TermWeight
        student_weight, student_log_weight = tl.load(terms_ptr + row), tl.load(terms_ptr + num_rows + row)
        uniform_weight = tl.load(terms_ptr + 2 * num_rows + row)
        label_weight = tl.load(terms_ptr + 3 * num_rows + row)
        weight_size += tl.abs(student_weight) + tl.abs(student_log_weight)
        weight_size += tl.abs(uniform_weight) + tl.abs(label_weight)

    # A row whose weights are 0 is not read: it may hold anything.
    used = weight_size != 0
    read = inside & used
    raw = tl.load(student_ptr + row * student_stride + columns, mask=read, other=0.0)
    if HAS_STUDENT_BIAS:
        raw += tl.load(student_bias_ptr + columns, mask=read, other=0.0)
    derivative = student_inverse_temperature
    if HAS_STUDENT_SOFTCAP:
        y = _tanh(raw / student_softcap)
        student = student_softcap * y * student_inverse_temperature
        derivative = (1.0 - y * y) * student_inverse_temperature
    else:
        student = raw * student_inverse_temperature
    teacher = _load_logits(
        teacher_ptr + row * teacher_stride, teacher_bias_ptr, columns, read, teacher_softcap,
        teacher_inverse_temperature, HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP,
    )  # fmt: skip
    s = _floored(student - tl.load(statistics_ptr + 8 * num_rows + row))
    t = _floored(teacher - tl.load(statistics_ptr + 10 * num_rows + row))
    log_normalizer = tl.load(statistics_ptr + 9 * num_rows + row)
    teacher_log_normalizer = tl.load(statistics_ptr + 11 * num_rows + row)
    p = tl.exp(s - log_normalizer)
    q = tl.exp(t - teacher_log_normalizer)
    if COST == REVERSE_KL:
        ratio = (s - t) - (log_normalizer - teacher_log_normalizer)
        grad = cost_weight * p * (ratio - tl.load(statistics_ptr + REVERSE_KL * num_rows + row))
    elif COST == JSD:
        ratio = -_log1p(_mixture_excess(p, q, jsd_weight))
        mean = tl.load(statistics_ptr + STUDENT_MIXTURE_KL * num_rows + row)
        grad = cost_weight * (1.0 - jsd_weight) * p * (ratio - mean)
    elif COST == ENTROPY:
        grad = -cost_weight * p * (s - log_normalizer + tl.load(statistics_ptr + ENTROPY * num_rows + row))
    else:
        grad = cost_weight * (p - q)
    if HAS_TERMS:
        grad = tl.where(cost_weight == 0, 0.0, grad)  # a cost of weight 0 may be anything
        grad += p * (student_log_weight * (s - log_normalizer) + student_weight) + uniform_weight
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)  # no column where there is none
        grad += tl.where(columns == label, label_weight, 0.0)
    if HAS_LOGPROB:
        grad -= logprob_weight * p
        grad += tl.where(columns == tl.load(tokens_ptr + row), logprob_weight, 0.0)
    grad = tl.where(used, grad * derivative, 0.0)
    rounded = grad.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, rounded, mask=inside)
    if ROUNDS:
        residual = tl.sum(tl.where(inside, grad - rounded.to(tl.float32), 0.0))
        tl.store(residual_ptr + tl.program_id(0), residual)


@triton.jit
def _tile_logits(
    hidden_ptr, weight_ptr, bias_ptr, hidden_stride, weight_stride, rows, columns, rows_inside, columns_inside,
    hidden_size, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Computes the transformed logits [ROWS, COLUMNS] of one tile, -inf outside the vocabulary."""
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, hidden_size, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        depth_inside = depth < hidden_size
        hidden = tl.load(
            hidden_ptr + rows[:, None].to(tl.int64) * hidden_stride + depth[None, :],
            mask=rows_inside[:, None] & depth_inside[None, :], other=0.0,
        )  # fmt: skip
        weight = tl.load(
            weight_ptr + columns[None, :].to(tl.int64) * weight_stride + depth[:, None],
            mask=columns_inside[None, :] & depth_inside[:, None], other=0.0,
        )  # fmt: skip
        if WIDEN:
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        logits = tl.dot(hidden, weight, logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias_ptr + columns, mask=columns_inside, other=0.0)[None, :]
    logits = _logit(logits, softcap, inverse_temperature, HAS_SOFTCAP)
    return tl.where(columns_inside[None, :], logits, float("-inf"))


@triton.jit
def head_partials(
    student_hidden_ptr, student_weight_ptr, teacher_hidden_ptr, teacher_weight_ptr,
    student_hidden_stride, student_weight_stride, teacher_hidden_stride, teacher_weight_stride,
    student_bias_ptr, teacher_bias_ptr,
    student_softcap, teacher_softcap, student_inverse_temperature, teacher_inverse_temperature,
    tokens_ptr, token_logits_ptr, partials_ptr,
    num_rows, vocab_size, num_splits, split_size, student_hidden_size, teacher_hidden_size,
    HAS_STUDENT_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr,
    HAS_TOKENS: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a split of the weights, which then comes from the second-level cache.
    num_tiles = tl.cdiv(num_rows, ROWS)
    rows = (tl.program_id(0) % num_tiles) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(0) // num_tiles
    rows_inside = rows < num_rows
    begin, end = split * split_size, tl.minimum((split + 1) * split_size, vocab_size)
    zeros = tl.zeros([ROWS], tl.float32)
    student_sum, student_log, student_gap = zeros, zeros, zeros
    teacher_sum, teacher_log, teacher_gap = zeros, zeros, zeros
    student_max, teacher_max = zeros + LOWEST, zeros + LOWEST
    student_index, teacher_index = tl.zeros([ROWS], tl.int32) + begin, tl.zeros([ROWS], tl.int32) + begin
    student_token, teacher_token = zeros, zeros
    token = tl.zeros([ROWS], tl.int64) - 1
    if HAS_TOKENS:
        token = tl.load(tokens_ptr + rows, mask=rows_inside, other=-1)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        columns_inside = columns < end
        student = _tile_logits(
            student_hidden_ptr, student_weight_ptr, student_bias_ptr, student_hidden_stride, student_weight_stride,
            rows, columns, rows_inside, columns_inside, student_hidden_size, student_softcap,
            student_inverse_temperature, HAS_STUDENT_BIAS, HAS_STUDENT_SOFTCAP, WIDEN, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        teacher = _tile_logits(
            teacher_hidden_ptr, teacher_weight_ptr, teacher_bias_ptr, teacher_hidden_stride, teacher_weight_stride,
            rows, columns, rows_inside, columns_inside, teacher_hidden_size, teacher_softcap,
            teacher_inverse_temperature, HAS_TEACHER_BIAS, HAS_TEACHER_SOFTCAP, WIDEN, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        if HAS_TOKENS:
            here = columns[None, :] == token[:, None]
            student_token += tl.sum(tl.where(here, student, 0.0), axis=1)
            teacher_token += tl.sum(tl.where(here, teacher, 0.0), axis=1)
        student_tile, student_where = tl.max(tl.where(student < LOWEST, LOWEST, student), axis=1, return_indices=True)
        teacher_tile, teacher_where = tl.max(tl.where(teacher < LOWEST, LOWEST, teacher), axis=1, return_indices=True)
        student_index = tl.where(student_tile > student_max, first + student_where, student_index)
        teacher_index = tl.where(teacher_tile > teacher_max, first + teacher_where, teacher_index)
        student_tile, teacher_tile = tl.maximum(student_max, student_tile), tl.maximum(teacher_max, teacher_tile)

        # shift_sums of row_math.h, then the terms of this tile.
        student_shift, teacher_shift = _floored(student_max - student_tile), _floored(teacher_max - teacher_tile)
        p, q, gap = tl.exp(student_shift), tl.exp(teacher_shift), teacher_shift - student_shift
        student_log = p * (student_log + student_shift * student_sum)
        teacher_log = q * (teacher_log + teacher_shift * teacher_sum)
        student_gap = p * (student_gap - gap * student_sum)
        teacher_gap = q * (teacher_gap + gap * teacher_sum)
        student_sum, teacher_sum = p * student_sum, q * teacher_sum
        student_max, teacher_max = student_tile, teacher_tile
        s, t = _floored(student - student_max[:, None]), _floored(teacher - teacher_max[:, None])
        p, q, gap = tl.exp(s), tl.exp(t), t - s
        student_sum += tl.sum(p, axis=1)
        teacher_sum += tl.sum(q, axis=1)
        student_log += tl.sum(p * s, axis=1)
        teacher_log += tl.sum(q * t, axis=1)
        student_gap -= tl.sum(p * gap, axis=1)
        teacher_gap += tl.sum(q * gap, axis=1)

    if HAS_TOKENS:
        here = rows_inside & (token >= begin) & (token < end)
        tl.store(token_logits_ptr + rows, student_token, mask=here)
        tl.store(token_logits_ptr + num_rows + rows, teacher_token, mask=here)
    out = partials_ptr + (rows.to(tl.int64) * num_splits + split) * 10
    tl.store(out + 0, student_sum, mask=rows_inside)
    tl.store(out + 1, teacher_sum, mask=rows_inside)
    tl.store(out + 2, student_log, mask=rows_inside)
    tl.store(out + 3, teacher_log, mask=rows_inside)
    tl.store(out + 4, student_gap, mask=rows_inside)
    tl.store(out + 5, teacher_gap, mask=rows_inside)
    tl.store(out + 6, student_max, mask=rows_inside)
    tl.store(out + 7, teacher_max, mask=rows_inside)
    tl.store(out + 8, student_index.to(tl.float32, bitcast=True), mask=rows_inside)
    tl.store(out + 9, teacher_index.to(tl.float32, bitcast=True), mask=rows_inside)
