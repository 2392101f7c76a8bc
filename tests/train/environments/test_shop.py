"""The shop: what it says, and runs of a tiny model that was taught to ask it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import assert_same, metrics, train
from tiny import byte_tokenizer, llama_config
from transformers import AutoModelForCausalLM

from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.environments.shop import Shop
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.tasks import Problem, make_task
from distil_kernels.train.tasks.shop import Purchase

TOKENIZER = byte_tokenizer()
RECORD = Problem("What do 3 pears cost?", "51", Purchase(3, "pear", 17), "")


def test_what_the_shop_says() -> None:
    shop = Shop()
    assert shop.reset(RECORD) == RECORD.question
    said = {
        " price pear": "17", "price pears": "17", "price fig": "no fig here", "calculate 3 * 17": "51",
        "calculate 3*17": "51", "calculate 3 + 17": "20", "calculate 3 - 17": "-14",
    }  # fmt: skip
    for text, observation in said.items():
        assert shop.step(text) == (observation, None, False)
    assert shop.step("51") == ("right", 1.0, True)
    for wrong in ("52", "", "calculate 3 / 17", "calculate 3 * x", "price", "the answer is 51", "calculate 3 ** 17"):
        assert shop.step(wrong) == ("wrong", 0.0, True)


def test_every_problem_is_solved_by_two_calls() -> None:
    task, shop = make_task("shop", 0), Shop()
    for problem in map(task.problem, range(50)):
        first, second, answer = shop.solution(problem)
        shop.reset(problem)
        price, _, _ = shop.step(first)
        assert price in second and price not in problem.question
        assert shop.step(second) == (answer, None, False) and shop.step(answer) == ("right", 1.0, True)
        assert task.score(answer, problem.entry) == 1.0 and answer == problem.answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "shop"}, r"\[task\] environment shop takes shop, got largest"),
        ({"task": "shop"}, r"\[environment\] task shop takes shop, got "),
        ({"task": "shop", "environment": "shop", "tools": "python"}, r"\[tools\] environment takes none, got python"),
        ({"environment": "python", "rollouts": "none", "credit_span": "none", "rollouts_per_prompt": 1},
         r"\[environment\] rollouts none takes "),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options).check()


def test_a_tool_is_an_environment() -> None:
    names = [Config(**options).environment_name for options in ({"tools": "python"}, {"environment": "python"}, {})]
    assert names == ["python", "python", ""]


@pytest.fixture(scope="module")
def customer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that asks for prices, and mostly goes on to an answer."""
    torch.manual_seed(0)
    rows = []
    for problem in map(make_task("shop", 7).problem, range(6)):
        shop, question, row, labels = Shop(), problem.question, [], []
        shop.reset(problem)
        for text in shop.solution(problem):
            asked, answered = (TOKENIZER(part).input_ids for part in (f"Q: {question}\nA:", f" {text}\n"))
            row += asked + answered
            labels += [-100] * len(asked) + answered
            question = shop.step(text)[0]
        rows.append((row, labels))
    width = max(len(row) for row, _ in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    model = AutoModelForCausalLM.from_config(llama_config(initializer_range=0.05))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120):
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("customer")
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def test_a_run(customer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--task", "shop", "--environment", "shop", "--feedback", "trace", "--credit_span", "sequence",
        "--discount", "1", "--reward_weight", "1", "--max_new_tokens", "40", "--num_examples", "0", "--eval_every", "1",
        "--eval_problems", "2", "--learning_rate", "1e-5",
    )  # fmt: skip
    whole = train(customer, tmp_path, "whole", *options, steps=2)
    parts = train(customer, tmp_path, "parts", *options, steps=1)
    assert main(["--resume", str(parts), "--steps", "2"]) == 0
    assert_same(parts, whole)
    records = read_lines(whole / "rollouts.jsonl")
    for record in records:
        turns, observed = record["turns"], [record["tokens"][index] for index in record["tool_positions"]]
        assert TOKENIZER.decode(observed) == "".join(f"Q: {said}\nA:" for _, said in turns[: len(turns) - 1])
        assert record["answer"] == turns[-1][0] and record["feedback"].startswith(f"turn 1: {turns[0][1]}")
        text = "".join(f"{written}\n" + (f"Q: {said}\nA:" if index + 1 < len(turns) else "")
                       for index, (written, said) in enumerate(turns))  # fmt: skip
        assert text.startswith(TOKENIZER.decode(record["tokens"]))
    assert max(len(record["turns"]) for record in records) == 3
    held_out = [record for record in records if record["kind"] == "held_out" and record["tool_positions"]]
    for record in held_out:
        assert all(record[name][index] == 0 for name in ("ce", "kl", "credit") for index in record["tool_positions"])
        assert f"Feedback: {record['feedback']}" in record["teacher_prompt"]
    for step in (record for record in metrics(whole) if record["kind"] == "step"):
        own = [r for r in records if r["kind"] == "training" and r["step"] == step["step"]]
        assert step["turns"] == pytest.approx(sum(len(r["turns"]) for r in own) / len(own))
        assert step["length"] == pytest.approx(sum(len(r["tokens"]) - len(r["tool_positions"]) for r in own) / len(own))
        cut = [TOKENIZER.decode(r["tokens"][-1:]) != "\n" for r in own]
        endless = [r["turns"][-1][1] not in ("right", "wrong") for r in own]
        assert step["num_unfinished"] == sum(one or other for one, other in zip(cut, endless, strict=True))
        assert step["truncated"] == pytest.approx(sum(cut) / len(cut))
    capsys.readouterr()
    assert main(["eval", str(whole)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = [record for record in metrics(whole) if record["kind"] == "evaluation"][-1]
    assert again["length"] == last["length"] <= 40 and again["sampled"] == last["sampled"]
    assert main(["report", str(whole)]) == 0
    page = (whole / "report.html").read_text()
    assert page.count('<span class="t given"') == sum(len(r["tool_positions"]) for r in held_out)


def test_worked_examples_are_episodes(customer: Path, tmp_path: Path) -> None:
    directory = train(
        customer, tmp_path, "run", "--task", "shop", "--environment", "shop", "--feedback", "both",
        "--num_examples", "1", "--credit_span", "none", "--eval_problems", "1", "--max_new_tokens", "2", steps=1,
    )  # fmt: skip
    record = next(r for r in read_lines(directory / "rollouts.jsonl") if r["kind"] == "held_out")
    first, rest = record["prompt"].split("\n\n", 1)
    assert first.startswith("Q: What do ") and "A: price " in first
    calculate, answer, asked = rest.split("\n\n")
    assert calculate.split("\n")[1].startswith("A: calculate ") and asked.startswith("Q: What do ")
    total = answer.split("\n")[0].removeprefix("Q: ")
    assert answer == f"Q: {total}\nA: {total}"
    hint = record["teacher_prompt"].split("\n")[1]
    assert hint.startswith("Feedback: turn 1: ") and hint.endswith(f"turn 2: {total}; turn 3: right; score 1")
