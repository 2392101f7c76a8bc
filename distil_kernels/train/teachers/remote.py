"""A teacher behind an OpenAI-compatible endpoint, asked for its next token at every state that the student visits.

    remote    its K likeliest tokens with their log-probs; all others are one bucket (`fused_topk_distil_loss`)
    samples   n tokens sampled from it, each with its share: for an expert that only answers

A state is the teacher's prompt and a part of the completion, as token ids. Where the server can give the log-probs at
all states of a sequence at once (`sequence_requests`), one request is made for each different teacher prompt with its
completion, else one for each different state (`samples`: one for DRAWS_PER_REQUEST draws); `teacher_requests` of them
are under way together. Tokens come back as ids (llama.cpp, vLLM, SGLang; log-probs only) or as text, which the
tokenizer maps. A token that the student does not have goes to the bucket; the probability of such tokens is logged as
`unmapped`, that of the whole bucket as `tail`.

A teacher of kind "remote" is asked for the log-probs of one text at the start, after every batch, and when a run is
resumed: a server that has another model since is an error, before anything is learnt from the batch.

The shares of `samples` are unbiased for the teacher's probabilities T, and cross-entropy, gradient and credit are
linear in them, so these are unbiased too. At one state the cross-entropy has variance Var_{v ~ T}(log S_v) / n;
rollouts that share the state share its draws. Entropy is not linear: with m different tokens drawn `teacher_entropy`
is too low, and `kl` too high, by about (m - 1) / 2n. An empty text that ends the answer is the tokenizer's end token.

A resumed run repeats an uninterrupted one as far as the server repeats itself; draws have seeds from torch's generator.
Left out: chats, which cannot be continued from a state, and servers that refuse top_k and min_p, without which their
own defaults would cut the distribution.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distil_kernels.train.config import Config
from distil_kernels.train.http_endpoint import Endpoint, seeds, short
from distil_kernels.train.rollouts.packed_batch import PackedBatch, distinct
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Ends, Sampling, until_stop
from distil_kernels.train.teachers.base import TopKTarget
from distil_kernels.train.teachers.sequence_requests import (
    COMPLETIONS,
    Known,
    check_agreement,
    difference,
    likeliest,
    sequence_server,
)

DRAWS_PER_REQUEST = 4
"""A server that returns fewer draws is asked again."""
Distribution = tuple[Known, float]
"""Log-probs at a state by the student's ids, likeliest first, and the probability of named tokens that the student does
not have."""
MOVED = 0.1
"""Share of the probability of a text's tokens that may be somewhere else than at the start, on average over states."""
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "return_tokens_as_token_ids": True}
"""Options that keep the whole distribution, whatever a server's defaults; the last one asks vLLM for ids."""
PRINTABLE = "root ::= [ -~]+"
"""A grammar in the notation of llama.cpp."""
PROBE = "The 12345 quick-brown foxes' größte Überraschung: 日本語, привет!\n\tif (x[i] += 3.14159) { return 'naïve'; }"


