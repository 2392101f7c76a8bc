"""Prompts read once: the prefix shared by all of them once per batch, each prompt once for all its rollouts.

With P prompt tokens and G rollouts per prompt the body reads about P/G prompt tokens per rollout instead of P, for
rollouts, student and teacher alike, and with exact gradients: keys and values are ordinary tensors of the graph, which
expanding to the rollouts only indexes.

    shared prefix [1, F]  ->  rest of each prompt [U, R], padded  ->  last prompt token and completion [B, C], padded

`reading` has the other ways, for models whose cache is more than plain keys and values, and says when this one pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from distil_kernels.hf import CausalLM


class Context(NamedTuple):
    """The prompts of B completions, read up to, not including, their last token."""

    ids: Tensor
    """[B, P] int64, padded in the middle and ending in the last prompt token (which is not in the cache)."""
    mask: Tensor
    """[B, P] int64, 0 at padding."""
    cache: DynamicCache


def read(lm: CausalLM, prompts: Sequence[list[int]], prompt_index: Sequence[int], cache: Any = None) -> Context:
    """Reads each of the U different prompts once and expands to B rows; row b continues prompts[prompt_index[b]].

    Args:
        cache: an empty one; None for that of transformers.
    """
    device = lm.weight.device
    shared = common_prefix(prompts)

    # The prefix that all prompts share, once for all.
    cache = DynamicCache(config=lm.model.config) if cache is None else cache
    if shared:
        lm.hidden(torch.tensor([prompts[0][:shared]], device=device), cache=cache)
        cache.batch_repeat_interleave(len(prompts))

    # What each prompt has after it, once for all its completions.
    suffix, suffix_mask = pad([prompt[shared:-1] for prompt in prompts], device)
    mask = torch.cat([suffix_mask.new_ones(len(prompts), shared), suffix_mask], 1)
    if suffix.shape[1]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        lm.hidden(suffix, attention_mask=mask, position_ids=positions, cache=cache)

    # A row for each completion.
    index = torch.tensor(prompt_index, device=device)
    if shared or suffix.shape[1]:
        cache.batch_select_indices(index)
    prefix = torch.tensor(prompts[0][:shared], device=device, dtype=torch.int64).expand(len(prompts), -1)
    last = torch.tensor([prompt[-1:] for prompt in prompts], device=device)
    ids = torch.cat([prefix, suffix, last], 1)
    return Context(ids[index], torch.cat([mask, torch.ones_like(last)], 1)[index], cache)


def completion_states(
    lm: CausalLM, prompts: Sequence[list[int]], prompt_index: Sequence[int], completions: Sequence[list[int]]
) -> Tensor:
    """Returns what `reading.Reader.states` does, with prompts read once."""
    context = read(lm, prompts, prompt_index)
    last = context.ids[:, -1].tolist()
    inputs = [[token, *tokens[:-1]] for token, tokens in zip(last, completions, strict=True)]
    ids, mask = pad(inputs, context.ids.device)
    full_mask = torch.cat([context.mask[:, :-1], mask], 1)
    positions = (full_mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    hidden = lm.hidden(ids, attention_mask=full_mask, position_ids=positions, cache=context.cache)
    return hidden[mask > 0]


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Returns the number of tokens that all prompts begin with; no prompt's last token is one of them."""
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def pad(lists: Sequence[list[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Returns token ids [B, L] and their mask [B, L], both int64; padding is token 0, at the right or the `left`."""
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
