"""Programs that are judged a second: right answers to one problem, each run once for every test of it.

python bench/judging.py                                               as the trainer does, on all cores
python bench/judging.py --answers 4 --one_by_one                      one after the other
git worktree add ../before e9aadaf
PYTHONPATH=../before python bench/judging.py --answers 4 --one_by_one     an earlier commit's judge
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from distil_kernels.train.tasks import make_task

PROGRAM = "n = int(input())\nprint(sum(i * i for i in range(n)))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--tests", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one_by_one", action="store_true", help="answers are judged one after the other")
    options = parser.parse_args()
    tests = [
        {"input": f"{n}\n", "output": f"{sum(i * i for i in range(n))}\n", "testtype": "stdin"}
        for n in range(100, 100 + options.tests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "set.jsonl"
        file.write_text(json.dumps({"question_content": "?", "public_test_cases": tests}) + "\n")
        task = make_task(f"code:{file}", seed=0)
    entry = task.problem(0).entry
    task.score(PROGRAM, entry)  # starts the server

    def score(number: int) -> float:
        return task.score(PROGRAM, entry)

    for _ in range(options.rounds):
        began = time.perf_counter()
        if options.one_by_one:
            scores = list(map(score, range(options.answers)))
        else:
            from distil_kernels.train.tasks.sandbox import in_parallel  # an earlier commit has none

            scores = in_parallel(score, range(options.answers))
        seconds = time.perf_counter() - began
        assert scores == [1.0] * options.answers
        programs = options.answers * options.tests
        size = f"{options.answers} answers x {options.tests} tests"
        machine = f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{size}: {seconds:6.2f} s, {programs / seconds:6.1f} programs/s, {machine}")


if __name__ == "__main__":
    main()
