"""An expert behind a chat endpoint, of which nothing is known but what it writes: it reads the student's answer, and
its correction or critique is the feedback that the teacher reads.

    {question}                     POST /chat/completions, one message, temperature 0
    A student answered:            ->  choices[0].message.content, and usage with the numbers of tokens
    {answer}
    {expert_instruction}

The teacher is the student that has read this, or another model; no log-probs are asked for. Equal answers to a problem
are one request. What the expert said is kept in `expert_cache` under the hash of what it was asked, and is not asked
for again, by a resumed or another run either. `expert_requests` are under way together; a busy server is asked again
after its Retry-After. The score is the task's. A rollout of which the expert says nothing is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distil_kernels.train.config import Config
from distil_kernels.train.feedback.kinds import FEEDBACK, FeedbackKind
from distil_kernels.train.http_endpoint import Endpoint, Refused
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.run.directory import WriteError
from distil_kernels.train.tasks import Feedback

PATH = "/chat/completions"
TIMEOUT = 600.0
"""Time limit of a request, seconds."""
MILLION = 1e6


class _Said(NamedTuple):
    """An answer of the expert."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Spending:
    """What was asked for, and what it took."""

    requests: int = 0
    cached: int = 0
    """Answers that were known."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def expert_kind(config: Config) -> FeedbackKind:
    """The kind of feedback by the expert at config.expert_url.

    Raises:
        ValueError: no chat endpoint answers there.
    """
    expert = Expert(config)
    return FEEDBACK["expert"]._replace(respond=lambda prompts, max_tokens: expert)


class Expert:
    """A `FeedbackFn` that asks the expert of a configuration."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._endpoint = Endpoint("expert_url", config.expert_url)
        self._cache = Path(config.expert_cache or Path(config.runs_dir) / "expert_cache")
        self._spending, self._lock = Spending(), threading.Lock()
        limit = config.max_critique_tokens
        self._options = self._understood({"max_tokens": limit, "temperature": 0.0}, {"max_completion_tokens": limit})

    def __call__(self, student: Reader, groups: Sequence[PromptGroup], count: int) -> list[list[Feedback]]:
        judged = [(group.problem.question, rollout) for group in groups for rollout in group.rollouts[:count]]
        messages = [self._message(question, rollout.answer) for question, rollout in judged]
        # Without a verdict nothing is learnt from a rollout.
        asked = {text: "" for text, (_, rollout) in zip(messages, judged, strict=True) if rollout.feedback.has_verdict}
        with ThreadPoolExecutor(self._config.expert_requests) as pool:
            asked = dict(zip(asked, pool.map(self._said, asked), strict=True))
        texts = iter([asked.get(message, "") for message in messages])
        return [
            [Feedback(rollout.feedback.score, next(texts), "") for rollout in group.rollouts[:count]]
            for group in groups
        ]

    def spent(self) -> dict[str, float]:
        """What was spent since this was called last, by the names of metrics.jsonl."""
        with self._lock:
            spent, self._spending = self._spending, Spending()
        cost = spent.prompt_tokens * self._config.expert_prompt_price
        cost += spent.completion_tokens * self._config.expert_completion_price
        return {
            "expert_requests": spent.requests, "expert_cached": spent.cached,
            "expert_prompt_tokens": spent.prompt_tokens, "expert_completion_tokens": spent.completion_tokens,
            "expert_cost": cost / MILLION,
        }  # fmt: skip

    def _message(self, question: str, answer: str) -> str:
        return f"{question}\n\nA student answered:\n{answer.strip()}\n\n{self._config.expert_instruction}"

    def _said(self, message: str) -> str:
        """What the expert says of an answer, asked for or known."""
        request = self._request(message, self._options)
        key = hashlib.sha256(json.dumps([self._endpoint.url, request], sort_keys=True).encode()).hexdigest()
        path = self._cache / key[:2] / f"{key}.json"
        known = _read(path)
        if known is None:
            said = self._parsed(self._endpoint.ask(PATH, request, TIMEOUT))
            _write(path, json.dumps({"request": request, **said._asdict()}) + "\n")
        with self._lock:
            spending = self._spending
            if known is not None:
                spending.cached += 1
                return known
            spending.requests += 1
            spending.prompt_tokens += said.prompt_tokens
            spending.completion_tokens += said.completion_tokens
        return said.text

    def _request(self, message: str, options: dict[str, Any]) -> dict[str, Any]:
        model = {"model": self._config.expert_model} if self._config.expert_model else {}
        return {**model, "messages": [{"role": "user", "content": message}], **options}

    def _parsed(self, answer: dict[str, Any]) -> _Said:
        try:
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            counts = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
            if text is not None and not isinstance(text, str):
                raise TypeError
            # A tokenizer takes no half of a surrogate pair.
            return _Said((text or "").encode(errors="replace").decode().strip(), *counts)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise self._endpoint.unexpected(PATH, answer, "a choice with a message") from None

    def _understood(self, *options: dict[str, Any]) -> dict[str, Any]:
        """The first of some options that the endpoint takes: newer models refuse max_tokens and a temperature."""
        for index, tried in enumerate(options):
            try:
                self._parsed(self._endpoint.ask(PATH, self._request("Say yes.", tried), TIMEOUT))
                return tried
            except Refused:
                if index + 1 == len(options):
                    raise
        raise AssertionError


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step; other processes may be writing the same one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from error


def _read(path: Path) -> str | None:
    """What is known of an answer; None if nothing is, or the file is damaged."""
    try:
        text = json.loads(path.read_text())["text"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None
