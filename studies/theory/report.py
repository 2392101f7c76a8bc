"""Runs every subject; the aligned table and theory.json."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import distil_kernels
from studies.theory import bandit, regret, success, tabular
from studies.theory.finding import Finding


@dataclass(frozen=True)
class Results:
    bandit: bandit.BanditResult
    tabular: tabular.TabularResult
    regret: regret.RegretResult
    success: success.SuccessResult


def measure(seed: int) -> Results:
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
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: rich would fold the columns at 80.
    console = Console() if Console().is_terminal else Console(width=150)
    table = Table("subject", "quantity", "measured", "against", "holds?", show_edge=False, pad_edge=False)
    table.columns[2].justify = "right"
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        verdict = {"holds": "[green]holds[/]", "FAILS": "[bold red]FAILS[/]", "": ""}[row.verdict]
        last = following is None or following.subject != row.subject
        table.add_row(row.subject, row.quantity, row.measured, row.compared_with, verdict, end_section=last)
    console.print(f"{_versions()}; seed {seed}; {seconds:.1f} s", highlight=False)
    console.print(table, highlight=False)
    verdicts = [row.verdict for row in rows]
    console.print(
        f"{verdicts.count('holds')} statements hold, {verdicts.count('FAILS')} fail; docs/theory.md explains each.",
        highlight=False,
    )


def write_json(path: Path, results: Results, rows: list[Finding], seed: int) -> None:
    content = {"seed": seed, "versions": _versions(), "findings": [row._asdict() for row in rows], **asdict(results)}
    # Nine digits: what another machine reproduces. Lists of numbers stay on one line.
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.9g}"))
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), json.dumps(rounded, indent=1))
    path.write_text(text + "\n", encoding="utf-8")


def timed_measure(seed: int) -> tuple[Results, float]:
    begin = time.perf_counter()
    results = measure(seed)
    return results, time.perf_counter() - begin


def _versions() -> str:
    return f"distil_kernels {distil_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
