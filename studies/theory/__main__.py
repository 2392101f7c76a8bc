"""python -m studies.theory [--output FOLDER] [--seed N]: table on the screen, theory.json and figures in FOLDER.

The figures of the docs:  python -m studies.theory --output docs/figures
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from studies.theory import report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.theory", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/theory"), help="folder for theory.json and figures")
    parser.add_argument("--seed", type=int, default=0, help="of the random pairs, worlds and starts")
    options = parser.parse_args(arguments)
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"needs {' and '.join(missing)}: pip install 'distil-kernels[train]'\n")

    from studies.theory import figures

    results, seconds = report.timed_measure(options.seed)
    rows = report.findings(results)
    report.print_table(rows, options.seed, seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    report.write_json(options.output / "theory.json", results, rows, options.seed)
    for path in [options.output / "theory.json", *figures.draw(results, options.output)]:
        print(path)


if __name__ == "__main__":
    main()
