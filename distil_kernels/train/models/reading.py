"""How a model reads prompts with completions: three ways to the same hidden states, and the choice between them.

A row is a prompt with one of its completions.

    shared   the prefix of all prompts once, each prompt once (`shared_prompts`), then completions padded to the longest
    packed   all rows one after the other in one, with positions that start anew: no padding, no mask
    padded   one row for each completion, padded to the longest

The cheapest puts the fewest tokens through the layers (`choose`). A model whose cache is more than plain keys and
values (sliding windows, recurrent layers), or that counts padding as distance (MPT), cannot share; a model whose rows
see each other in a pack cannot pack; any model reads padded rows. SmolLM2 in float32, forward and backward on one core,
seconds (tokens read):

                                                    shared         packed          padded
    8 completions of 16 to 256 behind 2 prompts     19.1 (2166)    12.1 (1560)     22.0 (2520)
    16 completions of 4 to 16 behind 4 prompts       3.5 (492)      9.0 (1107)      8.0 (1200)

with prompts of 60 tokens. transformers knows packed rows by their positions. Where flash-attn is
(`loading.use_flash_attention`) its varlen kernels read them, and a pack has no limit. Elsewhere attention is computed
between all tokens of a pack and masked, which grows with the square, so a pack ends at PACK_TOKENS or is one longer row
(the first case with 256, 512, 1024 and 2048: 12.5, 12.1, 13.3 and 16.4 s).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from distil_kernels.hf import CausalLM
from distil_kernels.train.models.sharding import unsharded
from distil_kernels.train.models.shared_prompts import common_prefix, completion_states, pad

WAYS = ("padded", "shared", "packed")
"""Of ways that cost the same the first one is taken."""
PACK_TOKENS = 512
"""Limit of a pack where attention is masked."""
PACKED_COST = 1.15
"""Cost of a packed token as a multiple of a padded one's, for masked attention; 0.9 to 1.2 in the measured cases."""


class Choice(NamedTuple):
    """A way of reading and the reason for it."""

    way: str
    reason: str


@dataclass(frozen=True)
class Reader(CausalLM):
    """A causal LM that reads prompts and completions; `reader` makes it."""

    ways: tuple[str, ...]
    """The WAYS that it may use."""
    ways_with_gradients: tuple[str, ...]
    """The WAYS that it may use where a backward pass follows."""
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    """A function that opens the run's precision of products."""

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt may be read once for all its completions."""
        return "shared" in self.ways

    def new_cache(self) -> Any:
        """Returns an empty cache of prompts that are read once."""
        return DynamicCache(config=self.model.config)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A context in which this process has all weights and computes in the run's precision.

        It is for passes without gradients. With a sharded model all processes enter and leave it together.
        """
        with unsharded(self.model), self.autocast():
            yield

    def states(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], completions: Sequence[list[int]]
    ) -> Tensor:
        """Returns the hidden states [N, D] that predict each completion token, packed completion after completion.

        Args:
            prompts: U different prompts, as token ids.
            prompt_index: the prompt of each of the B completions.
            completions: B non-empty lists of token ids.
        """
        ways = self.ways_with_gradients if torch.is_grad_enabled() else self.ways
        way = choose(ways, prompts, prompt_index, completions).way
        if way == "shared":
            return completion_states(self, prompts, prompt_index, completions)
        rows = [prompts[index] + tokens[:-1] for index, tokens in zip(prompt_index, completions, strict=True)]
        lengths = [len(tokens) for tokens in completions]
        return _packed(self, rows, lengths) if way == "packed" else _padded(self, rows, lengths)


def reader(
    lm: CausalLM,
    reading: str = "auto",
    recomputes: bool = False,
    is_sharded: bool = False,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Reader:
    """Returns a model with the ways that it can read in.

    Args:
        reading: "auto", or the one of WAYS to read in always.
        recomputes: the backward pass runs layers again, which would fill a cache a second time.
        is_sharded: a pass with gradients has to be one forward, whatever is read.
        autocast: opens the run's precision of products.

    Raises:
        ValueError: the model cannot read that way.
    """
    possible = _possible_ways(lm)
    if reading != "auto" and reading not in possible:
        reason = "its cache cannot be read once" if reading == "shared" else "rows of a pack see each other"
        raise ValueError(
            f"[reading] {type(lm.model).__name__} reads {', '.join(possible)}: got {reading}, but {reason}"
        )
    ways = tuple(way for way in possible if reading in ("auto", way))
    excluded = {"shared"} if recomputes or is_sharded else set()
    if is_sharded and not _has_varlen(lm):
        excluded.add("packed")
    with_gradients = tuple(way for way in ways if way not in excluded)
    parts = {field.name: getattr(lm, field.name) for field in fields(CausalLM)}
    return Reader(**parts, ways=ways, ways_with_gradients=with_gradients, autocast=autocast)


def choose(
    ways: Sequence[str], prompts: Sequence[list[int]], prompt_index: Sequence[int], completions: Sequence[list[int]]
) -> Choice:
    """Returns the way that puts the fewest tokens through the layers, padding and PACKED_COST counted."""
    lengths = [len(prompts[index]) + len(tokens) - 1 for index, tokens in zip(prompt_index, completions, strict=True)]
    prefix = common_prefix(prompts)
    longest_suffix = max(map(len, prompts)) - 1 - prefix
    tokens = {
        "padded": len(lengths) * max(lengths),
        "shared": prefix + len(prompts) * longest_suffix + len(completions) * max(map(len, completions)),
        "packed": sum(lengths),
    }
    cost = {way: count * (PACKED_COST if way == "packed" else 1) for way, count in tokens.items()}
    way = min((way for way in WAYS if way in ways), key=lambda way: cost[way])
    return Choice(way, f"{way} reads {tokens[way]} tokens, " + ", ".join(f"{other} {tokens[other]}" for other in ways))


def _padded(lm: CausalLM, rows: Sequence[list[int]], lengths: Sequence[int]) -> Tensor:
    """Returns `Reader.states` of rows whose completions have these lengths, each row padded to the longest."""
    ids, mask = pad(rows, lm.weight.device)
    hidden = lm.hidden(ids, attention_mask=mask)
    starts = torch.tensor([len(row) - length for row, length in zip(rows, lengths, strict=True)], device=ids.device)
    return hidden[(mask > 0) & (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None])]


