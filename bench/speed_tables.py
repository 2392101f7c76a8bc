"""What a run reads like: header, aligned tables, Markdown. Everything is made from the JSON alone."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import DATA, NUM_PRODUCTS, REGIMES

PACKAGES = (
    "distil-kernels", "torch", "triton", "liger-kernel", "trl", "transformers", "torchtune", "flash-linear-attention",
    "cut-cross-entropy", "orda-kernel",
)  # fmt: skip
LEAVES = ("student_hidden", "student_weight")
"""Whose gradients' errors are shown: dh and dW."""
COLUMNS = (
    "", "ms", "+-", "x limit", "x ours", "peak MiB", "err dh", "err dW", "converged dh", "converged dW",
)  # fmt: skip
MIB = 2**20


def header(device: str, threads: int) -> dict[str, object]:
    """The machine and the software that the numbers are true for."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, object] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": threads,
        "versions": versions,
    }
    if device == "cpu":
        found["instruction_set"] = torch.backends.cpu.get_cpu_capability()
        found["allocator"] = _allocator()
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")] \
        if path.exists() else []  # fmt: skip
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _allocator() -> str:
    """What decides whether fresh memory is cheap: it helps naive code most."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    pages = path.read_text().split("[")[-1].split("]")[0] if path.exists() else "unknown"
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items())
                if name == "LD_PRELOAD" or name.startswith(("MALLOC_", "GLIBC_TUNABLES", "THP_MEM"))]  # fmt: skip
    return f"transparent huge pages {pages}; {' '.join(settings) or 'THP_MEM_ALLOC_ENABLE unset, system malloc'}"


def header_lines(head: dict) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [f"{head['device']}, {head['threads']} threads, {head['date']}, commit {head['commit']}", versions]
    if "allocator" in head:
        lines.append(f"{head['instruction_set']}; {head['allocator']}")
    return lines


def title(table: dict) -> str:
    case = table["case"]
    return (
        f"{case['op']}: N={case['num_rows']} V={case['vocab_size']} D={case['hidden_size']} {case['dtype']}, "
        f"{case['device']}, {case['threads']} threads"
    )


def notes(table: dict) -> list[str]:
    kl = " and ".join(f"{table['kl'][regime]:.2g}" for regime in REGIMES)
    reasons: dict[str, list[str]] = {}
    for row in table["rows"]:
        if row["reason"]:
            reasons.setdefault(row["reason"], []).append(row["name"])
    return [
        f"forward and backward, {NUM_PRODUCTS[table['case']['op']]} products; {DATA[table['case']['data']]}; "
        f"KL(T||S) {kl} nats (ordinary, converged); errors on {table['checked_rows']} rows",
        *against_peers(table),
        *(f"not timed: {', '.join(names)}: {reason}" for reason, names in reasons.items()),
    ]


def ours(rows: list[dict]) -> dict | None:
    """The exact candidate of ours that stands for all: what a user gets who asks for no plan, else the fastest."""
    timed = sorted((row for row in rows if row["group"] == "ours" and "ms" in row), key=lambda row: row["ms"])
    return next((row for row in timed if row.get("default")), timed[0] if timed else None)


def against_peers(table: dict) -> list[str]:
    """One line: how many times the time and the memory of ours each peer takes."""
    timed = [row for row in table["rows"] if "ms" in row]
    best = ours(timed)
    peers = sorted((row for row in timed if row["group"] == "peer"), key=lambda row: row["ms"])
    if best is None or not peers:
        return []

    def beside(row: dict) -> str:
        text = f"{row['name']} {row['ms'] / best['ms']:.2f}x the time"
        if row.get("peak_extra_bytes") and best.get("peak_extra_bytes"):
            text += f" and {row['peak_extra_bytes'] / best['peak_extra_bytes']:.1f}x the memory"
        return text

    return [f"against {best['name']}: " + "; ".join(beside(row) for row in peers)]


