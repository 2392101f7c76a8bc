"""A teacher's log-probs at all states of a sequence by one request, in the forms of the servers that give them.

    vLLM      POST /v1/completions with prompt_logprobs K and max_tokens 1
              choices[0].prompt_logprobs [null, {"id": {"logprob": ...}, ...}, ...]: entry t is of token t, with the K
              likeliest and the sequence's own (`trl vllm-serve` of TRL 1.16 starts this server)
    SGLang    POST /generate with input_ids, return_logprob, top_logprobs_num K and logprob_start_len s
              meta_info.input_top_logprobs [null, [[logprob, id, text], ...], ...]: entry t is of token s + t, and of
              the sequence's own tokens in input_token_logprobs

Which form a server has is found by asking in each; a server of neither is asked once for each state (llama.cpp).

An answer that has not one entry for each token, K tokens in each entry, the sequence's own ids, or probabilities of at
most 1 together is an error: nothing is learnt from a part of it. What a rescaled distribution (a temperature, top_p)
looks like cannot be told from one answer: `check_agreement` compares a sequence's log-probs at one state with those
that the server gives for its next token there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from distil_kernels.train.http_endpoint import Endpoint, Refused

Known = dict[int, float]
"""Log-probs of the likeliest next tokens at a state, by token id, likeliest first."""

COMPLETIONS = "/completions"
GENERATE = "/generate"
CUT = -1000.0
"""A token of this log-prob or less was taken out of the distribution: servers write -9999 for minus infinity."""
CLOSE = 0.1
"""Nats that log-probs of one state may differ by on average, in two requests for it."""
SCALE = 0.04
"""How far from 1 the factor between them may be."""


class SequenceServer(Protocol):
    """A server that gives the log-probs at all states of a sequence at once."""

    name: str
    """What it is asked for, in words."""

    def understands(self, ids: list[int]) -> bool:
        """Tells if the server answers in this form. It may also refuse the request (`Refused`)."""

    def rows(self, ids: list[int], start: int) -> list[Known]:
        """The `top` likeliest tokens in the place of each token from `start` (at least 1) on.

        Raises:
            ValueError: the server does not answer, or not with that.
        """

    def row(self, state: list[int]) -> Known:
        """The same for the token after `state`, as the server gives it for a token that it samples."""


class PromptLogprobs:
    """vLLM's form.

    Args:
        options: fields of every request.
        top: tokens with log-probs at each state.
    """

    name = "prompt_logprobs, as of vLLM"

    def __init__(self, endpoint: Endpoint, options: dict[str, Any], top: int) -> None:
        self._endpoint, self._options, self._top = endpoint, {**options, "max_tokens": 1, "temperature": 1.0}, top

    def understands(self, ids: list[int]) -> bool:
        return _choice(self._asked(ids)).get("prompt_logprobs") is not None

    def rows(self, ids: list[int], start: int) -> list[Known]:
        answer = self._asked(ids)
        try:
            entries = _choice(answer)["prompt_logprobs"]
            found = [{int(token): float(entry["logprob"]) for token, entry in of.items()} for of in entries[start:]]
            own = [token if token in row else -1 for token, row in zip(ids[start:], found, strict=False)]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._endpoint.unexpected(COMPLETIONS, answer, "prompt_logprobs with a logprob of each id") from None
        if len(entries) != len(ids):
            found = []
        return checked(self._endpoint, found, own, ids[start:], self._top)

    def row(self, state: list[int]) -> Known:
        answer = self._endpoint.ask(COMPLETIONS, {**self._options, "prompt": state, "logprobs": self._top})
        try:
            named = _choice(answer)["logprobs"]["top_logprobs"][0]
            found = {int(text.removeprefix("token_id:")): float(value) for text, value in named.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise self._endpoint.unexpected(COMPLETIONS, answer, "top_logprobs of the next token by ids") from None
        return likeliest(found, self._top)

    def _asked(self, ids: list[int]) -> dict[str, Any]:
        return self._endpoint.ask(COMPLETIONS, {**self._options, "prompt": ids, "prompt_logprobs": self._top})


class InputTopLogprobs:
    """SGLang's form; arguments as of `PromptLogprobs`, but that the endpoint is the server without /v1."""

    name = "input_top_logprobs, as of SGLang"

    def __init__(self, endpoint: Endpoint, options: dict[str, Any], top: int) -> None:
        self._endpoint, self._top = endpoint, top
        sampling = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
        self._options = {"return_logprob": True, "top_logprobs_num": top, "sampling_params": sampling}

    def understands(self, ids: list[int]) -> bool:
        return _meta(self._asked(ids, 0)).get("input_top_logprobs") is not None

    def rows(self, ids: list[int], start: int) -> list[Known]:
        answer = self._asked(ids, start - 1)  # the first entry is of a token that nothing precedes, and null
        try:
            entries, own = _meta(answer)["input_top_logprobs"][1:], _meta(answer)["input_token_logprobs"][1:]
            found = [{int(token): float(value) for value, token, *_ in entry} for entry in entries]
            # SGLang writes 0 for its last ids.
            tokens = [int(said) or token for token, (_, said, *_) in zip(ids[start:], own, strict=False)]
        except (KeyError, TypeError, ValueError):
            raise self._endpoint.unexpected(GENERATE, answer, "input_top_logprobs with [logprob, id]") from None
        return checked(self._endpoint, found, tokens, ids[start:], self._top)

    def row(self, state: list[int]) -> Known:
        answer = self._asked(state, -1)
        try:
            found = {int(token): float(value) for value, token, *_ in _meta(answer)["output_top_logprobs"][0]}
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._endpoint.unexpected(GENERATE, answer, "output_top_logprobs with [logprob, id]") from None
        return likeliest(found, self._top)

    def _asked(self, ids: list[int], start: int) -> dict[str, Any]:
        return self._endpoint.ask(GENERATE, {**self._options, "input_ids": ids, "logprob_start_len": start})


