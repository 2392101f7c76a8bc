"""An expert behind a chat endpoint: what it is asked, what the teacher reads, what is kept, counted and asked again.

llama.cpp's server with the default model answers in the last test; a server of the test's own in the others.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from runs import QUICK, metrics, train, trainer

from distil_kernels.train import http_endpoint
from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.feedback.expert import Expert
from distil_kernels.train.rollouts.prompt_group import NO_FEEDBACK, PromptGroup, Rollout
from distil_kernels.train.tasks import NO_VERDICT, Feedback, Problem

pytestmark = pytest.mark.slow
Answer = Callable[[dict[str, Any]], Any]


def reply(text: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 50, "completion_tokens": 7, "total_tokens": 57},
    }  # fmt: skip


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat endpoint: its address, and the requests so far."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**request, "path": self.path, "key": self.headers["Authorization"]})
            said = answer(request)
            if isinstance(said, tuple):  # a status with a header
                self.send_response(said[0])
                self.send_header(*said[1])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def expert(url: str, cache: Path, **changes: Any) -> Expert:
    config = Config(feedback="expert", expert_url=url, expert_cache=str(cache), **changes)
    config.check()
    return Expert(config)


def group(*answers: str, verdict: Feedback = NO_FEEDBACK) -> PromptGroup:
    rollouts = [Rollout([1], [True], answer=answer, feedback=verdict) for answer in answers]
    return PromptGroup(Problem("3, 9", "9", "9", ""), [1], rollouts)


def test_what_is_asked_and_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-test")
    with serving(lambda request: reply(f" No: {len(request['messages'][0]['content'])}. ")) as (url, asked):
        prices = {"expert_prompt_price": 2.0, "expert_completion_price": 10.0}
        other = expert(url, tmp_path, expert_model="large", expert_instruction="Why?", max_critique_tokens=9, **prices)
        asked.clear()
        first, second = other(None, [group(" 3 ", "3", "4"), group("5", verdict=NO_VERDICT)], 3)  # type: ignore[arg-type]
        text = "3, 9\n\nA student answered:\n3\n\nWhy?"
        assert [feedback.text for feedback in first] == [f"No: {len(text)}."] * 3 and second[0].text == ""
        assert all(feedback.score == 0.0 and feedback.demonstration == "" for feedback in first)
        assert len(asked) == 2  # equal answers are one, and nothing is asked of a rollout without a verdict
        assert {request["path"] for request in asked} == {"/v1/chat/completions"}
        assert {request["key"] for request in asked} == {"Bearer of-the-test"}
        assert text in {request["messages"][0]["content"] for request in asked}
        fields = {"model": "large", "max_tokens": 9, "temperature": 0.0}
        assert all(fields.items() <= request.items() for request in asked)
        spent = {
            "expert_requests": 2, "expert_cached": 0, "expert_prompt_tokens": 100, "expert_completion_tokens": 14,
            "expert_cost": pytest.approx(100 * 2e-6 + 14 * 1e-5),
        }  # fmt: skip
        assert other.spent() == spent and other.spent()["expert_requests"] == 0

        # Another run asks for what is new.
        again = expert(url, tmp_path, expert_model="large", expert_instruction="Why?", max_critique_tokens=9)
        asked.clear()
        (known,) = again(None, [group("3", "4", "5")], 3)  # type: ignore[arg-type]
        assert [feedback.text for feedback in known[:2]] == [feedback.text for feedback in first[1:]]
        assert len(asked) == 1 and again.spent()["expert_cached"] == 2
        # Something else is asked of another model, and a damaged file is asked for again.
        expert(url, tmp_path, expert_model="small")(None, [group("3")], 1)  # type: ignore[arg-type]
        for path in tmp_path.glob("*/*.json"):
            path.write_text("{")
        asked.clear()
        again(None, [group("3")], 1)  # type: ignore[arg-type]
        assert len(asked) == 1


def test_newer_options_and_a_busy_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http_endpoint.time, "sleep", waits.append)
    states = iter([(429, ("Retry-After", "7")), (503, ("Retry-After", "soon"))])

    def answer(request: dict[str, Any]) -> Any:
        if "max_tokens" in request:
            return 400, ("Why", "max_completion_tokens")
        return next(states, None) or reply("Yes.")

    with serving(answer) as (url, asked):
        other = expert(url, tmp_path)
        assert waits == [7.0, 1.0]
        ((said,),) = other(None, [group("9")], 1)  # type: ignore[arg-type]
    assert said.text == "Yes." and asked[-1]["max_completion_tokens"] == 48 and "temperature" not in asked[-1]


@pytest.mark.parametrize("garbage", [b"<html>", b"", {"choices": []}, {"choices": [{"message": {"content": 5}}]}, {}])
def test_garbage_is_refused_and_not_kept(tmp_path: Path, garbage: Any) -> None:
    answers = iter([reply("Yes.")])
    with serving(lambda request: next(answers, garbage)) as (url, _):
        other = expert(url, tmp_path)
        with pytest.raises(ValueError, match=r"\[expert_url\] .*/chat/completions gave .*, expected"):
            other(None, [group("9")], 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"\[expert_url\]"):
            expert(url, tmp_path)
    assert not list(tmp_path.rglob("*.json*"))


def test_silence_leaves_a_rollout_out(tiny_model: Path, tmp_path: Path) -> None:
    """A text of the expert's is what the teacher reads."""
    with serving(
        lambda request: reply(None if "answered:\n1\n" in request["messages"][0]["content"] else "It is 9.")
    ) as (
        url,
        _,
    ):
        run = trainer(tiny_model, tmp_path / "run", feedback="expert", expert_url=url, expert_cache=str(tmp_path / "e"))
        (problem, *_) = next(run.batches)
        tokens = [run.models.tokenizer(f" {answer}\n").input_ids for answer in (1, 2)]
        problem.rollouts = [Rollout.sampled(part) for part in tokens]
        run.tutor.verify([(problem.problem, problem.rollouts)])
        run.tutor.give_feedback(run.student, [problem], 2)
    silent, told = problem.rollouts
    assert silent.teacher_prompt is None and told.teacher_prompt is not None
    assert run.models.tokenizer.decode(told.teacher_prompt).endswith("Feedback: It is 9.\nA:")


