"""One request for each sequence, in the forms of vLLM and SGLang.

A server of the tests' own answers (`served`) with a small model's numbers, and a real vLLM where there is one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QUICK, metrics, packed, train
from served import Served, loaded, serving
from tiny import save_tiny_model
from vllm_process import vllm_server

from distil_kernels.train import http_endpoint
from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.teachers.remote import RemoteTeacher

pytestmark = pytest.mark.slow

FORMS = ("vllm", "sglang")
PATHS = {"vllm": "/v1/completions", "sglang": "/generate"}
PROMPTS, INDEX, COMPLETIONS = [[5, 6, 7], [9]], [0, 0, 1, 1], [[11, 12], [13, 14, 15], [16], [16]]


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the student's tokens, flatter than it: K tokens are not all there is."""
    return save_tiny_model(tmp_path_factory.mktemp("expert"), initializer_range=0.15, hidden_size=48)


@pytest.fixture(scope="module")
def other_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("other"), initializer_range=0.15, hidden_size=64)


def teacher(student: Path, url: str, **changes: Any) -> RemoteTeacher:
    config = Config(teacher="remote", teacher_url=url, **changes)
    config.check()
    model, tokenizer = loaded(student)
    return RemoteTeacher(config, tokenizer, model.config.vocab_size, torch.device("cpu"))


def own_topk(server: Served, top: int) -> torch.return_types.topk:
    rows = [
        server.logprobs(PROMPTS[index] + done)[len(PROMPTS[index]) - 1 : -1]
        for index, done in zip(INDEX, COMPLETIONS, strict=True)
    ]
    return torch.cat(rows).topk(top)


@pytest.mark.parametrize("form", FORMS)
def test_log_probs_are_the_models_own(tiny_model: Path, expert: Path, form: str) -> None:
    with serving(expert, form) as server:
        asked = teacher(tiny_model, server.url, teacher_top=7)
        server.paths.clear()
        found = asked.target(packed(PROMPTS, INDEX, COMPLETIONS))
        assert server.paths == {PATHS[form]: 3 + 1}  # two equal sequences are one; one text for the model's identity
        own = own_topk(server, 7)
    assert torch.equal(found.ids, own.indices) and (found.unmapped == 0).all()
    torch.testing.assert_close(found.logprobs, own.values, atol=1e-5, rtol=1e-5)
    assert form.removesuffix("lang") in asked.note.lower().replace("sglang", "sg")


@pytest.mark.parametrize("form", FORMS)
def test_only_what_learns_is_asked_for(tiny_model: Path, expert: Path, form: str) -> None:
    counts = [[True, False], [False, True, False], [False], [False]]
    with serving(expert, form) as server:
        asked = teacher(tiny_model, server.url, teacher_top=5)
        server.asked.clear()
        found = asked.target(packed(PROMPTS, INDEX, COMPLETIONS, counts))
        sent = [request.get("prompt") or request["input_ids"] for request in server.asked]
        own = own_topk(server, 5)
        assert sorted(sent)[:2] == [[5, 6, 7, 11], [5, 6, 7, 13, 14]] and len(sent) == 3
        nothing = asked.target(packed(PROMPTS, INDEX, COMPLETIONS, [[False] * len(done) for done in COMPLETIONS]))
    learns = torch.tensor([flag for flags in counts for flag in flags])
    assert torch.equal(found.ids[learns], own.indices[learns]) and (found.ids[~learns] == -1).all()
    assert nothing.ids.tolist() == [[-1]] * 7


def test_a_token_that_the_student_lacks_goes_to_the_bucket(tiny_model: Path, tmp_path: Path) -> None:
    larger = save_tiny_model(tmp_path / "larger", vocab_size=300)
    with serving(larger, "vllm") as server:
        found = teacher(tiny_model, server.url, teacher_top=40).target(packed(PROMPTS, INDEX, COMPLETIONS))
        own = own_topk(server, 40)
    assert (found.ids < 260).all()
    mass = (own.values.exp() * (own.indices >= 260)).sum(1)
    assert mass.max() > 0.001
    torch.testing.assert_close(found.unmapped, mass, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.tail, 1 - (own.values.exp() * (own.indices < 260)).sum(1), atol=1e-5, rtol=1e-4)


