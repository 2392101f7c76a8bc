"""The loss of one packed batch: hidden states of both models at the completion tokens, into `fused_distil_loss`.

    L = (1 / normalizer) sum_t H(teacher_t, student_t),  differentiated as an expectation over the rollouts

or another cost of the family, or, without a teacher, L = -(1 / normalizer) sum_t A log S[y_t] where A is the rollout's
score minus its group's mean.

Only completion rows are computed. The normalizer is the number of rollouts in the step, so that the losses of
micro-batches add up to that of the step, whatever their sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels import DistilLoss, fused_distil_loss, fused_policy_loss, fused_topk_distil_loss
from distil_kernels.hf import CausalLM
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.config import Config
from distil_kernels.train.mixture import Mixture, group_advantages
from distil_kernels.train.rollouts.packed_batch import PackedBatch, TokenMask
from distil_kernels.train.shared_rows import SharedRows
from distil_kernels.train.teachers.base import Target, TopKTarget

SUMMED = (
    "cost", "ce", "kl", "reverse_kl", "entropy", "teacher_entropy", "agree", "abs_credit", "tail", "unmapped", "drift",
    "mismatch", "reference", "ratio", "ratio_tail",
)  # fmt: skip


POLICY_CLIP = 0.2
"""Of the ratio of a policy gradient, at either side of 1 (PPO)."""


class Sums(NamedTuple):
    """Sums over the tokens of a batch that count, from which the metrics of a step are made."""

    num_tokens: int
    totals: Tensor
    """[len(SUMMED)] float64; NaN for a value that this objective does not have."""
    sequence_teacher_logprob: Tensor | None
    """[B] float64, the log-prob of each completion under the teacher; None without a teacher that knows it."""
    inner_products: Tensor | None = None
    """The result of `reward_alignment.inner_products` in the steps that record it."""
    largest_mismatch: Tensor | None = None
    """[], the largest mismatch of a token in the first update on a rollout server's completions."""

    def on_cpu(self) -> Sums:
        return Sums(self.num_tokens, *(None if field is None else field.cpu() for field in self[1:]))  # type: ignore


@dataclass
class UpdateState:
    """State shared by all optimizer updates on one batch of rollouts."""

    num_updates: int = 0
    """The number of updates so far."""
    first_logprobs: Tensor | None = None
    """[N], log-probs of the tokens under the student of the first update, which sampled them (unless a server did)."""
    target: Target | None = None
    """The answer of a teacher that does not move."""
    distil_weight: float = 1.0
    """Weight of the distillation in this step."""
    reference_logprobs: Tensor | None = None
    """[N], log-probs of the tokens under the reference; None without a penalty."""
    shared: SharedRows | None = None
    """Rows that are exchanged: N, and the loss, are then of all processes, and the sums of this one."""

    @property
    def is_first(self) -> bool:
        return self.num_updates == 0

    def behaviour_logprobs(self, batch: PackedBatch) -> Tensor | None:
        """[N] under the policy that sampled the tokens; None if that is the student as it is now."""
        return self.first_logprobs if batch.behaviour_logprobs is None else batch.behaviour_logprobs

    def finish_update(self, logprobs: Tensor) -> None:
        """Counts an update in which the tokens had these log-probs [N] under the student."""
        if self.is_first:
            self.first_logprobs = logprobs
        self.num_updates += 1


