"""DistIL's sequence-level loss: packed rollouts, with credit of early tokens for later disagreement.

    sum_t [ w_t grad cost_t + a_t grad log S[y_t] ] / normalizer,     a_t = scale * (G_t - b_t)

The gradient is formed in the forward pass, in chunks of rows in reverse time, so that G_t is known when row t comes up.
The costs are those of `losses`; credit is defined in `engine.credit`; the formulas are in docs/mathematics.md. Rewards,
labels, a z-loss, an entropy bonus and a penalty to a reference policy (`engine.terms`) are in the same gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from distil_kernels.backends import Cost, Statistic
from distil_kernels.engine.call import Call
from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.custom_ops import ScalarLoss
from distil_kernels.engine.placements import on_many_devices
from distil_kernels.engine.plan import Plan
from distil_kernels.engine.term_checks import CLIP, checked_terms
from distil_kernels.engine.terms import Term, TermInputs
from distil_kernels.token_statistics import TokenStats, from_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

COSTS = {
    "ce": Statistic.FORWARD_CE,
    "kl": Statistic.FORWARD_KL,
    "reverse_kl": Statistic.REVERSE_KL,
    "jsd": Statistic.JSD,
}


class TermValues(NamedTuple):
    """What the terms beside the cost are for each token [N], without their weights, detached.

    0 for tokens that do not count; None for a term whose tensors were not given.
    """

    policy: Tensor | None
    """-min(r A, clip(r) A)."""
    clipped: Tensor | None
    """bool: the ratio is where the token gets no gradient from its advantage."""
    label: Tensor | None
    """Cross-entropy of the label, smoothed; 0 where there is none."""
    reference: Tensor | None
    """q - log q - 1."""
    z_loss: Tensor
    """Squared logsumexp of the logits."""
    entropy: Tensor
    """H(S), of which the loss has the negative."""


class DistilLoss(NamedTuple):
    """Result of `fused_distil_loss` and `fused_topk_distil_loss`."""

    loss: Tensor
    """Scalar; its gradient is the sequence-level gradient."""
    stats: TokenStats
    """Per token [N], detached."""
    cost: Tensor
    """[N], detached: what each token costs, without its weight."""
    credit: Tensor
    """[N], detached: the weight a_t that grad log S[y_t] got (before the division by `normalizer`)."""
    cost_to_go: Tensor
    """[N], detached: G_t, from which baselines for later batches can be made; 0 with span "none"."""
    dropped: Tensor
    """[N], detached: share of the sum of magnitudes of the row's logit gradient that `gradient_threshold` left out."""
    terms: TermValues | None
    """What the loss has besides the cost; None where that is nothing."""


