"""Python as an environment: a tiny model that was taught to call it; what is put in is read and never learnt."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import FULL_CREDIT, give_rollouts, metrics, micro_batch, packed, train, trainer
from tool_model import KNOWN, STOP, TOKENIZER, ids, python, shown, started

from distil_kernels.testing import credit_by_definition
from distil_kernels.train.__main__ import main
from distil_kernels.train.environments.python import CLOSE, Python
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.metrics import token_means
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.objective import distil_loss, policy_loss
from distil_kernels.train.rollouts.episodes import Episodes, Texts, roll_out
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Sampling, generate
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.tasks import Problem
from distil_kernels.train.teachers.base import HiddenTarget


def greedy(lm: Reader, prompts: str, limit: int, max_calls: int = 2) -> list[str]:
    """Completions of some of KNOWN."""
    tool = python(max_calls, 3)
    read = [ids(f"{letter}:") for letter in prompts]
    sampling = Sampling(limit, STOP, temperature=0.0)
    rollouts = roll_out(partial(generate, lm), read, range(len(read)), sampling, started(tool, len(read)))
    assert all(sum(rollout.by_model) <= limit for rollout in rollouts)
    assert all(len(rollout.tokens) <= limit + tool.longest for rollout in rollouts)
    return [shown(rollout.tokens, rollout.by_model) for rollout in rollouts]


@pytest.mark.parametrize("reading", ["shared", "padded"])
def test_rows_that_call_and_rows_that_do_not(lm: Reader, reading: str) -> None:
    found = greedy(reader(lm, reading), "abca", 60)
    assert found == [
        "<tool>6*7</tool>[ <result>42</result>] 42\n",
        "13\n",
        "<tool>2**99</tool>[ <result>633</result>] big\n",  # 633825300114114700748351602688, cut to three tokens
        "<tool>6*7</tool>[ <result>42</result>] 42\n",
    ]


def test_calls_over_the_limit_are_text(lm: Reader) -> None:
    call = "<tool>{0}</tool>[ <result>{0}</result>]"
    text = call.replace("[", "").replace("]", "")
    for limit in (1, 2, 3):
        expected = [call.format(n) if n <= limit else text.format(n) for n in (1, 2, 3)]
        assert greedy(lm, "db", 100, max_calls=limit) == ["".join(expected) + " x\n", "13\n"]


def test_the_length_limit_is_on_what_the_model_writes(lm: Reader) -> None:
    call, rest = "<tool>6*7</tool>", " 42\n"
    for limit in range(1, len(call + rest) + 3):
        written = (call + rest)[:limit]
        expected = written.replace(CLOSE, f"{CLOSE}[ <result>42</result>]") if limit > len(call) else written
        assert greedy(lm, "a", limit) == [expected]  # cut inside a call: nothing is run or put in


def test_each_row_has_its_own_length_left(lm: Reader) -> None:
    expected = ["<tool>6*7</tool>[ <result>42</result>] 42\n", "<tool>2**99</tool>[ <result>633</result>] b"]
    assert greedy(lm, "ac", 20) == expected


def test_a_token_that_ends_the_answer_ends_it_even_where_it_closes_a_call(lm: Reader) -> None:
    sampling = Sampling(60, [*STOP, *ids(">")], temperature=0.0)
    done = roll_out(partial(generate, lm), [ids("a:<tool>6*7")], [0], sampling, started(python(2, 3), 1))
    assert [done[0].tokens, done[0].by_model] == [ids(CLOSE), [True] * len(CLOSE)]


def test_without_a_tool_a_call_is_text(lm: Reader) -> None:
    done = roll_out(partial(generate, lm), [ids("a:")], [0], Sampling(60, STOP, temperature=0.0))
    assert done == [Rollout.sampled(ids(KNOWN["a:"]))]


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("<tool> 17 * 23 </tool>", "391"),
        ("a</tool> <result>1</result> <tool>sqrt(16)</tool>", "4.0"),
        ("<tool>'a\\n  b'</tool>", "a b"),  # one line, which does not end an answer
        ("<tool>1/0</tool>", "ZeroDivisionError: division by zero"),
        ("<tool>)</tool>", "SyntaxError: unmatched ')'"),
        ("17</tool>", "17"),
        ("</tool>", "SyntaxError: invalid syntax"),
        ("<tool>open('/etc/passwd')</tool>", "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'"),
        ("<tool>''</tool>", ""),
        ('<tool>exit("")</tool>', "the program ended with code 1"),
        ("<tool>exit('File \"<string>\"')</tool>", 'File "<string>"'),
    ],
)
def test_results(call: str, result: str) -> None:
    for limit in (99, 2):
        (episode,) = started(python(1, limit), 1)
        observed = episode.answer(ids(call), at_stop_token=False, has_room=True)
        assert TOKENIZER.decode(observed) == f" <result>{result[:limit]}</result>"


def test_the_token_that_closes_may_hold_more() -> None:
    words = ["<tool>6", "*7</to", "ol>.", " x"]
    texts = Texts(lambda tokens: "".join(words[token] for token in tokens), ids, Python.frame)
    (episode,) = started(Episodes(Python, "python", texts, 1, 9), 1)
    assert not episode.episodes.ends_turn([0, 1]) and episode.episodes.ends_turn([0, 1, 2])
    assert TOKENIZER.decode(episode.answer([0, 1, 2], at_stop_token=False, has_room=True)) == " <result>42</result>"
    assert episode.outcome().turns == (("<tool>6*7</tool>", "42"),)


def test_prompts_show_the_tool_and_answers_are_without_calls() -> None:
    problem = Problem("3, 9", "9", "9", "")
    prompts = Prompts(TOKENIZER, [], shown=Python.example)
    read = TOKENIZER.decode(prompts.student(problem))
    assert read.startswith("Q: 17 * 23?") and read.endswith("</tool> <result>391</result> 391\n\nQ: 3, 9\nA:")
    answer = Python().answer
    assert answer([" <tool>1"]) == " <tool>1"
    assert answer(["x <tool>1</tool>", ", <result>1</result>y <tool>2</tool>"]) == "x , y "
    assert answer(["<tool>1\n</tool> <result>1</result>", "9"]) == " 9"
    chat = Prompts(TOKENIZER, [], layout="chat", end_ids=[0], shown=Python.example)
    assert TOKENIZER.decode(chat.student(problem)).count("<assistant><tool>17 * 23</tool>") == 1


COMPLETIONS = [[20, 30, 40, 50, 60], [21, 31], [22, 32, 42, 52], [23, 33, 43]]
BY_MODEL = [[True, True, False, False, True], [True, True], [True, False, True, True], [True, True, True]]
"""Two rollouts of each of two problems."""


@pytest.mark.parametrize("objective", ["forward_ce", "policy_gradient"])
def test_rows_that_were_put_in_are_not_read(tiny_model: Path, tmp_path: Path, objective: str) -> None:
    """NaN there changes nothing, and its gradient is zero to the last bit."""
    run = trainer(tiny_model, tmp_path / "run", objective=objective, baseline="moving_average", tools="python")
    assert run.tutor.episodes.seconds == math.inf  # a signal would cut a talk with the sandbox
    mask = torch.tensor([flag for row in BY_MODEL for flag in row])
    batch = packed([[1, 2], [1, 3]], [0, 0, 1, 1], COMPLETIONS, BY_MODEL, [1.0, 0.0, 0.5, 0.7])
    values, taught = torch.randn(2, len(mask), 32)
    results = []
    for filling in (0.5, float("nan")):
        hidden = values.clone()
        hidden[~mask] = taught[~mask] = filling
        hidden.requires_grad_()
        if objective == "policy_gradient":
            loss, sums = policy_loss(run.student, hidden, batch, run.config, 4.0)
        else:
            target = HiddenTarget(taught, *run.teacher.head)
            loss, sums = distil_loss(run.student, hidden, target, batch, run.config, run.average, 4.0)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(1).all()
        assert sums.num_tokens == int(mask.sum())
        results.append((loss.item(), gradient, token_means([sums])))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    if objective == "forward_ce":
        run.average.follow()
        lengths = [5, 2, 4, 3]
        seen = run.average.state_dict()["reached"]
        assert seen.tolist() == [True] * 5 + [False] * (len(seen) - 5) and len(seen) == 4 + run.tutor.episodes.longest
        assert torch.isfinite(run.average.values(lengths)).all()
    assert packed([[1]], [0, 0], [[2], [3, 4]]).judged == (None, 3)  # no mask where every token counts


def test_gradient_and_means_by_definition(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", teacher="live", tools="python", prompts_per_step=2, **FULL_CREDIT)
    batch = next(run.batches)
    rollouts = [Rollout(*pair) for pair in zip(COMPLETIONS, BY_MODEL, strict=True)]
    give_rollouts(run, batch, [rollouts[:2], rollouts[2:]])
    loss, sums = micro_batch(run, batch, 4.0)
    found = {name: p.grad.clone() for name, p in run.student.model.named_parameters()}
    run.student.model.zero_grad()
    mask = torch.tensor([flag for row in BY_MODEL for flag in row])
    own, taught = [], []
    for row, done in enumerate(COMPLETIONS):
        group = batch[row // 2]
        for part, prompt in ((own, group.prompt), (taught, group.rollouts[row % 2].teacher_prompt)):
            logits = run.student.model(torch.tensor([prompt + done])).logits[0]
            part.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
    own, taught = torch.cat(own), torch.cat(taught).detach()
    costs = -(taught.exp() * own).sum(1) * mask
    credit = credit_by_definition(
        costs.detach(), [5, 2, 4, 3], discount=0.9, baseline="leave_one_out", group_size=2, counted=mask
    )
    tokens = torch.tensor([token for done in COMPLETIONS for token in done])
    (costs + credit * mask * own.gather(1, tokens[:, None])[:, 0]).sum().div(4.0).backward()
    for name, parameter in run.student.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-3, atol=2e-5)
    assert loss.item() == pytest.approx(costs.sum().item() / 4.0, rel=1e-5)
    mean = token_means([sums])
    assert mean["ce"] == pytest.approx(float(costs.sum() / mask.sum()), rel=1e-5)
    entropy = -(own.exp() * own).sum(1)[mask].mean()
    assert mean["entropy"] == pytest.approx(float(entropy), rel=1e-5)
    by_row = (taught.gather(1, tokens[:, None])[:, 0] * mask).split([5, 2, 4, 3])
    assert sums.sequence_teacher_logprob.tolist() == pytest.approx([float(part.sum()) for part in by_row], rel=1e-5)


def test_a_run(caller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--max_new_tokens", "24", "--num_examples", "0", "--eval_every", "1", "--eval_problems", "2")
    options = ("--tools", "python", *sizes, "--learning_rate", "1e-5")
    whole = train(caller, tmp_path, "whole", *options, steps=2)
    parts = train(caller, tmp_path, "parts", *options, steps=1)
    assert main(["--resume", str(parts), "--steps", "2"]) == 0
    assert metrics(parts) == metrics(whole)
    records = read_lines(whole / "rollouts.jsonl")
    assert read_lines(parts / "rollouts.jsonl") == records
    calls = [record for record in records if record["tool_positions"]]
    assert 0 < len(calls) < len(records)  # some rows call, others do not
    for record in calls:
        assert "<" not in record["answer"] or record["answer"].count("<tool>") > record["answer"].count(CLOSE)
        put_in = TOKENIZER.decode([record["tokens"][index] for index in record["tool_positions"]])
        assert put_in.startswith(" <result>") and put_in.endswith("</result>")
    for record in (record for record in calls if record["kind"] == "held_out"):
        for index in range(len(record["tokens"])):
            assert (record["ce"][index] == 0) == (index in record["tool_positions"])
        assert all(record[name][index] == 0 for name in ("kl", "credit") for index in record["tool_positions"])
    for step in (record for record in metrics(whole) if record["kind"] == "step"):
        cut = [r["tokens"][-1] not in STOP for r in records if r["kind"] == "training" and r["step"] == step["step"]]
        assert step["truncated"] == pytest.approx(sum(cut) / len(cut)) and step["num_unfinished"] == sum(cut)
        own = [r for r in records if r["kind"] == "training" and r["step"] == step["step"]]
        assert step["length"] == pytest.approx(sum(len(r["tokens"]) - len(r["tool_positions"]) for r in own) / len(own))
    capsys.readouterr()
    assert main(["eval", str(whole)]) == 0
    length = json.loads(capsys.readouterr().out.splitlines()[-1])["length"]
    assert length == [record for record in metrics(whole) if record["kind"] == "evaluation"][-1]["length"] <= 24

    sample = next(record for record in calls if record["kind"] == "held_out")
    step, problem = sample["step"], sample["problem"]
    own = [r for r in records if r["kind"] == "held_out" and (r["step"], r["problem"]) == (step, problem)]
    where = ["--step", str(step), "--problem", str(problem), "--rollout", str(own.index(sample))]
    assert main(["inspect", str(whole), *where]) == 0
    assert capsys.readouterr().out.count("observed, not learnt") == len(sample["tool_positions"])
    assert main(["report", str(whole)]) == 0
    number = sum(len(record["tool_positions"]) for record in calls if record["kind"] == "held_out")
    assert (whole / "report.html").read_text().count('<span class="t given"') == number
