"""A server of a small model that answers in the forms of vLLM, SGLang or (only for the next token) llama.cpp.

The forms are written from what vLLM (v0.26's protocol), SGLang (its logprob_result_processor) and TRL 1.16's client of
vLLM say of themselves. `change` sees every answer before it is sent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from distil_kernels.train.models import loading

Change = Callable[[str, dict[str, Any], dict[str, Any]], Any]
"""(path, request, answer) -> the answer, an HTTP status, bytes, or None to hang up."""


@functools.cache
def loaded(model: Path) -> tuple[Any, Any]:
    """The model and its tokenizer; who asks changes neither."""
    return loading.load(str(model))


class Served:
    """The server, `kind` "vllm", "sglang" or "next_token".

    Args:
        port: that of a server before this one; 0 for any.
    """

    def __init__(self, model: Path, kind: str, change: Change | None = None, port: int = 0) -> None:
        self.kind, self.change, self.paths = kind, change, Counter[str]()
        self.asked: list[dict[str, Any]] = []
        self.model, self.tokenizer = loaded(model)
        self._lock = threading.Lock()
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                said = served.answer(self.path, request)
                if said is None:
                    self.close_connection = True
                    return self.connection.close()
                if isinstance(said, int):
                    return self.send_error(said)
                body = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):  # who asked may be gone
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, request: dict[str, Any]) -> Any:
        with self._lock:
            self.paths[path] += 1
            self.asked.append(request)
            if path == "/v1/completions":
                said: Any = self._completions(request)
            elif path == "/generate" and self.kind == "sglang":
                said = self._generate(request)
            else:
                said = 404
        return said if self.change is None or said == 404 else self.change(path, request, said)

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[T, V]: row t is of the token after ids[: t + 1]."""
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _completions(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = request["prompt"]
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        generator = torch.Generator().manual_seed(request.get("seed", 0))
        choices: list[dict[str, Any]] = []
        for _ in range(request.get("n", 1)):
            tokens, first = list(ids), None
            for _ in range(request["max_tokens"]):
                row = self.logprobs(tokens)[-1]
                first = row if first is None else first
                heat = request.get("temperature", 1.0)
                drawn = torch.multinomial((row / heat).softmax(-1), 1, generator=generator) if heat else row.argmax()
                tokens.append(int(drawn))
            assert first is not None
            choice: dict[str, Any] = {
                "index": len(choices), "text": self.tokenizer.decode(tokens[len(ids) :]), "finish_reason": "length",
                "prompt_logprobs": None, "logprobs": None,
            }  # fmt: skip
            if request.get("logprobs") is not None:
                top = first.topk(request["logprobs"])
                named = {f"token_id:{i}": v for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
                choice["logprobs"] = {"tokens": [f"token_id:{tokens[len(ids)]}"], "top_logprobs": [named]}
            if self.kind == "vllm" and request.get("prompt_logprobs") is not None:
                rows = self.logprobs(ids)
                choice["prompt_logprobs"] = [
                    None,
                    *(self._entry(rows[t - 1], ids[t], request["prompt_logprobs"]) for t in range(1, len(ids))),
                ]
            choices.append(choice)
        return {"object": "text_completion", "choices": choices, "usage": {"prompt_tokens": len(ids)}}

    def _entry(self, row: torch.Tensor, own: int, top: int) -> dict[str, Any]:
        """vLLM's: the sequence's own token first, then the likeliest ones, of which it may be one (without texts)."""
        found, values = row.topk(top), row.tolist()
        ranks = {own: 1 + sum(value > values[own] for value in values)}
        ranks |= {token: rank for rank, token in enumerate(found.indices.tolist(), 1)}
        return {str(token): {"logprob": values[token], "rank": rank} for token, rank in ranks.items()}

    def _generate(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, start, top = request["input_ids"], request["logprob_start_len"], request["top_logprobs_num"]
        assert request["return_logprob"] and request["sampling_params"]["temperature"] == 1.0
        rows = self.logprobs(ids)
        start = len(ids) if start == -1 else start

        def likeliest(row: torch.Tensor) -> list[Any]:
            found = row.topk(top)
            return [[v, i, None] for v, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]

        later = range(start + 1, len(ids))
        first = [[None, ids[start], None]] if start < len(ids) else []
        return {
            "text": "?",
            "meta_info": {
                "prompt_tokens": len(ids),
                "input_token_logprobs": [*first, *([float(rows[t - 1][ids[t]]), ids[t], None] for t in later)],
                "input_top_logprobs": [*([None] if first else []), *(likeliest(rows[t - 1]) for t in later)],
                "output_top_logprobs": [likeliest(rows[-1])],
            },
        }


@contextlib.contextmanager
def serving(model: Path, kind: str, change: Change | None = None, port: int = 0) -> Iterator[Served]:
    server = Served(model, kind, change, port)
    try:
        yield server
    finally:
        server.close()
