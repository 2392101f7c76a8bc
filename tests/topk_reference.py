"""The loss to a teacher known by its top K log-probs, by its definition on dense logits."""

from __future__ import annotations

import torch


def teacher_topk(num_rows, vocab_size, num_named, generator, num_padding=0):
    """Ids and float64 log-probs of the largest entries of random distributions; the last ones unknown."""
    logprobs = (3 * torch.randn(num_rows, vocab_size, generator=generator).double()).log_softmax(-1)
    top = logprobs.topk(num_named)
    ids, values = top.indices.clone(), top.values.clone()
    if num_padding:
        ids[:, -num_padding:], values[:, -num_padding:] = -1, torch.nan
    return ids, values


def dense(hidden, weight, ids, logprobs, bias=None, temperature=1.0, softcap=None, row_weight=None):
    """Sum over rows of weight * CE in the dtype of the inputs, row by row."""
    total = hidden.new_zeros(())
    for row in range(len(hidden)):
        if row_weight is not None and row_weight[row] == 0:
            continue
        logits = hidden[row] @ weight.T + (0 if bias is None else bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        log_s = (logits / temperature).log_softmax(-1)
        known = ids[row] >= 0
        named, probs = ids[row][known], logprobs[row][known].to(hidden.dtype).exp()
        others = torch.ones(len(weight), dtype=torch.bool)
        others[named] = False
        ce = -(probs * log_s[named]).sum()
        if others.any():
            ce = ce - (1 - probs.sum()).clamp(min=0) * log_s[others].logsumexp(0)
        total = total + (1 if row_weight is None else row_weight[row]) * ce
    return total