def distil_loss(
    student: CausalLM,
    student_hidden: Tensor,
    target: Target,
    batch: PackedBatch,
    config: Config,
    average: PositionAverage,
    normalizer: float,
    state: UpdateState | None = None,
) -> tuple[Tensor, Sums]:
    """The distillation loss [] of a batch, and its sums for the record.

    Tokens that do not learn cost nothing, have no credit and are in no sum. In the first update `average` takes note of
    the costs-to-go. Rollouts of another policy, an older student or a server, are weighted by the importance ratio.

    Args:
        student_hidden: [N, D], the states that predict the batch's tokens.
        state: shared by the updates on this batch; None for a single update.
    """
    state = state or UpdateState()
    behaviour = state.behaviour_logprobs(batch)
    own_batch, own = batch, slice(None)
    if state.shared is not None:
        batch, own = state.shared
    mixture = Mixture.of(config, batch, state.distil_weight, behaviour, state.reference_logprobs)
    out = fused_loss(
        student, student_hidden, target, batch, config, average, normalizer=normalizer, plan=config.plan,
        token_mask=mixture.counted.values, behaviour_logprobs=behaviour,
        importance_clip=None if behaviour is None else config.importance_clip, **mixture.options,
    )  # fmt: skip
    values = {"cost": out.cost, "abs_credit": out.credit.abs(), **out.stats._asdict()}
    if mixture.counted is not batch.learns:  # others have a reward alone
        assert batch.learns.values is not None
        values = {name: torch.where(batch.learns.values, value, 0.0) for name, value in values.items()}
    if state.reference_logprobs is not None:
        assert out.terms is not None and out.terms.reference is not None
        values["reference"] = batch.learns.apply(out.terms.reference)
    values |= _off_policy(state, behaviour, out.stats.logprob, batch.learns, config)
    if state.is_first:
        average.observe(out.cost_to_go[own], own_batch.lengths, own_batch.learns.values)
    state.finish_update(out.stats.logprob)

    # A token that a top-K teacher does not name has no log-prob, and so the completion has none.
    if isinstance(target, TopKTarget):
        values |= {"tail": batch.learns.apply(target.tail), "unmapped": batch.learns.apply(target.unmapped)}
    values = {name: value[own] for name, value in values.items()}
    if isinstance(target, TopKTarget):
        return out.loss, _sums(own_batch.learns.num_tokens, values)
    teacher_logprob = out.stats.teacher_logprob[own].to(torch.float64)
    lengths = own_batch.cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(teacher_logprob.device)
    by_sequence = teacher_logprob.new_zeros(len(lengths)).index_add_(0, sequence, teacher_logprob)
    return out.loss, _sums(own_batch.learns.num_tokens, values, by_sequence)


def policy_loss(
    student: CausalLM,
    student_hidden: Tensor,
    batch: PackedBatch,
    config: Config,
    normalizer: float,
    state: UpdateState | None = None,
) -> tuple[Tensor, Sums]:
    """The policy-gradient loss [] of a batch, and its sums; arguments as of `distil_loss`.

    All tokens of the model count in rollouts with a verdict, also without feedback.
    """
    state = state or UpdateState()
    behaviour = state.behaviour_logprobs(batch)
    own_batch, own = batch, slice(None)
    if state.shared is not None:
        batch, own = state.shared
    advantages = group_advantages(batch.scores, batch.group_size, config.normalize_advantages)
    out = fused_policy_loss(
        student_hidden, student.weight, tokens=batch.tokens,
        advantages=advantages.repeat_interleave(batch.cu_seqlens.diff()).to(student_hidden.device),
        student_bias=student.bias, vocab_size=student.vocab_size, temperature=config.temperature,
        logit_softcap=student.logit_softcap, student_logit_scale=student.logit_scale, normalizer=normalizer,
        backend=config.backend, plan=config.plan, token_mask=batch.judged.values, old_logprobs=behaviour,
        clip_low=POLICY_CLIP, clip_high=POLICY_CLIP, reference_logprobs=state.reference_logprobs,
        reference_weight=None if state.reference_logprobs is None else config.reference_weight,
        vocab_group=student.vocab_group,
    )  # fmt: skip
    values = {"entropy": out.entropy, **_off_policy(state, behaviour, out.logprob, batch.judged, config)}
    if out.reference is not None:
        values["reference"] = batch.judged.apply(out.reference)
    state.finish_update(out.logprob)
    values = {name: value[own] for name, value in values.items()}
    return out.loss, _sums(own_batch.judged.num_tokens, values)


