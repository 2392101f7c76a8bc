"""Rollouts: completions as token ids that are never decoded and encoded again.

The score term of the loss needs the true sampling distribution: the model's softmax at the loss's temperature, no
top-k, no top-p, no penalties. A model's own generation defaults are set aside while sampling. The stop token is part
of a completion; a completion cut by the length limit has none.

A token is drawn as torch.multinomial draws it, argmax of probs / noise. The noise is drawn for all rows at every step,
also for those that are finished, and so a row that leaves the batch changes no token of the others, and the tokens
are those of transformers' generate. That samples for models whose prompts cannot be read once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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
    greedy_rows: Collection[int] = ()
    """Completions that are greedy whatever the temperature is, by their place in `prompt_index`."""

    @property
    def warpers(self) -> LogitsProcessorList:
        """What bends the logits before the softmax."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


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
    rows = range(len(prompt_index))
    greedy = {row for row in rows if sampling.temperature == 0.0 or row in sampling.greedy_rows}
    if lm.shares_prompts:
        completions = _sampled(lm, prompts, prompt_index, sampling, greedy, ends)
    else:
        completions = [[] for _ in rows]
        for part in ([row for row in rows if row not in greedy], sorted(greedy)):
            index = [prompt_index[row] for row in part]
            found = _by_transformers(lm, [prompts[i] for i in index], sampling, part[0] in greedy, ends) if part else []
            for row, tokens in zip(part, found, strict=True):
                completions[row] = tokens
    return [Rollout.sampled(tokens) for tokens in completions]


def _sampled(
    lm: Reader,
    prompts: Sequence[list[int]],
    prompt_index: Sequence[int],
    sampling: Sampling,
    greedy: Collection[int],
    ends: Ends | None,
) -> list[list[int]]:
    """The completions of a model that reads each prompt once; rows that are finished leave the batch."""
    stops, device = set(sampling.stop_ids), lm.weight.device
    context = read(lm, prompts, prompt_index, lm.new_cache())
    mask, cache, latest = context.mask, context.cache, context.ids[:, -1]
    completions: list[list[int]] = [[] for _ in prompt_index]
    rows = list(range(len(completions)))  # those that are not finished
    drawn = {row: place for place, row in enumerate(row for row in rows if row not in greedy)}
    while True:
        positions = mask.sum(1, keepdim=True) - 1
        hidden = lm.hidden(latest[:, None], attention_mask=mask, position_ids=positions, cache=cache)
        logits = lm.logits(hidden[:, -1]).float()
        tokens = logits.argmax(-1)
        places = [place for place, row in enumerate(rows) if row in drawn]
        if places:
            noise = logits.new_empty(len(drawn), logits.shape[1]).exponential_()
            warped = sampling.warpers(context.ids, _rows_of(logits, places))  # type: ignore[arg-type]  # LongTensor
            probs = _probs(warped)
            tokens[places] = (probs / _rows_of(noise, [drawn[rows[place]] for place in places])).argmax(-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            completions[row].append(token)
        remaining = [
            place for place, row in enumerate(rows) if not _is_finished(completions[row], sampling, stops, ends)
        ]
        if not remaining:
            return completions
        if len(remaining) < len(rows):
            index = torch.tensor(remaining, device=device)
            cache.batch_select_indices(index)
            mask, tokens, rows = mask[index], tokens[index], [rows[place] for place in remaining]
        mask, latest = torch.cat([mask, mask.new_ones(len(rows), 1)], 1), tokens


def _rows_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a matrix, which is not copied where they are all of it."""
    return values if len(rows) == len(values) else values[rows]


def _probs(logits: Tensor) -> Tensor:
    probs = logits.softmax(-1)
    if not torch.isfinite(probs).all():
        raise FloatingPointError(
            "a model that samples has probabilities that are no numbers: its weights have diverged"
        )
    return probs


def _is_finished(tokens: Sequence[int], sampling: Sampling, stops: Collection[int], ends: Ends | None) -> bool:
    return len(tokens) == sampling.max_new_tokens or tokens[-1] in stops or bool(ends and ends(tokens))


def _by_transformers(
    lm: Reader, prompts: Sequence[list[int]], sampling: Sampling, is_greedy: bool, ends: Ends | None
) -> list[list[int]]:
    """The completions of any model, one for each prompt."""
    top_k = sampling.top_k or 0  # to transformers 0 is all, and None what the model's own settings say
    options = {} if is_greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k}
    stops = list(sampling.stop_ids)
    generation = GenerationConfig(
        do_sample=not is_greedy,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
        **options,
    )
    ids, mask = pad(prompts, lm.weight.device, left=True)
    # Defaults that the model brings along (top-k, penalties) would bend the distribution.
    defaults, lm.model.generation_config = lm.model.generation_config, GenerationConfig()
    try:
        out = lm.model.generate(
            ids,
            attention_mask=mask,
            generation_config=generation,
            stopping_criteria=StoppingCriteriaList([_Ending(ends, ids.shape[1])] if ends else []),
            synced_gpus=False,  # a sharded model is gathered here, and waits for no other process
        )
    finally:
        lm.model.generation_config = defaults
    return [until_stop(tokens, set(stops), ends) for tokens in out[:, ids.shape[1] :].tolist()]


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
