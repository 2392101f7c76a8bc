"""Rollouts by a running vLLM server, a process with an environment of its own, that is given the student's weights.

    before each batch    weights -> files in the run directory -> the server reads them (its collective_rpc,
                         reload_weights) and forgets the prefixes that it has kept
    each rollout         prompt ids and a seed -> ids and log-probs of the sampled tokens

Server and trainer add up in another order, often in another precision: the distribution that a token was drawn from is
the server's, and the loss weighs the token by the ratio to it (`objective.Kept.behaviour`). How far the two are apart
is logged as `mismatch`, the mean of |log-prob difference|, and `mismatch_max`; when that is more than rounding, the
server does not have the student's weights (`health` says so).

Ids are sent and come back, text is never read. What a completion has after a tool call was sampled for nothing, and is
cut off here. Each completion has a seed from torch's generator, but vLLM's sums depend on what it computes together: a
resumed run repeats an uninterrupted one as far as the server repeats itself.

The files must lie where the server can read them, and are removed when it has. One that cannot read them has no weights
from then on (0.32), and must be started again. A tied head is written once more, on its
own: vLLM's CPU back end (0.32) packs the head when it starts, and reads it anew only where the served model's is not
tied. `python -m distil_kernels.train.rollouts.vllm_server MODEL DIRECTORY` makes such a copy to serve.

Left out: adapters (to merge them and take them off again would change the weights' last bits) and vLLM's transfers by
NCCL or CUDA's shared memory, which need no files but GPUs.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from distil_kernels.train.config import Config
from distil_kernels.train.models import loading
from distil_kernels.train.rollouts.http_endpoint import Endpoint
from distil_kernels.train.rollouts.sampling import Draw, Drawn, Ends, Sampling, until_stop
from distil_kernels.train.run.directory import WriteError
from distil_kernels.train.run.distributed import Processes
from distil_kernels.train.teachers.remote import seeds

AT_ONCE = 256
"""Completions that are asked for at once; what to compute together is the server's choice."""
TIMEOUT = 1800.0
"""Seconds that a completion, or reading the weights, may take."""
PATH = "/v1/completions"
PLAIN = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
}  # fmt: skip
"""The model's own distribution whatever its generation config says, until one of our stop tokens."""


class RolloutServer:
    """The vLLM server at config.rollout_url.

    Args:
        longest: number of tokens that a completion can have.
        directory: of the run; the server must see it under the same path.

    Raises:
        ValueError: there is none, it cannot be given weights, has no room for prompts and completions, or says
            log-probs at another temperature than the run's. Methods raise it when it stops answering.
    """

    def __init__(self, config: Config, longest: int, directory: Path, processes: Processes) -> None:
        self._endpoint = Endpoint("rollout_url", config.rollout_url)
        self._folder = directory.resolve() / "rollout_weights.tmp"
        self._processes = processes
        if processes.is_main:
            self._check(config, config.max_prompt_tokens + longest)

    def with_weights(self, model: PreTrainedModel) -> Draw:
        """Gives it the weights and returns how to sample from them; all processes call this, the main one does it."""
        if self._processes.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)
            write_weights(model, self._folder)
            where = {"weights_path": str(self._folder)}
            self._endpoint.ask("/collective_rpc", {"method": "reload_weights", "kwargs": where}, TIMEOUT)
            self._forget_prefixes()
            shutil.rmtree(self._folder)
        self._processes.from_main(None)  # the others wait
        return self._sample

    def _sample(
        self, prompts: Sequence[list[int]], rows: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> Drawn:
        """As `rollout.sample`."""
        common = completion_options(sampling)
        asked = [
            {"prompt": prompts[row], "seed": seed, **common} for row, seed in zip(rows, seeds(len(rows)), strict=True)
        ]
        with ThreadPoolExecutor(min(AT_ONCE, len(asked))) as pool:
            found = list(pool.map(self._completion, asked))
        stops = set(sampling.stop_ids)
        done = [until_stop(ids, stops, ends) for ids, _ in found]
        return Drawn(done, [logprobs[: len(ids)] for ids, (_, logprobs) in zip(done, found, strict=True)])

    def _completion(self, asked: dict[str, Any]) -> tuple[list[int], list[float]]:
        answer = self._endpoint.ask(PATH, asked, TIMEOUT)
        found = completion(answer)
        if found is None:
            raise self._endpoint.unexpected(PATH, answer, "a completion with token_ids and token_logprobs, as vLLM's")
        return found

    def _forget_prefixes(self) -> None:
        path = "/reset_prefix_cache"
        answer = self._endpoint.ask(path, {})
        if not answer.get("success"):
            raise self._endpoint.unexpected(path, answer, "a success, with nobody else's requests under way")

    def _check(self, config: Config, longest: int) -> None:
        """Before any work."""
        url, served = self._endpoint.url, self._endpoint.ask("/v1/models")
        try:
            room = int(served["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._endpoint.unexpected("/v1/models", served, "the model of a vLLM server") from None
        if room < longest:
            raise ValueError(
                f"[rollout_url] {url} takes {room} tokens, expected max_prompt_tokens and a completion, {longest}: a "
                "larger --max-model-len of the server, or a smaller --max_prompt_tokens"
            )
        try:
            self._forget_prefixes()
        except ValueError as error:
            raise ValueError(f"{error} (weights are for a server with VLLM_SERVER_DEV_MODE=1)") from None
        if config.temperature != 1.0:
            likeliest = []
            for temperature in (1.0, config.temperature):
                asked = completion_options(Sampling(1, [], temperature))
                answer = self._endpoint.ask(PATH, {"prompt": [0], **asked, "logprobs": 1})
                likeliest.append(max(answer["choices"][0]["logprobs"]["top_logprobs"][0].values()))
            if likeliest[0] == likeliest[1]:
                raise ValueError(
                    f"[temperature] {url} says log-probs at temperature 1, expected those of the run's "
                    f"{config.temperature}: a server with --logprobs-mode processed_logprobs"
                )


def completion_options(sampling: Sampling) -> dict[str, Any]:
    """How a request says it."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(sampling.stop_ids),
        **PLAIN,
    }


def completion(answer: dict[str, Any]) -> tuple[list[int], list[float]] | None:
    """Ids and log-probs of an answer's sampled tokens, the stop token with them; None where it has not both."""
    try:
        (choice,) = answer["choices"]
        ids, logprobs = choice["token_ids"], [float(value) for value in choice["logprobs"]["token_logprobs"]]
        is_whole = choice["finish_reason"] in ("stop", "length") and len(ids) == len(logprobs) > 0
    except (KeyError, TypeError, ValueError):
        return None
    return (ids, logprobs) if is_whole else None


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """As transformers saves a model, with a head of its own where it is tied."""
    state, seen = model.state_dict(), set()
    for name, tensor in state.items():
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    try:
        model.save_pretrained(folder, state_dict=state)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {folder}: {' '.join(str(error).split())}") from error


def write_served(name: str, folder: Path) -> None:
    """A copy of a model and its tokenizer whose head is not tied."""
    model, tokenizer = loading.load(name)
    write_weights(model, folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m distil_kernels.train.rollouts.vllm_server MODEL DIRECTORY")
    write_served(sys.argv[1], Path(sys.argv[2]))
