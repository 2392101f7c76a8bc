"""Forward cross-entropy to a teacher of which only some tokens' log-probs are known: a remote expert, a saved file.

    CE = - sum_k p_k log S_k  -  p_tail log S_tail,       p_tail = 1 - sum_k p_k,   S_tail = sum of S over other tokens

All that the teacher did not name is one bucket, so no mass is lost and nothing is claimed about its inside. With
P = sum_k p_k + p_tail (1 but for rounding) and s the student's logits

    dCE / ds_k = P S_k - p_k         dCE / ds_v = (P S_tail - p_tail) S_v / S_tail       (v in the tail)

The tail has a logsumexp of its own: 1 - sum_k S_k would be rounding where the student is sure. Rows go in chunks whose
gradients are formed at once, as in `driver` (plan gradient_in_forward, or frozen_head). The arithmetic of a row is
plain torch on every device: three passes over a chunk of logits. Left out: a loss per token with its own gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from distil_kernels import memory, ops
from distil_kernels.checks import Door
from distil_kernels.driver import plain_chunks
from distil_kernels.gemm import accumulation_dtype, lm_head
from distil_kernels.gradients import GradientSums, Needs
from distil_kernels.plan import Shape, choose_chunk_rows, choose_ring_rows

# ruff: noqa: UP045  (torch reads the annotations of a custom op and knows Optional[Tensor])

_MOST_MASS = 1 + 1e-3
"""Log-probs of an API are rounded: their sum may pass 1 by this much, and then the tail is empty."""


class _Student(NamedTuple):
    bias: Tensor | None
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
    door.one_of("reduction", reduction, ("mean", "sum"))
    door.positive("temperature", temperature, optional=False)
    door.positive("logit_softcap", logit_softcap)
    door.normalizer(normalizer, student_hidden)
    if normalizer is not None and reduction != "mean":
        door.value_error(f"normalizer is given with reduction={reduction!r}, expected reduction='mean'")
    door.heads(student_hidden, student_weight, student_hidden, None, student_bias, None)
    door.rows("token_mask", token_mask, student_hidden, "bool")
    door.rows("token_weight", token_weight, student_hidden, "float")
    counted = None if token_mask is None else token_mask.reshape(-1)
    _check_teacher(door, student_hidden, teacher_ids, teacher_logprobs, counted, student_weight.shape[0])

    dtype = accumulation_dtype(student_hidden.dtype)
    weight = torch.ones(student_hidden.shape[:-1], dtype=dtype, device=student_hidden.device)
    if token_weight is not None:
        weight = token_weight.detach().to(dtype)
    if token_mask is not None:
        weight = torch.where(token_mask, weight, 0.0)
    leaves = (student_hidden, student_weight, student_bias)
    needs = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    num_kept = teacher_ids.shape[-1]
    total, *_ = topk_loss(
        student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias,
        teacher_ids.reshape(-1, num_kept), teacher_logprobs.detach().to(dtype).reshape(-1, num_kept), counted,
        weight.reshape(-1), float(temperature), logit_softcap, needs,
    )  # fmt: skip
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = weight.sum()
        normalizer = torch.where(normalizer == 0, 1.0, normalizer)
    return total / normalizer


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


@torch.library.custom_op("distil_kernels::topk_loss", mutates_args=())
def topk_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    counted: Optional[Tensor],
    row_weight: Tensor,
    temperature: float,
    logit_softcap: Optional[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of row_weight * CE [], gradients of hidden, weight and bias)."""
    num_rows, vocab_size = student_hidden.shape[0], student_weight.shape[0]
    dtype = accumulation_dtype(student_hidden.dtype)
    shape = Shape(
        num_rows, vocab_size, student_hidden.shape[1], student_hidden.dtype, student_hidden.device.type, scalar=True,
        grad_hidden=needs[0], grad_head=needs[1] or needs[2],
    )  # fmt: skip
    chunk_rows = choose_chunk_rows(shape)
    sums = GradientSums(student_hidden, student_weight, Needs(*needs), choose_ring_rows(shape, chunk_rows))
    student = _Student(None if student_bias is None else student_bias.to(dtype), temperature, logit_softcap)
    room = memory.empty(chunk_rows, vocab_size, like=student_hidden, dtype=dtype)
    loss = student_hidden.new_zeros((), dtype=dtype)
    for rows in plain_chunks(counted, num_rows, chunk_rows):
        hidden = student_hidden[rows]
        raw = room[: hidden.shape[0]]
        lm_head(hidden, student_weight, out=raw)
        ce, grad = _rows(raw, student, teacher_ids[rows], teacher_logprobs[rows], any(needs))
        weight = row_weight[rows]
        loss += torch.where(weight != 0, weight * ce, 0.0).sum()
        if grad is not None:
            grad.mul_(weight[:, None]).masked_fill_((weight == 0)[:, None], 0.0)
            out = sums.room(raw).copy_(grad)
            sums.add(rows, out, None if out.dtype == grad.dtype else (grad - out).sum(-1))
    return loss, *sums.result()


def _rows(
    raw: Tensor, student: _Student, ids: Tensor, logprobs: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy [R] and its gradient by the raw logits [R, V]."""
    num_rows, vocab_size = raw.shape
    logits, derivative = student.logits(raw)
    known = ids >= 0
    # Tokens that are not known point to a column behind the vocabulary, where nothing is.
    place = torch.where(known, ids, vocab_size)
    tail = raw.new_empty(num_rows, vocab_size + 1)
    tail[:, :-1] = logits
    tail[:, -1] = -torch.inf
    head = tail.gather(1, place)
    tail.scatter_(1, place, -torch.inf)
    lse_tail = tail.logsumexp(1)
    lse = torch.logaddexp(lse_tail, head.logsumexp(1))
    probs = torch.where(known, logprobs, -torch.inf).exp()
    has_tail = lse_tail > -torch.inf
    tail_prob = torch.where(has_tail, (1.0 - probs.sum(1)).clamp(min=0.0), 0.0)
    head_logprobs = torch.where(known, head - lse[:, None], 0.0)
    tail_logprob = torch.where(has_tail, lse_tail - lse, 0.0)
    ce = -(probs * head_logprobs).sum(1) - tail_prob * tail_logprob
    if not with_grad:
        return ce, None
    mass = probs.sum(1) + tail_prob
    tail_share = torch.where(has_tail, mass * tail_logprob.exp() - tail_prob, 0.0)
    grad = tail.sub_(torch.where(has_tail, lse_tail, 0.0)[:, None]).exp_().mul_(tail_share[:, None])
    grad.scatter_(1, place, torch.where(known, mass[:, None] * head_logprobs.exp() - probs, 0.0))
    return ce, grad[:, :-1].mul_(derivative)


@topk_loss.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student_hidden.dtype)
    loss = student_hidden.new_empty((), dtype=dtype)
    return loss, *ops.fake_gradients(student_hidden, student_weight, rest[-1])


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.weight_dtype, ctx.needs, ctx.num_inputs = inputs[1].dtype, inputs[-1], len(inputs)


topk_loss.register_autograd(ops.scaled_gradients, setup_context=_context)
