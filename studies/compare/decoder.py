"""A small decoder in plain torch (0.1 M parameters) that samples fast on one thread.

Prompts have one width and several answers share each: keys and values of a prompt are computed once and copied, in
sampling and, with gradients, in training. Left out: padding, which fixed widths make needless.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from studies.compare.digit_tasks import BLANK, CHARACTERS, END

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values [B, heads, T, D / heads] of each layer."""


class Layer(nn.Module):
    """Causal attention and a feed-forward block, both behind RMS norms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        new, total = query.shape[2], key.shape[2]
        mask = None if new == 1 else torch.ones(new, total, dtype=torch.bool).tril(total - new)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), (key, value)


class Decoder(nn.Module):
    """Characters in, last hidden states out; `head` makes logits of them."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 32) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(len(CHARACTERS), width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Returns the last hidden states [B, T, D] of tokens [B, T] that follow the cache, and the extended cache."""
        begin = cache[0][0].shape[2] if cache else 0
        x = self.characters(tokens) + self.positions.weight[begin : begin + tokens.shape[1]]
        extended: Cache = []
        for i, layer in enumerate(self.layers):
            x, past = layer(x, cache[i] if cache else None)
            extended.append(past)
        return self.norm(x), extended

    def read(self, prompts: Tensor, copies: int) -> tuple[Tensor, Cache]:
        """Returns the last token of prompts [B, P] as [B * copies, 1], and the cache of the tokens before it."""
        _, cache = self(prompts[:, :-1])
        repeated = [(k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)) for k, v in cache]
        return prompts[:, -1:].repeat_interleave(copies, 0), repeated

    def answer_hidden(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """The states [M, A, D] that predict answers [M, A]; M / B consecutive answers belong to each prompt [B, P]."""
        last, cache = self.read(prompts, len(answers) // len(prompts))
        return self(torch.cat([last, answers[:, :-1]], 1), cache)[0]

    @torch.no_grad()
    def answers(self, prompts: Tensor, width: int, copies: int = 1, generator: Generator | None = None) -> Tensor:
        """Answers [B * copies, width], BLANK after END: sampled at temperature 1, or greedy without a generator."""
        token, cache = self.read(prompts, copies)
        answers = token.new_full((len(token), width), BLANK)
        alive = torch.ones(len(token), dtype=torch.bool)
        for i in range(width):
            hidden, cache = self(token, cache)
            logits = self.head(hidden[:, 0])
            if generator is not None:  # the largest of logits with Gumbel noise is a sample
                logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
            token = logits.argmax(1, keepdim=True)
            answers[:, i] = token[:, 0].where(alive, BLANK)
            alive &= token[:, 0] != END
            if not alive.any():
                break
        return answers
