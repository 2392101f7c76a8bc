"""Tables of measured runs, on the screen and as Markdown, made from the JSON of the runs alone."""

from __future__ import annotations

from collections.abc import Sequence

from cases import DATA, NUM_PRODUCTS, REGIMES
from machine import header_lines

LEAVES = ("student_hidden", "student_weight")
"""The tensors whose gradients' errors are shown: dh and dW."""
COLUMNS = (
    "", "ms", "+-", "x limit", "x ours", "peak MiB", "err dh", "err dW", "converged dh", "converged dW",
)  # fmt: skip
MIB = 2**20


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
        *peer_ratios(table),
        *(f"not timed: {', '.join(names)}: {reason}" for reason, names in reasons.items()),
    ]


def our_row(rows: list[dict]) -> dict | None:
    """The exact candidate that represents ours: the plan that the library chooses, else the fastest one."""
    timed = sorted((row for row in rows if row["group"] == "ours" and "ms" in row), key=lambda row: row["ms"])
    return next((row for row in timed if row.get("default")), timed[0] if timed else None)


def peer_ratios(table: dict) -> list[str]:
    """One line with the ratio of each peer's time and memory to ours; no line without ours or without peers."""
    timed = [row for row in table["rows"] if "ms" in row]
    ours = our_row(timed)
    peers = sorted((row for row in timed if row["group"] == "peer"), key=lambda row: row["ms"])
    if ours is None or not peers:
        return []

    def ratios(row: dict) -> str:
        text = f"{row['name']} {row['ms'] / ours['ms']:.2f}x the time"
        if row.get("peak_extra_bytes") and ours.get("peak_extra_bytes"):
            text += f" and {row['peak_extra_bytes'] / ours['peak_extra_bytes']:.1f}x the memory"
        return text

    return [f"against {ours['name']}: " + "; ".join(ratios(row) for row in peers)]


def cells(table: dict) -> list[list[str]]:
    """The cells of every timed row as text: limits, ours, then peers, each by time."""

    def error(row: dict, regime: str, name: str) -> str:
        errors = row.get("errors", {}).get(regime, {})
        return f"{errors[name]:.1e}" if name in errors else "-"

    def ratio(row: dict, key: str) -> str:
        return f"{row[key]:.2f}" if row.get(key) else "-"

    order = {"limit": 0, "ours": 1, "approximate": 2, "peer": 3, "label": 4, "cost": 5}
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
    """A Markdown table with one line per case: ours, the fastest peer and the leanest peer.

    Errors are those in the converged regime, the larger of dh and dW.
    """
    lines = [line for run in runs for table in run["tables"] if (line := _summary_line(table))]
    return "\n".join(markdown_lines("In short", SUMMARY_COLUMNS, lines, [])).rstrip()


def worst_error(row: dict) -> float:
    """The largest error of the op's gradients in the converged regime."""
    return max(error for leaf, error in row["errors"]["converged"].items() if leaf in LEAVES)


def _summary_line(table: dict) -> list[str] | None:
    case, timed = table["case"], [row for row in table["rows"] if "ms" in row]
    peers = [row for row in timed if row["group"] == "peer"]
    weighed_peers = [row for row in peers if row.get("peak_extra_bytes")]
    ours = our_row(timed)
    if not weighed_peers or ours is None:
        return None
    peer = min(peers, key=lambda row: row["ms"])
    leanest = min(weighed_peers, key=lambda row: row["peak_extra_bytes"])
    torch_limits = [row for row in timed if row["group"] == "limit" and row["name"].endswith(f", {case['dtype']}")]
    return [
        f"{case['op']} {case['num_rows']}x{case['vocab_size']}x{case['hidden_size']} {case['dtype']}, "
        f"{case['threads']} threads",
        f"{ours['ms']:.0f}", f"{ours['ms'] / torch_limits[0]['ms']:.2f}" if torch_limits else "-",
        f"{ours['limit_ratio']:.2f}",
        f"{peer['ms']:.0f}", peer["name"], f"{ours['peak_extra_bytes'] / MIB:.0f}",
        f"{leanest['peak_extra_bytes'] / MIB:.0f}", leanest["name"],
        f"{worst_error(ours):.1e}", f"{worst_error(peer):.1e}",
    ]  # fmt: skip


def print_table(table: dict) -> None:
    print_lines(title(table), COLUMNS, cells(table), notes(table))


def print_lines(title: str, columns: Sequence[str], lines: list[list[str]], notes: list[str]) -> None:
    """Prints an aligned table, by rich if it is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(title, columns, lines, notes)
        return
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        grid.add_row(*line, style="bold" if line[0].startswith("ours") else None)
    Console(width=150, highlight=False).print(grid, *notes, sep="\n")


def _print_plain(title: str, columns: Sequence[str], lines: list[list[str]], notes: list[str]) -> None:
    lines = [list(columns), *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print("\n" + title)
    for line in lines:
        print("  ".join(text.rjust(width) if i else text.ljust(width)
                        for i, (text, width) in enumerate(zip(line, widths, strict=True))))  # fmt: skip
    print(*notes, sep="\n")


def markdown(run: dict) -> str:
    """A run as a section of docs/performance.md: the command, the machine, the tables."""
    lines = ["```", run["header"]["command"], *header_lines(run["header"]), "```"]
    for table in run["tables"]:
        lines += ["", *markdown_lines(title(table), COLUMNS, cells(table), notes(table))]
    return "\n".join(lines)


def markdown_lines(title: str, columns: Sequence[str], lines: list[list[str]], notes: list[str]) -> list[str]:
    return [
        f"### {title}", "", "| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1),
        *("| " + " | ".join(line) + " |" for line in lines), "", *(f"- {note}" for note in notes),
    ]  # fmt: skip
