"""One rollout in the terminal: prompt, feedback, the completion in colours, and what the teacher would have said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distil_kernels.train.report.html import COLORS, harmless, strengths, visible

Record = dict[str, Any]
PUT_IN = "dim italic"


def choose(records: Sequence[Record], step: int | None, problem: int, rollout: int) -> Record:
    """The sample of rollouts.jsonl that is asked for; step None is the last evaluation.

    Raises:
        ValueError: there is no such sample; the message says which there are.
    """
    samples = [record for record in records if record["kind"] == "sample"]
    if not samples:
        raise ValueError("[inspect] this run has no samples yet: they are written at evaluations (--eval_rollouts)")
    steps = sorted({record["step"] for record in samples})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"[step] expected one of {', '.join(map(str, steps))}, got {step}")
    problems = sorted({record["problem"] for record in samples})
    if problem not in problems:
        raise ValueError(f"[problem] expected 0 to {problems[-1]}, got {problem}")
    own = [record for record in samples if record["step"] == step and record["problem"] == problem]
    if not 0 <= rollout < len(own):
        raise ValueError(f"[rollout] expected 0 to {len(own) - 1}, got {rollout}")
    return own[rollout]


def show(record: Record, color: str, console: Console) -> None:
    """Prints a sample with its tokens coloured by "ce", "kl" or "credit"."""
    verdict = "right" if record["score"] >= 1.0 else "wrong"
    top = strengths([record])[color]
    completion = Text()
    for index, (text, value) in enumerate(zip(record["texts"], record[color], strict=True)):
        style = PUT_IN if index in record.get("put_in", ()) else _style(value, top)
        completion.append(visible(text, inner=True), style=style)
    legend = f"{COLORS[color]}, full colour at {top:.3g} nats"
    title = f"step {record['step']}, problem {record['problem']}, score {record['score']:.2g} ({verdict})"
    parts: list[RenderableType] = [
        Panel(Text(harmless(record["prompt"])), title="prompt", title_align="left"),
        Panel(Text(harmless(record["feedback"])), title="feedback, which only the teacher reads", title_align="left"),
        Panel(completion, title=title, title_align="left", subtitle=legend, subtitle_align="left"),
        _alternatives(record, color, top),
    ]
    console.print(Group(*parts))


def _alternatives(record: Record, color: str, top: float) -> Table:
    table = Table(title="what the teacher would have said (teacher's → student's probability)", title_justify="left")
    table.add_column("token")
    for label in COLORS.values():
        table.add_column(label, justify="right")
    table.add_column("teacher's likeliest")
    for index, text in enumerate(record["texts"]):
        if index in record.get("put_in", ()):
            table.add_row(Text(visible(text), style=PUT_IN), *("" for _ in COLORS), "put in by a tool, not learnt")
            continue
        numbers = [Text(f"{record[name][index]:.3f}") for name in COLORS]
        others = Text("   ").join(
            Text(f"{visible(other)} {taught:.2f}→{own:.2f}", style="bold" if other == text else "")
            for other, taught, own in record["top"][index]
        )
        table.add_row(Text(visible(text), style=_style(record[color][index], top)), *numbers, others)
    return table


def _style(value: float, top: float) -> str:
    """Black on a background from white to red, or to blue below 0."""
    fade = round(255 * (1.0 - 0.75 * min(1.0, abs(value) / top)))
    return f"black on rgb({fade},{fade},255)" if value < 0 else f"black on rgb(255,{fade},{fade})"
