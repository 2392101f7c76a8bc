"""The clipped surrogate of a policy-gradient loss (PPO, arXiv 1707.06347; two bounds as in DAPO, arXiv 2503.14476), and
the penalty to a reference policy (GRPO's estimator k3, arXiv 2402.03300).

surrogate = -min(ratio A, clip(ratio) A),     ratio = S[y] / S_old[y]
penalty   = q - log q - 1,                    q = R[y] / S[y]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Policy(NamedTuple):
    """Settings of a policy-gradient loss."""

    clip_low: float | None
    """For negative advantages the ratio is clipped at 1 - clip_low; None for no bound."""
    clip_high: float | None
    """For positive advantages the ratio is clipped at 1 + clip_high; None for no bound."""
    entropy_weight: float
    """Weight of the entropy bonus."""
    reference_weight: float = 0.0
    """Weight of the penalty of `fused_policy_loss`; `Terms` has its own."""

    def surrogate(self, logprob: Tensor, advantages: Tensor, old_logprobs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the surrogate [R] and its derivative by the log-prob.

        Args:
            logprob, advantages: [R].
            old_logprobs: [R] under the policy that sampled; None for `logprob` itself, held constant.
        """
        advantages = advantages.to(logprob.dtype)
        ratio = (logprob - (logprob if old_logprobs is None else old_logprobs.to(logprob.dtype))).exp()
        low = 0.0 if self.clip_low is None else 1.0 - self.clip_low
        high = math.inf if self.clip_high is None else 1.0 + self.clip_high
        clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
        loss = -torch.where(clipped, ratio.clamp(low, min(high, torch.finfo(ratio.dtype).max)), ratio) * advantages
        return loss, torch.where(clipped, 0.0, loss)


def penalty(logprob: Tensor, reference_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the penalty [R] to a reference policy and its derivative by the log-prob."""
    log_ratio = reference_logprobs.to(logprob.dtype) - logprob
    return log_ratio.expm1() - log_ratio, -log_ratio.expm1()
