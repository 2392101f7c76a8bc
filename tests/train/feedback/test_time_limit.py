"""A judge's time limit: what waits, computes or catches everything is stopped, and what is in time is left alone."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import pytest

from distil_kernels.train.feedback import time_limit as module
from distil_kernels.train.feedback.time_limit import SIGNAL, TookTooLong, time_limit


def waits() -> None:
    time.sleep(60)


def computes() -> None:
    while True:
        pass


def waits_for_another_thread() -> None:
    threading.Event().wait(60)


def catches_every_exception() -> None:
    with contextlib.suppress(Exception):
        time.sleep(60)


def catches_everything() -> None:
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


def sets_an_alarm_of_its_own() -> None:
    signal.alarm(30)
    try:
        time.sleep(60)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(
    "judge",
    [
        waits,
        computes,
        waits_for_another_thread,
        catches_every_exception,
        catches_everything,
        sets_an_alarm_of_its_own,
    ],
)
def test_whatever_it_does_is_stopped(judge: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN", 0.05)
    start, threads = time.monotonic(), threading.active_count()
    with pytest.raises(TookTooLong), time_limit(0.05):
        judge()  # type: ignore[operator]
    assert time.monotonic() - start < 10
    assert threading.active_count() == threads


def test_what_is_in_time_is_left_alone() -> None:
    before = signal.getsignal(SIGNAL)
    for _ in range(100):  # some of these end just as the limit does
        with contextlib.suppress(TookTooLong), time_limit(1e-4):
            time.sleep(5e-5)
    with time_limit(10.0):
        time.sleep(0.01)
    assert signal.getsignal(SIGNAL) is before
