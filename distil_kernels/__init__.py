"""Distillation from a teacher's whole distribution, without [tokens, vocab] logits.

fused_forward_ce     forward cross-entropy from hidden states and heads
token_stats          cross-entropy, KL, log-probs, entropies per token
fused_distil_loss    DistIL's sequence-level loss on packed sequences
"""

from distil_kernels.functional import (
    DistilLoss,
    TokenStats,
    fused_distil_loss,
    fused_forward_ce,
    token_stats,
)

__version__ = "0.1.0"

__all__ = ["DistilLoss", "TokenStats", "fused_distil_loss", "fused_forward_ce", "token_stats"]