def cells(table: dict) -> list[list[str]]:
    """One line per measured row, as text: the limit, ours, then peers by time."""

    def error(row: dict, regime: str, name: str) -> str:
        found = row.get("errors", {}).get(regime, {})
        return f"{found[name]:.1e}" if name in found else "-"

    def ratio(row: dict, key: str) -> str:
        return f"{row[key]:.2f}" if row.get(key) else "-"

    order = {"limit": 0, "ours": 1, "approximate": 2, "peer": 3, "label": 4}
    timed = sorted(
        (row for row in table["rows"] if not row["reason"]), key=lambda row: (order[row["group"]], row["ms"])
    )
    return [
        [
            row["name"], f"{row['ms']:.1f}", f"{row['spread_ms']:.1f}", ratio(row, "limit_ratio"),
            ratio(row, "ours_ratio"),
            f"{row['peak_extra_bytes'] / MIB:.0f}" if row.get("peak_extra_bytes") is not None else "-",
            *(error(row, regime, leaf) for regime in REGIMES for leaf in LEAVES),
        ]
        for row in timed
    ]  # fmt: skip


SUMMARY_COLUMNS = (
    "case", "ours, ms", "of torch's products", "of the fastest products", "fastest peer, ms", "", "ours, MiB",
    "leanest peer, MiB", "", "our error", "fastest peer's error",
)  # fmt: skip


def summary(runs: list[dict]) -> str:
    """Markdown, a line for each table with peers: ours beside the fastest and the leanest of them; errors are of the
    converged pair, the larger of dh and dW."""
    found = [line for run in runs for table in run["tables"] if (line := _summary_line(table))]
    return "\n".join(markdown_lines("In short", SUMMARY_COLUMNS, found, [])).rstrip()


def worst_error(row: dict) -> float:
    """Of the gradients that the op has, where teacher and student have nearly converged."""
    return max(error for leaf, error in row["errors"]["converged"].items() if leaf in LEAVES)


def _summary_line(table: dict) -> list[str] | None:
    case, timed = table["case"], [row for row in table["rows"] if "ms" in row]
    peers = [row for row in timed if row["group"] == "peer"]
    lean = [row for row in peers if row.get("peak_extra_bytes")]
    best = ours(timed)
    if not lean or best is None:
        return None
    peer = min(peers, key=lambda row: row["ms"])
    leanest = min(lean, key=lambda row: row["peak_extra_bytes"])
    own = [row for row in timed if row["group"] == "limit" and row["name"].endswith(f", {case['dtype']}")]
    return [
        f"{case['op']} {case['num_rows']}x{case['vocab_size']}x{case['hidden_size']} {case['dtype']}, "
        f"{case['threads']} threads",
        f"{best['ms']:.0f}", f"{best['ms'] / own[0]['ms']:.2f}" if own else "-", f"{best['limit_ratio']:.2f}",
        f"{peer['ms']:.0f}", peer["name"], f"{best['peak_extra_bytes'] / MIB:.0f}",
        f"{leanest['peak_extra_bytes'] / MIB:.0f}", leanest["name"],
        f"{worst_error(best):.1e}", f"{worst_error(peer):.1e}",
    ]  # fmt: skip


def print_table(table: dict) -> None:
    print_lines(title(table), COLUMNS, cells(table), notes(table))


def print_lines(title: str, columns: Sequence[str], lines: list[list[str]], notes: list[str]) -> None:
    """An aligned table, by rich where it is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(title, columns, lines, notes)
        return
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        shown.add_row(*line, style="bold" if line[0].startswith("ours") else None)
    Console(width=150, highlight=False).print(shown, *notes, sep="\n")


def _print_plain(title: str, columns: Sequence[str], lines: list[list[str]], notes: list[str]) -> None:
    lines = [list(columns), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print("\n" + title)
    for line in lines:
        print("  ".join(text.rjust(width) if i else text.ljust(width)
                        for i, (text, width) in enumerate(zip(line, widths, strict=True))))  # fmt: skip
    print(*notes, sep="\n")


def markdown(run: dict) -> str:
    """A section for docs/performance.md: the command, the machine, the tables."""
    lines = ["```", run["header"]["command"], *header_lines(run["header"]), "```"]
    for table in run["tables"]:
        lines += ["", *markdown_lines(title(table), COLUMNS, cells(table), notes(table))]
    return "\n".join(lines)


def markdown_lines(title: str, columns: Sequence[str], lines: list[list[str]], notes: list[str]) -> list[str]:
    return [
        f"### {title}", "", "| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1),
        *("| " + " | ".join(line) + " |" for line in lines), "", *(f"- {note}" for note in notes),
    ]  # fmt: skip