def sequence_server(endpoint: Endpoint, options: dict[str, Any], top: int, ids: list[int]) -> SequenceServer | None:
    """The form in which a server answers for the whole sequence `ids`; None if it does so in none.

    Raises:
        ValueError: the server does not answer.
    """
    root = Endpoint(endpoint.option, endpoint.url.removesuffix("/v1"))
    forms: tuple[SequenceServer, ...] = (
        PromptLogprobs(endpoint, options, top),
        InputTopLogprobs(root, options, top),
    )
    for form in forms:
        try:
            if form.understands(ids):
                return form
        except Refused:
            continue
    return None


def checked(
    endpoint: Endpoint, rows: Sequence[Known], own: Sequence[int], expected: Sequence[int], top: int
) -> list[Known]:
    """The `top` likeliest tokens of each row.

    Args:
        own: the tokens that the server says that the rows are of.
        expected: the tokens that it was asked for.

    Raises:
        ValueError: the rows are of other tokens, or no distributions whose `top` likeliest tokens they name.
    """
    where = f"[{endpoint.option}] {endpoint.url}"
    if len(rows) != len(expected) or list(own) != list(expected):
        raise ValueError(
            f"{where} gives log-probs of {len(rows)} tokens of a sequence, expected its {len(expected)} tokens, as "
            "they were sent"
        )
    for row in rows:
        values = [value for value in row.values() if value > CUT]  # NaN is none
        if len(values) < top:
            raise ValueError(
                f"{where} gives {len(values)} log-probs at a state, expected teacher_top, {top}: a server that cuts "
                "nothing off (top_k, top_p, min_p) and allows as many (vLLM's --max-logprobs)"
            )
        if not sum(map(_exp, values)) <= 1.005:  # the op takes no more
            raise ValueError(
                f"{where} gives numbers whose exponentials add up to {sum(map(_exp, values)):.3g} at a state, expected "
                "at most 1: log-probs and not logits (vLLM's --logprobs-mode)"
            )
    return [likeliest(row, top) for row in rows]


def check_agreement(endpoint: Endpoint, server: SequenceServer, ids: list[int]) -> None:
    """Compares a sequence's log-probs at one state with those that one request for that state gives.

    At that state log-probs are the farthest apart, where a temperature shows most.

    Raises:
        ValueError: they are different: the server bends one of them.
    """
    rows = server.rows(ids, 1)
    place = max(range(len(rows)), key=lambda index: _spread(list(rows[index].values())))
    in_sequence, alone = rows[place], server.row(ids[: place + 1])
    where = f"[teacher_url] {endpoint.url}"
    if len(in_sequence) != len(alone):
        raise ValueError(
            f"{where} gives {len(in_sequence)} log-probs for a token in a sequence and {len(alone)} for the same one "
            "alone, expected equally many: a server that cuts nothing off (top_k, top_p, min_p)"
        )
    # Of two lists that end somewhere, tokens near the end may be in one of them only.
    ends = max(min(in_sequence.values()), min(alone.values()))
    missing = [
        value
        for row, other in ((in_sequence, alone), (alone, in_sequence))
        for token, value in row.items()
        if token not in other
    ]
    shared = [(in_sequence[token], alone[token]) for token in in_sequence if token in alone]
    distance = sum(abs(a - b) for a, b in shared) / max(1, len(shared))
    factor = _factor(shared)
    rescaled = factor is not None and abs(factor - 1) > SCALE
    if rescaled or distance > CLOSE or not shared or any(value > ends + 5 * CLOSE for value in missing):
        scale = "" if factor is None else f", and are {factor:.2f} times as far apart"
        raise ValueError(
            f"{where} gives other log-probs for a token in a sequence than for the same one alone: they differ by "
            f"{distance:.2f} nats on average{scale}; expected the model's own in both, without temperature, top_p or "
            "penalties of the server's"
        )


def difference(ours: Sequence[Known], theirs: Sequence[Known]) -> float:
    """The mean over states of how much probability is somewhere else, of what is known."""
    moved = [
        sum(abs(_exp(a.get(token, CUT)) - _exp(b.get(token, CUT))) for token in a.keys() | b.keys()) / 2
        for a, b in zip(ours, theirs, strict=True)
    ]
    return sum(moved) / max(1, len(moved))


def likeliest(row: Known, top: int) -> Known:
    """The `top` likeliest tokens of a row, in that order, but for those that were taken out."""
    possible = [item for item in row.items() if item[1] > CUT]
    return dict(sorted(possible, key=lambda item: -item[1])[:top])


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _factor(pairs: Sequence[tuple[float, float]]) -> float | None:
    """How many times as far apart the first numbers of pairs are as the second ones; None if they say too little."""
    if len(pairs) < 4:
        return None
    second = [value for _, value in pairs]
    spread = _spread(second)
    if spread < 0.25 * len(pairs):  # half a nat of standard deviation
        return None
    mean = sum(second) / len(second)
    return sum(a * (b - mean) for a, b in pairs) / spread


def _spread(values: Sequence[float]) -> float:
    """The sum of squared distances from the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def _meta(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer.get("meta_info")
    return meta if isinstance(meta, dict) else {}
