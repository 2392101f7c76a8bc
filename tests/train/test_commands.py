"""eval, inspect and report of a run: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.evaluate import mean_and_error, pass_at
from distil_kernels.train.report.html import page
from distil_kernels.train.report.inspect import rendered
from distil_kernels.train.run.json_lines import read_lines

VOID = {"meta", "line", "circle", "input", "br", "i", "link", "img"}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, evaluated before, between and after."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = ["--model", str(tiny_model), "--runs_dir", str(runs), "--name", "run", "--steps", "2"]
    sizes = ["--prompts_per_step", "2", "--rollouts_per_prompt", "3", "--max_new_tokens", "5", "--num_examples", "1"]
    evaluations = [
        "--eval_problems",
        "3",
        "--eval_every",
        "1",
        "--eval_samples",
        "3",
        "--eval_rollouts",
        "2",
        "--held_out_every",
        "1",
    ]
    assert main([*arguments, *sizes, *evaluations, "--learning_rate", "1e-2", "--held_out_every", "1"]) == 0
    return runs / "run"


def test_pass_at_k_is_the_mean_over_all_subsets_of_k() -> None:
    scores = [[1.0, 0.0, 0.0, 1.0, 0.5], [0.0] * 5, [1.0] * 5, [0.0, 1.0, 0.99, 0.0, 0.0]]
    rates = pass_at(scores)
    assert list(rates) == [1, 2, 4, 5]
    for k, rate in rates.items():
        chances = []
        for own in scores:
            drawn = [any(score == 1.0 for score in subset) for subset in combinations(own, k)]
            chances.append(sum(drawn) / len(drawn))
        assert rate == pytest.approx(mean_and_error(chances))
    assert list(pass_at([[1.0]])) == [1]


def test_samples_hold_the_numbers_of_plain_torch(run: Path, tiny_model: Path) -> None:
    """At step 0 student and frozen teacher are the start model, each behind its own prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).double()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    samples = [r for r in read_lines(run / "rollouts.jsonl") if r["kind"] == "held_out" and r["step"] == 0]
    assert len(samples) == 2 * 3
    costs: dict[int, list[list[float]]] = {0: [], 1: []}
    chosen: dict[int, list[list[tuple[float, float]]]] = {0: [], 1: []}
    """Log-probs of the tokens under the teacher and under the student."""
    for sample in samples:
        done = sample["tokens"]
        assert sample["texts"] == [tokenizer.decode([token]) for token in done]
        logprobs = []
        for prompt in (sample["prompt"], sample["teacher_prompt"]):
            ids = tokenizer(prompt).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([ids + done[:-1]])).logits[0, len(ids) - 1 :]
            logprobs.append(logits.log_softmax(-1))
        own, taught = logprobs
        ce = -(taught.exp() * own).sum(-1)
        kl = (taught.exp() * (taught - own)).sum(-1)
        assert sample["ce"] == pytest.approx(ce.tolist(), abs=1e-4)
        assert sample["kl"] == pytest.approx(kl.tolist(), abs=1e-4)
        for position, top in enumerate(sample["top"]):
            best = taught[position].exp().topk(5)
            assert [entry[1] for entry in top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [entry[2] for entry in top] == pytest.approx(own[position].exp()[best.indices].tolist(), abs=1e-4)
        costs[sample["problem"]].append(kl.tolist())
        chosen[sample["problem"]].append(
            [(float(taught[t, token]), float(own[t, token])) for t, token in enumerate(done)]
        )
    for problem, group in costs.items():
        to_go = [[sum(0.9 ** (i - t) * ce[i] for i in range(t + 1, len(ce))) for t in range(len(ce))] for ce in group]
        own_samples = [sample for sample in samples if sample["problem"] == problem]
        for index, sample in enumerate(own_samples):
            others = [g for other, g in enumerate(to_go) if other != index]
            expected = [g - sum(o[t] if t < len(o) else 0.0 for o in others) / 2 for t, g in enumerate(to_go[index])]
            # Of a token that the teacher finds less likely than the student only a part, and no more than the bound.
            ratios = [math.exp(min(0.0, t - s)) for t, s in chosen[problem][index]]
            expected = [max(-0.25, min(0.25, r * value)) for r, value in zip(ratios, expected, strict=True)]
            assert sample["credit"] == pytest.approx(expected, abs=1e-3)


def test_eval_of_a_run_repeats_its_last_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["eval", str(run)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = [record for record in read_lines(run / "metrics.jsonl") if record["kind"] == "evaluation"][-1]
    assert printed["step"] == 2
    assert all(printed[key] == last[key] for key in printed if key != "target")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_eval_of_a_model_and_its_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--eval_problems", "2", "--eval_samples", "5", "--max_new_tokens", "3"]
    assert main(["eval", str(run / "checkpoint"), *options]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(printed["pass_at"]) == ["1", "2", "4", "5"] and printed["num_problems"] == 2
    assert main(["eval", str(run), "--eval_problems", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_problems"] == 2
    assert main(["eval", str(run), "--max_new_tokens", "9"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["length"] > 5
    assert main(["eval", str(run), "--eval_problems", "1"]) == 0  # a standard error of one problem is no number
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line, parse_constant=pytest.fail)["greedy_se"] is None
    assert main(["eval", str(run), "--teacher", "live"]) == 2
    assert "--teacher" in capsys.readouterr().err


@pytest.mark.parametrize("color", ["ce", "kl", "credit"])
def test_inspect_shows_the_sample(run: Path, capsys: pytest.CaptureFixture[str], color: str) -> None:
    assert main(["inspect", str(run), "--step", "1", "--problem", "1", "--rollout", "2", "--color", color]) == 0
    shown = capsys.readouterr().out
    sample = [r for r in read_lines(run / "rollouts.jsonl") if r["kind"] == "held_out" and r["step"] == 1][5]
    assert sample["feedback"] in shown and sample["question"] in shown and "step 1, problem 1" in shown
    assert f"{sample[color][0]:.3f}" in shown


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--step", "7", "0, 1, 2"),
        ("--problem", "9", "0 to 1"),
        ("--rollout", "3", "0 to 2"),
        ("--rollout", "-1", "0 to 2"),
    ],
)
def test_inspect_says_what_there_is(
    run: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, part: str
) -> None:
    assert main(["inspect", str(run), option, value]) == 2
    said = capsys.readouterr().err
    assert part in said and value in said


def test_what_is_no_run_and_what_is_no_command(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("inspect", "report"):
        for place in (tmp_path, tiny_model):
            assert main([command, str(place)]) == 2
            assert "no run directory" in capsys.readouterr().err
    assert main(["repotr", str(tmp_path)]) == 2
    assert "did you mean report" in capsys.readouterr().err


class Checker(HTMLParser):
    """Every opened element is closed in order; counts elements and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset") or name.startswith("on")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_report_is_one_file_without_scripts_or_links(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    path = run / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    found = Checker(text)
    assert found.links == [] and found.count["script"] == 0 and "http" not in re.sub(r"http-equiv", "", text)
    samples = [record for record in read_lines(run / "rollouts.jsonl") if record["kind"] == "held_out"]
    assert text.count('class="tip"') == sum(len(sample["tokens"]) for sample in samples)
    assert found.count["svg"] == 11 and "pass@2" in text
    assert "rollouts_per_prompt: 3" in text


def test_whatever_a_model_says_is_text(run: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=x onerror='alert(2)'>\" & $title"
    metrics = read_lines(run / "metrics.jsonl")
    rollouts = [record for record in read_lines(run / "rollouts.jsonl") if record["kind"] == "held_out"]
    clean = Checker(page(Config(), "run", metrics, rollouts))
    for record in rollouts:
        record.update(question=evil, feedback=evil, prompt=evil, teacher_prompt=evil)
        record["texts"] = [evil] * len(record["texts"])
        record["top"] = [[[evil, p, q] for _, p, q in top] for top in record["top"]]
    harmed = Checker(page(Config(name=evil.replace("/", "")), evil, metrics, rollouts))
    assert harmed.count == clean.count and harmed.links == []
    assert any(evil in words for words in harmed.words)


def test_what_steers_a_terminal_is_shown_as_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record, *_) = [record for record in read_lines(run / "rollouts.jsonl") if record["kind"] == "held_out"]
    record["prompt"] = record["feedback"] = record["texts"][0] = "a\x1b[2Jb\u202e[red]"
    Console(width=160).print(rendered(record, "ce"))
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "\u202e" not in shown and shown.count("a\\x1b[2Jb\\x202e[red]") >= 3


def test_report_before_the_first_step_and_without_samples(run: Path) -> None:
    metrics = read_lines(run / "metrics.jsonl")
    Checker(page(Config(), "run", metrics[:1], []))
    Checker(page(Config(), "run", [record for record in metrics if record["kind"] == "step"], []))
    with pytest.raises(ValueError, match="no records"):
        page(Config(), "run", [], [])
