"""Hidden states from a real server of ours: the loss is that of teacher local, to the rounding of what is sent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QUICK, metrics, pack, packed, train, trainer
from tiny import byte_tokenizer, llama_config, save_tiny_model
from transformers import AutoModelForCausalLM

from distil_kernels.hf import split
from distil_kernels.train import http_endpoint
from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.models import loading
from distil_kernels.train.models.heads import load_head
from distil_kernels.train.models.reading import reader
from distil_kernels.train.objective import fused_loss
from distil_kernels.train.serve_teacher import TeacherServer
from distil_kernels.train.serve_teacher import main as serve
from distil_kernels.train.teachers.hidden_states import HiddenTeacher

pytestmark = pytest.mark.slow
BATCH = packed([[5, 6, 7], [9]], [0, 0, 1, 1], [[11, 12], [13, 14, 15], [16], [17]])


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("expert"), initializer_range=0.15, hidden_size=48)


@contextlib.contextmanager
def serving(model: Path, dtype: str = "float32", port: int = 0) -> Iterator[TeacherServer]:
    server = TeacherServer(str(model), "127.0.0.1", port, dtype)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.close()


def teacher(student: Path, expert: Path, url: str, **changes: Any) -> HiddenTeacher:
    config = Config(teacher="hidden", teacher_url=url, teacher_model=str(expert), **changes)
    config.check()
    model, tokenizer = loading.load(str(student))
    return HiddenTeacher(config, tokenizer, reader(split(model)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"vocab_size": 300}, {"vocab_size": 258}])
def test_a_head_is_read_without_its_body(tiny_model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Log-probs from states and head are those of the model's own forward, among the student's tokens: further rows of
    the head are cut off, and missing ones have probability 0."""
    other = save_tiny_model(tmp_path / "other", hidden_size=48, **changes)
    model = loading.load(str(other))[0]
    assert torch.equal(load_head(str(other), "teacher_model").weight, model.get_output_embeddings().weight)
    with serving(other) as server:
        found = teacher(tiny_model, other, server.url).target(BATCH)
    rows = [model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in (([5, 6, 7], [11, 12]), ([9], [16]))]
    assert found.weight is not None and len(found.weight) == 260
    states = torch.cat([found.states[:2], found.states[5:6]])
    ours = torch.nn.functional.linear(states, found.weight, found.bias).log_softmax(1)
    theirs = torch.nn.functional.pad(torch.cat(rows)[:, :260], (0, max(0, 260 - model.config.vocab_size)), value=-1e4)
    torch.testing.assert_close(ours, theirs.log_softmax(1), atol=1e-4, rtol=1e-4)


def test_a_run_is_that_of_teacher_local(tiny_model: Path, expert: Path, tmp_path: Path) -> None:
    """In float32 all but the last digits, evaluations too; in bfloat16 to its rounding."""
    options = (
        "--eval_problems",
        "2",
        "--eval_every",
        "0",
        "--teacher_model",
        str(expert),
        "--rollouts_per_prompt",
        "3",
    )
    direct = metrics(train(tiny_model, tmp_path, "direct", *options, "--teacher", "local", steps=2))
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 3e-2)):
        with serving(expert, dtype) as server:
            url = ("--teacher", "hidden", "--teacher_url", server.url)
            found = metrics(train(tiny_model, tmp_path, dtype, *options, *url, steps=2))
        assert len(found) == len(direct) == 4
        for ours, theirs in zip(found[:2], direct[:2], strict=True):  # the first evaluation and step
            for name in ("loss", "kl", "reverse_kl", "teacher_entropy", "grad_norm"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-4), name
        assert found[0]["num_problems"] == 2 and 0 <= float(str(found[0]["teacher"])) <= 1


