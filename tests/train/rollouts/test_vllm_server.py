"""Rollouts by a vLLM server: requests, answers and importance weights here; the server itself where there is one.

VLLM_PYTHON names the Python of an environment with vLLM (its own: vLLM pins other versions than ours), which the tests
then start on a copy of the default model. The answer below is one of vLLM 0.32's, without what is not read.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, micro_batch, set_scores, states, train, trainer
from safetensors.torch import load_file
from tool_model import STOP, ids, python, started
from transformers import AutoModelForCausalLM
from vllm_process import vllm_server

from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.metrics import token_means
from distil_kernels.train.models import loading, smollm2
from distil_kernels.train.objective import UpdateState
from distil_kernels.train.rollouts.episodes import roll_out
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Generate, Sampling, generate
from distil_kernels.train.rollouts.vllm_server import (
    RolloutServer,
    completion,
    completion_options,
    write_weights,
)
from distil_kernels.train.run.distributed import ALONE
from distil_kernels.train.run.health import warnings

LOGPROBS = [
    -0.38569584488868713, -3.158146619796753, -0.7642336487770081, -0.04155159369111061, -2.5760645866394043,
    -3.9213552474975586, -2.58018159866333, -1.4139666557312012, -0.9080087542533875, -1.1703078746795654,
    -0.9893901944160461, -7.0545783042907715,
]  # fmt: skip
TOKENS = [216, 40, 28, 216, 41, 41, 41, 41, 41, 41, 28, 933]
ANSWER = {
    "id": "cmpl-93fe6498e96c34c2",
    "object": "text_completion",
    "choices": [
        {
            "index": 0,
            "text": " 8, 999999, [",
            "logprobs": {
                "text_offset": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
                "token_logprobs": LOGPROBS,
                "tokens": [" ", "8", ",", " ", "9", "9", "9", "9", "9", "9", ",", " ["],
            },
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": TOKENS,
            "prompt_logprobs": None,
        }
    ],
    "usage": {"prompt_tokens": 20, "total_tokens": 32, "completion_tokens": 12},
}


def test_what_is_asked_for() -> None:
    """Our distribution and stops, whatever the served model's generation config says."""
    assert completion_options(Sampling(12, [2, 198], 0.7)) == {
        "max_tokens": 12, "temperature": 0.7, "stop_token_ids": [2, 198], "ignore_eos": True, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0,
        "return_token_ids": True,
    }  # fmt: skip


def test_what_is_read_of_an_answer() -> None:
    (choice,) = ANSWER["choices"]  # type: ignore[misc]
    logprobs = choice["logprobs"]
    assert completion(ANSWER) == (TOKENS, LOGPROBS)
    for changed in (
        {"token_ids": None},
        {"token_ids": TOKENS[:-1]},
        {"token_ids": [], "logprobs": {**logprobs, "token_logprobs": []}},
        {"logprobs": None},
        {"logprobs": {**logprobs, "token_logprobs": [None] * 12}},
        {"finish_reason": "abort"},
    ):
        assert completion({"choices": [{**choice, **changed}]}) is None
    assert completion({"choices": [choice, choice]}) is None and completion({"error": "?"}) is None


