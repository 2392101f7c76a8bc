"""The machine and the software that a run's numbers hold for: the header of its JSON and of its tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = (
    "distil-kernels", "torch", "triton", "liger-kernel", "trl", "transformers", "torchtune", "flash-linear-attention",
    "cut-cross-entropy", "orda-kernel",
)  # fmt: skip


def header(device: str, threads: int) -> dict[str, object]:
    """Date, command, commit, device, threads and versions of this run, as JSON keys."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    entries: dict[str, object] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": threads,
        "versions": versions,
    }
    if device == "cpu":
        entries["instruction_set"] = torch.backends.cpu.get_cpu_capability()
        entries["allocator"] = _allocator()
    return entries


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model_names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{model_names[0] if model_names else platform.processor()}, {os.cpu_count()} cores"


def _allocator() -> str:
    """The settings that decide the cost of fresh memory, on which naive code depends most."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    pages = path.read_text().split("[")[-1].split("]")[0] if path.exists() else "unknown"
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items())
                if name == "LD_PRELOAD" or name.startswith(("MALLOC_", "GLIBC_TUNABLES", "THP_MEM"))]  # fmt: skip
    return f"transparent huge pages {pages}; {' '.join(settings) or 'THP_MEM_ALLOC_ENABLE unset, system malloc'}"


def header_lines(header: dict) -> list[str]:
    """The header as lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [f"{header['device']}, {header['threads']} threads, {header['date']}, commit {header['commit']}", versions]
    if "allocator" in header:
        lines.append(f"{header['instruction_set']}; {header['allocator']}")
    return lines