@on_many_devices
def fused_distil_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float | None = None,
    cost: str = "ce",
    jsd_weight: float = 0.5,
    credit_span: str = "future",
    discount: float = 1.0,
    horizon: int | None = None,
    normalize_by_remaining: bool = False,
    baseline: str | Tensor | None = None,
    group_size: int | None = None,
    teacher_ratio_clip: float | None = None,
    credit_clip: float | None = None,
    credit_scale: float = 1.0,
    behaviour_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    distil_weight: float | Tensor = 1.0,
    advantages: Tensor | None = None,
    policy_weight: float | None = None,
    old_logprobs: Tensor | None = None,
    clip_low: float | None = CLIP,
    clip_high: float | None = CLIP,
    labels: Tensor | None = None,
    label_weight: float | None = None,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    entropy_weight: float = 0.0,
    reference_logprobs: Tensor | None = None,
    reference_weight: float | None = None,
    normalizer: float | Tensor | None = None,
    gradient_threshold: float = 0.0,
    detach_hidden: bool = False,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> DistilLoss:
    """DistIL's sequence-level loss on sampled sequences: sum of token costs, credited back to earlier tokens.

    The gradient is sum_t [ w_t grad cost_t + a_t grad log S[y_t] ] / normalizer with
    a_t = credit_scale * q_t * (G_t - b_t), q_t = 1 and G_t the discounted cost-to-go (`engine.credit`). With the
    defaults it is the unbiased gradient of E_{y ~ S}[sum_t cost_t] when the teacher's feedback does not depend on y.

    Args:
        student_hidden: [N, D] packed rows, the hidden states that predict `tokens`; others as in `fused_forward_ce`.
        tokens: [N] int64, sampled from the student at `temperature` with nothing cut off. None with credit_span "none"
            and no `behaviour_logprobs`: a token-wise loss, with `stats` but for log-probs from the same pass.
        cu_seqlens: [B + 1] int32 or int64, borders of the sequences. Keep it on the CPU. None with credit_span "none":
            all rows are one sequence.
        token_mask: [N] bool or integer. Other rows (a tool's output) have neither cost nor credit, but keep their
            position.
        token_weight: [N] float, w_t: multiplies the token's cost, in the sum and in the credit of earlier tokens, and
            all its other terms.
        cost: "ce" for H(T, S) (the paper) or "kl" for KL(T || S): the same local gradient, another credit; "reverse_kl"
            for KL(S || T); "jsd" for b KL(T || M) + (1 - b) KL(S || M) with M = b T + (1 - b) S.
        jsd_weight: b, between 0 and 1; its ends are the costs "kl" and "reverse_kl" and not limits of "jsd".
        credit_span: "none" (token-wise gradient), "future" (i > t), or "sequence": the whole sequence's cost for
            every token, exact when the feedback was computed from the rollout itself.
        discount: of the cost-to-go per token, 0 to 1; below 1 is biased. "sequence" takes 1 only.
        horizon: costs more than this many tokens on do not count, at least 1; biased. Not with "sequence".
        normalize_by_remaining: divides the cost-to-go by the number of counted tokens that it sums over, discounted
            alike: a mean cost per token, which does not grow with the length; biased. Not with "sequence".
        baseline: None; "leave_one_out": mean over the group's other sequences (without those that are masked whole), of
            their cost-to-go at the same position (0 after their end) or with "sequence" of their whole cost, unbiased;
            "position_mean": mean over all sequences alive there, its own included (with n of them the expected credit
            is (n - 1) / n of what it should be); or [N] values, unbiased where they do not depend on the row's own
            rollout.
        group_size: rollouts per prompt, consecutive in the packing; needed by "leave_one_out" (at least 2).
        teacher_ratio_clip: q_t is min(teacher_ratio_clip, T[y_t] / S[y_t]), without gradient: a token is credited as
            often as the teacher would choose it, and one that the teacher rules out, an early end say, gains nothing
            by the costs that it saves (docs/theory.md); biased. Of a token that a top-K teacher does not name it is 0.
        credit_clip: bound of |a_t|, after baseline and factors; biased.
        credit_scale: multiplies the credit; 1 is the exact gradient.
        behaviour_logprobs: [N] float, for rollouts older than the student: log-probs of `tokens` under the policy that
            sampled them, at its temperature. Both terms of row t in the gradient (and `credit`) are multiplied by
            rho_t = S[y_t] / behaviour[y_t], itself without gradient; costs inside G_t and the loss's value are not.
            That is exact for sequences of one token and, with "future", where the policies differ at the last token
            only. Otherwise it is biased: states are met as often as the older policy met them, and with "sequence"
            later tokens are drawn as it drew them. An exact weight is a product over the tokens up to each cost (the
            whole sequence with "sequence"), whose variance grows with the length.
        importance_clip: bound of rho_t; biased. Without `behaviour_logprobs` an error.
        distil_weight: multiplies every token's cost, in the sum and in the credit of earlier tokens: a number, or a
            float tensor [], [B] (one for each sequence) or [N]. It may be 0, and may route: rewards for some rollouts,
            distillation for others.
        advantages: [N] or [B] float, A_t: adds policy_weight * -min(r_t A_t, clip(r_t) A_t) with
            r_t = S[y_t] / old[y_t], as `fused_policy_loss` does. With as many sequences as rows they are taken as [N].
        policy_weight: default 1.
        old_logprobs: [N] float, log-probs under the policy that sampled; None: this one, so every ratio is 1 and the
            gradient is that of -A_t log S[y_t]. Apart from `behaviour_logprobs`, which weigh cost and credit.
        clip_low, clip_high: the ratio stops at 1 - clip_low for negative and at 1 + clip_high for positive advantages;
            None for no bound.
        labels: [N] int64, -100 for none: adds label_weight * ((1 - e) -log S[l] + e mean_v -log S[v]) with e the
            label_smoothing, torch's cross_entropy at the student's temperature. Labels need not be the tokens.
        label_weight: default 1.
        label_smoothing: 0 to 1. Above 0 the value needs one more read of the logits.
        z_loss_weight: adds z_loss_weight * logsumexp(s)^2 (PaLM).
        entropy_weight: of an entropy bonus: adds -entropy_weight * H(S).
        reference_logprobs: [N] float, log R[y_t] of a reference policy: adds reference_weight * (q - log q - 1) with
            q = R[y_t] / S[y_t] (GRPO's estimator k3). For tokens from S its mean is KL(S || R), and its gradient's mean
            that of KL(R || S).
        reference_weight: default 1.
        normalizer: denominator of loss and gradient, as in `fused_forward_ce`; default B.
        gradient_threshold: as in `fused_forward_ce`.

    Returns:
        DistilLoss. Only `loss` is differentiable; its value is sum_t w_t (distil_weight cost_t + terms) / normalizer.
        The terms are of the student's distribution as the cost has it, at its temperature, and take no further product.

    Raises:
        As `fused_forward_ce`; ValueError for token ids outside the vocabulary (checked on the CPU) or borders that
        do not cover the rows.
    """
    checks = ArgumentChecks("fused_distil_loss")
    scalings = checks.scalings(
        temperature, logit_softcap, student_logit_scale, teacher_temperature, teacher_logit_softcap, teacher_logit_scale
    )
    call = Call(
        checks, scalings, backend, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, token_mask=token_mask, token_weight=token_weight,
        vocab_size=vocab_size, vocab_group=vocab_group, sequence_parallel=sequence_parallel,
        detach_hidden=detach_hidden,
    )  # fmt: skip
    checks.packed(student_hidden, cu_seqlens, optional=True)
    checks.rows("tokens", tokens, student_hidden, "int64")
    checks.one_of("cost", cost, tuple(COSTS))
    checks.share("jsd_weight", jsd_weight)
    normalizer = checks.normalizer(normalizer, student_hidden)
    checks.threshold("gradient_threshold", gradient_threshold)
    credit = checks.credit(
        student_hidden, credit_span, baseline, group_size, discount, horizon, normalize_by_remaining,
        teacher_ratio_clip, credit_clip, credit_scale, importance_clip, behaviour_logprobs,
    )  # fmt: skip
    for name, tensor in (("tokens", tokens), ("cu_seqlens", cu_seqlens)):
        if tensor is None and credit_span != "none":
            checks.value_error(
                f"{name} is None with credit_span={credit_span!r}, expected a tensor, or the span 'none'"
            )
    if tokens is None and behaviour_logprobs is not None:
        checks.value_error("tokens is None with behaviour_logprobs, expected the tokens that these belong to")
    terms = checked_terms(
        checks, student_hidden, tokens, cu_seqlens, distil_weight=distil_weight, advantages=advantages,
        policy_weight=policy_weight, old_logprobs=old_logprobs, clip_low=clip_low, clip_high=clip_high, labels=labels,
        label_weight=label_weight, label_smoothing=label_smoothing, z_loss_weight=z_loss_weight,
        entropy_weight=entropy_weight, reference_logprobs=reference_logprobs, reference_weight=reference_weight,
    )  # fmt: skip
    num_sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    denominator = call.denominator(normalizer, num_sequences)
    result = call.scalar_loss(
        Cost(COSTS[cost], jsd_weight), denominator, tokens=tokens, cu_seqlens=cu_seqlens, credit=credit,
        terms=terms, gradient_threshold=gradient_threshold, plan=plan,
    )  # fmt: skip
    return distil_result(result, COSTS[cost], terms, has_tokens=tokens is not None)


def distil_result(result: ScalarLoss, cost: Statistic, terms: TermInputs, *, has_tokens: bool = True) -> DistilLoss:
    """Returns what users get of a sequence-level loss on packed rows."""
    statistics = result.statistics.detach()
    weights, cost_to_go = result.credit.detach().unbind()
    stats = from_statistics(statistics, statistics.shape[1:], has_tokens=has_tokens)
    values = None if terms.settings is None else _term_values(result.terms.detach(), stats.entropy, terms)
    return DistilLoss(result.total, stats, statistics[cost], weights, cost_to_go, result.dropped, values)


def _term_values(values: Tensor, entropy: Tensor, terms: TermInputs) -> TermValues:
    tensors = terms.tensors
    has_policy = tensors.advantages is not None
    return TermValues(
        policy=values[Term.POLICY] if has_policy else None,
        clipped=values[Term.CLIPPED] != 0 if has_policy else None,
        label=None if tensors.labels is None else values[Term.LABEL],
        reference=None if tensors.reference_logprobs is None else values[Term.REFERENCE],
        z_loss=values[Term.Z_LOSS],
        entropy=entropy,
    )