def test_weights_have_the_head_on_its_own(tiny_model: Path, tmp_path: Path) -> None:
    model, _ = loading.load(str(tiny_model))
    assert model.config.tie_word_embeddings
    write_weights(model, tmp_path / "weights")
    files = load_file(tmp_path / "weights" / "model.safetensors")
    expected = model.state_dict()
    assert files.keys() == expected.keys() and "lm_head.weight" in files
    assert all(torch.equal(files[name], value) for name, value in expected.items())
    assert main(["untie", str(tiny_model), str(tmp_path / "served")]) == 0
    served, tokenizer = loading.load(str(tmp_path / "served"))
    tokens = torch.tensor([tokenizer("12, 45").input_ids])
    assert not served.config.tie_word_embeddings
    assert served.lm_head.weight.data_ptr() != served.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(served(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("objective", ["forward_ce", "policy_gradient"])
def test_the_gradient_by_definition(tiny_model: Path, tmp_path: Path, objective: str) -> None:
    """Weighted by the ratio to where the tokens were sampled, from the first update on."""
    run = trainer(
        tiny_model, tmp_path / "run", objective=objective, credit_span="none", teacher="frozen", temperature=0.8,
        importance_clip=1.05, normalize_advantages=False,
    )  # fmt: skip
    batch = next(run.batches)
    run.roll_out(batch)
    run.seen = batch  # type: ignore[attr-defined]
    torch.manual_seed(3)
    apart, weighted, total = [], [], torch.zeros((), dtype=torch.float64)
    students = iter(states(run))
    for index, group in enumerate(batch):
        set_scores(group, float(index), float(index + 1))
        for i, rollout in enumerate(group.rollouts):
            s, done = next(students), rollout.tokens
            own = s.gather(1, torch.tensor(done)[:, None])[:, 0]
            said = own.detach() + 0.2 * torch.randn(len(done))
            rollout.logprobs = said.tolist()
            ratio = (own - said).exp()
            apart += (own.detach() - said).abs().tolist()
            weighted += ratio.tolist()
            if objective == "policy_gradient":
                advantage = 0.5 if i else -0.5
                total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
                continue
            prompt = rollout.teacher_prompt
            with torch.no_grad():
                t = run.teacher.lm.model(torch.tensor([prompt + done])).logits[0, len(prompt) - 1 : -1]
                t = t.double().log_softmax(-1)
            total = total - (ratio.detach().clamp(max=1.05)[:, None] * t.exp() * s).sum()
    (total / 8).backward()
    expected = {name: parameter.grad.clone() for name, parameter in run.student.model.named_parameters()}
    run.student.model.zero_grad()
    state = UpdateState()
    _, sums = micro_batch(run, batch, 8.0, state)
    assert min(weighted) < 0.8 and max(weighted) > 1.2
    for name, parameter in run.student.model.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=2e-4 * scale)
    figures = token_means([sums, sums])
    assert figures["mismatch"] == pytest.approx(sum(apart) / len(apart), rel=1e-3)
    assert figures["mismatch_max"] == pytest.approx(max(apart), rel=1e-3) and "drift" not in figures
    _, later = micro_batch(run, batch, 8.0, state)
    assert "mismatch" not in token_means([later]) and "drift" in token_means([later])


def test_tokens_that_do_not_count_are_in_no_mismatch(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run")
    batch = next(run.batches)
    run.roll_out(batch)
    run.seen = batch  # type: ignore[attr-defined]
    rollouts = [rollout for group in batch for rollout in group.rollouts]
    for rollout, s in zip(rollouts, states(run), strict=True):
        rollout.logprobs = s.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0].tolist()
    rollouts[0].teacher_prompt = None
    rollouts[0].logprobs = [-99.0] * len(rollouts[0].tokens)
    _, sums = micro_batch(run, batch, 8.0)
    assert token_means([sums])["mismatch_max"] < 1e-4


def test_log_probs_go_with_their_tokens_through_tool_calls(lm: Any) -> None:
    def server(*arguments: Any) -> list[Rollout]:
        """The log-prob of a token is minus its id."""
        rollouts = generate(lm, *arguments)
        return [Rollout.sampled(rollout.tokens, [-float(token) for token in rollout.tokens]) for rollout in rollouts]

    prompts = [ids(f"{letter}:") for letter in "abca"]
    rollouts = roll_out(server, prompts, range(4), Sampling(20, STOP, temperature=0.0), started(python(2, 3), 4))
    assert not all(all(rollout.by_model) for rollout in rollouts)
    for rollout in rollouts:
        expected = [-float(t) if own else 0.0 for t, own in zip(rollout.tokens, rollout.by_model, strict=True)]
        assert rollout.logprobs == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_url": "localhost:8000"}, r"\[rollout_url\] expected http://HOST:PORT, got 'localhost:8000'"),
        ({"lora_rank": 4}, r"\[lora_rank\] rollout_url takes 0, got 4"),
        ({"shard": True}, r"\[shard\] rollout_url takes False, got True"),
        ({"top_p": 0.9, "off_policy": True}, r"\[top_p\] rollout_url takes 1.0, got 0.9"),
        ({"top_k": 5, "off_policy": True}, r"\[top_k\] rollout_url takes none, got 5"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{"rollout_url": "http://localhost:8000", **options}).check()


@pytest.mark.parametrize(("mismatches", "warned"), [((1e-5, 0.02), True), ((0.02, 0.05), False), ((0.2, 0.2), True)])
def test_other_weights_are_named(mismatches: tuple[float, float], warned: bool) -> None:
    records = [{"kind": "step", "mismatch": value} for value in mismatches]
    found = dict(warnings(records, Config()))
    assert ("does not have the student's weights" in found.get("server", "")) == warned


def test_nobody_answers(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "run", "--rollout_url", url]
    assert main(arguments) == 2
    assert f"[rollout_url] {url}/v1/models" in capsys.readouterr().err


# The server itself.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(tmp_path_factory.mktemp("served"), "processed_logprobs") as url:
        yield url


def draws(server: str, directory: Path, model: Any, **settings: Any) -> Generate:
    config = Config(rollout_url=server, **settings)
    config.check()
    return RolloutServer(config, config.max_new_tokens, directory, ALONE).with_weights(model)


@torch.no_grad()
def apart(model: Any, prompt: list[int], rollouts: list[Rollout], temperature: float) -> float:
    """The largest |log-prob difference| between the server and the model."""
    largest = 0.0
    for rollout in rollouts:
        done = rollout.tokens
        logits = model(torch.tensor([prompt + done])).logits[0, len(prompt) - 1 : -1] / temperature
        own = logits.log_softmax(-1).gather(1, torch.tensor(done)[:, None])[:, 0]
        largest = max(largest, float((own - torch.tensor(rollout.logprobs)).abs().max()))
    return largest


def test_what_the_server_samples(server: str, tmp_path: Path) -> None:
    """From the weights that it was given last, every one of them; its log-probs are those of the temperature."""
    model, tokenizer = loading.load(smollm2.NAME)
    prompt, stops = tokenizer("Q: 12, 45, 78, 33\nA:").input_ids, [tokenizer.eos_token_id, 198]
    sampling = Sampling(12, stops, 0.7)
    draw = draws(server, tmp_path, model, temperature=0.7)
    torch.manual_seed(0)
    first = draw([[1], prompt], [1] * 6, sampling, None)
    assert apart(model, prompt, first, 0.7) < 1e-3 and len({tuple(rollout.tokens) for rollout in first}) > 2
    for done in (rollout.tokens for rollout in first):
        assert done[-1] in stops or len(done) == 12
        assert not set(done[:-1]) & set(stops)
    torch.manual_seed(0)
    assert draw([prompt], [0] * 6, sampling, None) == first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01).add_(0.05 * parameter.std() * torch.randn_like(parameter))
    assert apart(model, prompt, draw([prompt], [0] * 6, sampling, None), 0.7) > 0.1
    draw = draws(server, tmp_path, model, temperature=0.7)
    assert apart(model, prompt, draw([prompt], [0] * 6, sampling, None), 0.7) < 1e-3
    assert not list(tmp_path.iterdir())
    short = draw([prompt], [0] * 6, sampling, lambda tokens: len(tokens) == 2)
    assert all(len(rollout.tokens) <= 2 for rollout in short)
    with pytest.raises(ValueError, match=r"\[rollout_url\] .* takes 1100 tokens, expected .* 1112"):
        draws(server, tmp_path, model, max_prompt_tokens=1100)


@pytest.mark.parametrize("objective", ["forward_ce", "policy_gradient"])
def test_two_steps(server: str, tmp_path: Path, objective: str) -> None:
    extra = ["--rollout_url", server, "--objective", objective, "--learning_rate", "1e-4", "--eval_problems", "2"]
    directory = train(Path(smollm2.NAME), tmp_path, "run", *extra, steps=2)
    steps = [record for record in metrics(directory) if record["kind"] == "step"]
    assert len(steps) == 2 and all(0 < record["mismatch"] <= record["mismatch_max"] < 1e-3 for record in steps)
    assert all(math.isfinite(record["loss"]) for record in steps)
    assert main(["--resume", str(directory), "--steps", "3"]) == 0
    assert [r["mismatch"] < 1e-3 for r in metrics(directory) if r["kind"] == "step"] == [True] * 3
    assert AutoModelForCausalLM.from_pretrained(directory / "checkpoint").config.tie_word_embeddings
