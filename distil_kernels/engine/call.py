"""One call of a public op: arguments checked and cast as autocast asks, rows flattened, plan and back end chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import Cost, LogitScaling, Statistic
from distil_kernels.backends.dispatch import BackendChoice, choose_backend
from distil_kernels.engine import custom_ops
from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.credit import CreditInputs, known_in_order
from distil_kernels.engine.custom_ops import PolicyRows, ScalarLoss
from distil_kernels.engine.gemm import accumulation_dtype
from distil_kernels.engine.plan import Plan, check_plan, choose_plan
from distil_kernels.engine.policy import Policy
from distil_kernels.engine.scaled_gradients import anchor_of
from distil_kernels.engine.sizes import Shape, choose_chunk_rows
from distil_kernels.engine.spec import Spec
from distil_kernels.engine.terms import TermInputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NO_CREDIT = CreditInputs()
_NO_TERMS = TermInputs()


class Denominator(NamedTuple):
    """What a weighted sum and its gradients are divided by, and where: inside the op, before gradients are rounded.

    In float16 the division comes after the op, through autograd: entries of a gradient that is divided by thousands of
    tokens would be too small for a float16 number. There the op divides by the largest weight, so that the size of the
    weights, which the denominator of a mean makes good, neither overflows nor underflows.
    """

    inside: Tensor | None
    """[] for the op; None: the op returns the sum."""
    after: float | Tensor | None
    """For `divided`; None: the op has divided, or there is nothing to divide by."""

    @classmethod
    def of(cls, denominator: float | Tensor | None, hidden: Tensor, token_weight: Tensor | None) -> Denominator:
        """Makes the rule for hidden states of a dtype; `denominator` is None for a sum."""
        if hidden.dtype == torch.float16:
            if token_weight is None or token_weight.numel() == 0:
                return cls(None, denominator)
            largest = token_weight.abs().amax()
            largest = torch.where(largest < torch.finfo(largest.dtype).tiny, 1.0, largest)
            return cls(largest, (1.0 if denominator is None else denominator) / largest)
        if denominator is None:
            return cls(None, None)
        if isinstance(denominator, Tensor):
            return cls(denominator, None)
        return cls(hidden.new_ones((), dtype=accumulation_dtype(hidden.dtype)) * denominator, None)

    def divided(self, total: Tensor) -> Tensor:
        """Returns the loss from what the op returned."""
        return total if self.after is None else total / self.after


class Call:
    """Checked arguments of one call; autocast applied, rows flattened to [N]. Without a teacher, teacher_* are None."""

    def __init__(
        self,
        checks: ArgumentChecks,
        scalings: tuple[LogitScaling, LogitScaling],
        backend: str | BackendChoice,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        *,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None = None,
        token_mask: Tensor | None,
        token_weight: Tensor | None = None,
        vocab_size: int | None,
        vocab_group: ProcessGroup | None,
        sequence_parallel: bool,
        detach_hidden: bool,
        has_teacher: bool = True,
    ) -> None:
        # Check every argument that the ops share.
        self._checks = checks
        checks.no_tangents(student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias)
        self._needs = checks.needs(student_hidden, student_weight, student_bias, detach_hidden)
        if detach_hidden and isinstance(student_hidden, Tensor):
            student_hidden = student_hidden.detach()
        student_hidden, student_weight = _as_autocast(student_hidden, student_weight)
        teacher_hidden, teacher_weight = _as_autocast(teacher_hidden, teacher_weight)
        other_hidden = teacher_hidden if has_teacher else student_hidden
        self._shards = checks.shards(vocab_group, vocab_size, sequence_parallel)
        self._vocab_size = checks.heads(
            student_hidden, student_weight, other_hidden, teacher_weight, student_bias, teacher_bias, vocab_size,
            is_shard=self._shards is not None,
        )  # fmt: skip
        checks.rows("token_mask", token_mask, student_hidden, "mask")
        checks.rows("token_weight", token_weight, student_hidden, "float")

        # Flatten the rows; only the student's tensors may get gradients.
        if teacher_weight is None and teacher_bias is None:
            teacher_bias = student_bias
        self._hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
        self._student = (self._hidden, student_weight, student_bias)
        self._teacher = (
            None if teacher_hidden is None else teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
            None if teacher_weight is None else teacher_weight.detach(),
            None if teacher_bias is None else teacher_bias.detach(),
        )
        self._counted = None if token_mask is None else token_mask.reshape(-1).to(torch.bool)
        self._token_weight = None if token_weight is None else token_weight.detach().reshape(-1)

        self._scalings = scalings
        if not isinstance(backend, BackendChoice):
            backend = choose_backend(backend, student_hidden.device, student_hidden.dtype)
        self._backend = backend

    @property
    def _dtype(self) -> torch.dtype:
        return accumulation_dtype(self._hidden.dtype)

    def row_weight(self) -> Tensor | None:
        """Returns mask times weight [N], or None if every row counts once."""
        if self._token_weight is None:
            return None if self._counted is None else self._counted.to(self._dtype)
        weight = self._token_weight.to(self._dtype).contiguous()  # row kernels know its address alone
        return weight if self._counted is None else torch.where(self._counted, weight, 0.0)

    def denominator(self, normalizer: float | Tensor | None, default: int | None = None) -> float | Tensor:
        """Returns the denominator of a mean: the normalizer, or a default, which is the sum of counted weights.

        It is 1 where that sum is 0, and where nothing counts: 0 tokens over a normalizer of 0 are 0.
        """
        if normalizer is None and default is not None:
            return default
        weight, num_rows = self.row_weight(), self._hidden.shape[0]
        if normalizer is None:
            if weight is None:
                return max(num_rows, 1)
            total = weight.sum()
            return torch.where(total == 0, 1.0, total)
        if not isinstance(normalizer, Tensor) and normalizer > 0:
            return normalizer
        if weight is None:
            if not isinstance(normalizer, Tensor) and num_rows:
                self._checks.value_error(
                    f"normalizer is {normalizer} with {num_rows} tokens, expected a number above 0"
                )
            return normalizer if num_rows else 1
        if not isinstance(normalizer, Tensor):
            normalizer = weight.new_full((), normalizer)
        return torch.where((weight == 0).all(), 1.0, normalizer)

    def scalar_loss(
        self,
        cost: Cost,
        denominator: float | Tensor | None,
        *,
        tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        credit: CreditInputs = _NO_CREDIT,
        terms: TermInputs = _NO_TERMS,
        gradient_threshold: float = 0.0,
        plan: str | Plan = "auto",
    ) -> ScalarLoss:
        """Computes a weighted sum of costs, with credit and terms if given, over the denominator (None for 1)."""
        return self._sum_of_costs(
            custom_ops.scalar_loss, self._teacher, cost, denominator, tokens, cu_seqlens, credit, terms,
            gradient_threshold, plan,
        )  # fmt: skip

    def topk_loss(
        self,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        cost: Cost,
        denominator: float | Tensor | None,
        *,
        tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        credit: CreditInputs = _NO_CREDIT,
        terms: TermInputs = _NO_TERMS,
    ) -> ScalarLoss:
        """Computes the same to a teacher that named tokens [..., K] with their log-probs."""
        named = tuple(each.detach().reshape(-1, teacher_ids.shape[-1]) for each in (teacher_ids, teacher_logprobs))
        return self._sum_of_costs(
            custom_ops.topk_loss, named, cost, denominator, tokens, cu_seqlens, credit, terms, 0.0, "auto"
        )

    def policy_loss(
        self,
        policy: Policy,
        denominator: float | Tensor,
        *,
        tokens: Tensor,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        reference_logprobs: Tensor | None,
        plan: str | Plan,
    ) -> PolicyRows:
        """Computes the clipped policy-gradient loss of tokens [N], and its rows; there is no teacher."""
        chosen = choose_plan(self._shape(scalar=True, logprob_grad=True), plan)
        rule = self._denominator_rule(denominator)
        total, statistics, surrogate, clipped, penalty, *_ = self._compute(
            custom_ops.policy_loss, chosen, *self._student, tokens, self._counted, self.row_weight(), rule.inside,
            advantages, old_logprobs, reference_logprobs, cost=Cost(Statistic.ENTROPY), policy=policy,
        )  # fmt: skip
        return PolicyRows(rule.divided(total), statistics, surrogate, clipped, penalty)

    def differentiable_statistics(self, tokens: Tensor | None, cost: Cost, plan: str | Plan) -> Tensor:
        """Computes statistics [NUM_STATISTICS, N]; gradients flow through the cost, and LOGPROB if there are tokens."""
        chosen = choose_plan(self._shape(scalar=False, logprob_grad=tokens is not None), plan)
        tokens = None if tokens is None else tokens.reshape(-1)
        statistics, *_ = self._compute(
            custom_ops.row_statistics, chosen, *self._student, *self._teacher, tokens, self._counted, cost=cost
        )
        return statistics

    def _sum_of_costs(
        self,
        op: Any,
        teacher: tuple[Tensor | None, ...],
        cost: Cost,
        denominator: float | Tensor | None,
        tokens: Tensor | None,
        cu_seqlens: Tensor | None,
        credit: CreditInputs,
        terms: TermInputs,
        gradient_threshold: float,
        plan: str | Plan,
    ) -> ScalarLoss:
        """Chooses the plan of `scalar_loss` or `topk_loss`, and calls the custom op."""
        # One pass is enough if the credit of a chunk's rows is known when the chunk is processed.
        shape = self._shape(scalar=True, logprob_grad=credit.settings.span != "none")
        in_order = True
        if cu_seqlens is not None:
            check_plan(plan)
            num_sequences = cu_seqlens.numel() - 1
            max_rows = plan.chunk_rows if isinstance(plan, Plan) else choose_chunk_rows(shape)
            in_order = known_in_order(credit.settings, num_sequences, shape.num_rows, max_rows)
        chosen = choose_plan(shape, plan, credit_in_one_pass=in_order)
        if gradient_threshold:
            self._checks.sparse_gradient(
                gradient_threshold, self._backend.name, shape.dtype, chosen, is_shard=self._shards is not None
            )
            chosen = chosen._replace(staging_rows=0)  # entries are selected before they are rounded

        rule = self._denominator_rule(denominator)
        total, statistics, weights, dropped, values, *_ = self._compute(
            op, chosen, *self._student, *teacher, tokens, self._counted, self.row_weight(), rule.inside, cu_seqlens,
            credit.baseline_values, credit.behaviour_logprobs, *terms.tensors, cost=cost, credit=credit.settings,
            terms=terms.settings, gradient_threshold=float(gradient_threshold),
        )  # fmt: skip
        return ScalarLoss(rule.divided(total), statistics, weights, dropped, values)

    def _denominator_rule(self, denominator: float | Tensor | None) -> Denominator:
        weight = None if self._token_weight is None else self.row_weight()
        return Denominator.of(denominator, self._hidden, weight)

    def _compute(self, op: Any, plan: Plan, *tensors: Tensor | None, **settings: Any) -> tuple[Tensor, ...]:
        """Calls a custom op with its tensors and the record of the call, of which `settings` are fields."""
        spec = Spec(
            backend=self._backend.name,
            backend_reason=self._backend.reason,
            plan=plan.name,
            plan_reason=plan.reason,
            needs=self._needs,
            student=self._scalings[0],
            teacher=self._scalings[1],
            shards=self._shards,
            **settings,
        )
        sizes = {
            "vocab_size": self._vocab_size, "chunk_rows": plan.chunk_rows, "staging_rows": plan.staging_rows
        }  # fmt: skip
        if torch.compiler.is_compiling():  # a compiled graph is not differentiated twice
            text, numbers = spec.encode_apart()
            return op(*tensors, numbers, None, spec=text, **sizes)
        anchor = anchor_of(*self._student) if any(self._needs) else None
        return op(*tensors, None, anchor, spec=spec.encode(), **sizes)

    def _shape(self, *, scalar: bool, logprob_grad: bool) -> Shape:
        hidden = self._hidden
        return Shape(
            hidden.shape[0], self._vocab_size, hidden.shape[1], hidden.dtype, hidden.device.type, scalar, logprob_grad,
            grad_hidden=self._needs.hidden, grad_head=self._needs.weight or self._needs.bias,
        )  # fmt: skip


def _as_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Returns hidden states and heads as a linear layer would take them: under autocast in its dtype, except float64.

    Results stay float32. What is no tensor is left to the checks that follow.
    """

    def cast(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
            return tensor
        if tensor.dtype == torch.float64 or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))

    return tuple(map(cast, tensors))
