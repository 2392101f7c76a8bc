"""`python -m studies.compare`: tasks, pre-trained models, statistics and tables, and that a stopped study resumes."""

from itertools import combinations, pairwise
from math import log
from statistics import fmean

import pytest
import torch

from studies.compare import __main__ as command
from studies.compare import accuracy_tables, grid, small, stopping
from studies.compare.digit_tasks import BLANK, CHARACTERS, END, TASKS, any_signs, one_sign
from studies.compare.experiment import SmallRun
from studies.compare.grid import Result
from studies.compare.pretrain import Pretraining, pretrain
from studies.theory.success import pass_at_k

pytestmark = pytest.mark.slow


def text(answers: torch.Tensor) -> list[str]:
    return ["".join(CHARACTERS[token] for token in row).rstrip() for row in answers.tolist()]


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_of_plain_python(name, generator):
    task = TASKS[name]
    problems = task.problems(50, generator)
    for digits, answer in zip(problems.tolist(), text(task.answer(problems)), strict=True):
        if name == "add":
            a, b = (int("".join(map(str, half))) for half in (digits[:3], digits[3:]))
            expected = str(a + b).zfill(3)[::-1]
        else:
            expected = {"list": "+"}.get(name, "").join(map(str, sorted(digits, reverse=name == "descend")))
        assert answer == expected + "."


@pytest.mark.parametrize("name", TASKS)
def test_held_out_problems_are_never_trained_on(name, generator):
    task = TASKS[name]
    numbers = [
        {int("".join(map(str, digits))) for digits in task.problems(3000, generator, held_out=held_out).tolist()}
        for held_out in (False, True)
    ]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]


def test_any_sign_is_right_and_others_are_not(generator):
    task = TASKS["list"]
    expected = task.answer(task.problems(200, generator))
    answers = any_signs(expected, generator)
    assert (answers != expected).any() and torch.equal(one_sign(answers), expected)
    wrong_answers = answers.clone()
    wrong_answers[:, 0] = (wrong_answers[:, 0] + 1) % 10
    assert (one_sign(wrong_answers) != expected).any(1).all()


def test_pretrained_reader_is_right_when_it_reads(generator):
    task = TASKS["descend"]
    model = pretrain(Pretraining("descend", 0, steps=220, batch=64))
    problems = task.problems(200, generator, held_out=True)
    corrections = task.answer(problems)

    def accuracy(prompts: torch.Tensor) -> float:
        return (model.answers(prompts, task.answer_width, 1, generator) == corrections).all(1).float().mean().item()

    assert accuracy(task.prompts(problems, corrections)) > 0.8
    assert accuracy(task.prompts(problems)) < 0.4


def test_sampling_with_a_cache_follows_the_model(generator):
    """Frequencies of the first two tokens against the probabilities of a forward pass without a cache."""
    task = TASKS["list"]
    model = pretrain(Pretraining("list", 0, steps=3))
    prompts = task.prompts(task.problems(1, generator))
    answers = model.answers(prompts, 2, 40_000, generator)
    with torch.no_grad():
        first = model.head(model(prompts)[0][:, -1]).softmax(-1)[0]
        most_likely = first.argmax()
        longer = torch.cat([prompts, most_likely.view(1, 1)], 1)
        second = model.head(model(longer)[0][:, -1]).softmax(-1)[0]
        states = model.answer_hidden(prompts, torch.stack([most_likely, most_likely])[None])
    torch.testing.assert_close(model.head(states[0]).softmax(-1), torch.stack([first, second]))
    assert most_likely != END
    for probs, samples in ((first, answers[:, 0]), (second, answers[answers[:, 0] == most_likely, 1])):
        shares = torch.bincount(samples, minlength=len(CHARACTERS)) / len(samples)
        assert ((shares - probs).abs() < 5 * (probs / len(samples)).sqrt() + 1e-6).all()
    assert (answers[answers[:, 0] == END, 1] == BLANK).all()


