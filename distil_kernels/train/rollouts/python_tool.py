"""A tool in rollouts: the model writes a call, the value of the Python expression is inserted, and the model goes on.

    A: <tool>17 * 23</tool> <result>391</result> 391
       by the model         by the tool          by the model

The inserted tokens are context, for the student and its teacher alike, and no action: no cost, no score term, no part
in any count or mean. Costs of later tokens reach the earlier ones across a result; the result keeps its positions, as
masked rows of the loss do, and so a discount below 1 counts it. Each round samples the completions that ended in a
call, until none does or the limit on calls is met; after that, a call is text. A call that the length limit cuts stays
as it is, and a call is not run if the limit leaves no token after it.

Calls run one after the other, in `sandbox`: one Python expression, with the names of `math`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Generate, Sampling
from distil_kernels.train.tasks.sandbox import SANDBOX, Limits, run_python

OPEN, CLOSE = "<tool>", "</tool>"
LIMITS = Limits(seconds=2.0)


class Python:
    """The tool. A completion has at most `max_calls` calls, each with at most `max_tokens` tokens of output."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_calls: int, max_tokens: int) -> None:
        SANDBOX.walls()  # a ValueError now, not in the first rollout
        self._tokenizer, self.max_calls, self._max_tokens = tokenizer, max_calls, max_tokens
        self._before, self._after = self._ids(" <result>"), self._ids("</result>")
        self.longest = max_calls * (len(self._before) + max_tokens + len(self._after))
        """The largest number of tokens that it can insert into a completion."""

    def ends_call(self, tokens: Sequence[int]) -> bool:
        """True if the last of these tokens closes a call."""
        return CLOSE in self._text(tokens[-len(CLOSE) :])  # a token has at least one character

    def result(self, tokens: Sequence[int]) -> list[int]:
        """The tokens to insert after these tokens, which end in a call."""
        call = self._text(tokens).rpartition(CLOSE)[0].rpartition(OPEN)[2].strip()
        run = run_python(f"from math import *\nprint(eval({call!r}))", limits=LIMITS)
        output = run.output if run.is_ok else run.error.splitlines()[-1]
        return self._before + self._ids(" ".join(output.split()))[: self._max_tokens] + self._after

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


RollOut = Callable[[Sequence[list[int]], Sequence[int], Sampling, Python | None], list[Rollout]]
"""(prompts, prompt_index, sampling, tool) -> one rollout per entry of prompt_index."""


def roll_out(
    generate: Generate,
    prompts: Sequence[list[int]],
    prompt_index: Sequence[int],
    sampling: Sampling,
    tool: Python | None,
) -> list[Rollout]:
    """The rollouts of `generate`, with the results of their tool calls inserted.

    The length limit is on the tokens that the model writes.
    """
    ends = tool.ends_call if tool else None
    rollouts = generate(prompts, prompt_index, sampling, ends)
    if tool is None:
        return rollouts
    # The tokens that each rollout got in the last round.
    latest = {index: rollout.tokens for index, rollout in enumerate(rollouts)}
    for call in range(1, tool.max_calls + 1):
        remaining = {index: sampling.max_new_tokens - sum(rollouts[index].by_model) for index in latest}
        calling = [
            index
            for index, tokens in latest.items()
            if remaining[index] and tokens[-1] not in sampling.stop_ids and tool.ends_call(tokens)
        ]
        if not calling:
            break
        for index in calling:
            result = tool.result(latest[index])
            rollouts[index].append(Rollout(result, [False] * len(result)))
        continued = [prompts[prompt_index[index]] + rollouts[index].tokens for index in calling]
        # One limit for all of them, the longest; what is over a rollout's own limit is cut off.
        limits = replace(
            sampling,
            max_new_tokens=max(remaining[index] for index in calling),
            greedy_rows=[place for place, index in enumerate(calling) if index in sampling.greedy_rows],
        )
        more = generate(continued, range(len(continued)), limits, ends if call < tool.max_calls else None)
        latest = {}
        for index, rollout in zip(calling, more, strict=True):
            length = remaining[index]
            part = Rollout.sampled(rollout.tokens[:length], rollout.logprobs and rollout.logprobs[:length])
            rollouts[index].append(part)
            latest[index] = part.tokens
    return rollouts
