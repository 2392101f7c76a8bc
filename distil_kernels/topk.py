"""Forward cross-entropy to a teacher of which only some tokens' log-probs are known: a remote expert, a saved file.

    CE = - sum_k p_k log S_k  -  p_tail log S_tail,       p_tail = 1 - sum_k p_k,   S_tail = sum of S over other tokens

All that the teacher did not name is one bucket, so no mass is lost and nothing is claimed about its inside. With
P = sum_k p_k + p_tail (1 but for rounding) and s the student's logits

    dCE / ds_k = P S_k - p_k         dCE / ds_v = (P S_tail - p_tail) S_v / S_tail       (v in the tail)

The tail has a logsumexp of its own: 1 - sum_k S_k would be rounding where the student is sure. Rows go in chunks whose
gradients are formed at once, as in `driver` (plan gradient_in_forward, or frozen_head). The arithmetic of a row is
plain torch on every device: three passes over a chunk of logits. The gradient is linear in S,

    w dCE / ds + a dlog S[y] / ds  =  (w P - a) S - w p + a [y]         (p_tail shared out as S is within the tail)

so that the sequence-level loss adds no pass to it; but its a_t need every row's cross-entropy first, and so
`fused_topk_distil_loss` forms the logits twice (4 products of 2NVD FLOP, `fused_topk_ce` 3). Left out: a loss per token
with its own gradient, other back ends, and torch.compile of `fused_topk_distil_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from distil_kernels.backends import reference
from distil_kernels.distil import DistilLoss
from distil_kernels.engine import custom_ops, memory
from distil_kernels.engine.backward import scaled_gradients
from distil_kernels.engine.call import as_autocast
from distil_kernels.engine.checks import Door, check_tokens, sequence_lengths
from distil_kernels.engine.credit import Credit, CreditScan, reverse_chunks
from distil_kernels.engine.driver import plain_chunks
from distil_kernels.engine.gemm import accumulation_dtype, lm_head
from distil_kernels.engine.gradients import GradientSums, Needs, Rows
from distil_kernels.engine.plan import Shape, choose_chunk_rows, choose_ring_rows
from distil_kernels.token_statistics import TokenStats

# ruff: noqa: UP045  (torch reads the annotations of a custom op and knows Optional[Tensor])

_MOST_MASS = 1 + 1e-3
"""Log-probs of an API are rounded: their sum may pass 1 by this much, and then the tail is empty."""


class _Student(NamedTuple):
    bias: Tensor | None  # [V] in the accumulation dtype
    temperature: float
    softcap: float | None

    def logits(self, raw: Tensor) -> tuple[Tensor, Tensor | float]:
        """[R, V] after bias, softcap and temperature (new memory), and their derivative by `raw`."""
        biased = raw if self.bias is None else raw + self.bias
        if self.softcap is None:
            return biased / self.temperature, 1.0 / self.temperature
        capped = (biased / self.softcap).tanh()
        return capped * (self.softcap / self.temperature), (1.0 - capped.square()) / self.temperature


def fused_topk_ce(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    student_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Forward cross-entropy to the K tokens that a teacher named, and to one bucket of all others.

    Args:
        student_hidden: [..., D] last hidden states; float32, bfloat16, float16 or float64.
        student_weight: [V, D] lm_head, same dtype.
        teacher_ids: [..., K] int64, different tokens of the student's vocabulary; -1 where fewer are known.
        teacher_logprobs: [..., K] float, their natural log-probs under the teacher (what stands beside -1 is not read).
            Samples of a black box are such a distribution too: each token's share.
        student_bias: [V].
        token_mask: [...] bool, True counts. Other rows are not read: they may hold anything.
        token_weight: [...] float, multiplies each token's cross-entropy. It gets no gradient.
        temperature, logit_softcap: of the student, as in `fused_forward_ce`; the teacher's log-probs stay as they are.
        reduction: "sum" the weighted sum; "mean" the weighted sum over `normalizer`.
        normalizer: denominator of "mean"; default the sum of counted weights (1 where that is 0).

    Returns:
        [] float32 (float64 for float64 inputs), with gradients for hidden states, weight and bias.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. What stands in ids and log-probs is looked
            at on the CPU only: on a GPU it would cost a synchronisation.
    """
    door = Door("fused_topk_ce")
    student_hidden, student_weight = as_autocast(student_hidden, student_weight)
    door.one_of("reduction", reduction, ("mean", "sum"))
    door.positive("temperature", temperature, optional=False)
    door.positive("logit_softcap", logit_softcap)
    if normalizer is not None and reduction != "mean":
        door.value_error(f"normalizer is given with reduction={reduction!r}, expected reduction='mean'")
    door.heads(student_hidden, student_weight, student_hidden, None, student_bias, None)
    door.rows("token_mask", token_mask, student_hidden, "bool")
    door.rows("token_weight", token_weight, student_hidden, "float")
    normalizer = door.normalizer(normalizer, student_hidden)
    counted = None if token_mask is None else token_mask.reshape(-1)
    _check_teacher(door, student_hidden, teacher_ids, teacher_logprobs, counted, student_weight.shape[0])

    dtype = accumulation_dtype(student_hidden.dtype)
    weight = torch.ones(student_hidden.shape[:-1], dtype=dtype, device=student_hidden.device)
    if token_weight is not None:
        weight = token_weight.detach().to(dtype)
    if token_mask is not None:
        weight = torch.where(token_mask, weight, 0.0)
    needs = _needs(student_hidden, student_weight, student_bias)
    num_kept = teacher_ids.shape[-1]
    total, *_ = topk_loss(
        student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias,
        teacher_ids.reshape(-1, num_kept), teacher_logprobs.detach().to(dtype).reshape(-1, num_kept), None, counted,
        weight.reshape(-1), None, float(temperature), logit_softcap, *_sizes(student_hidden, student_weight, needs),
        needs,
    )  # fmt: skip
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = weight.sum()
        normalizer = torch.where(normalizer == 0, 1.0, normalizer)
    return total / normalizer


