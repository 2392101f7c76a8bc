"""Distillation from a teacher's whole distribution, without [tokens, vocab] logits.

fused_forward_ce     forward cross-entropy from hidden states and heads
fused_reverse_kl     reverse KL
fused_jsd            generalised Jensen-Shannon divergence
fused_topk_ce        forward cross-entropy to a teacher of which only some tokens' log-probs are known
fused_distil_loss    DistIL's sequence-level loss on packed sequences
fused_topk_distil_loss   the same to a teacher of which only some tokens' log-probs are known
fused_policy_loss    clipped policy-gradient loss, without a teacher
token_stats          cross-entropy, KL, log-probs, entropies per token
token_logprobs       log-probs and entropies per token, without a teacher
"""

from distil_kernels.functional import (
    DistilLoss,
    TokenStats,
    fused_distil_loss,
    fused_forward_ce,
    token_stats,
)
from distil_kernels.losses import fused_jsd, fused_reverse_kl
from distil_kernels.policy import PolicyLoss, TokenLogprobs, fused_policy_loss, token_logprobs
from distil_kernels.topk import fused_topk_ce, fused_topk_distil_loss

__version__ = "0.1.0"

__all__ = [
    "DistilLoss",
    "PolicyLoss",
    "TokenLogprobs",
    "TokenStats",
    "fused_distil_loss",
    "fused_forward_ce",
    "fused_jsd",
    "fused_policy_loss",
    "fused_reverse_kl",
    "fused_topk_ce",
    "fused_topk_distil_loss",
    "token_logprobs",
    "token_stats",
]
