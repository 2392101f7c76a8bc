"""python -m distil_kernels.compare: every objective on four small tasks under equal conditions, from scratch.

Runs are kept in OUTPUT/runs.jsonl: a study that was stopped goes on, a finished one only shows its tables.
The tables and figures of the docs:

    python -m distil_kernels.compare --output bench/results/compare --docs docs/results.md
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path

from distil_kernels.compare import report, study


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m distil_kernels.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder of runs and models")
    parser.add_argument("--docs", type=Path, help="Markdown file whose marked block and figures/ are written")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    names = [budget.task for budget in study.Scale().tasks]
    parser.add_argument("--tasks", nargs="+", choices=names, help="only these (default all)")
    parser.add_argument("--seeds", type=int, help=f"reported seeds (default {study.Scale().seeds})")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"needs {' and '.join(missing)}: pip install 'distil-kernels[train]'\n")
    for name, least in (("jobs", 1), ("seeds", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"[{name}] got {value}, expected at least {least}")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from distil_kernels.compare import figures

    scale = study.QUICK if options.quick else study.Scale()
    if options.seeds:
        scale = replace(scale, seeds=options.seeds)
    if options.tasks:
        scale = replace(scale, tasks=tuple(budget for budget in scale.tasks if budget.task in options.tasks))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, speed_estimate_period=600) as bars:
        phases: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in phases:
                phases[phase] = bars.add_task(phase, total=total, completed=done, rate="")
            bar = bars.tasks[phases[phase]]
            bars.update(bar.id, completed=done, rate=f"{60 * bar.speed:.0f} a minute" if bar.speed else "")

        results = study.conduct(scale, options.output, options.jobs, progress)

    found = report.tables(scale, results)
    first_line = report.headline(scale, results)
    report.show(found, first_line)
    folder = options.docs.parent / "figures" if options.docs else options.output
    paths = figures.draw(scale, results, folder)
    if options.docs:
        report.write_block(options.docs, "\n\n".join([first_line + ".", *(table.markdown() for table in found)]))
        paths.append(options.docs)
    for path in [options.output / "runs.jsonl", *paths]:
        print(path)


if __name__ == "__main__":
    main()
