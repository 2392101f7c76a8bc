"""`python -m studies.compare`: its tasks, its reader, its statistics, and that a study resumes."""

from itertools import combinations, pairwise
from math import log
from statistics import fmean

import pytest
import torch

from studies.compare import __main__ as command
from studies.compare import grid, report, stopping, study
from studies.compare.experiment import Run
from studies.compare.grid import Result
from studies.compare.pretrain import Pretraining, pretrain
from studies.compare.tasks import BLANK, CHARACTERS, END, TASKS, any_signs, one_sign
from studies.theory.success import pass_at_k


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
    right = task.answer(task.problems(200, generator))
    written = any_signs(right, generator)
    assert (written != right).any() and torch.equal(one_sign(written), right)
    wrong = written.clone()
    wrong[:, 0] = (wrong[:, 0] + 1) % 10
    assert (one_sign(wrong) != right).any(1).all()


def test_pretrained_reader_is_right_when_it_reads(generator):
    task = TASKS["descend"]
    model = pretrain(Pretraining("descend", 0, steps=220))
    problems = task.problems(200, generator, held_out=True)
    right = task.answer(problems)

    def accuracy(prompts: torch.Tensor) -> float:
        return (model.answers(prompts, task.answer_width, 1, generator) == right).all(1).float().mean().item()

    assert accuracy(task.prompts(problems, right)) > 0.8
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
    for probabilities, drawn in ((first, answers[:, 0]), (second, answers[answers[:, 0] == most_likely, 1])):
        shares = torch.bincount(drawn, minlength=len(CHARACTERS)) / len(drawn)
        assert ((shares - probabilities).abs() < 5 * (probabilities / len(drawn)).sqrt() + 1e-6).all()
    assert (answers[answers[:, 0] == END, 1] == BLANK).all()


def test_pass_at_k_is_that_of_every_choice_of_k():
    samples = 6
    for correct in range(samples + 1):
        outcomes = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            choices = [any(chosen) for chosen in combinations(outcomes, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(fmean(choices))


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5])
def test_early_ends_are_where_the_credited_gradient_vanishes(discount, generator):
    """Descent along the credited gradient of a student that ends with probability e_t, by autograd."""
    entropies = [0.0, log(3), 0.7, 1.5, 0.2, 0.0]
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    for _ in range(6000):
        ends = torch.cat([logits.sigmoid(), torch.zeros(1, dtype=torch.float64)])
        to_come, surrogate, alive = torch.zeros(()), torch.zeros(()), (1 - ends.detach()).cumprod(0)
        for t in reversed(range(6)):
            local = -(1 - ends[t]).log()
            surrogate = surrogate + (1.0 if t == 0 else alive[t - 1]) * (local + (1 - ends[t]) * discount * to_come)
            to_come = (entropies[t] + local + (1 - ends[t]) * discount * to_come).detach()
        (gradient,) = torch.autograd.grad(surrogate, logits)
        with torch.no_grad():
            logits -= gradient
    # Where ending does not pay, the probability falls like 1 / steps.
    assert ends.tolist() == pytest.approx(stopping.early_ends(entropies, discount), abs=2e-2)


def test_expected_length_is_that_of_enumeration():
    ends = [0.3, 0.0, 0.6, 0.0]
    lasting = [1.0]
    for end in ends:
        lasting.append(lasting[-1] * (1 - end))
    stops = [before - after for before, after in pairwise(lasting)]
    stops[-1] += lasting[-1]
    assert stopping.expected_length(ends) == pytest.approx(sum((t + 1) * p for t, p in enumerate(stops)))


@pytest.fixture
def rounds(tmp_path, monkeypatch, capsys):
    """Runs the command; returns the runs that were executed, and what it printed."""
    monkeypatch.chdir(tmp_path)
    begin, end = report.marks("python -m studies.compare")
    (tmp_path / "results.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")

    def run() -> tuple[dict[Run, Result], str]:
        command.main(["--quick", "--jobs", "1", "--output", "out", "--docs", "results.md"])
        return grid.load(tmp_path / "out" / "runs.jsonl", Run), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_quick_study_runs_and_resumes_without_repeating(rounds, tmp_path):
    results, printed = rounds()
    assert "Add three digits" in printed and (tmp_path / "figures" / "compare_objectives.svg").stat().st_size > 1000
    written = (tmp_path / "results.md").read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    for table in report.tables(study.QUICK, results):
        assert table.markdown() in written

    # A stopped study lacks some runs; each result says when it was made by the seconds that it took.
    path = tmp_path / "out" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
    again, _ = rounds()
    assert again.keys() == results.keys()
    lost = list(results)[-3:]
    for run, result in results.items():
        if run in lost:
            assert again[run].correct == result.correct and again[run].sampled == result.sampled
        else:
            assert again[run] == result
    assert any(again[run].seconds != results[run].seconds for run in lost)


def test_tables_say_what_the_runs_hold():
    """Accuracies made up so that means, paired differences and the chosen rate are known."""
    scale = study.Scale(tasks=(study.Budget("sort", 10, 4),), rates=(1e-3, 1e-2), seeds=3, tuning_seeds=1)
    budget, results = scale.tasks[0], {}

    def add(setting: grid.Setting, rate: float, seed: int, accuracy: float) -> None:
        correct = [round(16 * accuracy)] * 4
        results[scale.run(budget, setting, rate, seed)] = Result(
            [0, 10], [0.0, accuracy], [0.0, 1.0], [1.0, 1.0], [6.0, 6.0], correct, 1.0
        )

    for setting in study.SETTINGS:
        best = 1e-2 if setting == ("ce", "frozen") else 1e-3
        for rate in scale.rates:
            add(setting, rate, 1000, 0.5 if rate == best else 0.25)
        for seed, accuracy in enumerate((0.25, 0.5, 0.75)):
            # CE is better by .125, .125 and .25: mean .167, standard error of the difference .042.
            gain = (0.125, 0.125, 0.25)[seed] if setting[0] == "ce" else 0.0
            add(setting, best, seed, accuracy + gain)
    objectives, teachers, tuning = report.tables(scale, results)
    rows = {row[0]: row for row in objectives.rows}
    assert rows["CE"][1] == "1e-2" and rows["CE"][3] == ".667 ± .182" and rows["CE"][8] == "+.167 ± .042"
    assert rows["KL + credit"][8] == ".000 ± .000" and rows["CE + credit (DistIL)"][8] == ""
    assert [row[1] for row in teachers.rows] == ["frozen", "ema", "live"]
    assert dict((row[0], row[1:]) for row in tuning.rows)["CE"] == (".25", "**.50**")


def test_a_file_without_marks_is_an_error(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"\[docs\].*no marked block"):
        report.write_block(path, "command", "text")
