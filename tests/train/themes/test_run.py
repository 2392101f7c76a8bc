"""Whole runs of a tiny model: three steps and their files, resuming, interrupting."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from runs import QUICK, give_rollouts, metrics, pack, sampled, train, trainer
from safetensors.torch import load_file
from tiny import llama_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaForCausalLM

from distil_kernels.testing import credit_by_definition
from distil_kernels.train.__main__ import main
from distil_kernels.train.build import build
from distil_kernels.train.config import Config
from distil_kernels.train.objective import fused_loss
from distil_kernels.train.optimizer import rate_share
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.teachers.base import HiddenTarget
from distil_kernels.train.trainer import Trainer


def test_three_steps_and_their_files(tiny_model: Path, tmp_path: Path) -> None:
    directory = train(tiny_model, tmp_path, "run")
    assert json.loads((directory / "config.json").read_text())["steps"] == 3
    records = metrics(directory)
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [0, 2, 3]
    for record in steps:
        # The loss is the summed cost per rollout; a random model answers with about log(260) nats of entropy at most.
        assert record["loss"] == pytest.approx(record["ce"] * record["length"], rel=1e-5)
        assert 0 < record["kl"] < record["ce"]
        assert record["ce"] == pytest.approx(record["kl"] + record["teacher_entropy"], rel=1e-4)
        assert 0 < record["entropy"] <= math.log(260)
        assert 0 < record["grad_norm"] < 1e4 and 1 <= record["length"] <= 4
    assert steps[0]["learning_rate"] == pytest.approx(5e-4) and steps[2]["learning_rate"] == pytest.approx(1e-3)

    rollouts = [record for record in read_lines(directory / "rollouts.jsonl") if record["kind"] == "training"]
    assert len(rollouts) == 3 * 3 * 2
    assert all(0 < len(record["tokens"]) <= 4 and record["expected"] in record["feedback"] for record in rollouts)
    tokenizer = AutoTokenizer.from_pretrained(directory / "checkpoint")
    for record in steps:
        own = [rollout["tokens"] for rollout in rollouts if rollout["step"] == record["step"]]
        cut = [tokens[-1] != 0 and "\n" not in tokenizer.decode(tokens[-1:]) for tokens in own]
        assert record["truncated"] == sum(cut) / len(own)
        assert all(len(tokens) == 4 for tokens, is_cut in zip(own, cut, strict=True) if is_cut)
    assert (directory / "plot.svg").read_text().startswith("<svg")

    trained = AutoModelForCausalLM.from_pretrained(directory / "checkpoint").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert tokenizer("Q: 12").input_ids == AutoTokenizer.from_pretrained(tiny_model)("Q: 12").input_ids
    assert not any(torch.equal(trained[name], start[name]) for name in start)
    leftovers = [path.name for path in directory.rglob("*tmp*")]
    assert leftovers == []


def test_training_lowers_the_divergence_from_the_teacher(tiny_model: Path, tmp_path: Path) -> None:
    directory = train(tiny_model, tmp_path, "run", "--credit_span", "none", "--eval_every", "0", steps=30)
    kl = [record["kl"] for record in metrics(directory) if record["kind"] == "step"]
    assert sum(kl[-5:]) < 0.7 * sum(kl[:5])


@pytest.mark.parametrize(
    ("teacher", "baseline"), [("live", "moving_average"), ("frozen", "leave_one_out"), ("ema", "leave_one_out")]
)
def test_a_resumed_run_repeats_an_uninterrupted_one(
    tiny_model: Path, tmp_path: Path, teacher: str, baseline: str
) -> None:
    extra = ("--teacher", teacher, "--ema_rate", "0.3", "--baseline", baseline)
    whole = train(tiny_model, tmp_path, "whole", *extra, steps=4)
    parts = train(tiny_model, tmp_path, "parts", *extra, steps=2)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "note": "taken after the checkpoint, then lost"}\n{"cut')
    assert main(["--resume", str(parts), "--steps", "4"]) == 0
    assert metrics(parts) == metrics(whole)
    assert read_lines(parts / "rollouts.jsonl") == read_lines(whole / "rollouts.jsonl")
    ours, theirs = (torch.load(run / "checkpoint" / "trainer.pt") for run in (parts, whole))
    for name, value in theirs["teacher"].items():
        assert torch.equal(ours["teacher"][name], value)
    assert bool(theirs["teacher"]) == (teacher == "ema")
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert not any(torch.equal(value, start[name]) for name, value in theirs["teacher"].items())  # it followed


@pytest.mark.parametrize("baseline", ["leave_one_out", "moving_average", "none"])
def test_credit_settings_reach_the_loss(tiny_model: Path, tmp_path: Path, baseline: str) -> None:
    run = trainer(
        tiny_model, tmp_path / "run", baseline=baseline, discount=0.8, horizon=2, normalize_by_remaining=True,
        teacher_ratio_clip=0.8, credit_clip=0.6, credit_scale=0.1,
    )  # fmt: skip
    batch = next(run.batches)
    give_rollouts(run, batch, [sampled([20, 30, 40, 50], [21, 31]) for _ in batch])
    lengths = [4, 2] * len(batch)
    run.average.observe(torch.arange(6.0).repeat(len(batch)), lengths)
    run.average.follow()
    hidden = torch.randn(sum(lengths), 32, requires_grad=True)
    target = HiddenTarget(hidden.flip(0), *run.teacher.head)
    out = fused_loss(run.student, hidden, target, pack(batch), run.config, run.average)
    given = {"none": None, "moving_average": run.average.values(lengths)}.get(baseline, baseline)
    ratio = (out.stats.teacher_logprob - out.stats.logprob).exp().clamp(max=0.8)
    expected = credit_by_definition(
        out.stats.ce, lengths, baseline=given, group_size=2, by_remaining=True, clip=0.6, discount=0.8, horizon=2,
        scale=0.1 * ratio,
    )  # fmt: skip
    torch.testing.assert_close(out.credit, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_usable_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    take_step = Trainer.train_step

    def interrupted(self: Trainer) -> dict[str, object]:
        if self.step == 1:
            os.kill(os.getpid(), number)
        return take_step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    before = signal.getsignal(number)
    arguments = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "run", "--steps", "50", *QUICK]
    assert main(arguments) == 130
    directory = tmp_path / "run"
    assert [record["step"] for record in metrics(directory) if record["kind"] == "step"] == [1, 2]
    assert (directory / "plot.svg").exists() and (directory / "checkpoint").resolve().name == "checkpoint-000002"
    AutoModelForCausalLM.from_pretrained(directory / "checkpoint")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert main(["--resume", str(directory), "--steps", "3"]) == 0


def start(model: Path, runs: Path, *extra: str) -> list[str]:
    return ["--model", str(model), "--runs_dir", str(runs), "--name", "run", "--steps", "0", *QUICK, *extra]


def test_a_run_directory_is_not_overwritten_silently(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_model, tmp_path, "run", steps=1)
    (tmp_path / "run" / "mine.txt").write_text("kept")
    assert main(start(tiny_model, tmp_path)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"
    assert main(start(tiny_model, tmp_path, "--overwrite")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(os.listdir(tmp_path / "run")) == [
        "checkpoint", "checkpoint-000000", "config.json", "metrics.jsonl", "plot.svg", "report.html",
        "rollouts.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [["--task", "larges"], ["--model", "/nowhere"], ["--feedback", "nothing"], ["--backend", "cuda"]]
)
def test_a_start_that_fails_changes_no_file(tiny_model: Path, tmp_path: Path, wrong: list[str]) -> None:
    assert main(start(tiny_model, tmp_path, *wrong)) == 2
    assert list(tmp_path.iterdir()) == []
    directory = train(tiny_model, tmp_path, "run", steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(start(tiny_model, tmp_path, "--overwrite", *wrong)) == 2
    assert main(["--config", str(directory / "config.json"), "--overwrite", *wrong]) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_no_run_is_not_overwritten(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("kept")
    assert main(start(tiny_model, tmp_path, "--overwrite")) == 2
    assert "no run directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "mine.txt"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--task", "larges"], "did you mean largest"),
        (["--feedback", "nothing"], "[feedback] expected one of"),
        (["--backend", "cuda"], "[backend] expected one that runs here, got cuda"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], said: str
) -> None:
    if wrong[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("it runs here")
    assert main(start(tmp_path / "nowhere", tmp_path, *wrong)) == 2
    assert said in capsys.readouterr().err


def test_only_options_errors_go_without_a_traceback(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "judges.py").write_text(
        "def broken(problem, answer):\n    return float('no'), ''\n"
        "def late(problem, answer):\n    return float(answer in ('', problem.answer) or 'late'), 'hm'\n"
        "def wrong(problem, answer):\n    return 2.0, ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for judge, said in (("broken", "'no'"), ("late", "'late'")):
        assert main(start(tiny_model, tmp_path, "--feedback", f"judges:{judge}", "--overwrite")) in (1, 2)
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and said in message and "judges.py, line " in message
    assert main(start(tiny_model, tmp_path, "--feedback", "judges:wrong", "--overwrite")) == 2
    assert "[feedback] judges:wrong gave (2.0" in capsys.readouterr().err
    directory = train(tiny_model, tmp_path, "whole", steps=0)

    def fails(*_: object) -> None:
        raise ValueError("[op] of the run itself")

    monkeypatch.setattr("distil_kernels.train.evaluate.Evaluator.evaluate", fails)
    for arguments in (start(tiny_model, tmp_path, "--overwrite"), ["eval", str(directory)]):
        with pytest.raises(ValueError, match="of the run itself"):
            main(arguments)


def test_learnt_positions_are_enough(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rotary positions end nowhere: tiny_model has 512 and prompts of up to 1024 tokens are allowed."""
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=512, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    assert main(start(tmp_path / "model", tmp_path)) == 2
    assert "[max_prompt_tokens] GPT2LMHeadModel has 512 positions" in capsys.readouterr().err
    assert main(start(tmp_path / "model", tmp_path, "--max_prompt_tokens", "509")) == 2
    assert "expected at most 508, got 509" in capsys.readouterr().err
    assert main(start(tmp_path / "model", tmp_path, "--max_prompt_tokens", "508")) == 0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_more_steps_go_on_at_their_own_rate(tiny_model: Path, tmp_path: Path, schedule: str) -> None:
    directory = train(tiny_model, tmp_path, "run", "--learning_rate_schedule", schedule, "--warmup_steps", "0", steps=2)
    before = load_file(directory / "checkpoint" / "model.safetensors")
    assert main(["--resume", str(directory), "--steps", "3"]) == 0
    config = Config(steps=3, warmup_steps=0, learning_rate_schedule=schedule)
    *_, last = (record for record in metrics(directory) if record["kind"] == "step")
    share = rate_share(config, 2)
    assert last["learning_rate"] == pytest.approx(1e-3 * share, rel=1e-6) and share > 0.2
    after = load_file(directory / "checkpoint" / "model.safetensors")
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-4


