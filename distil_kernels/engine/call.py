"""Arguments of one call of a public op: checked, cast as autocast asks, rows flattened, plan and back end chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import Cost
from distil_kernels.backends.dispatch import choose_backend
from distil_kernels.engine import custom_ops
from distil_kernels.engine.checks import Door
from distil_kernels.engine.credit import Credit, known_in_order
from distil_kernels.engine.driver import Policy
from distil_kernels.engine.gemm import accumulation_dtype
from distil_kernels.engine.plan import Plan, Shape, choose_chunk_rows, choose_plan


class ScalarLoss(NamedTuple):
    """Sum of weighted costs over the denominator [], statistics [NUM_STATISTICS, N], credit and cost-to-go [2, N],
    dropped [N]."""

    total: Tensor
    statistics: Tensor
    credit: Tensor
    dropped: Tensor


class Call:
    """Checked arguments of one call; autocast applied, rows flattened to [N]. Where an op has no teacher, teacher_* are
    None."""

    def __init__(
        self,
        door: Door,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        token_mask: Tensor | None,
        token_weight: Tensor | None,
        temperature: float,
        teacher_temperature: float | None,
        logit_softcap: float | None,
        backend: str,
        *,
        has_teacher: bool = True,
    ) -> None:
        self._door = door
        door.positive("temperature", temperature, optional=False)
        door.positive("teacher_temperature", teacher_temperature)
        door.positive("logit_softcap", logit_softcap)
        student_hidden, student_weight = as_autocast(student_hidden, student_weight)
        teacher_hidden, teacher_weight = as_autocast(teacher_hidden, teacher_weight)
        other_hidden = teacher_hidden if has_teacher else student_hidden
        door.heads(student_hidden, student_weight, other_hidden, teacher_weight, student_bias, teacher_bias)
        door.rows("token_mask", token_mask, student_hidden, "bool")
        door.rows("token_weight", token_weight, student_hidden, "float")
        if teacher_weight is None and teacher_bias is None:
            teacher_bias = student_bias
        self._accumulation_dtype = accumulation_dtype(student_hidden.dtype)
        self._tensors = (
            student_hidden.reshape(-1, student_hidden.shape[-1]),
            student_weight,
            student_bias,
            None if teacher_hidden is None else teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
            None if teacher_weight is None else teacher_weight.detach(),
            None if teacher_bias is None else teacher_bias.detach(),
        )
        self._counted = None if token_mask is None else token_mask.reshape(-1)
        self._token_weight = None if token_weight is None else token_weight.detach().reshape(-1)
        self._transform = (
            float(temperature),
            float(temperature if teacher_temperature is None else teacher_temperature),
            logit_softcap,
        )
        self._backend = choose_backend(backend, student_hidden.device, student_hidden.dtype).name
        grad_enabled = torch.is_grad_enabled()
        self._needs = [
            grad_enabled and tensor is not None and tensor.requires_grad
            for tensor in (student_hidden, student_weight, student_bias)
        ]

    def row_weight(self) -> Tensor | None:
        """[N] mask times weight, or None where every row counts once."""
        if self._token_weight is None:
            return None if self._counted is None else self._counted.to(self._accumulation_dtype)
        weight = self._token_weight.to(self._accumulation_dtype).contiguous()  # row kernels know its address alone
        return weight if self._counted is None else torch.where(self._counted, weight, 0.0)

    def denominator(self, normalizer: float | Tensor | None) -> float | Tensor:
        if normalizer is not None:
            return normalizer
        weight = self.row_weight()
        if weight is None:
            return max(self._tensors[0].shape[0], 1)
        total = weight.sum()
        return torch.where(total == 0, 1.0, total)

    def _known_denominator(self, denominator: float | Tensor | None) -> Tensor | None:
        """[], for the op to divide by before it rounds; None to divide its loss afterwards. So it is in float16, where
        a gradient's entries over thousands of tokens would be too small for a number."""
        hidden = self._tensors[0]
        if denominator is None or hidden.dtype == torch.float16:
            return None
        if isinstance(denominator, Tensor):
            return denominator
        return hidden.new_full((), denominator, dtype=self._accumulation_dtype)

    def policy_loss(
        self, tokens: Tensor, policy: Policy, plan: str | Plan, denominator: float | Tensor
    ) -> custom_ops.PolicyLoss:
        """The clipped policy-gradient loss and its rows; there is no teacher."""
        chosen = choose_plan(self._shape(scalar=True, logprob_grad=True), plan)
        student, temperatures, known = self._tensors[:3], self._transform, self._known_denominator(denominator)
        total, *rows = custom_ops.policy_loss(
            *student, tokens, self._counted, self.row_weight(), known, *policy, temperatures[0], temperatures[2],
            self._backend, chosen.name, chosen.chunk_rows, chosen.ring_rows, self._needs,
        )[:4]  # fmt: skip
        return custom_ops.PolicyLoss(total / denominator if known is None else total, *rows)

    def scalar_loss(
        self, tokens: Tensor | None, cu_seqlens: Tensor | None, cost: Cost, credit: Credit, plan: str | Plan,
        gradient_threshold: float, denominator: float | Tensor | None,
    ) -> ScalarLoss:  # fmt: skip
        shape = self._shape(scalar=True, logprob_grad=credit.span != "none")
        in_order = True
        if cu_seqlens is not None:
            num_sequences = cu_seqlens.numel() - 1
            max_rows = plan.chunk_rows if isinstance(plan, Plan) else choose_chunk_rows(shape)
            in_order = known_in_order(credit, num_sequences, shape.num_rows, max_rows)
        chosen = choose_plan(shape, plan, credit_in_one_pass=in_order)
        if gradient_threshold:
            self._door.sparse_gradient(gradient_threshold, self._backend, shape.dtype, chosen.name)
            chosen = chosen._replace(ring_rows=0)  # entries are selected before they are rounded
        values, known = isinstance(credit.baseline, Tensor), self._known_denominator(denominator)
        total, statistics, weights, dropped, *_ = custom_ops.scalar_loss(
            *self._tensors, tokens, self._counted, self.row_weight(), known, cu_seqlens,
            credit.baseline if values else None, credit.behaviour_logprobs, *self._transform, int(cost.statistic),
            cost.jsd_weight, credit.span, "values" if values else (credit.baseline or ""), credit.group_size,
            credit.numbers, gradient_threshold, self._backend, chosen.name, chosen.chunk_rows, chosen.ring_rows,
            self._needs,
        )  # fmt: skip
        if denominator is not None and known is None:
            total = total / denominator
        return ScalarLoss(total, statistics, weights, dropped)

    def differentiable_statistics(
        self, tokens: Tensor | None, cost: Cost, plan: str | Plan, *, logprob_grad: bool
    ) -> Tensor:
        """[NUM_STATISTICS, N]; gradients flow through the cost and LOGPROB."""
        chosen = choose_plan(self._shape(scalar=False, logprob_grad=logprob_grad), plan)
        statistics, *_ = custom_ops.row_statistics(
            *self._tensors, tokens, self._counted, *self._transform, int(cost.statistic), cost.jsd_weight,
            self._backend, chosen.name, chosen.chunk_rows, chosen.ring_rows, self._needs,
        )  # fmt: skip
        return statistics

    def _shape(self, *, scalar: bool, logprob_grad: bool) -> Shape:
        hidden, weight = self._tensors[:2]
        return Shape(
            hidden.shape[0], weight.shape[0], weight.shape[1], hidden.dtype, hidden.device.type, scalar, logprob_grad,
            grad_hidden=self._needs[0], grad_head=self._needs[1] or self._needs[2],
        )  # fmt: skip


def as_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Hidden states and heads as a linear layer would take them: under autocast in its dtype, but for float64.

    Results stay float32. What is no tensor is left for the checks that follow.
    """

    def cast(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
            return tensor
        if tensor.dtype == torch.float64 or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))

    return tuple(map(cast, tensors))