def test_pass_at_k_is_that_of_every_choice_of_k():
    samples = 6
    for correct in range(samples + 1):
        outcomes = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            choices = [any(chosen) for chosen in combinations(outcomes, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(fmean(choices))


def test_early_ends_are_where_the_credited_gradient_vanishes(generator):
    """Descent along the credited gradient of a student that ends with probability e_t, by autograd."""
    entropies, discounts = [0.0, log(3), 0.7, 1.5, 0.2, 0.0], torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()  # a student each
    for _ in range(1500):
        ends = torch.cat([logits.sigmoid(), torch.zeros(1, 3, dtype=torch.float64)])
        to_come, surrogate, alive = torch.zeros(()), torch.zeros(()), (1 - ends.detach()).cumprod(0)
        for t in reversed(range(6)):
            local = -(1 - ends[t]).log()
            later = local + (1 - ends[t]) * discounts * to_come
            surrogate = surrogate + ((1.0 if t == 0 else alive[t - 1]) * later).sum()
            to_come = (entropies[t] + later).detach()
        (gradient,) = torch.autograd.grad(surrogate, logits)
        with torch.no_grad():
            logits -= 4 * gradient
    # Where ending does not pay, the probability falls like 1 / steps.
    for discount, found in zip(discounts.tolist(), ends.T.tolist(), strict=True):
        assert found == pytest.approx(stopping.early_ends(entropies, discount), abs=2e-2)


def test_expected_length_is_that_of_enumeration():
    ends = [0.3, 0.0, 0.6, 0.0]
    survival_probs = [1.0]
    for end in ends:
        survival_probs.append(survival_probs[-1] * (1 - end))
    stops = [before - after for before, after in pairwise(survival_probs)]
    stops[-1] += survival_probs[-1]
    assert stopping.expected_length(ends) == pytest.approx(sum((t + 1) * p for t, p in enumerate(stops)))


@pytest.fixture
def conduct(tmp_path, monkeypatch, capsys):
    """Runs the command; returns the runs that were executed, and what it printed."""
    monkeypatch.chdir(tmp_path)
    begin, end = accuracy_tables.marks("python -m studies.compare")
    (tmp_path / "results.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")

    def conduct_quick_study() -> tuple[dict[SmallRun, Result], str]:
        command.main(["--quick", "--jobs", "1", "--output", "out", "--docs", "results.md"])
        return grid.load(tmp_path / "out" / "runs.jsonl", SmallRun), capsys.readouterr().out

    return conduct_quick_study


def test_quick_study_runs_and_resumes_without_repeating(conduct, tmp_path):
    results, printed = conduct()
    assert "Add three digits" in printed and (tmp_path / "figures" / "compare_objectives.svg").stat().st_size > 1000
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for table in accuracy_tables.tables(small.QUICK, results):
        assert table.markdown() in text

    # A stopped study lacks some runs; the seconds of a result tell whether it was computed again.
    path = tmp_path / "out" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
    resumed, _ = conduct()
    assert resumed.keys() == results.keys()
    removed = list(results)[-3:]
    for run, result in results.items():
        if run in removed:
            assert resumed[run].correct == result.correct and resumed[run].sampled == result.sampled
        else:
            assert resumed[run] == result
    assert any(resumed[run].seconds != results[run].seconds for run in removed)


def test_tables_show_means_differences_and_the_chosen_rate():
    """Accuracies made up so that means, paired differences and the chosen rate are known."""
    scale = small.Scale(tasks=(small.Budget("sort", 10, 4),), rates=(1e-3, 1e-2), seeds=3, tuning_seeds=1)
    budget, results = scale.tasks[0], {}

    def add(setting: grid.Setting, rate: float, seed: int, accuracy: float) -> None:
        correct = [round(16 * accuracy)] * 4
        results[scale.run(budget, setting, rate, seed)] = Result(
            [0, 10], [0.0, accuracy], [0.0, 1.0], [1.0, 1.0], [6.0, 6.0], correct, 1.0
        )

    for setting in small.SETTINGS:
        best = 1e-2 if setting == ("ce", "frozen") else 1e-3
        for rate in scale.rates:
            add(setting, rate, 1000, 0.5 if rate == best else 0.25)
        for seed, accuracy in enumerate((0.25, 0.5, 0.75)):
            # CE is better by .125, .125 and .25: mean .167, standard error of the difference .042.
            gain = (0.125, 0.125, 0.25)[seed] if setting[0] == "ce" else 0.0
            add(setting, best, seed, accuracy + gain)
    objectives, teachers, tuning = accuracy_tables.tables(scale, results)
    rows = {row[0]: row for row in objectives.rows}
    assert rows["CE"][1] == "1e-2" and rows["CE"][3] == ".667 ± .182" and rows["CE"][8] == "+.167 ± .042"
    assert rows["KL + credit"][8] == ".000 ± .000" and rows["CE + credit (DistIL)"][8] == ""
    assert [row[1] for row in teachers.rows] == ["frozen", "ema", "live"]
    assert dict((row[0], row[1:]) for row in tuning.rows)["CE"] == (".25", "**.50**")


def test_a_file_without_marks_is_an_error(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"\[docs\].*no marked block"):
        accuracy_tables.write_block(path, "command", "text")
