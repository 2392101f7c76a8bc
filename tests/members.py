"""Processes that stay for a test module: each test has all of them call a function at once, as members of one group."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS = 60
"""After which a member that waits for the others gives up."""

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["distil_kernels.losses", "distil_kernels.testing", "torch.distributed.tensor", "torch._dynamo"]
)


class Members:
    """A process group on the CPU (gloo)."""

    def __init__(self, number: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [_PROCESSES.Pipe() for _ in range(number)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            _PROCESSES.Process(target=_serve, args=(rank, number, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns what function(rank, *arguments) returns in each member, or the exception that it raises."""
        for end in self._ends:
            end.send((function, arguments))
        for end in self._ends:
            assert end.poll(2 * SECONDS), "a member does not answer"
        return [end.recv() for end in self._ends]

    def results(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns what function(rank, *arguments) returns in each member, none of which may raise."""
        results = self.call(function, *arguments)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, number: int, port: int, end: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # poisoned, as in tests/conftest.py
    torch.distributed.init_process_group("gloo", rank=rank, world_size=number, timeout=timedelta(seconds=SECONDS))
    while True:
        function, arguments = end.recv()
        try:
            result = function(rank, *arguments)
        except Exception as error:
            result = type(error)(f"{error}\n\nin member {rank}:\n{traceback.format_exc()}")
        end.send(result)
