"""`python -m distil_kernels.train.serve_teacher MODEL`: a causal LM whose last hidden states teacher hidden asks for.

    GET  /info        {"model", "digest" of its weights, "hidden_size", "vocab_size", "dtype", "logit_scale",
                      "logit_softcap"}
    POST /states      {"prompts", "prompt_index", "completions"} -> a safetensors file: states [N, D] that predict the N
                      completion tokens, and the digest
    POST /logprobs    {"ids"} -> {"logprobs"} [V] of the next token by the model's own forward
    POST /rollouts    {"prompts", "prompt_index", "max_new_tokens", "stop_ids", "temperature", "seed"}
                      -> {"completions"}

Prompts and completions are token ids, and are read as the trainer reads them (`models.reading`), so that the states are
those of teacher local but for the rounding to `--dtype`. Requests are worked off one after another; each is a batch.
The head does not leave the server: who asks has the model's files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from distil_kernels.hf import split
from distil_kernels.train.models import loading
from distil_kernels.train.models.reading import reader
from distil_kernels.train.rollouts.sampling import Sampling, generate

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PROG = "python -m distil_kernels.train.serve_teacher"


class TeacherServer:
    """The server of a model; `serve_forever` answers until `close`.

    Args:
        name: path or hub name.
        dtype: of the states that are sent.
        precision: of the weights.

    Raises:
        ValueError: the model cannot be loaded, or has no linear head.
    """

    def __init__(
        self, name: str, host: str, port: int, dtype: str = "bfloat16", precision: str = "float32", device: str = "cpu"
    ) -> None:
        model, _ = loading.load(name, "MODEL")
        nn.Module.to(model, device=torch.device(device), dtype=DTYPES[precision]).requires_grad_(False)
        self._lm, self._dtype, self._lock = reader(split(model)), DTYPES[dtype], threading.Lock()
        self._digest = digest(model.parameters())
        self.info = {
            "model": name, "digest": self._digest.hex(), "hidden_size": self._lm.weight.shape[1], "dtype": dtype,
            "vocab_size": self._lm.vocab_size, "logit_scale": self._lm.logit_scale,
            "logit_softcap": str(self._lm.logit_softcap),
        }  # fmt: skip
        answers: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "/states": self._states,
            "/logprobs": self._logprobs,
            "/rollouts": self._rollouts,
        }
        info = json.dumps(self.info).encode()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                known = self.path == "/info"
                self._reply(200 if known else 404, info if known else b"expected /info")

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path not in answers:
                    return self._reply(404, b"expected " + ", ".join(answers).encode())
                try:
                    body = answers[self.path](json.loads(content))
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    return self._reply(400, f"{type(error).__name__}: {error}".encode())
                self._reply(200, body)

            def _reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ValueError(f"[port] cannot listen at {host}:{port}: {error.strerror}") from error
        self.url = f"http://{host}:{self._server.server_port}"

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _states(self, request: dict[str, Any]) -> bytes:
        with self._lock, torch.no_grad():
            states = self._lm.states(request["prompts"], request["prompt_index"], request["completions"])
        return save({"states": states.to(self._dtype).cpu(), "digest": torch.tensor(list(self._digest))})

    def _logprobs(self, request: dict[str, Any]) -> bytes:
        ids = torch.tensor([request["ids"]], device=self._lm.weight.device)
        with self._lock, torch.no_grad():
            logits = self._lm.model(ids).logits[0, -1]
        return json.dumps({"logprobs": logits.float().log_softmax(-1).tolist()}).encode()

    def _rollouts(self, request: dict[str, Any]) -> bytes:
        sampling = Sampling(request["max_new_tokens"], request["stop_ids"], request["temperature"])
        with self._lock, torch.random.fork_rng():
            torch.manual_seed(request["seed"])
            rollouts = generate(self._lm, request["prompts"], request["prompt_index"], sampling)
        return json.dumps({"completions": [rollout.tokens for rollout in rollouts]}).encode()


def digest(parameters: Any) -> bytes:
    """A hash that other weights hardly share, from the sums of their bits."""
    sums: list[int] = []
    for parameter in parameters:
        bits: Tensor = parameter.detach().view(torch.int16 if parameter.element_size() == 2 else torch.int32)
        sums.append(int(bits.sum(dtype=torch.int64)))
    return hashlib.sha256(json.dumps(sums).encode()).digest()


def main(arguments: Sequence[str]) -> int:
    """Serves until Ctrl-C, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="Serves a causal LM's last hidden states to teacher hidden."
    )
    parser.add_argument("model", metavar="MODEL", help="path or hub name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; anybody who reaches it is answered")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the states that are sent [bfloat16]")
    parser.add_argument("--precision", choices=DTYPES, default="float32", help="of the weights [float32]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    try:
        server = TeacherServer(given.model, given.host, given.port, given.dtype, given.precision, given.device)
    except (ValueError, RuntimeError) as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{given.model} at {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it else
    sys.exit(main(sys.argv[1:]))
