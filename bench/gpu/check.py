"""Everything that only a GPU can show, in one command. Not yet run on a GPU.

    python bench/gpu/check.py [STAGE ...] [--out FOLDER] [--minutes 9] [--peers FOLDER] [--commit HASH] [--rehearse]

Stages, in the order of the first fifteen minutes on a GPU (default: the first nine; the times are of an H200):

    build      the extension, in place                                                        20 s
    smoke      small calls of each back end against plain torch; clusters of every size
               against two kernels; more than 2^31 entries                                    40 s
    parts      each product at several row counts, each row kernel's bandwidth                35 s
    tune       clusters and two kernels by vocabulary: what choose_row_kernel should say      15 s
    time       the targets: times over the four bare products, extra memory                   35 s
    accuracy   gradient errors against float64, teacher and student apart and nearly equal    20 s
    profile    milliseconds by kernel of one step                                             20 s
    test       tests/gpu, eight processes where pytest-xdist is there                         60 s
    sanitize   compute-sanitizer, memcheck and racecheck, on the kernels of csrc/cuda        120 s
    sweep      rows of chunk and staging                                                      20 s
    peers      what others have, timed in the same rounds (--peers: a folder of packages)    120 s
    resources  registers, spills, instructions per pair of logits (needs no GPU)              40 s
    install    pip install -e . --no-build-isolation --no-deps (needs no GPU)                 30 s

Fifteen minutes (a start takes 1:30):

    1:30   check.py build smoke parts tune time accuracy profile --minutes 5 --commit HASH
    5:00   check.py test sanitize --minutes 4
    8:00   ncu --clock-control none --kernel-name regex:row_ --launch-count 3 --section SpeedOfLight
           --section WarpStateStats python bench/gpu/stages.py RECORD parts;  check.py sweep
    9:30   a fault to mend, or check.py peers --minutes 3

If only one thing may run: build smoke parts (90 s). Where smoke fails nothing after it means anything, and nothing
runs: try CUDA_LAUNCH_BLOCKING=1, and memcheck, on the failing back end alone.

This file needs no torch and no built extension; what runs on the GPU is in stages.py: neighbouring stages in one
process, a new one after a stage that fails. FOLDER (default bench/results) gets gpu_check.json, written anew after
every number, and gpu_check.log: a run that is killed leaves what it has measured, and a second run of other stages
adds to it. Nothing begins after --minutes. Without a GPU it says so and exits 2; --rehearse runs the stages of one
process on the CPU, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = {
    "build": 240, "smoke": 120, "parts": 120, "tune": 60, "time": 240, "accuracy": 120, "profile": 90, "test": 400,
    "sanitize": 300, "sweep": 120, "peers": 300, "resources": 200, "install": 240,
}  # fmt: skip
"""By name, the most seconds each may take."""

DEFAULT = list(STAGES)[:9]
ON_GPU = ("smoke", "parts", "tune", "time", "accuracy", "profile", "sweep", "peers")


def commands(stage: str, record: Path) -> dict[str, list[str]]:
    """The commands of a stage that is not in ON_GPU, by the name on record."""
    python = sys.executable
    if stage == "build":
        return {stage: [python, "setup.py", "build_ext", "--inplace"]}
    if stage == "install":
        return {stage: [python, "-m", "pip", "install", "-q", "-e", str(ROOT), "--no-build-isolation", "--no-deps"]}
    if stage == "test":
        parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        return {stage: [python, "-m", "pytest", "-q", *parallel, "--durations=5", "tests/gpu"]}
    if stage == "resources":
        return {stage: [python, "bench/gpu/resources.py"]}
    if shutil.which("compute-sanitizer") is None:
        print("no compute-sanitizer: nothing looks for races", flush=True)
        return {}
    ours = [part for name in ("row_", "cost_to_go") for part in ("--kernel-name", f"kernel_substring={name}")]
    program = [python, "bench/gpu/stages.py", str(record), stage]
    return {
        f"{stage} {tool}": ["compute-sanitizer", "--tool", tool, *ours, "--error-exitcode", "1", *program]
        for tool in ("memcheck", "racecheck")
    }


def run_on_gpu(stages: list[str], record: Path, log: Path, peers: str | None, rehearse: bool, end: float) -> bool:
    """Runs stages in one process, and in a new one those after a stage that fails. Returns whether all passed."""
    waiting = list(stages)
    for stage in stages:
        note(record, stage, "not run")
    while waiting:
        remaining = end - time.monotonic()
        if remaining <= 10:
            for stage in waiting:
                note(record, stage, "no time left")
            return False
        program = [sys.executable, "bench/gpu/stages.py", str(record), *waiting]
        ended = run([*program, *(["--rehearse"] if rehearse else [])], remaining, log, peers)
        results = json.loads(record.read_text())["stages"]
        waiting = [stage for stage in waiting if results[stage] != "passed"]
        if waiting:
            note(record, waiting[0], ended)
            print(f"== {waiting[0]}: {ended}", flush=True)
            if waiting[0] == "smoke":
                return False
            waiting = waiting[1:]
    return all(json.loads(record.read_text())["stages"][stage] == "passed" for stage in stages)


def note(record: Path, stage: str, ended: str) -> None:
    results = json.loads(record.read_text())
    results["stages"][stage] = ended
    record.write_text(json.dumps(results, indent=1) + "\n")


def run(command: list[str], seconds: float, log: Path, peers: str | None) -> str:
    """Its output to the screen and the log as it comes; returns how it ended."""
    paths = [*([peers] if peers else []), str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        print(f"\n$ {' '.join(command)}".replace(str(ROOT), "."), file=file, flush=True)
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", f"{seconds:.0f}", *command], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                print(line, end="", file=file, flush=True)
            code = process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return {0: "passed", 124: f"stopped after {seconds:.0f} s"}.get(code, f"failed ({code})")


def header(commit: str | None) -> dict[str, object]:
    if commit is None:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = found.stdout.strip() or None
    return {"commit": commit, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stages": {}, "results": {}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--peers", help="folder of the peers' packages (pip install --target)")
    parser.add_argument("--commit", help="of a copy without its history")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage {sorted(unknown)}; there are {list(STAGES)}")
    if not options.rehearse and not _has_gpu():
        print("gpu_check: the driver finds no GPU on this machine")
        return 2
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    record, log = options.out / "gpu_check.json", options.out / "gpu_check.log"
    if not record.exists():
        record.write_text(json.dumps(header(options.commit)) + "\n")
    passed = True
    target = record.resolve()
    for on_gpu, group in itertools.groupby(options.stages or DEFAULT, key=ON_GPU.__contains__):
        if on_gpu:
            passed &= run_on_gpu(list(group), target, log, options.peers, options.rehearse, end)
            if json.loads(record.read_text())["stages"].get("smoke", "passed") not in ("passed", "no time left"):
                break
            continue
        for stage in group:
            for name, command in commands(stage, target).items():
                remaining, began = end - time.monotonic(), time.monotonic()
                ended = "no time left"
                if remaining > 10:
                    ended = run(command, min(STAGES[stage], remaining), log, options.peers)
                print(f"== {name}: {ended}, {time.monotonic() - began:.0f} s", flush=True)
                note(record, name, ended)
                passed &= ended == "passed"
    return int(not passed)


def _has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