def test_a_run_is_the_one_that_asks_for_each_state(
    tiny_model: Path, expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--teacher", "remote", "--teacher_top", "9", "--eval_problems", "1", "--eval_every", "0")
    requests, records = {}, {}
    for kind in (*FORMS, "next_token"):
        with serving(expert, kind) as server:
            directory = train(tiny_model, tmp_path, kind, *options, "--teacher_url", server.url, steps=2)
            requests[kind] = sum(server.paths.values())
        records[kind] = [record for record in metrics(directory) if record["kind"] == "step"]
        assert ("once for each sequence" if kind in FORMS else "once for each token") in capsys.readouterr().out
    for form in FORMS:
        assert requests[form] < requests["next_token"] - 2 * 6 * 2
        for ours, theirs in zip(records[form], records["next_token"], strict=True):
            for name in ("loss", "ce", "kl", "tail", "grad_norm", "unmapped"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
            assert ours["tail"] > 0.001


def entries(path: str, request: dict[str, Any], answer: dict[str, Any]) -> list[Any]:
    """The lists of [id, log-prob] of a sequence's answer, writable; empty for any other answer."""
    if path == "/generate" and request["logprob_start_len"] >= 0:
        return [row for row in answer["meta_info"]["input_top_logprobs"] if row]
    if request.get("prompt_logprobs"):
        return [row for row in answer["choices"][0]["prompt_logprobs"] or [] if row]
    return []


def bent(bend: Callable[[list[float]], list[float]]) -> Callable[[str, dict[str, Any], dict[str, Any]], Any]:
    """A server that does something to the log-probs of a state in a sequence."""

    def change(path: str, request: dict[str, Any], answer: dict[str, Any]) -> Any:
        for row in entries(path, request, answer):
            values = [entry["logprob"] for entry in row.values()] if isinstance(row, dict) else [e[0] for e in row]
            for entry, value in zip(row.values() if isinstance(row, dict) else row, bend(values), strict=True):
                entry["logprob" if isinstance(entry, dict) else 0] = value
        return answer

    return change


def hotter(values: list[float]) -> list[float]:
    """What temperature 1.25 makes of log-probs, as if the named tokens were all."""
    total = math.log(sum(math.exp(value / 1.25) for value in values))
    return [value / 1.25 - total - 0.2 for value in values]


def nucleus(values: list[float]) -> list[float]:
    keep = sorted(values, reverse=True)[:3]
    total = math.log(sum(map(math.exp, keep)))
    return [value - total if value in keep else -9999.0 for value in values]


def shortened(path: str, request: dict[str, Any], answer: dict[str, Any]) -> Any:
    for row in entries(path, request, answer):
        for token in list(row)[4:] if isinstance(row, dict) else []:
            del row[token]
        if isinstance(row, list):
            del row[4:]
    return answer


def truncated(path: str, request: dict[str, Any], answer: dict[str, Any]) -> Any:
    if entries(path, request, answer):
        if path == "/generate":
            for rows in ("input_token_logprobs", "input_top_logprobs"):
                del answer["meta_info"][rows][1:3]
        else:
            del answer["choices"][0]["prompt_logprobs"][1:3]
    return answer


def shifted(path: str, request: dict[str, Any], answer: dict[str, Any]) -> Any:
    """A token of the server's own before the sequence."""
    if entries(path, request, answer):
        if path == "/generate":
            for rows in ("input_token_logprobs", "input_top_logprobs"):
                answer["meta_info"][rows] = [*answer["meta_info"][rows][:2], *answer["meta_info"][rows][1:-1]]
        else:
            rows = answer["choices"][0]["prompt_logprobs"]
            answer["choices"][0]["prompt_logprobs"] = [None, *rows[1:2], *rows[1:-1]]
    return answer


BENT = {
    "a temperature": (bent(hotter), "0.80 times as far apart"),
    "top_p": (bent(nucleus), "gives 3 log-probs at a state, expected teacher_top, 9"),
    "logits": (bent(lambda values: [value + 9.0 for value in values]), "expected at most 1: log-probs and not logits"),
    "an offset": (bent(lambda values: [value - 0.7 for value in values]), "differ by 0.70 nats on average"),
    "fewer": (shortened, "log-probs at a state, expected teacher_top, 9"),
    "no numbers": (bent(lambda values: [math.nan] * len(values)), "gives 0 log-probs at a state"),
    "cut": (truncated, "expected its"),
    "shifted": (shifted, "as they were sent"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_bends_is_refused(tiny_model: Path, expert: Path, form: str) -> None:
    for name, (change, expected) in BENT.items():
        with serving(expert, form, change) as server, pytest.raises(ValueError) as error:
            teacher(tiny_model, server.url, teacher_top=9)
        assert str(error.value).startswith("[teacher_url]") and expected in str(error.value), name


def test_it_is_refused_before_the_run(
    tiny_model: Path, expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(expert, "vllm", BENT["a temperature"][0]) as server:
        arguments = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "run", *QUICK]
        assert main([*arguments, "--teacher", "remote", "--teacher_top", "9", "--teacher_url", server.url]) == 2
    message = capsys.readouterr().err
    assert BENT["a temperature"][1] in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_more_log_probs_than_the_server_allows_are_refused_in_its_words(tiny_model: Path, expert: Path) -> None:
    def limited(path: str, request: dict[str, Any], answer: dict[str, Any]) -> Any:
        return 400 if max(request.get("prompt_logprobs") or 0, request.get("logprobs") or 0) > 20 else answer

    with serving(expert, "vllm", limited) as server:
        with pytest.raises(ValueError, match=r"\[teacher_url\] .*: 400"):
            teacher(tiny_model, server.url, teacher_top=30)
        assert "once for each sequence" in teacher(tiny_model, server.url, teacher_top=20).note


# --- faults


class Faults:
    """Calls `fault` on the answers to sequences from the `number`-th after `arm` on."""

    def __init__(self, fault: Callable[[int], Any], number: int = 2) -> None:
        self.fault, self.number, self.count, self._lock = fault, number, -1, threading.Lock()

    def arm(self) -> None:
        self.count = 0

    def __call__(self, path: str, request: dict[str, Any], answer: dict[str, Any]) -> Any:
        with self._lock:
            if self.count < 0 or not entries(path, request, answer):
                return answer
            self.count += 1
            said = self.fault(self.count - self.number) if self.count >= self.number else answer
        return answer if said is ... else said


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_learnt_from_half_an_answer(tiny_model: Path, expert: Path, form: str) -> None:
    field = {"vllm": "prompt_logprobs with", "sglang": "input_top_logprobs with"}[form]
    row = {"choices": [{"prompt_logprobs": [None, {"7": {}}]}], "meta_info": {"input_top_logprobs": [None, [[0.0]]]}}
    given = [
        (b"<html>", "expected a JSON object"),
        (b'{"choices": [{"prompt_log', "expected a JSON object"),
        (b"", "nothing"),
        ({}, field),
        (row, field if form == "sglang" else "expected its"),
    ]
    now: list[Any] = []
    change = Faults(lambda turn: now[-1])
    with serving(expert, form, change) as server:
        asked = teacher(tiny_model, server.url, teacher_top=5, teacher_requests=1)
        for said, expected in given:
            now.append(said)
            change.arm()
            with pytest.raises(ValueError, match=rf"\[teacher_url\] .*{expected}"):
                asked.target(packed(PROMPTS, INDEX, COMPLETIONS))


@pytest.mark.parametrize("form", FORMS)
def test_a_request_that_fails_once_is_asked_again(
    tiny_model: Path, expert: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that hangs up, is busy, answers half, or too late, and then as it should: as if nothing had been."""
    monkeypatch.setattr(http_endpoint, "WAITS", (0.01, 0.01))
    batch = packed(PROMPTS, INDEX, COMPLETIONS)

    def late(turn: int) -> Any:
        if turn == 0:
            time.sleep(1.5)
        return ...

    faults = {
        "hangs up": lambda turn: None if turn == 0 else ...,
        "busy": lambda turn: 503 if turn < 2 else ...,
        "late": late,
    }
    for name, fault in faults.items():
        change = Faults(fault)
        with serving(expert, form, change) as server:
            asked = teacher(tiny_model, server.url, teacher_top=5, teacher_requests=1)
            expected = asked.target(batch)
            monkeypatch.setattr(http_endpoint, "TIMEOUT", 1.0 if name == "late" else 60.0)
            change.arm()
            found = asked.target(batch)
            assert change.count == 4 + (2 if name == "busy" else 1), name
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.logprobs, expected.logprobs)
        monkeypatch.setattr(http_endpoint, "TIMEOUT", 60.0)


FAULTY = [
    "--eval_every", "0", "--eval_problems", "1", "--eval_rollouts", "1", "--checkpoint_every", "0",
    "--teacher", "remote", "--teacher_top", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def unharmed(tiny_model: Path, expert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    with serving(expert, "vllm") as server:
        runs = tmp_path_factory.mktemp("unharmed")
        return metrics(train(tiny_model, runs, "run", *FAULTY, "--teacher_url", server.url, steps=3))


@pytest.mark.parametrize(("fault", "expected"), [("dies", "closed"), ("another model", "expected the same model")])
def test_a_run_ends_with_a_checkpoint_when_its_server_fails(
    tiny_model: Path,
    expert: Path,
    other_expert: Path,
    unharmed: list[dict[str, object]],
    fault: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the second step the server dies, or has another model. The run says so, keeps the first step, and goes on from
    it to what an unharmed run is."""
    monkeypatch.setattr(http_endpoint, "WAITS", (0.01,))
    ask, calls, change = RemoteTeacher.target, [0], Faults(lambda turn: None if fault == "dies" else ...)
    with serving(expert, "vllm", change) as server:

        def target(self: RemoteTeacher, batch: Any) -> Any:
            calls[0] += 1
            if calls[0] == 3:  # the first is of the rollouts that the evaluation shows
                change.arm()
                server.model = loaded(other_expert)[0] if fault == "another model" else server.model
            return ask(self, batch)

        monkeypatch.setattr(RemoteTeacher, "target", target)
        start = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "run", "--steps", "3", *QUICK]
        assert main([*start, *FAULTY, "--teacher_url", server.url]) == 1
        said = capsys.readouterr()
        assert "[teacher_url]" in said.err and expected in said.err, said.err
        assert "step 1 is saved" in said.out
        if fault == "another model":
            assert main(["--resume", str(tmp_path / "run")]) == 2
            assert expected in capsys.readouterr().err
        change.count, server.model = -1, loaded(expert)[0]
        assert main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == unharmed


def test_requests_under_way_have_a_bound(tiny_model: Path, expert: Path) -> None:
    """Three wait for each other, and no fourth is there."""
    now, most, together, lock = [0], [0], threading.Barrier(3), threading.Lock()

    def change(path: str, request: dict[str, Any], answer: dict[str, Any]) -> Any:
        if len(request["prompt"]) != 2:  # the text by which the server's model is known
            return answer
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(60)
        with lock:
            now[0] -= 1
        return answer

    with serving(expert, "vllm", change) as server:
        asked = teacher(tiny_model, server.url, teacher_top=5, teacher_requests=3)
        asked.target(packed([[n] for n in range(1, 13)], list(range(12)), [[20]] * 12))
    assert most[0] == 3


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits"])
def test_a_real_vllm(tmp_path: Path, mode: str) -> None:
    """Its log-probs of whole sequences are those of the same model here; logits in their place are refused."""
    with vllm_server(tmp_path, mode) as url:
        model, tokenizer = loaded(tmp_path / "model")
        config = Config(teacher="remote", teacher_url=f"{url}/v1")
        if mode == "raw_logits":
            with pytest.raises(ValueError, match=r"\[teacher_url\] .* expected at most 1: log-probs and not logits"):
                RemoteTeacher(config, tokenizer, model.config.vocab_size, torch.device("cpu"))
            return
        asked = RemoteTeacher(config, tokenizer, model.config.vocab_size, torch.device("cpu"))
        assert "prompt_logprobs" in asked.note
        prompts = [tokenizer(text).input_ids for text in ("Q: 12, 45, 78, 33\nA:", "The capital of France is")]
        completions = [tokenizer(text).input_ids for text in (" 78\n\n", " Paris, of", " the city")]
        found = asked.target(packed(prompts, [0, 1, 1], completions))
    rows = []
    for index, done in zip([0, 1, 1], completions, strict=True):
        with torch.no_grad():
            rows.append(model(torch.tensor([prompts[index] + done])).logits[0, len(prompts[index]) - 1 : -1])
    own = torch.cat(rows).log_softmax(-1)
    assert (found.ids >= 0).all() and found.ids.shape[1] == 20
    torch.testing.assert_close(found.logprobs, own.gather(1, found.ids), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.logprobs, own.topk(20).values, atol=1e-3, rtol=0)
