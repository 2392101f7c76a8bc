"""The results of all four subjects: measured together, printed as one aligned table, written to theory.json."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from studies.presentation import console, versions
from studies.theory import bandit, regret, success, tabular
from studies.theory.finding import Finding


@dataclass(frozen=True)
class Results:
    """The results of every subject; the field names are keys of theory.json."""

    bandit: bandit.BanditResult
    tabular: tabular.TabularResult
    regret: regret.RegretResult
    success: success.SuccessResult


def measure(seed: int) -> Results:
    """Measures every subject on one thread; `seed` draws the random pairs, environments and starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few entries: more threads only wait for each other
    try:
        return Results(bandit.measure(seed), tabular.measure(), regret.measure(seed), success.measure(seed))
    finally:
        torch.set_num_threads(threads)


def findings(results: Results) -> list[Finding]:
    return [
        *bandit.findings(results.bandit),
        *tabular.findings(results.tabular),
        *regret.findings(results.regret),
        *success.findings(results.success),
    ]


def print_table(rows: list[Finding], seed: int, seconds: float) -> None:
    """Prints one line per finding, a rule after each subject, and the number of claims that hold and fail."""
    from rich.table import Table

    screen = console(piped_width=150)
    table = Table("subject", "quantity", "measured", "against", "holds?", show_edge=False, pad_edge=False)
    table.columns[2].justify = "right"
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        coloured_verdict = {"holds": "[green]holds[/]", "FAILS": "[bold red]FAILS[/]", "": ""}[row.verdict]
        last = following is None or following.subject != row.subject
        table.add_row(row.subject, row.quantity, row.measured, row.compared_with, coloured_verdict, end_section=last)
    screen.print(f"{versions()}; seed {seed}; {seconds:.1f} s", highlight=False)
    screen.print(table, highlight=False)
    verdicts = [row.verdict for row in rows]
    screen.print(
        f"{verdicts.count('holds')} statements hold, {verdicts.count('FAILS')} fail; docs/theory.md explains each.",
        highlight=False,
    )


def write_json(path: Path, results: Results, rows: list[Finding], seed: int) -> None:
    """Writes seed, versions, findings and every result; equal numbers make equal files."""
    content = {"seed": seed, "versions": versions(), "findings": [row._asdict() for row in rows], **asdict(results)}
    # Another machine reproduces nine digits. Lists of numbers stay on one line.
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.9g}"))
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), json.dumps(rounded, indent=1))
    path.write_text(text + "\n", encoding="utf-8")


def timed_measure(seed: int) -> tuple[Results, float]:
    """The results, and the seconds that measuring them took."""
    begin = time.perf_counter()
    results = measure(seed)
    return results, time.perf_counter() - begin
