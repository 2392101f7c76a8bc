"""A tool in rollouts: the model writes a call, Python's value of it is put in, and the model goes on.

    A: <tool>17 * 23</tool> <result>391</result> 391
       written              put in               written

What is put in is context, for the student and its teacher alike, and no action: no cost, no score term, no part in any
count or mean. Costs of later tokens reach the ones before a call over it; it keeps its positions, as masked rows of
the loss do, and so a discount below 1 counts it. Each round samples the rows that called, until none does or the limit
on calls is met; after that, a call is text. A call that the length limit cuts stays as it is, and what the limit leaves
no token after is not run.

Calls run one after the other, in `sandbox`: one Python expression, with the names of `math`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from distil_kernels.train.rollouts.sampling import Draw, Sampling
from distil_kernels.train.tasks.sandbox import Limits, run_python

OPEN, CLOSE = "<tool>", "</tool>"
LIMITS = Limits(seconds=2.0)


class Rollouts(NamedTuple):
    """B completions, and of each token whether the model wrote it."""

    completions: list[list[int]]
    written: list[list[bool]]
    logprobs: list[list[float]] | None = None
    """As `Drawn` has them, 0 for what a tool put in."""

    def part(self, rows: slice) -> Rollouts:
        return Rollouts(self.completions[rows], self.written[rows], self.logprobs and self.logprobs[rows])

    def add(self, row: int, tokens: list[int], is_written: bool, logprobs: list[float] | None) -> None:
        self.completions[row] = self.completions[row] + tokens
        self.written[row] += [is_written] * len(tokens)
        if self.logprobs is not None:
            self.logprobs[row] += logprobs or [0.0] * len(tokens)


class Python:
    """The tool; a completion has at most `max_calls` of it, with at most `max_tokens` tokens of output each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_calls: int, max_tokens: int) -> None:
        self._tokenizer, self.max_calls, self._max_tokens = tokenizer, max_calls, max_tokens
        self._before, self._after = self._ids(" <result>"), self._ids("</result>")
        self.longest = max_calls * (len(self._before) + max_tokens + len(self._after))
        """Number of tokens that it can put into a completion."""

    def ends_call(self, written: Sequence[int]) -> bool:
        """Whether the last of these tokens closes a call."""
        return CLOSE in self._text(written[-len(CLOSE) :])  # a token has a character at least

    def result(self, written: Sequence[int]) -> list[int]:
        """What is put in after these tokens, which end in a call."""
        call = self._text(written).rpartition(CLOSE)[0].rpartition(OPEN)[2].strip()
        run = run_python(f"from math import *\nprint(eval({call!r}))", limits=LIMITS)
        said = run.output if run.is_ok else run.error.splitlines()[-1]
        return self._before + self._ids(" ".join(said.split()))[: self._max_tokens] + self._after

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def roll_out(
    draw: Draw,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    sampling: Sampling,
    tool: Python | None,
) -> Rollouts:
    """As `draw`, whose length limit is on what the model writes, with the tool's outputs where there is a tool."""
    ends = tool.ends_call if tool else None
    last = draw(prompts, rows, sampling, ends)
    done = Rollouts(last.completions, [[True] * len(tokens) for tokens in last.completions], last.logprobs)
    if tool is None:
        return done
    sampled = dict(enumerate(last.completions))
    for call in range(1, tool.max_calls + 1):
        left = {row: sampling.max_new_tokens - sum(done.written[row]) for row in sampled}
        calling = [
            row
            for row, tokens in sampled.items()
            if left[row] and tokens[-1] not in sampling.stop_ids and tool.ends_call(tokens)
        ]
        if not calling:
            break
        for row in calling:
            done.add(row, tool.result(sampled[row]), False, None)
        rest = replace(sampling, max_new_tokens=max(left[row] for row in calling))
        read = [prompts[rows[row]] + done.completions[row] for row in calling]
        more = draw(read, range(len(read)), rest, ends if call < tool.max_calls else None)
        sampled = {row: tokens[: left[row]] for row, tokens in zip(calling, more.completions, strict=True)}
        for index, row in enumerate(calling):
            done.add(row, sampled[row], True, more.logprobs[index][: left[row]] if more.logprobs else None)
    return done
