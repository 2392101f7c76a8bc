"""Runs one program of a model, in a process that is its own and ends with it.

A script runs as `__main__`. A module stays and does what the judge asks: hands out a name, an attribute or the result
of a call, as plain data or as the number of an object that stays here. Nothing in this process decides anything: what
it sends is data, whoever sends it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import linecache
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any

from . import wire
from .walls import Limits, Walls, confine_program


def main(walls: Walls, descriptors: list[int]) -> None:
    """Never returns."""
    *files, data = descriptors
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    job = wire.receive(data)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "backslashreplace")
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", "backslashreplace")
    sys.argv = ["program.py"]
    sys.orig_argv = sys.argv[:]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    confine_program(walls, Limits(*job["limits"]))
    if job["is_script"]:
        _run_script(job["units"], data)
    else:
        _serve(job["units"], data)


def _run(units: list[list[str]], module: types.ModuleType) -> None:
    sys.modules[module.__name__] = module
    for name, text in units:
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, "exec"), vars(module))


def _run_script(units: list[list[str]], data: int) -> None:
    code, has_raised = 0, False
    try:
        try:
            _run(units, types.ModuleType("__main__"))
        finally:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        code, has_raised = 1, True
        print(_told(error), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    wire.send(data, {"has_raised": has_raised})
    os._exit(code & 0xFF)


def _serve(units: list[list[str]], data: int) -> None:
    """Answers requests until the judge ends this process."""
    module = types.ModuleType("program")
    held: list[Any] = []

    def hold(value: Any) -> int:
        held.append(value)
        return len(held) - 1

    def answer(request: dict[str, Any]) -> Any:
        kind = request["do"]
        if kind == "name":
            return hold(vars(module)[request["name"]]) if request["name"] in vars(module) else None
        target = held[request["of"]]
        if kind == "attribute":
            return wire.encode(getattr(target, request["name"]), hold)
        if kind == "set":
            return setattr(target, request["name"], wire.decode(request["value"], held.__getitem__))
        arguments = wire.decode(request["arguments"], held.__getitem__)
        named = wire.decode(request["named"], held.__getitem__)
        return wire.encode(target(*arguments, **named), None if request["is_plain"] else hold)

    try:
        _run(units, module)
        reply: dict[str, Any] = {"value": None}
    except BaseException as error:
        reply = _failure(error)
    while True:
        wire.send(data, reply)
        request = wire.receive(data)
        try:
            reply = {"value": answer(request)}
        except wire.NotPlain as error:
            reply = {"not_plain": str(error)}
        except BaseException as error:
            reply = _failure(error)


def _failure(error: BaseException) -> dict[str, str]:
    return {"raised": type(error).__name__, "text": _told(error)}


def _told(error: BaseException) -> str:
    """The traceback, without this module's frames."""
    try:
        told = traceback.TracebackException.from_exception(error, limit=-50)
        parts: Any = told
        while parts is not None:
            parts.stack = traceback.StackSummary.from_list(
                [frame for frame in parts.stack if frame.filename != __file__ and "/importlib" not in frame.filename]
            )
            parts = parts.__cause__ or parts.__context__
        return "".join(told.format(chain=False)).strip()
    except BaseException:  # of an exception that is a program's own
        return type(error).__name__
