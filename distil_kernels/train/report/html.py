"""report.html: one run as one file that needs no network and no script; what is in it is text, all of it escaped.

Tokens are spans whose shares of the colour scales (cross-entropy, KL, credit) are CSS variables; radio buttons choose
which of them paints, and what the teacher would have said is a box that shows on hover or focus.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from distil_kernels.train.command_line import resolved
from distil_kernels.train.config import Config
from distil_kernels.train.report.chart import Series, line_chart, with_error

COLORS = {"ce": "cross-entropy", "kl": "KL", "credit": "credit"}
Record = dict[str, Any]


def page(config: Config, name: str, metrics: Sequence[Record], rollouts: Sequence[Record]) -> str:
    """The document, from the records of metrics.jsonl and rollouts.jsonl.

    Raises:
        ValueError: there is nothing to report yet.
    """
    steps = [record for record in metrics if record["kind"] == "step"]
    evaluations = [record for record in metrics if record["kind"] == "evaluation"]
    if not evaluations and not steps:
        raise ValueError(f"[report] {name} has no records yet: expected at least one evaluation or step")
    samples = [record for record in rollouts if record["kind"] == "sample"]
    taken = f"{len(steps)} steps, {sum(record['seconds'] for record in metrics) / 60:.1f} minutes"
    summary = f"{config.model}, {config.objective}, {config.teacher} teacher, credit {config.credit_span}; {taken}"
    template = Template(Path(__file__).with_suffix(".html").read_text())
    return template.substitute(
        title=html.escape(name),
        heading=html.escape(f"{config.task}: {name}"),
        summary=html.escape(summary),
        table_note=_table_note(evaluations),
        table=_table(evaluations),
        charts=_charts(steps, evaluations),
        rollouts=_rollouts(samples),
        config=html.escape(resolved(config)),
    )


def strengths(samples: Sequence[Record]) -> dict[str, float]:
    """For each colouring the value that is painted fully: exceeded by one token in twenty."""
    top = {}
    for name in COLORS:
        values = sorted(abs(value) for sample in samples for value in sample[name] if math.isfinite(value))
        top[name] = max(values[int(0.95 * (len(values) - 1))], 1e-9) if values else 1.0
    return top


def _table_note(evaluations: Sequence[Record]) -> str:
    if not evaluations:
        return "No evaluation yet."
    return (
        f"Mean score on {evaluations[-1]['problems']} held-out problems ± standard error over problems. "
        "The teacher has read the feedback; pass@k is the unbiased chance that one of k sampled answers is right."
    )


def _table(evaluations: Sequence[Record]) -> str:
    if not evaluations:
        return ""
    ks = list(evaluations[-1]["pass_at"])[1:]
    columns = ["", "step", "sampled", "greedy", *(f"pass@{k}" for k in ks), "teacher", "tokens"]
    best = max(evaluations, key=lambda record: record["sampled"])
    lines = []
    for label, record in (("before", evaluations[0]), ("best", best), ("last", evaluations[-1])):
        means = [(record[name], record[f"{name}_se"]) for name in ("sampled", "greedy")]
        means += [*(record["pass_at"][k] for k in ks), (record["teacher"], record["teacher_se"])]
        cells = [label, str(record["step"]), *(with_error(*each) for each in means), f"{record['length']:.1f}"]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _charts(steps: Sequence[Record], evaluations: Sequence[Record]) -> str:
    def course(key: str, label: str, marked: bool = False) -> Series:
        return Series(label, [(record["step"], record.get(key, math.nan), math.nan) for record in steps], marked)

    def held_out(key: str, label: str) -> Series:
        return Series(label, [(r["step"], r[key], r[key + "_se"]) for r in evaluations], marked=True)

    changed = course("held_out_change", "log-prob of an answer", marked=True)
    accuracy = [held_out("sampled", "sampled"), held_out("greedy", "greedy"), held_out("teacher", "teacher")]
    return "".join(
        (
            line_chart("Accuracy (held out, and in training)", [*accuracy, course("accuracy", "training")], high=1.0),
            line_chart("Teacher against student, nats a token", [course("ce", "cross-entropy"), course("kl", "KL")]),
            line_chart("Entropy, nats a token", [course("entropy", "student"), course("teacher_entropy", "teacher")]),
            line_chart("Answer length, tokens", [course("length", "training rollouts")]),
            line_chart("Share of rollouts cut at the limit", [course("truncated", "training rollouts")], high=1.0),
            line_chart("Gradient norm before clipping", [course("grad_norm", "norm")]),
            line_chart("Learning rate", [course("learning_rate", "AdamW")]),
            line_chart("What a step changed: held-out right answers, nats", [changed], low=None),
        )
    )


def _rollouts(samples: Sequence[Record]) -> str:
    if not samples:
        return ""
    top = strengths(samples)
    buttons, scales = [], []
    for name, label in COLORS.items():
        checked = " checked" if name == "ce" else ""
        buttons.append(f'<input type="radio" name="by" id="by-{name}"{checked}><label for="by-{name}">{label}</label>')
        low, kind = (f"-{top[name]:.2g}", " both") if name == "credit" else ("0", "")
        scales.append(f'<span class="scale of-{name}{kind}">{low}<i></i>{top[name]:.2g}</span>')
    cards = []
    ordered = sorted(samples, key=lambda record: (record["problem"], record["step"]))
    for _, own in groupby(ordered, key=lambda record: record["problem"]):
        cards.append(_problem(list(own), top))
    return (
        "<h2>Rollouts</h2><p class='note'>Held-out problems, answered at each evaluation as in training. Hover over a "
        "token for what the teacher, who has read the feedback, would have said. Credit above 0 (red) makes a token "
        "less likely: more disagreement than usual came after it.</p>"
        f"<div class='switch' role='radiogroup' aria-label='colour of tokens'>{''.join(buttons + scales)}</div>"
        + "".join(cards)
    )


def _problem(records: Sequence[Record], top: dict[str, float]) -> str:
    first = records[0]
    same = len({record["feedback"] for record in records}) == 1
    feedback = first["feedback"] if same else "beside each rollout"
    parts = [
        "<section class='card'><div class='beside'>",
        f"<div><span class='label'>question</span><pre>{html.escape(first['question'])}</pre></div>",
        f"<div><span class='label'>feedback</span><pre>{html.escape(feedback)}</pre></div></div>",
    ]
    for step, own in groupby(records, key=lambda record: record["step"]):
        parts.append(f"<div class='step'><h3>step {step}</h3>")
        for record in own:
            verdict = "right" if record["score"] >= 1.0 else "wrong"
            parts.append(f"<div class='rollout'><span class='{verdict}'>{record['score']:.2g}</span>")
            tokens = "".join(_token(record, index, top) for index in range(len(record["texts"])))
            parts.append(f"<div class='tokens'>{tokens}</div>")
            parts.append("</div>" if same else f"<pre>{html.escape(record['feedback'])}</pre></div>")
        parts.append("</div>")
    parts.append("<details><summary>prompts as the models read them</summary><div class='beside'>")
    for label, key in (("student", "prompt"), ("teacher, of the first rollout", "teacher_prompt")):
        parts.append(f"<div><span class='label'>{label}</span><pre>{html.escape(first[key])}</pre></div>")
    parts.append("</div></details></section>")
    return "".join(parts)


def _token(record: Record, index: int, top: dict[str, float]) -> str:
    if index in record.get("put_in", ()):
        text = html.escape(visible(record["texts"][index], inner=True))
        return f"<span class='t given' tabindex='0'>{text}<span class='tip'>put in by a tool, not learnt</span></span>"
    shares = ";".join(f"--{name}:{min(1.0, abs(record[name][index]) / top[name]):.3f}" for name in COLORS)
    text = record["texts"][index]
    numbers = " · ".join(f"{label} {record[name][index]:.3f}" for name, label in COLORS.items())
    lines = ["<table><tr><th>token</th><th>teacher</th><th>student</th></tr>"]
    for other, taught, own in record["top"][index]:
        chosen = " class='chosen'" if other == text else ""
        lines.append(f"<tr{chosen}><td><code>{html.escape(visible(other))}</code></td>")
        lines.append(f"<td>{_percent(taught)}</td><td>{_percent(own)}</td></tr>")
    tip = f"<span class='tip'><b>{html.escape(visible(text))}</b><br>{numbers}{''.join(lines)}</table></span>"
    less = " less" if record["credit"][index] < 0 else ""
    return f"<span class='t{less}' tabindex='0' style='{shares}'>{html.escape(visible(text, inner=True))}{tip}</span>"


def visible(text: str, inner: bool = False) -> str:
    """Text of a token with line ends shown, and blanks too unless it stands among others (`inner`)."""
    shown = harmless(text).replace("\n", "⏎")
    return shown if inner else shown.replace(" ", "␣")


def harmless(text: str) -> str:
    """Text without characters that steer a terminal or turn the direction of writing: they are shown as numbers."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
