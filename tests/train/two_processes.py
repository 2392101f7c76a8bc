"""Processes on the CPU that find each other as torchrun's do, two or more, forked from a server with the trainer."""

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


def together(function: Callable[..., int | None], *arguments: Any, number: int = 2) -> list[int | None]:
    """Runs function(rank, *arguments) in some processes; returns their exit statuses, None read as 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(target=_one, args=(rank, number, port, function, arguments)) for rank in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)  # one that waits for another would wait for ever
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _one(rank: int, number: int, port: int, function: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
