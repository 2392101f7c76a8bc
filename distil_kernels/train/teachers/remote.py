"""A teacher behind an OpenAI-compatible endpoint, asked for its next token at every state that the student visits.

    remote    its K likeliest tokens with their log-probs; all others are one bucket (`fused_topk_distil_loss`)
    samples   n tokens drawn from it, each with its share: for an expert that only answers

A state is what the teacher reads and the completion up to there, as token ids: one request each (`samples`: one for
AT_ONCE draws), from THREADS threads; a state that several rollouts visit is asked about once. Tokens come back as ids
(llama.cpp, vLLM; log-probs only) or as text, which the tokenizer maps; what is no token of the student's goes to the
bucket, and its probability is logged as `unmapped`, the whole bucket's as `tail`.

The shares of `samples` are unbiased for the teacher's probabilities T, and cross-entropy, gradient and credit are
linear in them, so these are unbiased too. At one state the cross-entropy has variance Var_{v ~ T}(log S_v) / n;
rollouts that share the state share its draws. Entropy is not linear: with m different tokens drawn `teacher_entropy`
is too low, and `kl` too high, by about (m - 1) / 2n. What ends the answer and has no text is the tokenizer's end.

A resumed run repeats an uninterrupted one as far as the server repeats itself; draws have seeds from torch's generator.
Left out: one request per sequence (prompt_logprobs, which few servers have), chats, which cannot be continued from a
state, and servers that refuse top_k and min_p, without which their own defaults would cut the distribution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_kernels.train.batches import unique
from distil_kernels.train.config import Config
from distil_kernels.train.rollouts.http_endpoint import Endpoint, short
from distil_kernels.train.rollouts.python_tool import Python, Rollouts
from distil_kernels.train.rollouts.sampling import Sampling, until_stop

THREADS = 8
AT_ONCE = 4
"""Draws of one request; a server that gives fewer is asked again."""
PATH = "/completions"
WHOLE = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "return_tokens_as_token_ids": True}
"""The whole distribution, whatever a server's defaults; the last asks vLLM for ids."""
PRINTABLE = "root ::= [ -~]+"
"""A grammar as llama.cpp writes them."""
PROBE = "The 12345 quick-brown foxes' größte Überraschung: 日本語, привет!\n\tif (x[i] += 3.14159) { return 'naïve'; }"


class TopK(NamedTuple):
    """What the teacher says of N next tokens."""

    ids: Tensor
    """[N, K] int64, likeliest first; -1 where fewer are known."""
    logprobs: Tensor
    """[N, K] float32."""
    unmapped: Tensor
    """[N] float32, probability of named tokens that the student does not have."""

    @property
    def tail(self) -> Tensor:
        """[N], probability of all that `ids` do not name."""
        return (1.0 - self.logprobs.exp().sum(1)).clamp(min=0.0)


