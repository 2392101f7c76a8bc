"""The policy-gradient loss: reinforcement learning without a teacher, straight from hidden states and the head.

    fused_policy_loss   -min(r A, clip(r) A) - entropy_weight H(S) + reference_weight (q - log q - 1)
                        3 products (2 with a frozen head)

r = S[y] / S_old[y], q = R[y] / S[y] of a reference policy R. The weight of grad log S[y] follows from the row itself,
so the gradient is formed in the forward pass, as in `losses`. Source of the clipped loss: PPO (arXiv 1707.06347); two
bounds as in DAPO (arXiv 2503.14476); the penalty is GRPO's (arXiv 2402.03300). Left out: ratios of whole sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from distil_kernels.backends import Statistic
from distil_kernels.engine.call import Call
from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.placements import on_many_devices
from distil_kernels.engine.plan import Plan
from distil_kernels.engine.policy import Policy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PolicyLoss(NamedTuple):
    """Result of `fused_policy_loss`."""

    loss: Tensor
    """Scalar."""
    logprob: Tensor
    """[...], detached: log S[y]."""
    entropy: Tensor
    """[...], detached: H(S)."""
    clipped: Tensor
    """[...] bool: the ratio is where the token gets no gradient from its advantage."""
    reference: Tensor | None
    """[...], detached: q - log q - 1; None without a reference."""


@on_many_devices
def fused_policy_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    tokens: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    entropy_weight: float = 0.0,
    reference_logprobs: Tensor | None = None,
    reference_weight: float | None = None,
    student_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    detach_hidden: bool = False,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> PolicyLoss:
    """Clipped policy-gradient loss of sampled tokens (PPO's, and GRPO's with group-normalised advantages).

    Args:
        student_hidden: [..., D] last hidden states.
        student_weight: [V, D] lm_head.
        tokens: [...] int64, sampled tokens.
        advantages: [...] float; they get no gradient.
        old_logprobs: [...] float, log-probs under the policy that sampled; None: this one, so every ratio is 1 and
            the gradient is that of -advantages * logprob.
        clip_low, clip_high: the ratio stops at 1 - clip_low for negative and at 1 + clip_high for positive
            advantages; None for no bound.
        entropy_weight: of an entropy bonus.
        reference_logprobs: [...] float, log R[y] of a reference policy: adds reference_weight * (q - log q - 1) with
            q = R[y] / S[y], as in `fused_distil_loss`.
        reference_weight: default 1.
        token_weight: [...] float, multiplies each token's loss.
        normalizer: denominator, as that of the mean in `fused_forward_ce`.
        Others, and what is raised: as in `fused_forward_ce`.

    Returns:
        PolicyLoss. Only `loss` is differentiable.
    """
    checks = ArgumentChecks("fused_policy_loss")
    scalings = checks.scalings(temperature, logit_softcap, student_logit_scale)
    call = Call(
        checks, scalings, backend, student_hidden, student_weight, student_bias=student_bias, token_mask=token_mask,
        token_weight=token_weight, vocab_size=vocab_size, vocab_group=vocab_group,
        sequence_parallel=sequence_parallel, detach_hidden=detach_hidden, has_teacher=False,
    )  # fmt: skip
    checks.rows("tokens", tokens, student_hidden, "int64", optional=False)
    checks.rows("advantages", advantages, student_hidden, "float", optional=False)
    checks.rows("old_logprobs", old_logprobs, student_hidden, "float")
    if clip_low is not None:
        checks.between("clip_low", clip_low, 0.0, 1.0)
    if clip_high is not None:
        checks.between("clip_high", clip_high, 0.0, float("inf"))
    checks.between("entropy_weight", entropy_weight, -float("inf"), float("inf"))
    checks.rows("reference_logprobs", reference_logprobs, student_hidden, "float")
    if reference_weight is not None:
        checks.between("reference_weight", reference_weight, -float("inf"), float("inf"))
        if reference_logprobs is None:
            checks.value_error("reference_weight is given and reference_logprobs is None, expected both")
    normalizer = checks.normalizer(normalizer, student_hidden)
    result = call.policy_loss(
        Policy(
            None if clip_low is None else float(clip_low),
            None if clip_high is None else float(clip_high),
            float(entropy_weight),
            1.0 if reference_weight is None else float(reference_weight),
        ),
        call.denominator(normalizer),
        tokens=tokens.reshape(-1),
        advantages=advantages.detach().reshape(-1),
        old_logprobs=None if old_logprobs is None else old_logprobs.detach().reshape(-1),
        reference_logprobs=None if reference_logprobs is None else reference_logprobs.detach().reshape(-1),
        plan=plan,
    )
    rows = result.statistics[Statistic.LOGPROB], result.statistics[Statistic.ENTROPY], result.clipped, result.penalty
    logprob, entropy, clipped, penalty = (row.detach().reshape(student_hidden.shape[:-1]) for row in rows)
    return PolicyLoss(result.total, logprob, entropy, clipped, None if reference_logprobs is None else penalty)
