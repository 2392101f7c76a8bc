"""One rollout in the terminal: prompt, feedback, the completion in colours, and what the teacher would have said."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distil_kernels.train.report.formatting import COLORS, Record, full_colors, harmless, verdict, visible

INSERTED = "dim italic"


def choose(records: Sequence[Record], step: int | None, problem: int, rollout: int) -> Record:
    """Returns the held-out rollout of rollouts.jsonl that is asked for.

    Args:
        step: of the evaluation; None takes the last one.
        problem, rollout: numbers from 0.

    Raises:
        ValueError: there is no such rollout; the message says which there are.
    """
    held_out = [record for record in records if record["kind"] == "held_out"]
    if not held_out:
        raise ValueError("[inspect] this run has no rollouts yet: they are written at evaluations (--eval_rollouts)")
    steps = sorted({record["step"] for record in held_out})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"[step] expected one of {', '.join(map(str, steps))}, got {step}")
    problems = sorted({record["problem"] for record in held_out})
    if problem not in problems:
        raise ValueError(f"[problem] expected 0 to {problems[-1]}, got {problem}")
    rollouts = [record for record in held_out if record["step"] == step and record["problem"] == problem]
    if not 0 <= rollout < len(rollouts):
        raise ValueError(f"[rollout] expected 0 to {len(rollouts) - 1}, got {rollout}")
    return rollouts[rollout]


def rendered(record: Record, color: str) -> RenderableType:
    """Returns one rollout for the terminal; `color` is the column of COLORS that paints its tokens."""
    full = full_colors([record])[color]
    completion = Text()
    for index, (text, value) in enumerate(zip(record["texts"], record[color], strict=True)):
        style = INSERTED if index in record.get("tool_positions", ()) else _style(value, full)
        completion.append(visible(text, keep_spaces=True), style=style)
    legend = f"{COLORS[color]}, full colour at {full:.3g} nats"
    score = f"score {record['score']:.2g} ({verdict(record['score'])})"
    title = f"step {record['step']}, problem {record['problem']}, {score}"
    parts: list[RenderableType] = [
        Panel(Text(harmless(record["prompt"])), title="prompt", title_align="left"),
        Panel(Text(harmless(record["feedback"])), title="feedback, which only the teacher reads", title_align="left"),
        Panel(completion, title=title, title_align="left", subtitle=legend, subtitle_align="left"),
        _alternatives(record, color, full),
    ]
    return Group(*parts)


def _alternatives(record: Record, color: str, full: float) -> Table:
    """Returns what each token costs and what the teacher would have said instead."""
    table = Table(title="what the teacher would have said (teacher's → student's probability)", title_justify="left")
    table.add_column("token")
    for label in COLORS.values():
        table.add_column(label, justify="right")
    table.add_column("teacher's likeliest")
    for index, text in enumerate(record["texts"]):
        if index in record.get("tool_positions", ()):
            table.add_row(Text(visible(text), style=INSERTED), *("" for _ in COLORS), "observed, not learnt")
            continue
        numbers = [Text(f"{record[name][index]:.3f}") for name in COLORS]
        others = Text("   ").join(
            Text(f"{visible(other)} {teacher_prob:.2f}→{student_prob:.2f}", style="bold" if other == text else "")
            for other, teacher_prob, student_prob in record["top"][index]
        )
        table.add_row(Text(visible(text), style=_style(record[color][index], full)), *numbers, others)
    return table


def _style(value: float, full: float) -> str:
    """Returns the style of a token: black on a background from white to red, or to blue below 0."""
    fade = round(255 * (1.0 - 0.75 * min(1.0, abs(value) / full)))
    return f"black on rgb({fade},{fade},255)" if value < 0 else f"black on rgb(255,{fade},{fade})"