def test_gradients_are_those_of_teacher_local(tiny_model: Path, expert: Path, tmp_path: Path) -> None:
    """Of every objective, on the same rollouts."""
    with serving(expert) as server:
        for objective in ("forward_ce", "reverse_kl", "jsd"):
            gradients = []
            for kind, url in (("local", ""), ("hidden", server.url)):
                run = trainer(
                    tiny_model, tmp_path / f"{objective}-{kind}", teacher=kind, teacher_url=url, objective=objective,
                    teacher_model=str(expert), max_new_tokens=3,
                )  # fmt: skip
                torch.manual_seed(1)
                groups = next(run.batches)[:2]
                run.roll_out(groups)
                states = run.student.states(
                    *(getattr(pack(groups), n) for n in ("prompts", "prompt_index", "completions"))
                )
                target, batch = run.teacher.target(pack(groups)), pack(groups)
                loss = fused_loss(run.student, states, target, batch, run.config, run.average).loss
                gradients.append([loss, *torch.autograd.grad(loss, [p for p in run.models.trained])])
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_is_wrong_is_said_before_any_work(
    tiny_model: Path, expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(url: str, model: Path = expert, student: Path = tiny_model) -> str:
        arguments = ["--model", str(student), "--runs_dir", str(tmp_path), "--name", "run", *QUICK]
        given = ["--teacher", "hidden", "--teacher_url", url, "--teacher_model", str(model)]
        assert main([*arguments, *given]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and not (tmp_path / "run").exists()
        return message

    same_size = tmp_path / "same_size"
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(llama_config(hidden_size=48)).save_pretrained(same_size)
    byte_tokenizer().save_pretrained(same_size)
    other_tokens = tmp_path / "other_tokens"
    shutil.copytree(expert, other_tokens)
    path = other_tokens / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(words))
    with serving(expert) as server:
        assert "[teacher_model]" in said(server.url, tiny_model) and "expected the 48 of" in said(
            server.url, tiny_model
        )
        assert "makes other log-probs of the states" in said(server.url, same_size)
        assert "[teacher_model] cannot read the head of" in said(server.url, tmp_path)
        assert "2 of 257 token ids mean something else" in said(server.url, other_tokens)
        assert "[teacher_url]" in said(f"{server.url}/v1") and "404" in said(f"{server.url}/v1")
        url = server.url
    assert "[teacher_url]" in said(url)


def test_other_weights_and_half_answers_are_not_learnt_from(
    tiny_model: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_endpoint, "WAITS", (0.01,))
    with serving(expert) as server:
        asked, port = teacher(tiny_model, expert, server.url), int(server.url.rpartition(":")[2])
        whole = asked.target(BATCH).states
        ask = http_endpoint.Endpoint.ask_bytes
        for change in (lambda body: body[:-7], lambda body: b"", lambda body: b"<html>"):
            monkeypatch.setattr(
                http_endpoint.Endpoint, "ask_bytes", lambda self, *a, _c=change, **k: _c(ask(self, *a, **k))
            )
            with pytest.raises(
                ValueError, match=r"\[teacher_url\] .*/states gave .*, expected finite states \[7, 48\]"
            ):
                asked.target(BATCH)
        monkeypatch.setattr(http_endpoint.Endpoint, "ask_bytes", ask)
        state = asked.state_dict()
    with pytest.raises(ValueError, match=r"\[teacher_url\] .*/states: .*refused"):  # gone
        asked.target(BATCH)
    with serving(expert, port=port):  # the same again
        assert torch.equal(asked.target(BATCH).states, whole)
        asked.load_state_dict(state)
    moved = tmp_path / "moved"
    shutil.copytree(expert, moved)
    model = loading.load(str(expert))[0]
    model.model.layers[0].mlp.up_proj.weight.data += 0.01
    model.save_pretrained(moved)
    with serving(moved, port=port) as server:
        with pytest.raises(ValueError, match=r"\[teacher_url\] .* other weights .*, expected the same model"):
            asked.target(BATCH)
        with pytest.raises(ValueError, match="expected the same model"):
            teacher(tiny_model, moved, server.url).load_state_dict(state)


def test_the_server_is_a_program(expert: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where it is, refuses nonsense in words, and ends at Ctrl-C."""
    command = [sys.executable, "-m", "distil_kernels.train.serve_teacher"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(expert), "--port", "0", "--dtype", "float32"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split()[-1]
        assert teacher(tiny_model, expert, url).target(BATCH).states.shape == (7, 48)
        endpoint = http_endpoint.Endpoint("teacher_url", url)
        for path, body in (("/states", {"prompts": []}), ("/states", {"prompts": "?"}), ("/nothing", {})):
            with pytest.raises(http_endpoint.Refused, match=r": 40[04] "):
                endpoint.ask(path, body)
    finally:
        process.send_signal(2)
    assert process.wait(30) == 130
    assert serve([str(tiny_model / "none")]) == 2
    said = capsys.readouterr().err
    assert "[MODEL] cannot load" in said and said.count("\n") == 1