class RemoteTeacher:
    """A `Teacher` of the kinds "remote" and "samples".

    Args:
        tokenizer, vocab_size: the student's.
        device: the device of its targets.

    Raises:
        ValueError: there is no such endpoint, it does not read the student's tokens, or (kind "remote") it gives no
            log-probs, or bent ones. Methods raise it when the endpoint stops answering, or answers with less.
    """

    moves = False
    answers = True

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device
    ) -> None:
        self._config, self._tokenizer, self._vocab_size, self._device = config, tokenizer, vocab_size, device
        self._endpoint = Endpoint("teacher_url", config.teacher_url)
        self._url = self._endpoint.url + COMPLETIONS
        self._id_of = _ids_by_text(tokenizer)
        self._model = {"model": config.teacher_model} if config.teacher_model else {}
        self._text = list(tokenizer(PROBE).input_ids)
        self._sequences = None
        if config.teacher == "remote":
            options = {**self._model, **PLAIN}
            self._sequences = sequence_server(self._endpoint, options, config.teacher_top, self._text)
        self._check()
        self._start = self._answers_to_text()
        """Log-probs of a text at the start, by which a server that has another model since is known."""

    @property
    def note(self) -> str:
        """What a person should know of how the endpoint is asked."""
        if self._sequences is not None:
            return f"{self._endpoint.url} is asked once for each sequence ({self._sequences.name})"
        unit = "draw of tokens" if self._config.teacher == "samples" else "token"
        return f"{self._endpoint.url} is asked once for each {unit}: it has no log-probs of a whole sequence"

    def opened(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def head_opened(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @torch.no_grad()
    def target(self, batch: PackedBatch) -> TopKTarget:
        """Asks for the next token at the states of the tokens that learn; at the others nothing is known."""
        learns = [True] * len(batch.tokens) if batch.learns.values is None else batch.learns.values.tolist()
        learning = [flags.tolist() for flags in torch.tensor(learns).split(batch.lengths)]
        answers, rows = (self._by_state if self._sequences is None else self._by_sequence)(batch, learning)
        self._check_same_model()
        answers.append(({}, 0.0))  # of the tokens that do not learn
        width = max(1, *(len(known) for known, _ in answers))
        ids, logprobs = torch.full((len(answers), width), -1), torch.full((len(answers), width), -torch.inf)
        for row, (known, _) in enumerate(answers):
            ids[row, : len(known)] = torch.tensor(list(known), dtype=torch.int64)
            logprobs[row, : len(known)] = torch.tensor(list(known.values()))
        unmapped = torch.tensor([mass for _, mass in answers])
        return TopKTarget(*(part[rows].to(self._device) for part in (ids, logprobs, unmapped)))

    def _by_state(self, batch: PackedBatch, learning: list[list[bool]]) -> tuple[list[Distribution], list[int]]:
        """One request for each state: the answers, and which of them each token has (-1: none)."""
        visited = [
            batch.teacher_prompts[index] + completion[:length]
            for index, completion in zip(batch.teacher_prompt_index, batch.completions, strict=True)
            for length in range(len(completion))
        ]
        learns = [flag for flags in learning for flag in flags]
        states, state_index = distinct([state for state, asks in zip(visited, learns, strict=True) if asks])
        # Only draws take random numbers: the form that a server has changes no rollout.
        draws = seeds(len(states)) if self._config.teacher == "samples" else [0] * len(states)
        answers = self._in_parallel(self._distribution, states, draws)
        positions = iter(state_index)
        return answers, [next(positions) if asks else -1 for asks in learns]

    def _by_sequence(self, batch: PackedBatch, learning: list[list[bool]]) -> tuple[list[Distribution], list[int]]:
        """One request for each teacher prompt with a completion up to its last token that learns."""
        asked: dict[tuple[tuple[int, ...], int], int] = {}  # sequence and start, and where its answers begin
        rows, count = [], 0
        for index, completion, flags in zip(batch.teacher_prompt_index, batch.completions, learning, strict=True):
            length = max((place for place, flag in enumerate(flags, 1) if flag), default=0)
            prompt = batch.teacher_prompts[index]
            key = (*prompt, *completion[:length]), len(prompt)
            if length and key not in asked:
                asked[key], count = count, count + length
            rows += [asked[key] + place if flag else -1 for place, flag in enumerate(flags)]
        found = self._in_parallel(self._of_sequence, *zip(*asked, strict=True)) if asked else []
        return [answer for of_sequence in found for answer in of_sequence], rows

    def _of_sequence(self, ids: Sequence[int], start: int) -> list[Distribution]:
        assert self._sequences is not None
        return [self._of_students(row) for row in self._sequences.rows(list(ids), start)]

    def _of_students(self, row: Known) -> Distribution:
        known = {token: value for token, value in row.items() if token < self._vocab_size}
        return known, sum(math.exp(value) for token, value in row.items() if token not in known)

    def _in_parallel(self, ask: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """The answers in order. An error or a Ctrl-C waits for the requests under way, and no other one is sent."""
        with ThreadPoolExecutor(self._config.teacher_requests) as pool:
            return list(pool.map(ask, *arguments))

    def generate(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> list[Rollout]:
        """The endpoint's completions, whose text the tokenizer makes tokens of."""
        options = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        texts = self._in_parallel(
            lambda prompt, seed: self._choices(prompt, seed=seed, **options)[0]["text"],
            [prompts[index] for index in prompt_index],
            seeds(len(prompt_index)),
        )
        stops = set(sampling.stop_ids)
        completions = [self._tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return [Rollout.sampled(until_stop(tokens, stops, ends)) for tokens in completions]

    def follow(self) -> None:
        """An endpoint does not follow the student."""

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the endpoint has another model than that of the run."""
        self._start = state["start"]
        self._check_same_model()

    def _answers_to_text(self) -> list[Known]:
        """The log-probs in the place of each token of the text, or of the one after it; none of teacher samples."""
        if self._sequences is not None:
            return self._sequences.rows(self._text, 1)
        return [self._distribution(self._text, 0)[0]] if self._config.teacher == "remote" else []

    def _check_same_model(self) -> None:
        now = self._answers_to_text()
        moved = difference(self._start, now) if len(now) == len(self._start) else 1.0
        if moved > MOVED:
            raise ValueError(
                f"[teacher_url] {self._endpoint.url} has moved {moved:.0%} of the probability of a text's tokens since "
                f"the start of the run, expected the same model: at most {MOVED:.0%}"
            )

    def _distribution(self, state: list[int], seed: int) -> Distribution:
        if self._config.teacher == "samples":
            draws = self._draws(state, seed)
            counts = Counter(token for token in draws if token is not None)
            shares = {token: math.log(count / len(draws)) for token, count in counts.items()}
            return likeliest(shares, len(shares)), 1.0 - counts.total() / len(draws)
        named, unmapped = _named(self._first_choice(state)), 0.0
        known: dict[int, float] = {}
        for token, text, value in sorted(named, key=lambda entry: -entry[2])[: self._config.teacher_top]:
            student_token = self._id_of.get(text) if token is None else token
            if student_token is None or student_token >= self._vocab_size or student_token in known:
                unmapped += math.exp(value)
            else:
                known[student_token] = value
        return known, unmapped

    def _draws(self, state: list[int], seed: int) -> list[int | None]:
        """Samples `teacher_samples` next tokens; None stands for a token that the student does not have."""
        draws: list[int | None] = []
        num_draws = self._config.teacher_samples
        while len(draws) < num_draws:
            choices = self._choices(
                state, max_tokens=1, n=min(DRAWS_PER_REQUEST, num_draws - len(draws)), seed=seed + len(draws),
                temperature=self._config.teacher_temperature,
            )  # fmt: skip
            for choice in choices:
                ended = not choice["text"] and choice.get("finish_reason") == "stop"
                draws.append(self._tokenizer.eos_token_id if ended else self._id_of.get(choice["text"]))
        return draws[:num_draws]

    def _first_choice(self, state: list[int]) -> dict[str, Any]:
        """The endpoint's answer for the next token, with log-probs.

        llama.cpp gives no log-probs if it sampled a piece of a character. It is then asked for a printable one: the
        grammar does not change the log-probs that it states.
        """
        options = {"max_tokens": 1, "logprobs": self._config.teacher_top, "temperature": 1.0}
        choice = self._choices(state, **options)[0]
        if "\ufffd" in choice["text"] and not choice.get("logprobs"):
            choice = self._choices(state, **options, grammar=PRINTABLE)[0]
        return choice

    def _check(self) -> None:
        """Raises ValueError if the endpoint does not read the student's tokens, names none of them, or bends their
        log-probs."""
        ids = self._text
        answer = self._ask(PROBE, max_tokens=1)
        count = (answer.get("usage") or {}).get("prompt_tokens", len(ids))
        if abs(count - len(ids)) > 1:  # one may begin texts with a token of its own
            raise ValueError(
                f"[teacher_url] {self._url} reads {count} tokens where the student reads {len(ids)}, expected one "
                "vocabulary"
            )
        if self._config.teacher == "remote":
            for token, text in _identities(self._first_choice(ids)):
                decoded = str(self._tokenizer.decode([token])) if token < len(self._tokenizer) else text
                if text and "\ufffd" not in decoded + text and decoded.strip() != text.strip():
                    raise ValueError(
                        f"[teacher_url] token {token} is {text!r} to {self._url} and {decoded!r} to the student, "
                        "expected one vocabulary"
                    )
        if not self._distribution(ids, 0)[0]:
            raise ValueError(f"[teacher_url] {self._url} names no token of the student's, expected one vocabulary")
        if self._sequences is not None:
            check_agreement(self._endpoint, self._sequences, ids)

    def _choices(self, prompt: list[int], **options: Any) -> list[dict[str, Any]]:
        answer = self._ask(prompt, **options)
        choices = answer.get("choices")
        if not choices or not all(isinstance(choice.get("text"), str) for choice in choices):
            raise self._endpoint.unexpected(COMPLETIONS, answer, "choices with a text each")
        return choices

    def _ask(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        return self._endpoint.ask(COMPLETIONS, {**self._model, "prompt": prompt, **PLAIN, **options})


def _named(choice: dict[str, Any]) -> list[tuple[int | None, str, float]]:
    """Id (None if the server gives text only), text and log-prob of each token that a choice names first."""
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
    """(id, text) of all tokens that a choice names, or, if the server writes ids as texts, of the sampled one."""
    named = [(token, text) for token, text, _ in _named(choice) if token is not None and _token_id(text) is None]
    chosen = _token_id((choice["logprobs"].get("tokens") or [""])[0])
    return named if chosen is None else [*named, (chosen, choice["text"])]


def _token_id(text: str) -> int | None:
    """The id in a text "token_id:5", which vLLM writes; None for any other text."""
    number = text.removeprefix("token_id:")
    return int(number) if number != text and number.isdecimal() else None


def _ids_by_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token ids by their text inside a sentence.

    Pieces of characters have no text. Of two tokens with one text the later one is taken, because vocabularies that
    have both bytes and letters begin with the bytes.
    """
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    start = len(tokenizer.decode(before))
    texts = tokenizer.batch_decode(
        [[*before, token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False
    )
    return {text[start:]: token for token, text in enumerate(texts) if text[start:] and "\ufffd" not in text}
