"""`python -m studies.compare language`: the objectives in the trainer, on a tiny model; its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_kernels.train.config import Config
from studies.compare import __main__ as command
from studies.compare import accuracy_tables, grid, language
from studies.compare.grid import REFERENCE, Result
from studies.compare.language import Budget, Run, Scale, execute

pytestmark = pytest.mark.slow


def test_every_objective_is_the_trainers_own() -> None:
    for options in language.OPTIONS.values():
        Config(**options).check()
    default, distil = Config(**language.OPTIONS["distil_kl"]), Config(**language.OPTIONS["distil"])
    whole = {"teacher_ratio_clip": None, "credit_clip": None}
    assert default == Config(**whole) and (distil.cost, distil.credit_span) == ("ce", "future")
    assert {Config(**options).teacher for options in language.OPTIONS.values()} == {"frozen", "live"}  # grpo has none
    assert Config(**language.OPTIONS["ce"]).credit_span == "none"


def test_runs_of_a_seed_begin_alike_and_then_differ(tiny_model: Path) -> None:
    """The same problems and, before the first update, the same answers; a rate of 0 leaves the model as it starts."""

    def lengths(objective: str, rate: float, seed: int = 0, steps: int = 3) -> tuple[list[float], list[int]]:
        run = Run(
            "largest", objective, rate, seed, steps, 2, 4, 24, 2, 4, str(tiny_model),
            warmup_steps=0, precision="float32",
        )  # fmt: skip
        _, result = execute(run)
        assert result.steps == list(range(steps)) and len(result.correct) == 2 and len(result.greedy) == 1
        return result.length, result.correct

    first, _ = lengths("distil", 1e-2)
    second, _ = lengths("reverse_kl", 1e-2)
    assert first[0] == second[0] and first[1:] != second[1:]
    assert lengths("distil", 1e-2) == (first, _)
    assert lengths("distil", 1e-2, seed=1)[0] != first
    assert lengths("distil", 0.0, steps=0)[0] == []


def test_a_stopped_study_goes_on(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs, path = tmp_path / "results.md", tmp_path / "out" / "runs.jsonl"
    begin, end = accuracy_tables.marks(command.COMMANDS["language"])
    docs.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    arguments = ["language", "--quick", "--jobs", "1", "--model", str(tiny_model), "--docs", str(docs)]

    def conduct() -> dict[Run, Result]:
        command.main([*arguments, "--output", str(path.parent)])
        return grid.load(path, Run)

    results = conduct()
    assert "Largest of four" in capsys.readouterr().out and "old" not in docs.read_text()
    assert (tmp_path / "figures" / "compare_language.svg").stat().st_size > 1000
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    again = conduct()
    assert again.keys() == results.keys()
    lost = list(results)[-2:]
    for run, result in results.items():
        if run in lost:
            assert again[run].seconds != result.seconds
            again[run].seconds = result.seconds
        assert again[run] == result


def made_up(seeds: int) -> tuple[Scale, dict[Run, Result]]:
    """Accuracies that make means, paired differences and the chosen rate known."""
    budget = Budget("largest", "largest of four", 5, steps=3)
    scale = Scale(tasks=(budget,), tuning_tasks=(budget,), rates=(1e-5, 1e-4), seeds=seeds, final_samples=4)
    results = {}
    for setting in budget.settings:
        for rate, accuracy in ((1e-5, 0.25), (1e-4, 0.5)):
            for run in scale.tuning(budget, setting, rate):
                results[run] = Result([0, 1, 2], [1.0, accuracy, accuracy], [], [], [4.0] * 3, [], 1.0)
        for seed in range(seeds):
            gain = (1, 0, 1)[seed] if setting[0] == "ce" else 0
            correct = [1 + gain, 2]
            results[scale.run(budget, setting, 1e-4, seed)] = Result(
                [0, 1, 2], [0.0, 0.25, 0.75], [0.5], [1.0], [4.0] * 3, correct, 1.0
            )
    for seed in range(seeds):
        results[scale.start(budget, seed)] = Result([], [], [0.25], [0.75], [], [1, 0], 1.0)
    return scale, results


def test_tables_of_one_seed_speak_of_problems_and_of_three_of_seeds() -> None:
    rows = {}
    for seeds in (1, 3):
        objectives, tuning = accuracy_tables.tables(*made_up(seeds))
        assert objectives.title.endswith("the teacher .750")
        rows[seeds] = {row[0]: row for row in objectives.rows}
        assert [row[1:] for row in tuning.rows] == [(".25", "**.50**")] * len(language.OPTIONS)
    # CE has one more answer of four right: of one of two problems, or in two of three seeds on one of two problems.
    label = accuracy_tables.label(("ce", "frozen"))
    assert rows[1][label][8] == "+.125 ± .125" and rows[3][label][8] == "+.083 ± .042"
    assert rows[1][label][2] == ".500" and rows[1]["before training"][3] == ".125 ± .125"
    assert rows[1][accuracy_tables.label(REFERENCE)][3] == ".375 ± .125"
    assert rows[1][label][7] == "4.00"


def test_tasks_that_the_study_has_not_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["language", "--tasks", "list"], "[tasks] got list, expected some of largest, add"),
        (["--model", "x"], "[model] belongs to study language"),
        (["language", "--seeds", "0"], "[seeds] got 0, expected at least 1"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert expected in capsys.readouterr().err
