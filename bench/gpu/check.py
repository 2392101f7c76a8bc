"""Everything that only a GPU can show, in one command. Not yet run on a GPU.

    python bench/gpu/check.py [STAGE ...] [--out FOLDER] [--minutes 9] [--peers FOLDER] [--commit HASH] [--rehearse]

Stages, the most valuable first (default: all of them):

    build      the extension, in place
    smoke      small calls of each back end against plain torch
    time       the issue's targets: times over the four bare products, extra memory
    accuracy   gradient errors against float64, with teacher and student apart and nearly equal
    parts      each product at several row counts, each row kernel's bandwidth: what bounds what
    sweep      rows of chunk and ring
    profile    milliseconds by kernel of one step
    peers      what others have, timed in the same rounds (--peers: a folder of their packages)
    test       tests/gpu
    sanitize   compute-sanitizer, memcheck and racecheck, on the row kernels
    resources  registers and spills
    install    pip install -e . --no-build-isolation --no-deps

This file needs no torch and no built extension; what runs on the GPU is in stages.py, a process per stage. FOLDER
(default bench/results) gets gpu_check.json, written anew after every number, and gpu_check.log: a run that is killed
leaves what it has measured, and a second run of other stages adds to it. Nothing begins after --minutes. Without a
GPU it says so and exits 2; --rehearse runs the stages from smoke to peers on the CPU, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
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
    "build": 240, "smoke": 120, "time": 240, "accuracy": 120, "parts": 120, "sweep": 120, "profile": 90, "peers": 300,
    "test": 400, "sanitize": 300, "resources": 200, "install": 240,
}  # fmt: skip
"""By name, the most seconds each may take."""


def commands(stage: str, record: Path, rehearse: bool) -> list[list[str]]:
    python = sys.executable
    if stage == "build":
        return [[python, "setup.py", "build_ext", "--inplace"]]
    if stage == "install":
        return [[python, "-m", "pip", "install", "-q", "-e", str(ROOT), "--no-build-isolation", "--no-deps"]]
    if stage == "test":
        return [[python, "-m", "pytest", "-q", "--durations=5", "tests/gpu"]]
    if stage == "resources":
        return [[python, "bench/gpu/resources.py"]]
    own = [python, "bench/gpu/stages.py", stage, str(record), *(["--rehearse"] if rehearse else [])]
    if stage != "sanitize":
        return [own]
    if shutil.which("compute-sanitizer") is None:
        print("no compute-sanitizer: nothing looks for races", flush=True)
        return []
    only_ours = ["--kernel-name", "kernel_substring=row_", "--error-exitcode", "1"]
    return [["compute-sanitizer", "--tool", tool, *only_ours, *own] for tool in ("memcheck", "racecheck")]


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
    failed = False
    for stage in options.stages or STAGES:
        for command in commands(stage, record.resolve(), options.rehearse):
            left = end - time.monotonic()
            began = time.monotonic()
            ended = run(command, min(STAGES[stage], left), log, options.peers) if left > 10 else "no time left"
            name = f"{stage} {command[2]}" if stage == "sanitize" else stage
            print(f"== {name}: {ended}, {time.monotonic() - began:.0f} s", flush=True)
            failed |= ended != "passed"
            found = json.loads(record.read_text())
            found["stages"][name] = ended
            record.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


def _has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
