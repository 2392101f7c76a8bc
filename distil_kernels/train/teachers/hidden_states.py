"""A teacher whose last hidden states a server gives, to which its head is applied here: the loss is that of the whole
vocabulary, as of teacher local, and no logits travel.

The server is ours (`serve_teacher`); the head comes from the model's files (`teacher_model`). At a token 2D bytes are
sent in bfloat16, where K log-probs are some 40K bytes of JSON and logits 2V. At the start the log-probs that head and
state make at one state are compared with those of the server's own forward: a wrong head, or states before the last
norm, do not pass. Each answer names the weights that it comes from, and one of other weights is an error.

Left out: vLLM's connector for hidden states, which has not been run here, and a directory that both sides see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_kernels.hf import CausalLM
from distil_kernels.train.config import Config
from distil_kernels.train.http_endpoint import Endpoint, seeds
from distil_kernels.train.models.heads import load_head
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Ends, Sampling, until_stop
from distil_kernels.train.teachers.base import HiddenTarget
from distil_kernels.train.teachers.in_process import check_same_tokens, with_head_like

SEQUENCES = 32
"""Completions in a request."""
STATES, LOGPROBS, ROLLOUTS, INFO = "/states", "/logprobs", "/rollouts", "/info"
TIMEOUT = 1800.0
"""Time limit of a request, seconds."""
PROBE = "The 12345 quick-brown foxes' größte Überraschung: 日本語, привет!"
CLOSE = 0.05
"""Nats that log-probs of tokens above 1 % may differ by on average, between head and states here and the server's."""


class HiddenTeacher:
    """A `Teacher` behind a server of hidden states.

    Raises:
        ValueError: there is no such server, its model is not `teacher_model`, or has other tokens than the student.
            Methods raise it when the server stops answering, or has other weights.
    """

    moves = False
    answers = True

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, student: Reader) -> None:
        self._config, self._device = config, student.weight.device
        self._endpoint = Endpoint("teacher_url", config.teacher_url)
        info = self._endpoint.ask(INFO)
        try:
            self.digest, self._hidden_size = bytes.fromhex(info["digest"]), int(info["hidden_size"])
            transform = int(info["vocab_size"]), float(info["logit_scale"]), float(info["logit_softcap"])
            self._dtype = str(info["dtype"])
        except (KeyError, TypeError, ValueError):
            raise self._endpoint.unexpected(INFO, info, "what serve_teacher says of its model") from None
        head = load_head(config.teacher_model, "teacher_model")
        check_same_tokens(tokenizer, head.tokenizer)
        if head.weight.shape[1] != self._hidden_size:
            raise ValueError(
                f"[teacher_model] the head of {config.teacher_model} takes states of {head.weight.shape[1]} numbers, "
                f"expected the {self._hidden_size} of {self._endpoint.url}, which serves {info.get('model')}"
            )
        bias = None if head.bias is None else head.bias.to(self._device)
        lm = CausalLM(None, None, head.weight.to(self._device), bias, *transform)
        self._check_head(lm, tokenizer(PROBE).input_ids)
        self._lm = with_head_like(lm, student)

    @property
    def head(self) -> tuple[Tensor | None, Tensor | None, float, float]:
        """The fields of `HiddenTarget` after its states."""
        return self._lm.weight, self._lm.bias, self._lm.logit_scale, self._lm.logit_softcap

    @property
    def note(self) -> str:
        """What a person should know of how the server is asked."""
        size = self._hidden_size * (4 if self._dtype == "float32" else 2)
        return f"{self._endpoint.url} sends {size} bytes a token: hidden states in {self._dtype}"

    def opened(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def head_opened(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @torch.no_grad()
    def target(self, batch: PackedBatch) -> HiddenTarget:
        count = len(batch.completions)
        parts = [slice(begin, begin + SEQUENCES) for begin in range(0, count, SEQUENCES)]
        rows, completions = batch.teacher_prompt_index, batch.completions
        with ThreadPoolExecutor(self._config.teacher_requests) as pool:
            asked = [pool.submit(self._states, batch.teacher_prompts, rows[part], completions[part]) for part in parts]
            states = torch.cat([answer.result() for answer in asked])
        return HiddenTarget(states.to(self._device), *self.head)

    def generate(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> list[Rollout]:
        """The server's completions."""
        stops = list(sampling.stop_ids)
        request = {
            "prompts": list(prompts), "prompt_index": list(prompt_index), "max_new_tokens": sampling.max_new_tokens,
            "stop_ids": stops, "temperature": sampling.temperature, "seed": seeds(1)[0],
        }  # fmt: skip
        answer = self._endpoint.ask(ROLLOUTS, request, TIMEOUT)
        completions = answer.get("completions")
        if not isinstance(completions, list) or len(completions) != len(prompt_index) or not all(completions):
            raise self._endpoint.unexpected(ROLLOUTS, answer, f"{len(prompt_index)} completions")
        return [Rollout.sampled(until_stop(tokens, set(stops), ends)) for tokens in completions]

    def follow(self) -> None:
        """A server does not follow the student."""

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest.hex()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the server has other weights than that of the run."""
        if state["digest"] != self.digest.hex():
            raise self._other_weights()

    def _states(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], completions: Sequence[list[int]]
    ) -> Tensor:
        """[N, D] of some completions.

        Raises:
            ValueError: the answer is something else, or of other weights.
        """
        used = sorted(set(prompt_index))
        place = {index: position for position, index in enumerate(used)}
        request = {
            "prompts": [prompts[index] for index in used], "prompt_index": [place[index] for index in prompt_index],
            "completions": list(completions),
        }  # fmt: skip
        content = self._endpoint.ask_bytes(STATES, request, TIMEOUT)
        shape = sum(map(len, completions)), self._hidden_size
        try:
            found = load(content)
            states, digest = found["states"], bytes(found["digest"].tolist())
        except (SafetensorError, KeyError, ValueError):
            states, digest = torch.empty(0), b""
        if states.shape != shape or not bool(states.isfinite().all()):
            raise self._endpoint.unexpected(STATES, content, f"finite states {list(shape)} as a safetensors file")
        if digest != self.digest:
            raise self._other_weights()
        return states

    def _check_head(self, lm: CausalLM, ids: list[int]) -> None:
        """Raises ValueError if head and states do not make the log-probs that the server's own forward gives."""
        answer = self._endpoint.ask(LOGPROBS, {"ids": ids}, TIMEOUT)
        try:
            theirs = torch.tensor(answer["logprobs"], dtype=torch.float32)
        except (KeyError, TypeError, ValueError):
            raise self._endpoint.unexpected(LOGPROBS, answer, "logprobs of the next token") from None
        state = self._states([ids], [0], [[0]]).to(lm.weight)
        if theirs.shape != (lm.vocab_size,) or len(lm.weight) < lm.vocab_size:
            raise ValueError(
                f"[teacher_model] {self._config.teacher_model} has a head of {len(lm.weight)} tokens, expected the "
                f"{lm.vocab_size} of {self._endpoint.url}"
            )
        ours = lm.logits(state)[0].float().log_softmax(-1).cpu()
        likely = theirs > -4.6
        likely[theirs.argmax()] = True
        distance = float((ours - theirs)[likely].abs().mean())
        if not distance <= CLOSE:
            raise ValueError(
                f"[teacher_model] the head of {self._config.teacher_model} makes other log-probs of the states of "
                f"{self._endpoint.url} than its own forward, by {distance:.2g} nats: expected the same model"
            )

    def _other_weights(self) -> ValueError:
        return ValueError(
            f"[teacher_url] {self._endpoint.url} has other weights than at the run's start, expected the same model"
        )
