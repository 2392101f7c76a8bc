"""A JSON server over HTTP. Requests are repeated while the server is busy."""

from __future__ import annotations

import json
import os
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

TIMEOUT = 120.0
"""Time limit of one request, seconds."""
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each repetition of a request, to a busy server or to one that has answered before."""
BUSY = (429, 500, 502, 503, 504)


class Refused(ValueError):
    """A server's refusal of a request: a status from 400 on that does not mean that it is busy."""


class Endpoint:
    """The server at an address; the key is OPENAI_API_KEY of the environment.

    Args:
        option: the option that gave the address, for messages.
    """

    def __init__(self, option: str, url: str) -> None:
        self.option, self.url = option, url.rstrip("/")
        self._has_answered = False

    def ask_bytes(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> bytes:
        """The server's answer to a POST, or to a GET if there is no body.

        Args:
            timeout: seconds; None for TIMEOUT.

        Raises:
            Refused: it refuses the request.
            ValueError: the server does not answer.
        """
        request = Request(self.url + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        key = os.environ.get("OPENAI_API_KEY")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for wait in (*WAITS, None):
            try:
                with urlopen(request, timeout=TIMEOUT if timeout is None else timeout) as response:
                    content: bytes = response.read()
                self._has_answered = True
                return content
            except HTTPError as error:
                message, repeats = f"{error.code} {error.reason}, {_body(error)}", error.code in BUSY
                kind = ValueError if repeats else Refused
                wait = None if wait is None else max(wait, _retry_after(error))
            except (OSError, HTTPException) as error:
                message, repeats, kind = str(error) or type(error).__name__, self._has_answered, ValueError
            if wait is None or not repeats:
                raise kind(f"[{self.option}] {self.url}{path}: {message}")
            time.sleep(wait)
        raise AssertionError  # the last turn returns or raises

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> dict[str, Any]:
        """The same, of a server that answers with a JSON object.

        Raises:
            Refused: the server refuses the request.
            ValueError: it does not answer, or its answer is something else.
        """
        content = self.ask_bytes(path, body, timeout)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self.unexpected(path, content, "a JSON object")
        return answer

    def unexpected(self, path: str, answer: Any, expected: str) -> ValueError:
        """The error to raise when an answer has not the expected form."""
        return ValueError(f"[{self.option}] {self.url}{path} gave {short(answer)}, expected {expected}")


def _retry_after(error: HTTPError) -> float:
    """The seconds that a busy server asks to wait, at most a minute; 0 if it names none."""
    try:
        return min(60.0, float(error.headers.get("Retry-After") or 0))
    except ValueError:  # a date
        return 0.0


def _body(error: HTTPError) -> str:
    """What a server said beside the status of an error, if it lived to say it."""
    try:
        return short(error.read())
    except (OSError, HTTPException):
        return "nothing"


def seeds(count: int) -> list[int]:
    """One seed per request, from torch's global generator."""
    return torch.randint(2**31 - 1, (count,)).tolist()


def short(answer: Any) -> str:
    """The beginning of a server's answer, in one line."""
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else json.dumps(answer)
    return " ".join(text.split())[:200] or "nothing"
