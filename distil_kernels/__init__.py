"""Distillation from a teacher's whole distribution, without [tokens, vocab] logits.

fused_forward_ce     forward cross-entropy from hidden states and heads
token_stats          cross-entropy, KL, log-probs, entropies per token
fused_distil_loss    DistIL's sequence-level loss on packed sequences
fused_topk_ce        forward cross-entropy to a teacher of which only some tokens' log-probs are known
"""

from distil_kernels.functional import (
    DistilLoss,
    TokenStats,
    fused_distil_loss,
    fused_forward_ce,
    token_stats,
)
from distil_kernels.topk import fused_topk_ce

__version__ = "0.1.0"

__all__ = ["DistilLoss", "TokenStats", "fused_distil_loss", "fused_forward_ce", "fused_topk_ce", "token_stats"]
