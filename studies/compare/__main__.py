"""python -m studies.compare [small | language]: every objective under equal conditions.

    small      four tasks, models of 0.1 M parameters from scratch: seconds a run
    language   SmolLM2-135M, or any other, with the trainer itself: a minute a run, tuning first

OUTPUT/runs.jsonl stores every finished run: a stopped study resumes, a finished one only prints its tables.
The tables and figures of the docs:

    python -m studies.compare --output bench/results/compare --docs docs/results.md
    python -m studies.compare language --output bench/results/language --docs docs/results.md --jobs 1
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from studies.compare import accuracy_tables, language, small
from studies.presentation import require_packages

STUDIES: dict[str, Any] = {"small": small, "language": language}
COMMANDS = {"small": "python -m studies.compare", "language": "python -m studies.compare language"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.compare", description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", choices=tuple(STUDIES), default="small", help="which study [small]")
    parser.add_argument("--output", type=Path, help="folder of runs and models [runs/compare or runs/language]")
    parser.add_argument("--docs", type=Path, help="Markdown file whose marked block and figures/ are written")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each [2]")
    parser.add_argument("--tasks", nargs="+", help="only these (default all)")
    parser.add_argument("--seeds", type=int, help="reported seeds (default those of the study)")
    parser.add_argument("--model", help="study language: path or hub name of the model [smollm2]")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    require_packages(parser, *(["transformers", "accelerate", "peft"] if options.study == "language" else []))
    for name, minimum in (("jobs", 1), ("seeds", 1 if options.study == "language" else 2)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            parser.error(f"[{name}] got {value}, expected at least {minimum}")
    study = STUDIES[options.study]
    scale = study.QUICK if options.quick else study.Scale()
    task_names = [budget.task for budget in scale.tasks]
    unknown = [task for task in options.tasks or [] if task not in task_names]
    if unknown:
        parser.error(f"[tasks] got {unknown[0]}, expected some of {', '.join(task_names)}")
    if options.model and options.study != "language":
        parser.error(f"[model] belongs to study language: got {options.model} with {options.study}")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from studies.compare import learning_curves

    if options.seeds:
        scale = replace(scale, seeds=options.seeds)
    if options.tasks:
        scale = replace(scale, tasks=tuple(budget for budget in scale.tasks if budget.task in options.tasks))
    if options.model:
        scale = replace(scale, model=options.model)
    output = options.output or Path("runs") / ("compare" if options.study == "small" else options.study)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, speed_estimate_period=600) as bars:
        phases: dict[str, TaskID] = {}

        def progress(phase: str, completed: int, total: int) -> None:
            if phase not in phases:
                phases[phase] = bars.add_task(phase, total=total, completed=completed, rate="")
            bar = bars.tasks[phases[phase]]
            bars.update(bar.id, completed=completed, rate=f"{60 * bar.speed:.0f} a minute" if bar.speed else "")

        results = study.conduct(scale, output, options.jobs, progress)

    tables = accuracy_tables.tables(scale, results)
    headline = accuracy_tables.headline(scale, results)
    accuracy_tables.print_tables(tables, headline)
    folder = options.docs.parent / "figures" if options.docs else output
    paths = learning_curves.draw(scale, results, folder)
    if options.docs:
        text = "\n\n".join([headline + ".", *(table.markdown() for table in tables)])
        accuracy_tables.write_block(options.docs, COMMANDS[options.study], text)
        paths.append(options.docs)
    for path in [output / "runs.jsonl", *paths]:
        print(path)


if __name__ == "__main__":
    main()
