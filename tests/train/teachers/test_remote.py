"""Teachers behind an endpoint: llama.cpp's server with the default model's weights answers, our own model is compared.

The server rounds activations to 8 bits where ours stay float32, which moves log-probs by .06 nats on average and .25 at
most (with the same weights as float32 in its file: .0014 and .005). Other servers' forms of answer come from a relay
that rewrites what the real one said.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from llama_cpp import llama_server
from runs import FULL_CREDIT, QUICK, metrics, micro_batch, pack, packed, train, trainer
from tiny import llama_config
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distil_kernels.train import http_endpoint as client
from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.models import loading, smollm2
from distil_kernels.train.objective import fused_loss
from distil_kernels.train.rollouts.sampling import Sampling
from distil_kernels.train.rollouts.vllm_server import RolloutServer, completion, completion_options
from distil_kernels.train.run.distributed import ALONE
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.teachers.base import TopKTarget
from distil_kernels.train.teachers.remote import PROBE, RemoteTeacher

pytestmark = pytest.mark.slow

CLOSE = 0.1
"""Nats, on average over tokens with a probability above 1%; four times that at most."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with llama_server() as url:
        yield url


@pytest.fixture(scope="module")
def expert() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return loading.load(smollm2.NAME)


@pytest.fixture(scope="module")
def small(expert: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with the expert's tokens that takes no time."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("small")
    shape = llama_config(vocab_size=expert[0].config.vocab_size, eos_token_id=expert[1].eos_token_id)
    AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
    expert[1].save_pretrained(directory)
    return directory


@pytest.fixture
def relay(endpoint: str) -> Iterator[Callable[[Callable[[dict[str, Any]], Any]], str]]:
    """Starts a server before the endpoint: `change` gets the request and the answer, and returns another answer, an
    HTTP status, or bytes."""
    servers = []

    def start(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.path.endswith("/completions"):
                    return self.send_error(404)
                with urlopen(Request(f"{endpoint}/completions", asked), timeout=60) as response:
                    said = change({**json.loads(asked), "headers": self.headers}, json.load(response))
                if isinstance(said, int):
                    return self.send_error(said)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

            def log_message(self, *_: object) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def teacher(expert: tuple[Any, Any], url: str, kind: str = "remote", **changes: Any) -> RemoteTeacher:
    config = Config(teacher=kind, teacher_url=url, **changes)
    config.check()
    return RemoteTeacher(config, expert[1], expert[0].config.vocab_size, torch.device("cpu"))


def states(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[int], list[list[int]]]:
    prompts = [tokenizer(text).input_ids for text in ("Q: 12, 45, 78, 33\nA:", "The capital of France is")]
    return prompts, [0, 1, 1], [tokenizer(text).input_ids for text in (" 78\n\n", " Paris, of", " the city")]


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, prompts: list[list[int]], rows: list[int], completions: list) -> torch.Tensor:
    """[N, V] at each state."""
    found = []
    for row, done in zip(rows, completions, strict=True):
        logits = model(torch.tensor([prompts[row] + done[:-1]])).logits[0]
        found.append(logits[len(prompts[row]) - 1 :].log_softmax(-1))
    return torch.cat(found)


def test_a_state_before_a_character_of_many_tokens_has_log_probs(endpoint: str, expert: tuple[Any, Any]) -> None:
    """Where the token drawn is a piece of one, llama.cpp's answer has none: every other draw here."""
    prompt = expert[1]("日本語の文章を").input_ids
    asked = teacher(expert, endpoint, teacher_top=30)
    found = [asked.target(packed([prompt], [0], [[0]])) for _ in range(12)]
    own = own_logprobs(expert[0], [prompt], [0], [[0]])
    for given in found:
        likely = given.logprobs > math.log(0.01)
        assert likely.any() and (given.ids >= 0).all()
        assert (given.logprobs - own.gather(1, given.ids))[likely].abs().max() < 4 * CLOSE


def test_log_probs_are_the_models_own(endpoint: str, expert: tuple[Any, Any]) -> None:
    where = states(expert[1])
    found = teacher(expert, endpoint, teacher_top=30).target(packed(*where))
    own = own_logprobs(expert[0], *where)
    assert found.ids.shape == found.logprobs.shape == (len(own), 30) and (found.ids >= 0).all()
    likely = found.logprobs > math.log(0.01)
    assert likely.sum() > 2 * len(own)
    error = (found.logprobs - own.gather(1, found.ids))[likely].abs()
    assert error.max() < 4 * CLOSE and error.mean() < CLOSE, error
    assert (found.logprobs.diff(dim=1) <= 0).all() and (found.unmapped == 0).all()
    torch.testing.assert_close(found.tail, 1 - found.logprobs.exp().sum(1), atol=1e-6, rtol=0)
    first, second = (sum(map(len, where[2][:n])) for n in (1, 2))
    assert torch.equal(found.logprobs[first], found.logprobs[second])  # one prompt, nothing written yet: asked once


def test_a_token_that_does_not_count_costs_no_request(expert: tuple[Any, Any], relay: Callable[..., str]) -> None:
    seen: list[tuple[int, ...]] = []

    def change(asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        seen.append(tuple(asked["prompt"]))
        return answer

    other = teacher(expert, relay(change), teacher_top=5)
    prompts, rows, completions = states(expert[1])
    whole = other.target(packed(prompts, rows, completions))
    counts = [[True] * len(completions[0]), [False, *[True] * (len(completions[1]) - 1)], [False] * len(completions[2])]
    counted = torch.tensor([own for row in counts for own in row])
    seen.clear()
    found = other.target(packed(prompts, rows, completions, counts))
    asked = [
        tuple(prompts[row] + done[:n])
        for row, done, own in zip(rows, completions, counts, strict=True)
        for n in range(len(done))
        if own[n]
    ]
    text = tuple(expert[1](PROBE).input_ids)  # by which the server's model is known
    assert sorted(seen) == sorted([*asked, text])
    assert (found.ids[~counted] == -1).all() and (found.unmapped == 0).all()
    assert (found.logprobs[counted][:, 0] - whole.logprobs[counted][:, 0]).abs().max() < 4 * CLOSE
    seen.clear()
    nothing = other.target(packed(prompts, rows, completions, [[False] * len(done) for done in completions]))
    assert seen == [text] and nothing.ids.tolist() == [[-1]] * len(counted)


def test_shares_of_draws_are_the_models_probabilities(endpoint: str, expert: tuple[Any, Any]) -> None:
    """At one state 200 draws: each likely token's count is within 4 standard deviations of a binomial's."""
    prompts = [expert[1]("My favourite colour is").input_ids]
    number = 200
    other = teacher(expert, endpoint, "samples", teacher_samples=number, teacher_temperature=0.8)
    torch.manual_seed(3)
    found = other.target(packed(prompts, [0], [[1]]))
    assert found.logprobs.exp().sum() + found.unmapped[0] == pytest.approx(1.0, abs=1e-5)
    assert found.unmapped[0] < 0.05 and len(set(found.ids[0].tolist())) == found.ids.shape[1] > 5
    with torch.no_grad():
        own = (expert[0](torch.tensor(prompts)).logits[0, -1] / 0.8).softmax(-1)
    shares = torch.zeros_like(own).index_add_(0, found.ids[0], found.logprobs[0].exp())
    likely = own > 0.02
    assert likely.sum() >= 3
    deviation = (own[likely] * (1 - own[likely]) / number).sqrt()
    assert ((shares[likely] - own[likely]).abs() < 4 * deviation + 0.02).all(), (shares[likely], own[likely])
    torch.manual_seed(3)
    again = other.target(packed(prompts, [0], [[1]]))
    assert torch.equal(again.ids, found.ids) and torch.equal(again.logprobs, found.logprobs)
    assert not torch.equal(other.target(packed(prompts, [0], [[1]])).ids, found.ids)


def test_the_end_of_an_answer_is_a_token(endpoint: str, expert: tuple[Any, Any]) -> None:
    tokenizer = expert[1]
    text = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text).input_ids
    other = teacher(expert, endpoint, "samples", teacher_samples=6, teacher_temperature=0.01)
    sampling = Sampling(40, [tokenizer.eos_token_id], temperature=0.0)
    (rollout,) = other.generate([prompt], [0], sampling)
    answer = rollout.tokens
    assert 0 < len(answer) < 40 and "yes" in tokenizer.decode(answer).lower()
    found = other.target(packed([prompt + answer], [0], [[1]]))
    assert found.ids.tolist() == [[tokenizer.eos_token_id]] and found.logprobs.tolist() == [[0.0]]
    named = teacher(expert, endpoint, teacher_top=2).target(packed([prompt + answer], [0], [[1]]))
    assert named.ids[0, 0] == tokenizer.eos_token_id


def legacy(text: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    """An answer in the older form, texts to log-probs."""

    def change(asked: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
        for choice in said["choices"] if asked.get("logprobs") else []:
            (first,) = choice["logprobs"]["content"]
            named = {text(entry): entry["logprob"] for entry in first["top_logprobs"]}
            choice["logprobs"] = {"tokens": [text(first)], "top_logprobs": [named]}
        return said

    return change


def test_forms_of_an_answer(endpoint: str, expert: tuple[Any, Any], relay: Callable[..., str]) -> None:
    """Ids beside texts (llama.cpp), instead of them (vLLM), and texts alone, of which some are nobody's."""
    where = states(expert[1])
    direct = teacher(expert, endpoint).target(packed(*where))

    def whole(entry: dict[str, Any]) -> str:
        return bytes(entry["bytes"]).decode(errors="replace")  # llama.cpp cuts pieces of characters off its texts

    cases = (
        (lambda entry: f"token_id:{entry['id']}", lambda token: False),
        (whole, lambda token: "\ufffd" in expert[1].decode([token])),
        (lambda entry: whole(entry) + "\ufffd" * (entry["id"] % 2), lambda token: token % 2 == 1),
    )
    for form, nobodys in cases:
        found = teacher(expert, relay(legacy(form))).target(packed(*where))
        lost = torch.tensor([[nobodys(token) for token in row] for row in direct.ids.tolist()])
        for row in range(len(direct.ids)):
            assert torch.equal(found.ids[row][found.ids[row] >= 0], direct.ids[row][~lost[row]])
        mass = (direct.logprobs.exp() * lost).sum(1)
        torch.testing.assert_close(found.unmapped, mass, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.tail, direct.tail + mass, atol=1e-3, rtol=1e-3)
    assert mass.max() > 0.1


def test_loss_and_gradient_are_those_of_our_own_models_top_k(
    endpoint: str, expert: tuple[Any, Any], small: Path, tmp_path: Path
) -> None:
    run = trainer(small, tmp_path / "run", teacher="remote", teacher_url=endpoint, teacher_top=10, **FULL_CREDIT)
    groups = next(run.batches)[:2]
    run.roll_out(groups)
    batch = pack(groups)
    completions = batch.completions
    prompts = [rollout.teacher_prompt for group in groups for rollout in group.rollouts]
    theirs = run.teacher.target(batch)
    own = own_logprobs(expert[0], prompts, list(range(len(prompts))), completions)
    top = own.topk(10)
    ours = TopKTarget(top.indices, top.values, torch.zeros(len(own)))
    with torch.no_grad():
        start = run.student.states(batch.prompts, batch.prompt_index, completions)
        lowest = (start @ run.student.weight.t()).log_softmax(1).amin(1)

    def dense(taught: TopKTarget) -> torch.Tensor:
        return torch.zeros(len(own), own.shape[1] + 1).scatter(
            1, taught.ids % (own.shape[1] + 1), taught.logprobs.exp()
        )

    # Other requests decide what the server adds up together: its int8 activations then round otherwise.
    moved = (dense(theirs) - dense(ours)).abs().sum(1)
    assert moved.max() < 0.2

    def gradients(taught: TopKTarget, span: str) -> tuple[Any, ...]:
        hidden, config = start.clone().requires_grad_(), replace(run.config, credit_span=span)
        out = fused_loss(run.student, hidden, taught, batch, config, run.average)
        return out, *torch.autograd.grad(out.loss, [hidden, run.student.weight])

    # The credit is a difference of costs-to-go: what the server's rounding moves them by is a larger share of it.
    for span, cosine, ratio in (("none", 0.99, 1.1), ("future", 0.95, 1.3)):
        out, *found = gradients(theirs, span)
        expected, *wanted = gradients(ours, span)
        assert ((out.stats.ce - expected.stats.ce).abs() <= -lowest * moved + 1e-3).all()
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
        for mine, other in zip(found, wanted, strict=True):
            assert torch.cosine_similarity(mine.flatten(), other.flatten(), dim=0) > cosine
            assert 1 / ratio < mine.norm() / other.norm() < ratio
    assert out.credit.abs().max() > 0
    loss, _ = micro_batch(run, groups, 4.0)
    assert loss.item() == pytest.approx(out.loss.item(), rel=0.02)  # asked anew: the server rounds in another order
    assert all(parameter.grad.isfinite().all() for parameter in run.student.model.parameters())


@pytest.mark.parametrize(
    "options", [("remote", "--teacher_top", "5"), ("samples", "--teacher_samples", "4", "--baseline", "moving_average")]
)
def test_two_steps(endpoint: str, small: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    less = ("--prompts_per_step", "2", "--eval_problems", "2", "--max_new_tokens", "3")
    directory = train(small, tmp_path, "run", *less, "--teacher", *options, "--teacher_url", endpoint, steps=2)
    records = metrics(directory)
    steps = [record for record in records if record["kind"] == "step"]
    assert len(steps) == 2
    for record in steps:
        assert all(math.isfinite(record[key]) for key in ("loss", "grad_norm", "credit_to_cost"))
        assert record["loss"] == pytest.approx(record["ce"] * record["length"], rel=1e-5)
        assert record["ce"] == pytest.approx(record["kl"] + record["teacher_entropy"], rel=1e-4)
        assert 0 <= record["unmapped"] <= record["tail"] + 1e-6 < 1 and "reverse_kl" not in record
        if options[0] == "remote":
            assert record["tail"] > 0.01
        else:  # of 48 draws now and then one is no token of the student's
            assert record["tail"] == pytest.approx(record["unmapped"], abs=1e-6)
        assert record["teacher_prefers_right"] is None
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in evaluations] == [0, 2]
    assert all(0 <= record["teacher"] <= 1 for record in evaluations)
    (sample, *_) = [line for line in read_lines(directory / "rollouts.jsonl") if line["kind"] == "held_out"]
    assert len(sample["top"]) == len(sample["ce"]) and all(1 <= len(top) <= 5 for top in sample["top"])
    assert main(["inspect", str(directory)]) == 0 and main(["report", str(directory)]) == 0
    assert main(["--resume", str(directory), "--steps", "3"]) == 0


def test_the_expert_answers_better_than_chance(endpoint: str, expert: tuple[Any, Any], tmp_path: Path) -> None:
    """The teacher's accuracy is of what the endpoint says when it has read the correction."""
    run = trainer(
        Path(smollm2.NAME), tmp_path / "run", teacher="remote", teacher_url=endpoint, eval_problems=8,
        eval_samples=1, num_examples=2,
    )  # fmt: skip
    result = run.evaluator.evaluate(run.student, run.teacher)
    assert result is not None and result.teacher >= 0.5


def test_what_is_wrong_is_said_before_any_work(
    endpoint: str,
    expert: tuple[Any, Any],
    small: Path,
    tiny_model: Path,
    tmp_path: Path,
    relay: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(model: Path, url: str, kind: str = "remote") -> str:
        arguments = [
            "--model",
            str(model),
            "--runs_dir",
            str(tmp_path),
            "--name",
            "run",
            "--overwrite",
            "--steps",
            "0",
            *QUICK,
        ]
        assert main([*arguments, "--teacher", kind, "--teacher_url", url]) == 2
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return capsys.readouterr().err

    def without(asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "choices": [{**choice, "logprobs": None} for choice in answer["choices"]]}

    def shifted(asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"] if asked.get("logprobs") else []:
            for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
                entry["id"] += 1
        return answer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    began = time.perf_counter()
    message = said(small, dead)
    assert "[teacher_url]" in message and dead in message and "refused" in message
    assert time.perf_counter() - began < 20  # a wrong address is not tried again
    assert "404" in said(small, endpoint.replace("/v1", "/v2"))
    assert "expected a JSON object" in said(small, relay(lambda asked, answer: b"<html>"))
    assert "expected choices" in said(small, relay(lambda asked, answer: {"error": "?"}))
    assert "teacher samples needs none" in said(small, relay(without))
    for kind in ("remote", "samples"):
        message = said(tiny_model, endpoint, kind)  # a byte a token
        assert "[teacher_url]" in message and "where the student reads" in message and "one vocabulary" in message
    message = said(small, relay(shifted))
    assert "[teacher_url] token" in message and "to the student" in message
    message = said(small, relay(legacy(lambda entry: entry["token"] + "\ufffd?")))
    assert "names no token of the student's" in message


def test_it_is_no_server_of_rollouts(endpoint: str, tmp_path: Path) -> None:
    """llama.cpp takes no weights, which is known before any work; its answers have no ids as vLLM's, which is seen."""
    config = Config(rollout_url=endpoint.removesuffix("/v1"))
    config.check()
    with pytest.raises(ValueError, match=r"\[rollout_url\] .*/v1/models gave .*, expected the model of a vLLM server"):
        RolloutServer(config, config.max_new_tokens, tmp_path, ALONE)
    asked = completion_options(Sampling(3, [2]))
    answer = client.Endpoint("rollout_url", config.rollout_url).ask("/v1/completions", {"prompt": [1, 2], **asked})
    assert answer["usage"]["completion_tokens"] == 3 and completion(answer) is None


def test_a_busy_server_is_asked_again_and_the_key_is_sent(
    expert: tuple[Any, Any], relay: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WAITS", (0.01, 0.01))
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-test")
    seen: list[str] = []
    refused = iter([503, 429, 0, 503, 503, 0])

    def change(asked: dict[str, Any], answer: dict[str, Any]) -> Any:
        seen.append(f"{asked['headers']['Authorization']} {asked.get('model')}")
        return next(refused, 0) or answer

    other = teacher(expert, relay(change), teacher_model="large")
    assert seen == ["Bearer of-the-test large"] * len(seen) and len(seen) >= 6
    refused = iter([503] * 3)
    with pytest.raises(ValueError, match=r"\[teacher_url\] .*: 503"):
        other.target(packed([[1, 2]], [0], [[3]]))
    refused = iter([400])
    with pytest.raises(ValueError, match=r"\[teacher_url\] .*: 400"):
        other.target(packed([[1, 2]], [0], [[3]]))
    assert len(seen) == len([line for line in seen if "of-the-test" in line])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "remote"}, r"\[teacher_url\] .* got '' with teacher remote"),
        ({"teacher": "samples", "teacher_url": "localhost:8000"}, r"\[teacher_url\] .* got 'localhost:8000'"),
        ({"teacher_url": "http://localhost/v1"}, r"\[teacher_url\] .* with teacher frozen"),
        ({"objective": "jsd"}, r"\[objective\] teacher remote takes forward_ce, got jsd"),
        ({"backend": "cuda"}, r"\[backend\] teacher remote takes auto or reference, got cuda"),
        ({"plan": "recompute"}, r"\[plan\] teacher remote takes auto, got recompute"),
        ({"teacher_temperature": 0.5}, r"\[teacher_temperature\] teacher remote takes 1.0, got 0.5"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    whole = {"teacher": "remote", "teacher_url": "http://localhost:8000/v1"}
    with pytest.raises(ValueError, match=message):
        Config(**(options if "teacher" in options or "teacher_url" in options else {**whole, **options})).check()
    Config(**{**whole, "teacher": "samples", "teacher_temperature": 0.5}).check()
