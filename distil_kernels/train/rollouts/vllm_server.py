"""Rollouts by a running vLLM server, a process in its own environment, to which the student's weights are given.

    before each batch    weights -> files in the run directory -> the server reads them (its collective_rpc,
                         reload_weights) and empties its prefix cache
    each rollout         prompt ids and a seed -> ids and log-probs of the sampled tokens

Server and trainer sum in different orders, often in different precisions. A token was sampled from the server's
distribution, and the loss weighs it by the ratio to that (`PackedBatch.behaviour_logprobs`). The record's `mismatch` is
the mean of |log-prob difference| between the two, `mismatch_max` its maximum; if it is more than rounding, the server
does not have the student's weights (`health` warns).

Ids are sent and come back, text is never read. The server does not stop at a tool call: the tokens after it are
discarded here. Each completion has a seed from torch's generator, but vLLM's sums depend on what it computes together:
a resumed run repeats an uninterrupted one as far as the server repeats itself.

The server must be able to read the files, which are removed afterwards. A server that cannot read them has no weights
from then on (0.32), and must be started again. A tied head is written a second time, under its own name: vLLM's CPU
back end (0.32) packs the head when it starts, and renews it only if the served model's head is not tied. The
command `untie` makes such a copy to serve.

Left out: adapters (to merge them and take them off again would change the weights' last bits) and vLLM's transfers by
NCCL or CUDA's shared memory, which need no files but GPUs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from distil_kernels.train.config import Config
from distil_kernels.train.http_endpoint import Endpoint, seeds
from distil_kernels.train.models import loading
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Ends, Generate, Sampling, until_stop
from distil_kernels.train.run.directory import WriteError
from distil_kernels.train.run.distributed import Processes

MAX_REQUESTS = 256
"""The number of completions requested at once; the server chooses what it computes together."""
TIMEOUT = 1800.0
"""Time limit of a completion, and of reading the weights, seconds."""
PATH = "/v1/completions"
PLAIN = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
}  # fmt: skip
"""Options that sample from the model's own distribution, whatever its generation config, until one of our stops."""


class RolloutServer:
    """The vLLM server at config.rollout_url.

    Args:
        longest: the largest number of tokens of a completion.
        directory: the run directory; the server must see it under the same path.

    Raises:
        ValueError: there is no such server, it cannot be given weights, has no room for prompts and completions, or
            states log-probs at another temperature than the run's. Methods raise it when the server stops answering.
    """

    def __init__(self, config: Config, longest: int, directory: Path, processes: Processes) -> None:
        self._endpoint = Endpoint("rollout_url", config.rollout_url)
        self._folder = directory.resolve() / "rollout_weights.tmp"
        self._processes = processes
        if processes.is_main:
            self._check(config, config.max_prompt_tokens + longest)

    def with_weights(self, model: PreTrainedModel) -> Generate:
        """Gives the server the model's weights, and returns the function that samples from them.

        All processes call this; the main one sends the weights.
        """
        with self._processes.all_or_none():  # the others wait
            if self._processes.is_main:
                shutil.rmtree(self._folder, ignore_errors=True)
                write_weights(model, self._folder)
                options = {"weights_path": str(self._folder)}
                self._endpoint.ask("/collective_rpc", {"method": "reload_weights", "kwargs": options}, TIMEOUT)
                self._reset_prefix_cache()
                shutil.rmtree(self._folder)
        return self._generate

    def _generate(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> list[Rollout]:
        """Samples completions as `sampling.generate` does, with the log-prob of each token."""
        options = completion_options(sampling)
        requests = [
            {"prompt": prompts[index], "seed": seed, **options}
            for index, seed in zip(prompt_index, seeds(len(prompt_index)), strict=True)
        ]
        with ThreadPoolExecutor(min(MAX_REQUESTS, len(requests))) as pool:
            completions = list(pool.map(self._completion, requests))
        stops = set(sampling.stop_ids)
        rollouts = []
        for ids, logprobs in completions:
            tokens = until_stop(ids, stops, ends)
            rollouts.append(Rollout.sampled(tokens, logprobs[: len(tokens)]))
        return rollouts

    def _completion(self, request: dict[str, Any]) -> tuple[list[int], list[float]]:
        answer = self._endpoint.ask(PATH, request, TIMEOUT)
        parsed = completion(answer)
        if parsed is None:
            raise self._endpoint.unexpected(PATH, answer, "a completion with token_ids and token_logprobs, as vLLM's")
        return parsed

    def _reset_prefix_cache(self) -> None:
        path = "/reset_prefix_cache"
        answer = self._endpoint.ask(path, {})
        if not answer.get("success"):
            raise self._endpoint.unexpected(path, answer, "a success, with nobody else's requests under way")

    def _check(self, config: Config, longest: int) -> None:
        """Raises ValueError if the server cannot do its part; before any work."""
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
            self._reset_prefix_cache()
        except ValueError as error:
            raise ValueError(f"{error} (weights are for a server with VLLM_SERVER_DEV_MODE=1)") from None
        if config.temperature != 1.0:
            likeliest = []
            for temperature in (1.0, config.temperature):
                options = completion_options(Sampling(1, [], temperature))
                answer = self._endpoint.ask(PATH, {"prompt": [0], **options, "logprobs": 1})
                likeliest.append(max(answer["choices"][0]["logprobs"]["top_logprobs"][0].values()))
            if likeliest[0] == likeliest[1]:
                raise ValueError(
                    f"[temperature] {url} says log-probs at temperature 1, expected those of the run's "
                    f"{config.temperature}: a server with --logprobs-mode processed_logprobs"
                )


def completion_options(sampling: Sampling) -> dict[str, Any]:
    """The fields of a request for a completion sampled like this."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(sampling.stop_ids),
        **PLAIN,
    }


def completion(answer: dict[str, Any]) -> tuple[list[int], list[float]] | None:
    """Ids and log-probs of the sampled tokens in an answer, stop token included; None if the answer lacks either."""
    try:
        (choice,) = answer["choices"]
        ids, logprobs = choice["token_ids"], [float(value) for value in choice["logprobs"]["token_logprobs"]]
        is_complete = choice["finish_reason"] in ("stop", "length") and len(ids) == len(logprobs) > 0
    except (KeyError, TypeError, ValueError):
        return None
    return (ids, logprobs) if is_complete else None


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Saves a model as transformers does, with a tied head as a tensor of its own."""
    state, seen = model.state_dict(), set()
    for name, tensor in state.items():
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    try:
        model.save_pretrained(folder, state_dict=state)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {folder}: {' '.join(str(error).split())}") from error


def write_served(name: str, folder: Path) -> None:
    """Writes a copy of a model, whose head is not tied, and its tokenizer."""
    model, tokenizer = loading.load(name)
    write_weights(model, folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}, indent=2) + "\n")