def fused_topk_distil_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tokens: Tensor,
    cu_seqlens: Tensor,
    student_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    cost: str = "ce",
    credit_span: str = "future",
    discount: float = 1.0,
    horizon: int | None = None,
    normalize_by_remaining: bool = False,
    baseline: str | Tensor | None = None,
    group_size: int | None = None,
    credit_clip: float | None = None,
    credit_scale: float = 1.0,
    behaviour_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    normalizer: float | Tensor | None = None,
) -> DistilLoss:
    """`fused_distil_loss` for a teacher as `fused_topk_ce` knows it: K tokens and one bucket of all others.

    Args:
        student_hidden: [N, D] packed rows, the hidden states that predict `tokens`.
        teacher_ids, teacher_logprobs: [N, K] as in `fused_topk_ce`.
        cost: "ce", or "kl": that less the entropy of the teacher's K + 1 buckets.
        Others: as in `fused_distil_loss`.

    Returns:
        DistilLoss. In `stats` what K tokens do not tell is NaN: `reverse_kl`, `teacher_lse`, and `teacher_logprob` of
        a token that is not among them; `kl` and `teacher_entropy` are those of the buckets; `agree` is whether the
        likeliest named token is the student's likeliest.

    Raises:
        As `fused_topk_ce` and `fused_distil_loss`.
    """
    door = Door("fused_topk_distil_loss")
    student_hidden, student_weight = as_autocast(student_hidden, student_weight)
    door.positive("temperature", temperature, optional=False)
    door.positive("logit_softcap", logit_softcap)
    door.one_of("cost", cost, ("ce", "kl"))
    door.heads(student_hidden, student_weight, student_hidden, None, student_bias, None)
    normalizer = door.normalizer(normalizer, student_hidden)
    door.packed(student_hidden, cu_seqlens)
    door.rows("token_mask", token_mask, student_hidden, "bool")
    door.rows("tokens", tokens, student_hidden, "int64")
    credit = door.credit(
        student_hidden, credit_span, baseline, group_size, discount, horizon, normalize_by_remaining, credit_clip,
        credit_scale, importance_clip, behaviour_logprobs,
    )  # fmt: skip
    _check_teacher(door, student_hidden, teacher_ids, teacher_logprobs, token_mask, student_weight.shape[0])
    check_tokens(tokens, token_mask, student_weight.shape[0])
    lengths = sequence_lengths(cu_seqlens, student_hidden.shape[0], credit.group_size)

    dtype = accumulation_dtype(student_hidden.dtype)
    rows = (student_hidden, student_weight, student_bias, teacher_ids, teacher_logprobs.detach().to(dtype))
    options = (float(temperature), logit_softcap)
    stats = _Problem(*rows, token_mask, *options).statistics(tokens)
    costs = stats.ce if cost == "ce" else stats.kl
    weights, cost_to_go = _credit(credit, lengths, token_mask, costs)
    counts = torch.ones_like(costs) if token_mask is None else token_mask.to(dtype)
    needs = _needs(student_hidden, student_weight, student_bias)
    ratio = credit.importance(stats.logprob, slice(None))
    if ratio is not None:
        counts, weights = counts * ratio, weights * ratio
    sizes = _sizes(student_hidden, student_weight, needs)
    total, *_ = topk_loss(*rows, tokens, token_mask, counts, weights, *options, *sizes, needs)
    if ratio is not None:  # the value has no ratios
        total = total + (stats.ce.sum() - total).detach()
    if cost == "kl":
        total = total - stats.teacher_entropy.sum()
    denominator = lengths.numel() if normalizer is None else normalizer
    return DistilLoss(total / denominator, stats, costs, weights, cost_to_go, torch.zeros_like(costs))