def test_worked_examples_have_an_answer(tiny_model: Path, tmp_path: Path) -> None:
    """Of problems whose solutions are known for one in five, or for none."""
    lines = [
        {"entry_point": f"f{i}", "prompt": f"def f{i}():\n", "test": "def check(f):\n    pass\n"}
        | ({"canonical_solution": f"    return {i}\n"} if i % 5 == 0 else {})
        for i in range(60)
    ]
    for name, chosen, num_examples in (("some", lines, 2), ("none", [e for e in lines if len(e) == 3], 0)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
        config = Config(
            model=str(tiny_model), task=f"code:{tmp_path / name}.jsonl", feedback="trace", layout="chat",
            eval_problems=2, steps=0, name=name, runs_dir=str(tmp_path),
        )  # fmt: skip
        (tmp_path / name).mkdir()
        out = io.StringIO()
        run = Trainer(config, build(config, tmp_path / name), Console(file=out))
        shown = run.models.tokenizer.decode(next(run.batches)[0].prompt)
        assert shown.count("<assistant>") == num_examples + 1 and shown.count("return") == num_examples
        run.run()
        assert ("0 of 2 worked examples" in out.getvalue()) == (num_examples == 0)


def test_the_settings_that_a_run_prints_make_another_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tiny_model, tmp_path, "first", steps=1)
    capsys.readouterr()
    assert main(["--config", str(first / "config.json"), "--name", "second"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate: 0.001" in said and "name: second" in said and "no checkpoint yet" not in said
    assert metrics(tmp_path / "second") == metrics(first)


def test_resume_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(Config().to_json())
    assert main(["--resume", str(tmp_path), "--teacher", "live"]) == 2
    assert "--teacher" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(Config(model=str(tmp_path / "nowhere")).to_json())
    assert main(["--resume", str(tmp_path), "--steps", "30"]) == 2
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == Config().steps


def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "nowhere"), "--runs_dir", str(tmp_path), "--name", "run"]) == 2
    assert "[model]" in capsys.readouterr().err


