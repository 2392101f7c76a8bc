"""python -m studies.theory [--output FOLDER] [--seed N]: table on the screen, theory.json and figures in FOLDER.

The figures of the docs:  python -m studies.theory --output docs/figures
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.presentation import require_packages
from studies.theory.results import findings, print_table, timed_measure, write_json


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.theory", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/theory"), help="folder for theory.json and figures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random pairs, environments and starts")
    options = parser.parse_args(arguments)
    require_packages(parser)

    from studies.theory import plots

    results, seconds = timed_measure(options.seed)
    rows = findings(results)
    print_table(rows, options.seed, seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "theory.json", results, rows, options.seed)
    for path in [options.output / "theory.json", *plots.draw(results, options.output)]:
        print(path)


if __name__ == "__main__":
    main()
