"""Signals that ask a run to stop, and output that is gone before the run is."""

from __future__ import annotations

import io
import os
import signal
import time

import pytest
from rich.console import Console

from distil_kernels.train.run import interrupt
from distil_kernels.train.run.interrupt import Interrupt
from distil_kernels.train.run.output import LastingOutput


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_is_a_request(number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:  # these tests may run under nohup
        signal.signal(number, signal.SIG_DFL)
    before, out = signal.getsignal(number), io.StringIO()
    with Interrupt(Console(file=out)) as request:
        for _ in range(2):  # a second one in the same second is torchrun's, of the same Ctrl-C
            os.kill(os.getpid(), number)
            assert request.requested
    assert out.getvalue().count("finishing this step") == 1
    assert signal.getsignal(number) is before


def test_another_ctrl_c_stops_at_once_and_another_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "ONE_REQUEST", 0.0)
    with Interrupt(Console(quiet=True)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(Console(quiet=True)) as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_is_gone_ends_nothing() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        console = Console(file=LastingOutput(pipe))  # type: ignore[arg-type]
        console.print("heard")
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)
        for _ in range(3):
            console.print("not heard")
        pipe.write("nor this")