def test_products_in_bfloat16_train(tiny_model: Path, tmp_path: Path) -> None:
    """What a GPU does by default, with a model deep enough for rounding to change its logits by more than 2 %."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(num_hidden_layers=32, initializer_range=0.5)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(input_ids=tokens).logits - exact).abs().max() > 0.02 * exact.abs().max()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    AcceleratorState._reset_state()  # a process has one precision
    try:
        directory = train(tmp_path / "model", tmp_path, "run", "--precision", "bfloat16", steps=1)
    finally:
        AcceleratorState._reset_state()
    assert metrics(directory)[1]["step"] == 1


def test_a_reasoning_gym_task_runs(tiny_model: Path, tmp_path: Path) -> None:
    directory = train(
        tiny_model, tmp_path, "run", "--task", "reasoning_gym:basic_arithmetic", "--layout", "chat", steps=1
    )
    assert metrics(directory)[1]["step"] == 1


def test_a_tracker_gets_every_record(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = train(tiny_model, tmp_path, "run", "--tracker", "tensorboard")
    (events,) = {
        path.parent for path in directory.rglob("events.out.tfevents*") if path.parent.name == "distil_kernels"
    }
    logged = EventAccumulator(str(events))
    logged.Reload()
    records = metrics(directory)
    for tag, kind, name in (("step/ce", "step", "ce"), ("evaluation/greedy", "evaluation", "greedy")):
        wanted = [(record["step"], record[name]) for record in records if record["kind"] == kind]
        found = [(event.step, event.value) for event in logged.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_a_tracker_that_is_not_installed_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    arguments = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "run", "--tracker", "trackio"]
    assert main(arguments) == 2
    assert "pip install trackio" in capsys.readouterr().err


def test_cut_corrections_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    """A limit some tokens below the longest correction: every rollout of a cut problem counts, whole ones do not."""
    loose = trainer(tiny_model, tmp_path / "loose")
    batch = next(loose.batches)
    give_rollouts(loose, batch, [sampled([1], [2]) for _ in batch])
    lengths = [len(rollout.teacher_prompt) for group in batch for rollout in group.rollouts]
    assert loose.train_step()["num_shortened_prompts"] == 0
    tight = trainer(tiny_model, tmp_path / "tight", max_prompt_tokens=max(lengths) - 3)
    record = tight.train_step()
    assert 0 < record["num_shortened_prompts"] <= 8 and record["num_shortened_prompts"] % 2 == 0
