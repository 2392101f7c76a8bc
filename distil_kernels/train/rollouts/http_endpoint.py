"""A server that is asked over HTTP: JSON there, JSON back, asked again while it is busy."""

from __future__ import annotations

import json
import os
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

TIMEOUT = 120.0
"""Seconds that one request may take."""
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try, of a busy server or of one that answered before."""
BUSY = (429, 500, 502, 503, 504)


class Endpoint:
    """The server at an address; the key is OPENAI_API_KEY of the environment.

    Args:
        option: the option that gave the address, for messages.
    """

    def __init__(self, option: str, url: str) -> None:
        self.option, self.url = option, url.rstrip("/")
        self._answered = False

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float = TIMEOUT) -> dict[str, Any]:
        """The answer to a POST, or without a body to a GET.

        Raises:
            ValueError: there is none, or it is no JSON object.
        """
        request = Request(self.url + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        key = os.environ.get("OPENAI_API_KEY")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for wait in (*WAITS, None):
            try:
                with urlopen(request, timeout=timeout) as response:
                    content = response.read()
                self._answered = True
                break
            except HTTPError as error:
                said, again = f"{error.code} {error.reason}, {short(error.read())}", error.code in BUSY
            except (OSError, HTTPException) as error:
                said, again = str(error) or type(error).__name__, self._answered
            if wait is None or not again:
                raise ValueError(f"[{self.option}] {self.url}{path}: {said}")
            time.sleep(wait)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self.unexpected(path, content, "a JSON object")
        return answer

    def unexpected(self, path: str, said: Any, expected: str) -> ValueError:
        return ValueError(f"[{self.option}] {self.url}{path} gave {short(said)}, expected {expected}")


def short(said: Any) -> str:
    """The beginning of what a server said, in one line."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else json.dumps(said)
    return " ".join(text.split())[:200] or "nothing"
