"""Prompts read once: the prefix shared by all of them once per batch, each prompt once for all its rollouts.

With P prompt tokens and G rollouts per prompt the body reads about P/G prompt tokens per rollout instead of P, for
rollouts, student and teacher alike, and with exact gradients: keys and values are ordinary tensors of the graph, which
expanding to the rollouts only indexes.

    shared prefix [1, F]  ->  rest of each prompt [U, R], padded  ->  last prompt token and completion [B, C], padded

A model whose cache is more than plain keys and values (sliding windows, recurrent layers) reads whole rows instead:
the same results, `shares_prompts` says which.

Left out: all rows packed into one without padding. With a block-diagonal mask on one core, SmolLM2 forward and backward
took 11.3 s instead of 21.2 (shared prompts) for 8 completions of 16 to 256 tokens, but 13.6 s instead of 5.9 for 16 of
4 to 16 tokens behind 60 of prompt: packing reads prompts once per rollout, and its attention grows with the square of
the whole batch. It is for flash-attn's varlen kernels, and for long answers of very different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from distil_kernels.hf import CausalLM


class Context(NamedTuple):
    """B prompts that were read up to, not including, their last token."""

    cache: DynamicCache
    ids: Tensor
    """[B, P] int64, padded in the middle and ending in the last prompt token (which is not in the cache)."""
    mask: Tensor
    """[B, P] int64, 0 at padding."""


def shares_prompts(lm: CausalLM) -> bool:
    """Whether the model's cache can be read once and expanded (activation checkpointing would drop it)."""
    if any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules()):
        return False
    cache = DynamicCache(config=lm.model.config)
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def read(lm: CausalLM, prompts: Sequence[list[int]], rows: Sequence[int]) -> Context:
    """Reads each of the U different prompts once and expands to B rows; row b continues prompts[rows[b]]."""
    device = lm.weight.device
    shared = common_prefix(prompts)
    cache = DynamicCache(config=lm.model.config)
    if shared:
        lm.hidden(torch.tensor([prompts[0][:shared]], device=device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    rest, rest_mask = pad([prompt[shared:-1] for prompt in prompts], device)
    mask = torch.cat([rest_mask.new_ones(len(prompts), shared), rest_mask], 1)
    if rest.shape[1]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        lm.hidden(rest, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    index = torch.tensor(rows, device=device)
    if shared or rest.shape[1]:
        cache.batch_select_indices(index)
    prefix = torch.tensor(prompts[0][:shared], device=device, dtype=torch.int64).expand(len(prompts), -1)
    last = torch.tensor([prompt[-1:] for prompt in prompts], device=device)
    ids = torch.cat([prefix, rest, last], 1)
    return Context(cache, ids[index], torch.cat([mask, torch.ones_like(last)], 1)[index])


def completion_hidden(
    lm: CausalLM, prompts: Sequence[list[int]], rows: Sequence[int], completions: Sequence[list[int]], share: bool
) -> Tensor:
    """Hidden states [N, D] that predict each completion token, packed completion after completion.

    Args:
        prompts: U different prompts.
        rows: prompt of each of the B completions.
        completions: B non-empty lists of token ids.
        share: read prompts once (`shares_prompts`) or whole rows.
    """
    device = lm.weight.device
    if not share:
        whole, mask = pad([prompts[row] + done[:-1] for row, done in zip(rows, completions, strict=True)], device)
        hidden = lm.hidden(whole, attention_mask=mask, use_cache=False)
        starts = torch.tensor([len(prompts[row]) - 1 for row in rows], device=device)
        positions = torch.arange(whole.shape[1], device=device)
        return hidden[(mask > 0) & (positions >= starts[:, None])]
    context = read(lm, prompts, rows)
    last = context.ids[:, -1].tolist()
    ids, mask = pad([[token, *done[:-1]] for token, done in zip(last, completions, strict=True)], device)
    whole_mask = torch.cat([context.mask[:, :-1], mask], 1)
    positions = (whole_mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    hidden = lm.hidden(
        ids, attention_mask=whole_mask, position_ids=positions, past_key_values=context.cache, use_cache=True
    )
    return hidden[mask > 0]


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Number of tokens that all prompts begin with, each prompt's last token not counted."""
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def pad(lists: Sequence[list[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and mask [B, L], both int64; padding is token 0."""
    width = max(map(len, lists))
    gaps = [[0] * (width - len(tokens)) for tokens in lists]
    ones = [[1] * len(tokens) for tokens in lists]
    if left:
        ids = [gap + tokens for tokens, gap in zip(lists, gaps, strict=True)]
        mask = [gap + one for one, gap in zip(ones, gaps, strict=True)]
    else:
        ids = [tokens + gap for tokens, gap in zip(lists, gaps, strict=True)]
        mask = [one + gap for one, gap in zip(ones, gaps, strict=True)]
    shape = (len(lists), width)
    return (
        torch.tensor(ids, device=device, dtype=torch.int64).reshape(shape),
        torch.tensor(mask, device=device, dtype=torch.int64).reshape(shape),
    )