class RemoteTeacher:
    """In the place of `Teacher`, for the kinds "remote" and "samples".

    Args:
        tokenizer, vocab_size: of the student; what it reads and can say.
        device: of what `at_states` returns.

    Raises:
        ValueError: there is no such endpoint, it does not read the student's tokens, or (kind "remote") it gives no
            log-probs. Methods raise it when the endpoint stops answering.
    """

    moves = False
    """An endpoint stays as it is."""
    models = ()
    """None are here."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device
    ) -> None:
        self._config, self._tokenizer, self._vocab_size, self._device = config, tokenizer, vocab_size, device
        self._endpoint = Endpoint("teacher_url", config.teacher_url)
        self._url = self._endpoint.url + PATH
        self._id_of = _ids_by_text(tokenizer)
        self._check()

    @torch.no_grad()
    def at_states(
        self,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        completions: Sequence[list[int]],
        counts: Sequence[Sequence[bool]] | None = None,
    ) -> TopK:
        """For the completions' tokens, packed; arguments of `Reader.states`.

        Of tokens that do not count (one entry of `counts` for each) nothing is asked and nothing known.
        """
        counts = counts or [[True] * len(done) for done in completions]
        counted = [own for row in counts for own in row]
        states, asked = unique(
            [
                prompts[row] + done[:n]
                for row, done, own in zip(rows, completions, counts, strict=True)
                for n in range(len(done))
                if own[n]
            ]
        )
        with ThreadPoolExecutor(THREADS) as pool:
            found = [*pool.map(self._distribution, states, seeds(len(states))), ({}, 0.0)]
        places = iter(asked)
        index = [next(places) if own else len(states) for own in counted]
        width = max(1, *(len(known) for known, _ in found))
        ids, logprobs = torch.full((len(found), width), -1), torch.full((len(found), width), -torch.inf)
        for row, (known, _) in enumerate(found):
            likeliest = sorted(known.items(), key=lambda item: -item[1])
            ids[row, : len(known)] = torch.tensor([token for token, _ in likeliest], dtype=torch.int64)
            logprobs[row, : len(known)] = torch.tensor([value for _, value in likeliest])
        unmapped = torch.tensor([mass for _, mass in found])
        return TopK(*(part[index].to(self._device) for part in (ids, logprobs, unmapped)))

    def answers(
        self, prompts: Sequence[list[int]], rows: Sequence[int], sampling: Sampling, tool: Python | None
    ) -> Rollouts:
        """As `roll_out`, but for the tokens, which are the tokenizer's for the text that came, and without a tool."""
        options = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        asked = [prompts[row] for row in rows]
        with ThreadPoolExecutor(THREADS) as pool:
            texts = list(
                pool.map(
                    lambda prompt, seed: self._choices(prompt, seed=seed, **options)[0]["text"],
                    asked,
                    seeds(len(asked)),
                )
            )
        stops = set(sampling.stop_ids)
        done = [until_stop(self._tokenizer(text, add_special_tokens=False).input_ids, stops) for text in texts]
        return Rollouts(done, [[True] * len(tokens) for tokens in done])

    def follow(self) -> None:
        """There is nothing to follow with."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """There is no state."""

    def _distribution(self, state: list[int], seed: int) -> tuple[dict[int, float], float]:
        """Log-probs by token id, and the probability of named tokens that are none of the student's."""
        if self._config.teacher == "samples":
            draws = self._draws(state, seed)
            counts = Counter(token for token in draws if token is not None)
            shares = {token: math.log(count / len(draws)) for token, count in counts.items()}
            return shares, 1.0 - counts.total() / len(draws)
        named, unmapped = _named(self._first_choice(state)), 0.0
        known: dict[int, float] = {}
        for token, text, value in sorted(named, key=lambda entry: -entry[2])[: self._config.teacher_top]:
            own = self._id_of.get(text) if token is None else token
            if own is None or own >= self._vocab_size or own in known:
                unmapped += math.exp(value)
            else:
                known[own] = value
        return known, unmapped

    def _draws(self, state: list[int], seed: int) -> list[int | None]:
        """n tokens; None for one that the student does not have."""
        draws: list[int | None] = []
        wanted = self._config.teacher_samples
        while len(draws) < wanted:
            choices = self._choices(
                state, max_tokens=1, n=min(AT_ONCE, wanted - len(draws)), seed=seed + len(draws),
                temperature=self._config.teacher_temperature,
            )  # fmt: skip
            for choice in choices:
                ended = not choice["text"] and choice.get("finish_reason") == "stop"
                draws.append(self._tokenizer.eos_token_id if ended else self._id_of.get(choice["text"]))
        return draws[:wanted]

    def _first_choice(self, state: list[int]) -> dict[str, Any]:
        """The next token with its log-probs. llama.cpp has none where it drew a piece of a character, and is asked for
        a whole one instead: what it may draw does not change the log-probs that it states."""
        options = {"max_tokens": 1, "logprobs": self._config.teacher_top, "temperature": 1.0}
        choice = self._choices(state, **options)[0]
        if "\ufffd" in choice["text"] and not choice.get("logprobs"):
            choice = self._choices(state, **options, grammar=PRINTABLE)[0]
        return choice

    def _check(self) -> None:
        """One question as text and as ids, before any work."""
        ids = self._tokenizer(PROBE).input_ids
        answer = self._ask(PROBE, max_tokens=1)
        count = (answer.get("usage") or {}).get("prompt_tokens", len(ids))
        if abs(count - len(ids)) > 1:  # one may begin texts with a token of its own
            raise ValueError(
                f"[teacher_url] {self._url} reads {count} tokens where the student reads {len(ids)}, expected one "
                "vocabulary"
            )
        if self._config.teacher == "remote":
            for token, text in _identities(self._first_choice(ids)):
                own = str(self._tokenizer.decode([token])) if token < len(self._tokenizer) else text
                if text and "\ufffd" not in own + text and own.strip() != text.strip():
                    raise ValueError(
                        f"[teacher_url] token {token} is {text!r} to {self._url} and {own!r} to the student, expected "
                        "one vocabulary"
                    )
        if not self._distribution(ids, 0)[0]:
            raise ValueError(f"[teacher_url] {self._url} names no token of the student's, expected one vocabulary")

    def _choices(self, prompt: list[int], **options: Any) -> list[dict[str, Any]]:
        answer = self._ask(prompt, **options)
        choices = answer.get("choices")
        if not choices or not all(isinstance(choice.get("text"), str) for choice in choices):
            raise self._endpoint.unexpected(PATH, answer, "choices with a text each")
        return choices

    def _ask(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        model = {"model": self._config.teacher_model} if self._config.teacher_model else {}
        return self._endpoint.ask(PATH, {**model, "prompt": prompt, **WHOLE, **options})


def _named(choice: dict[str, Any]) -> list[tuple[int | None, str, float]]:
    """Id (None where there is only text), text and log-prob of each token that a choice names at its first position."""
    try:
        logprobs = choice["logprobs"]
        if "content" in logprobs:  # llama.cpp
            named = [
                (entry.get("id"), entry["token"], entry["logprob"]) for entry in logprobs["content"][0]["top_logprobs"]
            ]
        else:  # OpenAI, vLLM
            named = [(_token_id(text), text, value) for text, value in logprobs["top_logprobs"][0].items()]
        return [(token, text, float(value)) for token, text, value in named if value is not None]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(
            f"[teacher_url] expected top_logprobs of the first token, got {short(choice)}; teacher samples needs none"
        ) from None


def _identities(choice: dict[str, Any]) -> list[tuple[int, str]]:
    """(id, text) pairs of a choice: of all named tokens, or where ids stand in the texts' place of the one chosen."""
    named = [(token, text) for token, text, _ in _named(choice) if token is not None and _token_id(text) is None]
    chosen = _token_id((choice["logprobs"].get("tokens") or [""])[0])
    return named if chosen is None else [*named, (chosen, choice["text"])]


def _token_id(text: str) -> int | None:
    """5 of "token_id:5", as vLLM writes ids."""
    number = text.removeprefix("token_id:")
    return int(number) if number != text and number.isdecimal() else None


def _ids_by_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token ids by their text inside a sentence. Pieces of characters have none; of two tokens with one text it is the
    later, because bytes come first in the vocabularies that have them beside letters."""
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    start = len(tokenizer.decode(before))
    texts = tokenizer.batch_decode(
        [[*before, token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False
    )
    return {text[start:]: token for token, text in enumerate(texts) if text[start:] and "\ufffd" not in text}


def seeds(count: int) -> list[int]:
    return torch.randint(2**31 - 1, (count,)).tolist()
