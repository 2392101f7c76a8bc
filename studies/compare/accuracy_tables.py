"""Tables of a study: on the screen, and in a marked block of a Markdown file.

Standard errors are over seeds. With fewer than FEW_SEEDS those of held-out accuracy are over the problems of all seeds,
which leaves out the differences between training runs. Differences are paired: the same seed means the same model at
the start and the same problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, log, nan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from studies.compare import language, small
from studies.compare.digit_tasks import SIGNS
from studies.compare.experiment import CREDITS, OBJECTIVES
from studies.compare.grid import (
    REFERENCE,
    Budget,
    Result,
    Results,
    Scale,
    Setting,
    area,
    chosen_rate,
    reported_runs,
    tuning_runs,
)
from studies.compare.small import SETTINGS, TEACHERS, VARIANTS, VARIANTS_TASK
from studies.compare.stopping import early_ends, expected_length
from studies.presentation import console, versions
from studies.theory.success import pass_at_k

FEW_SEEDS = 3


def marks(command: str) -> tuple[str, str]:
    """The two lines of a Markdown file that enclose a command's tables."""
    return f"<!-- {command}: begin -->", f"<!-- {command}: end -->"


class Table(NamedTuple):
    """A table of text cells, printed by rich or written as Markdown."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        rule = "|---" + "|--:" * (len(self.header) - 1) + "|"
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, *self.rows)]
        return "\n".join([f"**{self.title}**", "", lines[0], rule, *lines[1:]])


def capitalized(title: str) -> str:
    return title[0].upper() + title[1:]


def label(setting: Setting) -> str:
    """The name of a setting in tables and legends."""
    objective, teacher = setting
    name = (OBJECTIVES | CREDITS)[objective].label
    return name if teacher == "frozen" else f"{name}, {teacher} teacher"


def reported_results(scale: Scale, results: Results, budget: Budget, setting: Setting, rate: float) -> list[Result]:
    """The results of a setting at a rate, one for each reported seed."""
    return [results[scale.run(budget, setting, rate, seed)] for seed in range(scale.seeds)]


def average_at_k(result: Result, samples: int) -> float:
    return fmean(result.correct) / samples


def mean_pass_at_k(result: Result, samples: int, k: int) -> float:
    return fmean(pass_at_k(samples, correct, k) for correct in result.correct)


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else nan


def tables(scale: Scale, results: Results) -> list[Table]:
    """All tables of a study: objectives by task, credit and teachers of the small models, tuning."""
    study_tables = [_objectives(scale, results, budget) for budget in scale.tasks]
    if isinstance(scale, small.Scale):
        study_tables += [_variants(scale, results, budget) for budget in scale.tasks if budget.task == VARIANTS_TASK]
        study_tables.append(_teachers(scale, results))
    return [*study_tables, _rates(scale, results)]


def _number(value: float, digits: int = 3) -> str:
    return "-" if isnan(value) else f"{value:.{digits}f}".replace("0.", ".", 1 if abs(value) < 1 else 0)


def _measured(values: Sequence[float], signed: bool = False) -> str:
    """The text of a mean and its standard error; a difference is signed."""
    mean, error = fmean(values), standard_error(values)
    return ("+" if signed and mean > 0 else "") + _number(mean) + ("" if isnan(error) else f" ± {_number(error)}")


def _shares(runs: Sequence[Result], samples: int) -> list[float]:
    """The values whose mean is avg@samples and whose standard error is shown: one per seed, or per seed and problem."""
    if len(runs) < FEW_SEEDS:
        return [correct / samples for run in runs for correct in run.correct]
    return [average_at_k(run, samples) for run in runs]


def _objectives(scale: Scale, results: Results, budget: Budget) -> Table:
    samples = scale.final_samples
    few = min(4, samples)
    header = (
        "objective (teacher frozen unless named)", "rate", "mean over training", f"avg@{samples}", "greedy",
        f"pass@{few}", f"pass@{samples}", "length", f"avg@{samples} against DistIL", "mean against DistIL",
    )  # fmt: skip

    def held_out(runs: Sequence[Result]) -> tuple[str, ...]:
        return (
            _measured(_shares(runs, samples)), _measured([run.greedy[-1] for run in runs]),
            *(_number(fmean(mean_pass_at_k(run, samples, k) for run in runs)) for k in (few, samples)),
        )  # fmt: skip

    reference = reported_results(scale, results, budget, REFERENCE, chosen_rate(scale, results, budget, REFERENCE))
    title = f"{capitalized(budget.title)}: {budget.steps} steps of {budget.prompts} x {budget.rollouts} answers"
    rows: list[tuple[str, ...]] = []
    if isinstance(scale, language.Scale):
        starts = [results[scale.start(budget, seed)] for seed in range(scale.seeds)]
        rows.append(("before training", "", "", *held_out(starts), "", "", ""))
        title += f"; the teacher {_number(fmean(run.teacher[-1] for run in starts))}"
    else:
        start, greedy = (
            _number(fmean(values)) for values in zip(*((r.sampled[0], r.greedy[0]) for r in reference), strict=True)
        )
        title += f"; start {start} sampled, {greedy} greedy"
    for setting in budget.settings:
        rate = chosen_rate(scale, results, budget, setting)
        runs = reported_results(scale, results, budget, setting, rate)
        differences = ("", "")
        if setting != REFERENCE:
            shares = zip(_shares(runs, samples), _shares(reference, samples), strict=True)
            pairs = zip(runs, reference, strict=True)
            differences = (
                _measured([share - reference_share for share, reference_share in shares], True),
                _measured([area(run) - area(reference_run) for run, reference_run in pairs], True),
            )
        rows.append((
            label(setting), f"{rate:.0e}".replace("e-0", "e-"), _measured([area(run) for run in runs]),
            *held_out(runs), _number(fmean(run.length[-1] for run in runs), 2), *differences,
        ))  # fmt: skip
    return Table(title, header, rows)


def _variants(scale: small.Scale, results: Results, budget: Budget) -> Table:
    rate = chosen_rate(scale, results, budget, REFERENCE)
    rows = []
    for setting in (REFERENCE, *VARIANTS):
        runs = reported_results(scale, results, budget, setting, rate)
        rows.append((
            label(setting), _measured([area(run) for run in runs]), _measured([run.sampled[-1] for run in runs]),
            _number(fmean(run.length[len(run.length) // 2] for run in runs), 2),
            _number(fmean(run.length[-1] for run in runs), 2), _asked_length(setting[0]),
        ))  # fmt: skip
    header = ("credit", "mean over training", "sampled at the end", "length half-way", "length", "length asked for")
    title = f"{capitalized(budget.title)}: what is credited, all at learning rate {rate:g}"
    return Table(title, header, rows)


def _asked_length(objective: str) -> str:
    """The length by `stopping` for credit that is a discounted sum; the teacher is unsure of its four signs alone."""
    options = (OBJECTIVES | CREDITS)[objective].options or {}
    if any(name in options for name in ("horizon", "normalize_by_remaining", "credit_clip", "teacher_ratio_clip")):
        return ""
    sign_entropy = log(len(SIGNS)) if options["cost"] == "ce" else 0.0
    return _number(expected_length(early_ends([0.0, sign_entropy] * 4 + [0.0, 0.0], options["discount"])), 2)


def _teachers(scale: small.Scale, results: Results) -> Table:
    rows = []
    for budget in scale.tasks:
        if not budget.all_teachers:
            continue
        rate = chosen_rate(scale, results, budget, REFERENCE)
        for setting in (REFERENCE, *TEACHERS):
            runs = reported_results(scale, results, budget, setting, rate)
            rows.append((
                budget.title, setting[1], f"{rate:g}", _measured([run.teacher[0] for run in runs]),
                _measured([run.teacher[-1] for run in runs]), _measured([run.sampled[-1] for run in runs]),
            ))  # fmt: skip
    header = ("task", "teacher", "rate", "teacher at the start", "teacher at the end", "student at the end")
    return Table("DistIL's teachers at one learning rate", header, rows)


def _rates(scale: Scale, results: Results) -> Table:
    """The accuracy averaged over training of every rate, on the tuning seeds."""
    # The language study has one rate for all tasks: the first budget shows it.
    budgets = scale.tasks[:1] if isinstance(scale, language.Scale) else scale.tasks
    rows = []
    for setting in SETTINGS:
        if not any(setting in budget.settings for budget in budgets):
            continue
        cells: list[str] = []
        for budget in budgets:
            if setting not in budget.settings:
                cells += [""] * len(scale.rates)
                continue
            best = chosen_rate(scale, results, budget, setting)
            for rate in scale.rates:
                text = _number(fmean(area(results[run]) for run in scale.tuning(budget, setting, rate)), 2)
                cells.append(f"**{text}**" if rate == best else text)
        rows.append((label(setting), *cells))
    names = (
        [", ".join(budget.task for budget in scale.tuning_tasks)]
        if isinstance(scale, language.Scale)
        else [budget.task for budget in budgets]
    )
    header = tuple(f"{name} {rate:g}" for name in names for rate in scale.rates)
    return Table("Tuning: mean over training on seeds of its own", ("objective", *header), rows)


def headline(scale: Scale, results: Results) -> str:
    """The line above the tables: versions, number of runs, their time, and the meaning of ±."""
    runs = {*tuning_runs(scale), *reported_runs(scale, results)}
    minutes = sum(results[run].seconds for run in runs) / 60
    models = f"over {scale.models} pre-trained models" if isinstance(scale, small.Scale) else "of a pre-trained model"
    over = "seeds" if scale.seeds >= FEW_SEEDS else "problems of all seeds (held out) or seeds (training)"
    return (
        f"{versions()}; {scale.seeds} seed{'s' * (scale.seeds > 1)} {models}, "
        f"{len(runs)} runs in {minutes:.0f} minutes of one core; ± is one standard error over {over}"
    )


def print_tables(tables: Sequence[Table], headline: str) -> None:
    """Prints the headline and the tables on the screen."""
    from rich.table import Table as Grid

    screen = console(piped_width=170)
    screen.print(headline, highlight=False)
    for table in tables:
        grid = Grid(*table.header, title=table.title, title_justify="left", show_edge=False, pad_edge=False)
        for row in table.rows:
            grid.add_row(*(cell.replace("**", "") for cell in row))
        screen.print(grid, highlight=False)


def write_block(path: Path, command: str, text: str) -> None:
    """Replaces the text between a command's marks in a file.

    Raises:
        ValueError: the file does not contain both marks.
    """
    begin_mark, end_mark = marks(command)
    content = path.read_text(encoding="utf-8")
    before, begin, block_and_after = content.partition(begin_mark)
    _, end, after = block_and_after.partition(end_mark)
    if not (begin and end):
        raise ValueError(f"[docs] {path} has no marked block, expected lines '{begin_mark}' and '{end_mark}'")
    path.write_text(f"{before}{begin_mark}\n\n{text}\n\n{end_mark}{after}", encoding="utf-8")