def _packed(lm: CausalLM, rows: Sequence[list[int]], lengths: Sequence[int]) -> Tensor:
    """Returns `Reader.states` of rows whose completions have these lengths, several rows in one."""
    parts = []
    for pack in _packs([len(row) for row in rows], math.inf if _has_varlen(lm) else PACK_TOKENS):
        ids = [token for row in rows[pack] for token in row]
        positions = [position for row in rows[pack] for position in range(len(row))]
        predicts_completion = [
            position >= len(row) - length
            for row, length in zip(rows[pack], lengths[pack], strict=True)
            for position in range(len(row))
        ]
        device = lm.weight.device
        hidden = lm.hidden(torch.tensor([ids], device=device), position_ids=torch.tensor([positions], device=device))
        parts.append(hidden[0, torch.tensor(predicts_completion, device=device)])
    return torch.cat(parts)


def _packs(lengths: Sequence[int], limit: float) -> Iterator[slice]:
    """Yields packs of adjacent rows: `limit` tokens together at most, or one longer row."""
    begin = total = 0
    for row, length in enumerate(lengths):
        if total and total + length > limit:
            yield slice(begin, row)
            begin, total = row, 0
        total += length
    yield slice(begin, len(lengths))


def _has_varlen(lm: CausalLM) -> bool:
    """Returns whether attention is by flash-attn's kernels, which keep the rows of a pack apart."""
    return "flash" in str(getattr(lm.body.config, "_attn_implementation", ""))


@torch.no_grad()
def _possible_ways(lm: CausalLM) -> list[str]:
    """Returns the WAYS in which short rows have the hidden states that each has alone.

    They are tried, because no attribute of a model tells; a model may refuse one by any exception.
    """
    prompts = [[1, 2], [1, *[3, 2] * 8]]  # a start in common, then a gap
    continued = [[*prompt, 3] for prompt in prompts]
    short_rows = [[1, 2, 3], [3, 1]]

    def agrees(read: Callable[[], Tensor], rows: Sequence[list[int]], lengths: Sequence[int]) -> bool:
        alone = torch.cat([_padded(lm, [row], [length]) for row, length in zip(rows, lengths, strict=True)])
        try:
            states = read()
        except Exception:
            return False
        return bool((states - alone).abs().max() <= limit * alone.abs().max())

    def shared() -> Tensor:
        return completion_states(lm, prompts, [0, 1], [[3, 0]] * 2)

    def packed() -> Tensor:
        return _packed(lm, short_rows, [3, 2])

    # bfloat16 moves shared states of SmolLM2 by .006 of the largest; what a wrong way moves is .09 and more.
    limit = 0.03 if torch.is_autocast_enabled(lm.weight.device.type) else 1e-3
    ways = ["padded"]
    training = [module for module in lm.model.modules() if module.training]
    lm.model.eval()
    try:
        if _has_plain_cache(lm) and agrees(shared, continued, [2, 2]):
            ways.append("shared")
        if _knows_positions(lm) and agrees(packed, short_rows, [3, 2]):
            ways.append("packed")
    finally:
        for module in training:
            module.training = True
    return ways


def _has_plain_cache(lm: CausalLM) -> bool:
    """Returns whether the cache has keys and values of all tokens, without a window over them.

    GPT-Neo's window is longer than the rows that are tried.
    """
    config = lm.model.config
    is_plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return is_plain and "local" not in getattr(config, "attention_layers", ())


def _knows_positions(lm: CausalLM) -> bool:
    """Returns whether the model takes positions, and exact ones.

    Falcon's ALiBi rounds them to bfloat16, which differs along a pack: by 1.5% at 300 tokens.
    """
    has_argument = "position_ids" in inspect.signature(lm.body.forward).parameters
    return has_argument and not getattr(lm.body.config, "alibi", False)
