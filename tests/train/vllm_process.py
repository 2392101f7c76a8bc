"""A real vLLM server, where VLLM_PYTHON names the Python of an environment that has it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from distil_kernels.train.models import smollm2
from distil_kernels.train.rollouts.vllm_server import write_served


@contextlib.contextmanager
def vllm_server(directory: Path, logprobs_mode: str) -> Iterator[str]:
    """The address of a server of the default model, in float32; a test is skipped where there is no vLLM."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON names no Python with vLLM")
    write_served(smollm2.NAME, directory / "model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = {
        "model": str(directory / "model"), "port": str(port), "dtype": "float32", "max-model-len": "1100",
        "logprobs-mode": logprobs_mode,
    }  # fmt: skip
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    kind = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **kind})
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url):
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return urlopen(f"{url}/health", timeout=5).status == 200
    except (URLError, OSError):
        return False
