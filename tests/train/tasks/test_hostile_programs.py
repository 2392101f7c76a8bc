"""Every hostile program does its harm without walls, and none behind them, whichever of the walls a machine has."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hostile_programs import EXHAUSTS, PRINTS, REACHES, READS, WRITES
from safetensors.numpy import save_file

from distil_kernels.train import tasks
from distil_kernels.train.tasks.sandbox import WALLS, Limits, Sandbox

pytestmark = pytest.mark.slow

SMALL = Limits(seconds=0.5)
LARGE = Limits(seconds=10.0, memory_bytes=2**33, output_bytes=2**28)
KINDS = {"reads": READS, "writes": WRITES, "reaches": REACHES, "prints": PRINTS, "exhausts": EXHAUSTS}
PROGRAMS = [(kind, name) for kind, programs in KINDS.items() for name in programs]


@pytest.fixture(scope="module")
def unwalled() -> Iterator[Sandbox]:
    sandbox = Sandbox(())
    with pytest.raises(ValueError, match=r"\[unsafe_sandbox\] this machine offers neither Landlock nor namespaces"):
        sandbox.walls()
    sandbox.is_unsafe_allowed = True
    with pytest.warns(UserWarning, match="they can read and change what this user can"):
        assert not sandbox.walls().are_enough
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def walled() -> Iterator[dict[str, Sandbox]]:
    """As different machines have them."""
    machines = {"all": WALLS, "no namespaces": WALLS[1:], "no Landlock": (WALLS[0], WALLS[2])}
    sandboxes = {name: Sandbox(kinds) for name, kinds in machines.items()}
    for sandbox in sandboxes.values():
        assert sandbox.walls().are_enough
    assert sandboxes["all"].walls()[:3] > (True, 0, True) and not sandboxes["no namespaces"].walls().has_namespaces
    yield sandboxes
    for sandbox in sandboxes.values():
        sandbox.close()


class Outside(NamedTuple):
    """What hostile programs aim at."""

    folder: Path
    secret: str
    replacements: dict[str, str]
    contacts: list[str]
    """Filled by the listeners."""

    def program(self, text: str) -> str:
        for name, value in self.replacements.items():
            text = text.replace(name, value)
        return f"import os\ntry: os.chdir({self.replacements['SCRATCH']!r})\nexcept OSError: pass\n{text}"

    def state(self) -> dict[str, object]:
        """Everything of the folder that can be changed."""
        state: dict[str, object] = {}
        for path in sorted([self.folder, *self.folder.rglob("*")]):
            stat = path.lstat()
            about = (stat.st_mode, stat.st_uid, stat.st_size, stat.st_nlink)
            is_file = path.is_file() and not path.is_symlink()
            more = (stat.st_mtime_ns, path.read_bytes(), os.listxattr(path)) if is_file else ()
            state[str(path)] = about + more
        return state


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory, library: str) -> Iterator[Outside]:
    secret = secrets.token_hex(8)
    folder, scratch = tmp_path_factory.mktemp("outside"), tmp_path_factory.mktemp("scratch")
    for path in (folder, scratch, *folder.parents):
        if path.is_relative_to(folder.parents[2]):
            path.chmod(0o777)  # that a user of no rights gets here is not what holds programs off
    (folder / "secret").write_text(secret)
    (folder / "secret").chmod(0o666)
    os.setxattr(folder / "secret", "user.secret", secret.encode())
    (folder / "module.py").write_text(f"SECRET = {secret!r}")
    (folder / "settings").write_text(f"[a]\nb = {secret}")
    (folder / "names").mkdir(mode=0o777)
    (folder / "names" / secret).touch()
    (folder / "points").symlink_to(secret)
    save_file({"a": np.zeros(2)}, folder / "tensors", {"secret": secret})
    with sqlite3.connect(folder / "base") as base:
        base.execute("create table a(b)")
        base.execute("insert into a values (?)", (secret,))
    contacts: list[str] = []
    stream, unix, abstract = (
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX),
    )
    port = stream.getsockname()[1]
    datagrams, named = socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", port))
    unix.bind(str(folder / "listens"))
    abstract.bind(f"\0{secret}")
    named.bind(str(folder / "datagrams"))
    os.chmod(folder / "listens", 0o777)
    os.chmod(folder / "datagrams", 0o777)
    listeners = [stream, unix, abstract, datagrams, named]
    for listener in listeners:
        if listener.type == socket.SOCK_STREAM:
            listener.listen()
        threading.Thread(target=_listen, args=(listener, contacts), daemon=True).start()
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    replacements = {
        "OUTSIDE": str(folder), "SCRATCH": str(scratch), "PORT": str(port), "ABSTRACT": secret, "LIBRARY": library,
        "VICTIM": str(victim.pid), "TESTER": str(os.getpid()), "TASKS": str(Path(tasks.__file__).parent),
    }  # fmt: skip
    yield Outside(folder, secret, replacements, contacts)
    assert victim.poll() is None
    victim.kill()
    victim.communicate()
    for listener in listeners:
        listener.close()
    shutil.rmtree(scratch)


def _listen(listener: socket.socket, contacts: list[str]) -> None:
    try:
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(9)
        contacts.append(str(listener.family))
    except OSError:  # closed
        pass


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("library")
    (folder / "native.cpp").write_text(
        "#include <fcntl.h>\n#include <stdlib.h>\n"
        '__attribute__((constructor)) static void begin() { creat(getenv("TARGET"), 0666); }\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", "-o", folder / "native.so", folder / "native.cpp"], check=True)
    return (folder / "native.so").read_bytes().hex()


@pytest.mark.parametrize(
    ("kind", "name"), PROGRAMS, ids=[f"{kind}-{name}".replace(" ", "_") for kind, name in PROGRAMS]
)
def test_harm_is_done_without_walls_only(
    outside: Outside, unwalled: Sandbox, walled: dict[str, Sandbox], kind: str, name: str
) -> None:
    program, state = outside.program(KINDS[kind][name]), outside.state()

    def does_harm(sandbox: Sandbox, limits: Limits) -> bool:
        run = sandbox.run(program, limits=limits)
        if kind == "reaches" and sandbox is unwalled:
            deadline = time.monotonic() + 5
            while not outside.contacts and time.monotonic() < deadline:
                time.sleep(0.01)
        has_printed = "ESCAPED" in run.output or outside.secret in run.output
        return has_printed or bool(outside.contacts) or outside.state() != state

    with ThreadPoolExecutor(len(walled)) as threads:  # some wait for their limits
        limits = SMALL if kind == "exhausts" else Limits()
        harm = threads.map(lambda sandbox: does_harm(sandbox, limits), walled.values())
    assert not any(harm)
    assert does_harm(unwalled, LARGE if kind == "exhausts" else Limits())
    assert len(PROGRAMS) >= 80
