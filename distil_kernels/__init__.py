"""Distillation from a teacher's whole distribution, without [tokens, vocab] logits.

    fused_forward_ce         forward cross-entropy from hidden states and heads
    fused_forward_kl         forward KL
    fused_reverse_kl         reverse KL
    fused_jsd                generalised Jensen-Shannon divergence
    fused_topk_ce            forward cross-entropy to a teacher of which only some tokens' log-probs are known
    fused_distil_loss        DistIL's sequence-level loss on packed sequences
    fused_topk_distil_loss   the same to a teacher of which only some tokens' log-probs are known
    fused_policy_loss        clipped policy-gradient loss, without a teacher
    token_stats              cross-entropy, KL, log-probs, entropies of each token
    token_logprobs           log-probs and entropies of each token, without a teacher
    explain                  how a call of one of these is computed: plan, rows, back end, bytes, and why

The losses as torch.nn modules: ForwardCELoss, ForwardKLLoss, ReverseKLLoss, JSDLoss, TopKCELoss, SequenceDistilLoss,
TopKSequenceDistilLoss, ClippedPolicyLoss.

Their results: ForwardCE, DistilLoss, PolicyLoss, TokenStats, TokenLogprobs, Explanation.

They are imported, and torch with them, when one of them is first asked for: the trainer's --help is there at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distil_kernels.distil import DistilLoss, fused_distil_loss
    from distil_kernels.explanation import Explanation, explain
    from distil_kernels.losses import ForwardCE, fused_forward_ce, fused_forward_kl, fused_jsd, fused_reverse_kl
    from distil_kernels.modules import (
        ClippedPolicyLoss,
        ForwardCELoss,
        ForwardKLLoss,
        JSDLoss,
        ReverseKLLoss,
        SequenceDistilLoss,
        TopKCELoss,
        TopKSequenceDistilLoss,
    )
    from distil_kernels.policy import PolicyLoss, fused_policy_loss
    from distil_kernels.token_statistics import TokenLogprobs, TokenStats, token_logprobs, token_stats
    from distil_kernels.topk import fused_topk_ce, fused_topk_distil_loss

__version__ = "0.1.0"

__all__ = [
    "ClippedPolicyLoss",
    "DistilLoss",
    "Explanation",
    "ForwardCE",
    "ForwardCELoss",
    "ForwardKLLoss",
    "JSDLoss",
    "PolicyLoss",
    "ReverseKLLoss",
    "SequenceDistilLoss",
    "TokenLogprobs",
    "TokenStats",
    "TopKCELoss",
    "TopKSequenceDistilLoss",
    "explain",
    "fused_distil_loss",
    "fused_forward_ce",
    "fused_forward_kl",
    "fused_jsd",
    "fused_policy_loss",
    "fused_reverse_kl",
    "fused_topk_ce",
    "fused_topk_distil_loss",
    "token_logprobs",
    "token_stats",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distil_kernels import distil, explanation, losses, modules, policy, token_statistics, topk

    for module in (distil, explanation, losses, modules, policy, token_statistics, topk):
        globals().update({public: vars(module)[public] for public in __all__ if public in vars(module)})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