def test_a_run_counts_what_it_spends_and_ends_with_its_expert(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_endpoint, "WAITS", ())
    options = [
        "--feedback", "expert", "--credit_span", "sequence", "--discount", "1", "--eval_every", "0",
        "--eval_problems", "2",
        "--expert_prompt_price", "1", "--expert_cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    healthy = [True]
    with serving(lambda request: reply("It is 9.") if healthy[0] else (500, ("a", "b"))) as (url, asked):
        directory = train(tiny_model, tmp_path, "run", *options, "--expert_url", url, steps=2)
        records = metrics(directory)
        assert (
            sum(int(str(record["expert_requests"])) for record in records) == len(asked) - 1
        )  # and the first question
        assert all(record["expert_cost"] == pytest.approx(50e-6 * record["expert_requests"]) for record in records)  # type: ignore[operator]
        assert [record["num_without_feedback"] for record in records if record["kind"] == "step"] == [0, 0]
        asked.clear()
        again = metrics(train(tiny_model, tmp_path, "again", *options, "--expert_url", url, steps=2))
        assert len(asked) == 1 and [r.get("loss") for r in again] == [r.get("loss") for r in records]
        assert main(["--resume", str(directory), "--steps", "3"]) == 0
        healthy[0] = False
        arguments = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "sick", *QUICK, *options]
        assert main([*arguments, "--expert_url", url]) == 2
    assert "[expert_url]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "expert"}, r"\[expert_url\] .* got '' with feedback expert"),
        ({"feedback": "expert", "expert_url": "localhost"}, r"\[expert_url\] .* got 'localhost'"),
        ({"expert_url": "http://localhost/v1"}, r"\[expert_url\] .* with feedback correction"),
        ({"expert_requests": 0}, r"\[expert_requests\] expected at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options).check()


def test_a_real_server(tiny_model: Path, tmp_path: Path) -> None:
    """llama.cpp's: SmolLM2 says something of an answer, and says it again from what is kept."""
    from llama_cpp import llama_server

    with llama_server() as url:
        asked = expert(url, tmp_path, max_critique_tokens=16)
        (first,) = asked(None, [group("3", "9")], 2)  # type: ignore[arg-type]
        spent = asked.spent()
        assert all(feedback.text for feedback in first) and spent["expert_requests"] == 2
        assert spent["expert_prompt_tokens"] > 40 and 0 < spent["expert_completion_tokens"] <= 32
        (again,) = asked(None, [group("3", "9")], 2)  # type: ignore[arg-type]
        assert again == first and asked.spent()["expert_cached"] == 2
