"""A run directory has one writer: who it is, when it is gone, and what a second start is told."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import metrics, train

from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.run import directory as run_directory
from distil_kernels.train.run import lock
from distil_kernels.train.run.lock import LOCK, RunLock, holder

OTHER = {"process": 7, "host": "elsewhere", "boot": "another start", "since": "yesterday"}


@contextmanager
def other_writer(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a directory, as a run does for its life."""
    code = "import sys; from pathlib import Path; from distil_kernels.train.run.lock import RunLock; "
    code += "RunLock(Path(sys.argv[1]), 'name'); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code, str(directory)], text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_second_writer_is_told_who_the_first_one_is(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(tiny_model, tmp_path, "run", steps=1)
    place = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "run"]
    with other_writer(directory) as process:
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        for arguments in (["--resume", str(directory)], place, [*place, "--overwrite"]):
            capsys.readouterr()
            assert main(arguments) == 2
            said = capsys.readouterr().err
            assert f"in use by process {process.pid} on {socket.gethostname()}" in said and said.count("\n") == 1
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert holder(directory) is None
    assert main(["--resume", str(directory), "--steps", "2"]) == 0  # the kernel dropped the lock with its process
    assert [record["step"] for record in metrics(directory) if record["kind"] == "step"] == [1, 2]
    assert not (directory / LOCK).exists()


@pytest.mark.slow
def test_a_process_that_the_writer_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from distil_kernels.train.run.lock import RunLock; "
    code += "RunLock(Path(sys.argv[1]), 'name'); os.fork() or (os.close(1), sys.stdin.read()); os._exit(0)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE)
    assert process.wait() == 0
    with RunLock(tmp_path, "resume"):
        pass
    process.stdin.close()


def leave(directory: Path, owner: dict[str, object]) -> None:
    """Writes the lock file of an owner that did not give it up."""
    (directory / LOCK).write_text(json.dumps(owner))


def test_who_was_killed_here_is_not_waited_for(tmp_path: Path) -> None:
    leave(tmp_path, {**OTHER, **lock._this_machine()})
    with RunLock(tmp_path, "resume", pytest.fail):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("left", [json.dumps(OTHER), '{"cut'])
def test_who_wrote_elsewhere_is_watched_and_then_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    (tmp_path / LOCK).write_text(left)
    said: list[str] = []
    with RunLock(tmp_path, "resume", said.append):
        assert "watching for 0 s" in said[0] and ("process 7 on elsewhere" in said[0]) == ("cut" not in left)


def no_locks(*_: object) -> None:
    raise OSError(lock.errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("lockf", [None, no_locks])
def test_who_writes_elsewhere_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lockf: Callable[..., None] | None
) -> None:
    """On a file system that carries locks to no other machine, or has none."""
    if lockf is not None:
        monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    leave(tmp_path, OTHER)
    with pytest.raises(ValueError, match=r"\[resume\] .* in use by process 7 on elsewhere \(since yesterday\)"):
        RunLock(tmp_path, "resume", lambda _: leave(tmp_path, {**OTHER, "beat": 8}))


def test_who_ends_elsewhere_while_it_is_watched_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    leave(tmp_path, OTHER)
    with RunLock(tmp_path, "resume", lambda _: (tmp_path / LOCK).unlink()):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_the_owner_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with RunLock(tmp_path, "name"):
        before = (tmp_path / LOCK).read_text()
        while (tmp_path / LOCK).read_text() == before:
            time.sleep(0.01)
        assert json.loads((tmp_path / LOCK).read_text()).items() >= lock._this_machine().items()


def test_two_starts_of_one_name_make_one_directory(tmp_path: Path) -> None:
    made = run_directory.make(tmp_path / "run", Config().to_json())
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with made, pytest.raises(ValueError, match=r"\[name\] .*run was made by another process meanwhile"):
        run_directory.make(tmp_path / "run", Config().to_json())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "metrics.jsonl"]
