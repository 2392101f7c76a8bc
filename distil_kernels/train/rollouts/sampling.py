"""Rollouts: completions sampled with transformers' generate, as token ids that are never decoded and encoded again.

The score term of the loss needs the true sampling distribution: the model's softmax at the loss's temperature, no
top-k, no top-p, no penalties. A model's own generation defaults are set aside while sampling. The stop token is part
of a completion; a completion cut by the length limit has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from distil_kernels.train.models.reading import Reader
from distil_kernels.train.models.shared_prompts import pad, read
from distil_kernels.train.rollouts.prompt_group import Rollout


@dataclass(frozen=True)
class Sampling:
    """Parameters of sampling."""

    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int | None = None
    """None samples from the whole vocabulary."""


Ends = Callable[[Sequence[int]], bool]
"""True if sampling stops after these tokens of a completion."""

Generate = Callable[[Sequence[list[int]], Sequence[int], Sampling, Ends | None], list[Rollout]]
"""(prompts, prompt_index, sampling, ends) -> one rollout per entry of prompt_index: `generate` of a model, or a
server's."""


@torch.no_grad()
def generate(
    lm: Reader,
    prompts: Sequence[list[int]],
    prompt_index: Sequence[int],
    sampling: Sampling,
    ends: Ends | None = None,
) -> list[Rollout]:
    """Samples one completion per entry of `prompt_index`, an index in `prompts`, with torch's global generator.

    A completion stops at a stop token, at the length limit, and where `ends` is true.
    """
    greedy = sampling.temperature == 0.0
    top_k = sampling.top_k or 0  # to transformers 0 is all, and None what the model's own settings say
    options = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k}
    stops = list(sampling.stop_ids)
    generation = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
        **options,
    )
    if lm.shares_prompts:
        ids, mask, cache = read(lm, prompts, prompt_index)
    else:
        ids, mask = pad([prompts[index] for index in prompt_index], lm.weight.device, left=True)
        cache = None
    # Defaults that the model brings along (top-k, penalties) would bend the distribution.
    defaults, lm.model.generation_config = lm.model.generation_config, GenerationConfig()
    try:
        out = lm.model.generate(
            ids,
            attention_mask=mask,
            generation_config=generation,
            stopping_criteria=StoppingCriteriaList([_Ending(ends, ids.shape[1])] if ends else []),
            synced_gpus=False,  # a sharded model is gathered here, and waits for no other process
            **lm.cached(cache),
        )
    finally:
        lm.model.generation_config = defaults
    stopping = set(stops)
    return [Rollout.sampled(until_stop(tokens, stopping, ends)) for tokens in out[:, ids.shape[1] :].tolist()]


class _Ending(StoppingCriteria):
    """Stops the rows whose tokens from `start` on satisfy `ends`."""

    def __init__(self, ends: Ends, start: int) -> None:
        self._ends, self._start = ends, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self._start :].tolist()
        return torch.tensor([self._ends(tokens) for tokens in rows], device=input_ids.device)


def until_stop(tokens: list[int], stops: set[int], ends: Ends | None = None) -> list[int]:
    """The tokens up to and including the first one that is a stop token or satisfies `ends`."""
    for end, token in enumerate(tokens, 1):
        if token in stops or (ends and ends(tokens[:end])):
            return tokens[:end]
    return tokens