def fused_loss(
    student: CausalLM,
    student_hidden: Tensor,
    target: Target,
    batch: PackedBatch,
    config: Config,
    average: PositionAverage,
    plan: str = "auto",
    **options: Any,
) -> DistilLoss:
    """The library's op for this target, with the settings of a run; `options` are further ones of the op."""
    baseline: str | Tensor | None = config.baseline
    if config.baseline == "none" or config.credit_span == "none":
        baseline = None
    elif config.baseline == "moving_average":
        baseline = average.values(batch.lengths)
    options |= dict(
        student_bias=student.bias,
        vocab_size=student.vocab_size,
        temperature=config.temperature,
        logit_softcap=student.logit_softcap,
        student_logit_scale=student.logit_scale,
        tokens=batch.tokens,
        cu_seqlens=batch.cu_seqlens,
        cost=config.objective if config.objective in ("reverse_kl", "jsd") else config.cost,
        credit_span=config.credit_span,
        discount=config.discount,
        horizon=config.horizon,
        normalize_by_remaining=config.normalize_by_remaining,
        baseline=baseline,
        group_size=batch.group_size,
        teacher_ratio_clip=config.teacher_ratio_clip,
        credit_clip=config.credit_clip,
        credit_scale=config.credit_scale,
        vocab_group=student.vocab_group,
    )
    if isinstance(target, TopKTarget):
        return fused_topk_distil_loss(student_hidden, student.weight, target.ids, target.logprobs, **options)
    return fused_distil_loss(
        student_hidden, student.weight, target.states.to(student_hidden.dtype), target.weight,
        teacher_bias=target.bias, teacher_temperature=config.teacher_temperature,
        teacher_logit_softcap=target.logit_softcap, teacher_logit_scale=target.logit_scale,
        jsd_weight=config.jsd_weight, backend=config.backend, plan=plan, **options,
    )  # fmt: skip


def _off_policy(
    state: UpdateState, behaviour: Tensor | None, logprobs: Tensor, counts: TokenMask, config: Config
) -> dict[str, Tensor]:
    """How far the policy that sampled is from the student, [N], by its name in SUMMED.

    `mismatch` is the absolute difference of log-probs in the first update, to a server; `drift` is the difference
    later, to an older student too. `ratio` is that of the probabilities, and `ratio_tail` 1 where it is beyond the
    bounds of `ratio_bounds`: a mean near 1 may hide how many are.
    """
    if behaviour is None:
        return {}
    difference = counts.apply(behaviour - logprobs)
    ratio, (low, high) = (-difference).exp(), ratio_bounds(config)
    is_beyond = ((ratio < low) | (ratio > high)).to(ratio.dtype)
    values = {"ratio": counts.apply(ratio), "ratio_tail": is_beyond}
    return values | ({"mismatch": difference.abs()} if state.is_first else {"drift": difference})


def ratio_bounds(config: Config) -> tuple[float, float]:
    """Returns the bounds of an importance ratio beyond which it counts as far: those of the policy gradient's clip, or
    with a teacher alone `importance_clip` and its inverse."""
    if config.objective == "policy_gradient" or config.reward_weight or config.importance_clip is None:
        return 1.0 - POLICY_CLIP, 1.0 + POLICY_CLIP
    return 1.0 / max(1.0, config.importance_clip), max(1.0, config.importance_clip)


def _sums(num_tokens: int, values: dict[str, Tensor], sequence_teacher_logprob: Tensor | None = None) -> Sums:
    """The sums of values [N], by their names in SUMMED."""
    unknown = values["entropy"].new_full((), math.nan)
    totals = torch.stack([values.get(name, unknown).to(torch.float64).sum() for name in SUMMED])
    largest = values["mismatch"].max() if "mismatch" in values else None
    return Sums(num_tokens, totals, sequence_teacher_logprob, largest_mismatch=largest)