def _needs(*leaves: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]


def _sizes(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[int, int]:
    """Rows of a chunk of logits and of the ring."""
    shape = Shape(
        hidden.shape[:-1].numel(), weight.shape[0], hidden.shape[-1], hidden.dtype, hidden.device.type, scalar=True,
        grad_hidden=needs[0], grad_head=needs[1] or needs[2],
    )  # fmt: skip
    chunk_rows = choose_chunk_rows(shape)
    return chunk_rows, choose_ring_rows(shape, chunk_rows)


def _credit(credit: Credit, lengths: Tensor, counted: Tensor | None, costs: Tensor) -> Tensor:
    """a_t and G_t [2, N] of costs [N] that are all known."""
    found = costs.new_zeros(2, costs.numel())
    if credit.span != "none":
        scan = CreditScan(credit, lengths, reference)
        on_cpu = None if counted is None else counted.cpu()
        for chunk in reverse_chunks(lengths, on_cpu, credit, max(1, costs.numel()), costs.device):
            rows = chunk.rows
            found[:, rows] = scan.weights(costs[rows], chunk)
    return found


def _check_teacher(
    door: Door, hidden: Tensor, ids: Tensor, logprobs: Tensor, counted: Tensor | None, vocab_size: int
) -> None:
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if not isinstance(tensor, Tensor) or tensor.dim() != hidden.dim() or tensor.shape[:-1] != hidden.shape[:-1]:
            came = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            door.value_error(f"{name} is {came}, expected [..., K] with the rows {list(hidden.shape[:-1])}")
        if tensor.device != hidden.device:
            door.value_error(f"{name} is on {tensor.device}, student_hidden on {hidden.device}")
    if ids.dtype != torch.int64 or not logprobs.dtype.is_floating_point:
        door.type_error(f"teacher_ids, teacher_logprobs are {ids.dtype}, {logprobs.dtype}, expected int64 and a float")
    if ids.shape != logprobs.shape or ids.shape[-1] == 0:
        door.value_error(
            f"teacher_ids has shape {list(ids.shape)}, teacher_logprobs {list(logprobs.shape)}, expected one [..., K]"
        )
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    ids, logprobs = ids.reshape(-1, ids.shape[-1]), logprobs.detach().reshape(-1, ids.shape[-1])
    if counted is not None:
        ids, logprobs = ids[counted], logprobs[counted]
    if ids.numel() == 0:
        return
    if int(ids.min()) < -1 or int(ids.max()) >= vocab_size:
        door.value_error(
            f"teacher_ids holds ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {vocab_size - 1}, or -1"
        )
    ordered = ids.sort(-1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        door.value_error("teacher_ids names a token twice in one row, expected different tokens")
    mass = torch.where(ids >= 0, logprobs.double().exp(), 0.0).sum(-1)
    if not (mass <= _MOST_MASS).all():
        door.value_error(f"teacher_logprobs has a row of probability {float(mass.max())}, expected at most 1")


def _add_chunks(
    problem: _Problem,
    sums: GradientSums | None,
    tokens: Tensor | None,
    row_weight: Tensor,
    score_weight: Tensor | None,
    chunk_rows: int,
) -> Tensor:
    """Adds gradients to `sums`, returns the loss; the logits' memory is free again when the last products come."""
    loss = row_weight.new_zeros(())
    for rows, raw, both in problem.chunks(chunk_rows):
        weight = row_weight[rows]
        loss += torch.where(weight != 0, weight * both.cross_entropy(), 0.0).sum()
        if sums is not None:
            score = None if score_weight is None else score_weight[rows]
            grad = both.gradient(weight, score, None if tokens is None else tokens[rows])
            out = sums.room(raw).copy_(grad)
            sums.add(rows, out, None if out.dtype == grad.dtype else (grad - out).sum(-1))
    return loss


@torch.library.custom_op("distil_kernels::topk_loss", mutates_args=())
def topk_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    row_weight: Tensor,
    score_weight: Optional[Tensor],
    temperature: float,
    logit_softcap: Optional[float],
    chunk_rows: int,
    ring_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of row_weight * CE [], gradients of hidden, weight and bias); score_weight * grad log S[tokens] enters the
    gradients alone."""
    problem = _Problem(
        student_hidden, student_weight, student_bias, teacher_ids, teacher_logprobs, counted, temperature, logit_softcap
    )
    sums = GradientSums(student_hidden, student_weight, Needs(*needs), ring_rows)
    loss = _add_chunks(problem, sums if any(needs) else None, tokens, row_weight, score_weight, chunk_rows)
    return loss, *sums.result()


class _Problem(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    ids: Tensor  # [N, K]
    logprobs: Tensor  # [N, K] in the accumulation dtype
    counted: Tensor | None  # [N] bool
    temperature: float
    softcap: float | None

    def chunks(self, chunk_rows: int) -> Iterator[tuple[Rows, Tensor, _Buckets]]:
        """Rows that count, room for the gradient of their raw logits [R, V], and both models' buckets there."""
        dtype = self.logprobs.dtype
        student = _Student(None if self.bias is None else self.bias.to(dtype), self.temperature, self.softcap)
        room = memory.empty(chunk_rows, self.weight.shape[0], like=self.hidden, dtype=dtype)
        for rows in plain_chunks(self.counted, self.hidden.shape[0], chunk_rows):
            hidden = self.hidden[rows]
            raw = room[: hidden.shape[0]]
            lm_head(hidden, self.weight, out=raw)
            yield rows, raw, _Buckets(raw, student, self.ids[rows], self.logprobs[rows])

    @torch.no_grad()
    def statistics(self, tokens: Tensor) -> TokenStats:
        """Of every row that counts; 0 elsewhere, NaN what is not known."""
        found = self.logprobs.new_zeros(7, self.hidden.shape[0])
        for rows, _, both in self.chunks(_sizes(self.hidden, self.weight, [False] * 3)[0]):
            found[:, rows] = torch.stack(both.statistics(tokens[rows]))
        ce, kl, logprob, teacher_logprob, entropy, lse, agree = found
        nan = torch.full_like(ce, torch.nan)
        return TokenStats(ce, kl, nan, logprob, teacher_logprob, entropy, ce - kl, lse, nan, agree != 0)


class _Buckets:
    """R rows of both models: K named tokens and the tail."""

    def __init__(self, raw: Tensor, student: _Student, ids: Tensor, logprobs: Tensor) -> None:
        num_rows, vocab_size = raw.shape
        logits, self._derivative = student.logits(raw)
        self._ids, self._known = ids, ids >= 0
        # Tokens that are not known point to a column behind the vocabulary, where nothing is.
        self._place = torch.where(self._known, ids, vocab_size)
        self._tail = raw.new_empty(num_rows, vocab_size + 1)
        self._tail[:, :-1] = logits
        self._tail[:, -1] = -torch.inf
        head = self._tail.gather(1, self._place)
        self._tail.scatter_(1, self._place, -torch.inf)
        self._lse_tail = self._tail.logsumexp(1)
        self._logits, self._lse = logits, torch.logaddexp(self._lse_tail, head.logsumexp(1))
        self._logprobs = torch.where(self._known, logprobs, -torch.inf)
        self._probs = self._logprobs.exp()
        self._has_tail = self._lse_tail > -torch.inf
        self._tail_prob = torch.where(self._has_tail, (1.0 - self._probs.sum(1)).clamp(min=0.0), 0.0)
        self._head_logprobs = torch.where(self._known, head - self._lse[:, None], 0.0)
        self._tail_logprob = torch.where(self._has_tail, self._lse_tail - self._lse, 0.0)

    def cross_entropy(self) -> Tensor:
        """[R]"""
        return -(self._probs * self._head_logprobs).sum(1) - self._tail_prob * self._tail_logprob

    def statistics(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """ce, kl, log S[y], log T[y] (NaN where y is not named), H(S), logsumexp, agreement; [R] each."""
        own = torch.special.entr(self._probs).sum(1) + torch.special.entr(self._tail_prob)
        named = self._ids == tokens[:, None]
        teacher = torch.where(named, self._logprobs, 0.0).sum(1)
        ce, logprobs = self.cross_entropy(), self._logits - self._lse[:, None]
        likeliest = self._ids.gather(1, self._logprobs.argmax(1, keepdim=True))[:, 0]
        return (
            ce,
            ce - own,
            logprobs.gather(1, tokens[:, None])[:, 0],
            torch.where(named.any(1), teacher, torch.nan),
            torch.special.entr(logprobs.exp()).sum(1),
            self._lse,
            (likeliest == self._logits.argmax(1)).to(ce.dtype),
        )

    def gradient(self, weight: Tensor, score: Tensor | None, tokens: Tensor | None) -> Tensor:
        """[R, V] of weight * CE + score * log S[tokens] by the raw logits, in the tail's memory."""
        factor = weight * (self._probs.sum(1) + self._tail_prob)
        used = weight != 0
        if score is not None:
            factor, used = factor - score, used | (score != 0)
        tail_share = factor * self._tail_logprob.exp() - weight * self._tail_prob
        tail_share = torch.where(self._has_tail, tail_share, 0.0)
        grad = self._tail.sub_(torch.where(self._has_tail, self._lse_tail, 0.0)[:, None]).exp_()
        grad.mul_(tail_share[:, None])
        head = factor[:, None] * self._head_logprobs.exp() - weight[:, None] * self._probs
        grad.scatter_(1, self._place, torch.where(self._known, head, 0.0))
        if score is not None:
            assert tokens is not None
            grad.scatter_add_(1, tokens[:, None], score[:, None])
        return grad[:, :-1].mul_(self._derivative).masked_fill_(~used[:, None], 0.0)


@topk_loss.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student_hidden.dtype)
    loss = student_hidden.new_empty((), dtype=dtype)
    return loss, *custom_ops.fake_gradients(student_hidden, student_weight, rest[-1], rest[-2])


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.weight_dtype, ctx.needs, ctx.num_inputs = inputs[1].dtype, inputs[-1], len(inputs)


topk_loss.register_autograd(scaled_gradients, setup_context=_context)
