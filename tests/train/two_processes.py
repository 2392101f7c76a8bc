"""Two processes on the CPU that find each other as torchrun's do, forked from a server with the trainer imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["distil_kernels.train.trainer"])


def together(function: Callable[..., int | None], *arguments: Any) -> list[int | None]:
    """Runs function(rank, *arguments) in two processes; returns their exit statuses, None read as 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [PROCESSES.Process(target=_one, args=(rank, port, function, arguments)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(180)  # one that waits for the other would wait for ever
        process.kill()
        process.join()
    return [process.exitcode for process in both]


def _one(rank: int, port: int, function: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    try:
        status = function(rank, *arguments)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
